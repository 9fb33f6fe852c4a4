// Sorts and filters the ledger; the state of the filters is in the address.
function key(cell) {
  const raw = cell.dataset.v ?? cell.textContent.trim();
  const number = Number(raw.replaceAll(",", "").replace("\u2212", "-"));
  return raw !== "" && Number.isFinite(number) ? number : raw.toLowerCase();
}
function compare(a, b) {
  if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
  return typeof a === "number" ? -1 : 1;
}
// A claim is a table body of its own; in other tables a row is one.
for (const table of document.querySelectorAll("table.ledger")) {
  const claims = table.classList.contains("claims");
  const items = () => [...(claims ? table.tBodies : table.tBodies[0].rows)];
  const cells = (item) => (claims ? item.rows[0] : item).cells;
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const sort = () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const sorted = items();
      sorted.sort((a, b) => sign * compare(key(cells(a)[column]), key(cells(b)[column])));
      (claims ? table : table.tBodies[0]).append(...sorted);
    };
    head.classList.add("sortable");
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); }
    });
  });
  const bar = document.createElement("div");
  const input = document.createElement("input");
  const count = document.createElement("span");
  const selects = new Map();
  const show = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const item of items()) {
      const text = item.textContent.toLowerCase();
      item.hidden = !words.every((word) => text.includes(word)) ||
        [...selects].some(([name, select]) => select.value && select.value !== item.dataset[name]);
      shown += item.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${items().length} rows`;
  };
  // "#show?verdict=holds&words=memory" is the state of the filters.
  const keep = () => {
    const state = new URLSearchParams();
    for (const [name, select] of selects) if (select.value) state.set(name, select.value);
    if (input.value) state.set("words", input.value);
    history.replaceState(null, "", `#show?${state}`);
  };
  const restore = () => {
    if (!location.hash.startsWith("#show?")) return;
    const state = new URLSearchParams(location.hash.slice(6));
    for (const [name, select] of selects) {
      const value = state.get(name) ?? "";
      select.value = [...select.options].some((o) => o.value === value) ? value : "";
    }
    input.value = state.get("words") ?? "";
    show();
  };
  const add = (words, control, event) => {
    const label = document.createElement("label");
    label.append(words, control);
    control.addEventListener(event, () => { show(); keep(); });
    bar.append(label);
  };
  bar.className = "filter";
  input.type = "search";
  count.setAttribute("role", "status");
  add("Show rows with ", input, "input");
  for (const name of claims ? ["importance", "verdict", "kind", "document"] : []) {
    const values = [...new Set(items().map((item) => item.dataset[name]).filter(Boolean))];
    if (values.length < (name === "importance" ? 1 : 2)) continue;
    const select = document.createElement("select");
    select.append(new Option("all", ""), ...values.map((value) => new Option(value, value)));
    selects.set(name, select);
    add(`${name} `, select, "change");
  }
  bar.append(count);
  (table.closest(".scroll") ?? table).before(bar);
  restore();
  window.addEventListener("hashchange", restore);
}
// A link from elsewhere to a claim that a filter hides would lead nowhere.
window.addEventListener("hashchange", () => {
  const target = document.querySelector("tbody:target");
  if (target) target.hidden = false;
});
