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

/** As "3 saves of 17.7 MiB; training waited 0.36 s for each; 2 lives". */
function checkpointsInWords(kept) {
  if (kept === null) return undefined;
  const known = isNumber(kept.saves) && isNumber(kept.bytes) && isNumber(kept.waited_seconds);
  const [unit, size] = byteUnit([kept.bytes]);
  const each = `${kept.saves} saves of ${axisFormat.format(kept.bytes / size)} ${unit}; training waited ${axisFormat.format(kept.waited_seconds)} s for each`;
  const behind = isNumber(kept.background_seconds) ? `, ${axisFormat.format(kept.background_seconds)} s in the background` : "";
  return `${known ? `${each}${behind}; ` : ""}${kept.lives} ${kept.lives === 1 ? "life" : "lives"}`;
}

function detailsOf(run) {
  const { environment, flops, memory } = run;
  const format = (share) => `${axisFormat.format(share * 100)} %`;
  const mfu = flops.mfu === null ? whyNoMfu(run) && `none: ${whyNoMfu(run)}` : format(flops.mfu);
  const facts = [
    ["status", run.status], ["MFU", mfu], ["steps", stepsInWords(run)], ["checkpoints", checkpointsInWords(run.checkpoint)],
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
