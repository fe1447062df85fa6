// Features by words: asked of the server, or, on a site of files, looked up in its one index.

let index;

/** Hits, best first: {feature, label, density, score}. `address` is the server's search or the index's file. */
export async function find(address, words, limit) {
  const isFile = address.endsWith(".json");
  const answer = isFile ? null : await fetch(`${address}&limit=${limit}&q=${encodeURIComponent(words)}`);
  if (answer && !answer.ok) throw new Error((await answer.json()).detail);
  return answer ? (await answer.json()).hits : lookUp(await (index ??= load(address)), words, limit);
}

async function load(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`${address} answered ${answer.status}`);
  return (await answer.json()).map((row) => ({ ...row, inLabel: fold(row.label), inTokens: fold(row.tokens) }));
}

const fold = (text) => text.normalize("NFC").toLowerCase();

/** A term counts by its rarity, at the start of a word, in a label four times what it does in a token. */
function lookUp(rows, words, limit) {
  const terms = [...new Set(fold(words).split(/\s+/).filter(Boolean))].slice(0, 16), scores = new Map();
  for (const term of terms) {
    const start = new RegExp(`(?<![\\p{L}\\p{N}])${term.replace(/[\\^$.*+?()[\]{}|/-]/g, "\\$&")}`, "u");
    const found = rows.map((row) => [row, start.test(row.inLabel) * 4 + start.test(row.inTokens)]).filter(([, weight]) => weight);
    const rarity = Math.log(1 + (rows.length - found.length + 0.5) / (found.length + 0.5));
    for (const [row, weight] of found) scores.set(row, (scores.get(row) ?? 0) + weight * rarity);
  }
  const hits = [...scores].map(([row, score]) => ({ ...row, score }));
  return hits.sort((a, b) => b.score - a.score || a.feature - b.feature).slice(0, limit);
}
