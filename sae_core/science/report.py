"""The papers' findings as a table: claim, their number, ours, the control, the interval, and the verdict."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from sae_core.activations import Activations
from sae_core.artifacts import SCRATCH
from sae_core.corpus import Corpus
from sae_core.dictionary import Dictionary
from sae_core.display import display_strings
from sae_core.progress import Report, silent
from sae_core.science.coverage import (
    BREAK_EVEN,
    Concept,
    Logistic,
    Proxy,
    best_feature,
    concept_lists,
    kinds_of_text,
    likelihood_ratio,
    logistic,
    occurrences,
    proxy,
)
from sae_core.science.firings import (
    Firings,
    Sample,
    principal_directions,
    random_directions,
    single_token,
    top_tokens,
)
from sae_core.science.kinship import Kin, Universality, kin, share_interval, tree, universality
from sae_core.science.scaling import REPORT as SWEEP
from sae_core.science.scaling import Scaling, held_out, train_sweep
from sae_core.study import ScienceSettings

REPORT, MARKDOWN, TREE = "science.json", "science.md", "tree.txt"

LEAST_CONCEPTS = 30
"""With fewer no curve can be told from another."""

Verdict = Literal["holds", "does not", "cannot tell at this size"]


class Claim(NamedTuple):
    """One row of the table."""

    claim: str
    paper: str
    ours: str
    control: str
    interval: str
    verdict: Verdict


class Covered(NamedTuple):
    """What one dictionary has features of."""

    name: str
    alive: int
    has: list[bool]
    """Of each concept."""
    fit: Logistic
    single_token: float
    """Share of its features whose strongest tokens are all the same."""


@dataclass(frozen=True)
class Findings:
    """Everything that the table and the pictures are made from."""

    scaling: Scaling
    universality: Universality
    twins: int
    """d_sae of the two seeds."""
    kin: list[Kin]
    kin_random: list[Kin]
    """The larger ones held against random directions in place of the smaller."""
    concepts: list[Concept]
    tokens: int
    """Of the sample."""
    covered: list[Covered]
    """Dictionaries, smallest first; then random directions, then principal ones."""
    proxies: list[tuple[Proxy, Proxy]]
    """Each kind of text: the largest dictionary's, and that of random directions."""
    family: list[str]
    """The largest families, as `kinship.tree` draws them."""

    @property
    def frequency(self) -> np.ndarray:
        """Of each concept, as a share of the tokens."""
        return np.array([len(concept.rows) for concept in self.concepts]) / self.tokens


def build_science(
    settings: ScienceSettings,
    scaling: Path,
    activations: Path,
    corpus: Path,
    tokenizer: Any,
    folder: Path,
    device: str = "cpu",
    report: Report = silent,
) -> dict[str, Any]:
    """Measure all claims on the sweep's dictionaries, and write `science.json`, `science.md` and `tree.txt`.

    Args:
        settings: how much of the text, and which size is trained a second time.
        scaling: folder of the site's finished sweep.
        activations: folder of the site's activations.
        corpus: folder of the text.
        tokenizer: the model's.
        folder: where to write.
        device: where the second seed is trained.
        report: told of its steps.

    Returns:
        How many claims hold, do not, and cannot be told; and the main numbers.
    """
    found = measure_claims(settings, scaling, activations, corpus, tokenizer, folder / SCRATCH, device, report)
    rows = list(claims(found))
    (folder / REPORT).write_text(json.dumps(_as_json(rows, found)), "utf-8")
    (folder / TREE).write_text("\n".join(found.family) + "\n", "utf-8")
    (folder / MARKDOWN).write_text(markdown(rows, found), "utf-8")
    return {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("holds", "does not")} | {
        "cannot_tell": sum(row.verdict.startswith("cannot") for row in rows), "claims": len(rows),
        "twins_shared": found.universality.shared, "concepts": len(found.concepts),
    }  # fmt: skip


def _as_json(rows: Sequence[Claim], found: Findings) -> dict[str, Any]:
    """All that was found; `tree` has each feature of a larger dictionary and its parent, if it lies under one."""
    return {
        "claims": [row._asdict() for row in rows],
        "universality": found.universality._asdict(),
        "covered": [one._asdict() | {"fit": one.fit._asdict() | {"half": one.fit.half}} for one in found.covered],
        "proxies": [[one._asdict() for one in pair] for pair in found.proxies],
        "concepts": [(concept.kind, concept.name, len(concept.rows)) for concept in found.concepts],
        "tokens": found.tokens,
        "tree": [row for level in found.kin for row in level.rows()],
    }


def measure_claims(
    settings: ScienceSettings,
    scaling: Path,
    activations: Path,
    corpus: Path,
    tokenizer: Any,
    scratch: Path,
    device: str,
    report: Report,
) -> Findings:
    """The numbers; arguments as of `build_science`."""
    swept = Scaling.open(scaling / SWEEP)
    sizes = swept.settings.d_sae
    dictionaries = {d_sae: Dictionary.load(scaling / f"w{d_sae}") for d_sae in sizes}
    sample, blocks = Sample.of(activations, settings.tokens), Corpus.open(corpus).train
    firings = {d_sae: Firings.of(dictionary, sample) for d_sae, dictionary in dictionaries.items()}
    strings = display_strings(tokenizer, int(max(blocks.token_ids.max() + 1, len(tokenizer))))

    twins = settings.twins if settings.twins in sizes else sizes[-2]
    other = _second_seed(swept, twins, activations, scratch, device, report)
    random = {d_sae: random_directions(one, sample, settings.seed) for d_sae, one in dictionaries.items()}
    random_firings = {d_sae: Firings.of(random[d_sae], sample) for d_sae in sizes}
    same = universality(
        dictionaries[twins], other, random[twins], (firings[twins], Firings.of(other, sample), random_firings[twins])
    )
    related = [kin(dictionaries[a], dictionaries[b], (firings[a], firings[b])) for a, b in pairwise(sizes)]
    by_chance = [kin(random[a], dictionaries[b], (random_firings[a], firings[b])) for a, b in pairwise(sizes)]

    concepts = occurrences(concept_lists(), sample, blocks, tokenizer, strings)
    principal = Firings.of(principal_directions(dictionaries[sizes[-1]], sample), sample)
    bases = {f"{d_sae} features": one for d_sae, one in firings.items()}
    bases |= {f"{sizes[-1]} random directions": random_firings[sizes[-1]], "principal directions": principal}
    covered = [_covered(name, one, concepts, sample) for name, one in bases.items()]

    proxies = []
    kinds = kinds_of_text(sample, blocks, Corpus.open(corpus).documents(), settings.kind_least)
    for kind, inside in kinds:
        ratio = likelihood_ratio(inside, sample, blocks, len(strings))
        of_features, of_chance = (proxy(kind, inside, ratio, f[sizes[-1]]) for f in (firings, random_firings))
        proxies.append((of_features, of_chance))
    names = {d: [" ".join(top_tokens(f, i, sample, strings)[:4]) for i in range(d)] for d, f in firings.items()}
    family = tree(related, names, settings.families)
    return Findings(swept, same, twins, related, by_chance, concepts, len(sample.token), covered, proxies, family)


def _second_seed(
    swept: Scaling, d_sae: int, activations: Path, scratch: Path, device: str, report: Report
) -> Dictionary:
    """One of the sweep's longest runs again, from other initial weights and in another order of the batches."""
    run = max((run for run in swept.grid if run.d_sae == d_sae), key=lambda run: run.tokens)
    changes = {"d_sae": d_sae, "tokens": run.tokens, "lr": run.lr, "seed": swept.settings.seed + 1}
    wanted = swept.base.model_copy(update=changes)
    x = held_out(Activations.open(activations, "held_out", device), swept.settings.evaluation_tokens)
    ((_, _, dictionary),) = train_sweep([wanted], Activations.open(activations), x, scratch, device, report)
    return dictionary


def _covered(name: str, firings: Firings, concepts: Sequence[Concept], sample: Sample) -> Covered:
    has = [best_feature(concept.rows, firings)[1] >= BREAK_EVEN for concept in concepts]
    frequency = np.array([len(concept.rows) for concept in concepts]) / len(sample.token)
    single = list(single_token(firings, sample))
    fit = logistic(frequency, np.array(has, bool))
    return Covered(name, int((firings.counts > 0).sum()), has, fit, float(np.mean(single)) if single else 0.0)


def claims(found: Findings) -> Iterator[Claim]:
    """The rows of the table."""
    yield from _scaling_claims(found.scaling)
    yield from _kinship_claims(found)
    yield from _coverage_claims(found)
    for ours, control in found.proxies:
        rising = ours.by_level[-1] > ours.by_level[0]
        yield Claim(
            f"a feature follows the log-likelihood ratio of text of {ours.kind}, and more surely the stronger it fires",
            "Arabic: r 0.74; 25% to 98% of the tokens, weakest to strongest",
            f"r {ours.correlation:.2f}; {ours.by_level[0]:.0%} to {ours.by_level[-1]:.0%} by quintile "
            f"(of all tokens {ours.share:.1%})",
            f"best random direction r {control.correlation:.2f}", "-",
            "holds" if ours.correlation >= 0.5 and rising else "does not",
        )  # fmt: skip


def _scaling_claims(scaling: Scaling) -> Iterator[Claim]:
    loss = scaling.loss
    b = loss.interval(lambda law: law.exponent)
    floor = f", floor {loss.law.floor:.3f}" if loss.law.floor else ""
    yield Claim(
        "the loss at the best size falls as a power of compute", "approximately a power law",
        f"R^2 {loss.r2:.3f} over {len(scaling.frontier)} sizes of compute{floor}", "-", f"exponent {b}",
        "holds" if loss.r2 >= 0.95 else "does not",
    )  # fmt: skip
    if scaling.held_out:
        smaller, largest = scaling.held_out
        told = smaller.predict(largest.d_sae, largest.steps)
        error = told.value / largest.fvu - 1
        yield Claim(
            "small runs predict a large one", "settings of the large runs were chosen so",
            f"{largest.fvu:.4f} at 8 times the compute; foretold {told.value:.4f}, {error:+.1%}", "-",
            f"{told.low:.4f} to {told.high:.4f}", "holds" if abs(error) < 0.05 else "does not",
        )  # fmt: skip
    grows = {"d_sae": scaling.d_sae, "steps": scaling.steps}
    joint = {name: scaling.joint.interval(attrgetter(f"{name}_exponent")) for name in grows}
    for name, fit in grows.items():
        own = fit.interval(lambda law: law.exponent) if fit else None
        yield Claim(
            f"the best {name} grows as a power of compute", "approximately a power law",
            f"exponent {own.value:.2f}, R^2 {fit.r2:.2f}" if own and fit else "too few optima inside of the sweep",
            f"joint law {joint[name]}", f"{own.low:.2f} to {own.high:.2f}" if own else "-",
            "cannot tell at this size" if own is None else "holds" if own.low > 0 else "does not",
        )  # fmt: skip
    faster, slower = joint["d_sae"], joint["steps"]
    yield Claim(
        "the best d_sae grows faster with compute than the best number of steps", "somewhat faster; may change",
        f"exponents {faster.value:.2f} and {slower.value:.2f}, of the joint law", "-", f"d_sae {faster}",
        "holds" if faster.low > 0.5 else "does not" if faster.high < 0.5 else "cannot tell at this size",
    )  # fmt: skip
    rate = scaling.lr.interval(lambda law: law.exponent) if scaling.lr else None
    yield Claim(
        "the best learning rate falls as a power of compute", "approximately a power law",
        f"exponent {rate.value:.2f}, R^2 {scaling.lr.r2:.2f}" if rate and scaling.lr else "too few optima", "-",
        f"{rate.low:.2f} to {rate.high:.2f}" if rate else "-",
        "cannot tell at this size" if rate is None else "holds" if rate.high < 0 else "does not",
    )  # fmt: skip


def _kinship_claims(found: Findings) -> Iterator[Claim]:
    u = found.universality
    rare, middle, frequent = u.by_frequency
    yield Claim(
        "a feature of one seed is there in another (decoder cosine above 0.7)", "30% of 131,072 (Llama-3-8B, TopK)",
        f"{u.shared:.0%} of {found.twins}; {rare:.0%}, {middle:.0%} and {frequent:.0%} of the rarest, middle and most "
        "frequent third",
        f"random directions {u.shared_random:.0%}", f"{u.low:.0%} to {u.high:.0%}",
        "holds" if u.low > u.shared_random else "does not",
    )  # fmt: skip
    yield Claim(
        "activations of a feature correlate with one of another seed", "median of the largest 0.72",
        f"{u.correlation:.2f}", f"random directions of equal L0 {u.correlation_random:.2f}", "-",
        "holds" if u.correlation > 0.7 else "does not",
    )  # fmt: skip
    for real, chance in zip(found.kin, found.kin_random, strict=True):
        under, control = float(real.under.mean()), float(chance.under.mean())
        low, high = share_interval(real.under)
        most = max((len(c) for c in real.children().values()), default=0)
        yield Claim(
            f"features of {real.smaller} split into those of {real.larger}", "San Francisco: 1, 2, 11 features",
            f"{under:.0%} lie under one, at most {most} under the same; {real.new.mean():.0%} have no ancestor",
            f"random directions {control:.0%}", f"{low:.0%} to {high:.0%}",
            "holds" if low > control and most > 1 else "does not",
        )  # fmt: skip


def _coverage_claims(found: Findings) -> Iterator[Claim]:
    dictionaries, (random, principal) = found.covered[:-2], found.covered[-2:]
    frequency = found.frequency
    for one in dictionaries:
        share, n = np.array(one.has, bool), len(one.has)
        low, high = share_interval(share)
        enough = n >= LEAST_CONCEPTS and 5 <= share.sum() <= n - 5
        half = f"; half at frequency {one.fit.half:.1e}, {one.fit.half * one.alive:.1f} / (live features)"
        yield Claim(
            f"a concept has a feature when it is frequent enough: {one.name}",
            "sigmoid in log frequency; half at slightly below 1 / (live features)",
            f"{share.sum()} of {n} concepts{half if enough else ''}",
            f"random directions {sum(random.has)}, principal ones {sum(principal.has)}", f"{low:.0%} to {high:.0%}",
            "cannot tell at this size" if not enough else "holds" if one.fit.slope > 0 else "does not",
        )  # fmt: skip
    has = np.concatenate([np.array(one.has, bool) for one in dictionaries])
    plain = logistic(np.tile(frequency, len(dictionaries)), has)
    scaled = logistic(np.concatenate([frequency * one.alive for one in dictionaries]), has)
    enough = has.sum() >= LEAST_CONCEPTS
    yield Claim(
        "the curves of all sizes fall into one when frequency is scaled by live features", "they do",
        f"negative log-likelihood {scaled.loss:.3f}", f"unscaled {plain.loss:.3f}", "-",
        "cannot tell at this size" if not enough else "holds" if scaled.loss < plain.loss else "does not",
    )  # fmt: skip
    largest = dictionaries[-1]
    yield Claim(
        "features are more than single tokens", "a control: random models have more single-token features",
        f"{largest.single_token:.0%} of {largest.name} have one token in all 20 strongest",
        f"random directions {random.single_token:.0%}, principal ones {principal.single_token:.0%}", "-",
        "holds" if largest.single_token < 0.5 else "does not",
    )  # fmt: skip


def markdown(rows: Sequence[Claim], found: Findings) -> str:
    """The table, and the largest families."""
    lines = ["| claim | the paper | ours | control | 95% interval | verdict |", "|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]
    by_kind: Mapping[str, list[int]] = {}
    for number, concept in enumerate(found.concepts):
        by_kind = {**by_kind, concept.kind: [*by_kind.get(concept.kind, []), number]}
    lines += ["", "Concepts that have a feature, by kind:", "", "| | " + " | ".join(by_kind) + " |"]
    lines += ["|---|" + "---|" * len(by_kind)]
    for one in found.covered:
        cells = [f"{sum(one.has[i] for i in kind)} of {len(kind)}" for kind in by_kind.values()]
        lines.append(f"| {one.name} | " + " | ".join(cells) + " |")
    lines += ["", "The largest families: d_sae/feature, and the tokens among its 20 strongest.", "", "```"]
    return "\n".join([*lines, *found.family[:40], "```"]) + "\n"
