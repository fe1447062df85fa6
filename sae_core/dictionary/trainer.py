"""One dictionary in training: exactly repeatable, resumable at any step, a stream of metrics.

The order of the data is a function of seed and step, all randomness is spent on the initial weights, and a checkpoint
holds everything else that a step depends on: a run that was killed and resumed gives the same bits as one that was not.
"""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae_core.artifacts import write_atomically
from sae_core.dictionary.architectures import architecture
from sae_core.dictionary.batch_top_k import BatchTopK
from sae_core.dictionary.center import geometric_median
from sae_core.dictionary.folded import Dictionary
from sae_core.dictionary.scaling import OneSite, TwoSites
from sae_core.dictionary.weights import Learner, Weights
from sae_core.errors import MindAtlasError
from sae_core.study import DictionarySettings

MEDIAN_TOKENS = 32_768
"""Activations that the geometric median is taken of (Gao et al. 2024)."""
DIVERGED = 10.0
"""A batch's fraction of variance unexplained above which training has failed; the mean alone scores 1."""


class TrainingError(MindAtlasError):
    """Training cannot start, go on, or be resumed."""


@runtime_checkable
class Source(Protocol):
    """Where activations come from: `sae_core.activations.Activations`, or anything like it."""

    n_kept: int
    d_model: int

    def statistics(self) -> tuple[Float32[Tensor, "*site d_model"], Float32[Tensor, " sites"]]:
        """Mean, and mean squared norm, of the training activations; of two sites, a row for each."""

    def batches(
        self, batch_tokens: int, n_steps: int, seed: int, start_step: int = 0
    ) -> Iterator[Float[Tensor, "batch *site d_model"]]:
        """Shuffled batches from a step on."""


class StepMetrics(NamedTuple):
    """One step of training; the columns of `metrics.parquet`."""

    step: int
    """Counted from 1."""
    tokens: int
    """Activations seen so far."""
    fvu: float
    """Fraction of this batch's variance unexplained, before the step."""
    l0: float
    aux: float
    """Auxiliary loss, or the penalty of what has one instead, before its coefficient."""
    dead: float
    """Share of features without a firing in the last `dead_after_tokens` activations."""
    lr: float
    grad_norm: float
    """Of all gradients together, before clipping."""
    threshold: float
    """What a feature must exceed at inference, in the units of the activations: the mean over features."""


class Training:
    """One dictionary in training.

    Inputs are scaled (`sae_core.dictionary.scaling`); `dictionary` folds that away.

    Args:
        settings: what to train, and how.
        source: the activations.
        device: where to train.
        start: a finished dictionary to begin with, if it can be gone on from (see `_goes_on_from`).
    """

    def __init__(
        self, settings: DictionarySettings, source: Source, device: str = "cpu", start: Dictionary | None = None
    ) -> None:
        if source.n_kept < settings.batch_tokens:
            raise TrainingError(
                f"{source.n_kept} activations are fewer than one batch of {settings.batch_tokens}: "
                "give the corpus more tokens, or a smaller batch_tokens"
            )
        mean, mean_square = source.statistics()
        self.settings = settings
        if (mean.dim() == 2) != (settings.architecture == "transcoder"):
            raise TrainingError("a transcoder, and nothing else, is trained on a pair of sites")
        self.scaling = OneSite(mean, mean_square) if mean.dim() == 1 else TwoSites(mean, mean_square)
        variance = source.d_model - float(self.scaling.mean.square().sum())
        center = _center(settings, source, self.scaling).to(device)
        self.architecture = architecture(settings, variance)
        self.learner = Learner(
            self._goes_on_from(start) or self.architecture.start(Weights.initial(settings.d_sae, center, settings.seed))
        )
        self.silent_for = torch.zeros(settings.d_sae, dtype=torch.int64, device=device)
        self.history: list[StepMetrics] = []
        self.seconds = 0.0
        """Spent on steps, those of killed runs included."""
        self.checkpoint = "none was written yet"

    def _goes_on_from(self, start: Dictionary | None) -> Weights | None:
        """The weights of a finished dictionary, where they are all that there is to go on from, and fit.

        So it is with what selects as BatchTopK does and reads one site; other architectures learn more than is saved.
        """
        if start is None or not isinstance(self.architecture, BatchTopK) or not isinstance(self.scaling, OneSite):
            return None
        if start.d_sae != self.settings.d_sae or start.rank_scale is not None:
            return None
        self.architecture.remember(float(start.threshold.median()) * self.scaling.scale)
        return self.scaling.unfold(start)

    @property
    def n_steps(self) -> int:
        """Steps of the whole run."""
        return max(1, self.settings.tokens // self.settings.batch_tokens)

    @property
    def done(self) -> int:
        """Steps taken."""
        return len(self.history)

    def run(self, source: Source) -> Iterator[StepMetrics]:
        """Take the steps that are left, one at a time. Raises TrainingError when the loss diverges."""
        for _ in together([self], source):
            yield self.history[-1]

    @torch.no_grad()
    def learn(self, batch: Float[Tensor, "batch *site d_model"]) -> StepMetrics:
        """Take one step on raw activations. Raises TrainingError when something is not finite, or the loss diverges."""
        start = time.perf_counter()
        lr = learning_rate(self.settings, self.done, self.n_steps)
        x = self.scaling.apply(batch.to(self.silent_for.device).float())
        dead = self.silent_for >= self.settings.dead_after_tokens
        step = self.architecture.step(self.learner, x, dead, self.done / self.n_steps)
        wanted = self.scaling.wanted(x)
        fvu = step.squared_error / float(torch.linalg.vector_norm(wanted - wanted.mean(0)) ** 2)
        if not fvu <= DIVERGED:
            raise self._failure(batch, fvu)
        norm = self.learner.update(self.done, lr)
        self.silent_for += len(x)
        self.silent_for[step.n_fired > 0] = 0
        metrics = StepMetrics(
            step=self.done + 1,
            tokens=(self.done + 1) * len(x),
            fvu=fvu,
            l0=step.n_active / len(x),
            aux=step.aux,
            dead=float(dead.double().mean()),
            lr=lr,
            grad_norm=norm,
            threshold=float(torch.as_tensor(self._thresholds(), dtype=torch.float64).mean()),
        )
        self.history.append(metrics)
        self.seconds += time.perf_counter() - start
        return metrics

    def _failure(self, batch: Tensor, fvu: float) -> TrainingError:
        """What went wrong in the step that was about to be taken."""
        broken = (~batch.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
        first = self.done * len(batch)
        if broken:
            what = f"row {broken[0]} of its activations holds NaN or an infinity: make the activations again"
        else:
            what = f"training diverged (fvu {fvu:.3g}): give a lower lr"
        return TrainingError(
            f"step {self.done + 1}, activations {first} to {first + len(batch) - 1} of the run: {what}; "
            f"last good checkpoint: {self.checkpoint}"
        )

    def dictionary(self) -> Dictionary:
        """The dictionary as it is now, folded, with the threshold that goes with it."""
        weights = self.learner.weights
        W_enc, b_enc = self.scaling.fold(*self.architecture.encoder(weights), weights)
        return Dictionary(
            W_enc=W_enc.T.clone(),
            b_enc=b_enc,
            W_dec=weights.W_dec.clone(),
            b_dec=weights.b_dec / self.scaling.scale,
            threshold=torch.zeros_like(weights.b_enc) + self._thresholds(),
            config=self.settings.model_dump(include={"architecture", "k", "l1_coefficient", "writes", "writes_layer"}),
        )

    def _thresholds(self) -> float | Float32[Tensor, " d_sae"]:
        """The thresholds as they are now, in the units of the activations."""
        return self.architecture.thresholds(self.learner.weights) / self.scaling.scale

    def save(self, path: Path) -> None:
        """Write a checkpoint: complete, or the one before it stays. Raises ArtifactError when the disk is full."""
        history = torch.tensor(self.history, dtype=torch.float64).reshape(-1, len(StepMetrics._fields))
        state = self.learner.state() | self.architecture.state() | {"silent_for": self.silent_for, "history": history}
        with write_atomically(path) as temporary:
            save_file(state, temporary, {"settings": self.settings.fingerprint(), "seconds": str(self.seconds)})
        self.checkpoint = f"step {self.done} in {path}"

    def restore(self, path: Path) -> "Training":
        """Go on from a checkpoint. Raises TrainingError when it is damaged, or of other settings."""
        device = self.silent_for.device
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                said, names = file.metadata(), file.keys()
                state = {name: file.get_tensor(name).clone() for name in names}  # aligned: else kernels sum otherwise
        except SafetensorError as error:
            raise TrainingError(f"checkpoint {path} is damaged ({error}): delete it and start again") from None
        if said["settings"] != self.settings.fingerprint():
            raise TrainingError(
                f"checkpoint {path} is of settings {said['settings']}, these are {self.settings.fingerprint()}: "
                "delete it, or go back to its settings"
            )
        self.learner = Learner.from_state(state)
        self.architecture.restore(state)
        self.silent_for, self.seconds = state["silent_for"], float(said["seconds"])
        self.history = [StepMetrics(int(row[0]), int(row[1]), *row[2:]) for row in state["history"].tolist()]
        self.checkpoint = f"step {self.done} in {path}"
        return self


def _center(settings: DictionarySettings, source: Source, scaling: OneSite | TwoSites) -> Float32[Tensor, " d_model"]:
    """Where b_dec starts, in the scaled units."""
    if settings.b_dec_start == "mean":
        return scaling.mean
    n = max(1, min(MEDIAN_TOKENS, source.n_kept) // settings.batch_tokens)
    batches = source.batches(settings.batch_tokens, n, settings.seed)
    return geometric_median(torch.cat([scaling.wanted(scaling.apply(x.float())) for x in batches]))


def together(trainings: Sequence[Training], source: Source) -> Iterator[None]:
    """Take the steps that are left of several trainings from one read of the activations; yields after each batch.

    Args:
        trainings: of equal `batch_tokens` and `seed`; some may be ahead of others, or shorter.
        source: the activations.

    Raises:
        TrainingError: a loss diverges.
    """
    steps = max(training.n_steps for training in trainings)
    first = min((training.done for training in trainings if training.done < training.n_steps), default=steps)
    settings = trainings[0].settings
    batches = source.batches(settings.batch_tokens, steps, settings.seed, start_step=first)
    for step, batch in enumerate(batches, first):
        for training in trainings:
            if training.done == step < training.n_steps:
                training.learn(batch)
        yield


def learning_rate(settings: DictionarySettings, step: int, n_steps: int) -> float:
    """The rate of a step, counted from 0: a linear rise, the peak, a linear fall that would reach 0 after the end."""
    peak = settings.lr or default_lr(settings.d_sae)
    rise, fall = round(settings.lr_warmup * n_steps), round(settings.lr_decay * n_steps)
    return peak * min(1.0, (step + 1) / (rise + 1), (n_steps - step) / (fall + 1))


def default_lr(d_sae: int) -> float:
    """The peak learning rate where none is set: see `DictionarySettings.lr`."""
    return 1e-3 / math.sqrt(d_sae / 2**14)
