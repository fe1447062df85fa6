// The search page of a site of files.
import { doubted } from "./doubt.js";
import { find } from "./find.js";

const form = document.querySelector("form.search"), box = form.elements.q, results = document.getElementById("results");
const { index, features } = form.dataset;

let turn = 0, wait;

async function search() {
  const own = ++turn, words = box.value.trim();
  const hits = words ? await find(index, words, 50) : [];
  if (own !== turn) return;
  history.replaceState(null, "", words ? `?q=${encodeURIComponent(words)}` : location.pathname);
  const list = document.createElement("ol");
  list.className = "hits";
  list.append(...hits.map(row));
  const nothing = Object.assign(document.createElement("p"), { className: "note", textContent: "Nothing found: try fewer or other words." });
  results.replaceChildren(words && !hits.length ? nothing : list);
}

function row(hit) {
  const item = document.createElement("li"), link = document.createElement("a");
  const span = (className, textContent) => Object.assign(document.createElement("span"), { className, textContent, dir: "auto" });
  link.className = "hit";
  link.href = `${features}${hit.feature}/`;
  link.append(span("n", hit.feature), " ", span("name", doubted(hit.label || "no label yet", hit.beats_control)));
  item.append(link, span("facts", `${(100 * hit.density).toPrecision(3)} %`));
  return item;
}

form.addEventListener("submit", (event) => { event.preventDefault(); search(); });
box.addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(search, 150); });
box.value = new URLSearchParams(location.search).get("q") ?? "";
search();
