import copy
import shutil
import signal
import subprocess
import sys
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from sae_core.activations import ActivationError, Activations, Pair, harvest, shards
from sae_core.artifacts import ArtifactError
from sae_core.corpus import Corpus
from sae_core.corpus.packing import Packer
from sae_core.errors import MindAtlasError
from sae_core.language_model import LanguageModel, ModelError
from sae_core.study import ActivationSettings, ModelSettings

LENGTH = 32
SITE = ActivationSettings(layer=1, precision="float32", shard_tokens=256)


def write_blocks(folder: Path, split: str, n_tokens: int, seed: int, vocab: int = 512) -> None:
    """Random tokens in documents of 1 to 50 tokens, the last block padded."""
    rng = np.random.default_rng(seed)
    n_blocks = -(-n_tokens // LENGTH)
    documents = np.full(n_blocks * LENGTH, -1, np.int32)
    documents[:n_tokens] = np.repeat(np.arange(n_tokens), rng.integers(1, 50, n_tokens))[:n_tokens]
    arrays = {"token_ids": rng.integers(3, vocab, n_blocks * LENGTH).astype(np.int32), "documents": documents}
    arrays["positions"] = np.zeros_like(documents)
    save_file({name: a.reshape(n_blocks, LENGTH) for name, a in arrays.items()}, folder / f"{split}.safetensors")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_blocks(folder, "train", 1000, 0)
    write_blocks(folder, "held_out", 70, 1)
    return folder


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ModelSettings:
    return ModelSettings(source=str(tiny_model))


@pytest.fixture(scope="module")
def made(model: ModelSettings, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("activations")
    harvest(SITE, model, corpus, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


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
    for split, n_tokens in (("train", 1000), ("held_out", 70)):
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


def test_summary_and_statistics_equal_those_of_the_rows(made: Path, model: ModelSettings, corpus: Path) -> None:
    summary = harvest(SITE, model, corpus, made)
    train, held_out = Activations.open(made), Activations.open(made, "held_out")
    rows = torch.cat([shard.acts[~shard.is_sink] for shard in train.shards()]).double()
    mean, mean_square_norm = train.statistics()
    torch.testing.assert_close(mean, rows.mean(0).float())
    torch.testing.assert_close(mean_square_norm, rows.square().sum(1).mean()[None].float())
    kept = train.n_kept + held_out.n_kept
    assert summary["tokens"] == 1070
    assert summary["train_tokens"] == 1000
    assert summary["sinks"] == 1070 - kept
    assert summary["sink_share"] == (1070 - kept) / 1070
    assert summary["bytes"] == sum(path.stat().st_size for path in made.glob("*-*.safetensors"))


def test_sinks_are_the_tokens_far_beyond_the_median_norm_of_the_first_shard(
    model: ModelSettings, corpus: Path, tmp_path: Path
) -> None:
    site = SITE.model_copy(update={"sink_norm": 1.2})
    summary = harvest(site, model, corpus, tmp_path)
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
    model: ModelSettings, corpus: Path, tmp_path: Path, precision: str
) -> None:
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        site = SITE.model_copy(update={"seed": seed, "precision": precision})
        harvest(site, model, corpus, tmp_path / name)
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


def check_resumed(model: ModelSettings, corpus: Path, folder: Path, made: Path) -> None:
    """Go on with a harvest that was stopped: shards that are there stay, and the result is as if it never stopped."""
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(before) < len(contents(made))
    reported: list[int] = []
    harvest(SITE, model, corpus, folder, report=lambda done, *_, **__: reported.append(done))
    assert contents(folder) == contents(made)
    assert all((folder / name).stat().st_mtime_ns == changed for name, changed in before.items())
    assert reported == sorted(reported)
    assert reported[-1] == 1070


def test_a_killed_harvest_goes_on_and_ends_byte_equal(
    model: ModelSettings, corpus: Path, made: Path, tmp_path: Path
) -> None:
    arguments = [SITE.model_dump_json(), model.source, str(corpus), str(tmp_path), "600"]
    killed = subprocess.run([sys.executable, "-c", HARVEST_AND_DIE, *arguments], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    check_resumed(model, corpus, tmp_path, made)


@pytest.mark.parametrize("after", [1, 300, 1000, 1070])
def test_an_interrupted_harvest_goes_on_and_ends_byte_equal(
    model: ModelSettings, corpus: Path, made: Path, tmp_path: Path, after: int
) -> None:
    def interrupt(done: int, *_: object, **__: float) -> None:
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harvest(SITE, model, corpus, tmp_path, report=interrupt)
    check_resumed(model, corpus, tmp_path, made)


def test_values_that_are_not_finite_are_refused_and_not_written(
    model: ModelSettings, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = LanguageModel.capture_many

    def broken(self: LanguageModel, sites: Any, token_ids: torch.Tensor, *segments: Any) -> list[torch.Tensor]:
        found = capture(self, sites, token_ids, *segments)
        if token_ids.shape[1] == LENGTH:  # a block, and not what a model is tried out on
            found[0][0, 0, 5] = torch.nan
        return found

    monkeypatch.setattr(LanguageModel, "capture_many", broken)
    with pytest.raises(ActivationError, match=r"train-00000.safetensors: NaN or infinity .* train blocks \d+"):
        harvest(SITE, model, corpus, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("packing", ["documents", "concat"])
def test_the_packing_says_what_a_token_attends_to(
    model: ModelSettings, corpus: Path, made: Path, tmp_path: Path, packing: str
) -> None:
    harvest(SITE.model_copy(update={"packing": packing}), model, corpus, tmp_path)
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
    tiny_model: Path, corpus: Path, tmp_path: Path
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
        summary = harvest(SITE.model_copy(update={"special_tokens": setting, "sink_norm": 1e6}), model, text, out)
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
    model: ModelSettings, corpus: Path, tmp_path: Path
) -> None:
    documents = Corpus.open(corpus).train.documents
    starts = np.diff(documents, axis=1, prepend=-2) != 0
    for packing, first in (("documents", starts), ("concat", np.arange(LENGTH)[None].repeat(len(documents), 0) == 0)):
        (out := tmp_path / packing).mkdir()
        changed = {"packing": packing, "sink_positions": 1, "sink_norm": 1e6}
        summary = harvest(SITE.model_copy(update=changed), model, corpus, out)
        for shard in Activations.open(out).shards():
            assert torch.equal(shard.is_sink, torch.tensor(first)[shard.block.long(), shard.offset.long()])
        assert summary["sinks"] > 0 == summary["specials"]


def test_what_half_floats_cannot_hold_is_refused_with_the_cure(tiny_model: Path, corpus: Path, tmp_path: Path) -> None:
    half = SITE.model_copy(update={"precision": "float16"})
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
    model: ModelSettings, corpus: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture, most, asked = LanguageModel.capture_many, 3, []

    def limited(self: LanguageModel, sites: Any, ids: torch.Tensor, *segments: Any) -> list[torch.Tensor]:
        if ids.shape[1] == LENGTH:  # a block, and not what a model is tried out on
            asked.append(len(ids))
            if len(ids) > most:
                raise torch.cuda.OutOfMemoryError
        return capture(self, sites, ids, *segments)

    monkeypatch.setattr(LanguageModel, "capture_many", limited)
    harvest(SITE, model, corpus, tmp_path)
    assert asked[:6] == [8, 4, 2, 2, 2, 2]
    for ours, theirs in zip(Activations.open(tmp_path).shards(), Activations.open(made).shards(), strict=True):
        torch.testing.assert_close(ours.acts, theirs.acts)
        assert torch.equal(ours.token, theirs.token)
    most = 0
    (out := tmp_path / "out").mkdir()
    with pytest.raises(ActivationError, match=f"a block of {LENGTH} tokens does not fit into the GPU's memory"):
        harvest(SITE, model, corpus, out)


def test_bad_input_is_refused_before_the_work_starts(
    model: ModelSettings, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="layer = 9"):
        harvest(SITE.model_copy(update={"layer": 9}), model, corpus, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    write_blocks(other, "train", 40, 0, vocab=2000)
    write_blocks(other, "held_out", 40, 0)
    with pytest.raises(ActivationError, match="the model only 512"):
        harvest(SITE, model, other, tmp_path)
    write_blocks(other, "train", 0, 0)
    with pytest.raises(ActivationError, match="no train tokens"):
        harvest(SITE, model, other, tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ArtifactError, match="free"):
        harvest(SITE, model, corpus, tmp_path)


def test_a_corpus_without_held_out_text_gives_train_activations(model: ModelSettings, tmp_path: Path) -> None:
    write_blocks(tmp_path, "train", 40, 0)
    write_blocks(tmp_path, "held_out", 0, 0)
    folder = tmp_path / "out"
    folder.mkdir()
    assert harvest(SITE, model, tmp_path, folder)["tokens"] == 40
    with pytest.raises(ActivationError, match="holds no held_out activations"):
        Activations.open(folder, "held_out")


def test_an_epoch_gives_each_kept_row_once_and_the_next_another_order(made: Path) -> None:
    source = Activations.open(made)
    n = source.n_kept
    stream = torch.cat(list(source.batches(50, 2 * n // 50, seed=3)))
    rows = torch.cat([shard.acts[~shard.is_sink] for shard in source.shards()])
    expected = Counter(map(tuple, rows.tolist()))
    assert Counter(map(tuple, stream[:n].tolist())) == expected
    assert Counter(map(tuple, stream[n : 2 * n].tolist())) <= expected
    assert not torch.equal(stream[: n // 2], stream[n : n + n // 2])
    assert torch.equal(stream, torch.cat(list(source.batches(50, 2 * n // 50, seed=3))))
    assert not torch.equal(stream, torch.cat(list(source.batches(50, 2 * n // 50, seed=4))))


@settings(max_examples=25, deadline=None)
@given(
    batch_tokens=st.integers(1, 700), n_steps=st.integers(0, 12), start=st.integers(0, 14), small=st.booleans(),
    seed=st.integers(-3, 2**62),
)  # fmt: skip
def test_starting_late_gives_what_would_have_followed(
    made: Path, batch_tokens: int, n_steps: int, start: int, small: bool, seed: int
) -> None:
    source = Activations.open(made)
    before = shards.SHUFFLE_BYTES
    shards.SHUFFLE_BYTES = 1 if small else before
    try:
        whole = list(source.batches(batch_tokens, n_steps, seed))
        rest = list(source.batches(batch_tokens, n_steps, seed, start_step=start))
    finally:
        shards.SHUFFLE_BYTES = before
    assert len(whole) == n_steps
    assert len(rest) == max(0, n_steps - start)
    assert all(batch.shape == (batch_tokens, 32) for batch in whole)
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_with_little_memory_two_shards_are_mixed_at_a_time(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHUFFLE_BYTES", 1)
    source = Activations.open(made)
    shard_rows = [set(map(tuple, shard.acts.tolist())) for shard in source.shards()]
    first = set(map(tuple, torch.cat(list(source.batches(1, 480, seed=0))).tolist()))
    assert not any(first <= rows for rows in shard_rows)
    assert any(first <= a | b for a, b in combinations(shard_rows, 2))


def test_rows_are_found_by_their_place(made: Path) -> None:
    source = Activations.open(made)
    stored = list(source.shards())
    block, offset, acts = (torch.cat([getattr(s, name) for s in stored]) for name in ("block", "offset", "acts"))
    pick = torch.randperm(len(block), generator=torch.Generator().manual_seed(0))[:300]
    assert torch.equal(source.rows(block[pick], offset[pick]), acts[pick])
    assert source.rows(block[:0], offset[:0]).shape == (0, 32)


@pytest.mark.parametrize(("block", "offset"), [(31, 8), (32, 0), (-1, 0), (0, -1), (0, 32)])
def test_a_place_that_is_not_stored_is_refused(made: Path, block: int, offset: int) -> None:
    with pytest.raises(ActivationError, match=f"block {block}, offset {offset}"):
        Activations.open(made).rows(torch.tensor([0, block]), torch.tensor([0, offset]))


def test_activations_that_are_not_stored_are_computed_again_to_the_bit(
    made: Path, model: ModelSettings, corpus: Path, tmp_path: Path
) -> None:
    (again := tmp_path / "moved").mkdir()
    summary = harvest(SITE.model_copy(update={"stored": False}), model, corpus, again)
    assert summary["tokens"] == Activations.open(made).n_tokens + Activations.open(made, "held_out").n_tokens
    for split in ("train", "held_out"):
        stored, computed = Activations.open(made, split), Activations.open(again, split)
        assert (computed.n_tokens, computed.n_kept, computed.d_model) == (
            stored.n_tokens,
            stored.n_kept,
            stored.d_model,
        )
        for ours, theirs in zip(computed.shards(), stored.shards(), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    batches = (Activations.open(folder).batches(100, 15, seed=2, start_step=3) for folder in (made, again))
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_a_pair_of_sites_gives_both_activations_of_the_same_tokens(
    made: Path, model: ModelSettings, corpus: Path, tmp_path: Path
) -> None:
    other = SITE.model_copy(update={"hook": "mlp_out", "sink_norm": 1.5})
    harvest(other, model, corpus, tmp_path)
    read, written = Activations.open(made), Activations.open(tmp_path)
    pair = Pair(read, written)
    sinks = torch.cat([a.is_sink | b.is_sink for a, b in zip(read.shards(), written.shards(), strict=True)])
    assert pair.n_kept == int((~sinks).sum()) < min(read.n_kept, written.n_kept) + 1
    assert pair.statistics().mean.shape == (2, pair.d_model)
    a_pass = torch.cat(list(pair.batches(pair.n_kept, 1, seed=3)))
    assert a_pass.shape == (pair.n_kept, 2, pair.d_model)
    stored = (
        torch.cat([shard.acts for shard in read.shards()])[~sinks],
        torch.cat([s.acts for s in written.shards()])[~sinks],
    )
    assert {tuple(row.flatten().tolist()) for row in a_pass} == {
        tuple(torch.cat(both).tolist()) for both in zip(*stored, strict=True)
    }


def test_a_pair_of_sites_over_other_tokens_is_refused(
    made: Path, model: ModelSettings, corpus: Path, tmp_path: Path
) -> None:
    harvest(SITE.model_copy(update={"seed": 1}), model, corpus, tmp_path)
    with pytest.raises(ActivationError, match="hold other tokens: read both sites over one corpus, with the same seed"):
        Pair(Activations.open(made), Activations.open(tmp_path))


def test_missing_and_damaged_shards_are_named(made: Path, tmp_path: Path) -> None:
    for name, content in contents(made).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "train-00001.safetensors").unlink()
    with pytest.raises(ActivationError, match="lacks train-00001"):
        Activations.open(tmp_path)
    (tmp_path / "held_out-00000.safetensors").write_bytes(b"short")
    with pytest.raises(ActivationError, match=r"held_out-00000\.safetensors cannot be read"):
        Activations.open(tmp_path, "held_out")
    with pytest.raises(MindAtlasError, match="holds no train activations"):
        Activations.open(tmp_path / "nowhere")
