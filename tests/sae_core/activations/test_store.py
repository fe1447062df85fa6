"""The store at work: places, order, resuming, verifying."""

import itertools
import random
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sae_core.activations import ActivationError, Activations, harvest, shards
from sae_core.activations.parallel import Worker
from sae_core.artifacts import PROJECT, ArtifactError, ArtifactStore, Draft, Made, Recipe
from sae_core.corpus import Corpus
from sae_core.study import ActivationSettings, ModelSettings
from sae_core.verify import verify

Contents = Callable[[Path], dict[str, bytes]]


def test_activations_are_found_by_document_and_token(made: Path, corpus: Path):
    source, blocks = Activations.open(made), Corpus.open(corpus).train
    rows = {}
    for shard in source.shards():
        for block, offset, act in zip(shard.block.tolist(), shard.offset.tolist(), shard.acts, strict=True):
            rows[int(blocks.documents[block, offset]), int(blocks.positions[block, offset])] = act
    for document in (0, 7, 30):
        tokens = sorted(token for d, token in rows if d == document)
        picked = [*tokens[::-2], tokens[0]]
        assert torch.equal(source.at(blocks, document, picked), torch.stack([rows[document, t] for t in picked]))
    with pytest.raises(ActivationError, match="document 7 has no token 5000"):
        source.at(blocks, 7, [0, 5000])
    with pytest.raises(ActivationError, match="document -3 has no token 0"):
        source.at(blocks, -3, [0])


def test_with_memory_for_two_shards_neighbors_are_hardly_more_alike_than_in_a_full_shuffle(made: Path, corpus: Path):
    measure = runpy.run_path(str(PROJECT / "benchmarks" / "store.py"))["neighbors"]
    documents = Corpus.open(corpus).train.documents
    found = [measure(Activations.open(made), documents, 64, seed) for seed in range(5)]
    store, full = ([f[kind] for f in found] for kind in ("store", "full shuffle"))
    same = [sum(f.same_document for f in some) / len(some) for some in (store, full)]
    cosine = [sum(f.cosine for f in some) / len(some) for some in (store, full)]
    blocks_mixed = 2 * 256 / 32
    assert same[0] - same[1] < 1 / blocks_mixed  # a neighbor is of the same block no more often than by chance
    assert abs(cosine[0] - cosine[1]) < 0.03
    in_a_row = torch.cat([torch.from_numpy(documents[documents >= 0])])
    assert same[0] < 0.1 * float((in_a_row[1:] == in_a_row[:-1]).float().mean())


def test_the_next_shards_are_read_while_these_are_used(made: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "SHUFFLE_BYTES", 1)
    source = Activations.open(made)
    plan = list(itertools.islice(source._plan(2, 0, 0), 3))
    told: list[int] = []
    enough = threading.Event()

    def ahead(number: int) -> None:
        assert threading.current_thread() is not threading.main_thread()
        told.append(number)
        if len(told) == 2:
            enough.set()

    source.ahead = ahead
    batches = source.batches(8, 100, seed=0)
    next(batches)
    assert enough.wait(10)
    assert sorted(told) == plan[1].shards
    assert not set(told) & set(plan[0].shards)
    batches.close()


def test_what_is_read_ahead_may_be_missing_and_is_said_only_when_it_is_needed(made: Path, tmp_path: Path):
    source = Activations.open(shutil.copytree(made, tmp_path / "a"))
    source.paths[2].unlink()
    source.ahead(2)
    with pytest.raises(ActivationError, match="train-00002"):
        source.acts(2)


def test_what_is_written_while_the_model_goes_on_is_the_same(
    site: ActivationSettings, model: ModelSettings, corpus: Path, made: Path, contents: Contents, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(Worker, "overlaps", property(lambda self: True, lambda self, value: None), raising=False)

    def report(done: int, *_: object, **__: float) -> None:
        if done > 1200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harvest(site, model, corpus, tmp_path, report=report)
    assert {"train-00000.safetensors"} < contents(tmp_path).keys() < contents(made).keys()
    assert not list(tmp_path.glob("*.tmp"))  # what was being written came to its end
    harvest(site, model, corpus, tmp_path)
    assert contents(tmp_path) == contents(made)


KILL = """
import os, random, signal, sys, time
from pathlib import Path
from sae_core.activations import harvest
from sae_core.study import ActivationSettings, ModelSettings
import torch
torch.set_num_threads(1)
site, model = ActivationSettings.model_validate_json(sys.argv[1]), ModelSettings(source=sys.argv[2])
corpus, folder = Path(sys.argv[3]), Path(sys.argv[4])

def child(target):
    target.mkdir(exist_ok=True)
    pid = os.fork()
    if not pid:
        harvest(site, model, corpus, target)
        os._exit(0)
    return pid

harvest(site, model, corpus, Path(sys.argv[5]))  # what is imported late is imported now
start = time.monotonic()
os.waitpid(child(folder / "calm"), 0)
seconds, dice = time.monotonic() - start, random.Random(0)
for n in range(10):
    pid = child(folder / str(n))
    while len(list((folder / str(n)).glob("*-*.safetensors"))) < n * 7 // 10:  # of eight; time alone would not tell
        time.sleep(0.002)
    time.sleep(dice.random() / 10 * seconds)
    os.kill(pid, signal.SIGKILL)
    print(os.WTERMSIG(os.waitpid(pid, 0)[1]), len(list((folder / str(n)).glob("*.safetensors"))))
    os.waitpid(child(folder / str(n)), 0)
"""


def test_killed_at_ten_random_moments_a_harvest_goes_on_and_ends_byte_equal(
    site: ActivationSettings, model: ModelSettings, corpus: Path, made: Path, contents: Contents, tmp_path: Path
):
    (warm := tmp_path / "warm").mkdir()
    arguments = [site.model_dump_json(), model.source, str(corpus), str(tmp_path), str(warm)]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILL, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rounds = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(rounds) == 10
    assert sum(signal == 9 for signal, _ in rounds) >= 8  # the last ones may come after the end
    assert len({n_shards for _, n_shards in rounds}) > 2
    for n in range(10):
        assert contents(tmp_path / str(n)) == contents(made)


@pytest.fixture
def store(
    site: ActivationSettings, model: ModelSettings, corpus: Path, tmp_path: Path
) -> tuple[ArtifactStore, Callable[[], Made]]:
    """A store with one site's activations, and how they are made."""
    found = ArtifactStore(tmp_path / "root")

    def build(draft: Draft) -> dict[str, int | float]:
        return harvest(site, model, corpus, draft.folder)

    recipe = Recipe("activations", "a", 1, site.model_dump())

    def make() -> Made:
        return found.make(recipe, build)

    make()
    return found, make


def test_a_byte_flipped_in_ten_random_places_is_found_and_only_that_shard_is_made_again(
    store: tuple[ArtifactStore, Callable[[], Made]], contents: Contents
):
    artifacts, make = store
    folder = make().folder
    assert [verdict.damage for verdict in verify(artifacts)] == [{}]
    calm, dice = contents(folder), random.Random(0)
    for _ in range(10):
        path = dice.choice(sorted(folder.iterdir()))
        content = bytearray(path.read_bytes())
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
        whole = {other: other.stat().st_mtime_ns for other in folder.glob("*-*.safetensors") if other != path}
        (verdict,) = verify(artifacts, repair=True)
        assert verdict.damage == {path.name: f"{path.name} has other content than was written"}
        assert not path.exists()
        assert make().folder == folder
        assert contents(folder) == calm
        assert all(other.stat().st_mtime_ns == changed for other, changed in whole.items())


@pytest.mark.parametrize("name", ["train-00000.safetensors", "train-00006.safetensors", "statistics.safetensors"])
def test_a_missing_or_truncated_file_is_seen_without_reading_and_made_again_alone(
    store: tuple[ArtifactStore, Callable[[], Made]], contents: Contents, name: str
):
    artifacts, make = store
    made = make()
    calm, path = contents(made.folder), made.folder / name
    reader = Recipe("reader", "a", 1, {}, (Recipe("activations", "a", 1, made.manifest.settings),))
    for damage in (path.unlink, lambda: path.write_bytes(calm[name][:-1])):
        damage()
        status = artifacts.status(reader.parents[0])
        assert status.state == "damaged"
        assert name in status.why
        with pytest.raises(ArtifactError, match=f"{name} .*mind-atlas run` makes it again"):
            artifacts.make(reader, lambda draft: {})
        whole = {other: other.stat().st_mtime_ns for other in made.folder.glob("*-*.safetensors") if other != path}
        assert not make().cached
        assert contents(made.folder) == calm
        assert all(other.stat().st_mtime_ns == changed for other, changed in whole.items())
        assert artifacts.status(reader.parents[0]).state == "made"


def test_a_damaged_manifest_is_named_and_the_rest_still_looked_at(store: tuple[ArtifactStore, Callable[[], Made]]):
    artifacts, _ = store
    (artifacts.root / "activations" / "a" / "manifest.json").write_text("{")
    (verdict,) = verify(artifacts)
    assert "is damaged" in verdict.damage["manifest.json"]
    assert list(verify(artifacts, ["activations/never_made"])) == []
