import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from sae_core.activations import ActivationError, Activations, elsewhere, harvest
from sae_core.activations.elsewhere import Elsewhere, forget_older
from sae_core.artifacts import ArtifactStore, Made, Recipe
from sae_core.study import ActivationSettings, ModelSettings
from sae_core.verify import verify


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder somewhere; copies of what it holds go into a cache of the test's own."""
    monkeypatch.setenv("MIND_ATLAS_CACHE", str(tmp_path / "cache"))
    yield "memory://bucket/site/version" if request.param == "memory" else f"file://{tmp_path}/away/site/version"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def kept(url: str, site: ActivationSettings, model: ModelSettings, corpus: Path, tmp_path: Path) -> Path:
    (folder := tmp_path / "kept").mkdir()
    harvest(site.model_copy(update={"kept_as": "int8"}), model, corpus, folder, elsewhere=url)
    return folder


def spoil(url: str, name: str) -> None:
    content = bytearray(fsspec.filesystem(url.partition(":")[0]).cat_file(f"{url}/{name}"))
    content[-1] ^= 1
    with fsspec.open(f"{url}/{name}", "wb") as file:
        file.write(bytes(content))


def test_activations_elsewhere_are_read_as_those_at_home(
    kept: Path, url: str, site: ActivationSettings, model: ModelSettings, corpus: Path, tmp_path: Path
):
    (home := tmp_path / "home").mkdir()
    summary = harvest(site.model_copy(update={"kept_as": "int8"}), model, corpus, home)
    away, here = Activations.open(kept), Activations.open(home)
    for ours, theirs in zip(away.shards(), here.shards(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    pairs = zip(away.batches(64, 40, 3), here.batches(64, 40, 3), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    system, root = fsspec.url_to_fs(url)
    assert {name.rpartition("/")[2] for name in system.ls(root, detail=False)} == {p.name for p in kept.glob("*-*")}
    assert not any("acts" in path.read_bytes()[:2000].decode("latin-1") for path in kept.glob("*-*.safetensors"))
    assert summary["estimated_bytes"] == pytest.approx(
        system.du(root) + sum(p.stat().st_size for p in kept.glob("*-*")), rel=0.2
    )


def test_an_interrupted_upload_goes_on_after_the_shards_that_are_there(
    kept: Path, url: str, site: ActivationSettings, model: ModelSettings, corpus: Path, contents: Callable
):
    calm = contents(kept)
    (kept / "train-00003.safetensors").unlink()
    spoil(url, "train-00003.safetensors")  # half of an upload, as the shard's own file was not written yet
    uploaded = []
    put, Elsewhere.put = Elsewhere.put, lambda self, path, name: (uploaded.append(name), put(self, path, name))[1]
    try:
        harvest(site.model_copy(update={"kept_as": "int8"}), model, corpus, kept, elsewhere=url)
    finally:
        Elsewhere.put = put
    assert uploaded == ["train-00003.safetensors"]
    assert contents(kept) == calm


def test_what_was_begun_in_one_place_goes_on_there(
    kept: Path, url: str, site: ActivationSettings, model: ModelSettings, corpus: Path, made: Path, tmp_path: Path
):
    (kept / "train-00002.safetensors").unlink()
    harvest(site.model_copy(update={"kept_as": "int8"}), model, corpus, kept)
    assert Activations.open(kept).acts(2).shape == (256, 32)
    home = shutil.copytree(made, tmp_path / "begun")
    (home / "train-00002.safetensors").unlink()
    for folder, settings in ((home, site), (tmp_path / "none", site.model_copy(update={"stored": False}))):
        folder.mkdir(exist_ok=True)
        harvest(settings, model, corpus, folder, elsewhere=f"{url}/other")
        assert not (folder / "elsewhere.json").exists()
        assert torch.equal(Activations.open(folder).acts(2), Activations.open(made).acts(2))


def test_what_was_damaged_elsewhere_is_refused_found_and_made_again_alone(
    url: str, site: ActivationSettings, model: ModelSettings, corpus: Path, contents: Callable, tmp_path: Path
):
    store, recipe = ArtifactStore(tmp_path / "root"), Recipe("activations", "a", 1, site.model_dump())

    def make() -> Made:
        return store.make(recipe, lambda draft: harvest(site, model, corpus, draft.folder, elsewhere=url))

    folder = make().folder
    calm = contents(folder)
    spoil(url, "train-00001.safetensors")
    fsspec.filesystem(url.partition(":")[0]).rm(f"{url}/held_out-00000.safetensors")
    with pytest.raises(ActivationError, match=r"train-00001\.safetensors is damaged: run `mind-atlas verify --repair`"):
        list(Activations.open(folder).shards())
    (verdict,) = verify(store, repair=True)
    assert set(verdict.damage) == {"train-00001.safetensors", "held_out-00000.safetensors"}
    assert "is missing" in verdict.damage["held_out-00000.safetensors"]
    assert make().folder == folder
    assert contents(folder) == calm
    assert [verdict.damage for verdict in verify(store)] == [{}]
    assert len(list(Activations.open(folder, "held_out").shards())) == 1


def test_copies_on_this_machine_are_bounded_and_read_again_without_the_network(
    kept: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fetched = []
    get = Elsewhere.get
    monkeypatch.setattr(Elsewhere, "get", lambda self, name, path: (fetched.append(name), get(self, name, path))[1])
    source = Activations.open(kept)
    for number in (0, 1, 0, 1):
        source.acts(number)
    assert fetched == ["train-00000.safetensors", "train-00001.safetensors"]
    copies = tmp_path / "cache" / "activations"
    monkeypatch.setattr(elsewhere, "COPY_BYTES", 3 * max(path.stat().st_size for path in copies.iterdir()))
    for number in range(len(source.paths)):
        source.acts(number)
    assert len(list(copies.iterdir())) == 3


def test_older_versions_elsewhere_are_forgotten(kept: Path, url: str):
    parent = url.rpartition("/")[0]
    system, root = fsspec.url_to_fs(parent)
    system.makedirs(f"{root}/older", exist_ok=True)
    system.pipe_file(f"{root}/older/train-00000.safetensors", b"old")
    forget_older(kept)
    assert [name.rstrip("/").rpartition("/")[2] for name in system.ls(root, detail=False)] == ["version"]
    assert Elsewhere(url).sha256("train-00000.safetensors")


@pytest.mark.parametrize("wrong", ["nonsense://bucket", "file:///proc/nowhere/to/write"])
def test_a_place_that_cannot_be_written_to_is_said_in_one_line(
    wrong: str, site: ActivationSettings, model: ModelSettings, corpus: Path, tmp_path: Path
):
    with pytest.raises(ActivationError, match=r"cannot (reach|write) \S+.*MIND_ATLAS_ACTIVATIONS"):
        harvest(site, model, corpus, tmp_path, elsewhere=wrong)
