"use strict";
// The data is checked and cut to size by launch/page.py: a number is a finite number or null, a text is a string.
// Texts reach the document through textContent alone.
let DATA, RUNS, BY_KEY, BY_ID, DAYS, TEXTS;
let PLANS; // a page of dry runs alone
const unfolded = (text) => JSON.parse(text); // curves and timelines, which are long: read for the runs that are drawn
const MOST_ROWS = 100; // of the table, until all are asked for
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
const MOST_LINES = 6; // of a chart with lines: as many as there are forms of a mark

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
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(1)}`;
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
const few = (values, noun) => (values.length <= 2 ? values.join("; ") : `${values.length} ${noun}`);
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
const inUnit = (value, [unit, size]) => `${axisFormat.format(value / size)} ${unit}`;
const axisFormat = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const isGood = (run) => run.status === "ok" && run.parity.passed !== false && run.parity.trained_passed !== false;
const isMeasured = (run) => run.kind === "measured";
const isRunning = (run) => run.status === "running";
const onCpu = ({ environment }) => String(environment.device ?? "").startsWith("cpu");
const peakOf = (run) => run.memory?.largest.peak_bytes ?? null;

// ---- what is chosen, and its address -------------------------------------------------------------------------------

/** Takes the data of the page, at its start and, on a live page, whenever there is newer. */
function take(data) {
  DATA = data;
  RUNS = DATA.runs;
  PLANS = RUNS.length > 0 && RUNS.every((run) => !isMeasured(run));
  // A cluster with one kind of device is known by its name alone.
  for (const own of Map.groupBy(RUNS.filter(({ environment }) => environment.cluster), ({ environment }) => environment.cluster).values()) {
    if (new Set(own.map(({ cluster }) => cluster)).size === 1) for (const run of own) run.cluster = String(run.environment.cluster);
  }
  BY_KEY = new Map(RUNS.map((run) => [run.key, run]));
  BY_ID = new Map(RUNS.map((run) => [run.id, run]));
  DAYS = RUNS.map((run) => day(run.environment.time_utc)?.slice(0, 10) ?? null);
  TEXTS = RUNS.map((run) =>
    [run.name, run.id, run.layout, run.status, run.kind, run.cluster, run.hardware, run.shape, run.reason, commitOf(run), ...Object.values(run.labels).flat()].join(" ").toLowerCase());
  formatColumns();
}

const FACETS = {
  cluster: (run) => run.cluster,
  devices: (run) => run.world_size,
  model: (run) => run.model,
  strategy: (run) => run.name,
  engine: (run) => run.engine,
  status: (run) => run.status,
  comparison: (run) => run.comparison || null,
};
const IN_ADDRESS = [...Object.keys(FACETS), "since", "until", "query", "axis", "against", "details"];
const FRESH = { chosen: null, sort: null, descending: false, all: false, ...Object.fromEntries(IN_ADDRESS.map((key) => [key, ""])) };
const state = { ...FRESH }; // chosen: keys of runs; null: those that a fresh page chooses
let view = { shown: [], chosen: [] };

const valuesOf = (facet) => unique(RUNS.map(FACETS[facet]).filter((value) => value !== null)).map(String).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));

/** What the filters leave, and which of those the charts compare. */
function lookAgain() {
  const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
  const facets = Object.entries(FACETS).filter(([facet]) => state[facet]);
  const shown = RUNS.filter((run, i) =>
    facets.every(([facet, of]) => String(of(run)) === state[facet]) &&
    (!state.since || (DAYS[i] !== null && DAYS[i] >= state.since)) &&
    (!state.until || (DAYS[i] !== null && DAYS[i] <= state.until)) &&
    words.every((word) => TEXTS[i].includes(word)));
  const chosen = state.chosen ?? freshChoice(shown);
  const inOrder = sorted(shown);
  const compared = inOrder.filter((run) => chosen.has(run.key));
  if (!state.sort) compared.sort((a, b) => a.group - b.group); // stable: the order within a group stays
  view = { shown: inOrder, chosen: compared, keys: chosen };
}

/** The newest comparison's measured runs that ended well or go on; of few, those of every comparison. */
function freshChoice(runs) {
  const good = runs.filter((run) => (run.status === "ok" || isRunning(run)) && isMeasured(run));
  const pool = good.length ? good : runs;
  if (pool.length <= MOST_DRAWN) return new Set(pool.map((run) => run.key));
  const newest = pool.reduce((a, b) => (b.time > a.time ? b : a));
  return new Set(pool.filter((run) => run.group === newest.group).slice(0, MOST_DRAWN).map((run) => run.key));
}

/** Sets the state; returns in words what the address names and this page does not have. */
function readAddress() {
  const address = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
  const missing = [];
  Object.assign(state, FRESH);
  for (const key of IN_ADDRESS) state[key] = address.get(key) ?? "";
  for (const facet of Object.keys(FACETS)) {
    if (!state[facet] || valuesOf(facet).includes(state[facet])) continue;
    missing.push(`${facet} “${state[facet].slice(0, 100)}”`);
    state[facet] = "";
  }
  const column = COLUMNS.find(({ key }) => key === address.get("sort"));
  state.sort = column ? column.key : null;
  state.descending = address.get("order") === "descending";
  const keys = address.has("runs") ? address.get("runs").split(".").filter(Boolean) : null;
  state.chosen = keys && new Set(keys.filter((key) => BY_KEY.has(key)));
  let unknown = keys ? keys.length - state.chosen.size : 0;
  for (const key of ["against", "details"]) {
    if (!state[key] || BY_KEY.has(state[key])) continue;
    unknown += 1;
    state[key] = "";
  }
  if (unknown) missing.unshift(unknown === 1 ? "a run" : `${unknown} runs`);
  return missing.join(", ");
}

function address(details = state.details) {
  const entries = IN_ADDRESS.filter((key) => key !== "details" && state[key]).map((key) => [key, state[key]]);
  if (details) entries.push(["details", details]);
  if (state.sort) entries.push(["sort", state.sort], ...(state.descending ? [["order", "descending"]] : []));
  if (state.chosen) entries.push(["runs", [...state.chosen].join(".")]);
  return `#${new URLSearchParams(entries)}`;
}

const writeAddress = () => history.replaceState(null, "", address());
