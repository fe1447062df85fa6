from pathlib import Path

import numpy as np
import pytest
import torch

from sae_core.activations import ActivationError, Activations, harvest, shards
from sae_core.activations.encoding import decode, encode, row_bytes
from sae_core.study import ActivationSettings, ModelSettings


def residual_stream(n: int = 3000, d_model: int = 64) -> torch.Tensor:
    """Rows with two dimensions that are far from 0 on every token, as a model's are."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d_model)) * rng.uniform(0.2, 20, (n, 1))
    x[:, 3] += 200
    x[:, 40] -= 90
    return torch.tensor(x, dtype=torch.float32)


def test_a_byte_is_off_by_half_a_step_of_its_row_at_most():
    x = residual_stream()
    columns = encode(x, torch.zeros(len(x), dtype=torch.bool), "int8")
    back = decode(columns).double().numpy()
    centered = x.double().numpy() - columns["center"].double().numpy()
    step = np.abs(centered).max(1, keepdims=True) / 127
    rounding = np.abs(x.double().numpy()) * 2.0**-8  # of bfloat16
    assert (np.abs(back - x.numpy()) <= step / 2 * 1.001 + rounding).all()
    assert columns["acts"].dtype == torch.int8
    assert np.allclose(columns["center"], x.numpy().mean(0), rtol=1e-5, atol=1e-5)


def test_the_center_takes_far_off_dimensions_out_of_the_scale():
    x = residual_stream()
    step = x.abs().amax(1, keepdim=True) / 127
    plain = (x - (x / step).round() * step).square().sum()
    columns = encode(x, torch.zeros(len(x), dtype=torch.bool), "int8")
    bytes_alone = columns["acts"].float() * columns["scale"][:, None] + columns["center"]
    assert (x - bytes_alone).square().sum() < plain / 5


@pytest.mark.parametrize("sinks", [0, 1, 5])
def test_rows_that_are_all_alike_or_all_sinks_come_back(sinks: int):
    x = torch.full((5, 8), 3.0)
    is_sink = torch.arange(5) < sinks
    assert torch.equal(decode(encode(x, is_sink, "int8")).float(), x)
    assert torch.equal(decode(encode(torch.zeros(5, 8), is_sink, "int8")).float(), torch.zeros(5, 8))


@pytest.mark.parametrize("kept_as", ["float32", "bfloat16", "float16", "int8"])
def test_some_rows_are_decoded_as_all_are(kept_as: str):
    columns = encode(residual_stream(), torch.zeros(3000, dtype=torch.bool), kept_as)
    whole = decode(columns)
    some = torch.tensor([7, 2999, 0, 7])
    marked = torch.arange(3000) % 7 == 2
    assert torch.equal(decode(columns, some), whole[some])
    assert torch.equal(decode(columns, marked), whole[marked])
    assert torch.equal(decode(columns, slice(5)), whole[:5])
    assert decode(columns, some[:0]).shape == (0, 64)


def test_what_float16_cannot_hold_is_refused_with_the_cure():
    with pytest.raises(ActivationError, match=r'7e\+04 is more than float16 holds.*set .*kept_as = "bfloat16"'):
        encode(torch.tensor([[1.0, -7e4]]), torch.tensor([False]), "float16")
    assert decode(encode(torch.tensor([[1.0, 65504.0]]), torch.tensor([False]), "float16")).isfinite().all()


@pytest.mark.parametrize("kept_as", ["float32", "bfloat16", "float16", "int8"])
def test_activations_are_kept_in_any_type_and_the_summary_says_what_that_loses(
    site: ActivationSettings, made: Path, model: ModelSettings, corpus: Path, tmp_path: Path, kept_as: str
):
    summary = harvest(site.model_copy(update={"kept_as": kept_as}), model, corpus, tmp_path)
    kept, exact = Activations.open(tmp_path), Activations.open(made)
    pairs = list(zip(kept.shards(), exact.shards(), strict=True))
    assert all(torch.equal(a.block, b.block) and torch.equal(a.is_sink, b.is_sink) for a, b in pairs)
    x = torch.cat([shard.acts[~shard.is_sink] for _, shard in pairs]).double()
    lost = torch.cat([(a.acts.double() - b.acts.double())[~b.is_sink] for a, b in pairs])
    error = float(lost.square().sum() / (x - x.mean(0)).square().sum())
    assert summary.get("kept_error", 0) == pytest.approx(error, rel=1e-4)
    assert error == 0 if kept_as == "float32" else 0 < error < 1e-4
    torch.testing.assert_close(
        kept.statistics().mean, torch.cat([a.acts[~a.is_sink] for a, _ in pairs]).double().mean(0).float()
    )
    assert next(kept.batches(10, 1, 0)).dtype == (torch.bfloat16 if kept_as == "int8" else getattr(torch, kept_as))
    assert summary["estimated_bytes"] == pytest.approx(summary["bytes"], rel=0.05)


def test_bytes_take_half_the_disk_of_bfloat16_and_the_same_order(
    site: ActivationSettings, model: ModelSettings, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert row_bytes("int8", 576) / row_bytes("bfloat16", 576) == pytest.approx(0.5, abs=0.01)
    monkeypatch.setattr(shards, "SHUFFLE_BYTES", 3 * 256 * 32 * 2)
    batches = []
    for kept_as in ("int8", "bfloat16"):
        (folder := tmp_path / kept_as).mkdir()
        harvest(site.model_copy(update={"kept_as": kept_as}), model, corpus, folder)
        batches.append(list(Activations.open(folder).batches(100, 30, seed=1)))
    for ours, theirs in zip(*batches, strict=True):
        assert ours.dtype == theirs.dtype == torch.bfloat16
        assert (ours.float() - theirs.float()).norm() < 0.02 * theirs.float().norm()


def test_how_to_keep_what_is_not_kept_is_refused():
    with pytest.raises(ValueError, match="kept_as = int8 says how, and stored = false that nothing is kept"):
        ActivationSettings(layer=1, kept_as="int8", stored=False)


def test_activations_kept_as_always_have_the_fingerprint_they_had():
    known = {"hook", "layer", "precision", "sink_norm", "shard_tokens", "seed"}
    assert not {"kept_as", "stored"} & ActivationSettings(layer=1).model_dump().keys()
    assert known <= ActivationSettings(layer=1).model_dump().keys()
    assert ActivationSettings(layer=1, kept_as="int8").model_dump()["kept_as"] == "int8"
