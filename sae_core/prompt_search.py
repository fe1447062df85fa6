"""Features on purpose: by one prompt, by two sets of prompts that they tell apart, or by a direction.

What a search finds among thousands of features is partly luck. So features are chosen on one half of the prompts
(`find`) and judged on the other (`test`), chances are corrected for the number of features tried, and with fewer
prompts than `CLAIM_PROMPTS` a side nothing is claimed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse

from sae_core.atlas import Atlas
from sae_core.progress import Report, silent
from sae_core.prompt_reader import Pooled, PromptError, PromptReader
from sae_core.separation import auc, effect_sizes, interval, p_values

CLAIM_PROMPTS = 40
"""Test prompts a side without which nothing is claimed: at an AUC of 0.9, 40 of each give it to about 0.07."""
ALPHA = 0.05
Pool = Literal["max", "mean"]
POOLS: tuple[Pool, Pool] = ("max", "mean")


@dataclass(frozen=True)
class PromptSets:
    """Positives and negatives, each split into those that find and those that test."""

    find: tuple[list[str], list[str]]
    """Positives and negatives."""
    test: tuple[list[str], list[str]]
    duplicates: int = 0
    """Prompts that were taken out because they occur twice, or in both splits, or on both sides."""

    @property
    def texts(self) -> list[str]:
        """All of them: positives and negatives that find, then those that test."""
        return [*self.find[0], *self.find[1], *self.test[0], *self.test[1]]

    @property
    def places(self) -> list[np.ndarray]:
        """Where each of these four begins and ends among `texts`: its rows."""
        ends = np.cumsum([0, *map(len, (*self.find, *self.test))])
        return [np.arange(a, b) for a, b in pairwise(ends)]

    @property
    def why_no_claim(self) -> str:
        """Why nothing can be claimed of what these find; empty when something can."""
        least = min(len(side) for split in (self.find, self.test) for side in split)
        if least >= CLAIM_PROMPTS:
            return ""
        return f"no claim: {least} prompts on the smallest side; a claim needs {CLAIM_PROMPTS} a side to find and test"


@dataclass(frozen=True, slots=True)
class Separating:
    """A feature, and how well it tells the positives from the negatives."""

    feature: int
    label: str
    pool: Pool
    """Over tokens: the largest value, or the mean."""
    find_auc: float
    p: float
    """Chance of `find_auc` without a difference, corrected for all features and both pools."""
    effect: float
    """Cohen's d on the find prompts."""
    active: tuple[float, float]
    """Share of the find positives, and of the find negatives, on which it fires at all."""
    auc: float | None
    """On the test prompts; None when there are none."""
    low: float | None
    high: float | None
    """Bootstrap interval of `auc`."""
    beats_control: bool | None = None
    """Whether the label did better than another feature's, see `LabelRow`; None: not scored."""


@dataclass(frozen=True)
class Contrast:
    """What a search by two sets found."""

    features: list[Separating]
    tried: int
    """Features and pools that were compared."""
    prompts: dict[str, int]
    duplicates: int
    windowed: int
    """Texts longer than the context, read in windows."""
    claim: str
    """In words, what was shown; or that nothing is claimed, and why."""
    exclusive: list[int] = field(default_factory=list)
    """Features active on all find positives and on no find negative."""


class Near(NamedTuple):
    """A feature whose decoder row points along a direction."""

    feature: int
    label: str
    cosine: float
    beats_control: bool | None = None
    """Whether the label did better than another feature's, see `LabelRow`; None: not scored."""


class OnPrompt(NamedTuple):
    """A feature that fires on a prompt."""

    feature: int
    label: str
    value: float
    """Its largest value."""
    of_max: float
    """That, as a share of its largest over the corpus."""
    density: float
    """How often it fires on the corpus."""
    beats_control: bool | None = None
    """Whether the label did better than another feature's, see `LabelRow`; None: not scored."""


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; of JSONL, the string or the `text` of each line.

    Raises:
        PromptError: the file is missing, no UTF-8, no such JSON, or holds no prompt.
    """
    try:
        lines = [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise PromptError(f"{path} is not UTF-8 (byte {byte:#04x} at {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise PromptError(f"cannot read {path}: {error.strerror}") from None
    if path.suffix == ".jsonl":
        lines = [_text_of(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    if not lines:
        raise PromptError(f"{path} holds no prompt: give one a line")
    return lines


def split_prompts(positive: Sequence[str], negative: Sequence[str], seed: int = 0) -> PromptSets:
    """Each side without duplicates, its halves in a random order; too few to halve (fewer than 4) all go to `find`.

    Raises PromptError when a side is empty.
    """
    sides = {"positive": _unique(positive), "negative": _unique(negative)}
    both = set(sides["positive"]) & set(sides["negative"])
    kept = [[text for text in side if text not in both] for side in sides.values()]
    for (name, given), side in zip(sides.items(), kept, strict=True):
        if not side:
            why = f"all {len(given)} are on both sides" if given else "there is none"
            raise PromptError(f"no {name} prompts ({why}): a contrast needs both sides")
    rng = np.random.default_rng(seed)
    mixed = [[side[i] for i in rng.permutation(len(side))] for side in kept]
    halves = [len(side) if len(side) < 4 else (len(side) + 1) // 2 for side in mixed]
    removed = len(positive) + len(negative) - sum(map(len, kept))
    find, test = ([side[a:b] for side, a, b in _cuts(mixed, halves, late)] for late in (False, True))
    if not all(test):
        find, test = mixed, [[], []]
    return PromptSets((find[0], find[1]), (test[0], test[1]), removed)


def contrast(
    atlas: Atlas, reader: PromptReader, sets: PromptSets, limit: int = 10, report: Report = silent
) -> Contrast:
    """The features that best tell positives from negatives, chosen on `find`, judged on `test`.

    Raises PromptError when a side is empty, or a text holds no token.
    """
    if not all(sets.find):
        raise PromptError("a contrast needs positive and negative prompts: one side is empty")
    return contrast_of(atlas, sets, reader.pool(sets.texts, report), limit)


def contrast_of(atlas: Atlas, sets: PromptSets, pooled: Pooled, limit: int = 10) -> Contrast:
    """The same of texts that were read already: `pooled` holds a row for each of `sets.texts`."""
    p, n, test_p, test_n = map(pooled.rows, sets.places)
    features = best_features(p, n, test_p, test_n, limit, atlas)
    exclusive = np.flatnonzero(((p.max > 0).sum(0) == len(sets.find[0])) & ((n.max > 0).sum(0) == 0))
    kinds = ("find_positive", "find_negative", "test_positive", "test_negative")
    prompts = dict(zip(kinds, map(len, sets.places), strict=True))
    tried = len(POOLS) * pooled.max.shape[1]
    claim = sets.why_no_claim or _claim(features)
    return Contrast(features, tried, prompts, sets.duplicates, pooled.n_windowed, claim, exclusive.tolist())


def best_features(
    positive: Pooled, negative: Pooled, test_positive: Pooled, test_negative: Pooled, limit: int,
    atlas: Atlas | None = None, groups: tuple[np.ndarray, np.ndarray] | None = None,
) -> list[Separating]:  # fmt: skip
    """The features with the best AUC on the find prompts (ties: larger effect), each with its better pool.

    `atlas` names them. `groups` are the test prompts' groups; see `separation.interval`.
    """
    d_sae = positive.max.shape[1]
    live = np.flatnonzero(np.bincount(positive.max.indices, minlength=d_sae))  # silent on positives: AUC of 0.5 at most
    found = {pool: _dense(getattr(positive, pool), getattr(negative, pool), live) for pool in POOLS}
    score = np.stack([auc(*found[pool]) for pool in found])
    effect = np.stack([effect_sizes(*found[pool]) for pool in found])
    better = np.lexsort((effect, score), axis=0)[-1]
    columns = np.arange(len(live))
    order = np.lexsort((live, -effect[better, columns], -score[better, columns]))[:limit]
    rows = []
    for column in order.tolist():
        pool = POOLS[better[column]]
        feature = int(live[column])
        p, n = (side[:, [column]] for side in found[pool])
        test = [getattr(side, pool)[:, [feature]].toarray()[:, 0] for side in (test_positive, test_negative)]
        judged = all(map(len, test))
        low, high = interval(test[0], test[1], groups) if judged else (None, None)
        rows.append(
            Separating(
                feature, atlas.name(feature) if atlas else "", pool, float(score[better[column], column]),
                float(p_values(p, n, 2 * d_sae)[0]), float(effect[better[column], column]),
                (float((p > 0).mean()), float((n > 0).mean())),
                float(auc(test[0][:, None], test[1][:, None])[0]) if judged else None, low, high,
                atlas.beats_control(feature) if atlas else None,
            )
        )  # fmt: skip
    return rows


def by_prompt(atlas: Atlas, reader: PromptReader, text: str, limit: int = 10) -> list[OnPrompt]:
    """The features that fire on one prompt: those close to their own maximum, and rare on the corpus, first.

    Ranked by (share of the corpus maximum) * -log10(density). Raises PromptError when the text holds no token.
    """
    row = reader.pool([text]).max
    table = atlas.features.table()
    most, density = (table[name].to_numpy()[row.indices] for name in ("max_act", "density"))
    share = np.divide(row.data, most, out=np.zeros(len(row.data)), where=most > 0)
    best = np.argsort(-share * -np.log10(np.maximum(density, 1e-9)), kind="stable")[:limit]
    return [
        OnPrompt(feature, atlas.name(feature), float(row.data[i]), float(share[i]), float(density[i]),
                 atlas.beats_control(feature))
        for i, feature in zip(best.tolist(), row.indices[best].tolist(), strict=True)
    ]  # fmt: skip


def direction(
    positive: Float[np.ndarray, "p d_model"], negative: Float[np.ndarray, "n d_model"],
    kind: Literal["difference", "probe"] = "difference",
) -> Float[np.ndarray, " d_model"]:  # fmt: skip
    """A direction from negatives to positives, of mean activations: the difference of means, or a linear probe's."""
    if kind == "difference":
        return positive.mean(0) - negative.mean(0)
    from sae_core.safety.baselines import fit_probe

    return fit_probe(positive, negative).direction


def nearest(atlas: Atlas, reader: PromptReader, towards: Float[np.ndarray, " d_model"], limit: int = 10) -> list[Near]:
    """The features whose decoder rows point most along a direction. Raises PromptError when it has no length."""
    length = float(np.linalg.norm(towards))
    if not length > 0 or not np.isfinite(length):
        raise PromptError("the direction has no length: the two sets have the same mean")
    cosine = reader.dictionary.W_dec.cpu() @ torch.from_numpy(np.asarray(towards / length, np.float32))
    values, features = cosine.topk(min(limit, len(cosine)))
    found = zip(features.tolist(), values.tolist(), strict=True)
    return [Near(i, atlas.name(i), v, atlas.beats_control(i)) for i, v in found]


def _claim(features: list[Separating]) -> str:
    best = features[0] if features else None
    if best is None or best.low is None or best.p > ALPHA:
        return "nothing was found: no feature tells the find prompts apart beyond chance, given how many were tried"
    if best.low <= 0.5:
        return f"feature {best.feature} told the find prompts apart, and not the test prompts: it was luck"
    return (
        f"feature {best.feature} tells unseen prompts of these two kinds apart, with an AUC of {best.auc:.2f} "
        f"({best.low:.2f} to {best.high:.2f}); whether it stands for what you mean, its examples show, not this number"
    )


def _dense(
    positive: sparse.csr_array, negative: sparse.csr_array, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    return positive[:, columns].toarray(), negative[:, columns].toarray()


def _cuts(sides: list[list[str]], halves: list[int], late: bool) -> list[tuple[list[str], int, int]]:
    return [(s, h if late else 0, len(s) if late else h) for s, h in zip(sides, halves, strict=True)]


def _unique(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(text.strip() for text in texts if text.strip()))


def _text_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError:
        raise PromptError(f"{where} is not JSON: write one object or string a line") from None
    text = row.get("text") if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise PromptError(f'{where} holds no text: write {{"text": "..."}} or a string')
    return text
