// Nothing here is needed to read the page: it sorts and filters the ledger and folds the contents.
"use strict";
if (window.matchMedia("(max-width: 48rem)").matches) {
  document.querySelector("details.contents").open = false;
}
function key(cell) {
  const raw = cell.dataset.v ?? cell.textContent.trim();
  const number = Number(raw.replaceAll(",", "").replace("\u2212", "-"));
  return raw !== "" && Number.isFinite(number) ? number : raw.toLowerCase();
}
function compare(a, b) {
  if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
  return typeof a === "number" ? -1 : 1;
}
for (const table of document.querySelectorAll("table.ledger")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const sort = () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const rows = [...body.rows];
      rows.sort((a, b) => sign * compare(key(a.cells[column]), key(b.cells[column])));
      body.append(...rows);
    };
    head.classList.add("sortable");
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); }
    });
  });
  const label = document.createElement("label");
  const input = document.createElement("input");
  const count = document.createElement("span");
  label.className = "filter";
  input.type = "search";
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = ` ${shown} of ${body.rows.length} rows`;
  });
  label.append("Show rows with ", input, count);
  table.closest(".scroll").before(label);
}
