"use strict";
const rows = [...document.querySelectorAll("tr[data-method]")];
const form = document.querySelector(".filters");
const find = document.getElementById("find");
const count = document.getElementById("count");
const memory = "filters " + location.pathname;

function chosen(name) {
  return [...document.querySelectorAll(`[data-filter=${name}] input:checked`)].map(box => box.value);
}

function filter() {
  const methods = chosen("method"), bits = chosen("bits"), text = find.value.trim().toLowerCase();
  let shown = 0;
  for (const row of rows) {
    const fits = (!methods.length || methods.includes(row.dataset.method))
      && (!bits.length || bits.includes(row.dataset.bits))
      && (!text || row.textContent.toLowerCase().includes(text));
    row.hidden = !fits;
    shown += fits;
  }
  count.textContent = shown < rows.length ? `${shown} of ${rows.length} rows` : "";
  try {
    sessionStorage.setItem(memory, JSON.stringify({methods, bits, text: find.value}));
  } catch { /* a page inside another may keep nothing */ }
}

function sort(head) {
  const index = head.cellIndex, table = head.closest("table");
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
  const key = row => {
    const cell = row.cells[index];
    if (cell.dataset.value !== undefined) return parseFloat(cell.dataset.value);
    const text = cell.textContent.replace(/#$/, "").trim();
    const number = parseFloat(text.replace(/^W/, ""));
    return Number.isNaN(number) ? text : number;
  };
  const missing = value => value === "" || value === "—" || (typeof value === "string" && value.startsWith("diverged"));
  for (const body of table.tBodies) {
    const own = [...body.rows].filter(row => !row.classList.contains("section"));
    const keys = new Map(own.map(row => [row, key(row)]));
    own.sort((a, b) => {
      const x = keys.get(a), y = keys.get(b);
      if (missing(x) || missing(y)) return missing(x) - missing(y);
      if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
      return (typeof x === "number" ? x - y : x.localeCompare(y)) * sign;
    });
    body.append(...own);
  }
}

const tip = document.getElementById("tip");

function show(cell) {
  tip.textContent = cell.dataset.tip;
  tip.hidden = false;
  const place = cell.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const below = place.bottom + 6 + own.height < innerHeight;
  tip.style.left = Math.max(4, Math.min(place.left, innerWidth - own.width - 4)) + "px";
  tip.style.top = Math.max(4, below ? place.bottom + 6 : place.top - own.height - 6) + "px";
}

function explain(event) {
  const cell = event.target.closest?.("[data-tip]");
  if (cell) show(cell); else tip.hidden = true;
}

function unfold() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  if (target.tagName === "DETAILS") target.open = true;
  if (target.hidden && form) { form.reset(); filter(); }
  target.scrollIntoView({block: "center"});
}

for (const head of document.querySelectorAll("thead th")) head.firstChild.onclick = () => sort(head);
for (const name of ["pointerover", "focusin", "click"]) document.addEventListener(name, explain);
document.addEventListener("scroll", () => { tip.hidden = true; }, true);
document.addEventListener("keydown", event => { if (event.key === "Escape") tip.hidden = true; });
if (form) {
  try {
    const kept = JSON.parse(sessionStorage.getItem(memory) || "null");
    if (kept) {
      find.value = kept.text;
      for (const name of ["method", "bits"]) {
        for (const box of document.querySelectorAll(`[data-filter=${name}] input`)) {
          box.checked = kept[name === "method" ? "methods" : "bits"].includes(box.value);
        }
      }
    }
  } catch { /* nothing is remembered */ }
  form.addEventListener("input", filter);
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));
  filter();
}
addEventListener("hashchange", unfold);
unfold();
const reload = Number(document.body.dataset.reload);
if (reload) setTimeout(() => location.reload(), 1000 * reload);
