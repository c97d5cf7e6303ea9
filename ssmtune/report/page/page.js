"use strict";
// Sorts and filters the table, and draws the charts of the rows that are left. Names only ever become text.

const { rows, axes, tasks } = JSON.parse(document.getElementById("data").textContent);
const table = document.querySelector("table");
const heads = [...table.tHead.rows[0].cells];
rows.forEach((row, i) => { row.line = table.tBodies[0].rows[i]; });
const chosen = { task: "", model: "", kind: "" };
const distinct = (values) => [...new Set(values)];

// --- elements -------------------------------------------------------------------------------------------------------

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function select(label, options, value, changed) {
  const box = element("select", { "aria-label": label },
    ...options.map(([key, text]) => element("option", { value: key }, text)));
  box.value = value;
  box.addEventListener("change", () => changed(box.value));
  return element("label", {}, label, box);
}

// --- the table ------------------------------------------------------------------------------------------------------

const cellValue = (cell) => (cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value));

function sortBy(column) {
  const head = heads[column];
  const rising = head.getAttribute("aria-sort") !== "ascending";
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const lines = rows.map((row) => row.line).sort((one, other) => {
    const [a, b] = [one, other].map((line) => cellValue(line.cells[column]));
    if (a === "" || b === "") return (a === "") - (b === ""); // empty cells last, whatever the order
    const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
    return rising ? order : -order;
  });
  table.tBodies[0].append(...lines);
}

heads.forEach((head, column) => {
  head.tabIndex = 0;
  head.addEventListener("click", () => sortBy(column));
  head.addEventListener("keydown", (event) => { if (event.key === "Enter") sortBy(column); });
  if (rows.every((row) => row.line.cells[column].dataset.value === undefined)) {
    [head, ...rows.map((row) => row.line.cells[column])].forEach((cell) => cell.classList.add("text"));
  }
});

const shown = () => rows.filter((row) => !row.line.hidden);

function filter() {
  for (const row of rows) row.line.hidden = Object.entries(chosen).some(([key, value]) => value && row[key] !== value);
  // a column that says nothing about the rows that are left is not shown
  const left = shown();
  heads.forEach((head, column) => {
    const texts = distinct(left.map((row) => row.line.cells[column].textContent));
    const constant = ["task", "model"].includes(head.textContent) && texts.length < 2;
    const idle = constant || texts.every((text) => text === "");
    [head, ...rows.map((row) => row.line.cells[column])].forEach((cell) => { cell.hidden = idle; });
  });
  draw();
}

for (const key of Object.keys(chosen)) {
  const values = distinct(rows.map((row) => row[key]));
  if (values.length > 1) {
    const options = [["", "all"], ...values.map((value) => [value, value])];
    document.getElementById("filters").append(select(key, options, "", (value) => { chosen[key] = value; filter(); }));
  }
}

// --- charts ---------------------------------------------------------------------------------------------------------

const HEADLINE = "headline metric";
const SHAPES = ["circle", "square", "triangle", "diamond"];
const models = distinct(rows.map((row) => row.model));
const axis = { x: "trainable", y: HEADLINE };
const about = (row) => tasks[`${row.task}\n${row.model}`];
const measure = (row, name) => row.values[name === HEADLINE ? about(row).metric : name];
const direction = (row, name) => (name === HEADLINE ? about(row).better : axes[name]);
const brief = (value) => (Math.abs(value) >= 1e6 ? `${+(value / 1e6).toPrecision(3)} M`
  : Math.abs(value) >= 1e4 ? `${+(value / 1e3).toPrecision(3)} k` : `${+value.toPrecision(3)}`);

// A linear scale, or a logarithmic one for positive values of many sizes.
function scale(values, from, to) {
  let low = Math.min(...values), high = Math.max(...values);
  const log = low > 0 && high / low > 30;
  const f = log ? Math.log10 : (value) => value;
  const room = (f(high) - f(low) || Math.abs(f(high)) || 1) * 0.07;
  const [start, end] = [f(low) - room, f(high) + room];
  const place = (value) => from + ((f(value) - start) / (end - start)) * (to - from);
  const ticks = [];
  if (log) {
    for (let power = Math.ceil(start); power <= end; power++) ticks.push(10 ** power);
  } else {
    const rough = (end - start) / 5, unit = 10 ** Math.floor(Math.log10(rough));
    const step = unit * [1, 2, 5, 10].find((factor) => unit * factor >= rough);
    for (let n = Math.ceil(start / step); n * step <= end; n++) ticks.push(+(n * step).toPrecision(12));
  }
  return { place, ticks };
}

const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

function marker(x, y, model) {
  const shape = SHAPES[models.indexOf(model) % SHAPES.length];
  if (shape === "circle") return svg("circle", { cx: x, cy: y, r: 4.5 });
  const corners = { square: [[-4, -4], [4, -4], [4, 4], [-4, 4]], triangle: [[0, -5.5], [5, 4], [-5, 4]],
    diamond: [[0, -6], [5, 0], [0, 6], [-5, 0]] }[shape];
  return svg("polygon", { points: corners.map(([dx, dy]) => `${x + dx},${y + dy}`).join(" ") });
}

const label = (row, together) => row.title + (together > 1 ? ` · ${row.model}` : "");
const series = (row, text, ...parts) =>
  svg("g", { class: `series c${row.colour}` }, svg("title", {}, text), ...parts);

// A figure with axes, to be filled: `room` is what the labels at its right need.
function frame(caption, width, height, xs, ys, names, room) {
  const box = { left: 52, right: width - room, top: 12, bottom: height - 40 };
  const x = scale(xs, box.left, box.right), y = scale(ys, box.bottom, box.top);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": caption });
  for (const tick of y.ticks) {
    const at = y.place(tick);
    picture.append(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: at, y2: at }),
      svg("text", { x: box.left - 6, y: at + 4, "text-anchor": "end" }, brief(tick)));
  }
  for (const tick of x.ticks) {
    const at = x.place(tick);
    picture.append(svg("line", { class: "grid", x1: at, x2: at, y1: box.top, y2: box.bottom }),
      svg("text", { x: at, y: box.bottom + 15, "text-anchor": "middle" }, brief(tick)));
  }
  picture.append(svg("text", { x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, names[0]),
    svg("text", { x: 12, y: (box.top + box.bottom) / 2, "text-anchor": "middle",
      transform: `rotate(-90 12 ${(box.top + box.bottom) / 2})` }, names[1]));
  return { figure: element("figure", {}, element("figcaption", {}, caption), picture), picture, x, y, box };
}

// Labels beside their points, the later ones moved down until none is on another.
function placeLabels(labels, box) {
  const line = 13;
  labels.sort((a, b) => a.y - b.y);
  let last = -Infinity;
  for (const item of labels) last = item.at = Math.max(item.y, last + line);
  let next = box.bottom + 4;
  for (const item of [...labels].reverse()) next = (item.at = Math.min(item.at, next)) - line;
  for (const { group, x, y, at, text } of labels) {
    const left = x + 9 + 6.2 * text.length > box.edge;
    const start = left ? x - 9 : x + 9;
    if (Math.abs(at - y) > 9) group.append(svg("line", { class: "leader", x1: x, y1: y, x2: start, y2: at }));
    group.append(svg("text", { x: start, y: at + 4, "text-anchor": left ? "end" : "start" }, text));
  }
}

// Those that no other beats on both axes.
function front(points) {
  const beats = (a, b) => a.better.every((sign, i) => sign * (a.at[i] - b.at[i]) >= 0)
    && a.better.some((sign, i) => sign * (a.at[i] - b.at[i]) > 0);
  return points.filter((point) => !points.some((other) => beats(other, point))).sort((a, b) => a.at[0] - b.at[0]);
}

function tradeOff(task, left, width) {
  const sign = { higher: 1, lower: -1 };
  const points = left.filter((row) => row.kind !== "base").map((row) => ({
    row, at: [measure(row, axis.x), measure(row, axis.y)],
    better: [sign[direction(row, axis.x)], sign[direction(row, axis.y)]],
  })).filter((point) => point.at.every(Number.isFinite));
  if (points.length === 0) return null;
  const spread = (row) => (axis.y === HEADLINE ? row.spread || 0 : 0);
  const ys = points.flatMap(({ row, at }) => [at[1] - spread(row), at[1] + spread(row)]);
  const names = [axis.x, axis.y].map((name) => {
    const shownAs = name === HEADLINE ? about(points[0].row).metric : name;
    return `${shownAs} (${direction(points[0].row, name)} is better)`;
  });
  const { figure, picture, x, y, box } = frame(task, width, 330, points.map(({ at }) => at[0]), ys, names, 16);
  const together = distinct(points.map(({ row }) => row.model));
  for (const model of together) {
    const best = front(points.filter(({ row }) => row.model === model));
    const steps = best.flatMap(({ at }, i) => (i ? [[at[0], best[i - 1].at[1]], at] : [at]));
    picture.append(svg("path", { class: "front", d: path(steps.map(([u, v]) => [x.place(u), y.place(v)])) }));
  }
  const labels = [];
  for (const { row, at } of points) {
    const [u, v] = [x.place(at[0]), y.place(at[1])];
    const bar = spread(row)
      ? [svg("line", { x1: u, x2: u, y1: y.place(at[1] - spread(row)), y2: y.place(at[1] + spread(row)) })] : [];
    const text = label(row, together.length);
    const group = series(row, `${text}: ${at.map(brief).join(", ")}`, ...bar, marker(u, v, row.model));
    picture.append(group);
    labels.push({ group, x: u, y: v - 7, text }); // above the front, which goes on to the right
  }
  placeLabels(labels, { ...box, edge: width });
  return figure;
}

function learning(caption, left, width) {
  const lines = left.map((row) => {
    const counts = new Map();
    for (const [step, loss] of row.curves.flat()) {
      if (loss !== null) counts.set(step, [...(counts.get(step) || []), loss]);
    }
    const points = [...counts].filter(([, losses]) => losses.length === row.curves.length).sort((a, b) => a[0] - b[0]);
    return { row, points };
  }).filter(({ points }) => points.length > 1);
  if (lines.length === 0) return null;
  const room = Math.min(0.36 * width, 12 + 6.2 * Math.max(...lines.map(({ row }) => row.title.length)));
  const { figure, picture, x, y, box } = frame(caption, width, 330,
    lines.flatMap(({ points }) => points.map(([step]) => step)), lines.flatMap(({ points }) => points.flatMap((p) => p[1])),
    ["optimizer steps", "dev loss, nats per token"], room);
  const labels = [];
  for (const { row, points } of lines) {
    const at = (choose) => points.map(([step, losses]) => [x.place(step), y.place(choose(losses))]);
    const mean = at((losses) => losses.reduce((a, b) => a + b) / losses.length);
    const band = [...at((losses) => Math.min(...losses)), ...at((losses) => Math.max(...losses)).reverse()];
    const group = series(row, row.title, svg("path", { class: "band", d: path(band) }), svg("path", { d: path(mean) }));
    picture.append(group);
    const [u, v] = mean[mean.length - 1];
    labels.push({ group, x: u, y: v, text: row.title });
  }
  placeLabels(labels, { ...box, edge: Infinity });
  return figure;
}

function differences(task, left, width) {
  const compared = left.filter((row) => row.difference !== null && Number.isFinite(row.difference.mean));
  if (compared.length === 0) return null;
  const together = distinct(compared.map((row) => row.model)).length;
  const names = compared.map((row) => label(row, together));
  const { reference, better, metric } = about(compared[0]);
  const margin = Math.min(0.45 * width, 16 + 6.2 * Math.max(...names.map((name) => name.length)));
  const height = 62 + 24 * compared.length;
  const x = scale([0, ...compared.flatMap(({ difference: { mean, interval, values } }) =>
    [mean - (interval || 0), mean + (interval || 0), ...values.filter(Number.isFinite)])], margin, width - 12);
  const caption = `${task}: against ${reference}`;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": caption });
  for (const tick of x.ticks) {
    picture.append(svg("line", { class: tick === 0 ? "zero" : "grid", x1: x.place(tick), x2: x.place(tick), y1: 6,
      y2: height - 40 }), svg("text", { x: x.place(tick), y: height - 25, "text-anchor": "middle" }, brief(tick)));
  }
  compared.forEach((row, i) => {
    const { mean, interval, values } = row.difference, y = 22 + 24 * i;
    const range = interval === null ? "" : ` ± ${brief(interval)}`;
    const bar = interval === null ? [] : [svg("line", { x1: x.place(mean - interval), x2: x.place(mean + interval), y1: y, y2: y })];
    const ticks = values.filter(Number.isFinite).map((value) =>
      svg("line", { class: "leader", x1: x.place(value), x2: x.place(value), y1: y - 5, y2: y + 5 }));
    picture.append(series(row, `${names[i]}: ${brief(mean)}${range}`, ...bar, ...ticks,
      marker(x.place(mean), y, row.model), svg("text", { x: margin - 8, y: y + 4, "text-anchor": "end" }, names[i])));
  });
  const side = better === "higher" ? "right" : "left";
  picture.append(svg("text", { x: (margin + width) / 2, y: height - 6, "text-anchor": "middle" },
    `${metric} (better to the ${side})`));
  return element("figure", {}, element("figcaption", {}, caption), picture);
}

function panels(title, note, controls, groups, drawing) {
  // Drawn at the width that they have on this screen, so that their text is never scaled.
  const grid = element("div", { class: "panels" });
  const section = element("section", {}, element("h2", {}, title), ...controls, element("p", { class: "note" }, note), grid);
  document.getElementById("charts").append(section);
  const columns = groups.length > 1 ? getComputedStyle(grid).gridTemplateColumns.split(" ").length : 1;
  const width = Math.min(Math.floor((grid.clientWidth - 16 * (columns - 1)) / columns), columns > 1 ? Infinity : 820) - 28;
  const figures = groups.map(([name, left]) => drawing(name, left, width)).filter(Boolean);
  grid.append(...figures);
  if (figures.length === 0 && controls.length === 0) section.remove();
}

function grouped(left, key) {
  const groups = new Map();
  for (const row of left) groups.set(key(row), [...(groups.get(key(row)) || []), row]);
  return [...groups];
}

function draw() {
  document.getElementById("charts").replaceChildren();
  const left = shown(), tasksLeft = grouped(left, (row) => row.task);
  const options = (first) => [...first, ...Object.keys(axes)].map((name) => [name, name]);
  const choose = (side) => select(side, options([HEADLINE]), axis[side], (value) => { axis[side] = value; draw(); });
  panels("Trade-offs", "Each method's mean, bars one standard deviation over the seeds; on the dashed line, the Pareto "
    + "front, no method is beaten on both axes." + (models.length > 1 ? " A front and a marker for each model." : ""),
  [element("div", { class: "axes" }, choose("x"), choose("y"))], tasksLeft, tradeOff);
  panels("Learning curves", "Dev loss per target token, the mean over the seeds with their range.", [],
    grouped(left, (row) => (models.length > 1 ? `${row.task}: ${row.model}` : row.task)), learning);
  panels("Paired differences", "The mean over the seeds of the difference to one method with the same seed, its 95 % "
    + "interval, and every seed (ticks).", [], tasksLeft, differences);
}

let resized;
window.addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(draw, 150); });
filter();
