"""Round trips through every format, formats told by their files, and folders that are none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipelines.commands.use import export
from sae_core import interop
from sae_core.artifacts import ArtifactError
from sae_core.dictionary import Dictionary
from sae_core.interop import FORMATS, InteropError
from sae_core.interop.foreign import read_tensors
from sae_core.names import Site
from sae_core.study import PENALIZED, Architecture

SITE = Site("smollm2-135m-instruct", "resid_post", 15, "quickstart")
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "rank_scale")
AUTOENCODERS = [name for name in get_args(Architecture) if name != "transcoder"]


def dictionary(
    architecture: str = "batch_top_k", d_model: int = 6, d_sae: int = 20, seed: int = 0, scale: float = 1.0,
    ranked: bool = False,
) -> Dictionary:  # fmt: skip
    """A finished dictionary of ours, random; a ranked one keeps each token's three largest."""
    rng = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_model, generator=rng), dim=1)
    threshold = torch.zeros(d_sae) if ranked or architecture == "relu" else scale * torch.rand(d_sae, generator=rng)
    sparsity = {"l1_coefficient": 5.0} if architecture in PENALIZED else {"k": 3}
    return Dictionary(
        torch.randn(d_model, d_sae, generator=rng), scale * torch.randn(d_sae, generator=rng), W_dec,
        scale * torch.randn(d_model, generator=rng), threshold, {"architecture": architecture, **sparsity},
        torch.rand(d_sae, generator=rng) + 0.5 if ranked else None,
    )  # fmt: skip


def assert_equal(read: Dictionary, written: Dictionary, tolerance: float) -> None:
    """Equal within `tolerance`, relative to the largest number of each tensor."""
    for name in TENSORS:
        ours, theirs = getattr(written, name), getattr(read, name)
        if ours is None:
            assert theirs is None, name
            continue
        torch.testing.assert_close(theirs, ours, rtol=0, atol=tolerance * max(float(ours.abs().max()), 1e-30))
    for key in ("architecture", "k", "l1_coefficient", "d_model", "d_sae"):
        assert read.config.get(key) == written.config.get(key), key


def test_a_transcoder_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(InteropError, match="only autoencoders are"):
        interop.write(dictionary("transcoder"), tmp_path / "out", "saelens")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format_", ["saelens", "dictionary_learning"])
@settings(max_examples=25, deadline=None)
@given(
    architecture=st.sampled_from(AUTOENCODERS), d_model=st.integers(1, 40), d_sae=st.integers(3, 90),
    seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e4),
)  # fmt: skip
def test_thresholds_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, format_: str, architecture: str, d_model: int, d_sae: int, seed: int,
    scale: float,
) -> None:  # fmt: skip
    ours, folder = dictionary(architecture, d_model, d_sae, seed, scale), tmp_path_factory.mktemp("out")
    interop.write(ours, folder, format_, SITE)
    assert_equal(interop.read(folder), ours, 0)


@pytest.mark.parametrize("format_", FORMATS)
@settings(max_examples=25, deadline=None)
@given(d_model=st.integers(1, 40), d_sae=st.integers(3, 90), seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3))
def test_ranks_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, format_: str, d_model: int, d_sae: int, seed: int, scale: float
) -> None:
    ours, folder = dictionary("top_k", d_model, d_sae, seed, scale, ranked=True), tmp_path_factory.mktemp("out")
    interop.write(ours, folder, format_)
    read = interop.read(folder)
    x = scale * torch.randn(16, d_model, generator=torch.Generator().manual_seed(seed))
    assert int((read.encode(x) > 0).sum(1).max()) <= 3
    assert_equal(read, ours, 2e-6 * (1 + d_model**0.5))  # b_dec @ W_enc is added to b_enc, and taken away again


@pytest.mark.parametrize("format_", ["saelens", "dictionary_learning"])
def test_an_export_holds_thresholded_weights_bit_for_bit(format_: str, tmp_path: Path) -> None:
    ours = dictionary("jump_relu")
    interop.write(ours, tmp_path, format_)
    stored = read_tensors(tmp_path / FORMATS[format_].files[1])
    for name in TENSORS[:5]:
        assert torch.equal(stored[name], getattr(ours, name)), name


def test_exports_say_where_the_dictionary_reads(tmp_path: Path) -> None:
    said = {}
    for format_ in FORMATS:
        interop.write(dictionary("top_k", ranked=True), tmp_path / format_, format_, SITE)
        said[format_] = json.loads((tmp_path / format_ / FORMATS[format_].files[0]).read_text())
    metadata = said["saelens"]["metadata"]
    assert (metadata["hook_name"], metadata["model_name"]) == ("blocks.15.hook_resid_post", SITE.model)
    assert said["dictionary_learning"]["trainer"]["layer"] == 15
    assert said["sparsify"]["mind_atlas_site"] == SITE.slug


def test_a_site_that_the_library_has_no_name_for_gets_none(tmp_path: Path) -> None:
    interop.write(dictionary(), tmp_path, "saelens", SITE._replace(hook="mlp_in"))
    assert "hook_name" not in json.loads((tmp_path / "cfg.json").read_text())["metadata"]


def test_an_imported_dictionary_is_saved_and_loaded_with_its_ranks(tmp_path: Path) -> None:
    interop.write(dictionary("top_k", ranked=True), tmp_path / "theirs", "sparsify")
    read = interop.read(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    read.save(tmp_path / "ours")
    loaded = Dictionary.load(tmp_path / "ours")
    assert_equal(loaded, read, 0)
    assert loaded.config == read.config


def test_a_folder_without_a_dictionary_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(InteropError, match=r"looked for cfg.json and sae_weights.safetensors \(saelens\); config.json"):
        interop.read(tmp_path)
    with pytest.raises(InteropError, match="holds no dictionary that is known"):
        interop.read(tmp_path / "absent")


def test_files_of_two_formats_in_one_folder_must_be_told_apart(tmp_path: Path) -> None:
    for format_ in ("saelens", "dictionary_learning"):
        interop.write(dictionary(), tmp_path / format_, format_)
        for file in (tmp_path / format_).iterdir():
            file.rename(tmp_path / file.name)
    with pytest.raises(InteropError, match="holds files of saelens and dictionary_learning: say which"):
        interop.read(tmp_path)
    assert interop.read(tmp_path, "saelens").config["imported"]["format"] == "saelens"


def test_unknown_formats_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    for act in (lambda: interop.read(tmp_path, "keras"), lambda: interop.write(dictionary(), tmp_path, "keras")):
        with pytest.raises(InteropError, match="'keras': known are saelens, dictionary_learning, sparsify"):
            act()


def test_nothing_is_written_over_anything(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ArtifactError, match=r"holds mine.txt already: name a new or an empty folder"):
        interop.write(dictionary(), tmp_path, "saelens")
    with pytest.raises(ArtifactError, match="cannot write to"):
        interop.write(dictionary(), tmp_path / "mine.txt", "saelens")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null", b'{"d_in": 1e999}'])
def test_a_config_that_is_none_is_refused(format_: str, content: bytes, tmp_path: Path) -> None:
    interop.write(dictionary("top_k", ranked=True), tmp_path, format_)
    (tmp_path / FORMATS[format_].files[0]).write_bytes(content)
    with pytest.raises(InteropError, match=FORMATS[format_].files[0]):
        interop.read(tmp_path)


@pytest.mark.parametrize("format_", FORMATS)
@settings(max_examples=40, deadline=None)
@given(key=st.integers(0, 30), value=st.sampled_from([None, True, -1, 2.5, "x", [], {}, 10**12]))
def test_a_config_with_a_value_out_of_place_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, format_: str, key: int, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("changed")
    interop.write(dictionary("top_k", ranked=True), folder, format_, SITE)
    path = folder / FORMATS[format_].files[0]
    config = json.loads(path.read_text())
    tables = [table for table in (config, config.get("trainer"), config.get("metadata")) if table]
    places = [(table, name) for table in tables for name in table]
    table, name = places[key % len(places)]
    table[name] = value
    path.write_text(json.dumps(config))
    try:
        read = interop.read(folder)
    except InteropError:
        return
    assert read.rank_scale is not None  # whatever was changed, a TopK never becomes a ReLU


@pytest.mark.parametrize("cut", [0, 7, 100, 700])
@pytest.mark.parametrize("format_", FORMATS)
def test_a_file_that_was_cut_short_is_refused(format_: str, cut: int, tmp_path: Path) -> None:
    interop.write(dictionary("top_k", ranked=True), tmp_path, format_)
    path = tmp_path / FORMATS[format_].files[1]
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InteropError, match="cannot be read"):
        interop.read(tmp_path)


def test_the_command_line_knows_every_format() -> None:
    choice: Any = next(parameter for parameter in export.params if parameter.name == "format_").type
    assert tuple(choice.choices) == (*FORMATS, "neuronpedia", "site")  # a dictionary's, and an atlas's


def test_the_dense_and_the_sparse_encoding_of_ranks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_core.dictionary.sparse.BLOCK_BYTES", {"cpu": 20 * 5})  # small blocks
    ours = dictionary("top_k", ranked=True)
    x = torch.randn(33, 6, generator=torch.Generator().manual_seed(3))
    acts = ours.encode_sparse(x)
    dense = torch.zeros(33, 20)
    dense[acts.row, acts.feature] = acts.value
    torch.testing.assert_close(dense, ours.encode(x), rtol=1e-5, atol=1e-6)
    place = acts.row * 20 + acts.feature
    assert torch.equal(place, place.unique())
    assert acts.n_rows == 33


def best_three(ours: Dictionary, x: Tensor) -> Tensor:
    """The definition, a token and a feature at a time."""
    z, scale = ours.pre_acts(x), ours.rank_scale
    assert scale is not None
    kept = torch.zeros_like(z)
    for row in range(len(z)):
        ranks = sorted(range(z.shape[1]), key=lambda i: -float(z[row, i] * scale[i]))
        for i in ranks[:3]:
            kept[row, i] = z[row, i].relu()
    return kept


def test_ranks_keep_the_three_largest_by_scale_where_positive() -> None:
    ours = dictionary("top_k", ranked=True)
    x = torch.randn(33, 6, generator=torch.Generator().manual_seed(4))
    ours.b_enc[:] -= 5  # on some tokens fewer than three are positive
    assert torch.equal(ours.encode(x), best_three(ours, x))
    assert {0, 3} <= set((ours.encode(x) > 0).sum(1).tolist())


def test_no_tokens_at_all_have_no_ranks() -> None:
    acts = dictionary("top_k", ranked=True).encode_sparse(torch.zeros(0, 6))
    assert (len(acts.row), acts.n_rows) == (0, 0)


def damage(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        if name == "config":
            config = json.loads((folder / "config.json").read_text())
            change(config)
            (folder / "config.json").write_text(json.dumps(config))
        else:
            tensors = {key: tensor.clone() for key, tensor in load_file(folder / "dictionary.safetensors").items()}
            tensors[name] = change(tensors[name])
            save_file(tensors, folder / "dictionary.safetensors")

    return apply


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (damage("rank_scale", lambda t: t * 0), "rank_scale is not positive everywhere"),
        (damage("rank_scale", lambda t: t[:5]), "rank_scale is"),
        (damage("config", lambda config: config.pop("k")), "k = None; with rank_scale it must be a whole number"),
        (damage("config", lambda config: config.update(k=21)), "k = 21; with rank_scale"),
    ],
)
def test_saved_ranks_that_mean_nothing_are_refused(spoil: Callable[[Path], None], why: str, tmp_path: Path) -> None:
    from sae_core.dictionary import DictionaryError

    dictionary("top_k", ranked=True).save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DictionaryError, match=why):
        Dictionary.load(tmp_path)
