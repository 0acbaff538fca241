// ---- what was found, in sentences ----------------------------------------------------------------------------------

const BUSY = 0.1; // share of the cores that other programs took: from there on it is said
const MOST_SETS = 3;

/** Runs whose speeds can be compared, those with most strategies first; of each strategy the newest.
 *
 * On a CPU all ranks share the cores, however many there are; accelerators are compared in equal number.
 */
function comparable(runs) {
  const measured = runs.filter((run) => isGood(run) && isMeasured(run) && run.tokens_per_s !== null);
  const key = (run) => JSON.stringify([run.cluster, onCpu(run) ? null : run.world_size, run.shape]);
  const sets = [...Map.groupBy(measured, key).values()].map((set) => {
    const newest = new Map([...set].sort((a, b) => a.time - b.time).map((run) => [JSON.stringify([run.name, run.layout]), run]));
    return [...newest.values()];
  });
  return sets.filter((set) => set.length > 1).sort((a, b) => b.length - a.length || b[0].world_size - a[0].world_size);
}

/** Names of sets or series: of what tells some from others, as much as that. */
function namesOf(all, parts) {
  const telling = parts.filter((part) => new Set(all.map(([run]) => part(run))).size > 1);
  return ([run]) => (telling.length ? telling : parts.slice(0, 1)).map((part) => part(run)).join(" · ");
}

const BATCH = (run) => `batch ${run.recipe.train?.global_batch ?? "unknown"}`;
const ON = [(run) => run.cluster, (run) => (onCpu(run) ? null : plural(run.world_size, "device")), (run) => run.model, BATCH];

/** {parts: [[sentence, run to open or null]], bad} of these runs. */
function findings(runs) {
  const found = [];
  const say = (text, { run = null, bad = false } = {}) => found.push({ parts: [[text, run]], bad });
  const going = runs.filter(isRunning);
  if (going.length) {
    const told = going.slice(0, 3).map(({ name, reason }) => `${name} at ${reason}`).join("; ");
    say(`${plural(going.length, "run")} ${going.length === 1 ? "is" : "are"} under way: ${told}${going.length > 3 ? "; ..." : ""}. Their speed is that of the last steps.`, { run: going[0] });
  }
  const sets = comparable(runs);
  const shown = sets.slice(0, MOST_SETS);
  const nameOf = namesOf(sets, ON);
  for (const set of shown) {
    const where = sets.length > 1 ? `${nameOf(set)}: ` : "";
    const [first, second] = [...set].sort((a, b) => b.tokens_per_s - a.tokens_per_s);
    const slow = first.step_seconds.p90 ? (first.tokens_per_s * first.step_seconds.median) / first.step_seconds.p90 : first.tokens_per_s;
    const ahead = second.tokens_per_s >= slow
      ? `; ${second.name} is within the spread of its steps`
      : `, ${axisFormat.format((first.tokens_per_s / second.tokens_per_s - 1) * 100)} % ahead of ${second.name}`;
    const mfu = first.flops.mfu === null ? "" : `, ${axisFormat.format(percent(first.flops.mfu))} % MFU`;
    say(`${where}${first.name} is the fastest: ${axisFormat.format(first.tokens_per_s)} tokens/s${mfu}${roomOf(first)}${ahead}.`, { run: first });
    found.at(-1).parts.push(...leanest(set));
  }
  if (sets.length > shown.length) say(`${plural(sets.length - shown.length, "more set")} of runs can be compared: choose a cluster, a number of devices or a model.`);
  if (PLANS) {
    const speed = runs.some(({ tokens_per_s }) => tokens_per_s !== null) ? "speeds are foretold" : "so there is no speed";
    say(`${plural(runs.length, "plan")}: dry runs. Memory, traffic and FLOPs are counted exactly; nothing was run, ${speed}.`);
    for (const set of Map.groupBy(runs, ({ model }) => model).values()) found.push({ parts: leanest(set, new Set(runs.map(({ model }) => model)).size > 1 ? `${set[0].model}: ` : "") });
  }
  const judged = runs.filter(({ parity }) => parity.passed !== null);
  const wrong = judged.filter((run) => !isGood(run));
  const worst = judged.filter((run) => isGood(run)).map(({ parity }) => parity.max_rel_grad_diff);
  if (wrong.length) say(`${wrong.length} of ${judged.length} FAILED the proof against one process: ${few(unique(wrong.map(({ name }) => name)), "strategies")}.`, { run: wrong[0], bad: true });
  else if (judged.length) say(`${judged.length === 1 ? "The one run" : `All ${judged.length} runs`} that ${judged.length === 1 ? "was" : "were"} compared with one process ${judged.length === 1 ? "has" : "have"} its gradients: they differ by at most ${scientific(largest(worst))} in ${unique(judged.map(({ parity }) => parity.dtype ?? "an unknown precision")).join(" or ")}.`);
  const unfinished = runs.filter((run) => run.status !== "ok" && !isRunning(run));
  if (unfinished.length) say(`${plural(unfinished.length, "run")} did not end well: ${unique(unfinished.map(({ status }) => status)).join(", ")}.`, { bad: true });
  const drops = dropsOf(runs).filter(({ lasts }) => lasts);
  if (drops.length) say(`${drops.length} series of runs became slower, and ${drops.length === 1 ? "is" : "are"} still: ${dropInWords(drops[0])}`, { run: BY_ID.get(drops[0].run), bad: true });
  for (const text of limits(runs, sets)) say(text);
  return found;
}

/** As " in 53.1 of 80 GiB": the peak of the fullest rank beside its device's memory, where both are known. */
function roomOf(run) {
  const [peak, memory] = [peakOf(run), run.environment.device_memory_bytes];
  if (peak === null || !isNumber(memory)) return "";
  const unit = byteUnit([memory]);
  return ` in ${axisFormat.format(peak / unit[1])} of ${inUnit(memory, unit)}`;
}

function leanest(set, where = "") {
  const known = set.filter((run) => peakOf(run) !== null && run.memory.all_known).sort((a, b) => peakOf(a) - peakOf(b));
  if (known.length < 2) return [];
  const [least_, most_] = [known[0], known.at(-1)];
  const unit = byteUnit([peakOf(least_)]);
  const [peak, times] = [inUnit(peakOf(least_), unit), axisFormat.format(peakOf(most_) / peakOf(least_))];
  if (times === "1") return [[`${where ? `${where}all` : "All"} need the same memory to within half a percent: ${peak} on the fullest rank.`, least_]];
  return [[`${where}${least_.name} needs the least memory: ${peak} on its fullest rank; ${most_.name} the most, ${times} times that.`, least_]];
}

/** What these runs cannot tell, in sentences. */
function limits(runs, sets) {
  const told = [];
  const measured = runs.filter((run) => isMeasured(run) && run.tokens_per_s !== null);
  const sharing = measured.filter((run) => onCpu(run) && run.world_size > run.environment.cores && run.environment.cores);
  if (sharing.length) {
    const widest = sharing.reduce((a, b) => (b.world_size / b.environment.cores > a.world_size / a.environment.cores ? b : a));
    told.push(`${widest.world_size} ranks share ${plural(widest.environment.cores, "core")}: compare overheads, not speed-ups.`);
  }
  const busy = measured.filter((run) => run.cores_used_by_others > BUSY * run.environment.cores).sort((a, b) => b.cores_used_by_others - a.cores_used_by_others);
  if (busy.length) {
    const [worst] = busy;
    const others = busy.length > 1 ? `, and some during ${plural(busy.length - 1, "more run")}` : "";
    told.push(`Other programs kept ${axisFormat.format(worst.cores_used_by_others)} of ${plural(worst.environment.cores, "core")} busy while ${worst.name} ran${others}: those times are too long.`);
  }
  const shapes = unique(measured.map(({ shape }) => shape));
  if (shapes.length > 1) told.push(`${shapes.length} models or batches are mixed: compare their MFU, not their tokens per second.`);
  const unproven = runs.filter((run) => isMeasured(run) && run.status === "ok" && run.parity.passed === null);
  if (unproven.length) told.push(`${plural(unproven.length, "run")} ${unproven.length === 1 ? "was" : "were"} not compared with one process.`);
  return told;
}

function drawFound() {
  const { shown } = view;
  $("#findings").replaceChildren(...findings(shown).filter(({ parts }) => parts.length).map(({ parts, bad }) =>
    element("li", { class: bad ? "warn" : null }, ...parts.flatMap(([text, run]) => [run ? linkTo(run, text) : text, " "]))));
  const times = shown.map((run) => day(run.environment.time_utc)?.slice(0, 10)).filter(Boolean).sort();
  const facts = [
    ["Model and global batch", few(unique(shown.map((run) => run.shape)), "shapes")],
    [PLANS ? "Planned on" : "Cluster", few(unique(shown.map((run) => run.cluster)), "clusters")],
    ["Software", few(unique(shown.map((run) => run.environment.torch).filter(Boolean)).map((v) => `torch ${v}`), "versions of torch") || "unknown"],
    [PLANS ? "Planned" : "Measured", unique([times[0], times.at(-1)].filter(Boolean)).join(" to ") || "unknown"],
  ];
  $("#facts").replaceChildren(...facts.map(([label, value]) => element("div", {}, element("dt", {}, label), element("dd", {}, value || "none"))));
}

// ---- which layout, on how many devices -----------------------------------------------------------------------------

/** What is compared across devices: MFU, else tokens per second of a rank. [name, of a run, format] */
function yardstick(runs) {
  const byMfu = runs.some((run) => run.flops.mfu !== null);
  const of = byMfu ? (run) => percent(run.flops.mfu) : (run) => run.tokens_per_s_per_rank;
  return [byMfu ? "MFU, % of peak" : "tokens/s per rank", of];
}

function drawLayouts() {
  const runs = view.shown.filter((run) => isGood(run) && isMeasured(run) && run.world_size && run.layout_kind);
  const series = scaled(runs);
  const layoutsOf = [...Map.groupBy(runs, ({ world_size }) => world_size).values()].map((each) => new Set(each.map(({ layout_kind }) => layout_kind)).size);
  const several = layoutsOf.filter((count) => count > 1).length > 1;
  $("#layouts").hidden = !series.length && !several;
  if ($("#layouts").hidden) return;
  place([heatChart(runs), scalingChart(series, true), scalingChart(series, false)], $("#layouts .grid"));
}

function heatChart(runs) {
  const [name, of] = yardstick(runs);
  const known = runs.filter((run) => of(run) !== null);
  const counts = unique(known.map((run) => run.world_size)).sort((a, b) => a - b);
  const best = (some) => some.reduce((a, b) => (a === null || of(b) > of(a) ? b : a), null);
  const kinds = [...Map.groupBy(known, ({ layout_kind }) => layout_kind)]
    .map(([kind, own]) => ({ kind, best: best(own), cells: counts.map((count) => best(own.filter((run) => run.world_size === count))) }))
    .sort((a, b) => of(b.best) - of(a.best));
  const winners = counts.map((count) => best(known.filter((run) => run.world_size === count)));
  const [low, high] = [least(known.map(of)), most(known.map(of))];
  const format = formatter(known.map(of));
  const mixed = [[unique(known.map((run) => run.cluster)), "clusters"], [unique(known.map((run) => run.model)), "models"]].filter(([values]) => values.length > 1);
  const draw = (width) => {
    const left = Math.min(width * 0.4, 24 + 6.6 * most(kinds.map(({ kind }) => kind.length)));
    const cellWidth = Math.min(110, (width - left) / counts.length);
    const height = 28;
    const drawing = shape("svg", { width, height: kinds.length * (height + 3) + 46, viewBox: `0 0 ${width} ${kinds.length * (height + 3) + 46}` });
    counts.forEach((count, i) => drawing.append(shape("text", { x: left + (i + 0.5) * cellWidth, y: 14, class: "soft middle" }, String(count))));
    kinds.forEach(({ kind, cells }, row) => {
      const y = 22 + row * (height + 3);
      drawing.append(shape("text", { x: 0, y: y + 18 }, clipped(kind, left), shape("title", {}, kind)));
      cells.forEach((run, i) => {
        const box = { x: left + i * cellWidth + 1.5, y, width: cellWidth - 3, height, rx: 4 };
        if (!run) return drawing.append(shape("rect", { ...box, class: "heat none" }));
        const step = Math.round(4 * ((of(run) - low) / (high - low || 1)));
        const wins = run === winners[i];
        drawing.append(
          shape("rect", { ...box, class: `heat h${step}${wins ? " wins" : ""}` }, shape("title", {}, `${run.name}, ${run.layout}, ${run.cluster}, ${run.shape}`)),
          shape("text", { x: box.x + box.width / 2, y: y + 18, class: `middle heat-label h${step}${wins ? " strong" : ""}` }, format(of(run))));
      });
    });
    drawing.append(shape("text", { x: left + (counts.length * cellWidth) / 2, y: 22 + kinds.length * (height + 3) + 16, class: "soft middle" }, "devices"));
    return drawing;
  };
  return figure({
    id: "heat",
    title: `Best ${name.split(",")[0]} by layout and devices`,
    about: `The best run of each kind of layout; replicas (dp) and shards (fsdp) grow with the devices. The frame marks the best of each number of devices.${mixed.length ? ` Over ${mixed.map(([values, noun]) => `${values.length} ${noun}`).join(" and ")}: choose one above.` : ""}`,
    draw: known.length > 0 && draw,
    table: () => ({
      head: ["layout", "devices", name, "run", "exact layout", "cluster", "model and batch"],
      rows: kinds.flatMap(({ kind, cells }) => cells.filter(Boolean).map((run) => [kind, run.world_size, of(run), run.name, run.layout, run.cluster, run.shape])),
    }),
  });
}

/** Strategies seen on several numbers of devices, those of most devices and speed first: the best run on each. */
function scaled(runs) {
  const known = runs.filter((run) => run.tokens_per_s !== null);
  const byStrategy = Map.groupBy(known, (run) => JSON.stringify([run.cluster, run.model, run.name, run.engine]));
  return [...byStrategy.values()].map((own) => {
    const best = [...Map.groupBy(own, ({ world_size }) => world_size).values()].map((some) => some.reduce((a, b) => (b.tokens_per_s > a.tokens_per_s ? b : a)));
    return best.sort((a, b) => a.world_size - b.world_size);
  }).filter((points) => points.length > 1).sort((a, b) => b.at(-1).world_size - a.at(-1).world_size || b.at(-1).tokens_per_s - a.at(-1).tokens_per_s);
}

/** Speed: tokens/s on logarithmic axes, where perfect scaling is a straight line; else MFU. */
function scalingChart(series, speed) {
  const of = speed ? (run) => run.tokens_per_s : (run) => percent(run.flops.mfu);
  const known = series.map((points) => points.filter((run) => of(run) !== null)).filter((points) => points.length > 1);
  const drawn = known.slice(0, MOST_LINES);
  const efficiency = ([first], run) => (run.tokens_per_s / run.world_size / (first.tokens_per_s / first.world_size)) * 100;
  const label = namesOf(known, [(run) => run.name, (run) => run.engine, (run) => run.cluster, (run) => run.model]);
  const counts = unique(drawn.flat().map((run) => run.world_size)).sort((a, b) => a - b);
  const curves = drawn.flatMap((points, i) => {
    const marks = points.map((run) => ({ x: run.world_size, y: of(run), tip: `${label(points)}, ${run.layout}: ${axisFormat.format(of(run))}${speed ? ` tokens/s, efficiency ${axisFormat.format(efficiency(points, run))} %` : " % MFU"}` }));
    const own = { x: marks.map(({ x }) => x), y: marks.map(({ y }) => y), series: i, dash: "", title: label(points), marks };
    const [{ world_size: n, tokens_per_s: rate }, last] = [points[0], points.at(-1)];
    return speed ? [{ x: [n, last.world_size], y: [rate, (rate * last.world_size) / n], series: i, line: "ideal", title: "ideal" }, own] : [own];
  });
  const some = known.length > drawn.length ? ` ${drawn.length} of ${known.length} are drawn: choose a cluster, a model or a strategy above.` : "";
  return figure({
    id: speed ? "scaling" : "scaling-mfu",
    title: speed ? "Speed over devices" : "MFU over devices",
    about: speed ? `The best run of a strategy on each number of devices. Dotted: the first one's speed, scaled perfectly.${some}` : `Of the same runs. What scales perfectly stays level.${some}`,
    key: [...drawn.map((points, i) => [() => pointMark(11, 6, i, ""), speed ? `${label(points)}: ${axisFormat.format(efficiency(points, points.at(-1)))} % efficient at ${points.at(-1).world_size}` : label(points)])],
    draw: drawn.length > 0 && ((width) => lineChart(width, {
      curves, xUnit: "devices", yUnit: speed ? "tokens/s" : "MFU, % of peak", xTicks: counts.map((count) => [count, String(count)]), fromZero: !speed,
      scale: { x: Math.log2, y: speed ? Math.log2 : undefined },
    })),
    table: () => ({
      head: ["strategy", "devices", "tokens/s", "efficiency, %", "MFU, % of peak", "layout", "cluster", "model and batch"],
      rows: known.flatMap((points) => points.map((run) => [run.name, run.world_size, run.tokens_per_s, efficiency(points, run), percent(run.flops.mfu), run.layout, run.cluster, run.shape])),
    }),
  });
}

// ---- speed against memory ------------------------------------------------------------------------------------------

function drawTrade() {
  const sets = comparable(view.shown).map((set) => set.filter((run) => peakOf(run) !== null)).filter((set) => set.length > 1);
  $("#trade").hidden = !sets.length;
  if (sets.length) place([tradeChart(sets)], $("#trade .grid"));
}

/** Those that no other beats in both speed and memory, the leanest first. */
function unbeaten(set, of) {
  const beats = (a, b) => of(a) >= of(b) && peakOf(a) <= peakOf(b) && (of(a) > of(b) || peakOf(a) < peakOf(b));
  return set.filter((run) => !set.some((other) => beats(other, run))).sort((a, b) => peakOf(a) - peakOf(b));
}

function tradeChart(all) {
  const sets = all.slice(0, MOST_LINES);
  const setName = namesOf(all, ON);
  const [name, of] = sets.length > 1 ? yardstick(sets.flat()) : ["tokens/s", (run) => run.tokens_per_s];
  const points = sets.map((set) => set.filter((run) => of(run) !== null));
  const peaks = points.flat().map(peakOf);
  const capacity = unique(numbers(points.flat().map((run) => run.environment.device_memory_bytes)));
  const limit = capacity.length === 1 && capacity[0] < 4 * largest(peaks) ? capacity[0] : null;
  const unit = byteUnit(peaks);
  const fronts = points.map((set) => unbeaten(set, of));
  const inUnits = (run) => peakOf(run) / unit[1];
  const curves = points.map((set, i) => ({
    x: fronts[i].map(inUnits), y: fronts[i].map(of), series: i, title: sets.length > 1 ? setName(set) : "not beaten", dash: "",
    marks: set.map((run) => ({ x: inUnits(run), y: of(run), tip: `${run.name}: ${axisFormat.format(of(run))} ${name}, ${inUnit(peakOf(run), unit)}` })),
  }));
  const named = sets.length > 1 ? fronts.flat() : [...fronts[0], ...points[0].filter((run) => !fronts[0].includes(run))];
  const extra = ({ x, y, right, top, bottom }) => {
    const taken = named.map((run) => [x(inUnits(run)) - 7, y(of(run)) - 7, 14, 14]);
    const marks = [];
    for (const run of named) {
      const wide = run.name.length * 6.2;
      const [px, py] = [x(inUnits(run)), y(of(run))];
      const [right_, left_, above, below] = [[px + 10, py - 7], [px - 10 - wide, py - 7], [px - wide / 2, py - 22], [px - wide / 2, py + 9]];
      const places = fronts.flat().includes(run) ? [above, left_, right_, below] : [right_, below, left_, above]; // not on the line
      const clear = ([a, b]) => a > 60 && a + wide < right + 10 && b > 0 && !taken.some(([c, d, w, h]) => a < c + w && c < a + wide && b < d + h && d < b + 13);
      const free = places.find(clear);
      if (!free) continue;
      taken.push([...free, wide, 13]);
      marks.push(shape("text", { x: free[0], y: free[1] + 11, class: "soft" }, run.name));
    }
    if (limit) marks.push(shape("line", { x1: x(limit / unit[1]), x2: x(limit / unit[1]), y1: top, y2: bottom, class: "limit" }));
    return marks;
  };
  const memory = capacity.length === 1 ? ` ${limit ? "The dashed line is the device's memory" : "A device has"}, ${inUnit(capacity[0], byteUnit(capacity))}.` : "";
  return figure({
    id: "trade",
    title: `${name[0].toUpperCase()}${name.slice(1)} against peak memory`,
    about: `Up and to the left is better. The line joins the rows that no other beats in both; a name is left out where there is no room for it.${sets.length > 1 ? ` ${sets.length}${all.length > sets.length ? ` of ${all.length}` : ""} sets of runs, of each strategy the newest.` : ""}${memory}`,
    key: sets.length > 1 ? sets.map((set, i) => [() => pointMark(11, 6, i, ""), setName(set)]) : null,
    draw: points.flat().length > 1 && ((width) => lineChart(width, { curves, xAtLeast: limit && limit / unit[1], xUnit: `peak of the fullest rank, ${unit[0]}`, yUnit: name, fromZero: true, xFromZero: true, extra })),
    table: () => ({
      head: ["run", `peak, ${unit[0]}`, name, "beaten by none", "layout", "set"],
      rows: points.flatMap((set, i) => set.map((run) => [run.name, inUnits(run), of(run), fronts[i].includes(run) ? "yes" : "no", run.layout, setName(set)])),
    }),
    wide: true,
  });
}

// ---- over time -----------------------------------------------------------------------------------------------------

const seriesOf = (run) => JSON.stringify([run.cluster, run.world_size, run.name, run.engine, run.shape]);

const dropsOf = (runs) => {
  const shown = new Set(runs.map(({ id }) => id));
  return DATA.drops.filter(({ run }) => shown.has(run));
};

function dropInWords({ run: id, unit, value, usual, share, commit, time_utc: time, lasts }) {
  const run = BY_ID.get(id);
  const inWords = (number) => (unit === "MFU" ? `${axisFormat.format(number * 100)} %` : axisFormat.format(number));
  const since = `${commit ? `${commit.slice(0, 7)} of ` : ""}${time.slice(0, 10)}`;
  return `${run.name} on ${plural(run.world_size, "device")} of ${run.cluster}: ${unit} ${inWords(value)} instead of ${inWords(usual)}, ${Math.round(share * 100)} % lower since ${since}${lasts ? "" : "; made good since"}.`;
}

function drawHistory() {
  const runs = view.shown.filter((run) => run.status === "ok" && isMeasured(run) && run.time !== null && run.tokens_per_s !== null);
  const drops = dropsOf(runs);
  const low = new Map(drops.map((drop) => [drop.run, drop]));
  const dropIn = (series) => series.some(({ id }) => low.has(id));
  const several = [...Map.groupBy(runs, seriesOf).values()].filter((series) => new Set(series.map(({ time }) => time)).size > 1);
  several.sort((a, b) => dropIn(b) - dropIn(a) || b.length - a.length || a[0].world_size - b[0].world_size);
  $("#history").hidden = !several.length;
  $("#drops").hidden = !drops.length;
  $("#drops").replaceChildren(...drops.slice(0, MOST_ROWS).map((drop) => element("li", { class: drop.lasts ? "lasts" : null }, linkTo(BY_ID.get(drop.run), dropInWords(drop)))));
  if (several.length) place([historyChart(several, low)], $("#history .grid"));
}

function historyChart(all, low) {
  const drawn = all.slice(0, MOST_LINES).map((series) => [...series].sort((a, b) => a.time - b.time));
  const byMfu = all.flat().every((run) => run.flops.mfu !== null);
  const value = byMfu ? (run) => percent(run.flops.mfu) : (run) => run.tokens_per_s;
  const unit = byMfu ? "MFU, % of peak" : "tokens/s";
  const inOrder = drawn.flat().sort((a, b) => a.time - b.time);
  const commits = unique(inOrder.map(commitOf));
  const byCommit = state.axis !== "time" && !commits.includes(null) && commits.length > 1;
  const at = byCommit ? (run) => commits.indexOf(commitOf(run)) : (run) => run.time;
  const label = namesOf(all, [(run) => run.name, (run) => run.engine, (run) => plural(run.world_size, "device"), (run) => run.cluster, (run) => run.model, BATCH]);
  const curves = drawn.map((series, i) => {
    const places = unique(series.map(at));
    const ofPlace = places.map((place) => series.filter((run) => at(run) === place).map(value));
    return {
      x: places, y: ofPlace.map((values) => sum(values) / values.length), series: i, dash: "", title: label(series),
      marks: series.map((run) => ({ x: at(run), y: value(run), tip: `${label(series)}, ${day(run.environment.time_utc)}, ${commitOf(run) ?? "no commit"}: ${axisFormat.format(value(run))}`, bad: low.has(run.id), label: low.has(run.id) ? `−${Math.round(low.get(run.id).share * 100)} %` : null })),
    };
  });
  const days = [inOrder[0], inOrder[Math.floor(inOrder.length / 2)], inOrder.at(-1)].map(({ time }) => time);
  return figure({
    id: "history",
    title: byCommit ? "Commit by commit" : "Run by run",
    about: `${unit.split(",")[0]}. A line is one cluster, number of devices, strategy, model and batch${byCommit ? "; it goes through the mean of a commit's runs" : ""}. A ring: lower than the runs before it by more than they spread.${all.length > drawn.length ? ` ${drawn.length} of ${all.length} are drawn, those that dropped first: choose above for others.` : ""}`,
    key: drawn.map((series, i) => [() => pointMark(11, 6, i, ""), label(series)]),
    draw: (width) => lineChart(width, {
      curves, yUnit: unit, fromZero: true, xUnit: byCommit ? "commits, in the order of their first run" : "time of the run, UTC",
      xTicks: byCommit ? commits.map((commit, i) => [i, commit]) : days.map((time) => [time, new Date(time).toISOString().slice(0, 10)]),
    }),
    table: () => ({
      head: ["time, UTC", "commit", unit, "strategy", "devices", "cluster", "model and batch", "run", "lower by, %"],
      rows: all.flat().map((run) => [day(run.environment.time_utc), commitOf(run), value(run), run.name, run.world_size, run.cluster, run.shape, run.id, low.has(run.id) ? low.get(run.id).share * 100 : null]),
    }),
    wide: true,
  });
}
