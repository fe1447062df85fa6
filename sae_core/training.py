"""The dictionary stage: train on stored activations, or import; set the threshold, save, judge on held-out text."""

import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from sae_core import interop
from sae_core.activations import Activations
from sae_core.activations.pair import open_sites
from sae_core.artifacts import SCRATCH, require_space, write_atomically
from sae_core.corpus import Corpus
from sae_core.dictionary import Dictionary
from sae_core.dictionary.batch_top_k import BatchTopK
from sae_core.dictionary.trainer import Training, TrainingError, together
from sae_core.dictionary.transcoder import sides
from sae_core.language_model import LanguageModel
from sae_core.lineage import follow
from sae_core.metrics import Quality, Spliced, measure, splice
from sae_core.progress import Report, silent
from sae_core.study import ActivationSettings, DictionarySettings, ModelSettings

CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_SECONDS = 60.0
TOGETHER_BYTES = 4 << 30
"""Memory for the weights of the dictionaries that are trained from one read; one alone may take more."""
IN_TRAINING = 2 * 4 * 4
"""Bytes for each of d_sae * d_model: two matrices, their gradients and two moments, in float32."""
CALIBRATION_TOKENS = 131_072
"""Activations on which the threshold of the finished dictionary is set."""
SPACE = 14
"""Matrices of d_sae * d_model on disk at most: two weights and their moments, in two checkpoints, and the result."""


@torch.no_grad()
def calibrate(
    dictionary: Dictionary, batches: Iterator[Float[Tensor, "batch *site d_model"]], k: int | float
) -> Dictionary:
    """The dictionary with the one threshold at which L0 is k, exactly, on the given activations.

    Args:
        dictionary: with a threshold that is about right.
        batches: raw activations, or pairs.
        k: features wanted on a token, on average.
    """
    start = dictionary.threshold * 0.8
    kept, n = [], 0
    for x in batches:
        z = dictionary.candidates(sides(x)[0].to(dictionary.device), start)[1]
        kept.append(z[z > 0])
        n += len(x)
    values = torch.cat(kept).sort(descending=True).values
    count = round(k * n)
    threshold = float(values[count]) if len(values) > count else 0.0
    return Dictionary(
        dictionary.W_enc, dictionary.b_enc, dictionary.W_dec, dictionary.b_dec,
        torch.full_like(dictionary.threshold, threshold), dictionary.config,
    )  # fmt: skip


def at_l0(dictionary: Dictionary, x: Float[Tensor, "tokens *site d_model"], l0: float) -> Dictionary:
    """The dictionary with the threshold at which it has the given L0 on `x`; as it is where it has several."""
    if dictionary.rank_scale is not None or bool((dictionary.threshold != dictionary.threshold[0]).any()):
        return dictionary
    return calibrate(dictionary, iter(x.float().split(2048)), l0)


def build_dictionary(
    settings: DictionarySettings,
    site: ActivationSettings,
    model: ModelSettings,
    corpus: Path,
    activations: Path,
    folder: Path,
    device: str = "cpu",
    report: Report = silent,
    others: Mapping[Path, DictionarySettings] = MappingProxyType({}),
    previous: Path | None = None,
    warm_start: bool = True,
    written: Path | None = None,
) -> dict[str, Any]:
    """Train and calibrate a dictionary, or import one; save and judge it.

    Training goes on from the checkpoint that a killed run left, or one that was trained together with another. One that
    follows another keeps the numbers of the features that it shares with it.

    Args:
        settings: what to train, or what to import.
        site: where the activations were read.
        model: the model they were read from.
        corpus: folder of the text.
        activations: folder of the activations.
        folder: where `dictionary.safetensors` and `config.json` go, and `metrics.parquet` of what is trained.
        device: where to train.
        report: told of every step, then of what is measured.
        others: folders of the site's other dictionaries that are to be made next, and their settings. As many as
            memory allows are trained from the same read, and wait there as finished checkpoints.
        previous: folder of the dictionary that this one is to follow, if there is one; `lineage.parquet` then says
            what became of its features.
        warm_start: begin with its weights, where the architecture and the shapes allow it.
        written: folder of the activations of the site that a transcoder writes.

    Returns:
        The numbers of `sae_core.metrics`, on held-out documents (`dead`: on all training activations); of what is
        trained, how many steps it took and how fast.

    Raises:
        TrainingError: too few activations, a loss that diverges, a checkpoint of other settings.
        InteropError: what is to be imported cannot be read, or is not what the settings say.
        ArtifactError: the disk is full.
    """
    source = open_sites(activations, written, device=device)
    judged = open_sites(activations, written, "held_out", device)
    others = {} if settings.source else _read_alike(settings, others, source.d_model)
    d_saes = settings.d_sae + sum(other.d_sae for other in others.values())
    require_space(folder, 4 * SPACE * d_saes * source.d_model)
    effort: dict[str, Any] = {}
    if settings.source:
        dictionary = _imported(settings, source.d_model).to(device)
    else:
        start = Dictionary.load(previous, device) if previous and warm_start else None
        dictionary, effort = _trained(settings, source, folder, device, report, others, start)
    if previous:
        dictionary = follow(Dictionary.load(previous, device), dictionary, all_kept(source), previous, folder)
    dictionary.save(folder)
    trained = measure(dictionary, _told(source, report))
    held_out = measure(dictionary, _told(judged, report))
    spliced = _splice(dictionary, settings, site, model, corpus, judged, device, report)
    shape = {"threshold": float(dictionary.threshold.median()), "expansion": dictionary.d_sae / dictionary.d_model}
    return _summary(trained, held_out, spliced) | shape | effort


def _read_alike(
    settings: DictionarySettings, others: Mapping[Path, DictionarySettings], d_model: int
) -> dict[Path, DictionarySettings]:
    """Those of the others that take the same batches, as many as memory holds beside this one."""
    found, left = {}, TOGETHER_BYTES - IN_TRAINING * settings.d_sae * d_model
    for folder, other in others.items():
        alike = _read_as(other) == _read_as(settings) and not other.source
        if alike and (size := IN_TRAINING * other.d_sae * d_model) <= left:
            found[folder] = other
            left -= size
    return found


def memory_groups(wanted: Iterable[DictionarySettings], d_model: int) -> Iterator[list[DictionarySettings]]:
    """Those that are trained from one read, as many at a time as `TOGETHER_BYTES` holds; one alone may take more."""
    group: list[DictionarySettings] = []
    for one in wanted:
        if group and IN_TRAINING * d_model * (one.d_sae + sum(other.d_sae for other in group)) > TOGETHER_BYTES:
            yield group
            group = []
        group.append(one)
    if group:
        yield group


def _read_as(settings: DictionarySettings) -> tuple[Any, ...]:
    """What decides which batches are read."""
    return settings.batch_tokens, settings.seed, settings.writes, settings.writes_layer


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
    settings: DictionarySettings,
    source: Activations,
    folder: Path,
    device: str,
    report: Report,
    others: Mapping[Path, DictionarySettings],
    start: Dictionary | None,
) -> tuple[Dictionary, dict[str, Any]]:
    """The dictionary, and how much work it was; leaves `metrics.parquet` in the folder."""
    training = Training(settings, source, device, start)
    runs = {folder: training} | {path: Training(other, source, device) for path, other in others.items()}
    train_together({path / SCRATCH / CHECKPOINT: training for path, training in runs.items()}, source, report)
    dictionary = training.dictionary()
    if isinstance(training.architecture, BatchTopK):  # the others' thresholds are as they were trained
        steps = max(1, CALIBRATION_TOKENS // settings.batch_tokens)
        batches = source.batches(settings.batch_tokens, steps, settings.seed)
        dictionary = calibrate(dictionary, batches, training.architecture.k)
    with write_atomically(folder / "metrics.parquet") as path:
        pq.write_table(pa.Table.from_pylist([row._asdict() for row in training.history]), path)
    speed = settings.batch_tokens * training.n_steps / training.seconds
    return dictionary, {"steps": training.n_steps, "tokens_per_second": round(speed, 1)}


def train_together(runs: Mapping[Path, Training], source: Activations, report: Report) -> None:
    """Take all steps that are left of trainings, by the path of each's checkpoint, from one read of the activations.

    Checkpoints are written now and then, at the end, and before a signal ends it. Raises TrainingError when a loss
    diverges, or a checkpoint is of other settings.
    """
    for checkpoint, training in runs.items():
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        if checkpoint.exists():
            training.restore(checkpoint)
    trainings = list(runs.values())
    total = sum(training.n_steps * training.settings.batch_tokens for training in trainings)
    saved = time.monotonic()
    try:
        with _signals() as received:
            for _ in together(trainings, source):
                last = trainings[0].history[-1]
                tokens = sum(training.done * training.settings.batch_tokens for training in trainings)
                report(tokens, total, "tokens", fvu=last.fvu, l0=last.l0, dead=last.dead)
                if received or time.monotonic() - saved > CHECKPOINT_SECONDS:
                    _save(runs)
                    saved = time.monotonic()
                if received:
                    break
    except TrainingError as error:
        if where := source.first_broken():
            raise TrainingError(f"{where} is NaN or infinite: make the activations again ({error})") from None
        raise
    _save(runs)


def _save(runs: Mapping[Path, Training]) -> None:
    for checkpoint, training in runs.items():
        training.save(checkpoint)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Hold back SIGTERM and SIGINT between two steps; what came is in the list, and is sent again at the end.

    Only a process's main thread hears of signals; elsewhere nothing is held back.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    kept = {
        number: signal.signal(number, lambda n, _: received.append(n)) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    for came in received:
        signal.raise_signal(came)
        raise KeyboardInterrupt  # when whoever listens to the signal lets things go on


def all_kept(source: Activations, rows: int = 2048) -> Iterator[Float[Tensor, "batch d_model"]]:
    """Every activation that is no sink, once."""
    for shard in source.shards():
        yield from shard.acts[~shard.is_sink].split(rows)


def _told(source: Activations, report: Report) -> Iterator[Float[Tensor, "batch d_model"]]:
    """The same, telling how many were taken."""
    done = 0
    for x in all_kept(source):
        yield x
        done += len(x)
        report(done, source.n_kept, "tokens measured")


def _splice(
    dictionary: Dictionary,
    settings: DictionarySettings,
    site: ActivationSettings,
    model: ModelSettings,
    corpus: Path,
    judged: Activations,
    device: str,
    report: Report,
) -> Spliced:
    """The dictionary inside the language model, on the first held-out blocks."""
    blocks = Corpus.open(corpus).held_out
    n = -(-settings.evaluation_tokens // blocks.token_ids.shape[1])
    token_ids, documents = torch.as_tensor(blocks.token_ids[:n]), torch.as_tensor(blocks.documents[:n])
    is_sink = torch.zeros(token_ids.shape, dtype=torch.bool)
    for place in map(judged.places, range(len(judged.paths))):
        here = place["is_sink"] & (place["block"] < len(is_sink))
        is_sink[place["block"][here].long(), place["offset"][here].long()] = True
    mean = judged.statistics().mean.reshape(-1, dictionary.d_model)[-1]
    language_model = LanguageModel.load(model, device, site.precision)
    return splice(
        language_model, site.hook, site.layer, dictionary, mean.to(device),
        token_ids.to(device), documents.to(device), is_sink.to(device), site.packing, report,
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
