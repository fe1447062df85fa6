"""Which features fire on the same content in several languages, held against the same texts paired at random.

Three parallel texts: Bible verses of public-domain editions, the articles of the Universal Declaration of Human Rights,
and encyclopedia articles of the same title, which are no translations, in the languages that have them. A feature is
multilingual in so far as it fires on the same items in language after language: its score is the mean correlation, over
pairs of languages, of its values (largest over tokens) on the items. Shuffled items give the score that a feature has
which knows languages, lengths or names of nothing but itself.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from sae_core.atlas import Atlas
from sae_core.catalog import fetch_text
from sae_core.catalog_entries import TEXTS
from sae_core.corpus.parsers import articles, read_members, read_verses, summaries
from sae_core.errors import MindAtlasError
from sae_core.language_model import LanguageModel
from sae_core.progress import Report, silent
from sae_core.prompt_reader import PromptReader
from sae_core.study import MultilingualSettings

REPORT = "multilingual.json"
TABLE = "multilingual.parquet"
SHOWN = 12
"""Features of each parallel text that the report shows, with the items that each fires on."""
_CHARACTERS = 160
_SCHEMA = pa.schema({
    "parallel": pa.string(), "feature": pa.int64(), "label": pa.string(), "languages": pa.int64(),
    "same": pa.float64(), "same_shuffled": pa.float64(), "score": pa.float64(), "score_high": pa.float64(),
    "items": pa.list_(pa.int64()),
})  # fmt: skip


class MultilingualError(MindAtlasError):
    """Languages that there are no parallel texts of."""


class Parallel(NamedTuple):
    """The same items in several languages."""

    name: str
    languages: list[str]
    texts: list[list[str]]
    """By language, then item."""


@dataclass(frozen=True)
class MultilingualFeature:
    """A feature, and how far it follows content from language to language."""

    feature: int
    label: str
    languages: int
    """On how many it fires at all."""
    same: float
    """Share of the items on which it fires in at least the asked number of languages."""
    same_shuffled: float
    """The same, with items shuffled."""
    score: float
    """Mean correlation over pairs of languages."""
    score_high: float
    """The largest score of any feature in 95% of the shuffles: what luck gives the luckiest."""
    items: list[int]
    """The items on which it fires in the most languages."""


@dataclass(frozen=True)
class ParallelReport:
    """What one parallel text shows."""

    name: str
    languages: list[str]
    items: int
    similarity: float
    """Mean cosine of true pairs' feature vectors (largest values over tokens)."""
    similarity_shuffled: float
    retrieved: float
    """Share of items whose nearest item in another language, by features, is the same item; chance is 1 / items."""
    retrieved_raw: float
    """The same by mean raw activations, centered by language: the baseline."""
    by_pair: dict[str, float]
    """`retrieved` of each pair of languages."""
    n_tried: int
    """Features that fire on enough languages to be tried."""
    features: list[MultilingualFeature]
    """Those whose score no feature reaches in 95% of the shuffles, best first."""


def build_multilingual(
    settings: MultilingualSettings, atlas: Atlas, lm: LanguageModel, folder: Path, report: Report = silent
) -> dict[str, Any]:
    """Write `multilingual.json`, `.parquet` and `.md`; returns the numbers. Raises MultilingualError, CatalogError."""
    return report_on(parallel_texts(settings), settings, atlas, PromptReader.of(atlas, lm), folder, report)


def report_on(
    texts: Sequence[Parallel], settings: MultilingualSettings, atlas: Atlas, reader: PromptReader, folder: Path,
    report: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """The same of given texts."""
    found = [compare(settings, parallel, reader, atlas, report) for parallel in texts]
    shown = [_as_json(f, parallel, reader) for f, parallel in zip(found, texts, strict=True)]
    (folder / REPORT).write_text(json.dumps(shown, ensure_ascii=False), "utf-8")
    rows = [{"parallel": f.name, **_fields(feature)} for f in found for feature in f.features]
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), folder / TABLE)
    (folder / "multilingual.md").write_text(markdown(found, texts, atlas.dictionary), "utf-8")
    gain = min(f.similarity - f.similarity_shuffled for f in found)
    counted = {f"{f.name}_features": len(f.features) for f in found}
    return counted | {f"{f.name}_retrieved": f.retrieved for f in found} | {"similarity_gain": gain}


def parallel_texts(settings: MultilingualSettings) -> list[Parallel]:
    """Verses, articles and encyclopedia leads in the languages asked for, each of at most 160 characters.

    Raises MultilingualError for a language without both, or fewer than two.
    """
    languages = list(dict.fromkeys(settings.languages))
    known = sorted({name[6:] for name in TEXTS if name.startswith("bible-")} & {
        name[5:] for name in TEXTS if name.startswith("udhr-")
    })  # fmt: skip
    if unknown := [language for language in languages if language not in known]:
        raise MultilingualError(f"multilingual.languages: {unknown[0]!r} is none of {', '.join(known)}")
    if len(languages) < max(2, settings.least_languages):
        raise MultilingualError(
            f"multilingual.languages: {len(languages)} are fewer than least_languages = {settings.least_languages}"
        )
    editions = {language: str(TEXTS[f"bible-{language}"].options["edition"]) for language in languages}
    bible = TEXTS["bible-en"]
    verses = read_verses(read_members(fetch_text(bible), bible.members), list(editions.values()))
    fit = [v for v in verses.values() if all(20 <= len(text) <= _CHARACTERS for text in v.values())]
    chosen = np.sort(np.random.default_rng(settings.seed).permutation(len(fit))[: settings.verses])
    by_language = [[fit[i][edition] for i in chosen] for edition in editions.values()]
    declared = [_articles(language) for language in languages]
    shortest = min(map(len, declared))
    return [
        Parallel("verses", languages, by_language),
        Parallel("declaration", languages, [texts[:shortest] for texts in declared]),
        *_leads([language for language in languages if f"wiki-{language}" in TEXTS], settings),
    ]


def _articles(language: str) -> list[str]:
    entry = TEXTS[f"udhr-{language}"]
    return [text[:_CHARACTERS] for _, text in articles(read_members(fetch_text(entry), entry.members))]


def _leads(languages: list[str], settings: MultilingualSettings) -> list[Parallel]:
    """How articles begin whose title (mostly a name) is the same in all languages; nothing of one language."""
    if len(languages) < 2:
        return []
    entries = [TEXTS[f"wiki-{language}"] for language in languages]
    leads = [dict(summaries(read_members(fetch_text(entry), entry.members))) for entry in entries]
    titles = sorted(set.intersection(*map(set, leads)))
    chosen = np.sort(np.random.default_rng(settings.seed).permutation(len(titles))[: settings.articles])
    return [Parallel("encyclopedia", languages, [[lead[titles[i]][:_CHARACTERS] for i in chosen] for lead in leads])]


def compare(
    settings: MultilingualSettings, parallel: Parallel, reader: PromptReader, atlas: Atlas, report: Report = silent
) -> ParallelReport:
    """Features and similarities over one parallel text."""
    n = len(parallel.texts[0])
    pooled = reader.pool([text for texts in parallel.texts for text in texts], report)
    languages = len(parallel.languages)
    least = min(settings.least_languages, languages)
    fires_on = np.array([
        np.bincount(pooled.max[i * n : (i + 1) * n].indices, minlength=reader.dictionary.d_sae) > 0
        for i in range(languages)
    ]).sum(0)  # fmt: skip
    tried = np.flatnonzero(fires_on >= least)
    values = pooled.max[:, tried].toarray().reshape(languages, n, len(tried))
    rng = np.random.default_rng(settings.seed)
    true, same = scores(values), shared(values, least)
    luckiest, by_chance = [], np.zeros(len(tried))
    for _ in range(settings.shuffles):
        mixed = np.stack([language[rng.permutation(n)] for language in values])
        luckiest.append(float(scores(mixed).max(initial=0)))
        by_chance += shared(mixed, least) / settings.shuffles
    high = float(np.quantile(luckiest, 0.95))
    order = [i for i in np.argsort(-true, kind="stable").tolist() if true[i] > high]
    fires = (values > 0).sum(0)
    features = [
        MultilingualFeature(
            int(tried[i]), atlas.shown(int(tried[i])), int(fires_on[tried[i]]), float(same[i]), float(by_chance[i]),
            float(true[i]), high, np.argsort(-fires[:, i], kind="stable")[:3].tolist(),
        )
        for i in order
    ]  # fmt: skip
    vectors = pooled.max.toarray().reshape(languages, n, -1)
    raw = pooled.raw.reshape(languages, n, -1)
    raw = raw - raw.mean(1, keepdims=True)
    by_pair = {
        f"{parallel.languages[a]}-{parallel.languages[b]}": retrieved(vectors[a], vectors[b])
        for a, b in combinations(range(languages), 2)
    }
    pairs = list(combinations(range(languages), 2))
    similar = np.array([_similarity(vectors[a], vectors[b]) for a, b in pairs]).mean(0)
    found_raw = float(np.mean([retrieved(raw[a], raw[b]) for a, b in pairs]))
    found = float(np.mean(list(by_pair.values())))
    true_pairs, shuffled = similar.tolist()
    return ParallelReport(
        parallel.name, parallel.languages, n, true_pairs, shuffled, found, found_raw, by_pair, len(tried), features
    )


def scores(values: Float[np.ndarray, "languages items features"]) -> Float[np.ndarray, " features"]:
    """Mean over pairs of languages of the correlation over items; 0 with a language on which a feature never varies."""
    centered = values - values.mean(1, keepdims=True)
    norm = np.linalg.norm(centered, axis=1, keepdims=True)
    unit = np.divide(centered, norm, out=np.zeros_like(centered), where=norm > 0)
    total = unit.sum(0)
    count = len(values)
    own = (unit**2).sum((0, 1))
    return ((total**2).sum(0) - own) / (count * (count - 1))  # |sum of units|^2 holds each pair twice, and each alone


def shared(values: Float[np.ndarray, "languages items features"], least: int) -> Float[np.ndarray, " features"]:
    """Share of the items on which a feature fires in at least `least` languages."""
    return ((values > 0).sum(0) >= least).mean(0)


def retrieved(a: Float[np.ndarray, "items d"], b: Float[np.ndarray, "items d"]) -> float:
    """Share of the items whose nearest by cosine on the other side is itself, both ways."""
    cosine = _unit(a) @ _unit(b).T
    n = np.arange(len(a))
    return float(((cosine.argmax(1) == n).mean() + (cosine.argmax(0) == n).mean()) / 2)


def _similarity(a: Float[np.ndarray, "items d"], b: Float[np.ndarray, "items d"]) -> tuple[float, float]:
    """Mean cosine of true pairs, and of all other pairs (every shuffle's mean)."""
    cosine = _unit(a) @ _unit(b).T
    n = len(a)
    true = float(np.trace(cosine)) / n
    return true, (float(cosine.sum()) - true * n) / (n * (n - 1))


def _unit(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)


def _fields(feature: MultilingualFeature) -> dict[str, Any]:
    return {name: getattr(feature, name) for name in MultilingualFeature.__dataclass_fields__}


def _as_json(found: ParallelReport, parallel: Parallel, reader: PromptReader) -> dict[str, Any]:
    """The report; and, of the best features, the items that each fires on, in all languages, token by token."""
    features = [_fields(f) | {"examples": []} for f in found.features]
    shown = found.features[:SHOWN]
    items = sorted({item for f in shown for item in f.items})
    read = {
        (language, item): reader.on_tokens(texts[item], [f.feature for f in shown])
        for language, texts in zip(parallel.languages, parallel.texts, strict=True) for item in items
    }  # fmt: skip
    for column, feature in enumerate(shown):
        features[column]["examples"] = [
            [_example(language, *read[language, item], column) for language in parallel.languages]
            for item in feature.items
        ]
    return {name: getattr(found, name) for name in ParallelReport.__dataclass_fields__} | {"features": features}


def _example(language: str, tokens: list[str], values: np.ndarray, column: int) -> dict[str, Any]:
    return {"language": language, "tokens": tokens, "acts": values[:, column].round(4).tolist()}


def markdown(reports: Sequence[ParallelReport], texts: Sequence[Parallel], dictionary: str) -> str:
    """The numbers, and the best features with a text that each fires on."""
    lines = [
        f"`{dictionary}`\n",
        "| text | languages | items | similarity of true pairs | of shuffled | found again by features | by raw means "
        "| chance | features tried | beyond luck |",
        "|" + " --- |" * 10,
    ]
    for r in reports:
        lines.append(
            f"| {r.name} | {' '.join(r.languages)} | {r.items} | {r.similarity:.3f} | {r.similarity_shuffled:.3f} | "
            f"{r.retrieved:.1%} | {r.retrieved_raw:.1%} | {1 / r.items:.1%} | {r.n_tried} | {len(r.features)} |"
        )
    for r, parallel in zip(reports, texts, strict=True):
        pairs = sorted(r.by_pair.items(), key=lambda pair: -pair[1])
        lines += ["", f"### {r.name}\n", "Found again, by pair: " + ", ".join(f"{k} {v:.0%}" for k, v in pairs) + ".\n"]
        lines += [
            "| feature | label | languages | items shared (shuffled) | score (luckiest of shuffles) | fires on |",
            "|" + " --- |" * 6,
        ]
        for f in r.features[:SHOWN]:
            text = parallel.texts[0][f.items[0]][:90].replace("|", "\\|").replace("\n", " ")
            label = f.label.replace("|", "\\|")
            lines.append(
                f"| {f.feature} | {label} | {f.languages} | {f.same:.0%} ({f.same_shuffled:.0%}) | "
                f"{f.score:.2f} ({f.score_high:.2f}) | {text} |"
            )
    return "\n".join([*lines, ""])
