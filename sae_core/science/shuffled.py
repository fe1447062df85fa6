"""The same dictionary on a model that has learned nothing: every matrix with its own entries in random order.

That is the control of Bricken et al. 2023: norms, gains and the sizes of weights are what they were, and what they
compute is nothing. Automatic interpretability is fooled by it, as features of single tokens are easy to name.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import save_file

from sae_core.activations import Activations, harvest
from sae_core.corpus import Corpus
from sae_core.corpus.packing import Blocks
from sae_core.pretrained import load_tokenizer, load_weights
from sae_core.progress import Report, silent
from sae_core.science.firings import Firings, Sample
from sae_core.science.reading import Reading, read_units
from sae_core.science.scaling import held_out, train_sweep
from sae_core.study import ActivationSettings, DictionarySettings, ModelSettings

HELD_OUT_BLOCKS = 32


class Control(NamedTuple):
    """The same settings on both models' activations of the same text."""

    trained: Reading
    shuffled: Reading
    fvu: tuple[float, float]
    """On held-out text, of each."""
    tokens: int
    """Of the text that both were trained and read on."""


def shuffled_model(model: ModelSettings, precision: str, folder: Path, seed: int) -> ModelSettings:
    """Write the model with the entries of each matrix, embeddings included, in random order; what has one dimension,
    as gains and biases, stays. Returns its settings."""
    weights: Any = load_weights(model, getattr(torch, precision))
    generator = torch.Generator().manual_seed(seed)
    for parameter in weights.parameters():  # tied ones come once
        if parameter.dim() > 1:
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.data = parameter.data.flatten()[order].view_as(parameter)
    weights.save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return ModelSettings(source=str(folder))


def first_shards(source: Activations, tokens: int) -> Activations:
    """As many of the first shards as hold so many activations, or all."""
    sizes = np.cumsum([len(source.places(number)["token"]) for number in range(len(source.paths))])
    n = int(np.searchsorted(sizes, tokens)) + 1
    return Activations(source.folder, source.paths[:n], source.acts, source.device, source.ahead)


def shuffled_control(
    wanted: DictionarySettings, model: ModelSettings, site: ActivationSettings, activations: Path, corpus: Path,
    tokens: int, strings: list[str], scratch: Path, device: str = "cpu", report: Report = silent, seed: int = 0,
) -> Control:  # fmt: skip
    """Train and read one dictionary on the model's activations and on those of the model with shuffled weights.

    Args:
        wanted: the dictionary; with a k.
        model: the model.
        site: where it was read.
        activations: folder of its activations.
        corpus: folder of the text.
        tokens: of the text that both see, in whole shards.
        strings: text of each token id.
        scratch: folder for the shuffled model, its activations and the checkpoints.
        device: where models run and dictionaries are trained.
        report: progress, in tokens.
        seed: of the order of the entries.

    Raises what `harvest` and training raise.
    """
    source = first_shards(Activations.open(activations, device=device), tokens)
    blocks = torch.cat([source.places(n)["block"] for n in range(len(source.paths))]).unique().numpy()
    text, other = scratch / "text", scratch / "shuffled"
    _write_text(Corpus.open(corpus), blocks, text)
    other.mkdir(parents=True, exist_ok=True)
    settings = site.model_copy(update={"stored": True, "compiled": False})
    harvest(settings, shuffled_model(model, site.precision, scratch / "model", seed), text, other, device, report)
    readings, fvu = [], []
    for name, one, folder in (
        ("trained", source, activations),
        ("shuffled", Activations.open(other, device=device), other),
    ):
        x = held_out(Activations.open(folder, "held_out", device), HELD_OUT_BLOCKS * 256)
        ((_, run, dictionary),) = train_sweep([wanted], one, x, scratch / name, device, report)
        sample = Sample.of(folder, source.n_tokens)
        readings.append(read_units(f"{wanted.d_sae} features", Firings.of(dictionary, sample), sample, strings))
        fvu.append(run.fvu)
    return Control(readings[0], readings[1], (fvu[0], fvu[1]), source.n_tokens)


def _write_text(corpus: Corpus, blocks: np.ndarray, folder: Path) -> None:
    """Some of a corpus's blocks, and a few held-out ones, as a corpus of their own for the harvest."""
    folder.mkdir(parents=True, exist_ok=True)
    some = {"train": Blocks(*(column[blocks] for column in corpus.train)), "held_out": _first(corpus.held_out)}
    for split, part in some.items():
        save_file(part._asdict(), folder / f"{split}.safetensors")


def _first(blocks: Blocks) -> Blocks:
    return Blocks(*(column[:HELD_OUT_BLOCKS] for column in blocks))
