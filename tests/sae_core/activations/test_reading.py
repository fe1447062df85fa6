"""What is read: batches in training order, rows by their place, pairs of sites, and what is damaged."""

from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_core.activations import ActivationError, Activations, Pair, harvest, shards
from sae_core.errors import MindAtlasError
from sae_core.study import ActivationSettings, ModelSettings

Contents = Callable[[Path], dict[str, bytes]]


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


@pytest.mark.parametrize(("block", "offset"), [(49, 22), (50, 0), (-1, 0), (0, -1), (0, 32)])
def test_a_place_that_is_not_stored_is_refused(made: Path, block: int, offset: int) -> None:
    with pytest.raises(ActivationError, match=f"block {block}, offset {offset}"):
        Activations.open(made).rows(torch.tensor([0, block]), torch.tensor([0, offset]))


def test_activations_that_are_not_stored_are_computed_again_to_the_bit(
    made: Path, model: ModelSettings, corpus: Path, tmp_path: Path, site: ActivationSettings
) -> None:
    (again := tmp_path / "moved").mkdir()
    summary = harvest(site.model_copy(update={"stored": False}), model, corpus, again)
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
    made: Path, model: ModelSettings, corpus: Path, tmp_path: Path, site: ActivationSettings
) -> None:
    other = site.model_copy(update={"hook": "mlp_out", "sink_norm": 1.5})
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
    made: Path, model: ModelSettings, corpus: Path, tmp_path: Path, site: ActivationSettings
) -> None:
    harvest(site.model_copy(update={"seed": 1}), model, corpus, tmp_path)
    with pytest.raises(ActivationError, match="hold other tokens: read both sites over one corpus, with the same seed"):
        Pair(Activations.open(made), Activations.open(tmp_path))


def test_missing_and_damaged_shards_are_named(made: Path, tmp_path: Path, contents: Contents) -> None:
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
