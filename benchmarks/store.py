"""The store of activations: how fast it is written and read, how well it shuffles, how much memory it takes.

    python benchmarks/store.py                       131,072 rows of 576, synthetic
    python benchmarks/store.py --tokens 1000000 --folder /mnt/disk
    python benchmarks/store.py --activations ATLAS/activations/SITE/FINGERPRINT     (f) alone

(a) copy     the bytes of the bfloat16 shards copied by `shutil.copyfile` and synced, and read back plainly
(b) write    the harvest with a stand-in for the model, which hands out rows that lie ready
(c) read     one epoch of shuffled batches, for each type a store keeps; and nanoseconds a row
(d) shuffle  neighbors in training order against a full shuffle of the same rows, at the least memory for mixing
(e) memory   peak of the process's own memory above the start, writing and reading, for corpora of two sizes
(f) quality  FVU of the same dictionary trained from rows of a finished harvest as they are and kept as int8

Reads are cold where the system lets a file be dropped from memory (`posix_fadvise`).
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from safetensors.numpy import save_file

from sae_core.activations import Activations, harvest, shards
from sae_core.activations.encoding import decode, encode
from sae_core.dictionary.trainer import Training
from sae_core.language_model import LanguageModel
from sae_core.metrics import measure as measure_quality
from sae_core.study import ActivationSettings, DictionarySettings, ModelSettings
from sae_core.training import calibrate

BLOCK, D_MODEL = 256, 576
harvest_module = sys.modules["sae_core.activations.harvest"]  # the package shows the function of that name
KEPT = ("bfloat16", "float32", "float16", "int8")


class Neighbors(NamedTuple):
    """How alike rows are that follow one another."""

    same_document: float
    """Share of neighbors in training order that are of one document."""
    cosine: float
    """Mean cosine of neighbors, the mean activation taken away."""
    documents: float
    """Distinct documents in a batch, for each of its rows."""


def neighbors(
    source: Activations, documents: np.ndarray, batch_tokens: int, seed: int = 0, *, shards_mixed: int = 2
) -> dict[str, Neighbors]:
    """One epoch in training order, with memory for so many shards only, and the same rows in a full shuffle.

    Args:
        source: the activations.
        documents: of each block and offset, the document; [n_blocks, block_tokens].
        batch_tokens: rows of a batch.
        seed: of both orders.
        shards_mixed: shards that are mixed at a time.
    """
    steps = source.n_kept // batch_tokens
    acts = in_order(source, batch_tokens, steps, seed, shards_mixed)

    def place(number: int, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        shard = source.places(number)
        return torch.stack([shard["block"][rows], shard["offset"][rows]], dim=1).double()

    where = in_order(Activations(source.folder, source.paths, place), batch_tokens, steps, seed, shards_mixed).long()
    document = torch.from_numpy(documents)[where[:, 0], where[:, 1]]
    shuffled = shards.permutation(len(acts), seed)
    return {
        "store": _neighbors(acts, document, batch_tokens),
        "full shuffle": _neighbors(acts[shuffled], document[shuffled], batch_tokens),
    }


def in_order(source: Activations, batch_tokens: int, steps: int, seed: int, shards_mixed: int) -> torch.Tensor:
    """All batches of the steps, with memory for so many shards and no more."""
    row = source.acts(0, slice(1))
    room = shards_mixed * max(source._sizes) * row[0].numel() * row.element_size()
    with mock.patch.object(shards, "SHUFFLE_BYTES", room):
        return torch.cat(list(source.batches(batch_tokens, steps, seed)))


def _neighbors(acts: torch.Tensor, document: torch.Tensor, batch_tokens: int) -> Neighbors:
    x = torch.nn.functional.normalize(acts.float() - acts.float().mean(0), dim=1)
    distinct = [len(batch.unique()) / len(batch) for batch in document.split(batch_tokens)]
    return Neighbors(
        float((document[1:] == document[:-1]).float().mean()),
        float((x[1:] * x[:-1]).sum(1).mean()),
        sum(distinct) / len(distinct),
    )


class StandIn:
    """A model whose activations lie ready: those of a document share a direction, as a real one's do."""

    def __init__(self, d_model: int = D_MODEL, rows: int = 65_536) -> None:
        generator = torch.Generator().manual_seed(0)
        self.d_model, self.vocab_size, self.device = d_model, 1 << 30, torch.device("cpu")
        self._ready = torch.randn(rows, d_model, generator=generator).bfloat16()
        self._documents = torch.randn(1024, d_model, generator=generator).bfloat16()

    def capture_many(self, sites: list, token_ids: torch.Tensor, segments: torch.Tensor) -> list[torch.Tensor]:
        """Rows by token id, plus one by document."""
        return [self._ready[token_ids.long() % len(self._ready)] + self._documents[segments.long() % 1024]]

    def is_special(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """None is."""
        return torch.zeros_like(token_ids, dtype=torch.bool)


def write_corpus(folder: Path, n_tokens: int) -> np.ndarray:
    """Random tokens in documents of 50 to 600 tokens, all for training; returns the document of each place."""
    folder.mkdir(parents=True)
    rng, n_blocks = np.random.default_rng(0), n_tokens // BLOCK
    lengths = rng.integers(50, 600, n_tokens // 50)
    documents = np.repeat(np.arange(len(lengths)), lengths)[: n_blocks * BLOCK].reshape(n_blocks, BLOCK)
    token_ids = rng.integers(0, 1 << 20, documents.shape)
    arrays = {"token_ids": token_ids, "documents": documents, "positions": np.zeros_like(documents)}
    arrays = {name: array.astype(np.int32) for name, array in arrays.items()}
    save_file(arrays, folder / "train.safetensors")
    save_file({name: array[:0] for name, array in arrays.items()}, folder / "held_out.safetensors")
    return arrays["documents"]


def write(corpus: Path, folder: Path, kept_as: str, shard_tokens: int) -> None:
    """The harvest, with the stand-in."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = ActivationSettings(layer=0, kept_as=kept_as, shard_tokens=shard_tokens)
    with mock.patch.object(LanguageModel, "load", return_value=stand_in()):
        harvest(settings, ModelSettings(source="stand-in"), corpus, folder)


def stand_in() -> StandIn:
    """The one stand-in of this process."""
    if not _ready:
        _ready.append(StandIn())
    return _ready[0]


_ready: list[StandIn] = []


def epoch(folder: Path, batch_tokens: int = 2048, compute: float = 0.0) -> int:
    """Read every row once, as training does, with so many seconds of waiting a batch; how many rows."""
    source, n = Activations.open(folder), 0
    for batch in source.batches(batch_tokens, source.n_kept // batch_tokens, seed=0):
        n += len(batch)
        time.sleep(compute)
    return n


def cold(folder: Path) -> None:
    """Have the system forget the folder's files, where it lets one ask for that."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Note how long the `with` takes."""
    start = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - start


def copied(source: Path, target: Path) -> None:
    """The raw file copy: every shard copied and synced."""
    target.mkdir()
    for path in sorted(source.glob("*-*.safetensors")):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb+") as file:
            os.fsync(file.fileno())


def read_raw(folder: Path) -> None:
    """Every shard read plainly into one buffer."""
    buffer = bytearray(4 << 20)
    for path in sorted(folder.glob("*-*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def size(folder: Path) -> int:
    """Bytes of the shards."""
    return sum(path.stat().st_size for path in folder.glob("*-*.safetensors"))


def peak(folder: Path, room: int) -> int:
    """Most memory of its own, in bytes above the start, that one epoch takes when so many bytes are mixed."""
    with mock.patch.object(shards, "SHUFFLE_BYTES", room):
        source, before, most = Activations.open(folder), own_memory(), 0
        for _ in source.batches(2048, source.n_kept // 2048, seed=0):
            most = max(most, own_memory() - before)
    return most


def write_peak(corpus: Path, folder: Path, shard_tokens: int) -> int:
    """Most memory of its own that the harvest takes, looked at once a shard."""
    before, most = own_memory(), [0]
    save = harvest_module.save_file

    def noted(*arguments: object) -> None:
        most[0] = max(most[0], own_memory() - before)
        save(*arguments)

    with mock.patch.object(harvest_module, "save_file", noted):
        write(corpus, folder, "bfloat16", shard_tokens)
    return most[0]


class Rows:
    """Activations in memory, as the trainer reads them."""

    def __init__(self, acts: torch.Tensor) -> None:
        self.acts, self.n_kept, self.d_model = acts, *acts.shape

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and mean squared norm."""
        return self.acts.float().mean(0), self.acts.float().square().sum(1).mean()[None]

    def batches(self, batch_tokens: int, n_steps: int, seed: int, start_step: int = 0) -> Iterator[torch.Tensor]:
        """The same rows in every step, whatever they are kept as."""
        for step in range(start_step, n_steps):
            rows = torch.randint(self.n_kept, (batch_tokens,), generator=torch.Generator().manual_seed(seed + step))
            yield self.acts[rows]


def quality(folder: Path, rows: int, d_sae: int, steps: int, k: int = 32) -> dict[str, float]:
    """FVU on held-out activations as they were harvested, of the dictionary trained from each kind of rows."""
    acts = next(Activations.open(folder).batches(rows, 1, seed=0))
    kept = decode(encode(acts, torch.zeros(len(acts), dtype=torch.bool), "int8"))
    held_out = next(Activations.open(folder, "held_out").batches(8192, 1, seed=0))
    settings = DictionarySettings(d_sae=d_sae, k=k, tokens=steps * 2048, batch_tokens=2048)
    found = {}
    for name, source in (("as harvested", Rows(acts)), ("int8", Rows(kept))):
        training = Training(settings, source)
        for _ in training.run(source):
            pass
        dictionary = calibrate(training.dictionary(), iter(source.acts.split(2048)), k)
        found[name] = measure_quality(dictionary, held_out.split(2048)).fvu
    return found


def own_memory() -> int:
    """Memory of this process that no file stands for, in bytes (Linux)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--shard-tokens", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--activations", type=Path, help="folder of a finished harvest: only train from it")
    parser.add_argument("--rows", type=int, default=40_960, help="of it")
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    if options.activations:
        found = quality(options.activations, options.rows, options.d_sae, options.steps)
        for name, fvu in found.items():
            print(f"{name:13} FVU {fvu:.5f}   {fvu / found['as harvested'] - 1:+.2%}")
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        measure(Path(name), options)


def measure(root: Path, options: SimpleNamespace) -> None:
    """Take turns, keep the best of each, print."""
    documents = write_corpus(root / "corpus", options.tokens)
    stand_in()
    best: dict[str, float] = {}
    for repeat in range(options.repeats):
        seconds: dict[str, float] = {}
        for kept_as in KEPT:
            shutil.rmtree(root / kept_as, ignore_errors=True)
            with timed(seconds, f"write {kept_as}"):
                write(root / "corpus", root / kept_as, kept_as, options.shard_tokens)
        with timed(seconds, "copy"):
            copied(root / "bfloat16", root / f"copy{repeat}")
        cold(root / f"copy{repeat}")
        with timed(seconds, "read raw"):
            read_raw(root / f"copy{repeat}")
        for kept_as in KEPT:
            cold(root / kept_as)
            with timed(seconds, f"read {kept_as}"):
                epoch(root / kept_as)
            with timed(seconds, f"again {kept_as}"):
                epoch(root / kept_as)
        best = {what: min(time, best.get(what, time)) for what, time in seconds.items()}
    report(root, options, best)
    for name, found in neighbors(Activations.open(root / "bfloat16"), documents, 2048).items():
        print(f"{name:13} {found.same_document:.5f} of neighbors share a document, cosine {found.cosine:+.5f}, "
              f"{found.documents:.4f} documents a row")  # fmt: skip
    write_corpus(root / "larger", 4 * options.tokens)
    room = 2 * options.shard_tokens * D_MODEL * 2
    for kind, n in (("corpus", options.tokens), ("larger", 4 * options.tokens)):
        writing = write_peak(root / kind, root / "again", options.shard_tokens)
        reading = peak(root / "again", room)
        shutil.rmtree(root / "again")
        print(f"peak memory at {n:8} tokens: {writing / 1e6:.0f} MB writing, {reading / 1e6:.0f} MB reading")


def report(root: Path, options: SimpleNamespace, best: dict[str, float]) -> None:
    """Bandwidths against the raw copy's."""
    raw = size(root / "bfloat16")
    print(f"copy and sync {raw / best['copy'] / 1e6:6.0f} MB/s   read raw {raw / best['read raw'] / 1e6:6.0f} MB/s")
    for kept_as in KEPT:
        n = size(root / kept_as)
        writes, reads = n / best[f"write {kept_as}"], n / best[f"read {kept_as}"]
        print(
            f"{kept_as:9} {n / options.tokens:6.0f} bytes a token   "
            f"write {writes / 1e6:5.0f} MB/s ({writes * best['copy'] / raw:5.1%})   "
            f"read {reads / 1e6:5.0f} MB/s ({reads * best['read raw'] / raw:5.1%})   "
            f"{best[f'again {kept_as}'] / options.tokens * 1e9:5.0f} ns a row from memory"
        )


if __name__ == "__main__":
    main()
