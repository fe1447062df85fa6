"""The sweep of short runs at a site, and the laws that their losses follow.

Compute is counted as the papers count it, C = d_sae * steps, at one batch size and one width of activation. The loss
is the fraction of variance unexplained on held-out activations, at an L0 of exactly k.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.activations import Activations
from sae_core.artifacts import SCRATCH
from sae_core.dictionary import Dictionary
from sae_core.dictionary.trainer import Training, default_lr
from sae_core.errors import MindAtlasError
from sae_core.metrics import measure
from sae_core.progress import Report, silent
from sae_core.science.laws import Fit, Interval, JointLaw, PowerLaw, SparsityLaw, better, bootstrap, lowest
from sae_core.study import DictionarySettings, ScalingSettings
from sae_core.training import all_kept, at_l0, memory_groups, train_together

REPORT = "scaling.json"
MARKDOWN = "scaling.md"


class ScalingError(MindAtlasError):
    """A dictionary that no sweep can be made of, or a sweep that no law can be read from."""


class Run(NamedTuple):
    """One short run of the sweep."""

    d_sae: int
    k: int
    tokens: int
    """Activations seen."""
    steps: int
    lr: float
    """Peak learning rate."""
    fvu: float
    """The loss, on held-out activations."""
    dead: float
    """Share of the features that did not fire on them."""
    seconds: float
    """Spent on steps."""

    @property
    def compute(self) -> int:
        """d_sae * steps."""
        return self.d_sae * self.steps


def sweep(settings: ScalingSettings, base: DictionarySettings) -> list[DictionarySettings]:
    """The runs: d_sae by tokens; other learning rates along the diagonal; other k at one length.

    Raises ScalingError as `require_k` does.
    """
    k, usual = require_k(base).k, settings.lr_factor
    wanted = [(d_sae, tokens, k, usual) for d_sae in settings.d_sae for tokens in settings.tokens]
    diagonal = list(zip(settings.d_sae, settings.tokens, strict=False))[:-1]
    wanted += [(d_sae, tokens, k, factor) for d_sae, tokens in diagonal for factor in settings.lr_factors]
    middle = settings.tokens[len(settings.tokens) // 2]
    wanted += [(d_sae, middle, other, usual) for d_sae in settings.d_sae[-3:] for other in settings.k]
    return [
        DictionarySettings.model_validate(
            base.model_dump() | {
                "d_sae": d_sae, "tokens": tokens, "k": k, "lr": factor * default_lr(d_sae), "seed": settings.seed,
            }
        )
        for d_sae, tokens, k, factor in dict.fromkeys(wanted)
    ]  # fmt: skip


def require_k(base: DictionarySettings) -> DictionarySettings:
    """The settings, if laws can be fitted to what they train.

    Raises ScalingError when the dictionary's L0 is not set by a k, it reads two sites, or is imported.
    """
    if base.k is None or base.architecture == "transcoder" or base.source:
        raise ScalingError(
            f"no laws of architecture = {base.architecture}{', imported' if base.source else ''}: they are fitted at a "
            "fixed number of active features; give the study's first dictionary an architecture with a k, trained here"
        )
    return base


def build_scaling(
    settings: ScalingSettings,
    base: DictionarySettings,
    activations: Path,
    folder: Path,
    device: str = "cpu",
    report: Report = silent,
) -> dict[str, Any]:
    """Train and measure the sweep, fit the laws; write `scaling.json` and `scaling.md`, and the longest-trained
    dictionary of each size, in `w<d_sae>`.

    A killed sweep goes on from its checkpoints.

    Args:
        settings: which runs.
        base: the dictionary that all else is taken from.
        activations: folder of the site's.
        folder: where to write.
        device: where to train.
        report: told of every step.

    Returns:
        The numbers of the laws.

    Raises:
        ScalingError: see `require_k`.
        TrainingError: too few activations, or a loss that diverges.
        LawError: too few runs.
    """
    source, judged = Activations.open(activations, device=device), Activations.open(activations, "held_out", device)
    x = held_out(judged, settings.evaluation_tokens)
    runs, longest = [], settings.tokens[-1]
    for one, run, dictionary in train_sweep(sweep(settings, base), source, x, folder / SCRATCH, device, report):
        runs.append(run)
        if one.tokens == longest and run.k == base.k:  # of one learning rate: the diagonal ends before
            (folder / f"w{run.d_sae}").mkdir(exist_ok=True)
            dictionary.save(folder / f"w{run.d_sae}")
    scaling = Scaling(runs, settings, base)
    scaling.save(folder)
    return scaling.summary()


def train_sweep(
    wanted: Sequence[DictionarySettings],
    source: Activations,
    x: Float[Tensor, "tokens d_model"],
    scratch: Path,
    device: str = "cpu",
    report: Report = silent,
) -> Iterator[tuple[DictionarySettings, Run, Dictionary]]:
    """Train all, as many from one read of the activations as memory holds, and measure each on `x`, at an L0 of k.

    Args:
        wanted: of one batch size and seed.
        source: the activations.
        x: held-out ones.
        scratch: folder for the checkpoints.
        device: where to train.
        report: told of every step.
    """
    for training in train_all(wanted, source, scratch, device, report):
        yield training.settings, *_judged(training, x)


def train_all(
    wanted: Sequence[DictionarySettings],
    source: Activations,
    scratch: Path,
    device: str = "cpu",
    report: Report = silent,
) -> Iterator[Training]:
    """The finished trainings, in order; arguments as of `train_sweep`, of any architecture of one site."""
    for group in memory_groups(wanted, source.d_model):
        trainings = {scratch / f"{one.fingerprint()}.safetensors": Training(one, source, device) for one in group}
        train_together(trainings, source, report)
        yield from trainings.values()


def held_out(judged: Activations, tokens: int) -> Float[Tensor, "tokens d_model"]:
    """The first held-out activations that are no sinks, so many of them or all."""
    return torch.cat(list(islice(all_kept(judged), -(-tokens // 2048))))[:tokens].float()


def _judged(training: Training, x: Float[Tensor, "tokens d_model"]) -> tuple[Run, Dictionary]:
    settings = training.settings
    assert settings.k is not None, "sweep() lets nothing else through"
    dictionary = at_l0(training.dictionary(), x, float(settings.k))
    quality = measure(dictionary, iter(x.split(2048)))
    lr = settings.lr or default_lr(settings.d_sae)
    steps, seconds = training.n_steps, round(training.seconds, 2)
    run = Run(settings.d_sae, settings.k, settings.tokens, steps, lr, quality.fvu, quality.dead, seconds)
    return run, dictionary


@dataclass(frozen=True)
class Scaling:
    """A finished sweep and its laws, each with intervals; everything but the runs is computed from them."""

    runs: list[Run]
    settings: ScalingSettings
    base: DictionarySettings

    @classmethod
    def open(cls, path: Path) -> "Scaling":
        """The sweep in a `scaling.json`."""
        said = json.loads(path.read_text("utf-8"))
        settings, base = ScalingSettings(**said["settings"]), DictionarySettings(**said["base"])
        return cls([Run(**run) for run in said["runs"]], settings, base)

    def save(self, folder: Path) -> None:
        """Write `scaling.json` and `scaling.md`."""
        said = {
            "settings": self.settings.model_dump(), "base": self.base.model_dump(),
            "runs": [run._asdict() for run in self.runs], "summary": self.summary(),
        }  # fmt: skip
        (folder / REPORT).write_text(json.dumps(said, indent=1), "utf-8")
        (folder / MARKDOWN).write_text(markdown(self), "utf-8")

    @cached_property
    def grid(self) -> list[Run]:
        """The runs of d_sae by tokens, at the usual k and learning rate."""
        rates = {d_sae: self.settings.lr_factor * default_lr(d_sae) for d_sae in self.settings.d_sae}
        return [run for run in self.runs if run.k == self.base.k and np.isclose(run.lr, rates[run.d_sae])]

    @cached_property
    def frontier(self) -> list[Run]:
        """For each compute the run of least loss, as long as no cheaper one has less; by compute."""
        found: list[Run] = []
        for run in sorted(self.grid, key=lambda run: (run.compute, run.fvu)):
            if not found or run.fvu < found[-1].fvu:
                found.append(run)
        return found

    @cached_property
    def loss(self) -> Fit[PowerLaw]:
        """The loss at the frontier against compute."""
        x, y = _columns(self.frontier, "compute", "fvu")
        return self._fit(better(x, y), x, y)

    @cached_property
    def joint(self) -> Fit[JointLaw]:
        """The loss against d_sae and steps, over the whole grid."""
        d_sae, steps, y = _columns(self.grid, "d_sae", "steps", "fvu")
        return self._fit(JointLaw.fit, np.stack([d_sae, steps]), y)

    @cached_property
    def d_sae(self) -> Fit[PowerLaw] | None:
        """The best d_sae against compute, where runs of equal compute show one; None when fewer than three do."""
        return self._optima(self.grid, "d_sae")

    @cached_property
    def steps(self) -> Fit[PowerLaw] | None:
        """The best number of steps, likewise."""
        return self._optima(self.grid, "steps")

    @cached_property
    def lr(self) -> Fit[PowerLaw] | None:
        """The best peak learning rate against compute, where several were tried."""
        sizes = {(run.d_sae, run.tokens) for run in self.runs if run not in self.grid and run.k == self.base.k}
        tried = [run for run in self.runs if (run.d_sae, run.tokens) in sizes and run.k == self.base.k]
        return self._optima(tried, "lr")

    @cached_property
    def sparsity(self) -> Fit[SparsityLaw] | None:
        """The loss against d_sae and k, at one number of tokens; None when too few were tried."""
        tokens = {run.tokens for run in self.runs if run.k != self.base.k}
        rates = {run.d_sae: run.lr for run in self.grid}
        some = [run for run in self.runs if run.tokens in tokens and run.lr == rates[run.d_sae]]
        some = [run for run in some if sum(other.d_sae == run.d_sae for other in some) > 1]
        if len(some) < 7:
            return None
        d_sae, k, y = _columns(some, "d_sae", "k", "fvu")
        return self._fit(SparsityLaw.fit, np.stack([d_sae, k]), y)

    @cached_property
    def held_out(self) -> tuple["Scaling", Run] | None:
        """The same without the runs of more than an eighth of the largest's compute, and that largest; None when too
        few are left."""
        largest = max(self.grid, key=lambda run: run.compute)
        small = [run for run in self.runs if 8 * run.compute <= largest.compute]
        scaling = Scaling(small, self.settings, self.base)
        return (scaling, largest) if len(scaling.grid) > 8 else None

    def predict(self, d_sae: int, steps: int) -> Interval:
        """The loss that a run of this size would have, by the joint law."""
        return self.joint.predict(np.array([[d_sae], [steps]], float))

    def summary(self) -> dict[str, Any]:
        """The laws in numbers; of what could not be fitted, nothing."""
        found: dict[str, Any] = {"runs": len(self.runs), "seconds_of_steps": sum(run.seconds for run in self.runs)}
        for name, fit in (("loss", self.loss), ("d_sae", self.d_sae), ("steps", self.steps), ("lr", self.lr)):
            if fit:
                value = fit.interval(lambda law: law.exponent)
                found |= {f"{name}_r2": fit.r2, f"{name}_exponent": value.value}
                found |= {f"{name}_exponent_low": value.low, f"{name}_exponent_high": value.high}
        if self.held_out:
            smaller, largest = self.held_out
            foretold = smaller.predict(largest.d_sae, largest.steps)
            found |= {"foretold": foretold.value, "foretold_low": foretold.low, "foretold_high": foretold.high}
            found |= {"found": largest.fvu, "foretold_error": foretold.value / largest.fvu - 1}
        found |= {"loss_floor": self.loss.law.floor, "joint_r2": self.joint.r2}
        found |= {f"joint_{name}": value for name, value in vars(self.joint.law).items()}
        if self.sparsity:
            found["sparsity_r2"] = self.sparsity.r2
            found |= {f"sparsity_{name}": value for name, value in vars(self.sparsity.law).items()}
        return found

    def _optima(self, runs: Sequence[Run], name: str) -> Fit[PowerLaw] | None:
        """The law, against compute, of the setting of least loss among runs of equal compute."""
        profiles: dict[int, list[Run]] = defaultdict(list)
        for run in runs:
            profiles[run.compute].append(run)
        found = [
            (float(compute), lowest(*_columns(profile, name, "fvu")))
            for compute, profile in sorted(profiles.items()) if len(profile) > 2
        ]  # fmt: skip
        inside = np.array([(compute, best) for compute, best in found if best is not None]).reshape(-1, 2)
        return self._fit(PowerLaw.fit, *inside.T) if len(inside) > 2 else None

    def _fit(self, fit: Any, x: Float[np.ndarray, "*inputs n"], y: Float[np.ndarray, " n"]) -> Fit:
        return bootstrap(fit, x, y, self.settings.resamples, self.settings.seed)


def _columns(runs: Sequence[Run], *names: str) -> Float[np.ndarray, "columns n"]:
    return np.array([[getattr(run, name) for run in runs] for name in names], float)


def markdown(scaling: Scaling) -> str:
    """The laws and the runs, for people."""
    return "\n".join([*_laws(scaling), *_foretold(scaling), "", *_table(scaling)]) + "\n"


def _laws(scaling: Scaling) -> Iterator[str]:
    grid, loss, joint = scaling.grid, scaling.loss, scaling.joint
    yield f"{len(scaling.runs)} runs, {len(grid)} of them d_sae by steps; C = d_sae x steps; k = {scaling.base.k}."
    yield "Joint law: FVU = floor + (a d_sae^-alpha + b steps^-beta)^gamma."
    yield "\n| law | R^2 | exponent | 95% interval |\n|---|---|---|---|"
    floor = f"{loss.law.floor:.3f} + " if loss.law.floor else ""
    names = {
        f"loss(C) = {floor}{loss.law.coefficient:.3g} C^-b": loss, "best d_sae(C)": scaling.d_sae,
        "best steps(C)": scaling.steps, "best lr(C)": scaling.lr,
    }  # fmt: skip
    for name, fit in names.items():
        if fit is None:
            yield f"| {name} | - | too few optima lie inside of what was tried | - |"
        else:
            b = fit.interval(lambda law: law.exponent)
            yield f"| {name} | {fit.r2:.4f} | {b.value:.3f} | {b.low:.3f} to {b.high:.3f} |"
    for name in ("d_sae_exponent", "steps_exponent", *vars(joint.law)):
        b = joint.interval(attrgetter(name))
        yield f"| joint law: {name} | {joint.r2:.4f} | {b.value:.3g} | {b.low:.3g} to {b.high:.3g} |"
    if sparsity := scaling.sparsity:
        for name in vars(sparsity.law):
            b = sparsity.interval(attrgetter(name))
            yield f"| L(d_sae, k): {name} | {sparsity.r2:.3f} | {b.value:.3g} | {b.low:.3g} to {b.high:.3g} |"


def _foretold(scaling: Scaling) -> Iterator[str]:
    """What the smaller runs say of the largest."""
    if scaling.held_out:
        smaller, largest = scaling.held_out
        value = smaller.predict(largest.d_sae, largest.steps)
        yield (
            f"\nHeld out: from {len(smaller.grid)} runs of at most an eighth of its compute, {largest.d_sae} features "
            f"after {largest.steps} steps should have an FVU of {value}; it is {largest.fvu:.4f} "
            f"({value.value / largest.fvu - 1:+.1%})."
        )


def _table(scaling: Scaling) -> Iterator[str]:
    yield "| d_sae | k | activations | steps | lr | FVU | at the frontier | dead | seconds |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for run in sorted(scaling.runs):
        best = "yes" if run in scaling.frontier else ""
        yield (
            f"| {run.d_sae} | {run.k} | {run.tokens:,} | {run.steps} | {run.lr:.2g} | {run.fvu:.4f} | {best} | "
            f"{run.dead:.1%} | {run.seconds:.0f} |"
        )
