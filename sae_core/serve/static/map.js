// The map page: loads the table of points, colors it, names what is under the pointer, and keeps its state in the URL.
import { parted } from "./doubt.js";
import { find } from "./find.js";
import { Scatter } from "./scatter.js";

const LISTED = 100; // features shown in a list
const HITS = 200; // features that a search colors
const NAMED = 70; // with at most so many features in view, each is named
const CLUSTERS_NAMED = 28;

const $ = (id) => document.getElementById(id);
const root = $("map"), stage = $("map-stage"), list = $("map-list"), card = $("map-card"), labels = $("map-labels");
const overlay = $("map-overlay"), note = $("map-note"), colorBy = $("map-color"), query = $("map-query"), lasso = $("map-lasso");
const address = root.dataset;

let summary, table, scatter, rowOf, hits = [], strengths = [], selected = -1, hovered = -1;
const chunks = new Map();

start().catch((error) => { note.hidden = false; note.textContent = `The map cannot be drawn: ${error.message}. The clusters are listed below.`; });

async function start() {
  const state = new URLSearchParams(location.search);
  summary = await (await get(`${address.home}map.json`)).json();
  table = readTable(await (await get(`${address.home}points-${summary.version}.bin`)).arrayBuffer());
  if (!summary.n) throw new Error("no feature has a place on it");
  rowOf = new Map();
  for (let row = 0; row < summary.n; row++) rowOf.set(table.feature[row], row);
  scatter = new Scatter($("map-points"), table.x, table.y, drawLabels);
  restore(state);
  paint();
  listen();
  note.hidden = true;
  requestAnimationFrame(() => requestAnimationFrame(() => { root.dataset.ready = Math.round(performance.now()); }));
  if (query.value) await search();
}

async function get(url, options) {
  const answer = await fetch(url, options);
  if (!answer.ok) throw new Error(`${url} answered ${answer.status}`);
  return answer;
}

/** Columns of 4 bytes a value, one after the other. */
function readTable(buffer) {
  const whole = new Set(["feature", "cluster"]);
  return Object.fromEntries(summary.columns.map((name, i) => {
    const Kind = whole.has(name) ? Int32Array : Float32Array;
    return [name, new Kind(buffer, i * 4 * summary.n, summary.n)];
  }));
}

// ---- names, in chunks that are fetched once

async function name(row) {
  const chunk = Math.floor(row / summary.chunk);
  if (!chunks.has(chunk)) {
    const names = get(`${address.home}names-${summary.version}/${chunk}.json`).then((answer) => answer.json());
    names.catch(() => chunks.delete(chunk)); // a failed one may be asked for again
    chunks.set(chunk, names);
  }
  return (await chunks.get(chunk))[row % summary.chunk] || `feature ${table.feature[row]}`;
}

/** What a lexical label says, short enough for a map. */
const brief = (text, most = 34) => {
  const [label, isDoubtful] = parted(text), short = label.replace(/^fires on /, "").split(" · promotes ")[0];
  return (short.length > most ? `${short.slice(0, most - 1)}…` : short) + (isDoubtful ? " (doubtful)" : "");
};

// ---- colors

const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : dark.matches);

/** A color of OKLCH (Ottosson 2020: equal steps look equal) as one little-endian RGBA. */
function oklch(lightness, chroma, hue, alpha = 1) {
  const a = chroma * Math.cos((hue * Math.PI) / 180), b = chroma * Math.sin((hue * Math.PI) / 180);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  const byte = (c) => Math.round(255 * Math.min(Math.max(c <= 0.0031308 ? 12.92 * c : 1.055 * c ** (1 / 2.4) - 0.055, 0), 1));
  return ((Math.round(alpha * 255) << 24) | (byte(linear[2]) << 16) | (byte(linear[1]) << 8) | byte(linear[0])) >>> 0;
}

const faint = () => oklch(isDark() ? 0.62 : 0.66, 0.0, 0, isDark() ? 0.55 : 0.45);
const accent = () => oklch(isDark() ? 0.76 : 0.64, 0.17, 50);
/** From pale gray to the accent. */
const ramp = (share) => (isDark() ? oklch(0.4 + 0.42 * share, 0.02 + 0.14 * share, 60) : oklch(0.86 - 0.36 * share, 0.03 + 0.13 * share, 52));

function paint() {
  const tints = new Uint32Array(summary.n), by = hits.length ? "search" : colorBy.value;
  const legend = $("map-legend");
  legend.hidden = true;
  if (by === "search") tints.fill(faint());
  else if (by === "cluster") paintClusters(tints);
  else paintValues(tints, table[by], by, legend);
  hits.forEach((row, i) => { tints[row] = strengths[i] === undefined ? accent() : ramp(0.25 + 0.75 * strengths[i]); });
  if (selected >= 0) tints[selected] = accent();
  scatter.colors(tints);
  scatter.highlight(selected >= 0 && !hits.includes(selected) ? [...hits, selected] : hits);
}

function paintClusters(tints) {
  const none = faint(), palette = new Map();
  const hue = (cluster) => (cluster * 137.508 + 40) % 360; // the golden angle sets neighbors in number apart
  for (const { id } of summary.clusters) palette.set(id, oklch(isDark() ? 0.74 : 0.6, 0.125, hue(id)));
  for (let i = 0; i < summary.n; i++) tints[i] = palette.get(table.cluster[i]) ?? none;
}

/** Density by its logarithm, from the 1st to the 99th percentile; a score from 0 to 1. */
function paintValues(tints, values, by, legend) {
  const scale = by === "density" ? Math.log10 : (v) => v;
  const sample = [...values.filter((v, i) => i % Math.ceil(summary.n / 20_000) === 0 && (by !== "density" || v > 0))].sort((a, b) => a - b);
  const at = (share) => sample[Math.floor(share * (sample.length - 1))] ?? 1;
  const [low, high] = by === "density" ? [at(0.01), at(0.99)] : [0, 1];
  const steps = Array.from({ length: 256 }, (_, i) => ramp(i / 255)), none = faint();
  for (let i = 0; i < summary.n; i++) {
    const share = (scale(values[i]) - scale(low)) / (scale(high) - scale(low) || 1);
    tints[i] = Number.isFinite(share) ? steps[Math.round(Math.min(Math.max(share, 0), 1) * 255)] : none;
  }
  legend.hidden = false;
  legend.replaceChildren(number(low), gradient(), number(high), ` ${by === "density" ? "of tokens" : "score"}`);
}

function gradient() {
  const canvas = Object.assign(document.createElement("canvas"), { width: 96, height: 1 }), context = canvas.getContext("2d");
  context.putImageData(new ImageData(new Uint8ClampedArray(Uint32Array.from({ length: 96 }, (_, i) => ramp(i / 95)).buffer), 96, 1), 0, 0);
  return canvas;
}

const number = (v) => (v !== 0 && Math.abs(v) < 0.001 ? v.toExponential(0) : v.toLocaleString("en", { maximumSignificantDigits: 2 }));

// ---- names written over the map

let drawing = 0;

/** Names of clusters, and of features when few are in view; none covers another. */
async function drawLabels() {
  const turn = ++drawing, wanted = [];
  const few = scatter.inView(NAMED);
  if (few) for (const row of few) wanted.push({ x: table.x[row], y: table.y[row], text: brief(await name(row)), kind: "feature", row });
  else for (const c of summary.clusters) wanted.push({ ...c, text: c.name, kind: "cluster" });
  if (selected >= 0) wanted.unshift({ x: table.x[selected], y: table.y[selected], text: brief(await name(selected)), kind: "selected", row: selected });
  if (turn !== drawing) return; // the view has moved on
  place(wanted);
  mark();
  remember();
}

function place(wanted) {
  const taken = [], made = [], measure = place.measure ??= document.createElement("canvas").getContext("2d");
  measure.font = getComputedStyle(labels).font;
  for (const { x, y, text, kind, row } of wanted) {
    const [left, top] = scatter.toScreen(x, y), half = measure.measureText(text).width / 2 + 8;
    const below = kind === "cluster" ? 0 : 14;
    const box = [left - half, top + below - 10, left + half, top + below + 10];
    if (!text || box[0] < 0 || box[1] < 0 || box[2] > stage.clientWidth || box[3] > stage.clientHeight) continue;
    if (taken.some((t) => box[0] < t[2] && box[2] > t[0] && box[1] < t[3] && box[3] > t[1])) continue;
    if (made.some((e) => e.dataset.row === String(row))) continue;
    taken.push(box);
    const label = Object.assign(document.createElement("span"), { textContent: text, className: kind, dir: "auto" });
    label.dataset.row = row ?? "";
    label.style.transform = `translate(${Math.round(left)}px, ${Math.round(top + below)}px) translate(-50%, -50%)`;
    made.push(label);
    if (made.length >= (kind === "cluster" ? CLUSTERS_NAMED : NAMED)) break;
  }
  labels.replaceChildren(...made);
}

/** A ring around the selected feature and the one under the pointer. */
function mark() {
  const rings = [...new Set([selected, hovered])].filter((row) => row >= 0).map((row) => {
    const [cx, cy] = scatter.toScreen(table.x[row], table.y[row]);
    return svg("circle", { cx, cy, r: 8 });
  });
  overlay.replaceChildren(...rings);
}

function svg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

async function hover(row, left, top) {
  if (row === hovered && !card.hidden) return;
  hovered = row;
  mark();
  stage.classList.toggle("over", row >= 0);
  card.hidden = row < 0;
  if (row < 0) return;
  const cluster = summary.clusters.find((c) => c.id === table.cluster[row]);
  const title = await name(row);
  if (hovered !== row) return;
  const score = Number.isFinite(table.score[row]) ? ` · score ${number(table.score[row])}` : "";
  card.replaceChildren(element("strong", title), element("span", `feature ${table.feature[row]} · fires on ${number(100 * table.density[row])} % of tokens${score}`));
  if (cluster) card.append(element("span", `in ${cluster.name}`));
  const x = Math.min(left + 14, stage.clientWidth - card.offsetWidth - 8), y = Math.min(top + 14, stage.clientHeight - card.offsetHeight - 8);
  card.style.transform = `translate(${Math.max(x, 8)}px, ${Math.max(y, 8)}px)`;
}

function element(tag, text, properties = {}) {
  return Object.assign(document.createElement(tag), { textContent: text, dir: "auto" }, properties);
}

// ---- lists: what a search found, what a lasso holds

async function show(title, rows, total) {
  const shown = rows.slice(0, LISTED), names = await Promise.all(shown.map(name));
  const head = element("h2", title);
  const close = element("button", "×", { type: "button", title: "Close (Esc)", ariaLabel: "Close the list" });
  close.addEventListener("click", clear);
  const items = shown.map((row, i) => {
    const item = document.createElement("li"), link = element("a", names[i], { href: address.features + table.feature[row] });
    link.addEventListener("focus", () => hoverRow(row));
    item.addEventListener("pointerenter", () => hoverRow(row));
    item.append(link, element("span", ` ${table.feature[row]}`, { className: "note" }));
    return item;
  });
  const ol = document.createElement("ol");
  ol.append(...items);
  const more = total > shown.length ? [element("p", `and ${(total - shown.length).toLocaleString("en")} more`, { className: "note" })] : [];
  list.replaceChildren(close, head, ol, ...more);
  list.hidden = false;
}

function hoverRow(row) {
  hovered = row;
  mark();
}

function clear() {
  list.hidden = true;
  hits = [];
  selected = -1;
  query.value = "";
  hovered = -1;
  card.hidden = true;
  paint();
}

let searching = 0;

async function search() {
  const turn = ++searching, words = query.value.trim();
  if (!words) { if (hits.length) clear(); return; }
  let found;
  try {
    found = await find(address.search, words, HITS);
  } catch (error) {
    note.hidden = false;
    note.textContent = error.message;
    return;
  }
  if (turn !== searching) return;
  note.hidden = true;
  const placed = found.filter((hit) => rowOf.has(hit.feature));
  hits = placed.map((hit) => rowOf.get(hit.feature));
  strengths = placed.map((hit) => hit.score / placed[0].score);
  paint();
  await show(hits.length ? `${hits.length}${hits.length >= HITS ? " or more" : ""} found` : "nothing found", hits, hits.length);
}

// ---- pointer, keys, address

function listen() {
  new ResizeObserver(() => scatter.redraw()).observe(stage);
  for (const event of ["pointerdown", "pointermove", "pointerup", "pointercancel", "pointerleave"]) stage.addEventListener(event, pointer);
  stage.addEventListener("wheel", (event) => {
    event.preventDefault();
    scatter.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0018)), ...at(event));
  }, { passive: false });
  stage.addEventListener("keydown", key);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") clear(); });
  dark.addEventListener("change", paint);
  new MutationObserver(paint).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  colorBy.addEventListener("change", () => { hits = []; paint(); });
  $("map-home").addEventListener("click", () => { scatter.home(); scatter.redraw(); });
  lasso.addEventListener("click", () => lasso.setAttribute("aria-pressed", !isLasso()));
  $("map-bar").addEventListener("submit", (event) => { event.preventDefault(); search(); });
  let wait;
  query.addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(search, 250); });
}

const at = (event) => {
  const box = stage.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};

const isLasso = () => lasso.getAttribute("aria-pressed") === "true";

const pointers = new Map(); // those that are down, by id: their last place
let path = null, travelled = 0;

function pointer(event) {
  const [left, top] = at(event);
  if (event.type === "pointerdown") press(event, left, top);
  else if (event.type === "pointermove" && pointers.has(event.pointerId)) drag(event, left, top);
  else if (event.type === "pointermove") hover(scatter.pick(left, top), left, top);
  else if (event.type === "pointerleave" && !pointers.size) hover(-1);
  else if (pointers.delete(event.pointerId) && event.type === "pointerup") release(event, left, top);
}

function press(event, left, top) {
  if (event.button) return;
  stage.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, [left, top]);
  if (pointers.size === 1) {
    travelled = 0;
    path = event.shiftKey || isLasso() ? [[left, top]] : null;
  }
}

function drag(event, left, top) {
  const before = pointers.get(event.pointerId);
  travelled += Math.hypot(left - before[0], top - before[1]);
  if (path) {
    path.push([left, top]);
    overlay.replaceChildren(svg("polygon", { points: path.map((p) => p.join(",")).join(" ") }));
  } else if (pointers.size === 2) {
    const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
    const apart = (place) => Math.hypot(place[0] - other[0], place[1] - other[1]) || 1;
    scatter.zoom(apart([left, top]) / apart(before), (left + other[0]) / 2, (top + other[1]) / 2);
  } else {
    hover(-1);
    scatter.pan(left - before[0], top - before[1]);
  }
  pointers.set(event.pointerId, [left, top]);
}

function release(event, left, top) {
  if (path && travelled > 8) {
    const rows = scatter.inside(path.map(([x, y]) => scatter.toData(x, y))).sort((a, b) => table.density[b] - table.density[a]);
    lasso.setAttribute("aria-pressed", "false");
    [hits, strengths] = [rows, []];
    paint();
    show(`${rows.length.toLocaleString("en")} inside`, rows, rows.length);
  } else if (travelled < 5) {
    choose(scatter.pick(left, top, event.pointerType === "touch" ? 24 : 12), event, left, top);
  }
  path = null;
}

/** A click opens the feature; a finger, which cannot hover, is first shown what it is on. */
function choose(row, event, left, top) {
  if (row < 0) return;
  if (event.pointerType === "touch" && row !== hovered) { hover(row, left, top); return; }
  rememberNow();
  open(row, event.metaKey || event.ctrlKey);
}

function open(row, elsewhere = false) {
  const url = address.features + table.feature[row];
  if (elsewhere) window.open(url, "_blank", "noopener");
  else location.href = url;
}

const STEP = 60; // pixels that an arrow key moves
const KEYS = {
  ArrowLeft: () => scatter.pan(STEP, 0), ArrowRight: () => scatter.pan(-STEP, 0),
  ArrowUp: () => scatter.pan(0, STEP), ArrowDown: () => scatter.pan(0, -STEP),
  "+": () => scatter.zoom(1.5), "=": () => scatter.zoom(1.5), "-": () => scatter.zoom(1 / 1.5), _: () => scatter.zoom(1 / 1.5),
  0: () => { scatter.home(); scatter.redraw(); },
  Enter: () => { const row = selected >= 0 ? selected : nearestToMiddle(); if (row >= 0) open(row); },
};

const nearestToMiddle = () => scatter.pick(stage.clientWidth / 2, stage.clientHeight / 2, 200);

function key(event) {
  if (!(event.key in KEYS) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  event.stopPropagation();
  KEYS[event.key]();
}

let later;

/** Write the state into the address, once the view rests. */
function remember() {
  clearTimeout(later);
  later = setTimeout(rememberNow, 200);
}

function rememberNow() {
  clearTimeout(later);
  const { x, y, zoom } = scatter.view, state = new URLSearchParams(), dictionary = new URLSearchParams(location.search).get("dictionary");
  if (dictionary) state.set("dictionary", dictionary);
  if (!scatter.isHome) for (const [key, value] of Object.entries({ x, y, z: zoom })) state.set(key, value.toPrecision(5));
  if (colorBy.value !== "cluster") state.set("color", colorBy.value);
  if (query.value) state.set("q", query.value);
  if (selected >= 0) state.set("f", table.feature[selected]);
  history.replaceState(null, "", state.size ? `?${state}` : location.pathname);
}

function restore(state) {
  selected = rowOf.get(Number(state.get("f") ?? NaN)) ?? -1;
  const [x, y, zoom] = ["x", "y", "z"].map((key) => Number(state.get(key) ?? NaN));
  if ([x, y, zoom].every(Number.isFinite) && zoom > 0) scatter.view = { x, y, zoom: Math.min(Math.max(zoom, 0.5), 5000) };
  else if (selected >= 0) scatter.view = { x: table.x[selected], y: table.y[selected], zoom: Math.max(Math.sqrt(summary.n / 14), 1) };
  if ([...colorBy.options].some((option) => option.value === state.get("color"))) colorBy.value = state.get("color");
  query.value = state.get("q") ?? "";
}
