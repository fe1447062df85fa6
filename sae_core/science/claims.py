"""The papers' findings as a table: claim, their number, ours, the control, the interval, and the verdict."""

from collections.abc import Iterator
from operator import attrgetter
from typing import Literal, NamedTuple

import numpy as np

from sae_core.science.coverage import logistic
from sae_core.science.findings import Findings, Letters
from sae_core.science.formal import Found
from sae_core.science.kinship import share_interval
from sae_core.science.neurons import UNALIKE
from sae_core.science.reading import difference
from sae_core.science.scaling import Scaling
from sae_core.science.specificity import Rated

LEAST_CONCEPTS = 30
"""With fewer no curve can be told from another."""
LEAST_LETTERS = 5
LETTER_F1 = 0.3
"""How well main features must tell letters, on average, for their silence to mean anything."""

Verdict = Literal["holds", "does not", "cannot tell at this size"]
UNTOLD: Verdict = "cannot tell at this size"


class Claim(NamedTuple):
    """One row of the table."""

    claim: str
    paper: str
    ours: str
    control: str
    interval: str
    verdict: Verdict


def claims(found: Findings) -> Iterator[Claim]:
    """The rows of the table."""
    yield from _scaling_claims(found.scaling)
    yield from _seed_claims(found)
    yield from _splitting_claims(found)
    yield from _letter_claims(found.letters)
    yield from _coverage_claims(found)
    yield from _neuron_claims(found)
    yield from _control_claims(found)
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
    yield from map(_formal_claim, found.formal)
    if found.rated:
        yield _rated_claim(found.rated)


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


def _seed_claims(found: Findings) -> Iterator[Claim]:
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
    tokens = found.scaling.settings.tokens
    for one in found.by_architecture:
        same = one.same
        found_again = same.low > same.shared_random and same.correlation > same.correlation_random
        yield Claim(
            f"two seeds of {one.architecture} share features, after {tokens[len(tokens) // 2]:,} activations",
            "less of TopK than of ReLU (Llama-3-8B)",
            f"{same.shared:.0%} of {found.twins} at an L0 of {one.l0:.0f}, {one.live:.0%} live; median correlation "
            f"{same.correlation:.2f}",
            f"random directions {same.shared_random:.0%}, {same.correlation_random:.2f}",
            f"{same.low:.0%} to {same.high:.0%}", "holds" if found_again else "does not",
        )  # fmt: skip


def _splitting_claims(found: Findings) -> Iterator[Claim]:
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


def _letter_claims(letters: Letters) -> Iterator[Claim]:
    *dictionaries, random = letters.found
    told = dictionaries[0].letters
    chance = np.nanmean(letters.told_by_chance.f1) if (~np.isnan(letters.told_by_chance.f1)).any() else 0.0
    for one in dictionaries:
        low, high = share_interval(np.arange(one.places) < round(one.rate * one.places))
        enough = told >= LEAST_LETTERS and one.f1 >= LETTER_F1
        yield Claim(
            f"a feature of a first letter is silent where another one absorbed it: {one.name}",
            "size and sparsity do not cure it; 25% of the places (Pythia-70M, TopK)",
            f"{one.rate:.1%} of {one.places} places; {told} letters that a probe tells, their {one.main:.1f} main "
            f"features with F1 {one.f1:.2f}",
            f"random directions {random.rate:.1%}, F1 {random.f1:.2f}; probe of letters dealt anew F1 {chance:.2f}",
            f"{low:.1%} to {high:.1%}" if one.places else "-",
            UNTOLD if not enough else "holds" if low > random.rate else "does not",
        )  # fmt: skip


def _neuron_claims(found: Findings) -> Iterator[Claim]:
    if not (bases := found.bases):
        return
    features, random, shuffled = bases.alike
    unlike = features.neuron <= UNALIKE
    low, high = share_interval(unlike)
    share, by_chance = float((random.neuron <= UNALIKE).mean()), float((shuffled.neuron <= UNALIKE).mean())
    yield Claim(
        f"features are not neurons: none of the layers up to the site has a correlation above {UNALIKE}", "82%",
        f"{unlike.mean():.0%} of {len(unlike)} features, {bases.neurons:,} neurons of {bases.layers} layers, "
        f"{bases.tokens:,} tokens; median of the largest {np.median(features.neuron):.2f}",
        f"random directions {share:.0%}, features on other tokens {by_chance:.0%}", f"{low:.0%} to {high:.0%}",
        "holds" if low > 0.5 else "does not",
    )  # fmt: skip
    unlike = features.coordinate <= UNALIKE
    low, high = share_interval(unlike)
    yield Claim(
        f"nor are they coordinates of the residual stream: none has a correlation above {UNALIKE}",
        "no strong correlation", f"{unlike.mean():.0%}; median of the largest {np.median(features.coordinate):.2f}",
        f"random directions {(random.coordinate <= UNALIKE).mean():.0%}", f"{low:.0%} to {high:.0%}",
        "holds" if low > 0.5 else "does not",
    )  # fmt: skip
    ours, neurons, *others = bases.readings
    yield Claim(
        "features are more than single tokens", "a control: random models have more single-token features",
        f"{ours.single_token:.0%} of {ours.name} have one token in all 20 strongest",
        ", ".join(f"{one.name} {one.single_token:.0%}" for one in (neurons, *others)), "-",
        "holds" if ours.single_token < 0.5 else "does not",
    )  # fmt: skip
    gain, low, high = difference(ours.scores(), neurons.scores())
    yield Claim(
        "features are easier to name than neurons (three tokens as the name)",
        "rubric: median 12 of 14 and 0; names by a language model: 'significantly' better",
        f"balanced accuracy {_mean(ours.scores()):.2f} of {ours.name}, {_mean(neurons.scores()):.2f} of neurons; of "
        f"those that are no single token {_mean(ours.scores(False)):.2f} and {_mean(neurons.scores(False)):.2f}",
        ", ".join(f"{one.name} {_mean(one.scores()):.2f}" for one in others)
        + f"; another feature's name {_mean(ours.control[~np.isnan(ours.control)]):.2f}",
        f"{gain:+.2f} ({low:+.2f} to {high:+.2f})",
        UNTOLD if np.isnan(gain) else "holds" if low > 0 else "does not",
    )  # fmt: skip


def _control_claims(found: Findings) -> Iterator[Claim]:
    if not (control := found.control):
        return
    trained, shuffled = control.trained, control.shuffled
    gain, low, high = difference(trained.single.astype(float), shuffled.single.astype(float))
    yield Claim(
        f"a model with shuffled weights has more single-token features: {trained.name}", "it does, and names fit it",
        f"{trained.single_token:.0%} of {len(trained.single)} of the trained model",
        f"{shuffled.single_token:.0%} of {len(shuffled.single)} of the shuffled one",
        f"{-gain:+.2f} ({-high:+.2f} to {-low:+.2f})",
        UNTOLD if np.isnan(gain) else "holds" if high < 0 else "does not",
    )  # fmt: skip
    for single, which in ((None, "all"), (True, "single-token features"), (False, "the others")):
        one, other = trained.scores(single), shuffled.scores(single)
        gain, low, high = difference(one, other)
        yield Claim(
            f"names made of tokens fit features of the trained model better than of the shuffled one: {which}",
            "not unless single-token features are set apart",
            f"balanced accuracy {_mean(one):.2f} ({len(one)})", f"{_mean(other):.2f} ({len(other)})",
            f"{gain:+.2f} ({low:+.2f} to {high:+.2f})",
            UNTOLD if np.isnan(gain) else "holds" if low > 0 else "does not",
        )  # fmt: skip
    yield Claim(
        "a dictionary reconstructs the trained model no better than the shuffled one",
        "similar in many settings (Pythia)", f"FVU {control.fvu[0]:.3f}", f"{control.fvu[1]:.3f}", "-",
        "holds" if control.fvu[1] <= 1.1 * control.fvu[0] else "does not",
    )  # fmt: skip


def _formal_claim(found: Found) -> Claim:
    ours, control = found.features, found.random
    claim = f"a feature follows the log-likelihood ratio of {found.kind.name}, by its alphabet"
    if ours is None or control is None:
        return Claim(claim, found.kind.paper, f"{found.tokens} tokens of it in the text", "-", "-", UNTOLD)
    return Claim(
        claim, found.kind.paper,
        f"r {ours.correlation:.2f}; {ours.by_level[0]:.0%} to {ours.by_level[-1]:.0%} of its firings by quintile "
        f"(of all tokens {ours.share:.2%})",
        f"best random direction r {control.correlation:.2f}", "-",
        "holds" if ours.correlation >= 0.5 and ours.by_level[-1] > ours.by_level[0] else "does not",
    )  # fmt: skip


def _rated_claim(found: Rated) -> Claim:
    asked = ~np.isnan(found.levels)
    levels = [float(found.levels[asked[:, i], i].mean()) for i in range(found.levels.shape[1]) if asked[:, i].any()]
    both = found.levels[asked[:, 0] & asked[:, -1]] if found.levels.size else found.levels
    gain, low, high = difference(both[:, -1], both[:, 0]) if len(both) else 3 * (float("nan"),)
    return Claim(
        "a feature's name is the more specific the more strongly it fires (0 to 3)",
        "3 at the top of most, less at low activation",
        f"{', '.join(f'{level:.2f}' for level in levels)} from the lowest fifth of the range to the highest, "
        f"{len(found.levels)} features, by {found.judge}",
        f"another feature's name {_mean(found.shuffled[~np.isnan(found.shuffled)]):.2f}",
        f"{gain:+.2f} ({low:+.2f} to {high:+.2f})",
        UNTOLD if np.isnan(gain) else "holds" if low > 0 else "does not",
    )  # fmt: skip


def _mean(scores: np.ndarray) -> float:
    return float(scores.mean()) if len(scores) else float("nan")
