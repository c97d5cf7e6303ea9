// Sorts and filters the table; draw() then draws the charts of the rows that are left.

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
