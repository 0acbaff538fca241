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
