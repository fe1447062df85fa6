// The steering page: features and their strengths, three answers as they are written, and everything in the address.
import { doubted } from "./doubt.js";
import { read } from "./events.js";

const $ = (id) => document.getElementById(id);
const form = $("steer"), list = $("features"), fields = form.elements, address = form.dataset;
const SHADES = 10, RANGE = 10, HITS = 8;
const SAVED = ["prompt", "scope", "max_tokens", "temperature", "seed"];
const columns = new Map([...document.querySelectorAll("[data-column]")].map((section) => [section.dataset.column, section]));

let running = null; // what stops the answers that are being written
let steered = []; // the features that they are written with, and their maxima

async function start() {
  listen();
  const state = new URLSearchParams(location.search);
  for (const name of SAVED) if (state.has(name)) fields[name].value = state.get(name);
  fields.logprobs.checked = state.get("logprobs") !== "0";
  if (!fields.scope.value) fields.scope.value = "all"; // a spoiled address
  showLogprobs();
  const wanted = [...state.getAll("f"), ...state.getAll("feature")];
  for (const text of wanted) await add(...text.split(":"));
  saveState();
  form.dataset.ready = "";
  if (state.has("run") && form.checkValidity()) await answer();
}

function listen() {
  form.addEventListener("submit", (event) => { event.preventDefault(); answer(); });
  form.addEventListener("input", (event) => { if (event.target.id !== "add") saveState(); });
  fields.logprobs.addEventListener("change", showLogprobs);
  fields.prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
  $("stop").addEventListener("click", stop);
  let waiting;
  $("add").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(find, 200); });
  $("add").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    clearTimeout(waiting);
    find(true);
  });
  for (const preset of document.querySelectorAll("[data-steers]")) {
    preset.addEventListener("click", async () => {
      list.replaceChildren();
      for (const text of preset.dataset.steers.split(",")) await add(...text.split(":"));
      saveState();
    });
  }
}

async function get(url, options) {
  const answer = await fetch(url, options);
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  throw new Error(told.detail || `the server answered ${answer.status}`);
}

// ---- the features

/** Adds a feature once; a strength or method that is none is left at its default. */
async function add(number, strength, method) {
  const there = [...list.children].find((row) => row.dataset.feature === String(Number(number)));
  if (there) return there.querySelector("[type=number]").focus();
  try {
    if (!/^\d+$/.test(number)) throw new Error(`there is no feature ${number}: features have numbers`);
    const told = await (await get(`/api/steer/${encodeURIComponent(address.dictionary)}/${number}`)).json();
    list.append(rowOf(told, strength, method));
    say("");
  } catch (error) {
    say(error.message);
  }
  $("none").hidden = list.children.length > 0;
}

function rowOf(told, strength, method) {
  const row = $("row").content.firstElementChild.cloneNode(true);
  const [slider, exact] = row.querySelectorAll("input"), methods = row.querySelector("select");
  const name = doubted(told.label || "no label yet", told.beats_control);
  Object.assign(row.dataset, { feature: told.feature, max: told.max_act });
  row.querySelector(".n").textContent = told.feature;
  row.querySelector(".name").textContent = name;
  row.querySelector("a").href = `/f/${encodeURIComponent(address.dictionary)}/${told.feature}`;
  slider.setAttribute("aria-label", `Strength of feature ${told.feature}, in maxima`);
  exact.setAttribute("aria-label", `Exact strength of feature ${told.feature}`);
  methods.setAttribute("aria-label", `Method of feature ${told.feature}`);
  const remove = row.querySelector(".remove"), search = row.querySelector(".search");
  remove.setAttribute("aria-label", `Remove feature ${told.feature}`);
  search.setAttribute("aria-label", `Find a strength for feature ${told.feature}`);
  search.hidden = told.is_dead || told.suggested_strength !== null;
  exact.value = strength !== undefined && strength !== "" && isFinite(strength) ? Number(strength) : told.strength;
  if ([...methods.options].some((option) => option.value === method)) methods.value = method;
  const follow = () => {
    slider.value = Math.max(-RANGE, Math.min(RANGE, exact.value));
    row.querySelector(".formula").textContent = methods.selectedOptions[0].dataset.formula;
    row.querySelector(".caution").textContent = caution(told, Number(exact.value), methods.value);
  };
  slider.addEventListener("input", () => { exact.value = slider.value; follow(); });
  exact.addEventListener("input", follow);
  methods.addEventListener("input", follow);
  search.addEventListener("click", async () => {
    search.disabled = true;
    say("Looking for a strength …");
    try {
      const url = `/api/steer/${encodeURIComponent(address.dictionary)}/${told.feature}/strength`;
      Object.assign(told, await (await get(url, { method: "POST" })).json());
      exact.value = told.strength;
      search.hidden = true;
      say(told.suggested_strength ? `Texts were fluent up to ${told.suggested_strength}.` : "Texts were not fluent at any strength.");
      follow();
      saveState();
    } catch (error) {
      say(error.message);
    }
    search.disabled = false;
  });
  remove.addEventListener("click", () => {
    row.remove();
    $("none").hidden = list.children.length > 0;
    $("add").focus();
    saveState();
  });
  follow();
  return row;
}

function caution(told, strength, method) {
  if (told.is_dead) return "Dead: it never fires on the corpus, so that it has no maximum to steer by.";
  if (Math.abs(strength) > address.absurd) return `Above ${address.absurd} maxima the text will be degenerate.`;
  const fluent = told.suggested_strength;
  if (method === "clamp" && fluent !== null && strength > fluent) return `Texts were fluent up to ${fluent}.`;
  return told.role === "input" ? "An input feature: turning it up hardly makes the model say what it promotes." : "";
}

/** Features by number or words; `first` takes the first. */
async function find(first) {
  const words = $("add").value.trim(), found = $("found");
  found.replaceChildren();
  $("found-note").textContent = "";
  if (!words) return;
  if (/^\d+$/.test(words)) return first === true ? taken(words) : undefined;
  try {
    const query = new URLSearchParams({ dictionary: address.dictionary, q: words, limit: HITS });
    const { hits } = await (await get(`/api/search?${query}`)).json();
    if ($("add").value.trim() !== words) return; // typed on
    if (first === true && hits.length) return await taken(hits[0].feature);
    for (const hit of hits) {
      const item = document.createElement("li"), button = document.createElement("button");
      button.type = "button";
      button.textContent = `${hit.feature} ${doubted(hit.label || "no label yet", hit.beats_control)}`;
      button.addEventListener("click", () => taken(hit.feature));
      item.append(button);
      found.append(item);
    }
    $("found-note").textContent = hits.length ? "" : "nothing found";
  } catch (error) {
    $("found-note").textContent = error.message;
  }
}

async function taken(feature) {
  $("add").value = "";
  $("found").replaceChildren();
  await add(String(feature));
  saveState();
}

const steers = () => [...list.children].map((row) => ({
  feature: Number(row.dataset.feature),
  strength: Number(row.querySelector("[type=number]").value),
  method: row.querySelector("select").value,
}));

// ---- the state, in the address

function saveState() {
  const state = new URLSearchParams({ dictionary: address.dictionary });
  for (const { feature, strength, method } of steers()) state.append("f", `${feature}:${strength}:${method}`);
  for (const name of SAVED) state.set(name, fields[name].value);
  if (!fields.logprobs.checked) state.set("logprobs", "0");
  history.replaceState(null, "", `?${state}`);
  state.set("run", "1");
  $("link").href = `?${state}`;
}

function showLogprobs() {
  document.querySelector(".answers").classList.toggle("plain", !fields.logprobs.checked);
}

// ---- the answers

function say(text) { $("status").textContent = text; }

function stop() {
  if (running) running.abort();
}

async function answer() {
  if (running) return;
  running = new AbortController();
  $("run").disabled = true;
  $("stop").disabled = false;
  $("notes").replaceChildren();
  for (const section of columns.values()) {
    section.querySelector(".stream").replaceChildren();
    section.querySelector("p.facts").textContent = "";
  }
  say("Writing …");
  try {
    const asked = { dictionary: address.dictionary, prompt: fields.prompt.value, scope: fields.scope.value,
      max_tokens: Number(fields.max_tokens.value), temperature: Number(fields.temperature.value),
      seed: Number(fields.seed.value), steering: steers() };
    steered = [...list.children].map((row) => ({ feature: row.dataset.feature, max: Number(row.dataset.max) }));
    const options = { method: "POST", body: JSON.stringify(asked), headers: { "Content-Type": "application/json" } };
    const stream = await get("/api/steer", { ...options, signal: running.signal });
    await read(stream.body, show);
    say("Done.");
  } catch (error) {
    say(error.name === "AbortError" ? "Stopped." : error.message);
  } finally {
    running = null;
    $("run").disabled = false;
    $("stop").disabled = true;
  }
}

function show(told) {
  if (told.error) throw new Error(told.error);
  if (told.start) {
    for (const note of told.notes) {
      const item = document.createElement("li");
      item.textContent = note;
      $("notes").append(item);
    }
    columns.get("words").querySelector("p.facts").textContent = told.words || "No feature is turned up: nothing to ask for.";
    return;
  }
  const stream = columns.get(told.column).querySelector(".stream");
  shade(stream.querySelectorAll("[data-last]"), told.before);
  for (const last of stream.querySelectorAll("[data-last]")) delete last.dataset.last;
  write(stream, told);
  if (told.finish === "length") stream.append(mark("…"));
}

/** A token as a text node, its log-probability under it; line breaks stand by themselves, or they would break nothing. */
function write(stream, { text, logprob }) {
  text.split("\n").forEach((part, i) => {
    if (i) stream.append("\n");
    if (!part) return;
    const span = document.createElement("span");
    span.textContent = part;
    span.title = `log-probability ${logprob.toFixed(2)}`;
    Object.assign(span.dataset, { logprob: logprob.toFixed(1), last: "" });
    stream.append(span);
  });
}

function mark(text) {
  const span = document.createElement("span");
  span.className = "end";
  span.dataset.text = text;
  return span;
}

/** The newest token, once the model has read it: the largest of its features decides on the shade. */
function shade(spans, acts) {
  const share = Math.max(0, ...acts.map((act, i) => act / steered[i].max));
  const step = share > 0 ? Math.min(SHADES, Math.max(1, Math.ceil(SHADES * share))) : 0;
  const told = acts.map((act, i) => `feature ${steered[i].feature}: ${Number(act.toPrecision(3))}`);
  for (const span of spans) {
    if (step) span.classList.add("a", `a${step}`);
    span.title = [...told, span.title].join(", ");
  }
}

start();
