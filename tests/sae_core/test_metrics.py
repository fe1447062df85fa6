"""Metrics against closed forms, and the spliced model against one edited by hand."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax

from sae_core.dictionary import Dictionary
from sae_core.language_model import LanguageModel
from sae_core.metrics import Quality, measure, splice
from sae_core.study import ModelSettings


def dictionary(W_enc: torch.Tensor, W_dec: torch.Tensor, b_dec: torch.Tensor, threshold: float = 0.0) -> Dictionary:
    d_sae = len(W_dec)
    config = {"architecture": "batch_top_k", "k": 1}
    return Dictionary(W_enc, torch.zeros(d_sae), W_dec, b_dec, torch.full((d_sae,), threshold), config)


def mirror(d_model: int, scale: float = 1.0) -> Dictionary:
    """Reconstructs everything, times `scale`: a feature for each direction of each axis."""
    axes = torch.cat([torch.eye(d_model), -torch.eye(d_model)])
    return dictionary(scale * axes.T.contiguous(), axes, torch.zeros(d_model))


def blind(b_dec: torch.Tensor) -> Dictionary:
    """No feature ever fires."""
    return dictionary(torch.eye(len(b_dec)), torch.eye(len(b_dec)), b_dec, threshold=1e9)


@pytest.fixture
def x() -> torch.Tensor:
    """Far from centered, as activations are: a variance taken about zero would be off by a hundred times."""
    return torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) + torch.tensor([30.0, 0, 0, -5, 0, 0])


def test_predicting_the_mean_scores_one(x: torch.Tensor) -> None:
    assert measure(blind(x.mean(0)), [x]).fvu == pytest.approx(1.0, abs=1e-5)


def test_a_perfect_dictionary_scores_zero(x: torch.Tensor) -> None:
    quality = measure(mirror(6), [x])
    assert quality.fvu == pytest.approx(0.0, abs=1e-9)
    assert quality.cosine == pytest.approx(1.0)
    assert quality.shrinkage == pytest.approx(1.0)
    assert quality.l0 == 6


def test_reconstructions_of_half_length_show_shrinkage(x: torch.Tensor) -> None:
    quality = measure(mirror(6, scale=0.5), [x])
    assert quality.shrinkage == pytest.approx(0.5)
    assert quality.cosine == pytest.approx(1.0)


def test_numbers_do_not_depend_on_the_batches(x: torch.Tensor) -> None:
    judged = mirror(6, scale=0.8)
    whole, parts = measure(judged, [x]), measure(judged, x.split(7))
    for name in ("fvu", "l0", "cosine", "shrinkage", "n_tokens", "dense", "dead"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name)), name
    residual = (x - 0.8 * x).double()
    assert whole.fvu == pytest.approx(float(residual.square().sum() / (x.double() - x.double().mean(0)).square().sum()))


def test_dead_and_dense_features_are_counted() -> None:
    x = torch.zeros(100, 4)
    x[:10, 0] = 1.0  # exactly a tenth: not dense
    x[:11, 1] = 1.0
    x[0, 2] = 1.0
    quality = measure(dictionary(torch.eye(4), torch.eye(4), torch.zeros(4)), [x])
    assert quality.n_fired.tolist() == [10, 11, 1, 0]
    assert (quality.dead, quality.n_dead, quality.dense) == (0.25, 1, 0.25)
    assert quality.l0 == 22 / 100


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="no activations"):
        measure(mirror(6), [])


def test_constant_activations_give_no_fvu() -> None:
    quality: Quality = measure(mirror(2), [torch.ones(4, 2)])
    assert quality.fvu != quality.fvu


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LanguageModel:
    return LanguageModel.load(ModelSettings(source=str(tiny_model)), precision="float32")


TOKENS = torch.randint(0, 512, (6, 20), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
DOCUMENTS = torch.arange(20, dtype=torch.int32).div(7, rounding_mode="floor").expand(6, 20).clone()
DOCUMENTS[-1, 15:] = -1  # padding
IS_SINK = torch.zeros(6, 20, dtype=torch.bool)
IS_SINK[:, 0] = IS_SINK[2, 5] = True


def test_a_perfect_dictionary_loses_nothing_in_the_model(model: LanguageModel) -> None:
    spliced = splice(model, "resid_post", 1, mirror(32), torch.zeros(32), TOKENS, DOCUMENTS, IS_SINK)
    assert spliced.delta_ce == pytest.approx(0.0, abs=1e-5)
    assert spliced.kl == pytest.approx(0.0, abs=1e-5)
    assert spliced.ce_recovered == pytest.approx(1.0, abs=1e-3)
    assert spliced.ce_recovered_zero == pytest.approx(1.0, abs=1e-3)


def test_an_empty_dictionary_is_mean_ablation(model: LanguageModel) -> None:
    mean = torch.randn(32, generator=torch.Generator().manual_seed(1))
    spliced = splice(model, "resid_post", 1, blind(mean), mean, TOKENS, DOCUMENTS, IS_SINK)
    assert spliced.ce_spliced == pytest.approx(spliced.ce_mean_ablated)
    assert spliced.ce_recovered == pytest.approx(0.0, abs=1e-6)


def test_numbers_equal_those_of_a_loop_over_predictions(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinks and padding keep their activations and are not counted; no prediction crosses a document's end."""
    monkeypatch.setattr("sae_core.metrics.PASS_TOKENS", 40)
    judged, replaced = mirror(32, scale=0.5), ~IS_SINK & (DOCUMENTS >= 0)

    def halve(x: torch.Tensor) -> torch.Tensor:
        return torch.where(replaced.unsqueeze(-1), 0.5 * x, x)

    clean = log_softmax(model.logits(TOKENS, DOCUMENTS), -1)
    with model.edit("resid_post", 1, halve):
        edited = log_softmax(model.logits(TOKENS, DOCUMENTS), -1)
    places = [(b, t) for b in range(6) for t in range(19) if replaced[b, t] and DOCUMENTS[b, t] == DOCUMENTS[b, t + 1]]
    ce_clean = -sum(float(clean[b, t, TOKENS[b, t + 1]]) for b, t in places) / len(places)
    ce_edited = -sum(float(edited[b, t, TOKENS[b, t + 1]]) for b, t in places) / len(places)
    kl = sum(float((clean[b, t].exp() * (clean[b, t] - edited[b, t])).sum()) for b, t in places) / len(places)
    spliced = splice(model, "resid_post", 1, judged, torch.zeros(32), TOKENS, DOCUMENTS, IS_SINK)
    assert spliced.n_tokens == len(places)
    assert spliced.ce_clean == pytest.approx(ce_clean, rel=1e-5)
    assert spliced.ce_spliced == pytest.approx(ce_edited, rel=1e-4)
    assert spliced.kl == pytest.approx(kl, rel=1e-3)
    assert spliced.ce_mean_ablated == pytest.approx(spliced.ce_zero_ablated)  # the mean given here is zero


def test_where_attention_ran_over_documents_it_does_so_in_the_spliced_model(model: LanguageModel) -> None:
    """The same predictions are counted; each sees all of its block."""
    whole = log_softmax(model.logits(TOKENS), -1)
    counted = (~IS_SINK & (DOCUMENTS >= 0))[:, :-1] & (DOCUMENTS[:, 1:] == DOCUMENTS[:, :-1])
    ce = -whole[:, :-1].gather(-1, TOKENS[:, 1:, None].long())[..., 0][counted].mean()
    arguments = (model, "resid_post", 1, mirror(32), torch.zeros(32), TOKENS, DOCUMENTS, IS_SINK)
    assert splice(*arguments, packing="concat").ce_clean == pytest.approx(float(ce), rel=1e-5)
    assert splice(*arguments).ce_clean != pytest.approx(float(ce), rel=1e-3)
