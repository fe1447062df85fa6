"""What is written: each token once, as the model computes it on its document alone; stopped, and gone on with."""

import copy
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from sae_core.activations import ActivationError, Activations, harvest
from sae_core.artifacts import ArtifactError
from sae_core.corpus import Corpus
from sae_core.corpus.packing import Packer
from sae_core.language_model import LanguageModel, ModelError
from sae_core.study import ActivationSettings, ModelSettings

LENGTH = 32
Contents = Callable[[Path], dict[str, bytes]]
Write = Callable[..., None]


def test_every_stored_row_is_what_the_model_computes_on_its_document_alone(
    made: Path, corpus: Path, model: ModelSettings
) -> None:
    lm = LanguageModel.load(model, precision="float32")
    for split in ("train", "held_out"):
        blocks = getattr(Corpus.open(corpus), split)
        seen = 0
        for shard in Activations.open(made, split).shards():
            for i in range(0, len(shard.acts), 37):
                b, o = int(shard.block[i]), int(shard.offset[i])
                ids, documents = torch.tensor(blocks.token_ids[b]), torch.tensor(blocks.documents[b])
                assert shard.token[i] == ids[o]
                chunk = (documents == documents[o]).nonzero().squeeze(1)
                alone = lm.capture("resid_post", 1, ids[chunk][None])[0]
                torch.testing.assert_close(shard.acts[i], alone[o - int(chunk[0])])
                seen += 1
        assert seen >= 2


def test_every_token_is_stored_once_and_no_padding_is(made: Path, corpus: Path) -> None:
    for split, n_tokens in (("train", 1590), ("held_out", 70)):
        source = Activations.open(made, split)
        places = Counter((int(b), int(o)) for s in source.shards() for b, o in zip(s.block, s.offset, strict=True))
        documents = getattr(Corpus.open(corpus), split).documents
        assert set(places.values()) == {1}
        assert set(places) == {(int(b), int(o)) for b, o in np.argwhere(documents >= 0)}
        assert source.n_tokens == n_tokens


def test_a_shard_mixes_blocks_from_all_over_the_corpus_and_shuffles_their_rows(made: Path) -> None:
    first = next(iter(Activations.open(made).shards()))
    blocks = first.block.unique().tolist()
    assert len(blocks) == 8
    assert max(b - a for a, b in pairwise(blocks)) > 1
    assert (first.block[1:] == first.block[:-1]).float().mean() < 0.3


def test_summary_and_statistics_equal_those_of_the_rows(
    made: Path, model: ModelSettings, corpus: Path, site: ActivationSettings
) -> None:
    summary = harvest(site, model, corpus, made)
    train, held_out = Activations.open(made), Activations.open(made, "held_out")
    rows = torch.cat([shard.acts[~shard.is_sink] for shard in train.shards()]).double()
    mean, mean_square_norm = train.statistics()
    torch.testing.assert_close(mean, rows.mean(0).float())
    torch.testing.assert_close(mean_square_norm, rows.square().sum(1).mean()[None].float())
    kept = train.n_kept + held_out.n_kept
    assert summary["tokens"] == 1660
    assert summary["train_tokens"] == 1590
    assert summary["sinks"] == 1660 - kept
    assert summary["sink_share"] == (1660 - kept) / 1660
    assert summary["bytes"] == sum(path.stat().st_size for path in made.glob("*-*.safetensors"))


def test_sinks_are_the_tokens_far_beyond_the_median_norm_of_the_first_shard(
    model: ModelSettings, corpus: Path, tmp_path: Path, site: ActivationSettings
) -> None:
    summary = harvest(site.model_copy(update={"sink_norm": 1.2}), model, corpus, tmp_path)
    first = next(iter(Activations.open(tmp_path).shards())).acts.norm(dim=1)
    sinks = 0
    for split in ("train", "held_out"):
        for shard in Activations.open(tmp_path, split).shards():
            assert torch.equal(shard.is_sink, shard.acts.norm(dim=1) > 1.2 * first.median())
            sinks += int(shard.is_sink.sum())
    assert 0 < sinks == summary["sinks"]
    train = Activations.open(tmp_path)
    assert sum(len(b) for b in train.batches(10, train.n_kept // 10, seed=0)) == train.n_kept // 10 * 10
    kept = {tuple(row.tolist()) for shard in train.shards() for row in shard.acts[~shard.is_sink]}
    assert all(tuple(row.tolist()) in kept for batch in train.batches(10, 20, seed=0) for row in batch)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_settings_give_the_same_bytes_and_another_seed_another_order(
    model: ModelSettings, corpus: Path, tmp_path: Path, precision: str, site: ActivationSettings, contents: Contents
) -> None:
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        changed = site.model_copy(update={"seed": seed, "precision": precision})
        harvest(changed, model, corpus, tmp_path / name)
        results.append(contents(tmp_path / name))
    assert results[0] == results[1]
    assert results[0] != results[2]
    assert next(iter(Activations.open(tmp_path / "a").shards())).acts.dtype == getattr(torch, precision)


HARVEST_AND_DIE = """
import os, signal, sys
from pathlib import Path
from sae_core.activations import harvest
from sae_core.study import ActivationSettings, ModelSettings

def die(done, total, unit, **values):
    if done >= int(sys.argv[5]):
        os.kill(os.getpid(), signal.SIGKILL)

site, model = ActivationSettings.model_validate_json(sys.argv[1]), ModelSettings(source=sys.argv[2])
harvest(site, model, Path(sys.argv[3]), Path(sys.argv[4]), report=die)
"""


def check_resumed(
    model: ModelSettings, corpus: Path, folder: Path, made: Path, site: ActivationSettings, contents: Contents
) -> None:
    """Go on with a harvest that was stopped: shards that are there stay, and the result is as if it never stopped."""
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(before) < len(contents(made))
    reported: list[int] = []
    harvest(site, model, corpus, folder, report=lambda done, *_, **__: reported.append(done))
    assert contents(folder) == contents(made)
    assert all((folder / name).stat().st_mtime_ns == changed for name, changed in before.items())
    assert reported == sorted(reported)
    assert reported[-1] == 1660


def test_a_killed_harvest_goes_on_and_ends_byte_equal(
    model: ModelSettings, corpus: Path, made: Path, tmp_path: Path, site: ActivationSettings, contents: Contents
) -> None:
    arguments = [site.model_dump_json(), model.source, str(corpus), str(tmp_path), "600"]
    killed = subprocess.run([sys.executable, "-c", HARVEST_AND_DIE, *arguments], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    check_resumed(model, corpus, tmp_path, made, site, contents)


@pytest.mark.parametrize("after", [1, 300, 1500, 1660])
def test_an_interrupted_harvest_goes_on_and_ends_byte_equal(
    model: ModelSettings,
    corpus: Path,
    made: Path,
    tmp_path: Path,
    after: int,
    site: ActivationSettings,
    contents: Contents,
) -> None:
    def interrupt(done: int, *_: object, **__: float) -> None:
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harvest(site, model, corpus, tmp_path, report=interrupt)
    check_resumed(model, corpus, tmp_path, made, site, contents)


def test_values_that_are_not_finite_are_refused_and_not_written(
    model: ModelSettings, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: ActivationSettings
) -> None:
    capture = LanguageModel.capture_many

    def broken(self: LanguageModel, sites: Any, token_ids: torch.Tensor, *segments: Any) -> list[torch.Tensor]:
        found = capture(self, sites, token_ids, *segments)
        if token_ids.shape[1] == LENGTH:  # a block, and not what a model is tried out on
            found[0][0, 0, 5] = torch.nan
        return found

    monkeypatch.setattr(LanguageModel, "capture_many", broken)
    with pytest.raises(ActivationError, match=r"train-00000.safetensors: NaN or infinity .* train blocks \d+"):
        harvest(site, model, corpus, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("packing", ["documents", "concat"])
def test_the_packing_says_what_a_token_attends_to(
    model: ModelSettings,
    corpus: Path,
    made: Path,
    tmp_path: Path,
    packing: str,
    site: ActivationSettings,
    contents: Contents,
) -> None:
    harvest(site.model_copy(update={"packing": packing}), model, corpus, tmp_path)
    lm, blocks = LanguageModel.load(model, precision="float32"), Corpus.open(corpus).train
    shard = next(Activations.open(tmp_path).shards())
    whole = lm.capture("resid_post", 1, torch.tensor(blocks.token_ids))
    run_on = whole[shard.block.long(), shard.offset.long()]
    if packing == "concat":
        torch.testing.assert_close(shard.acts, run_on)
    else:
        assert contents(tmp_path) == contents(made)
        first = torch.tensor(blocks.documents)[shard.block.long(), shard.offset.long()]
        later = first != torch.tensor(blocks.documents)[shard.block.long(), 0]
        assert not torch.isclose(shard.acts[later], run_on[later]).all(dim=1).any()


def test_a_special_token_is_left_out_and_counted_also_when_its_id_is_0(
    tiny_model: Path, corpus: Path, tmp_path: Path, site: ActivationSettings
) -> None:
    """Beginning, end and padding share the id 0, as in Pythia; the model expects each text to begin with it."""
    folder = shutil.copytree(tiny_model, tmp_path / "zero")
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    tokenizer = AutoTokenizer.from_pretrained(folder, **names)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer("a").input_ids[0]) == (0, 0)
    packer = Packer(LENGTH, bos=0)
    for number in range(30):
        packer.add(number, [0, *range(3 + number, 3 + number + 20)])
    blocks = packer.blocks()
    (text := tmp_path / "text").mkdir()
    for split in ("train", "held_out"):
        save_file(blocks._asdict(), text / f"{split}.safetensors")
    left_out = (blocks.token_ids == 0) & (blocks.documents >= 0)
    model, kept = ModelSettings(source=str(folder)), {}
    for setting in ("leave_out", "keep"):
        (out := tmp_path / setting).mkdir()
        summary = harvest(site.model_copy(update={"special_tokens": setting, "sink_norm": 1e6}), model, text, out)
        kept[setting] = [s.token[~s.is_sink] for s in Activations.open(out).shards()]
        wanted = 2 * left_out.sum() if setting == "leave_out" else 0
        assert (summary["specials"], summary["sinks"]) == (wanted, 0)
        assert summary["special_share"] == wanted / summary["tokens"]
    assert not (torch.cat(kept["leave_out"]) == 0).any()
    assert (torch.cat(kept["keep"]) == 0).sum() == left_out.sum() > 30  # repeated where a document goes on
    assert len(torch.cat(kept["leave_out"])) == (blocks.documents >= 0).sum() - left_out.sum()


def test_a_token_of_text_is_no_padding_though_it_has_the_id_of_padding(lm: LanguageModel) -> None:
    odd = copy.copy(lm)
    odd.tokenizer = copy.deepcopy(lm.tokenizer)
    odd.tokenizer.pad_token_id = 7
    ids = torch.tensor([7, 2, 9, 7])
    assert odd.is_special(ids, torch.arange(4)).tolist() == [False, True, False, False]


def test_the_first_tokens_of_what_is_attended_to_are_left_out_where_one_asks_for_it(
    model: ModelSettings, corpus: Path, tmp_path: Path, site: ActivationSettings
) -> None:
    documents = Corpus.open(corpus).train.documents
    starts = np.diff(documents, axis=1, prepend=-2) != 0
    for packing, first in (("documents", starts), ("concat", np.arange(LENGTH)[None].repeat(len(documents), 0) == 0)):
        (out := tmp_path / packing).mkdir()
        changed = {"packing": packing, "sink_positions": 1, "sink_norm": 1e6}
        summary = harvest(site.model_copy(update=changed), model, corpus, out)
        for shard in Activations.open(out).shards():
            assert torch.equal(shard.is_sink, torch.tensor(first)[shard.block.long(), shard.offset.long()])
        assert summary["sinks"] > 0 == summary["specials"]


def test_what_half_floats_cannot_hold_is_refused_with_the_cure(
    tiny_model: Path, corpus: Path, tmp_path: Path, site: ActivationSettings
) -> None:
    half = site.model_copy(update={"precision": "float16"})
    (fine := tmp_path / "fine").mkdir()
    harvest(half, ModelSettings(source=str(tiny_model)), corpus, fine)
    assert next(Activations.open(fine).shards()).acts.dtype == torch.float16
    folder = shutil.copytree(tiny_model, tmp_path / "loud")
    weights = load_torch(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 1e6
    save_torch(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (out := tmp_path / "out").mkdir()
    with pytest.raises(ActivationError, match=r'infinity .* set activations.precision = "bfloat16" or "float32"'):
        harvest(half, ModelSettings(source=str(folder)), corpus, out)
    assert not list(out.iterdir())


def test_batches_are_halved_until_they_fit_into_memory(
    model: ModelSettings,
    corpus: Path,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    site: ActivationSettings,
) -> None:
    capture, most, asked = LanguageModel.capture_many, 3, []

    def limited(self: LanguageModel, sites: Any, ids: torch.Tensor, *segments: Any) -> list[torch.Tensor]:
        if ids.shape[1] == LENGTH:  # a block, and not what a model is tried out on
            asked.append(len(ids))
            if len(ids) > most:
                raise torch.cuda.OutOfMemoryError
        return capture(self, sites, ids, *segments)

    monkeypatch.setattr(LanguageModel, "capture_many", limited)
    harvest(site, model, corpus, tmp_path)
    assert asked[:6] == [8, 4, 2, 2, 2, 2]
    for ours, theirs in zip(Activations.open(tmp_path).shards(), Activations.open(made).shards(), strict=True):
        torch.testing.assert_close(ours.acts, theirs.acts)
        assert torch.equal(ours.token, theirs.token)
    most = 0
    (out := tmp_path / "out").mkdir()
    with pytest.raises(ActivationError, match=f"a block of {LENGTH} tokens does not fit into the GPU's memory"):
        harvest(site, model, corpus, out)


def test_bad_input_is_refused_before_the_work_starts(
    model: ModelSettings,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    site: ActivationSettings,
    write_blocks: Write,
) -> None:
    with pytest.raises(ModelError, match="layer = 9"):
        harvest(site.model_copy(update={"layer": 9}), model, corpus, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    write_blocks(other, "train", 40, vocab=2000)
    write_blocks(other, "held_out", 40)
    with pytest.raises(ActivationError, match="the model only 512"):
        harvest(site, model, other, tmp_path)
    write_blocks(other, "train", 0)
    with pytest.raises(ActivationError, match="no train tokens"):
        harvest(site, model, other, tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ArtifactError, match="free"):
        harvest(site, model, corpus, tmp_path)


def test_a_corpus_without_held_out_text_gives_train_activations(
    model: ModelSettings, tmp_path: Path, site: ActivationSettings, write_blocks: Write
) -> None:
    write_blocks(tmp_path, "train", 40)
    write_blocks(tmp_path, "held_out", 0)
    folder = tmp_path / "out"
    folder.mkdir()
    assert harvest(site, model, tmp_path, folder)["tokens"] == 40
    with pytest.raises(ActivationError, match="holds no held_out activations"):
        Activations.open(folder, "held_out")


def test_a_compiled_model_gives_the_same_but_for_rounding_and_the_same_bytes_each_time(
    model: ModelSettings, corpus: Path, made: Path, site: ActivationSettings, contents: Contents, tmp_path: Path
) -> None:
    harvested = []
    for name in ("once", "again"):
        (folder := tmp_path / name).mkdir()
        harvest(site.model_copy(update={"compiled": True}), model, corpus, folder)
        harvested.append(contents(folder))
        for ours, plain in zip(Activations.open(folder).shards(), Activations.open(made).shards(), strict=True):
            torch.testing.assert_close(ours.acts, plain.acts)
            assert torch.equal(ours.token, plain.token)
    assert harvested[0] == harvested[1]


def test_where_nothing_can_be_compiled_the_cure_is_said(
    model: ModelSettings, corpus: Path, site: ActivationSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    torch._dynamo.reset()
    with pytest.raises(ModelError, match=r"No working C\+\+ compiler.* set activations.compiled = false"):
        harvest(site.model_copy(update={"compiled": True}), model, corpus, tmp_path)
    assert not list(tmp_path.iterdir())
