// Tables that are sorted by the button in each head, and the results' filter by text and family.
"use strict";

const UNITS = {
  ns: 1e-9, "µs": 1e-6, ms: 1e-3, s: 1, B: 1, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, TiB: 2 ** 40,
  k: 2 ** 10, M: 2 ** 20, "MFLOP/s": 1e6, "GFLOP/s": 1e9, "TFLOP/s": 1e12, mJ: 1e-3, "µJ": 1e-6,
};

// The number that a cell begins with, in one unit; null where it begins with none.
function numberIn(text) {
  const found = /^(-?[\d.]+(?:e-?\d+)?)\s*([^\s[,(]*)/.exec(text);
  return found ? Number(found[1]) * (UNITS[found[2]] ?? 1) : null;
}

function before(one, other) {
  const [a, b] = [numberIn(one), numberIn(other)];
  if (a !== null && b !== null) return a - b;
  if (a !== null || b !== null) return a !== null ? -1 : 1; // what has no number comes last
  return one.localeCompare(other);
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = made("button", { type: "button", class: "sort" }, head.textContent);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].map((row) => [row.cells[column].textContent.trim(), row]);
      const some = (text) => text !== "-" && text !== "";
      rows.sort(([a], [b]) => some(b) - some(a) || (down ? before(b, a) : before(a, b)));
      table.tBodies[0].append(...rows.map(([, row]) => row));
      table.classList.add("sorted");
    });
    head.replaceChildren(button);
  });
}

// Under the pointer a row of results tells its command, which stands below its table behind "# name at length".
function commanded(table) {
  const pre = document.querySelectorAll("pre.commands")[table.dataset.panel], command = new Map();
  for (const entry of pre.textContent.split(/\n?(?=^# )/m)) {
    const [what, ...lines] = entry.split("\n");
    command.set(what.replace(/^# /, ""), lines.join("\n"));
  }
  for (const row of table.tBodies[0].rows) row.title = command.get(`${row.cells[1].textContent} at ${row.cells[0].textContent}`) ?? "";
}

function filterable(data) {
  const family = new Map(data.plugins.map(([name, of]) => [name, of]));
  const tables = [...document.querySelectorAll("table[data-panel]")];
  const text = made("input", { type: "search", id: "filter-text", placeholder: "a variant, a length …", oninput: apply });
  const of = made("select", { id: "filter-family", onchange: apply }, made("option", { value: "" }, "all families"));
  for (const name of new Set(family.values())) if (name) of.append(made("option", { value: name }, name));
  const count = made("output", { id: "filter-count", for: "filter-text filter-family" });
  const bar = document.getElementById("filter");
  bar.append(made("label", {}, "Filter ", text), made("label", {}, "Family ", of), count);
  bar.hidden = false;
  const rows = tables.flatMap((table) => {
    const column = [...table.tHead.rows[0].cells].findIndex((head) => head.textContent.trim() === "variant");
    return [...table.tBodies[0].rows].map((row) => {
      const name = row.cells[column].textContent;
      return { row, family: family.get(name), text: row.textContent.toLowerCase(), words: [...row.cells].map((cell) => cell.textContent.toLowerCase()) };
    });
  });
  function apply() {
    const asked = text.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const each of rows) {
      // A word that is all of a cell ("8k", "int8") asks for that cell alone where there is one.
      const fits = asked.every((word) => (whole.has(word) ? each.words.includes(word) : each.text.includes(word)));
      each.row.hidden = !(fits && (!of.value || each.family === of.value));
      shown += !each.row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  }
  const whole = new Set(rows.flatMap((each) => each.words));
  apply();
}

addEventListener("DOMContentLoaded", () => {
  filterable(JSON.parse(document.getElementById("data").textContent));
  document.querySelectorAll("table[data-panel]").forEach(commanded);
  document.querySelectorAll("main table").forEach(sortable);
});
