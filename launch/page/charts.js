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
    // The model's part of what ran lies within what ran; MFU with all of attention may be beyond it.
    const mark = (x, y, height) => [
      hfu === null ? null : shape("rect", { x: x(0), y, width: x(hfu) - x(0), height, class: "pale" }, shape("title", {}, `HFU ${format(hfu)} %`)),
      causal === null ? null : block(x(0), y + 4, x(causal) - x(0), height - 8, 0, `MFU, causal: ${format(causal)} %`),
      mfu === null ? null : shape("line", { x1: x(mfu), x2: x(mfu), y1: y, y2: y + height, class: "whisker" }, shape("title", {}, `MFU ${format(mfu)} %`)),
      ceiling === null ? null : shape("line", { x1: x(ceiling), x2: x(ceiling), y1: y - 3, y2: y + height + 3, class: "ceiling" }),
    ].filter(Boolean);
    const measured = [mfu, causal, hfu].some(isNumber);
    return { run, lines: [{ mark: measured ? mark : null, why: whyNoMfu(run), cells: [mfu, causal, hfu].map((v) => (v === null ? "–" : format(v))) }] };
  });
  const above = all.filter(([mfu, , hfu]) => mfu !== null && hfu !== null && mfu > hfu).length;
  const why = above ? ` MFU is above HFU in ${above === all.length ? "every row" : plural(above, "row")}: it counts the half of attention that the causal mask leaves out, and that half did not run.` : "";
  const line = (name) => () => shape("line", { x1: 11, x2: 11, y1: 0, y2: 12, class: name });
  return figure({
    id: "utilisation",
    title: "MFU and HFU",
    about: `Share of the device's peak FLOP/s. HFU: what was executed, recompute included; within it the model's part, MFU with attention as the causal mask leaves it. MFU counts attention in full.${why} The ceiling is the fastest matmul measured on the device; on a CPU it is the peak, too.`,
    missing: "Not measured in these runs: no record has FLOPs or a peak to divide by.",
    key: [[0, "MFU, causal"], [() => shape("rect", { x: 0, y: 0, width: 22, height: 12, class: "pale" }), "HFU"], [line("whisker"), "MFU"], [line("ceiling"), "ceiling"]],
    draw: known && ((width) => rowChart(width, { rows, columns: ["MFU", "causal", "HFU"], unit: "% of peak", most: largest(all.flat()), lineHeight: 22 })),
    table: () => ({
      head: ["run", "MFU, % of peak", "MFU causal, %", "HFU, %", "ceiling, %", "model FLOPs per token", "executed FLOPs per token", "peak of a rank, FLOP/s", "measured ceiling, FLOP/s", "source of the peak"],
      rows: runs.map((run, i) => [run.name, ...all[i], run.flops.model_flops_per_token, run.flops.hardware_flops_per_token, run.flops.peak_flops, run.flops.matmul_ceiling_flops, run.flops.peak_source]),
    }),
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
        block(x(0), y + 2, x(value) - x(0), height - 4, 0, `${format(value)} tokens/s`),
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
    table: () => ({
      head: ["run", "tokens/s", "slow steps (p90), tokens/s", "fast steps (p10), tokens/s", "tokens/s per rank", "step median, s", "step p10, s", "step p90, s", "CPU, s per step", "steps timed"],
      rows: runs.map((run, i) => [run.name, ...values[i], run.tokens_per_s_per_rank, run.step_seconds.median, run.step_seconds.p10, run.step_seconds.p90, run.cpu_seconds_per_step, run.steps_timed]),
    }),
  });
}

/** The step as a closed form had it, beside the measured one; null where no run was foretold. */
function foretoldChart(runs) {
  const known = runs.filter(({ foretold }) => foretold.foretold_seconds !== null);
  if (!known.length) return null;
  const errors = known.map(({ foretold }) => percent(foretold.error));
  const sizes = numbers(errors).map(Math.abs);
  const seconds = known.flatMap(({ foretold }) => [foretold.foretold_seconds, foretold.measured_seconds]);
  const [unit, size] = timeUnit(seconds);
  const format = formatter(seconds.map((value) => value && value / size));
  const rows = known.map((run, i) => {
    const { foretold_seconds: told, measured_seconds: measured } = run.foretold;
    const mark = (x, y, height) => [
      ...(measured === null ? [] : [block(x(0), y, x(measured / size) - x(0), height - 6, 0, `measured ${format(measured / size)} ${unit}`)]),
      block(x(0), y + height - 5, x(told / size) - x(0), 4, 1, `foretold ${format(told / size)} ${unit}`),
    ];
    return { run, lines: [{ mark, cells: [errors[i] === null ? "–" : `${signed(errors[i])} %`, measured === null ? "–" : format(measured / size), format(told / size)] }] };
  });
  const what = known.some(({ foretold }) => foretold.of_cpu) ? "CPU seconds of a step, of all ranks" : "Seconds of a step";
  const where = few(unique(known.map(({ foretold }) => foretold.cluster)), "clusters");
  const how = sizes.length ? ` Off by ${axisFormat.format(sum(sizes) / sizes.length)} % in the mean of ${plural(sizes.length, "row")}, at most ${axisFormat.format(most(sizes))} %.` : "";
  return figure({
    id: "foretold",
    title: "Foretold and measured",
    about: `${what}: as measured, and as the closed form had it for the cluster ${where}.${how}`,
    key: [[0, "measured"], [() => shape("g", {}, block(0, 4, 22, 4, 1)), "thin bar: foretold"]],
    draw: (width) => rowChart(width, { rows, columns: ["off", "measured", "foretold"], unit: `${unit} per step`, most: largest(seconds) / size, lineHeight: 20 }),
    table: () => ({
      head: ["run", `measured, ${unit}`, `foretold, ${unit}`, "off by, %", "cluster"],
      rows: known.map(({ name, foretold }, i) => [name, foretold.measured_seconds && foretold.measured_seconds / size, foretold.foretold_seconds / size, errors[i], foretold.cluster]),
    }),
  });
}

/** Lines of stacked bars, each with its prediction, where there is one, as a thin bar beneath it.
 *
 * linesOf(run): [{measured, predicted, tag}], each a stack {segments: [[series, value, what]], total, atLeast} or null.
 */
function stackedRows(runs, linesOf, { size, format, columns }) {
  const inWords = (stack) => (stack ? (stack.atLeast ? "≥ " : "") + format(stack.total / size) : "–");
  return runs.map((run) => ({
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
}

function stackedBar({ segments, total }, x, y, height, size, format, what = "") {
  const nodes = [];
  let start = 0;
  for (const [series, value, name] of segments) {
    if (!value) continue;
    const [from, to] = [x(start / size), x((start + value) / size)];
    // Neighbours of one colour are told apart by a gap.
    nodes.push(block(from, y, Math.max(0.5, to - from - (to - from > 3 ? 0.7 : 0)), height, series, `${what}${name}: ${format(value / size)}`));
    start += value;
  }
  if (total - start > 0.005 * total) { // of which nobody knows what it is
    nodes.push(shape("rect", { x: x(start / size), y, width: x(total / size) - x(start / size), height, class: "unsplit" }));
  }
  return nodes;
}

const PREDICTED_MARK = [() => shape("g", {}, block(0, 4, 22, 4, 0)), "thin bar: predicted by a dry run"];

/** Columns of a chart that may have predictions. */
function predictedColumns(unit, anyMeasured, anyPredicted) {
  if (!anyPredicted) return [unit];
  return anyMeasured ? ["measured", "predicted"] : ["predicted"];
}

/** Two functions of a run: `what` (memory, traffic) as measured and as predicted; a dry run is all prediction. */
function measuredAndPredicted(what) {
  const isDryRun = ({ kind }) => kind === "dry-run";
  return [(run) => (isDryRun(run) ? null : run[what]), (run) => (isDryRun(run) ? run[what] : run.predicted?.[what] ?? null)];
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
  const [measuredOf, predictedOf] = measuredAndPredicted("memory");
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
    table: () => ({
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
    }),
  });
}

const dimsOf = (rows) => {
  const present = unique(rows.map(({ mesh_dim }) => mesh_dim));
  return unique([...MESH_DIMS, ...present]).filter((name) => present.includes(name));
};
const colourOfDim = (dim) => (MESH_DIMS.includes(dim) ? MESH_DIMS.indexOf(dim) : 5); // one for each, whatever is chosen

function trafficChart(runs) {
  const [measuredOf, predictedOf] = measuredAndPredicted("traffic");
  const all = runs.flatMap((run) => [measuredOf(run), predictedOf(run)].filter(Boolean));
  const dims = dimsOf(all.flat());
  const isUnknown = ({ bytes_per_rank }) => bytes_per_rank === null;
  const total = (rows) => sum(rows.map(({ bytes_per_rank }) => bytes_per_rank));
  const [unit, size] = byteUnit(all.map(total));
  const format = formatter(all.map((rows) => total(rows) / size));
  const segmentsOf = ({ mesh_dim, collective, bytes_per_rank }) => [[colourOfDim(mesh_dim), bytes_per_rank, `${mesh_dim} ${collective}`]];
  const stack = (rows) => rows && {
    segments: dims.flatMap((dim) => rows.filter(({ mesh_dim }) => mesh_dim === dim).flatMap(segmentsOf)),
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
  const shown = [0, 1, 2, 3, 4, ...(anyPredicted ? [5, 6] : [])];
  return figure({
    id: "traffic",
    title: "Traffic",
    about: `Bytes that a rank sends in a step, by the mesh dimension along which they travel; of each kind of message, by the rank that sends most. ${agreement(pairs)}${all.flat().some(isUnknown) ? " ≥: some collective's bytes are not known." : ""}`,
    key: [...dims.map((name) => [colourOfDim(name), name]), ...(anyPredicted ? [PREDICTED_MARK] : [])],
    draw: all.length > 0 && ((width) => rowChart(width, {
      rows: stackedRows(runs, (run) => [{ measured: stack(measuredOf(run)), predicted: stack(predictedOf(run)) }], { size, format, columns }),
      columns, unit: `${unit} per rank and step`, most: largest(all.map(total)) / size,
    })),
    table: () => ({
      head: shown.map((i) => head[i]),
      rows: runs.flatMap(tableRows).map((row) => shown.map((i) => row[i] ?? null)),
    }),
  });
}

/** What stays on a host and what the network between hosts must carry; null where no run sent anything there. */
function hostsChart(runs) {
  const known = ({ bytes_per_rank, bytes_across_hosts }) => isNumber(bytes_per_rank) && isNumber(bytes_across_hosts);
  const placed = runs.filter(({ traffic }) => traffic?.some(known));
  const all = placed.flatMap(({ traffic }) => traffic.filter(known));
  if (!all.some(({ bytes_across_hosts: across }) => across > 0)) return null;
  const within = (row) => row.bytes_per_rank - row.bytes_across_hosts;
  const across = (row) => row.bytes_across_hosts;
  const stack = ({ traffic }, of, what) => {
    const rows = dimsOf(all).flatMap((dim) => traffic.filter((row) => known(row) && row.mesh_dim === dim));
    return {
      segments: rows.map((row) => [colourOfDim(row.mesh_dim), of(row), `${row.mesh_dim} ${row.collective} ${what}`]),
      total: sum(rows.map(of)),
      atLeast: !traffic.every(known),
    };
  };
  const linesOf = (run) => (placed.includes(run)
    ? [{ tag: "within", measured: stack(run, within, "within hosts") }, { tag: "across", measured: stack(run, across, "to other hosts") }]
    : [{ measured: null }]);
  const totals = placed.flatMap((run) => linesOf(run).map(({ measured }) => measured.total));
  const [unit, size] = byteUnit(totals);
  const format = formatter(totals.map((total) => total / size));
  return figure({
    id: "hosts",
    title: "Traffic within hosts and across",
    about: `Of the bytes that a rank sends in a step, those to ranks of its own host, and those to other hosts, which the slower network between them carries; of each kind of message, by the rank that sends most.${placed.some(({ traffic }) => !traffic.every(known)) ? " ≥: of some collective it is not known." : ""}`,
    key: dimsOf(all).map((name) => [colourOfDim(name), name]),
    draw: (width) => rowChart(width, {
      rows: stackedRows(runs, linesOf, { size, format, columns: [unit] }),
      columns: [unit], unit: `${unit} per rank and step`, most: largest(totals) / size, lineHeight: 16,
    }),
    table: () => ({
      head: ["run", "mesh dimension", "collective", `${unit} within hosts`, `${unit} to other hosts`],
      rows: placed.flatMap((run) => run.traffic.map((row) => [run.name, row.mesh_dim, row.collective, ...[within, across].map((of) => (known(row) ? of(row) / size : null))])),
    }),
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
  const medians = runs.map((run) => run.step_seconds.median);
  const [unit, size] = timeUnit(totals);
  const format = formatter(totals.map((total) => total && total / size));
  const apart = runs.filter((run, i) => totals[i] && medians[i] && !stack(run).atLeast && Math.abs(totals[i] / medians[i] - 1) > 0.02);
  const why = apart.length ? ` In ${plural(apart.length, "row")} they add up to another time than the median of all steps, which the line marks: they are of one step, and the mean over ranks.` : "";
  const rows = stackedRows(runs, (run) => [{ measured: stack(run) }], { size, format, columns: [unit] });
  const median = (run) => (x, y, height) => [shape("line", { x1: x(run.step_seconds.median / size), x2: x(run.step_seconds.median / size), y1: y - 1, y2: y + height + 1, class: "whisker" }, shape("title", {}, `median step ${format(run.step_seconds.median / size)} ${unit}`))];
  for (const { run, lines: [line] } of rows.filter(({ run }) => apart.includes(run))) {
    const bar = line.mark;
    line.mark = (...place) => [...bar(...place), ...median(run)(...place)];
  }
  return figure({
    id: "step",
    title: "Step time in its parts",
    about: `One step, that of median length, mean over ranks: compute, communication that nothing hides, waiting for a neighbour in the pipeline.${why}`,
    missing: "Not measured in these runs. On CUDA --profile measures it.",
    key: [...names.map((name, i) => [i, STEP_PARTS[name]]), ...(apart.length ? [[() => shape("line", { x1: 11, x2: 11, y1: 0, y2: 12, class: "whisker" }), "median of all steps"]] : [])],
    draw: totals.some((total) => total !== null) &&
      ((width) => rowChart(width, { rows, columns: [unit], unit: `${unit} per step`, most: largest([...totals, ...apart.map((run) => run.step_seconds.median)]) / size })),
    table: () => ({
      head: ["run", ...names.map((name) => `${STEP_PARTS[name]}, ${unit}`), `sum, ${unit}`, `median of all steps, ${unit}`],
      rows: runs.map((run, i) => [run.name, ...[...names.map((name) => run.step_parts?.[name]), totals[i], medians[i]].map((seconds) => (isNumber(seconds) ? seconds / size : null))]),
    }),
  });
}

function parityChart(runs) {
  const judged = runs.filter(({ parity }) => parity.passed !== null);
  const failed = judged.filter((run) => !isGood(run));
  const byDifference = judged.filter(({ parity }) => isNumber(parity.max_rel_grad_diff)).sort((a, b) => b.parity.max_rel_grad_diff - a.parity.max_rel_grad_diff);
  const worst = byDifference.find((run) => !failed.length || failed.includes(run)) ?? byDifference[0];
  const badge = failed.length ? `✗ ${failed.length} of ${judged.length} FAILED` : `✓ ${judged.length === 1 ? "passed" : `all ${judged.length} passed`}`;
  return figure({
    id: "parity",
    title: "Parity with one process",
    about: "Largest relative difference of any parameter's gradient of step 1, ‖g − g_ref‖ / ‖g_ref‖, in float64 (DeepSpeed: float32). Passed: at most 1e-10 (1e-5). Rounding gives 1e-15, a forgotten all-reduce 0.01 to 1.",
    missing: "Not measured in these runs.",
    body: judged.length > 0 && element("p", { class: "verdict" },
      element("strong", { class: failed.length ? "badge failed" : "badge" }, badge),
      worst ? ` worst: ${scientific(worst.parity.max_rel_grad_diff)}, ${labelOf(worst)}` : null,
      judged.length < runs.length ? ` · ${runs.length - judged.length} not compared` : null),
    table: () => ({
      head: ["run", "gradient difference", "loss difference", "parity", "reference", "precision"],
      rows: runs.map(({ name, parity }) => [name, parity.max_rel_grad_diff, parity.max_abs_loss_diff, { true: "passed", false: "FAILED", null: null }[parity.passed], parity.reference, parity.dtype]),
    }),
    wide: true,
  });
}

/** Rows that train one model on the same tokens are one line, and how far they are apart is said. */
function lossChart(runs) {
  const curves = runs.map((run) => ({ run, ...unfolded(run.steps) })).filter(({ step }) => step.length > 1);
  const lookup = curves.map(({ step, loss }) => new Map(step.map((number, i) => [number, loss[i]])));
  const training = ({ run: { recipe, shape } }) => JSON.stringify([recipe.model, recipe.data, recipe.train?.seed, recipe.train?.learning_rate, recipe.train?.dtype, shape]);
  const families = [...Map.groupBy(curves.keys(), (i) => training(curves[i])).values()].map((members) => {
    const steps = unique(members.flatMap((i) => curves[i].step)).sort((a, b) => a - b);
    const losses = steps.map((step) => numbers(members.map((i) => lookup[i].get(step))));
    return { members, steps, mean: losses.map((each) => sum(each) / each.length), apart: losses.map((each) => most(each) - least(each)) };
  });
  const nameOf = ({ members }) => (members.length === 1 ? curves[members[0]].run.name : `${members.length} rows, the mean: ${few(unique(members.map((i) => curves[i].run.name)), "names")}`);
  const told = families.filter(({ members }) => members.length > 1).map(({ members, steps, apart }) => {
    const worst = most(apart);
    const rows = families.length === 1 ? `All ${members.length} rows` : `${members.length} rows`;
    return `${rows} train one model on the same tokens, and are one line: their losses ${worst ? `differ by at most ${scientific(worst)}, at step ${steps[apart.indexOf(worst)]}` : "are equal to the last digit"}.`;
  });
  const allSteps = unique(families.flatMap(({ steps }) => steps)).sort((a, b) => a - b);
  const tableSteps = allSteps.filter((_, i) => i % Math.ceil(allSteps.length / 100) === 0 || i === allSteps.length - 1);
  const drawn = families.slice(0, 2 * MOST_LINES);
  const mark = (i) => () => shape("path", { d: "M0 6H22", class: `curve s${i % 6}`, "stroke-dasharray": DASHES[Math.floor(i / 6 + i) % 6] });
  return figure({
    id: "loss",
    title: "Loss",
    about: `Training loss of each step. ${told.slice(0, 3).join(" ")}${drawn.length < families.length ? ` The first ${drawn.length} of ${families.length} are drawn.` : ""}`,
    key: drawn.map((family, i) => [mark(i), nameOf(family)]),
    draw: curves.length > 0 && ((width) => lineChart(width, {
      curves: drawn.map((family, i) => ({ x: family.steps, y: family.mean, series: i, dash: DASHES[Math.floor(i / 6 + i) % 6], title: nameOf(family) })),
      xUnit: "step", yUnit: "loss, nats per token",
    })),
    table: () => ({
      head: ["step", ...(families.length === 1 ? ["largest difference"] : []), ...curves.map(({ run }) => run.name)],
      rows: tableSteps.map((step) => [step, ...(families.length === 1 ? [families[0].apart[families[0].steps.indexOf(step)]] : []), ...lookup.map((losses) => losses.get(step) ?? null)]),
    }),
  });
}

function bubbleChart(runs) {
  const piped = runs.filter((run) => run.bubble !== null || run.bubble_ideal !== null);
  const values = piped.map((run) => [percent(run.bubble), percent(run.bubble_ideal)]);
  const format = formatter(values.flat());
  const rows = piped.map((run, i) => {
    const [measured, ideal] = values[i];
    const mark = (x, y, height) => [
      ...(measured === null ? [] : [block(x(0), y + 2, x(measured) - x(0), height - 4, 0, `measured ${format(measured)} %`)]),
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
    table: () => ({ head: ["run", "measured, %", "ideal, %"], rows: piped.map((run, i) => [run.name, ...values[i]]) }),
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
    table: () => ({
      head: ["run", "rank", "stage", "microbatch", "action", "start, ms", "end, ms"],
      rows: piped.flatMap(({ name, timeline }) => timeline.actions.slice(0, MOST_ACTIONS).map(([rank, stage, microbatch, kind, start, end]) =>
        [name, rank, stage, microbatch, actionOf(timeline.kinds[kind])[1], start * 1e3, end * 1e3])),
      note: tooMany ? `The first ${MOST_ACTIONS} actions of each run.` : null,
    }),
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
