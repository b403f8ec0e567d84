"use strict";

const byId = (id) => document.getElementById(id);

// A click on a head of the table sorts by that column, a second one the other way round; empty cells stay last.
function makeSortable(table) {
  const body = table.tBodies[0];
  const order = new Intl.Collator("en", { numeric: true });
  const valueOf = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const compare = (one, other) => {
    const difference = Number(one) - Number(other);
    return Number.isNaN(difference) ? order.compare(one, other) : difference;
  };
  const sort = (head, column) => {
    const sign = head.ariaSort === "ascending" ? -1 : 1;
    for (const each of table.tHead.rows[0].cells) each.ariaSort = "none";
    head.ariaSort = sign > 0 ? "ascending" : "descending";
    const rows = [...body.rows].map((row) => [valueOf(row, column), row]);
    rows.sort(([one], [other]) => (one && other ? sign * compare(one, other) : !one - !other));
    body.append(...rows.map(([, row]) => row));
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(head, column));
    head.append(button);
    head.ariaSort = column === 0 ? "ascending" : "none";
  });
}

// Returns what shows a row that the filters have hidden.
function makeFilterable(table, form) {
  const rows = [...table.tBodies[0].rows].map((row) => [row, row.textContent.toLowerCase()]);
  const apply = () => {
    const text = byId("filter").value.trim().toLowerCase();
    const outcome = byId("outcome").value;
    for (const [row, content] of rows) {
      const matches = ["", row.dataset.outcome, row.dataset.code].includes(outcome);
      row.hidden = !(matches && content.includes(text));
    }
    byId("shown").textContent = `${rows.filter(([row]) => !row.hidden).length} of ${rows.length} shown`;
  };
  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  apply();
  return (target) => {
    if (target.closest("tr")?.hidden) {
      form.reset();
      apply();
    }
  };
}

// Links between the table and the graph show what they lead to in the middle, whatever the filters say.
function followLinks(reveal) {
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (!link) return;
    const target = byId(link.getAttribute("href").slice(1));
    reveal(target);
    requestAnimationFrame(() => target.scrollIntoView({ block: "center" }));
  });
}

// Marks the nodes with the text; Enter goes from one to the next.
function makeSearchable(canvas, input, output) {
  const rows = [...canvas.querySelectorAll(".row")].map((row) => [row, row.textContent.toLowerCase()]);
  let hits = [];
  let current = 0;
  const show = () => {
    hits.forEach((row, number) => row.classList.toggle("current", number === current));
    hits[current]?.scrollIntoView({ block: "center" });
    output.textContent = hits.length ? `${current + 1} of ${hits.length}` : input.value ? "not found" : "";
  };
  input.addEventListener("input", () => {
    const text = input.value.trim().toLowerCase();
    for (const [row] of rows) row.classList.remove("hit", "current");
    hits = text ? rows.filter(([, content]) => content.includes(text)).map(([row]) => row) : [];
    for (const row of hits) row.classList.add("hit");
    current = 0;
    show();
  });
  input.form.addEventListener("submit", (event) => {
    event.preventDefault();
    current = (current + 1) % Math.max(hits.length, 1);
    show();
  });
}

// Buttons, + and -, and the wheel with Ctrl; what is under the pointer stays there.
function makeZoomable(canvas) {
  const picture = canvas.querySelector("svg");
  const [width, height] = [picture.width.baseVal.value, picture.height.baseVal.value];
  let scale = 1;
  const zoom = (wanted, x = 0, y = 0) => {
    const next = Math.min(Math.max(wanted, 0.1), 8);
    const [left, top] = [canvas.scrollLeft + x, canvas.scrollTop + y].map((place) => (place * next) / scale);
    scale = next;
    picture.setAttribute("width", width * scale);
    picture.setAttribute("height", height * scale);
    canvas.scrollTo(left - x, top - y);
  };
  const keys = { "+": 1.25, "=": 1.25, "-": 0.8 };
  byId("in").addEventListener("click", () => zoom(1.25 * scale));
  byId("out").addEventListener("click", () => zoom(0.8 * scale));
  byId("fit").addEventListener("click", () => zoom(canvas.clientWidth / width));
  canvas.addEventListener("keydown", (event) => {
    if (event.key in keys && !event.ctrlKey && !event.metaKey) zoom(keys[event.key] * scale);
  });
  canvas.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      const frame = canvas.getBoundingClientRect();
      zoom(scale * Math.exp(-event.deltaY / 400), event.clientX - frame.left, event.clientY - frame.top);
    },
    { passive: false },
  );
}

const [table, canvas] = [byId("table"), byId("canvas")];
if (table) {
  makeSortable(table);
  followLinks(makeFilterable(table, byId("filters")));
}
if (canvas) {
  byId("view").hidden = false;
  makeSearchable(canvas, byId("search"), byId("found"));
  makeZoomable(canvas);
}
