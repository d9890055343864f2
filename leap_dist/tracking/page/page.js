"use strict";

// A table is sorted by the column whose title is clicked. What moves together is a row, or a run's whole tbody.
function itemsOf(table) {
  return table.tBodies.length === 1 && !table.classList.contains("runs") ? [...table.tBodies[0].rows] : [...table.tBodies];
}

function valueOf(item, column) {
  const row = item.rows ? item.rows[0] : item;
  const cell = row.cells[column];
  if (cell.dataset.value === undefined) return cell.textContent.trim();
  return cell.dataset.value === "" ? null : Number(cell.dataset.value);
}

function compare(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null); // what is missing comes last, either way
  const order = typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
  return sign * order;
}

function sortBy(header) {
  const table = header.closest("table");
  const column = header.cellIndex;
  const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
  const items = itemsOf(table);
  const parent = items.length ? items[0].parentNode : table;
  const keyed = items.map((item) => [valueOf(item, column), item]);
  keyed.sort((a, b) => compare(a[0], b[0], sign)); // stable: equal rows keep their order
  for (const [, item] of keyed) parent.append(item);
}

// Runs are shown if the text is in their row, and every choice is theirs.
function filterRuns(form) {
  const table = document.querySelector("table.runs");
  const text = form.elements.text.value.trim().toLowerCase();
  const chosen = [...form.querySelectorAll("select")].filter((select) => select.value);
  let shown = 0;
  for (const run of table.tBodies) {
    const choices = JSON.parse(run.dataset.choices);
    const fits =
      run.rows[0].textContent.toLowerCase().includes(text) &&
      (!form.elements.front.checked || run.classList.contains("front")) &&
      chosen.every((select) => choices[select.dataset.choice] === select.value);
    run.hidden = !fits;
    shown += fits;
  }
  form.querySelector("output").textContent = `${shown} of ${table.tBodies.length} runs`;
}

// A run's details are made when they are first looked at.
function toggle(run) {
  const details = run.rows[1];
  const template = details.querySelector("template");
  if (template) {
    const inside = document.createElement("div");
    inside.className = "inside";
    inside.append(template.content);
    template.replaceWith(inside);
  }
  details.hidden = !details.hidden;
  run.querySelector(".open").setAttribute("aria-expanded", String(!details.hidden));
}

for (const header of document.querySelectorAll("table.sortable thead th")) {
  header.querySelector("button").addEventListener("click", () => sortBy(header));
}
for (const run of document.querySelectorAll("table.runs tbody")) {
  run.rows[0].addEventListener("click", () => toggle(run));
}
const form = document.querySelector("form.filters");
if (form) {
  form.addEventListener("input", () => filterRuns(form));
  form.addEventListener("submit", (event) => event.preventDefault());
}
for (const search of document.querySelectorAll("input[data-filter]")) {
  search.addEventListener("input", () => {
    const text = search.value.trim().toLowerCase();
    for (const row of document.getElementById(search.dataset.filter).querySelectorAll("tbody tr")) {
      row.hidden = !row.cells[0].textContent.toLowerCase().includes(text);
    }
  });
}
