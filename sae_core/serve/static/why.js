// Why this token: attributions over the prompt, features held to see what follows then, and everything in the address.

const $ = (id) => document.getElementById(id);
const form = $("why"), fields = form.elements, { dictionary } = form.dataset;
const SHADES = 10, SAVED = ["prompt", "compare", "target", "against", "limit", "steps"];
let asking = 0; // the newest question: answers to older ones are dropped
let lengths = []; // tokens of the first prompt, as shown

async function start() {
  const state = new URLSearchParams(location.search);
  for (const name of SAVED) if (state.has(name)) fields[name].value = state.get(name);
  if (!fields.steps.value) fields.steps.value = "0"; // a spoiled address
  form.addEventListener("submit", (event) => { event.preventDefault(); explain([]); });
  form.addEventListener("input", saveState);
  for (const box of [fields.prompt, fields.compare]) {
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    });
  }
  const wanted = state.getAll("h").map((text) => text.split(":"));
  saveState();
  form.dataset.ready = "";
  if (state.has("run") && form.checkValidity()) await explain(wanted);
}

async function post(url, body) {
  const options = { method: "POST", body: JSON.stringify({ dictionary, ...body }), headers: { "Content-Type": "application/json" } };
  const answer = await fetch(url, options), told = await answer.json().catch(() => ({}));
  if (answer.ok) return told;
  const why = Array.isArray(told.detail) ? told.detail.map((one) => one.msg).join("; ") : told.detail;
  throw new Error(why || `the server answered ${answer.status}`);
}

/** What is meant by a word: itself in quotes, else with the space before it that its token has. */
function word(text) {
  const quoted = /^"(.*)"$/s.exec(text);
  if (quoted) return quoted[1];
  return text && !/^\s/.test(text) ? ` ${text}` : text;
}

const pair = () => ({ prompt: fields.prompt.value, target: word(fields.target.value), against: word(fields.against.value) });

function saveState() {
  const state = new URLSearchParams({ dictionary });
  for (const name of SAVED) if (fields[name].value) state.set(name, fields[name].value);
  for (const { feature, strength, position } of held()) state.append("h", `${feature}:${strength}:${position ?? ""}`);
  history.replaceState(null, "", `?${state}`);
  state.set("run", "1");
  $("link").href = `?${state}`;
}

function say(text) { $("status").textContent = text; }

// ---- the answer

async function explain(wanted) {
  const mine = ++asking;
  say("Reading …");
  try {
    const body = { ...pair(), compare: fields.compare.value, limit: Number(fields.limit.value), steps: Number(fields.steps.value) };
    const told = await post("/api/why", body);
    if (mine !== asking) return;
    show(told);
    $("held").replaceChildren();
    for (const [feature, strength, position] of wanted) {
      const cause = told.why.causes.find((one) => one.feature === Number(feature));
      hold(Number(feature), cause?.label ?? "", Number(strength), position ? Number(position) : null);
    }
    await follow();
    if (mine === asking) say("Done.");
  } catch (error) {
    if (mine === asking) say(error.message);
  }
}

function show({ why, compared, features }) {
  lengths = why.tokens.map((token) => token.token);
  const notes = [...new Set([...why.notes, ...(compared?.notes ?? [])])];
  $("notes").replaceChildren(...notes.map((note) => element("li", note)));
  const both = compared ? [why, compared] : [why];
  const most = Math.max(...both.flatMap((one) => one.tokens.map((token) => Math.abs(token.features))), 1e-9);
  $("answers").replaceChildren(...both.map((one, i) => section(one, most, i)));
  $("shared").hidden = !compared;
  $("shared").querySelector("tbody").replaceChildren(...features.map((row) => line(
    head(featureLink(row.feature, row.label, row.beats_control)), number(row.left), number(row.right), row.stays ? "stays" : "",
  )));
}

function section(why, most, which) {
  const made = $("answer").content.firstElementChild.cloneNode(true), name = ["First prompt", "Second prompt"][which];
  const rows = made.querySelector("tbody"), heat = made.querySelector(".heat");
  made.dataset.answer = which;
  made.querySelector("h2").textContent = name;
  made.querySelector(".scroll").setAttribute("aria-label", `Features of the ${name.toLowerCase()}`);
  made.querySelector(".lead").textContent = `${shown(why.target.token)} (${percent(why.target.probability)}) against `
    + `${shown(why.against.token)} (${percent(why.against.probability)}): ${signed(why.difference)} logits`;
  made.querySelector(".sums").textContent = `${signed(why.of_features)} from ${why.n_active} features that fire, `
    + `${signed(why.of_error)} from what they miss, ${signed(why.base)} from elsewhere, ${signed(why.rest)} beyond the first order`;
  if (which) made.querySelector("thead th:last-child").remove();
  rows.replaceChildren(...why.causes.map((cause) => causeLine(cause, which)));
  heat.replaceChildren(...why.tokens.map((token, place) => heatToken(token, place, most)));
  heat.addEventListener("click", (event) => {
    const chosen = event.target.closest("button");
    if (!chosen) return;
    const on = chosen.getAttribute("aria-pressed") !== "true";
    for (const button of heat.children) button.setAttribute("aria-pressed", String(on && button === chosen));
    let left = 0;
    for (const row of rows.children) left += !(row.hidden = on && row.dataset.at !== chosen.dataset.at);
    made.querySelector(".none").hidden = left > 0;
  });
  return made;
}

function heatToken(token, place, most) {
  const button = element("button", token.token.replace(/\n/g, "⏎")), step = Math.ceil(SHADES * Math.abs(token.features) / most);
  button.type = "button";
  button.dataset.at = place;
  button.setAttribute("aria-pressed", "false");
  if (step > 0) button.className = `a a${Math.min(SHADES, step)}${token.features < 0 ? " against" : ""}`;
  const told = token.is_sink ? "an attention sink: no features" : `features ${signed(token.features)}, missed ${signed(token.error)}`;
  button.title = `token ${place}: ${told}`;
  const spoken = element("span", ` (${told})`);
  spoken.className = "sr";
  button.append(spoken);
  return button;
}

function causeLine(cause, which) {
  const acts = element("td"), more = which === 0 ? [acts] : []; // what if: of the first prompt
  if (which === 0) {
    for (const [text, strength] of [["Ablate", 0], ["Clamp", 1]]) {
      const button = element("button", text);
      button.type = "button";
      button.className = "quiet";
      button.setAttribute("aria-label", `${text} feature ${cause.feature} at token ${cause.position}`);
      button.addEventListener("click", () => { hold(cause.feature, cause.label, strength, cause.position); follow(); });
      acts.append(button, " ");
    }
  }
  const made = line(
    cause.position, shown(cause.token), head(featureLink(cause.feature, cause.label, cause.beats_control)), number(cause.act, false),
    cell(cause.share === null ? "–" : percent(cause.share)), number(cause.attribution), number(cause.ablation), ...more,
  );
  made.children[0].className = "right";
  made.dataset.at = cause.position;
  return made;
}

// ---- what if

const held = () => [...$("held").children].map((row) => {
  const place = row.querySelector("select").value;
  return { feature: Number(row.dataset.feature), strength: Number(row.querySelector("input").value), position: place === "" ? null : Number(place) };
});

/** Holds a feature once: a second time changes its strength and place. */
function hold(feature, label, strength, position) {
  let row = [...$("held").children].find((one) => one.dataset.feature === String(feature));
  if (!row) {
    row = $("row").content.firstElementChild.cloneNode(true);
    row.dataset.feature = feature;
    row.querySelector(".n").textContent = feature;
    row.querySelector(".name").textContent = label || "no label here";
    row.querySelector("a").href = `/f/${encodeURIComponent(dictionary)}/${feature}`;
    row.querySelector("input").setAttribute("aria-label", `Strength of feature ${feature}, in maxima`);
    const where = row.querySelector("select");
    where.setAttribute("aria-label", `Where feature ${feature} is held`);
    where.append(new Option("at all tokens", ""), ...lengths.map((token, i) => new Option(`at ${i} ${shown(token)}`, i)));
    row.querySelector("button").setAttribute("aria-label", `Remove feature ${feature}`);
    row.querySelector("button").addEventListener("click", () => { row.remove(); follow(); $("what-if").querySelector("button")?.focus(); });
    row.addEventListener("change", () => follow());
    $("held").append(row);
  }
  row.querySelector("input").value = isFinite(strength) ? strength : 0;
  row.querySelector("select").value = position ?? "";
}

async function follow() {
  saveState();
  const mine = asking, asked = held(), key = JSON.stringify(asked);
  $("what-if").hidden = !asked.length;
  if (!asked.length) return;
  $("effect").textContent = "Reading …";
  try {
    const told = await post("/api/why/next", { ...pair(), held: asked });
    if (mine !== asking || key !== JSON.stringify(held())) return;
    $("effect").textContent = `The difference of the two logits goes from ${signed(told.before)} to ${signed(told.after)}.`;
    $("what-if").querySelector("tbody").replaceChildren(...told.tokens.map((one) => line(
      shown(one.token), shaded(one.before), shaded(one.after),
    )));
  } catch (error) {
    $("effect").textContent = error.message;
  }
}

// ---- pieces

function element(name, text) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  return made;
}

function line(...cells) {
  const row = element("tr");
  row.append(...cells.map((cell) => (cell instanceof Node ? cell : element("td", cell))));
  return row;
}

function head(...content) {
  const made = element("th");
  made.scope = "row";
  made.append(...content);
  return made;
}

function featureLink(feature, label, beatsControl) {
  const made = document.createDocumentFragment(), link = element("a"), name = element("span", label || "no label yet");
  const n = element("span", feature);
  n.className = "n";
  name.className = "name";
  name.dir = "auto";
  link.href = `/f/${encodeURIComponent(dictionary)}/${feature}`;
  link.append(n, " ", name);
  made.append(link);
  if (beatsControl === false) {
    const doubt = element("span", "doubtful");
    doubt.className = "badge warn";
    doubt.title = "no better than another feature's label";
    made.append(" ", doubt);
  }
  return made;
}

function cell(text, shade = "") {
  const made = element("td", text);
  made.className = `right ${shade}`;
  return made;
}

const number = (value, sign = true) => cell(sign ? signed(value) : String(Number(value.toPrecision(3))));

function shaded(probability) {
  const step = Math.ceil(SHADES * probability);
  return cell(percent(probability), step > 0 ? `a a${Math.min(SHADES, step)}` : "");
}

const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;
const percent = (share) => `${Number((100 * share).toPrecision(3))} %`;
const shown = (token) => token.replace(/^ /, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥");

start();
