"use strict";
// The data is checked and cut to size by launch/page.py: a number is a finite number or null, a text is a string.
// Texts reach the document through textContent alone.
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const unfolded = (text) => JSON.parse(text); // curves and timelines, which are long: read for the runs that are drawn
const PARITY_LIMIT = 1e-10; // relative difference of float64 gradients; rounding gives 1e-15
const MOST_ROWS = 200; // of the table, until all are asked for
const MOST_DRAWN = 40; // runs in a chart
const MOST_TIMELINES = 8;
const MOST_ACTIONS = 500; // of a run, in the table of its timeline
const MEMORY = ["parameters", "gradients", "optimizer", "activations", "other"];
const MESH_DIMS = ["pp", "dp_replicate", "dp_shard", "cp", "tp"];
const STEP_PARTS = { compute: "compute", communication: "exposed communication", idle: "idle in the pipeline" };
const ACTIONS = { // letter, name and series
  forward: ["F", "forward", 0],
  backward: ["B", "backward", 1],
  backward_input: ["I", "backward, inputs", 2],
  backward_weight: ["W", "backward, weights", 4],
};
const DASHES = ["", "7 4", "2 3", "10 3 2 3", "4 2", "1 4"];

// ---- small tools ---------------------------------------------------------------------------------------------------

const $ = (selector, root = document) => root.querySelector(selector);

/** An element: attributes as text, `on...` as listeners, children as nodes or text. */
function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

function shape(name, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const isNumber = (value) => typeof value === "number";
const numbers = (values) => values.filter(isNumber);
const largest = (values) => numbers(values).reduce((most, value) => Math.max(most, value), 0);
const sum = (values) => numbers(values).reduce((total, value) => total + value, 0);
const unique = (values) => [...new Set(values)];

/** One format for a column: as many decimals as its smallest number needs for three digits, within reason. */
function formatter(values) {
  const sizes = numbers(values).map(Math.abs).filter((size) => size > 0);
  if (!sizes.length) return (value) => value.toFixed(0);
  const [least, most] = [Math.min(...sizes), Math.max(...sizes)].map((size) => Math.floor(Math.log10(size)));
  if (least < -4 || most > 11) return (value) => (value ? value.toExponential(2) : "0");
  const decimals = Math.max(0, Math.min(2 - least, 4 - most, 4));
  const format = new Intl.NumberFormat("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
  return (value) => format.format(value);
}

/** The unit for bytes of this size, and its size in bytes. */
function byteUnit(values) {
  const units = [["B", 1], ["KiB", 2 ** 10], ["MiB", 2 ** 20], ["GiB", 2 ** 30], ["TiB", 2 ** 40]];
  return units.findLast(([, size]) => largest(values) >= size) ?? units[0];
}

function timeUnit(values) {
  return largest(values) < 0.1 ? ["ms", 1e-3] : ["s", 1];
}

const scientific = (value) => (value === 0 ? "0" : value.toExponential(1));
const day = (time) => (time && !Number.isNaN(Date.parse(time)) ? new Date(time).toISOString().slice(0, 16).replace("T", " ") : null);
const commitOf = (run) => run.environment.git_commit && String(run.environment.git_commit).replace(/^([0-9a-f]{7})[0-9a-f]+/, "$1");
const percent = (value) => (isNumber(value) ? value * 100 : null);
// A peak that was itself measured is the ceiling, or this rank's share of it where ranks share cores.
const ceilingOf = ({ flops }) => {
  if (!isNumber(flops.matmul_ceiling_flops) || !flops.peak_flops) return null;
  return flops.peak_source?.startsWith("measured") ? 1 : flops.matmul_ceiling_flops / flops.peak_flops;
};
const groupName = (run) => {
  const { comparison, hardware } = DATA.groups[run.group];
  return comparison ? `${comparison}, on ${hardware}` : hardware;
};

// ---- what is chosen, and its address -------------------------------------------------------------------------------

const state = { chosen: new Set(), sort: null, descending: false, query: "", status: "", comparison: "", strategy: "", all: false };

/** The newest comparison's measured runs that ended well; of a small page, those of every comparison. */
function defaultChoice() {
  const good = RUNS.filter((run) => run.status === "ok" && run.kind === "measured");
  const pool = good.length ? good : RUNS;
  if (pool.length <= MOST_DRAWN) return pool.map((run) => run.id);
  const newest = pool.reduce((a, b) => (String(b.environment.time_utc) > String(a.environment.time_utc) ? b : a));
  return pool.filter((run) => run.group === newest.group).slice(0, MOST_DRAWN).map((run) => run.id);
}
const DEFAULT = defaultChoice();

function readAddress() {
  const address = new URLSearchParams(location.hash.slice(1));
  const known = new Set(RUNS.map((run) => run.id));
  const column = COLUMNS.find(({ key }) => key === address.get("sort"));
  state.chosen = new Set((address.has("run") ? address.getAll("run") : DEFAULT).filter((id) => known.has(id)));
  state.sort = column ? column.key : null;
  state.descending = address.get("order") === "descending";
  for (const key of ["query", "status", "comparison", "strategy"]) state[key] = address.get(key) ?? "";
}

function writeAddress() {
  const address = new URLSearchParams();
  if (state.sort) address.append("sort", state.sort);
  if (state.sort && state.descending) address.append("order", "descending");
  for (const key of ["query", "status", "comparison", "strategy"]) if (state[key]) address.append(key, state[key]);
  const isDefault = state.chosen.size === DEFAULT.length && DEFAULT.every((id) => state.chosen.has(id));
  if (!isDefault) for (const id of state.chosen.size ? state.chosen : [""]) address.append("run", id);
  history.replaceState(null, "", `#${address}`);
}

// ---- the table -----------------------------------------------------------------------------------------------------

const PEAKS = numbers(RUNS.map((run) => run.memory?.largest.peak_bytes));
const BYTES = PEAKS.length ? byteUnit(PEAKS) : ["MiB", 2 ** 20];
const COLUMNS = [
  { key: "name", head: "name", text: (run) => run.name },
  { key: "status", head: "status", text: (run) => (run.kind === "dry-run" ? `${run.status}, dry run` : run.status) },
  { key: "layout", head: "layout", text: (run) => run.layout },
  { key: "mfu", head: "MFU\n%", number: (run) => percent(run.flops.mfu) },
  { key: "mfu_causal", head: "causal\n%", number: (run) => percent(run.flops.mfu_causal) },
  { key: "hfu", head: "HFU\n%", number: (run) => percent(run.flops.hfu) },
  { key: "tokens_per_s", head: "speed\ntokens/s", number: (run) => run.tokens_per_s },
  { key: "step_seconds", head: "step\ns", number: (run) => run.step_seconds.median },
  { key: "cpu_seconds_per_step", head: "CPU\ns/step", number: (run) => run.cpu_seconds_per_step },
  { key: "peak_bytes", head: `peak\n${BYTES[0]}`, number: (run) => run.memory && run.memory.largest.peak_bytes / BYTES[1] },
  { key: "loss", head: "last\nloss", number: (run) => run.loss, format: (loss) => loss.toFixed(4) },
  { key: "grad_diff", head: "gradient\ndifference", number: (run) => run.parity.max_rel_grad_diff, format: scientific },
  { key: "passed", head: "parity", text: (run) => ({ true: "passed", false: "FAILED", null: null })[run.parity.passed] },
];
for (const column of COLUMNS) column.format ??= column.number && formatter(RUNS.map(column.number));

function sorted(runs) {
  const column = COLUMNS.find(({ key }) => key === state.sort);
  if (!column) return runs;
  const value = column.number ?? column.text;
  const sign = state.descending ? -1 : 1;
  // What was not measured comes last in either direction.
  return [...runs].sort((a, b) => {
    const [left, right] = [value(a), value(b)];
    if (left === null || right === null) return (left === null) - (right === null);
    return sign * (column.number ? left - right : left.localeCompare(right, "en", { numeric: true }));
  });
}

function shownRuns() {
  const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = (run) => {
    const text = [run.name, run.id, run.layout, run.status, run.kind, run.hardware, run.shape, run.reason].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  };
  return sorted(RUNS).filter(
    (run) =>
      (!state.status || run.status === state.status) &&
      (!state.comparison || run.comparison === state.comparison) &&
      matches(run),
  );
}

function chosenRuns() {
  const chosen = sorted(RUNS).filter((run) => state.chosen.has(run.id));
  return chosen.sort((a, b) => a.group - b.group); // stable: the order within a group stays
}

function drawHead() {
  const cells = COLUMNS.map((column) => {
    const press = () => {
      // Numbers that are better when large start with the largest; a third press restores the order of the recipe.
      const first = Boolean(column.number) && !["step_seconds", "cpu_seconds_per_step", "peak_bytes", "loss", "grad_diff"].includes(column.key);
      if (state.sort !== column.key) Object.assign(state, { sort: column.key, descending: first });
      else if (state.descending === first) state.descending = !first;
      else state.sort = null;
      update();
    };
    return element("th", { scope: "col", class: column.text ? "text" : null, "data-key": column.key },
      element("button", { type: "button", onclick: press }, column.head));
  });
  const box = element("th", { scope: "col", class: "box" }, element("span", { class: "hidden" }, "compare"));
  $("#runs").append(element("thead", {}, element("tr", {}, box, ...cells)));
}

function cell(value, format) {
  if (value === null || value === undefined) {
    return element("td", { class: "null" }, element("span", { "aria-hidden": "true" }, "–"), element("span", { class: "hidden" }, "not measured"));
  }
  if (isNumber(value)) return element("td", { "data-value": value }, format(value));
  return element("td", { class: "text" }, value);
}

function tableRow(run) {
  const choose = (event) => {
    if (event.target.checked) state.chosen.add(run.id);
    else state.chosen.delete(run.id);
    update(false);
  };
  const box = element("input", { type: "checkbox", "aria-label": `Compare ${run.name}`, onchange: choose });
  box.checked = state.chosen.has(run.id);
  const cells = COLUMNS.slice(1).map((column) => {
    if (column.number) return cell(column.number(run), column.format);
    const made = cell(column.text(run));
    made.classList.add("text");
    if ((column.key === "status" && run.status !== "ok") || (column.key === "passed" && run.parity.passed === false)) {
      made.classList.add("bad");
      if (run.reason) made.title = run.reason;
    }
    return made;
  });
  const open = (event) => {
    event.preventDefault();
    showDetails(run);
  };
  const name = element("th", { scope: "row" }, element("a", { href: "#details", onclick: open }, run.name));
  return element("tr", { "data-id": run.id }, element("td", { class: "box" }, box), name, ...cells);
}

function drawTable() {
  const shown = shownRuns();
  const visible = state.all ? shown : shown.slice(0, MOST_ROWS);
  const bodies = [];
  for (const group of unique(visible.map((run) => run.group)).sort((a, b) => a - b)) {
    const body = element("tbody");
    if (DATA.groups.length > 1) {
      const { comparison, hardware } = DATA.groups[group];
      const title = element("th", { colspan: COLUMNS.length + 1, scope: "rowgroup" }, element("strong", {}, comparison || DATA.title), ` on ${hardware}`);
      body.append(element("tr", { class: "group" }, title));
    }
    body.append(...visible.filter((run) => run.group === group).map(tableRow));
    bodies.push(body);
  }
  const table = $("#runs");
  for (const body of table.querySelectorAll("tbody")) body.remove();
  table.append(...bodies);
  for (const head of table.querySelectorAll("th[data-key]")) {
    if (head.dataset.key === state.sort) head.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  }
  $("#more").hidden = visible.length === shown.length;
  $("#more").textContent = `Show all ${shown.length} rows`;
  $("#count").textContent = shown.length === RUNS.length ? `${RUNS.length} in all` : `${shown.length} of ${RUNS.length} shown`;
  $("#query").value = state.query;
  $("#status").value = state.status;
  $("#comparison").value = state.comparison;
}

function drawUnfinished() {
  const unfinished = shownRuns().filter((run) => run.status !== "ok" || run.parity.passed === false).slice(0, MOST_ROWS);
  $("#unfinished").hidden = !unfinished.length;
  $("#unfinished ul").replaceChildren(
    ...unfinished.map((run) => {
      const what = run.status === "ok" ? "parity FAILED" : run.status;
      const why = run.reason ?? (run.status === "ok" ? "its gradients are not those of one process" : "no reason given");
      return element("li", { "data-id": run.id }, element("strong", {}, run.name), " ", element("span", { class: "bad" }, what), `: ${why}`);
    }),
  );
}

// ---- charts: frames and axes ---------------------------------------------------------------------------------------

/** A figure: what it shows, a legend, the drawing, and the same numbers as a table.
 *
 * table: {head, rows, note}, of texts and numbers (null: not measured), made when it is opened. Without `draw` it says
 * that nothing was measured.
 */
function figure({ id, title, about, missing, key, draw, table, wide, name }) {
  const frame = element("figure", { id: `chart-${id}`, class: wide && draw ? "wide" : null },
    element("figcaption", {}, element("h3", {}, title), element("p", {}, about)));
  if (!draw) {
    frame.append(element("p", { class: "none" }, missing ?? "Not measured in these runs."));
    return frame;
  }
  if (key) frame.append(element("ul", { class: "key" }, ...key.map(([mark, label]) => element("li", {}, sample(mark), label))));
  frame.append(element("div", { class: "drawing" }));
  frame.redraw = () => {
    const box = $(".drawing", frame);
    const width = Math.max(240, Math.floor(box.clientWidth || 560));
    const drawing = draw(width);
    const title_ = shape("title", { id: `title-${id}` }, name ?? title);
    const told = shape("desc", { id: `desc-${id}` }, `${about} The numbers are in the table below the chart.`);
    drawing.prepend(title_, told);
    drawing.setAttribute("role", "img");
    drawing.setAttribute("aria-labelledby", `title-${id} desc-${id}`);
    box.replaceChildren(drawing);
  };
  const numbers_ = element("details", { class: "numbers" }, element("summary", {}, "Numbers"));
  numbers_.addEventListener("toggle", () => numbers_.append(dataTable(`${title}: numbers`, table)), { once: true });
  frame.append(numbers_);
  return frame;
}

function dataTable(caption, { head, rows, note }) {
  const columns = head.map((_, i) => rows.map((row) => row[i]));
  const formats = columns.map((column, i) => (/difference/.test(head[i]) ? scientific : formatter(column)));
  const isText = columns.map((column) => column.every((value) => !isNumber(value)) && column.some((value) => value !== null));
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    element("table", {},
      element("caption", { class: note ? null : "hidden" }, note ?? caption),
      element("thead", {}, element("tr", {}, ...head.map((text, i) => element("th", { scope: "col", class: isText[i] ? "text" : null }, text)))),
      element("tbody", {}, ...rows.map(([first, ...others]) =>
        element("tr", {}, element("th", { scope: "row" }, String(first)), ...others.map((value, i) => cell(value, formats[i + 1])))))));
}

/** A mark of the legend. */
function sample(mark) {
  const box = shape("svg", { width: 22, height: 12, viewBox: "0 0 22 12", "aria-hidden": "true" });
  if (typeof mark === "function") box.append(mark());
  else box.append(...block(0, 1, 22, 10, mark));
  return box;
}

/** A bar in colour `series`, with that series' texture over it. */
function block(x, y, width, height, series, title) {
  const [w, h] = [Math.max(0, width), height];
  const tip = title ? shape("title", {}, title) : null;
  const parts = [shape("rect", { x, y, width: w, height: h, class: `f${series % 6}` }, tip)];
  if (series % 6) parts.push(shape("rect", { x, y, width: w, height: h, fill: `url(#texture-${series % 6})`, "pointer-events": "none" }));
  return parts;
}

/** The textures, once for all drawings: a series is known by them where its colour is not seen. */
function textures() {
  const line = (d) => shape("path", { d, class: "texture" });
  const drawn = {
    1: [line("M-2 8L8 -2M0 10L10 0M-2 2L2 -2")],
    2: [shape("circle", { cx: 2, cy: 2, r: 1.2, class: "texture-dot" }), shape("circle", { cx: 6, cy: 6, r: 1.2, class: "texture-dot" })],
    3: [line("M-2 0L8 10M0 -2L10 8M-2 6L2 10")],
    4: [line("M2 0V8M6 0V8")],
    5: [line("M0 2H8M0 6H8")],
  };
  const patterns = Object.entries(drawn).map(([i, parts]) =>
    shape("pattern", { id: `texture-${i}`, width: 8, height: 8, patternUnits: "userSpaceOnUse" }, ...parts));
  return shape("svg", { width: 0, height: 0, "aria-hidden": "true", class: "hidden" }, shape("defs", {}, ...patterns));
}

/** Round numbers from 0 to at least `most`. */
function ticksTo(most, wanted) {
  const rough = (most || 1) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
  return Array.from({ length: Math.ceil((most || 1) / step - 1e-9) + 1 }, (_, i) => i * step);
}

const axisFormat = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

/** A row per run: names to the left, marks on a shared axis, numbers to the right.
 *
 * rows: {run, lines: [{mark(x, y, height) -> nodes, or null, cells: [text], tag, why}]}; columns: heads of the cells.
 * scale: {x(fraction function), ticks}. On a narrow screen the name is above its marks.
 */
function rowChart(width, { rows, columns, unit, most, lineHeight = 20, scale, extra }) {
  const narrow = width < 460;
  const severalGroups = new Set(rows.map(({ run }) => run.group)).size > 1;
  const longest = Math.max(...rows.map(({ run }) => run.name.length));
  const nameWidth = narrow ? 0 : Math.min(longest * 6.4 + 12, width * 0.3);
  const tagWidth = Math.max(...rows.flatMap(({ lines }) => lines.map(({ tag }) => (tag ? tag.length * 6.2 + 12 : 0))));
  const cellWidth = Math.max(46, ...columns.map((head) => head.length * 6.2 + 8));
  const shownColumns = narrow ? columns.slice(0, 1) : columns;
  const left = nameWidth + tagWidth;
  const right = width - shownColumns.length * cellWidth;
  const ticks = scale ? scale.ticks : ticksTo(most, narrow ? 3 : 5);
  const position = scale ? scale.position : (value) => value / ticks.at(-1);
  const x = (value) => left + Math.max(0, Math.min(1, position(value))) * (right - left - 14);
  const body = shape("g");
  let y = 24;
  let group = null;
  for (const { run, lines } of rows) {
    if (severalGroups && run.group !== group) {
      y += group === null ? 4 : 12;
      body.append(shape("text", { x: 0, y: y + 10, class: "soft strong" }, clipped(groupName(run), width)));
      y += 20;
      group = run.group;
    }
    const name = clipped(run.name, narrow ? width : nameWidth);
    body.append(shape("text", { x: 0, y: narrow ? y + 11 : y + lineHeight / 2 + 4 }, name, shape("title", {}, run.name)));
    if (narrow) y += 16;
    for (const { mark, cells, tag, why } of lines) {
      const middle = y + lineHeight / 2 + 4;
      if (tag) body.append(shape("text", { x: left - 8, y: middle, class: "soft end" }, tag));
      if (mark) body.append(...mark(x, y + 2, lineHeight - 4));
      else body.append(shape("text", { x: left, y: middle, class: "soft" }, run.status === "ok" ? "not measured" : run.status, why ? shape("title", {}, why) : null));
      shownColumns.forEach((_, i) => {
        if (mark) body.append(shape("text", { x: right + (i + 1) * cellWidth, y: middle, class: i ? "soft end" : "end" }, cells[i] ?? "–"));
      });
      y += lineHeight;
    }
    y += lines.length > 1 || narrow ? 7 : 3;
  }
  const axis = shape("g");
  for (const tick of ticks) {
    axis.append(shape("line", { x1: x(tick), x2: x(tick), y1: 20, y2: y, class: "gridline" }));
    axis.append(shape("text", { x: x(tick), y: y + 14, class: "soft middle" }, scale?.label ? scale.label(tick) : axisFormat.format(tick)));
  }
  axis.append(shape("text", { x: (left + right) / 2, y: y + 31, class: "soft middle" }, unit));
  shownColumns.forEach((head, i) => axis.append(shape("text", { x: right + (i + 1) * cellWidth, y: 12, class: "soft end" }, head)));
  if (extra) axis.append(...extra(x, 20, y));
  return shape("svg", { width, height: y + 38, viewBox: `0 0 ${width} ${y + 38}` }, axis, body);
}

function clipped(text, width) {
  const most = Math.max(4, Math.floor(width / 6.4));
  return text.length <= most ? text : `${text.slice(0, most - 1)}…`;
}

// ---- charts: one function each -------------------------------------------------------------------------------------

/** In words, why a run has no MFU; null where it has one, or where nobody said. */
function whyNoMfu({ flops, step_seconds }) {
  if (flops.mfu !== null) return null;
  if (flops.peak_flops === null) return flops.peak_source;
  return step_seconds.median === null ? "no step was timed" : flops.definition;
}

function utilisationChart(runs) {
  const known = runs.some((run) => isNumber(run.flops.mfu) || isNumber(run.flops.hfu) || isNumber(run.flops.mfu_causal));
  const all = runs.map((run) => [run.flops.mfu, run.flops.mfu_causal, run.flops.hfu, ceilingOf(run)].map(percent));
  const format = formatter(all.flatMap((values) => values.slice(0, 3)));
  const rows = runs.map((run, i) => {
    const [mfu, causal, hfu, ceiling] = all[i];
    const mark = (x, y, height) => [
      hfu === null ? null : shape("rect", { x: x(0), y, width: x(hfu) - x(0), height, class: "pale" }, shape("title", {}, `HFU ${format(hfu)} %`)),
      ...(mfu === null ? [] : block(x(0), y + 4, x(mfu) - x(0), height - 8, 0, `MFU ${format(mfu)} %`)),
      causal === null ? null : shape("line", { x1: x(causal), x2: x(causal), y1: y, y2: y + height, class: "whisker" }),
      ceiling === null ? null : shape("line", { x1: x(ceiling), x2: x(ceiling), y1: y - 3, y2: y + height + 3, class: "ceiling" }),
    ].filter(Boolean);
    const measured = [mfu, causal, hfu].some(isNumber);
    return { run, lines: [{ mark: measured ? mark : null, why: whyNoMfu(run), cells: [mfu, causal, hfu].map((v) => (v === null ? "–" : format(v))) }] };
  });
  const line = (name) => () => shape("line", { x1: 11, x2: 11, y1: 0, y2: 12, class: name });
  return figure({
    id: "utilisation",
    title: "MFU and HFU",
    about: "Share of the device's peak FLOP/s. MFU counts attention in full, causal the half that the mask leaves, HFU what was executed, recompute included. The ceiling is the fastest matmul measured on the device; on a CPU it is the peak, too.",
    missing: "Not measured in these runs: no record has FLOPs or a peak to divide by.",
    key: [[0, "MFU"], [line("whisker"), "MFU, causal"], [() => shape("rect", { x: 0, y: 0, width: 22, height: 12, class: "pale" }), "HFU"], [line("ceiling"), "ceiling"]],
    draw: known && ((width) => rowChart(width, { rows, columns: ["MFU", "causal", "HFU"], unit: "% of peak", most: largest(all.flat()), lineHeight: 22 })),
    table: {
      head: ["run", "MFU, % of peak", "MFU causal, %", "HFU, %", "ceiling, %", "model FLOPs per token", "executed FLOPs per token", "peak of a rank, FLOP/s", "measured ceiling, FLOP/s", "source of the peak"],
      rows: runs.map((run, i) => [run.name, ...all[i], run.flops.model_flops_per_token, run.flops.hardware_flops_per_token, run.flops.peak_flops, run.flops.matmul_ceiling_flops, run.flops.peak_source]),
    },
  });
}

function speedChart(runs) {
  // Tokens in a step over its 10th and 90th percentile of seconds: a slow step is a low rate.
  const at = (run, key) => {
    const { median } = run.step_seconds;
    return isNumber(run.tokens_per_s) && median && run.step_seconds[key] ? (run.tokens_per_s * median) / run.step_seconds[key] : null;
  };
  const values = runs.map((run) => [run.tokens_per_s, at(run, "p90"), at(run, "p10")]);
  const format = formatter(values.map(([value]) => value));
  const rows = runs.map((run, i) => {
    const [value, low, high] = values[i];
    const mark = (x, y, height) => {
      const middle = y + height / 2;
      const spread = low !== null && high !== null;
      return [
        ...block(x(0), y + 2, x(value) - x(0), height - 4, 0, `${format(value)} tokens/s`),
        ...(spread ? [shape("path", { d: `M${x(low)} ${middle}H${x(high)}M${x(low)} ${middle - 4}v8M${x(high)} ${middle - 4}v8`, class: "whisker" })] : []),
      ];
    };
    return { run, lines: [{ mark: value === null ? null : mark, cells: [value === null ? "–" : format(value)] }] };
  });
  return figure({
    id: "speed",
    title: "Speed",
    about: "Tokens per second of the whole run: the median step after warm-up; the line spans the 10th to the 90th percentile of steps.",
    draw: values.some(([value]) => value !== null) &&
      ((width) => rowChart(width, { rows, columns: ["tokens/s"], unit: "tokens/s, all ranks", most: largest(values.flat()) })),
    table: {
      head: ["run", "tokens/s", "slow steps (p90), tokens/s", "fast steps (p10), tokens/s", "tokens/s per rank", "step median, s", "step p10, s", "step p90, s", "CPU, s per step", "steps timed"],
      rows: runs.map((run, i) => [run.name, ...values[i], run.tokens_per_s_per_rank, run.step_seconds.median, run.step_seconds.p10, run.step_seconds.p90, run.cpu_seconds_per_step, run.steps_timed]),
    },
  });
}

/** Lines of stacked bars, each with its prediction, where there is one, as a thin bar beneath it.
 *
 * linesOf(run): [{measured, predicted, tag}], each a stack {segments: [[series, value, what]], total, atLeast} or null.
 */
function stackedRows(runs, linesOf, { size, format, columns }) {
  const inWords = (stack) => (stack ? (stack.atLeast ? "≥ " : "") + format(stack.total / size) : "–");
  const rows = runs.map((run) => ({
    run,
    lines: linesOf(run).map(({ measured, predicted, tag }) => ({
      tag,
      cells: columns.map((name) => inWords(name === "predicted" ? predicted : measured)),
      mark: (measured || predicted) && ((x, y, height) => [
        ...(measured ? stackedBar(measured, x, y, predicted ? height - 6 : height, size, format) : []),
        ...(predicted ? stackedBar(predicted, x, measured ? y + height - 5 : y + height / 2 - 2, 4, size, format, "predicted ") : []),
      ]),
    })),
  }));
  return rows;
}

function stackedBar({ segments, total }, x, y, height, size, format, what = "") {
  const nodes = [];
  let start = 0;
  for (const [series, value, name] of segments) {
    if (!value) continue;
    const [from, to] = [x(start / size), x((start + value) / size)];
    // Neighbours of one colour are told apart by a gap.
    nodes.push(...block(from, y, Math.max(0.5, to - from - (to - from > 3 ? 0.7 : 0)), height, series, `${what}${name}: ${format(value / size)}`));
    start += value;
  }
  if (total - start > 0.005 * total) { // of which nobody knows what it is
    nodes.push(shape("rect", { x: x(start / size), y, width: x(total / size) - x(start / size), height, class: "unsplit" }));
  }
  return nodes;
}

const PREDICTED_MARK = [() => shape("g", {}, ...block(0, 4, 22, 4, 0)), "thin bar: predicted by a dry run"];

/** Columns of a chart that may have predictions. */
function predictedColumns(unit, anyMeasured, anyPredicted) {
  if (!anyPredicted) return [unit];
  return anyMeasured ? ["measured", "predicted"] : ["predicted"];
}

/** How well predictions hold. pairs: [[measured numbers], [predicted numbers]] of each run that has both. */
function agreement(pairs) {
  if (!pairs.length) return "";
  const off = pairs.map(([measured, predicted]) => {
    if (measured.length !== predicted.length) return Infinity;
    return Math.max(0, ...measured.map((value, i) => (value === predicted[i] ? 0 : Math.abs(predicted[i] - value) / (value || predicted[i]))));
  });
  const exact = off.filter((each) => each === 0).length;
  const runs_ = `${pairs.length} ${pairs.length === 1 ? "run has" : "runs have"} a prediction`;
  if (exact === pairs.length) return `${runs_}: ${exact === 1 ? "it is" : "all are"} equal to the byte.`;
  const worst = Math.max(...off);
  return `${runs_}: ${exact} equal to the byte, the furthest off ${Number.isFinite(worst) ? `by ${axisFormat.format(worst * 100)} %` : "in what is sent"}.`;
}

function memoryChart(runs) {
  const stack = (rank) => rank && {
    segments: MEMORY.map((name, i) => [i, rank[name], name]),
    total: rank.peak_bytes,
  };
  // A dry run of one rank knows neither the largest nor the smallest.
  const measuredOf = (run) => (run.kind === "dry-run" ? null : run.memory);
  const predictedOf = (run) => (run.kind === "dry-run" ? run.memory : run.predicted?.memory ?? null);
  const linesOf = (run) => {
    const [measured, predicted] = [measuredOf(run), predictedOf(run)];
    const ends = run.world_size === 1 ? ["largest"] : ["largest", "smallest"];
    const lines = ends.map((end) => ({ end: `${end} rank`, measured: measured?.[end] ?? null, predicted: predicted?.all_known ? predicted[end] : null }));
    if (predicted && !predicted.all_known) lines.push({ end: `rank ${predicted.largest.rank}, others unknown`, measured: null, predicted: predicted.largest });
    return lines.filter((line) => line.measured || line.predicted);
  };
  const all = runs.flatMap((run) => linesOf(run).flatMap((line) => ["measured", "predicted"].filter((kind) => line[kind]).map((kind) => ({ run, kind, end: line.end, rank: line[kind] }))));
  const peaks = all.map(({ rank }) => rank.peak_bytes);
  const [unit, size] = byteUnit(peaks);
  const format = formatter(peaks.map((peak) => peak / size));
  const drawnOf = (run) => {
    const lines = linesOf(run).map(({ end, measured, predicted }) => ({ tag: end.startsWith("rank") ? end.split(",")[0] : end === "largest rank" ? "max" : "min", measured: stack(measured), predicted: stack(predicted) }));
    const shown = ({ measured, predicted }) => JSON.stringify([measured, predicted].map((each) => each && format(each.total / size)));
    if (lines.length === 2 && shown(lines[0]) === shown(lines[1])) lines.pop();
    if (lines.length === 1 && lines[0].tag === "max") lines[0].tag = null;
    return lines.length ? lines : [{ measured: null, predicted: null }];
  };
  const unsplit = all.some(({ rank }) => rank.peak_bytes - sum(MEMORY.map((name) => rank[name])) > 0.005 * rank.peak_bytes);
  const anyPredicted = all.some(({ kind }) => kind === "predicted");
  const columns = predictedColumns(unit, all.some(({ kind }) => kind === "measured"), anyPredicted);
  const both = runs.filter((run) => measuredOf(run) && predictedOf(run)?.all_known);
  const extremes = ({ largest: most, smallest: least }) => [most.peak_bytes, least?.peak_bytes ?? null];
  const steps = unique(numbers(runs.map((run) => run.memory?.step)));
  const when = steps.length === 1 ? ` in step ${steps[0]}` : "";
  return figure({
    id: "memory",
    title: "Memory",
    about: `Peak${when} of the rank that needs most and of the one that needs least, by what fills it; one bar where they need the same. ${agreement(both.map((run) => [extremes(measuredOf(run)), extremes(predictedOf(run))]))}`,
    key: [
      ...MEMORY.map((name, i) => [i, name]),
      ...(unsplit ? [[() => shape("rect", { x: 1, y: 1, width: 20, height: 10, class: "unsplit" }), "not split"]] : []),
      ...(anyPredicted ? [PREDICTED_MARK] : []),
    ],
    draw: all.length > 0 && ((width) => rowChart(width, {
      rows: stackedRows(runs, drawnOf, { size, format, columns }),
      columns, unit: `peak of one rank, ${unit}`, most: largest(peaks) / size, lineHeight: anyPredicted ? 20 : 16,
    })),
    table: {
      head: ["run", "figure", "rank", `peak, ${unit}`, ...MEMORY.map((name) => `${name}, ${unit}`), `the allocator's own peak, ${unit}`, "in step"],
      rows: runs.flatMap((run) => {
        const own = all.filter((each) => each.run === run);
        if (!own.length) return [[run.name, ...Array(5 + MEMORY.length).fill(null)]];
        return own.map(({ kind, end, rank }) => [
          run.name, `${kind}, ${end}`, rank.rank, rank.peak_bytes / size,
          ...[...MEMORY, "allocator_peak"].map((name) => (isNumber(rank[name]) ? rank[name] / size : null)),
          (kind === "measured" ? measuredOf(run) : predictedOf(run)).step,
        ]);
      }),
    },
  });
}

function trafficChart(runs) {
  const measuredOf = (run) => (run.kind === "dry-run" ? null : run.traffic);
  const predictedOf = (run) => (run.kind === "dry-run" ? run.traffic : run.predicted?.traffic ?? null);
  const all = runs.flatMap((run) => [measuredOf(run), predictedOf(run)].filter(Boolean));
  const present = unique(all.flat().map(({ mesh_dim }) => mesh_dim));
  const dims = unique([...MESH_DIMS, ...present]).filter((name) => present.includes(name));
  const isUnknown = ({ bytes_per_rank }) => bytes_per_rank === null;
  const total = (rows) => sum(rows.map(({ bytes_per_rank }) => bytes_per_rank));
  const [unit, size] = byteUnit(all.map(total));
  const format = formatter(all.map((rows) => total(rows) / size));
  const stack = (rows) => rows && {
    segments: dims.flatMap((dim, i) => rows.filter(({ mesh_dim }) => mesh_dim === dim).map((row) => [i, row.bytes_per_rank, `${dim} ${row.collective}`])),
    total: total(rows),
    atLeast: rows.some(isUnknown),
  };
  const anyPredicted = runs.some(predictedOf);
  const columns = predictedColumns(unit, runs.some(measuredOf), anyPredicted);
  const nameOf = ({ mesh_dim, collective }) => JSON.stringify([mesh_dim, collective]);
  const inOrder = (rows) => [...rows].sort((a, b) => (nameOf(a) < nameOf(b) ? -1 : 1));
  const both = runs.filter((run) => measuredOf(run) && predictedOf(run) && ![...measuredOf(run), ...predictedOf(run)].some(isUnknown));
  const pairs = both.map((run) => {
    const [measured, predicted] = [inOrder(measuredOf(run)), inOrder(predictedOf(run))];
    const same = JSON.stringify(measured.map(nameOf)) === JSON.stringify(predicted.map(nameOf));
    return same ? [measured, predicted].map((rows) => rows.map(({ bytes_per_rank }) => bytes_per_rank)) : [[total(measured)], []];
  });
  const inUnit = (row) => (isNumber(row?.bytes_per_rank) ? row.bytes_per_rank / size : null);
  const tableRows = (run) => {
    const [measured, predicted] = [measuredOf(run), predictedOf(run)];
    if (!measured && !predicted) return [[run.name, null, null, null, null]];
    if (!measured?.length && !predicted?.length) return [[run.name, "none", "none", measured && 0, measured && 0, predicted && 0, predicted && 0]];
    const expected = new Map((predicted ?? []).map((row) => [nameOf(row), row]));
    const known = new Set((measured ?? []).map(nameOf));
    const extra = (predicted ?? []).filter((row) => !known.has(nameOf(row)));
    const line = (row, own, theirs) => [run.name, row.mesh_dim, row.collective, own?.calls ?? null, inUnit(own), theirs?.calls ?? null, inUnit(theirs)];
    return [...(measured ?? []).map((row) => line(row, row, expected.get(nameOf(row)))), ...extra.map((row) => line(row, null, row))];
  };
  const head = ["run", "mesh dimension", "collective", "calls per step", `${unit} per rank`, "predicted calls", `predicted ${unit}`];
  const shown = anyPredicted ? head.length : 5;
  return figure({
    id: "traffic",
    title: "Traffic",
    about: `Bytes that a rank sends in a step, by the mesh dimension along which they travel; of each kind of message, by the rank that sends most. ${agreement(pairs)}${all.flat().some(isUnknown) ? " ≥: some collective's bytes are not known." : ""}`,
    key: [...dims.map((name, i) => [i, name]), ...(anyPredicted ? [PREDICTED_MARK] : [])],
    draw: all.length > 0 && ((width) => rowChart(width, {
      rows: stackedRows(runs, (run) => [{ measured: stack(measuredOf(run)), predicted: stack(predictedOf(run)) }], { size, format, columns }),
      columns, unit: `${unit} per rank and step`, most: largest(all.map(total)) / size,
    })),
    table: {
      head: head.slice(0, shown),
      rows: runs.flatMap(tableRows).map((row) => head.slice(0, shown).map((_, i) => row[i] ?? null)),
    },
  });
}

function stepChart(runs) {
  const names = Object.keys(STEP_PARTS);
  const stack = ({ step_parts: parts }) => parts && {
    segments: names.map((name, i) => [i, parts[name], STEP_PARTS[name]]),
    total: sum(Object.values(parts)),
    atLeast: names.some((name) => parts[name] === null),
  };
  const totals = runs.map((run) => stack(run)?.total ?? null);
  const [unit, size] = timeUnit(totals);
  const format = formatter(totals.map((total) => total && total / size));
  return figure({
    id: "step",
    title: "Step time in its parts",
    about: "The step of median length, mean over ranks: compute, communication that nothing hides, waiting for a neighbour in the pipeline.",
    missing: "Not measured in these runs. On CUDA --profile measures it.",
    key: names.map((name, i) => [i, STEP_PARTS[name]]),
    draw: totals.some((total) => total !== null) &&
      ((width) => rowChart(width, { rows: stackedRows(runs, (run) => [{ measured: stack(run) }], { size, format, columns: [unit] }), columns: [unit], unit: `${unit} per step`, most: largest(totals) / size })),
    table: {
      head: ["run", ...names.map((name) => `${STEP_PARTS[name]}, ${unit}`), `sum, ${unit}`],
      rows: runs.map((run, i) => [run.name, ...[...names.map((name) => run.step_parts?.[name]), totals[i]].map((seconds) => (isNumber(seconds) ? seconds / size : null))]),
    },
  });
}

function parityChart(runs) {
  const values = runs.map((run) => run.parity.max_rel_grad_diff);
  const [least, most] = [-17, 0]; // powers of ten
  const scale = {
    ticks: [-16, -13, -10, -7, -4, -1],
    position: (power) => (power - least) / (most - least),
    label: (power) => `1e${power}`,
  };
  const rows = runs.map((run) => {
    const value = run.parity.max_rel_grad_diff;
    const failed = run.parity.passed === false || value > PARITY_LIMIT;
    const mark = (x, y, height) => {
      const [at, middle] = [x(value ? Math.log10(value) : least), y + height / 2];
      const tip = shape("title", {}, `${run.name}: ${scientific(value)}`);
      return [failed
        ? shape("path", { d: `M${at - 5} ${middle - 5}l10 10m0 -10l-10 10`, class: "s3", "stroke-width": 2.5 }, tip)
        : shape("circle", { cx: at, cy: middle, r: 4.5, class: "f2" }, tip)];
    };
    return { run, lines: [{ mark: value === null ? null : mark, cells: [value === null ? "–" : scientific(value)] }] };
  });
  const limit = (x, top, bottom) => [shape("line", { x1: x(-10), x2: x(-10), y1: top, y2: bottom, class: "limit" })];
  return figure({
    id: "parity",
    title: "Parity with one process",
    about: "Largest relative difference of any parameter's float64 gradient, ‖g − g_ref‖ / ‖g_ref‖, on a log scale. Left of the limit, 1e-10, is passed; an exact match is at the left end.",
    key: [
      [() => shape("circle", { cx: 11, cy: 6, r: 4.5, class: "f2" }), "passed"],
      [() => shape("path", { d: "M6 1l10 10m0 -10l-10 10", class: "s3", "stroke-width": 2.5 }), "failed"],
      [() => shape("line", { x1: 11, x2: 11, y1: 0, y2: 12, class: "limit" }), "limit"],
    ],
    draw: values.some((value) => value !== null) &&
      ((width) => rowChart(width, { rows, columns: ["difference"], unit: "relative difference of gradients", scale, extra: limit })),
    table: {
      head: ["run", "gradient difference", "loss difference", "parity", "reference", "precision"],
      rows: runs.map(({ name, parity }) => [name, parity.max_rel_grad_diff, parity.max_abs_loss_diff, { true: "passed", false: "FAILED", null: null }[parity.passed], parity.reference, parity.dtype]),
    },
  });
}

function lossChart(runs) {
  const curves = runs.map((run, i) => ({ run, series: i, ...unfolded(run.steps) })).filter(({ step }) => step.length > 1);
  const steps = unique(curves.flatMap(({ step }) => step)).sort((a, b) => a - b);
  const tableSteps = steps.filter((_, i) => i % Math.ceil(steps.length / 100) === 0 || i === steps.length - 1);
  const lookup = curves.map(({ step, loss }) => new Map(step.map((number, i) => [number, loss[i]])));
  const mark = (series) => () => shape("path", { d: "M0 6H22", class: `curve s${series % 6}`, "stroke-dasharray": DASHES[Math.floor(series / 6 + series) % 6] });
  return figure({
    id: "loss",
    title: "Loss",
    about: `Training loss of each step. ${sameCurves(curves, lookup)}`,
    key: curves.map(({ run, series }) => [mark(series), run.name]),
    draw: curves.length > 0 && ((width) => lineChart(width, {
      curves: curves.map(({ step, loss, series, run }) => ({ x: step, y: loss, series, dash: DASHES[Math.floor(series / 6 + series) % 6], title: run.name })),
      xUnit: "step", yUnit: "loss, nats per token",
    })),
    table: { head: ["step", ...curves.map(({ run }) => run.name)], rows: tableSteps.map((step) => [step, ...lookup.map((losses) => losses.get(step) ?? null)]) },
  });
}

/** Curves of one model, data, seed and batch should be one curve; how far apart are they? */
function sameCurves(curves, lookup) {
  const key = ({ run }) => JSON.stringify([run.recipe.model, run.recipe.data, run.recipe.train?.seed, run.recipe.train?.learning_rate, run.recipe.train?.dtype, run.shape]);
  if (curves.length < 2 || new Set(curves.map(key)).size > 1) return "";
  let worst = { difference: -1, step: 0 };
  for (const step of lookup[0].keys()) {
    const losses = numbers(lookup.map((map) => map.get(step)));
    const difference = Math.max(...losses) - Math.min(...losses);
    if (difference > worst.difference) worst = { difference, step };
  }
  const apart = worst.difference ? `differ by at most ${scientific(worst.difference)}, at step ${worst.step}` : "are equal to the last digit";
  return `All ${curves.length} train one model on the same tokens: they ${apart}.`;
}

/** Curves over a shared x. curves: {x, y, series, dash, title, points: marks instead of a line}. */
function lineChart(width, { curves, xUnit, yUnit, xLabel, fromZero }) {
  const height = Math.round(Math.min(340, Math.max(220, width * 0.4)));
  const [left, right, top, bottom] = [52, width - 12, 12, height - 42];
  const xs = curves.flatMap((curve) => curve.x);
  const ys = curves.flatMap((curve) => curve.y);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  const yTicks = niceTicks(fromZero ? 0 : Math.min(...ys), Math.max(...ys));
  const xTicks = xLabel ? [x0, (x0 + x1) / 2, x1] : niceTicks(x0, x1).filter((tick) => tick >= x0 && tick <= x1 && Number.isInteger(tick));
  const x = (value) => left + ((value - x0) / (x1 - x0 || 1)) * (right - left);
  const y = (value) => bottom - ((value - yTicks[0]) / (yTicks.at(-1) - yTicks[0] || 1)) * (bottom - top);
  const drawing = shape("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
  for (const tick of yTicks) {
    drawing.append(shape("line", { x1: left, x2: right, y1: y(tick), y2: y(tick), class: "gridline" }));
    drawing.append(shape("text", { x: left - 8, y: y(tick) + 4, class: "soft end" }, axisFormat.format(tick)));
  }
  xTicks.forEach((tick, i) => {
    const anchor = xLabel ? ["start", "middle", "end"][i] : "middle";
    drawing.append(shape("text", { x: x(tick), y: bottom + 17, class: "soft", "text-anchor": anchor }, xLabel ? xLabel(tick) : axisFormat.format(tick)));
  });
  drawing.append(shape("text", { x: (left + right) / 2, y: height - 6, class: "soft middle" }, xUnit));
  drawing.append(shape("text", { x: 12, y: (top + bottom) / 2, class: "soft middle", transform: `rotate(-90 12 ${(top + bottom) / 2})` }, yUnit));
  for (const { x: at, y: values, series, dash, title, tips } of curves) {
    const path = at.map((value, i) => `${i ? "L" : "M"}${x(value).toFixed(1)} ${y(values[i]).toFixed(1)}`).join("");
    drawing.append(shape("path", { d: path, class: `curve s${series % 6}`, "stroke-dasharray": dash }, shape("title", {}, title)));
    if (tips) at.forEach((value, i) => drawing.append(pointMark(x(value), y(values[i]), series, tips[i])));
  }
  return drawing;
}

/** A point whose form tells its series. */
function pointMark(x, y, series, tip) {
  const forms = ["M-4 -4H4V4H-4Z", "M0 -5.5L5 4H-5Z", "M0 -6L5 0L0 6L-5 0Z", "M0 5.5L5 -4H-5Z", "M-5 -1.6H-1.6V-5H1.6V-1.6H5V1.6H1.6V5H-1.6V1.6H-5Z", "M-5 -2L0 -5L5 -2L3 4H-3Z"];
  return shape("path", { d: forms[series % 6], transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`, class: `hollow s${series % 6}` }, shape("title", {}, tip));
}

function niceTicks(low, high) {
  const step = ticksTo(high - low || Math.abs(high) || 1, 5)[1];
  const first = Math.floor(low / step + 1e-9);
  const last = Math.max(first + 1, Math.ceil(high / step - 1e-9));
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

function bubbleChart(runs) {
  const piped = runs.filter((run) => run.bubble !== null || run.bubble_ideal !== null);
  const values = piped.map((run) => [percent(run.bubble), percent(run.bubble_ideal)]);
  const format = formatter(values.flat());
  const rows = piped.map((run, i) => {
    const [measured, ideal] = values[i];
    const mark = (x, y, height) => [
      ...(measured === null ? [] : block(x(0), y + 2, x(measured) - x(0), height - 4, 0, `measured ${format(measured)} %`)),
      ...(ideal === null ? [] : ["halo", "ceiling"].map((name) => shape("line", { x1: x(ideal), x2: x(ideal), y1: y - 2, y2: y + height + 2, class: name }))),
    ];
    return { run, lines: [{ mark, cells: values[i].map((value) => (value === null ? "–" : format(value))) }] };
  });
  return figure({
    id: "bubble",
    title: "Pipeline bubble",
    about: "Share of the time from a step's first action to its last in which ranks wait: measured, and what the schedule would leave if all microbatches took the same time.",
    missing: "Not measured: none of these runs has a pipeline whose bubble was timed.",
    key: [[0, "measured"], [() => shape("line", { x1: 11, x2: 11, y1: 0, y2: 12, class: "ceiling" }), "ideal of the schedule"]],
    draw: piped.length > 0 && ((width) => rowChart(width, { rows, columns: ["measured", "ideal"], unit: "% of that time", most: largest(values.flat()) })),
    table: { head: ["run", "measured, %", "ideal, %"], rows: piped.map((run, i) => [run.name, ...values[i]]) },
  });
}

const actionOf = (kind) => ACTIONS[Object.hasOwn(ACTIONS, kind) ? kind : ""] ?? ["", kind, 5];

function timelineChart(runs) {
  const all = runs.filter((run) => run.timeline);
  const piped = all.slice(0, MOST_TIMELINES).map((run) => ({ ...run, timeline: unfolded(run.timeline) }));
  const most = largest(piped.flatMap(({ timeline }) => timeline.actions.map(([,,,,, end]) => end)));
  const kinds = new Map(piped.flatMap(({ timeline }) => timeline.kinds.map(actionOf)).map((action) => [action[1], action]));
  const lanes = piped.map(({ timeline }) => lanesOf(timeline));
  const someRanks = piped.some(({ timeline }, i) => timeline.ranks > lanes[i].length);
  const severalStages = lanes.flat().some(({ stages }) => stages.length > 1);
  const draw = (width) => {
    const names = width < 460 ? lanes.flat().map(({ rank }) => `rank ${rank}`) : lanes.flat().map(({ name }) => name);
    const left = Math.min(width / 3, 14 + 5.6 * Math.max(...names.map((name) => name.length)));
    const ticks = ticksTo(most * 1e3, width < 460 ? 4 : 8); // ms
    const x = (ms) => left + (ms / ticks.at(-1)) * (width - left - 10);
    const marks = shape("g");
    let y = 0;
    piped.forEach((run, i) => {
      y += y ? 18 : 4;
      const bubble = [["bubble", run.bubble], ["ideal", run.bubble_ideal]].filter(([, share]) => share !== null).map(([what, share]) => `${what} ${axisFormat.format(share * 100)} %`);
      marks.append(shape("text", { x: 0, y: y + 11 }, shape("tspan", { class: "strong" }, clipped(run.name, width / 2)), shape("tspan", { class: "soft", dx: 10 }, bubble.join(", "))));
      y += 20;
      for (const lane of lanes[i]) {
        marks.append(shape("text", { x: 0, y: y + 14, class: "soft" }, clipped(names.shift(), left + 12)), ...laneMarks(lane, { x, y, left, right: width - 10 }));
        y += 22;
      }
    });
    const axis = ticks.flatMap((tick) => [
      shape("line", { x1: x(tick), x2: x(tick), y1: 20, y2: y, class: "gridline" }),
      shape("text", { x: x(tick), y: y + 15, class: "soft middle" }, axisFormat.format(tick)),
    ]);
    const foot = shape("text", { x: (left + width) / 2, y: y + 32, class: "soft middle" }, "ms since the step's first action");
    return shape("svg", { width, height: y + 40, viewBox: `0 0 ${width} ${y + 40}` }, ...axis, foot, marks);
  };
  const tooMany = piped.some(({ timeline }) => timeline.actions.length > MOST_ACTIONS);
  return figure({
    id: "timeline",
    title: "Pipeline schedule, as it ran",
    about: "What each rank did in one step, all on one scale of time. A letter is the action, its number the microbatch; gaps are the bubble." +
      (severalStages ? " Where a rank holds several stages, every second one is fainter." : "") +
      (someRanks ? " Of ranks with the same stages, the first is shown." : "") +
      (all.length > piped.length ? ` The first ${piped.length} of ${all.length} are drawn.` : ""),
    missing: "Not measured: none of these runs has a timeline of its pipeline.",
    key: [...kinds.values()].map(([letter, label, series]) => [() => shape("rect", { x: 0, y: 1, width: 22, height: 10, class: `f${series}` }), letter ? `${letter}: ${label}` : label]),
    draw: piped.length > 0 && draw,
    table: {
      head: ["run", "rank", "stage", "microbatch", "action", "start, ms", "end, ms"],
      rows: piped.flatMap(({ name, timeline }) => timeline.actions.slice(0, MOST_ACTIONS).map(([rank, stage, microbatch, kind, start, end]) =>
        [name, rank, stage, microbatch, actionOf(timeline.kinds[kind])[1], start * 1e3, end * 1e3])),
      note: tooMany ? `The first ${MOST_ACTIONS} actions of each run.` : null,
    },
    wide: true,
  });
}

/** [{rank, stages, name, actions: [{letter, label, series, microbatch, stage, from, to}]}], times in ms. */
function lanesOf({ kinds, actions }) {
  const lanes = new Map();
  for (const [rank, stage, microbatch, kind, start, end] of actions) {
    if (!lanes.has(rank)) lanes.set(rank, { rank, actions: [] });
    const [letter, label, series] = actionOf(kinds[kind]);
    lanes.get(rank).actions.push({ letter, label, series, microbatch, stage, from: start * 1e3, to: end * 1e3 });
  }
  for (const lane of lanes.values()) {
    lane.stages = unique(numbers(lane.actions.map(({ stage }) => stage))).sort((a, b) => a - b);
    lane.name = `rank ${lane.rank}${lane.stages.length ? `, stage${lane.stages.length > 1 ? "s" : ""} ${lane.stages.join(", ")}` : ""}`;
  }
  return [...lanes.values()].sort((a, b) => a.rank - b.rank);
}

/** One rank's actions in few nodes, however many there are: of each colour, one path and one text with all labels. */
function laneMarks({ stages, actions }, { x, y, left, right }) {
  const height = 19;
  const colours = new Map();
  for (const { letter, series, microbatch, stage, from, to } of actions) {
    const [start, end] = [x(from), x(to)];
    const colour = `f${series}${stages.indexOf(stage) % 2 === 1 ? " later" : ""}`;
    if (!colours.has(colour)) colours.set(colour, { outline: "", blocks: [] });
    const marks = colours.get(colour);
    const length = Math.max(0.5, end - start - (end - start > 3 ? 0.8 : 0)).toFixed(1);
    marks.outline += `M${start.toFixed(1)} ${y}h${length}v${height}h-${length}z`;
    marks.blocks.push({ letter, microbatch: String(microbatch ?? ""), start, end });
  }
  const tip = shape("title");
  const tell = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const at = left + ((event.clientX - box.left) / box.width) * (right - left);
    const under = actions.find(({ from, to }) => x(from) <= at && at <= x(to));
    tip.textContent = under ? `${under.label}, microbatch ${under.microbatch ?? "unknown"}, stage ${under.stage ?? "unknown"}: ${(under.to - under.from).toPrecision(3)} ms` : "";
  };
  return [
    ...[...colours].flatMap(([colour, { outline, blocks }]) => [
      shape("path", { d: outline, class: colour }),
      blockLabels(blocks, { y: y + 13.5, class: `label on-${colour}` }),
    ].filter(Boolean)),
    shape("rect", { x: left, y, width: right - left, height, fill: "transparent", onpointermove: tell }, tip),
  ];
}

/** Letter and microbatch where most blocks have room for both, else the letter, else nothing: lone labels are noise.
 *
 * One text, each character in its place.
 */
function blockLabels(blocks, attributes) {
  const advance = (glyph) => ({ W: 9.5, I: 3.5 })[glyph] ?? 6;
  const lengthOf = (text) => sum([...text].map(advance));
  const fits = ({ start, end }, text) => lengthOf(text) + Math.min(3, text.length) <= end - start;
  const most = (labelOf) => blocks.filter((each) => fits(each, labelOf(each))).length > 0.6 * blocks.length;
  const both = most(({ letter, microbatch }) => letter + microbatch);
  if (!both && !most(({ letter }) => letter)) return null;
  const [glyphs, at] = [[], []];
  for (const { letter, microbatch, start, end } of blocks) {
    const label = [both ? letter + microbatch : letter, letter].find((text) => fits({ start, end }, text)) ?? "";
    let place = (start + end - lengthOf(label)) / 2;
    for (const glyph of label) {
      glyphs.push(glyph);
      at.push((place + advance(glyph) / 2).toFixed(1));
      place += advance(glyph);
    }
  }
  return shape("text", { x: at.join(" "), ...attributes }, glyphs.join(""));
}

function drawCharts() {
  const chosen = chosenRuns();
  const runs = chosen.slice(0, MOST_DRAWN);
  $("#drawn").textContent = chosen.length > runs.length
    ? `${chosen.length} runs chosen; the first ${runs.length} are drawn`
    : `${runs.length} ${runs.length === 1 ? "run" : "runs"} chosen in the table above`;
  const charts = runs.length
    ? [utilisationChart, speedChart, memoryChart, trafficChart, stepChart, parityChart, lossChart, bubbleChart, timelineChart].map((chart) => chart(runs))
    : [element("p", { class: "note" }, "Choose runs in the table to compare them here.")];
  const empty = (chart) => chart.localName === "figure" && !chart.redraw;
  const drawn = charts.filter((chart) => !empty(chart));
  const halves = drawn.filter((chart) => !chart.classList.contains("wide"));
  if (halves.length % 2) halves.at(-1).classList.add("wide"); // no gap beside the last
  $("#charts .grid").replaceChildren(...drawn);
  $("#charts .unmeasured").replaceChildren(...charts.filter(empty));
  for (const chart of drawn) chart.redraw?.();
  drawDetails(runs);
}

// ---- over time -----------------------------------------------------------------------------------------------------

/** Strategies measured more than once, those with most points first. */
const HISTORY = (() => {
  const byName = new Map();
  for (const run of RUNS) {
    const time = Date.parse(run.environment.time_utc);
    if (run.status !== "ok" || run.kind !== "measured" || Number.isNaN(time) || run.tokens_per_s === null) continue;
    byName.set(run.name, [...(byName.get(run.name) ?? []), { run, time }]);
  }
  const several = [...byName].filter(([, points]) => new Set(points.map(({ time }) => time)).size > 1);
  return new Map(several.sort((a, b) => b[1].length - a[1].length));
})();

function drawHistory() {
  if (!HISTORY.size) return;
  const name = HISTORY.has(state.strategy) ? state.strategy : [...HISTORY.keys()][0];
  $("#history").hidden = false;
  $("#strategy").value = name;
  const points = [...HISTORY.get(name)].sort((a, b) => a.time - b.time);
  const byMfu = points.some(({ run }) => run.flops.mfu !== null);
  const value = byMfu ? ({ run }) => percent(run.flops.mfu) : ({ run }) => run.tokens_per_s;
  const unit = byMfu ? "MFU, % of peak" : "tokens/s";
  const known = points.filter((point) => value(point) !== null);
  // Only runs of one model and batch on one kind of machine are joined by a line.
  const series = unique(known.map(({ run }) => `${run.hardware}: ${run.shape}`));
  const curves = series.map((label, i) => {
    const own = known.filter(({ run }) => `${run.hardware}: ${run.shape}` === label);
    return { x: own.map(({ time }) => time), y: own.map(value), series: i, dash: DASHES[i % 6], title: label, tips: own.map(({ run }) => `${day(run.environment.time_utc)}, ${commitOf(run) ?? "no commit"}`) };
  });
  const chart = figure({
    id: "history",
    title: `${name} over time and commits`,
    about: byMfu ? "MFU of every run of this name. A line joins runs of one model and batch on one kind of machine." : "Tokens per second of every run of this name (MFU was not measured). A line joins runs of one model and batch on one kind of machine.",
    key: series.map((label, i) => [() => pointMark(11, 6, i, ""), label]),
    draw: known.length > 0 && ((width) => lineChart(width, { curves, xUnit: "time of the run, UTC", yUnit: unit, xLabel: (time) => new Date(time).toISOString().slice(0, 10), fromZero: true })),
    table: {
      head: ["time, UTC", "commit", unit, "run", "hardware", "model and batch"],
      rows: points.map((point) => [day(point.run.environment.time_utc), commitOf(point.run), value(point), point.run.id, point.run.hardware, point.run.shape]),
    },
    wide: true,
  });
  $("#history .grid").replaceChildren(chart);
  chart.redraw?.();
}

// ---- how each run was made -----------------------------------------------------------------------------------------

function toml(recipe) {
  const key = (name) => (/^[A-Za-z0-9_-]+$/.test(name) ? name : JSON.stringify(name));
  const isTable = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
  const write = ([name, value]) => `${key(name)} = ${Array.isArray(value) ? `[${value.map((item) => JSON.stringify(item)).join(", ")}]` : JSON.stringify(value)}`;
  const entries = Object.entries(recipe);
  const plain = entries.filter(([, value]) => !isTable(value)).map(write);
  const tables = entries.filter(([, value]) => isTable(value)).map(([name, table]) => `\n[${key(name)}]\n${Object.entries(table).map(write).join("\n")}`);
  return [...plain, ...tables].join("\n");
}

/** The commands for this run; a name that a shell could read otherwise is not written into one. */
function commands(run) {
  const file = /^[A-Za-z0-9][A-Za-z0-9._+-]*$/.test(run.name) ? `${run.name}.toml` : "recipe.toml";
  if (run.kind === "dry-run") return `lab dry-run ${file}`;
  const ranks = run.world_size ?? 1;
  const lines = [`lab run ${file}`];
  if (run.layout) lines.push(`torchrun --standalone --nproc-per-node ${ranks} -m launch.train ${file}`);
  return lines.join("\n");
}

function drawDetails(runs) {
  $("#details .list").replaceChildren(
    ...runs.map((run) => {
      const details = element("details", { "data-id": run.id }, element("summary", {}, run.name, element("span", {}, [run.layout, run.hardware, day(run.environment.time_utc)].filter(Boolean).join(" · "))));
      details.fill = () => details.childElementCount === 1 && details.append(detailsOf(run)); // not before it is asked for
      details.addEventListener("toggle", details.fill);
      return details;
    }),
  );
}

/** As "17 steps timed; left out: 3 warm-up, 1 profile". */
function stepsInWords({ steps_timed: timed, steps_left_out: leftOut }) {
  if (timed === null) return null;
  const reasons = Object.entries(leftOut ?? {}).filter(([, count]) => count).map(([reason, count]) => `${count} ${reason}`);
  return `${timed} ${timed === 1 ? "step" : "steps"} timed${reasons.length ? `; left out: ${reasons.join(", ")}` : ""}`;
}

function detailsOf(run) {
  const { environment, flops, memory } = run;
  const format = (share) => `${axisFormat.format(share * 100)} %`;
  const mfu = flops.mfu === null ? whyNoMfu(run) && `none: ${whyNoMfu(run)}` : format(flops.mfu);
  const facts = [
    ["status", run.status], ["MFU", mfu], ["steps", stepsInWords(run)],
    ["memory and traffic", memory && isNumber(memory.step) ? `of step ${memory.step}` : null],
    ["about the memory", memory?.note ?? undefined], ["layout", run.layout], ["ranks", run.world_size], ["hardware", run.hardware],
    ["device", environment.device], ["backend", environment.backend], ["torch", environment.torch], ["Python", environment.python],
    ["NumPy", environment.numpy], ["parallel-lab", environment.parallel_lab], ["commit", environment.git_commit],
    ["platform", environment.platform], ["CPU of the host", environment.cpu], ["cores of the host", environment.cores],
    ["accelerators", Array.isArray(environment.accelerators) ? environment.accelerators.join(", ") || "none" : null],
    ["data", environment.data], ["time, UTC", day(environment.time_utc)], ["definition of MFU", flops.definition], ["source of the peak", flops.peak_source],
  ];
  const rows = facts.filter(([, value]) => value !== undefined).map(([label, value]) => element("tr", {}, element("th", { scope: "row" }, label), value === null ? cell(null) : element("td", {}, String(value))));
  const block_ = (title, text) => [element("h3", {}, title), element("pre", { tabindex: "0", role: "region", "aria-label": `${title} of ${run.name}` }, text)];
  return element("div", { class: "columns" },
    element("div", {},
      ...block_("Command", commands(run)),
      element("p", { class: "note" }, "with the recipe below in that file; its defaults are written out."),
      ...block_("Recipe", toml(run.recipe))),
    element("div", {}, element("h3", {}, "Versions and hardware"), element("table", {}, element("caption", { class: "hidden" }, `Versions and hardware of ${run.name}`), element("tbody", {}, ...rows))));
}

/** From a name in the table to its recipe. */
function showDetails(run) {
  const find = () => [...document.querySelectorAll("#details details")].find((details) => details.dataset.id === run.id);
  if (!find()) {
    drawDetails([run, ...chosenRuns().slice(0, MOST_DRAWN)]);
  }
  const details = find();
  details.fill();
  details.open = true;
  $("summary", details).focus();
  details.scrollIntoView({ block: "start" });
}

// ---- head, controls, start -----------------------------------------------------------------------------------------

function drawFacts() {
  const ok = RUNS.filter((run) => run.status === "ok").length;
  const judged = RUNS.filter((run) => run.parity.passed !== null);
  const few = (values, noun) => (values.length <= 2 ? values.join("; ") : `${values.length} ${noun}`);
  const times = RUNS.map((run) => day(run.environment.time_utc)).filter(Boolean).sort();
  const days = unique([times[0], times.at(-1)].filter(Boolean).map((time) => time.slice(0, 10)));
  const facts = [
    ["Runs that ended well", `${ok} of ${RUNS.length}`],
    ["Proven equal to one process", judged.length ? `${judged.filter((run) => run.parity.passed).length} of ${judged.length} that were compared` : "not measured"],
    ["Model and global batch", few(unique(RUNS.map((run) => run.shape)), "shapes")],
    ["Hardware", few(unique(RUNS.map((run) => run.hardware)), "kinds")],
    ["Software", few(unique(RUNS.map((run) => run.environment.torch).filter(Boolean)).map((v) => `torch ${v}`), "versions of torch") || "unknown"],
    ["Measured", days.join(" to ") || "unknown"],
  ];
  $("#facts").append(...facts.map(([label, value]) => element("div", {}, element("dt", {}, label), element("dd", {}, value))));
  $("#legend").textContent =
    "Layout: ranks of the pipeline (pp), replicas (dp), weight shards (fsdp), context (cp) and tensor (tp). Step: median wall time, warm-up left out. " +
    "Gradient difference: the largest ‖g − g_ref‖ / ‖g_ref‖ of any parameter against one process, in float64; at most 1e-10 is passed. A dash: not measured.";
}

function fillSelect(select, everything, values) {
  select.replaceChildren(element("option", { value: "" }, everything), ...values.map((value) => element("option", { value }, value)));
}

function startControls() {
  fillSelect($("#status"), "any", unique(RUNS.map((run) => run.status)).sort());
  const comparisons = unique(RUNS.map((run) => run.comparison).filter(Boolean));
  fillSelect($("#comparison"), "all", comparisons);
  $("#comparison-label").hidden = comparisons.length < 2;
  $("#strategy").replaceChildren(...[...HISTORY.keys()].map((name) => element("option", { value: name }, name)));
  const filterBy = (key) => (event) => {
    state[key] = event.target.value;
    update(true, false);
  };
  $("#query").addEventListener("input", filterBy("query"));
  $("#status").addEventListener("change", filterBy("status"));
  $("#comparison").addEventListener("change", filterBy("comparison"));
  $("#strategy").addEventListener("change", (event) => {
    state.strategy = event.target.value;
    writeAddress();
    drawHistory();
  });
  const choose = (ids) => {
    state.chosen = new Set(ids());
    update();
  };
  $("#choose-shown").addEventListener("click", () => choose(() => shownRuns().map((run) => run.id)));
  $("#choose-none").addEventListener("click", () => choose(() => []));
  $("#choose-default").addEventListener("click", () => {
    Object.assign(state, { sort: null, descending: false, query: "", status: "", comparison: "" });
    choose(() => DEFAULT);
  });
  $("#more").addEventListener("click", () => {
    state.all = true;
    drawTable();
  });
}

function startTheme() {
  const button = $("#theme");
  const themes = ["auto", "light", "dark"];
  let theme = "auto";
  try {
    theme = localStorage.getItem("parallel-lab-theme") ?? "auto";
  } catch { /* a browser may keep nothing for a file */ }
  const show = () => {
    document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
  };
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    try {
      localStorage.setItem("parallel-lab-theme", theme);
    } catch { /* it holds until the page is closed */ }
    show();
  });
  button.hidden = false;
  show();
}

/** After a change: the address, the table and, where the choice or its order changed, the charts. */
function update(table = true, charts = true) {
  writeAddress();
  if (table) {
    drawTable();
    drawUnfinished();
  }
  if (charts) drawCharts();
}

function start() {
  document.body.append(textures());
  drawFacts();
  drawHead();
  startControls();
  startTheme();
  const draw = () => {
    readAddress();
    drawTable();
    drawUnfinished();
    drawCharts();
    drawHistory();
  };
  draw();
  window.addEventListener("hashchange", draw);
  let width = document.body.clientWidth;
  let waiting = 0;
  window.addEventListener("resize", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => {
      if (document.body.clientWidth === width) return;
      width = document.body.clientWidth;
      for (const chart of document.querySelectorAll("figure")) chart.redraw?.();
    });
  });
  document.documentElement.dataset.ready = "true";
}

start();
