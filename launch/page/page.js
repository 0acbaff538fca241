// ---- the table -----------------------------------------------------------------------------------------------------

let BYTES; // the unit of the peaks
const COLUMNS = [ // better: which end of a column is the good one, if one is
  { key: "name", head: "name", text: (run) => run.name },
  { key: "status", head: "status", text: (run) => (isMeasured(run) ? run.status : `${run.status}, dry run`) },
  { key: "layout", head: "layout", text: (run) => run.layout },
  { key: "engine", head: "engine", text: (run) => run.engine, flat: true },
  { key: "cluster", head: "cluster", text: (run) => run.cluster, flat: true },
  { key: "devices", head: "devices", number: (run) => run.world_size, format: String, flat: true },
  { key: "model", head: "model", text: (run) => run.model, flat: true },
  { key: "batch", head: "global\nbatch", number: ({ recipe }) => (isNumber(recipe.train?.global_batch) ? recipe.train.global_batch : null), format: String, flat: true },
  { key: "day", head: "day", text: (run) => day(run.environment.time_utc)?.slice(0, 10) ?? null, flat: true },
  { key: "mfu", head: "MFU\n%", number: (run) => percent(run.flops.mfu), better: "high" },
  { key: "mfu_causal", head: "causal\n%", number: (run) => percent(run.flops.mfu_causal), better: "high" },
  { key: "hfu", head: "HFU\n%", number: (run) => percent(run.flops.hfu), better: "high" },
  { key: "tokens_per_s", head: "speed\ntokens/s", number: (run) => run.tokens_per_s, better: "high" },
  { key: "step_seconds", head: "step\ns", number: (run) => run.step_seconds.median, better: "low" },
  { key: "cpu_seconds_per_step", head: "CPU\ns/step", number: (run) => run.cpu_seconds_per_step, better: "low" },
  { key: "foretold", head: "foretold\ns", number: (run) => run.foretold.foretold_seconds, rare: true },
  { key: "off", head: "off\n%", number: (run) => percent(run.foretold.error), format: signed, rare: true },
  { key: "peak_bytes", head: "peak", number: (run) => run.memory && peakOf(run) / BYTES[1], better: "low" },
  { key: "loss", head: "last\nloss", number: (run) => run.loss, format: (loss) => loss.toFixed(4) },
  { key: "grad_diff", head: "gradient\ndifference", number: (run) => run.parity.max_rel_grad_diff, format: scientific },
  { key: "passed", head: "parity", text: (run) => ({ true: "passed", false: "FAILED", null: null })[run.parity.passed] },
];
const FORMATTED = COLUMNS.filter(({ number, format }) => number && !format); // as these data need it

function formatColumns() {
  const peaks = numbers(RUNS.map(peakOf));
  BYTES = peaks.length ? byteUnit(peaks) : ["MiB", 2 ** 20];
  COLUMNS.find(({ key }) => key === "peak_bytes").head = `peak\n${BYTES[0]}`;
  for (const column of FORMATTED) column.format = formatter(RUNS.map(column.number));
}

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

/** A cell's text; null where nothing was measured. */
function inCell({ number, text, format }, run) {
  const value = (number ?? text)(run);
  return isNumber(value) ? format(value) : value;
}

/** Columns that tell rows apart, and those that do not, with what they say of all. The sorted one always stays. */
function splitColumns(runs) {
  const [name, ...others] = COLUMNS;
  const grouped = !state.sort && DATA.groups.length > 1; // the head of a group says what is flat
  const same = [];
  const telling = others.filter((column) => {
    if (column.rare && runs.every((run) => column.number(run) === null)) return false; // was not asked for
    const text = runs.length ? inCell(column, runs[0]) : undefined;
    const tells = runs.some((run) => inCell(column, run) !== text); // most columns do so within a few rows
    if (runs.length < 2 ? !column.flat : tells || column.key === state.sort) return !(column.flat && grouped && !["devices", "engine"].includes(column.key));
    if (!column.flat && text !== undefined) same.push([column.head.replace("\n", " "), text]);
    return false;
  });
  return [[name, ...telling], same];
}

function tableHead(columns) {
  const cells = columns.map((column) => {
    const press = () => {
      // Numbers that are better when large start with the largest; a third press restores the order of the recipe.
      const first = column.better === "high";
      if (state.sort !== column.key) Object.assign(state, { sort: column.key, descending: first });
      else if (state.descending === first) state.descending = !first;
      else state.sort = null;
      update(["table", "charts"]);
      $(`#runs th[data-key=${column.key}] button`)?.focus();
    };
    const order = column.key === state.sort ? (state.descending ? "descending" : "ascending") : null;
    return element("th", { scope: "col", class: column.text ? "text" : null, "data-key": column.key, "aria-sort": order },
      element("button", { type: "button", onclick: press }, column.head));
  });
  const box = element("th", { scope: "col", class: "box" }, element("span", { class: "hidden" }, "compare"));
  return element("thead", {}, element("tr", {}, box, ...cells));
}

function cell(value, format) {
  if (value === null || value === undefined) {
    return element("td", { class: "null" }, element("span", { "aria-hidden": "true" }, "–"), element("span", { class: "hidden" }, "not measured"));
  }
  if (isNumber(value)) return element("td", { "data-value": value }, format(value));
  return element("td", { class: "text" }, value);
}

/** As "+12 %": a number beside that of the row that all are held against. */
function against(column, run) {
  const other = BY_KEY.get(state.against);
  if (!other || !column.better) return null;
  const [value, base] = [column.number(run), column.number(other)];
  if (!isNumber(value) || !base) return null;
  const change = (value / base - 1) * 100;
  const text = run === other ? "=" : `${change < 0 ? "−" : "+"}${Math.abs(change) < 10 ? Math.abs(change).toFixed(1) : Math.abs(change).toFixed(0)} %`;
  return element("small", {}, text);
}

const isBelieved = (run) => isGood(run) && (PLANS || isMeasured(run));

/** The best values of each column with a better end, among rows that can be believed. */
function bestOf(columns, runs) {
  const good = runs.filter(isBelieved);
  return new Map(columns.filter(({ better }) => better).map((column) => {
    const values = numbers(good.map(column.number));
    const distinct = new Set(values.map(column.format)).size > 1;
    return [column.key, distinct ? column.format(column.better === "high" ? most(values) : least(values)) : null];
  }));
}

function tableRow(run, columns, best) {
  const choose = (event) => {
    state.chosen = new Set(view.keys);
    if (event.target.checked) state.chosen.add(run.key);
    else state.chosen.delete(run.key);
    update(["charts"]);
  };
  const box = element("input", { type: "checkbox", "aria-label": `Compare ${run.name}`, onchange: choose });
  box.checked = view.keys.has(run.key);
  const cells = columns.slice(1).map((column) => {
    if (column.number) {
      const made = cell(column.number(run), column.format);
      const small = against(column, run);
      if (small) made.append(small);
      if (isBelieved(run) && inCell(column, run) !== null && inCell(column, run) === best.get(column.key)) {
        made.classList.add("best");
        made.append(element("span", { class: "hidden" }, ", best"));
      }
      return made;
    }
    const made = cell(column.text(run));
    made.classList.add("text");
    if ((column.key === "status" && run.status !== "ok" && !isRunning(run)) || (column.key === "passed" && run.parity.passed === false)) {
      made.classList.add("bad");
      if (run.reason) made.title = run.reason;
    }
    return made;
  });
  return element("tr", { "data-id": run.id, class: run.key === state.details ? "open" : null }, element("td", { class: "box" }, box), element("th", { scope: "row" }, linkTo(run)), ...cells);
}

/** A link that opens a run beside the page. */
function linkTo(run, text = run.name) {
  const open = (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return; // a tab of its own
    event.preventDefault();
    openDetails(run.key);
  };
  return element("a", { href: `#details=${run.key}`, onclick: open, "data-key": run.key }, text);
}

function drawTable() {
  const { shown } = view;
  const [columns, same] = splitColumns(shown);
  const best = bestOf(columns, shown);
  const visible = state.all ? shown : shown.slice(0, MOST_ROWS);
  const bodies = [];
  const row = (run) => tableRow(run, columns, best);
  if (state.sort || DATA.groups.length === 1) bodies.push(element("tbody", {}, ...visible.map(row)));
  else {
    for (const [group, runs] of [...Map.groupBy(visible, (run) => run.group)].sort(([a], [b]) => a - b)) {
      const { comparison, hardware } = DATA.groups[group];
      const title = element("th", { colspan: columns.length + 1, scope: "rowgroup" }, element("strong", {}, comparison || DATA.title), ` on ${hardware}`);
      bodies.push(element("tbody", {}, element("tr", { class: "group" }, title), ...runs.map(row)));
    }
  }
  const table = $("#runs");
  table.replaceChildren($("caption", table), tableHead(columns), ...bodies);
  const unmeasured = same.filter(([, text]) => text === null).map(([head]) => head);
  const alike = same.filter(([, text]) => text !== null).map(([head, text]) => `${head} ${text}`);
  $("#same").textContent = [
    alike.length ? `The same in all rows: ${alike.join("; ")}.` : "",
    unmeasured.length && !PLANS ? `Not measured in any: ${unmeasured.join("; ")}.` : "",
  ].join(" ");
  $("#more").hidden = visible.length === shown.length;
  $("#more").textContent = `Show all ${shown.length} rows`;
  const names = new Map();
  for (const { name } of shown) names.set(name, (names.get(name) ?? 0) + 1);
  fillSelect($("#against"), "none", shown.filter(isGood).slice(0, MOST_ROWS).map((run) => [run.key, names.get(run.name) > 1 ? run.id : run.name]), state.against);
}

function drawUnfinished() {
  const unfinished = view.shown.filter((run) => (run.status !== "ok" && !isRunning(run)) || run.parity.passed === false).slice(0, MOST_ROWS);
  $("#unfinished").hidden = !unfinished.length;
  $("#unfinished ul").replaceChildren(
    ...unfinished.map((run) => {
      const what = run.status === "ok" ? "parity FAILED" : run.status;
      const why = run.reason ?? (run.status === "ok" ? "its gradients are not those of one process" : "no reason given");
      return element("li", { "data-id": run.id }, element("strong", {}, run.name), " ", element("span", { class: "bad" }, what), `: ${why}`);
    }),
  );
}

function drawCharts() {
  const runs = view.chosen.slice(0, MOST_DRAWN);
  $("#drawn").textContent = view.chosen.length > runs.length
    ? `${view.chosen.length} runs chosen; the first ${runs.length} are drawn`
    : `${runs.length} ${runs.length === 1 ? "run" : "runs"} chosen in the table above`;
  if (!runs.length) {
    $("#charts .grid").replaceChildren(element("p", { class: "note" }, "Choose runs in the table to compare them here."));
    $("#charts .unmeasured").replaceChildren();
    return;
  }
  const charts = [parityChart, utilisationChart, speedChart, foretoldChart, memoryChart, trafficChart, hostsChart, stepChart, lossChart, bubbleChart, timelineChart];
  const plans = [memoryChart, trafficChart, hostsChart, bubbleChart]; // nothing else is known of what was not run
  place((runs.some(isMeasured) ? charts : plans).map((chart) => chart(runs)).filter(Boolean), $("#charts .grid"), $("#charts .unmeasured"));
}

// ---- the rows, saved -----------------------------------------------------------------------------------------------

/** What the table shows, and how each run is found again: plain numbers, null where nothing was measured. */
function savedRows() {
  const about = (run) => ({ run: run.id, time_utc: run.environment.time_utc, commit: run.environment.git_commit, job_id: run.labels.job_id, tags: run.labels.tags, note: run.labels.note });
  const values = (run) => COLUMNS.map(({ key, number, text }) => [key, key === "peak_bytes" ? peakOf(run) : (number ?? text)(run)]);
  return view.shown.map((run) => ({ ...about(run), ...Object.fromEntries(values(run)) }));
}

function csv(rows) {
  const field = (value) => {
    if (value === null || value === undefined) return "";
    if (isNumber(value)) return String(value);
    const text = String(value);
    return `"${(/^[=+\-@\t\r]/.test(text) ? `'${text}` : text).replaceAll('"', '""')}"`; // which a spreadsheet would compute
  };
  return [Object.keys(rows[0] ?? {}), ...rows.map(Object.values)].map((line) => line.map(field).join(",")).join("\r\n");
}

function save(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  element("a", { href: url, download: name }).click();
  URL.revokeObjectURL(url);
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
    ["goodput", run.checkpoint && isNumber(run.goodput.fraction) ? `${format(run.goodput.fraction)} of ${axisFormat.format(run.goodput.total_seconds)} s` : undefined],
    ["memory and traffic", memory && isNumber(memory.step) ? `of step ${memory.step}` : null],
    ["about the memory", memory?.note ?? undefined], ["layout", run.layout], ["ranks", run.world_size], ["hardware", run.hardware],
    ["device", environment.device], ["backend", environment.backend], ["engine", environment.engine], ["torch", environment.torch], ["Python", environment.python],
    ["NumPy", environment.numpy], ["parallel-lab", environment.parallel_lab], ["commit", environment.git_commit],
    ["platform", environment.platform], ["CPU of the host", environment.cpu], ["cores of the host", environment.cores],
    ["accelerators", Array.isArray(environment.accelerators) ? environment.accelerators.join(", ") || "none" : null],
    ["cluster", environment.cluster ?? undefined], ["job", run.labels.job_id ?? undefined],
    ["tags", run.labels.tags?.join?.(", ")], ["note", run.labels.note ?? undefined],
    ["data", environment.data], ["time, UTC", day(environment.time_utc)], ["definition of MFU", flops.definition], ["source of the peak", flops.peak_source],
  ];
  const rows = facts.filter(([, value]) => value !== undefined).map(([label, value]) => element("tr", {}, element("th", { scope: "row" }, label), value === null ? cell(null) : element("td", {}, String(value))));
  const block_ = (title, text) => [element("h3", {}, title), element("pre", { tabindex: "0", role: "region", "aria-label": `${title} of ${run.name}` }, text)];
  return element("div", {},
    element("table", {}, element("caption", { class: "hidden" }, `Versions and hardware of ${run.name}`), element("tbody", {}, ...rows)),
    ...block_("Command", commands(run)),
    element("p", { class: "note" }, "with the recipe below in that file; its defaults are written out."),
    ...block_("Recipe", toml(run.recipe)));
}

/** Opens a run beside the page, at an address of its own, so that Back closes it. */
function openDetails(key) {
  const from = document.activeElement?.dataset?.key ?? state.details;
  state.details = key;
  history.pushState(null, "", address());
  drawDetails();
  if (key) $("#details-title").focus();
  else document.querySelector(`#runs a[data-key="${CSS.escape(from)}"]`)?.focus();
}

function drawDetails() {
  const run = BY_KEY.get(state.details);
  document.body.classList.toggle("beside", Boolean(run));
  $("#details").hidden = !run;
  for (const row of document.querySelectorAll("#runs tr[data-id]")) row.classList.toggle("open", row.dataset.id === run?.id);
  const told = run && JSON.stringify([run.id, run.status, run.reason]);
  if (!run || $("#details").dataset.told === told) return;
  $("#details").dataset.told = told;
  $("#details-title").textContent = run.name;
  $("#details .content").replaceChildren(
    element("p", { class: "note" }, [run.layout, run.cluster, day(run.environment.time_utc), run.id].filter(Boolean).join(" · ")),
    detailsOf(run));
  $("#details").scrollTop = 0;
}

// ---- controls, start -----------------------------------------------------------------------------------------------

/** values: texts, or [value, text]. */
function fillSelect(select, everything, values, chosen = "") {
  const options = values.map((each) => [each].flat()).map(([value, text = value]) => element("option", { value }, text));
  select.replaceChildren(element("option", { value: "" }, everything), ...options);
  select.value = chosen;
}

function startFilters() {
  const filter = (key) => (event) => {
    state[key] = event.target.value;
    state.all = false;
    update();
  };
  const form = $("#filters");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.append(element("label", {}, "Find ", element("input", { type: "search", id: "query", placeholder: "name, layout, tag …", autocomplete: "off", oninput: filter("query") })));
  const names = { cluster: "Cluster", devices: "Devices", model: "Model", strategy: "Strategy", engine: "Engine", status: "Status", comparison: "Comparison" };
  for (const [facet, name] of Object.entries(names)) form.append(element("label", {}, `${name} `, element("select", { id: facet, onchange: filter(facet) })));
  for (const [key, name] of [["since", "From"], ["until", "to"]]) form.append(element("label", {}, `${name} `, element("input", { type: "date", id: key, onchange: filter(key) })));
  const reset = () => {
    Object.assign(state, { ...FRESH, details: state.details });
    update();
  };
  form.append(element("button", { type: "button", id: "reset", onclick: reset }, "Reset"));
}

/** The values to choose from, of these data; a filter that would leave all is not shown. */
function fillFilters() {
  for (const facet of Object.keys(FACETS)) {
    const select = document.getElementById(facet);
    const values = valuesOf(facet);
    select.parentElement.hidden = values.length < 2;
    fillSelect(select, "all", values, state[facet]);
  }
  for (const key of ["since", "until"]) document.getElementById(key).parentElement.hidden = new Set(DAYS.filter(Boolean)).size < 2;
}

function drawFilters() {
  for (const key of IN_ADDRESS.filter((each) => !["details", "against"].includes(each))) {
    const control = document.getElementById(key);
    if (control && control.value !== state[key]) control.value = state[key];
  }
  const filtered = view.shown.length < RUNS.length;
  $("#count").textContent = filtered ? `${view.shown.length} of ${RUNS.length} runs; everything on this page is of these` : `${plural(RUNS.length, "run")} in all`;
}

function startControls() {
  $("#axis").addEventListener("change", (event) => {
    state.axis = event.target.value;
    writeAddress();
    drawHistory();
  });
  $("#against").addEventListener("change", (event) => {
    state.against = event.target.value;
    writeAddress();
    drawTable();
  });
  const choose = (keys) => {
    state.chosen = new Set(keys);
    update(["table", "charts"]);
  };
  $("#choose-shown").addEventListener("click", () => choose(view.shown.map((run) => run.key)));
  $("#choose-none").addEventListener("click", () => choose([]));
  $("#save-csv").addEventListener("click", () => save("runs.csv", "text/csv", csv(savedRows())));
  $("#save-json").addEventListener("click", () => save("runs.json", "application/json", JSON.stringify(savedRows(), null, 1)));
  $("#more").addEventListener("click", () => {
    state.all = true;
    drawTable();
  });
  $("#close").addEventListener("click", () => openDetails(""));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && state.details) openDetails("");
  });
  $("#legend").textContent =
    "Layout: ranks of the pipeline (pp), replicas (dp), weight shards (fsdp), context (cp) and tensor (tp). Step: median wall time, warm-up left out. " +
    "MFU counts attention in full, causal by half, as the mask leaves it; HFU counts what ran, so that MFU may be above it and causal may not. " +
    "Gradient difference: the largest ‖g − g_ref‖ / ‖g_ref‖ of any parameter against one process, in float64 (DeepSpeed has float32); at most 1e-10 (1e-5) is passed. Bold: the best of a column. A dash: not measured." +
    (RUNS.some((run) => run.foretold.foretold_seconds !== null) ? " Foretold: a step by a closed form, on CPUs its CPU seconds; off: by how much of what was measured." : "");
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

const PARTS = { // by the section that each draws
  found: drawFound, layouts: drawLayouts, trade: drawTrade, history: drawHistory, table: drawTable, unfinished: drawUnfinished, charts: drawCharts,
};
const waiting = new Set(); // parts that are to be drawn
let turn = 0;

/** Draws these parts: what is on the screen at once, the rest soon after. */
function draw(parts = Object.keys(PARTS)) {
  const own = ++turn;
  const ready = document.documentElement.dataset;
  ready.ready = "false";
  for (const part of parts) waiting.add(part);
  const isSeen = (part) => {
    const { top, bottom } = document.getElementById(part).getBoundingClientRect();
    return top < innerHeight && bottom > 0;
  };
  const drawOne = (part) => waiting.delete(part) && PARTS[part]();
  [...waiting].filter(isSeen).forEach(drawOne);
  const next = () => {
    if (own !== turn) return; // another call goes on with what is waiting
    if (waiting.size) {
      drawOne([...waiting][0]);
      setTimeout(next);
    } else {
      const frame = $("#runs").parentElement;
      $("#sideways").hidden = frame.scrollWidth <= frame.clientWidth + 1;
      ready.ready = "true";
      if (isPlace() && own === 1) document.getElementById(location.hash.slice(1))?.scrollIntoView();
    }
  };
  next();
}

/** After a change of the state. */
function update(parts) {
  writeAddress();
  lookAgain();
  drawFilters();
  draw(parts);
}

function tellMissing(missing) {
  $("#notice").hidden = !missing;
  $("#notice").textContent = missing && `This link names what is not on this page: ${missing}.`;
}

/** Does the address name a part of the page, as "#chart-memory" does? */
const isPlace = () => location.hash.length > 1 && !location.hash.includes("=");

function drawAll() {
  $("#runs-title").textContent = PLANS ? "Plans" : "Runs";
  lookAgain();
  drawFilters();
  draw();
  drawDetails();
}

// ---- a live page: it follows the runs ------------------------------------------------------------------------------

const FOLLOW_MS = 2000;

/** Asks for newer data again and again, while somebody looks. */
async function follow(tag = "") {
  if (!document.hidden) {
    try {
      const answer = await fetch("data", { headers: tag ? { "If-None-Match": tag } : {} });
      if (answer.status === 200) {
        refresh(await answer.json());
        tag = answer.headers.get("ETag");
      }
      tellLive(answer.ok || answer.status === 304);
    } catch {
      tellLive(false);
    }
  }
  setTimeout(() => follow(tag), FOLLOW_MS);
}

/** Shows newer data; what is chosen, open, focused and in view stays so. */
function refresh(data) {
  if (JSON.stringify(data) === JSON.stringify(DATA)) return;
  const inRow = document.activeElement?.closest("#runs tr[data-id]") && [document.activeElement.closest("tr").dataset.id, document.activeElement.localName];
  take(data);
  fillFilters();
  drawAll();
  if (!inRow) return;
  waiting.delete("table") && PARTS.table(); // where it is out of view
  document.querySelector(`#runs tr[data-id="${CSS.escape(inRow[0])}"] ${inRow[1]}`)?.focus({ preventScroll: true });
}

function tellLive(answers) {
  const told = $("#live");
  if (told.dataset.answers === String(answers)) return;
  told.dataset.answers = String(answers);
  told.textContent = answers ? "live" : `no answer since ${new Date().toTimeString().slice(0, 8)}`;
}

function start() {
  take(JSON.parse(document.getElementById("data").textContent));
  startFilters();
  startControls();
  startTheme();
  fillFilters();
  tellMissing(readAddress());
  drawAll();
  if (DATA.live) {
    $("#live").hidden = false;
    $("footer .note").textContent = "This page follows its runs while lab report --serve goes on.";
    tellLive(true);
    setTimeout(follow, FOLLOW_MS);
  }
  window.addEventListener("popstate", () => {
    const before = address("");
    if (isPlace()) state.details = ""; // the browser scrolls there by itself
    else tellMissing(readAddress());
    if (address("") === before) drawDetails(); // a run was opened or closed, and the rest stays
    else drawAll();
  });
  let width = document.body.clientWidth;
  let frame = 0;
  window.addEventListener("resize", () => {
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(() => {
      if (document.body.clientWidth === width) return;
      width = document.body.clientWidth;
      redraw([...document.querySelectorAll("figure")]);
    });
  });
}

start();
