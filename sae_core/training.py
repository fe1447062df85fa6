"""The dictionary stage: train on stored activations, or import; set the threshold, save, judge on held-out text."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from sae_core import interop
from sae_core.activations import Activations
from sae_core.artifacts import SCRATCH, require_space, write_atomically
from sae_core.corpus import Corpus
from sae_core.dictionary import Dictionary
from sae_core.dictionary.batch_top_k import BatchTopK
from sae_core.dictionary.trainer import Source, Training
from sae_core.language_model import LanguageModel
from sae_core.metrics import Quality, Spliced, measure, splice
from sae_core.progress import Report, silent
from sae_core.study import ActivationSettings, DictionarySettings, ModelSettings

CHECKPOINT_SECONDS = 60.0
CALIBRATION_TOKENS = 131_072
"""Activations on which the threshold of the finished dictionary is set."""
SPACE = 14
"""Matrices of d_sae * d_model on disk at most: two weights and their moments, in two checkpoints, and the result."""


@torch.no_grad()
def calibrate(dictionary: Dictionary, batches: Iterator[Float[Tensor, "batch d_model"]], k: int) -> Dictionary:
    """The dictionary with the one threshold at which L0 is k, exactly, on the given activations.

    Args:
        dictionary: with a threshold that is about right.
        batches: raw activations.
        k: features wanted on a token, on average.
    """
    start = dictionary.threshold * 0.8
    kept, n = [], 0
    for x in batches:
        z = dictionary.candidates(x.to(dictionary.device), start)[1]
        kept.append(z[z > 0])
        n += len(x)
    values = torch.cat(kept).sort(descending=True).values
    threshold = float(values[k * n]) if len(values) > k * n else 0.0
    return Dictionary(
        dictionary.W_enc, dictionary.b_enc, dictionary.W_dec, dictionary.b_dec,
        torch.full_like(dictionary.threshold, threshold), dictionary.config,
    )  # fmt: skip


def build_dictionary(
    settings: DictionarySettings,
    site: ActivationSettings,
    model: ModelSettings,
    corpus: Path,
    activations: Path,
    folder: Path,
    device: str = "cpu",
    report: Report = silent,
) -> dict[str, Any]:
    """Train and calibrate a dictionary, or import one; save and judge it.

    Training goes on from the checkpoint that a killed run left.

    Args:
        settings: what to train, or what to import.
        site: where the activations were read.
        model: the model they were read from.
        corpus: folder of the text.
        activations: folder of the activations.
        folder: where `dictionary.safetensors` and `config.json` go, and `metrics.parquet` of what is trained.
        device: where to train.
        report: told of every step.

    Returns:
        The numbers of `sae_core.metrics`, on held-out documents (`dead`: on all training activations); of what is
        trained, how many steps it took and how fast.

    Raises:
        TrainingError: too few activations, a loss that diverges, a checkpoint of other settings.
        InteropError: what is to be imported cannot be read, or is not what the settings say.
        ArtifactError: the disk is full.
    """
    source = Activations.open(activations)
    require_space(folder, 4 * SPACE * settings.d_sae * source.d_model)
    effort: dict[str, Any] = {}
    if settings.source:
        dictionary = _imported(settings, source.d_model).to(device)
    else:
        dictionary, effort = _trained(settings, source, folder, device, report)
    dictionary.save(folder)
    trained = measure(dictionary, _all_kept(source))
    held_out = measure(dictionary, _all_kept(Activations.open(activations, "held_out")))
    spliced = _splice(dictionary, settings, site, model, corpus, activations, device)
    return _summary(trained, held_out, spliced) | {"threshold": float(dictionary.threshold.median())} | effort


def _imported(settings: DictionarySettings, d_model: int) -> Dictionary:
    """The dictionary of another library, if it is what the study calls it and reads activations of this width."""
    dictionary = interop.read(Path(settings.source))
    wanted = {"architecture": settings.architecture, "d_sae": settings.d_sae, "k": settings.k}
    for key, value in (wanted | {"l1_coefficient": settings.l1_coefficient, "d_model": d_model}).items():
        found = dictionary.config.get(key, value)  # not every folder says its k or penalty
        if found != value:
            whose = "the activations have" if key == "d_model" else "the study says"
            cure = "read another site" if key == "d_model" else f"set {key} to the former"
            raise interop.InteropError(f"{settings.source} has {key} = {found}, {whose} {value}: {cure}")
    return dictionary


def _trained(
    settings: DictionarySettings, source: Activations, folder: Path, device: str, report: Report
) -> tuple[Dictionary, dict[str, Any]]:
    """The dictionary, and how much work it was; leaves `metrics.parquet` in the folder."""
    training = Training(settings, source, device)
    seconds = _train(training, source, folder / SCRATCH / "checkpoint.safetensors", report)
    dictionary = training.dictionary()
    if isinstance(training.architecture, BatchTopK):  # the others' thresholds are as they were trained
        steps = max(1, CALIBRATION_TOKENS // settings.batch_tokens)
        batches = source.batches(settings.batch_tokens, steps, settings.seed)
        dictionary = calibrate(dictionary, batches, training.architecture.k)
    with write_atomically(folder / "metrics.parquet") as path:
        pq.write_table(pa.Table.from_pylist([row._asdict() for row in training.history]), path)
    speed = round(seconds and settings.batch_tokens * training.n_steps / seconds, 1)
    return dictionary, {"steps": training.n_steps, "tokens_per_second": speed}


def _train(training: Training, source: Source, checkpoint: Path, report: Report) -> float:
    """Take all steps; returns the seconds that the whole run would have taken at this pace."""
    if checkpoint.exists():
        training.restore(checkpoint)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    total = training.n_steps * training.settings.batch_tokens
    start = saved = time.monotonic()
    resumed_at = training.done
    for metrics in training.run(source):
        report(metrics.tokens, total, "tokens", fvu=metrics.fvu, l0=metrics.l0, dead=metrics.dead)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            training.save(checkpoint)
            saved = time.monotonic()
    taken = training.done - resumed_at
    seconds = (time.monotonic() - start) * training.n_steps / max(taken, 1)
    training.save(checkpoint)
    return seconds


def _all_kept(source: Activations, rows: int = 2048) -> Iterator[Float[Tensor, "batch d_model"]]:
    """Every activation that is no sink, once."""
    for shard in source.shards():
        yield from shard.acts[~shard.is_sink].split(rows)


def _splice(
    dictionary: Dictionary,
    settings: DictionarySettings,
    site: ActivationSettings,
    model: ModelSettings,
    corpus: Path,
    activations: Path,
    device: str,
) -> Spliced:
    """The dictionary inside the language model, on the first held-out blocks."""
    blocks = Corpus.open(corpus).held_out
    n = -(-settings.evaluation_tokens // blocks.token_ids.shape[1])
    token_ids, documents = torch.as_tensor(blocks.token_ids[:n]), torch.as_tensor(blocks.documents[:n])
    is_sink = torch.zeros(token_ids.shape, dtype=torch.bool)
    for shard in Activations.open(activations, "held_out").shards():
        here = shard.is_sink & (shard.block < len(is_sink))
        is_sink[shard.block[here].long(), shard.offset[here].long()] = True
    mean, _ = Activations.open(activations).statistics()
    language_model = LanguageModel.load(model, device, site.precision)
    return splice(
        language_model, site.hook, site.layer, dictionary, mean.to(device),
        token_ids.to(device), documents.to(device), is_sink.to(device),
    )  # fmt: skip


def _summary(trained: Quality, held_out: Quality, spliced: Spliced) -> dict[str, Any]:
    return {
        "fvu": held_out.fvu, "l0": held_out.l0, "cosine": held_out.cosine, "shrinkage": held_out.shrinkage,
        "dead": trained.dead, "n_dead": trained.n_dead, "dense": trained.dense, "dead_over_tokens": trained.n_tokens,
        "train_fvu": trained.fvu, "train_l0": trained.l0,
        "ce_clean": spliced.ce_clean, "ce_spliced": spliced.ce_spliced, "ce_mean_ablated": spliced.ce_mean_ablated,
        "ce_zero_ablated": spliced.ce_zero_ablated, "delta_ce": spliced.delta_ce, "kl": spliced.kl,
        "ce_recovered": spliced.ce_recovered, "ce_recovered_zero": spliced.ce_recovered_zero,
        "evaluated_tokens": held_out.n_tokens,
    }  # fmt: skip
