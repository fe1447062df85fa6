"""Two seeds of one dictionary, by architecture: how much of what one finds the other finds, too."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sae_core.activations import Activations
from sae_core.dictionary import Dictionary
from sae_core.progress import Report, silent
from sae_core.science.firings import Firings, Sample, random_directions
from sae_core.science.kinship import Universality, universality
from sae_core.science.scaling import train_all
from sae_core.study import PENALIZED, Architecture, DictionarySettings
from sae_core.training import at_l0


class Twins(NamedTuple):
    """Two seeds of one architecture."""

    architecture: Architecture
    l0: float
    """Of the first one, on the sample."""
    live: float
    """Share of its features that fire there."""
    same: Universality


def by_architecture(
    architectures: Sequence[Architecture], base: DictionarySettings, activations: Path, sample: Sample, scratch: Path,
    device: str = "cpu", report: Report = silent, seed: int = 0,
) -> list[Twins]:  # fmt: skip
    """Train two seeds of each, those of one seed from shared reads, and compare.

    Args:
        architectures: of one site.
        base: size, length and k; what a penalty sets instead of k has its default, and an L0 of its own.
        activations: folder of the site's.
        sample: what is compared on.
        scratch: folder for the checkpoints.
        device: where to train.
        report: told of every step.
        seed: of the random directions.
    """
    source, pairs = Activations.open(activations, device=device), list[list[Dictionary]]()
    for add in (0, 1):
        wanted = [_of(base, architecture, base.seed + add) for architecture in architectures]
        found = (training.dictionary() for training in train_all(wanted, source, scratch, device, report))
        pairs.append(
            [at_l0(d, sample.acts, float(one.k)) if one.k else d for d, one in zip(found, wanted, strict=True)]
        )
    return [_twins(name, one, other, sample, seed) for name, one, other in zip(architectures, *pairs, strict=True)]


def _of(base: DictionarySettings, architecture: Architecture, seed: int) -> DictionarySettings:
    """The same of another architecture and seed."""
    said = base.model_dump() | {"architecture": architecture, "seed": seed}
    return DictionarySettings.model_validate(
        {k: v for k, v in said.items() if k != "k" or architecture not in PENALIZED}
    )


def _twins(name: Architecture, one: Dictionary, other: Dictionary, sample: Sample, seed: int) -> Twins:
    firings = Firings.of(one, sample)
    l0 = float(firings.counts.sum()) / len(sample.token)
    random = random_directions(one.d_sae, max(round(l0), 1), sample, seed)
    same = universality(one, other, random, (firings, Firings.of(other, sample), Firings.of(random, sample)))
    return Twins(name, l0, float((firings.counts > 0).mean()), same)
