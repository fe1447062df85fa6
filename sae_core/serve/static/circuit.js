// A circuit as a graph: layers upward, nodes by effect, edges by weight; zoom, pin, group, take out of the model; and all
// of it in the address.
import { read } from "./events.js";

const $ = (id) => document.getElementById(id);
const root = $("circuit");
root.hidden = false; // its width is needed
const graph = $("circuit-graph"), card = $("circuit-card"), slider = $("circuit-nodes");
const WIDTH = 900, MARGIN = 70;
const NARROW = graph.clientWidth < 500; // a phone: fewer names, but legible
const [ROW, LABELED, LARGER, SIDE_BY_SIDE] = NARROW ? [260, 4, 1.8, 3] : [130, 30, 1, 8];
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;

let circuit, pinned = [], groups = [], ablated = [], running = null, focused = "", view = { x: 0, y: 0, zoom: 1 }, height = 0;

start().catch((error) => {
  card.replaceChildren(element("p", `The graph cannot be drawn: ${error.message}. Its nodes and edges are listed below.`));
});

async function start() {
  const answer = await fetch(`/api/circuits/${encodeURIComponent(root.dataset.slug)}`);
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  circuit = await answer.json();
  const state = new URLSearchParams(location.search), known = new Set(circuit.nodes.map(key));
  const keys = (text) => [...new Set((text ?? "").split(",").filter((k) => known.has(k)))];
  pinned = keys(state.get("pin"));
  for (const members of state.getAll("group").map(keys)) {
    const free = members.filter((k) => !groups.flat().includes(k));
    if (free.length > 1) groups.push(free);
  }
  const shown = Number(state.get("nodes"));
  if (shown >= 1) slider.value = shown;
  listen();
  draw();
  root.dataset.ready = "";
  const out = keys(state.get("ablate"));
  if (out.length) await ablate(out);
}

function listen() {
  slider.addEventListener("input", draw);
  $("circuit-in").addEventListener("click", () => zoom(1.25));
  $("circuit-out").addEventListener("click", () => zoom(0.8));
  $("circuit-home").addEventListener("click", () => { view = { x: 0, y: 0, zoom: 1 }; place(); });
  $("circuit-clear").addEventListener("click", clear);
  $("circuit-group").addEventListener("click", group);
  $("circuit-ablate").addEventListener("click", () => ablate(pinned));
  graph.addEventListener("wheel", (event) => { event.preventDefault(); zoom(event.deltaY < 0 ? 1.1 : 1 / 1.1); }, { passive: false });
  graph.addEventListener("keydown", (event) => {
    if (event.key === "+" || event.key === "=") zoom(1.25);
    else if (event.key === "-") zoom(0.8);
    else if (event.key === "0") $("circuit-home").click();
    else return;
    event.preventDefault();
  });
  let from = null;
  graph.addEventListener("pointerdown", (event) => { if (!event.target.closest(".node")) from = [event.clientX, event.clientY]; });
  addEventListener("pointermove", (event) => {
    if (!from) return;
    const scale = WIDTH / view.zoom / graph.clientWidth;
    view.x -= (event.clientX - from[0]) * scale;
    view.y -= (event.clientY - from[1]) * scale;
    from = [event.clientX, event.clientY];
    place();
  });
  addEventListener("pointerup", () => { from = null; });
}

const key = (node) => `${node.place}_${node.feature}`;

/** The nodes as shown: the largest ones and the pinned, a group as one node with the effect of all. */
function shownNodes() {
  const most = Number(slider.value);
  const nodes = circuit.nodes.filter((node, i) => i < most || pinned.includes(key(node)) || groups.flat().includes(key(node)));
  const alone = nodes.filter((node) => !groups.flat().includes(key(node))).map((node) => ({ ...node, id: key(node), of: [node] }));
  const joined = groups.map((members) => {
    const of = circuit.nodes.filter((node) => members.includes(key(node)));
    const largest = of[0];
    return { ...largest, id: `g_${members.join("+")}`, of, effect: of.reduce((sum, node) => sum + node.effect, 0), label: `${of.length} nodes: ${largest.label}` };
  });
  return [...alone, ...joined];
}

function draw() {
  const had = document.activeElement?.dataset?.id;
  const nodes = shownNodes(), home = new Map(nodes.flatMap((node) => node.of.map((one) => [key(one), node.id])));
  height = (circuit.places.length + 0.6) * ROW;
  graph.style.aspectRatio = `${WIDTH} / ${height}`;
  graph.classList.toggle("narrow", NARROW);
  const at = layout(nodes), edges = joinedEdges(home);
  const most = Math.max(...nodes.map((node) => Math.abs(node.effect)), 1e-9), heaviest = Math.max(...edges.map((e) => Math.abs(e.weight)), 1e-9);
  const rows = circuit.places.map((p, i) => rowLine(height - (i + 0.5) * ROW, `${p.hook === "resid_post" ? "layer" : p.hook} ${p.layer}`));
  const lines = edges.map((edge) => edgeLine(edge, at, heaviest));
  const marks = nodes.map((node, i) => nodeMark(node, at.get(node.id), most, i < LABELED || pinned.includes(node.id)));
  graph.replaceChildren(...rows, ...lines, outputMark(at.get("out")), ...marks);
  $("circuit-count").textContent = `${nodes.length} of ${circuit.nodes.length}, ${edges.length} edges`;
  $("circuit-group").disabled = pinned.length < 2;
  $("circuit-ablate").disabled = !pinned.length;
  $("circuit-clear").disabled = !pinned.length && !groups.length && !ablated.length;
  place();
  emphasize();
  save();
  graph.querySelector(`[data-id="${had}"]`)?.focus();
}

/** Every row's nodes side by side, those of the largest effect in the middle; errors at the left end. */
function layout(nodes) {
  const at = new Map([["out", [WIDTH / 2, 0.3 * ROW]]]);
  circuit.places.forEach((_, row) => {
    const own = nodes.filter((node) => node.place === row), errors = own.filter((n) => n.feature < 0 && n.of.length === 1);
    const ordered = [];
    own.filter((n) => !errors.includes(n)).sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect))
      .forEach((node, i) => (i % 2 ? ordered.push(node) : ordered.unshift(node)));
    const step = (WIDTH - 2 * MARGIN) / Math.max(ordered.length + errors.length, 1);
    [...errors, ...ordered].forEach((node, i) => {
      const wave = ordered.length > SIDE_BY_SIDE ? ((i % 3) - 1) * 26 * LARGER : 0;
      at.set(node.id, [MARGIN + (i + 0.5) * step, height - (row + 0.5) * ROW + wave]);
    });
  });
  return at;
}

/** Edges between what is shown; those between the same two shown nodes are one. */
function joinedEdges(home) {
  const found = new Map();
  for (const edge of circuit.edges) {
    const source = home.get(`${edge.source_place}_${edge.source_feature}`);
    const target = edge.target_place < 0 ? "out" : home.get(`${edge.target_place}_${edge.target_feature}`);
    if (!source || !target || source === target) continue;
    const name = `${source} ${target}`;
    if (!found.has(name)) found.set(name, { source, target, weight: 0 });
    found.get(name).weight += edge.weight;
  }
  return [...found.values()];
}

function rowLine(y, name) {
  const made = svg("g", {}), text = svg("text", { x: 6, y: y - ROW / 2 + 20 * LARGER, class: "layer-name" });
  text.textContent = name;
  made.append(svg("line", { x1: 0, x2: WIDTH, y1: y - ROW / 2, y2: y - ROW / 2, class: "layer" }), text);
  return made;
}

function edgeLine(edge, at, heaviest) {
  const [x1, y1] = at.get(edge.source), [x2, y2] = at.get(edge.target), half = (y1 + y2) / 2;
  const made = svg("path", { d: `M${x1},${y1} C${x1},${half} ${x2},${half} ${x2},${y2}`, class: `edge${edge.weight < 0 ? " against" : ""}`,
    "stroke-width": (0.4 + 6 * Math.abs(edge.weight) / heaviest).toFixed(2) });
  Object.assign(made.dataset, { source: edge.source, target: edge.target, weight: edge.weight });
  const title = svg("title", {});
  title.textContent = signed(edge.weight);
  made.append(title);
  return made;
}

function nodeMark(node, [x, y], most, named) {
  const size = LARGER * (5 + 13 * Math.sqrt(Math.abs(node.effect) / most)), isError = node.feature < 0 && node.of.length === 1;
  const made = svg("g", { class: `node${node.effect < 0 ? " against" : ""}${pinned.includes(node.id) ? " pinned" : ""}`, transform: `translate(${x},${y})`,
    tabindex: 0, role: "button", "aria-pressed": pinned.includes(node.id), "aria-label": `${called(node)}: ${node.label}, effect ${signed(node.effect)}` });
  made.dataset.id = node.id;
  made.append(isError ? svg("rect", { x: -size, y: -size, width: 2 * size, height: 2 * size, class: "mark" }) : svg("circle", { r: size, class: "mark" }));
  if (node.of.length > 1) made.append(svg("circle", { r: size + 4, class: "layer", fill: "none" }));
  if (named) {
    const text = svg("text", { y: size + 12 * LARGER, "text-anchor": "middle" });
    text.textContent = isError ? "error" : brief(node);
    made.append(text);
  }
  made.addEventListener("click", () => toggle(node));
  made.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(node); } });
  for (const [kind, on] of [["pointerenter", true], ["focus", true], ["pointerleave", false], ["blur", false]]) {
    made.addEventListener(kind, () => { focused = on ? node.id : ""; emphasize(); if (on) tell(node); });
  }
  return made;
}

function outputMark([x, y]) {
  const made = svg("g", { transform: `translate(${x},${y})` }), text = svg("text", { y: -8, "text-anchor": "middle", class: "layer-name" });
  text.textContent = `logit of the right token less the other's: ${signed(circuit.ends.full)}`;
  made.append(text);
  return made;
}

/** What a label says, short enough for a node. */
function brief(node) {
  const text = node.label.replace(/^fires on /, "").split(" · ")[0];
  const short = text.length > 18 ? `${text.slice(0, 17)}…` : text;
  return node.of.length > 1 ? `${node.of.length}: ${short.replace(/^\d+ nodes: (fires on )?/, "")}` : short || String(node.feature);
}

const called = (node) => {
  const p = circuit.places[node.place];
  return node.of?.length > 1 ? "group" : `${p.hook === "resid_post" ? "layer" : p.hook} ${p.layer} ${node.feature < 0 ? "error" : `feature ${node.feature}`}`;
};

function toggle(node) {
  if (node.of.length > 1) { // a group opens again
    groups = groups.filter((members) => `g_${members.join("+")}` !== node.id);
  } else {
    pinned = pinned.includes(node.id) ? pinned.filter((one) => one !== node.id) : [...pinned, node.id];
  }
  draw();
}

function group() {
  groups.push(pinned);
  pinned = [];
  draw();
}

function clear() {
  running?.abort();
  running = null;
  pinned = []; groups = []; ablated = []; focused = "";
  $("edit").hidden = true;
  draw();
}

/** What hangs on the pinned nodes and the one under the pointer; all else steps back. */
function emphasize() {
  const chosen = new Set([...pinned, focused].filter(Boolean)), near = new Set(chosen);
  for (const edge of graph.querySelectorAll(".edge")) {
    const { source, target } = edge.dataset, on = chosen.has(source) || chosen.has(target);
    if (on) { near.add(source); near.add(target); }
    edge.classList.toggle("on", on);
    edge.classList.toggle("off", chosen.size > 0 && !on);
  }
  for (const node of graph.querySelectorAll(".node")) node.classList.toggle("off", chosen.size > 0 && !near.has(node.dataset.id));
}

function tell(node) {
  const rows = (end, other) => [...graph.querySelectorAll(".edge")].filter((edge) => edge.dataset[end] === node.id)
    .map((edge) => [edge.dataset[other], Number(edge.dataset.weight)]).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, 8);
  const head = element("h2", called(node)), label = element("p", node.label || "no label yet");
  label.dir = "auto";
  const facts = element("p", `effect ${signed(node.effect)} · activation ${Number(node.act.toPrecision(3))} · fires in ${Math.round(100 * node.prompts)} % of the prompts`);
  facts.className = "facts";
  const links = node.of.filter((one) => one.feature >= 0).map((one) => {
    const link = element("a", `feature ${one.feature} of layer ${circuit.places[one.place].layer}`), line = element("p");
    link.href = `/f/${encodeURIComponent(circuit.places[one.place].dictionary)}/${one.feature}`;
    line.append(link);
    return line;
  });
  card.replaceChildren(head, label, facts, ...links, list("made by", rows("target", "source")), list("makes", rows("source", "target")), command());
}

function list(name, rows) {
  const made = element("table"), caption = element("caption", name);
  made.append(caption, ...rows.map(([id, weight]) => {
    const row = element("tr"), number = element("td", signed(weight)), other = graph.querySelector(`.node[data-id="${id}"]`);
    number.className = "right";
    row.append(element("td", other ? other.getAttribute("aria-label").split(", effect")[0] : "output"), number);
    return row;
  }));
  return rows.length ? made : document.createTextNode("");
}

/** How the pinned features are taken out of a probe that they should not matter to. */
function command() {
  const features = pinned.filter((id) => !id.endsWith("_-1")).map((id) => `--feature ${named(id)}`);
  if (!features.length) return document.createTextNode("");
  const made = element("p"), code = element("code", `mind-atlas shift ${features.join(" ")}`);
  made.append("a probe without the pinned: ", code);
  return made;
}

/** A node as the command line calls it. */
function named(id) {
  const [at, feature] = id.split("_");
  return `${circuit.places[at].layer}:${feature === "-1" ? "error" : feature}`;
}

// ---- the model without nodes

async function ablate(ids) {
  running?.abort();
  const mine = running = new AbortController(), dot = circuit.slug.lastIndexOf(".");
  ablated = ids;
  save();
  $("circuit-clear").disabled = false;
  $("edit").hidden = false;
  $("edit-nodes").textContent = ids.map(named).join(", ");
  $("edit-command").textContent = `mind-atlas circuit ${circuit.slug.slice(0, dot)} --task ${circuit.task} ${ids.map((id) => `--ablate ${named(id)}`).join(" ")}`;
  for (const id of ["edit-levels", "edit-prompts"]) $(id).tBodies[0].replaceChildren();
  $("edit-about").textContent = "";
  $("edit-status").textContent = "Reading …";
  $("edit").scrollIntoView({ block: "nearest" });
  try {
    const nodes = ids.map((id) => { const [place, feature] = id.split("_").map(Number); return { place, feature }; });
    const answer = await fetch(`/api/circuits/${encodeURIComponent(circuit.slug)}/ablate`, {
      method: "POST", body: JSON.stringify({ nodes }), headers: { "Content-Type": "application/json" }, signal: mine.signal });
    if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).detail || `the server answered ${answer.status}`);
    await read(answer.body, (known) => { if (mine === running) showEdit(known); });
  } catch (error) {
    if (mine === running) $("edit-status").textContent = error.message;
  }
}

function showEdit(known) {
  if (known.error) throw new Error(known.error);
  const { before, after, random } = known;
  const row = (name, of, told) => {
    const drawn = random.map(of).filter((value) => value !== null), mean = drawn.reduce((sum, value) => sum + value, 0) / drawn.length;
    const spread = drawn.length ? `${told(mean)} (${told(Math.min(...drawn))} to ${told(Math.max(...drawn))})` : "–";
    return cells(name, ...[of(before), of(after)].map((value) => (value === null ? "…" : told(value))), spread);
  };
  $("edit-levels").tBodies[0].replaceChildren(
    row("prompts right", (level) => level.right, (share) => `${Math.round(100 * share)} %`),
    row("difference of logits", (level) => level.difference, signed),
    row("loss on other text, nats a token", (level) => level.loss, (loss) => loss.toFixed(4)),
  );
  $("edit-prompts").tBodies[0].replaceChildren(...known.prompts.map((one) => {
    const made = cells(one.text, signed(one.before), signed(one.after)), verdict = element("td", one.after > 0 ? "" : "wrong now");
    made.firstChild.dir = "auto";
    made.firstChild.after(element("td", one.target), element("td", one.against));
    made.append(verdict);
    return made;
  }));
  const count = (n, what) => (n ? `${n} ${what}${n > 1 ? "s" : ""}` : "");
  const taken = [count(known.features, "feature"), count(known.errors, "error")].filter(Boolean).join(" and ");
  const beside = random.length ? `; at random, ${count(known.drawn, "other feature")} of the circuit at the same places${known.errors ? " and the same errors" : ""}: the mean of ${random.length} draws, the least and the most` : "";
  $("edit-about").textContent = `At 0 wherever the model reads, but on attention sinks: ${taken}${beside}. The ${known.prompts.length} prompts did not find the circuit, and the model gets all of them right; the loss is over ${known.tokens} held-out tokens of the corpus.`;
  $("edit-status").textContent = known.done < known.total ? `${known.done} of ${known.total} passes of the model …` : "Done.";
}

/** A row of a table: its name, then numbers. */
function cells(name, ...numbers) {
  const made = element("tr"), head = element("th", name);
  head.scope = "row";
  made.append(head, ...numbers.map((text) => { const cell = element("td", text); cell.className = "right"; return cell; }));
  return made;
}

function zoom(by) {
  const next = Math.min(8, Math.max(0.5, view.zoom * by)), w = WIDTH / view.zoom, h = height / view.zoom;
  view.x += (w - WIDTH / next) / 2;
  view.y += (h - height / next) / 2;
  view.zoom = next;
  place();
}

function place() {
  graph.setAttribute("viewBox", `${view.x} ${view.y} ${WIDTH / view.zoom} ${height / view.zoom}`);
}

function save() {
  const state = new URLSearchParams({ nodes: slider.value });
  if (pinned.length) state.set("pin", pinned.join(","));
  for (const members of groups) state.append("group", members.join(","));
  if (ablated.length) state.set("ablate", ablated.join(","));
  history.replaceState(null, "", `?${state}`);
  $("circuit-link").href = `?${state}`;
}

function svg(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function element(name, text) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  return made;
}
