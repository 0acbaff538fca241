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
