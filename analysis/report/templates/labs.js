// Things to try beside a figure. Every number is read from the table that stands below: without this
// script the figure and the table say the same.
const say = (value, digits = 3) => Number(value.toPrecision(digits)).toLocaleString("en-US",
  {maximumSignificantDigits: digits});
function rowsOf(id) {
  const table = document.querySelector(`#${id} table`);
  if (!table) return [];
  const names = [...table.tHead.rows[0].cells].map((cell) =>
    cell.textContent.replaceAll("\u00a0", " "));
  const rows = [...table.tBodies[0].rows].map((row) => Object.fromEntries([...row.cells].map(
    (cell, i) => [names[i], cell.dataset.v ?? cell.textContent.replaceAll(",", "")])));
  return Object.assign(rows, {names});  // an object would put names that are numbers first
}
function slider(box, words, values, start, text = String) {
  const label = document.createElement("label"), input = document.createElement("input");
  const shown = document.createElement("output");
  Object.assign(input, {type: "range", min: 0, max: values.length - 1, step: 1, value: start});
  label.append(`${words} `, input, shown);
  box.append(label);
  return () => { shown.textContent = text(values[input.value]); return values[input.value]; };
}
function choice(box, words, values) {
  const label = document.createElement("label"), select = document.createElement("select");
  select.append(...values.map((value) => new Option(value, value)));
  label.append(`${words} `, select);
  box.append(label);
  return () => select.value;
}
const LABS = {
  // The exponent of a chunk, the end of a type, and the error that was measured there.
  chunk(box, rows) {
    const decays = rows.names.slice(1);
    const form = slider(box, "chunk, steps", rows, rows.findIndex((row) => row["chunk, steps"] === "32"),
      (row) => row["chunk, steps"]);
    const decay = slider(box, "log-decay, nats a step", decays, decays.indexOf("1"));
    return () => {
      const row = form(), chunk = Number(row["chunk, steps"]), x = decay();
      const exponent = chunk * Number(x), error = row[x];
      const ends = [["float16", 11.09], ["float32 and bfloat16", 88.72]].map(([name, limit]) =>
        `${name} (${limit}): ${exponent > limit ? "overflows" : "holds"}`);
      return `Exponent ${say(exponent)}. ${ends.join("; ")}. Measured in float32, worst of value and ` +
        `gradients: ${Number.isFinite(Number(error)) ? `off by ${say(100 * error)} %` : error}.`;
    };
  },
  // The peak of a step on the straight line between the sizes of the table.
  memory(box, rows) {
    const some = rows.filter((row) => row.layers === "MMMM" && row.autocast === "bf16" &&
      row.checkpointing === "no");
    const form = choice(box, "scan", [...new Set(some.map((row) => row.form))]);
    const batch = slider(box, "batch", [1, 2, 4, 8, 16, 32, 64], 4);
    const context = slider(box, "context, bytes", [256, 512, 1024, 2048, 4096, 8192], 2);
    return () => {
      const points = some.filter((row) => row.form === form()).map((row) =>
        [row.batch * row.context, Number(row["peak, closed form, MB"])]).sort((a, b) => a[0] - b[0]);
      const tokens = batch() * context();
      const at = Math.max(1, Math.min(points.length - 1, points.findIndex(([t]) => t >= tokens)));
      const [[t0, p0], [t1, p1]] = [points[at - 1], points[at]];
      const peak = Math.max(0, p0 + (p1 - p0) * (tokens - t0) / (t1 - t0)) / 1000;
      const outside = tokens < points[0][0] || tokens > points[points.length - 1][0];
      return `About ${say(peak, 2)} GB at ${tokens.toLocaleString("en-US")} bytes a step` +
        `${outside ? ", beyond the sizes that were measured" : ""}: ` + [24, 40, 80, 141].map((gb) =>
          `${gb} GB ${peak < 0.95 * gb ? "fits" : "does not fit"}`).join(", ") + ".";
    };
  },
  // Two systems of one job: nothing is divided across jobs.
  steps(box, rows) {
    const job = choice(box, "step of", [...new Set(rows.map((row) => row.job))]);
    const names = [...new Set(rows.map((row) => row.system))];
    const one = choice(box, "pattern", names);
    const other = choice(box, "against", [...names.slice(1), names[0]]);
    return () => {
      const find = (name) => rows.find((row) => row.job === job() && row.system === name);
      const [a, b] = [find(one()), find(other())];
      if (!a || !b) return "That window is as long as the context, or was not timed, at this length.";
      return ["step, ms", "J/MB"].map((cost) => `${cost}: ${say(Number(a[cost]))} against ` +
        `${say(Number(b[cost]))}, ${say(a[cost] / b[cost])} times`).join("; ") +
        `. A joule trains ${say(1000 / a["J/MB"])} kB against ${say(1000 / b["J/MB"])}.`;
    };
  },
  // What a point of the figure is, under the pointer.
  points(box, rows, figure) {
    let words = "Point at a system to read its row.";
    for (const point of figure.querySelectorAll('[id*="-point-"]')) {
      const row = rows.find((r) => Object.values(r)[0] === point.id.split("-point-")[1]);
      if (!row) continue;
      const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
      title.textContent = rows.names.slice(0, 6).map((name) => [name, row[name]]).map(([name, value]) =>
        `${name}: ${Number.isFinite(Number(value)) && value !== "" ? say(Number(value), 4) : value}`)
        .join("; ");
      point.prepend(title);
      point.addEventListener("pointerenter", () => {
        words = title.textContent;
        box.dispatchEvent(new Event("input"));
      });
    }
    return () => words;
  },
};
for (const box of document.querySelectorAll(".labs")) {
  const rows = rowsOf(box.dataset.table);
  const figure = document.getElementById(box.dataset.figure);
  if (!rows.length || (box.dataset.lab === "points" && !figure)) continue;
  const result = document.createElement("p");
  const text = LABS[box.dataset.lab](box, rows, figure);
  const show = () => { result.textContent = text(); };
  result.setAttribute("role", "status");
  box.append(result);
  box.addEventListener("input", show);
  show();
}
