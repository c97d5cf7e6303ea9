// The three charts, and where they are on the page.

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
  const room = Math.min(0.5 * width, 16 + Math.max(...lines.map(({ row }) => textWidth(row.title))));
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
  const margin = Math.min(0.6 * width, 20 + Math.max(...names.map(textWidth)));
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
  picture.append(svg("text", { x: width - 12, y: height - 6, "text-anchor": "end" },
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
