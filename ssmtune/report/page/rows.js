"use strict";
// The rows of the table, what is chosen of them, and how elements are made. Names only ever become text.

const { rows, axes, tasks } = JSON.parse(document.getElementById("data").textContent);
const table = document.querySelector("table");
const heads = [...table.tHead.rows[0].cells];
rows.forEach((row, i) => { row.line = table.tBodies[0].rows[i]; });
const chosen = { task: "", model: "", kind: "" };
const distinct = (values) => [...new Set(values)];

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
