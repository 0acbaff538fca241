// ---- charts: frames and axes ---------------------------------------------------------------------------------------

const OPEN = new Set(); // charts whose numbers are open, and stay so when they are drawn again

/** A figure: what it shows, a legend, the drawing, and the same numbers as a table.
 *
 * table(): {head, rows, note}, of texts and numbers (null: not measured), asked for when it is opened. Without `draw` it says
 * that nothing was measured; a `body` is shown in place of a drawing.
 */
function figure({ id, title, about, missing, key, draw, body, table, wide, name }) {
  const frame = element("figure", { id: `chart-${id}`, class: wide && (draw || body) ? "wide" : null },
    element("figcaption", {}, element("h3", {}, title), element("p", {}, about)));
  if (!draw && !body) {
    frame.append(element("p", { class: "none" }, missing ?? "Not measured in these runs."));
    return frame;
  }
  if (key) frame.append(element("ul", { class: "key" }, ...key.map(([mark, label]) => element("li", {}, sample(mark), label))));
  frame.append(body || element("div", { class: "drawing" }));
  frame.redraw = (width) => {
    if (body) return;
    const box = $(".drawing", frame);
    const drawing = draw(Math.max(240, Math.floor(width || 560)));
    const title_ = shape("title", { id: `title-${id}` }, name ?? title);
    const told = shape("desc", { id: `desc-${id}` }, `${about} The numbers are in the table below the chart.`);
    drawing.prepend(title_, told);
    drawing.setAttribute("role", "img");
    drawing.setAttribute("aria-labelledby", `title-${id} desc-${id}`);
    box.replaceChildren(drawing);
  };
  const numbers_ = element("details", { class: "numbers", open: OPEN.has(id) }, element("summary", {}, "Numbers"));
  const fill = () => numbers_.append(dataTable(`${title}: numbers`, table()));
  numbers_.addEventListener("toggle", fill, { once: true }); // one that is open from the start tells so, too
  numbers_.addEventListener("toggle", () => (numbers_.open ? OPEN.add(id) : OPEN.delete(id)));
  frame.append(numbers_);
  return frame;
}

/** Puts charts into `grid`, and those without anything to draw into `rest`. */
function place(charts, grid, rest) {
  const drawn = charts.filter((chart) => chart.redraw);
  const halves = drawn.filter((chart) => !chart.classList.contains("wide"));
  if (halves.length % 2) halves.at(-1).classList.add("wide"); // no gap beside the last
  grid.replaceChildren(...drawn);
  rest?.replaceChildren(...charts.filter((chart) => !chart.redraw));
  redraw(drawn);
}

/** All widths are read before the first is drawn: else the browser lays the page out once for each. */
function redraw(figures) {
  const widths = figures.map((each) => $(".drawing", each)?.clientWidth);
  figures.forEach((each, i) => each.redraw?.(widths[i]));
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
  else box.append(block(0, 1, 22, 10, mark));
  return box;
}

/** A bar in colour `series`. The parts of a bar come in the order of the legend, with gaps between them. */
function block(x, y, width, height, series, title) {
  return shape("rect", { x, y, width: Math.max(0, width), height, class: `f${series % 6}` }, title ? shape("title", {}, title) : null);
}

/** Round numbers from 0 to at least `most`. */
function ticksTo(most, wanted) {
  const rough = (most || 1) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
  return Array.from({ length: Math.ceil((most || 1) / step - 1e-9) + 1 }, (_, i) => i * step);
}

/** A row per run: names to the left, marks on a shared axis, numbers to the right.
 *
 * rows: {run, lines: [{mark(x, y, height) -> nodes, or null, cells: [text], tag, why}]}; columns: heads of the cells.
 * On a narrow screen the name is above its marks.
 */
function rowChart(width, { rows, columns, unit, most, lineHeight = 20 }) {
  const severalGroups = !state.sort && new Set(rows.map(({ run }) => run.group)).size > 1;
  const longest = Math.max(...rows.map(({ run }) => labelOf(run).length));
  const narrow = width < 460 || longest * 6.6 + 12 > width * 0.4; // then a name is above its bar, in full
  const nameWidth = narrow ? 0 : longest * 6.6 + 12;
  const tagWidth = Math.max(...rows.flatMap(({ lines }) => lines.map(({ tag }) => (tag ? tag.length * 6.2 + 12 : 0))));
  const cellWidth = Math.max(46, ...columns.map((head) => head.length * 6.2 + 8));
  const shownColumns = width < 460 ? columns.slice(0, 1) : columns;
  const left = nameWidth + tagWidth;
  const right = width - shownColumns.length * cellWidth;
  const ticks = ticksTo(most, width < 460 ? 3 : 5);
  const x = (value) => left + Math.max(0, Math.min(1, value / ticks.at(-1))) * (right - left - 14);
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
    const label = labelOf(run);
    body.append(shape("text", { x: 0, y: narrow ? y + 11 : y + lineHeight / 2 + 4 }, clipped(label, narrow ? width : nameWidth), shape("title", {}, label)));
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
    axis.append(shape("text", { x: x(tick), y: y + 14, class: "soft middle" }, axisFormat.format(tick)));
  }
  axis.append(shape("text", { x: (left + right) / 2, y: y + 31, class: "soft middle" }, unit));
  shownColumns.forEach((head, i) => axis.append(shape("text", { x: right + (i + 1) * cellWidth, y: 12, class: "soft end" }, head)));
  return shape("svg", { width, height: y + 38, viewBox: `0 0 ${width} ${y + 38}` }, axis, body);
}

function clipped(text, width) {
  const most = Math.max(4, Math.floor(width / 6.4));
  return text.length <= most ? text : `${text.slice(0, most - 1)}…`;
}

/** A run's name; where one name is drawn several times without the heads of groups, with what tells them apart. */
function labelOf(run) {
  const sameName = view.chosen.filter(({ name }) => name === run.name);
  if (!state.sort || sameName.length < 2) return run.name;
  const telling = [(each) => `${each.world_size} devices`, (each) => each.cluster, (each) => each.comparison, (each) => day(each.environment.time_utc)];
  return [run.name, ...telling.filter((of) => new Set(sameName.map(of)).size > 1).map((of) => of(run))].join(" · ");
}

/** Curves over a shared x.
 *
 * curves: {x, y, series, dash, title, line: class of the path, marks: [{x, y, tip, bad, label}]}. xTicks: [[value, label]],
 * in place of round numbers; scale: {x, y}, Math.log2 where an axis is logarithmic; xAtLeast: how far the axis reaches;
 * extra({x, y, ...}): more to draw below the curves.
 */
function lineChart(width, { curves, xUnit, yUnit, xTicks, fromZero, xFromZero, xAtLeast, scale = {}, extra }) {
  const height = Math.round(Math.min(340, Math.max(220, width * 0.4)));
  const plain = (value) => value;
  const [xOf, yOf] = [scale.x ?? plain, scale.y ?? plain];
  const all = (axis) => curves.flatMap((curve) => [...curve[axis], ...(curve.marks ?? []).map((mark) => mark[axis])]);
  const [xs, ys] = [all("x"), all("y")];
  const xRound = xFromZero && niceTicks(0, Math.max(most(xs), xAtLeast ?? 0));
  const [x0, x1] = xRound ? [0, xRound.at(-1)] : [least(xs), most(xs)];
  const rounds = (ticks) => ticks.map((tick) => [tick, axisFormat.format(tick)]);
  const yTicks = scale.y ? rounds(doublings(least(ys), most(ys))) : rounds(niceTicks(fromZero ? 0 : least(ys), most(ys)));
  const [left, right, top, bottom] = [Math.max(58, 32 + 6.3 * most(yTicks.map(([, label]) => label.length))), width - 16, 16, height - 42];
  const xTicks_ = xTicks ?? rounds(xRound || niceTicks(x0, x1).filter((tick) => tick >= x0 && tick <= x1 && Number.isInteger(tick)));
  const between = (of, value, from, to) => (of(value) - of(from)) / (of(to) - of(from) || 1);
  const x = (value) => (x0 === x1 ? (left + right) / 2 : left + between(xOf, value, x0, x1) * (right - left));
  const y = (value) => bottom - between(yOf, value, yTicks[0][0], yTicks.at(-1)[0]) * (bottom - top);
  const drawing = shape("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
  for (const [tick, label] of yTicks) {
    drawing.append(shape("line", { x1: left, x2: right, y1: y(tick), y2: y(tick), class: "gridline" }));
    drawing.append(shape("text", { x: left - 8, y: y(tick) + 4, class: "soft end" }, label));
  }
  let free = -Infinity; // labels that would run into each other are left out
  for (const [tick, label] of xTicks_) {
    const half = label.length * 3.2;
    const at = Math.min(Math.max(x(tick), left - 20 + half), right + 14 - half);
    if (at - half < free) continue;
    free = at + half + 8;
    drawing.append(shape("text", { x: at, y: bottom + 17, class: "soft middle" }, label));
  }
  drawing.append(shape("text", { x: (left + right) / 2, y: height - 6, class: "soft middle" }, xUnit));
  drawing.append(shape("text", { x: 12, y: (top + bottom) / 2, class: "soft middle", transform: `rotate(-90 12 ${(top + bottom) / 2})` }, yUnit));
  if (extra) drawing.append(...extra({ x, y, left, right, top, bottom }));
  for (const { x: at, y: values, series, dash, title, marks = [], line = "curve" } of curves) {
    const path = at.map((value, i) => `${i ? "L" : "M"}${x(value).toFixed(1)} ${y(values[i]).toFixed(1)}`).join("");
    drawing.append(shape("path", { d: path, class: `${line} s${series % 6}`, "stroke-dasharray": dash }, shape("title", {}, title)));
    for (const mark of marks) drawing.append(pointMark(x(mark.x), y(mark.y), series, mark.tip));
  }
  for (const mark of curves.flatMap(({ marks = [] }) => marks).filter(({ bad }) => bad)) {
    drawing.append(shape("circle", { cx: x(mark.x), cy: y(mark.y), r: 9, class: "alarm" }));
    if (mark.label) drawing.append(shape("text", { x: x(mark.x), y: y(mark.y) + 24, class: "alarm-label middle" }, mark.label));
  }
  return drawing;
}

const least = (values) => values.reduce((low, value) => Math.min(low, value), Infinity);
const most = (values) => values.reduce((high, value) => Math.max(high, value), -Infinity);

/** Powers of two times a round number, around these. */
function doublings(low, high) {
  const first = 10 ** Math.floor(Math.log10(low || 1));
  const ticks = [first * Math.floor(low / first)];
  while (ticks.at(-1) < high) ticks.push(ticks.at(-1) * 2);
  return ticks.length > 1 ? ticks : [...ticks, ticks[0] * 2];
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
