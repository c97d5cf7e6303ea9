// Axes, marks and labels of charts.

const HEADLINE = "headline metric";
const SHAPES = ["circle", "square", "triangle", "diamond"];
const models = distinct(rows.map((row) => row.model));
const axis = { x: "trainable", y: HEADLINE };
const about = (row) => tasks[`${row.task}\n${row.model}`];
const measure = (row, name) => row.values[name === HEADLINE ? about(row).metric : name];
const direction = (row, name) => (name === HEADLINE ? about(row).better : axes[name]);
const brief = (value) => (Math.abs(value) >= 1e6 ? `${+(value / 1e6).toPrecision(3)} M`
  : Math.abs(value) >= 1e4 ? `${+(value / 1e3).toPrecision(3)} k` : `${+value.toPrecision(3)}`);

const ruler = element("canvas").getContext("2d");
ruler.font = "11.5px system-ui, sans-serif"; // as page.css has it for charts
const textWidth = (text) => ruler.measureText(text).width;

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
    const room = textWidth(text) + 9;
    const side = x + room <= box.edge ? "start" : x - room >= 0 ? "end" : "edge";
    const start = { start: x + 9, end: x - 9, edge: box.edge }[side];
    if (Math.abs(at - y) > 9) group.append(svg("line", { class: "leader", x1: x, y1: y, x2: start, y2: at }));
    group.append(svg("text", { x: start, y: at + 4, "text-anchor": side === "start" ? "start" : "end" }, text));
  }
}
