from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from sae_core.artifacts import ArtifactStore, Draft, Recipe
from sae_core.atlas import Atlas
from sae_core.dictionary import Dictionary
from sae_core.language_model import LanguageModel
from sae_core.names import Site
from sae_core.steering import Steer, Steering, SteeringError, cautions
from sae_core.study import ModelSettings

D_MODEL, D_SAE = 32, 64
DEAD, SILENT = 7, 8
SITE = Site("tiny-llama", "resid_post", 2, "mini")


@pytest.fixture(scope="module")
def dictionary() -> Dictionary:
    rng = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(D_MODEL, D_SAE, generator=rng), torch.randn(D_SAE, D_MODEL, generator=rng)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    b_enc, b_dec = torch.randn(D_SAE, generator=rng), torch.randn(D_MODEL, generator=rng)
    threshold = torch.full((D_SAE,), 3.0)
    threshold[SILENT] = 1e6
    return Dictionary(W_enc, b_enc, W_dec, b_dec, threshold, {"architecture": "batch_top_k"})


@pytest.fixture(scope="module")
def max_acts() -> Tensor:
    maxima = torch.linspace(1, 9, D_SAE)
    maxima[DEAD] = 0
    return maxima


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(5))


STEERS = [
    [Steer(3, 10.0)],
    [Steer(0, -2.0)],
    [Steer(5, 0.0)],
    [Steer(1, 5.0), Steer(40, 0.0), Steer(41, 2.5)],
    [Steer(1, 1.5, "add"), Steer(40, -1.0, "add")],
    [Steer(1, 0.0, "scale"), Steer(40, 2.0, "scale")],
    [Steer(1, 0.5, "min_clamp"), Steer(40, 0.0, "min_clamp")],
    [Steer(2, 0.5, "min_clamp"), Steer(1, 2.0, "scale"), Steer(40, 1.0, "add"), Steer(41, -3.0)],
]


def changed(acts: Tensor, steers: list[Steer], max_acts: Tensor) -> Tensor:
    """All feature activations, after the table in `Steer`."""
    after = acts.clone()
    for feature, strength, method in steers:
        f, c = acts[:, feature], strength * max_acts[feature]
        after[:, feature] = {
            "clamp": torch.full_like(f, float(c)),
            "add": f + c,
            "scale": strength * f,
            "min_clamp": f.clamp(min=float(c)),
        }[method]
    return after


@pytest.mark.parametrize("steers", STEERS, ids=str)
def test_steering_equals_the_full_decoder_with_changed_features_plus_the_error(
    lm: LanguageModel, ids: Tensor, dictionary: Dictionary, max_acts: Tensor, steers: list[Steer]
) -> None:
    def spliced(x: Tensor) -> Tensor:
        rows = x.reshape(-1, D_MODEL)
        acts = dictionary.encode(rows)
        error = rows - dictionary.decode(acts)
        return (dictionary.decode(changed(acts, steers, max_acts)) + error).view_as(x)

    with lm.edit("resid_post", 2, spliced):
        expected = lm.logits(ids)
    with Steering(SITE, dictionary, steers, max_acts).applied(lm):
        steered = lm.logits(ids)
    with Steering(SITE, dictionary, steers[::-1], max_acts).applied(lm):
        torch.testing.assert_close(lm.logits(ids), steered, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)
    assert (steered - lm.logits(ids)).abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_nothing_to_change_leaves_the_logits_bit_equal(
    tiny_model: Path, ids: Tensor, dictionary: Dictionary, max_acts: Tensor, precision: str
) -> None:
    lm = LanguageModel.load(ModelSettings(source=str(tiny_model)), precision=precision)
    plain = lm.logits(ids)
    for steers in (
        [],
        [Steer(SILENT, 0.0)],
        [Steer(1, 1.0, "scale")],
        [Steer(1, 0.0, "add"), Steer(2, 0, "min_clamp")],
    ):
        with Steering(SITE, dictionary, steers, max_acts).applied(lm):
            assert torch.equal(lm.logits(ids), plain)


def test_a_strength_that_is_the_features_own_activation_leaves_the_logits_bit_equal(
    lm: LanguageModel, dictionary: Dictionary, max_acts: Tensor
) -> None:
    fired = 0
    for token in range(0, 512, 16):
        ids = torch.tensor([[token]])
        acts = dictionary.encode(lm.capture("resid_post", 2, ids)[0])[0]
        feature = int((acts * (max_acts > 0)).argmax())
        fired += bool(acts[feature] > 0)
        steers = [Steer(feature, float(acts[feature]) / float(max_acts[feature]))]
        with Steering(SITE, dictionary, steers, max_acts).applied(lm):
            steered = lm.logits(ids)
        assert torch.equal(steered, lm.logits(ids))
    assert fired > 20


def test_attention_sinks_stay_as_they_are(dictionary: Dictionary, max_acts: Tensor) -> None:
    x = torch.randn(1, 3, dictionary.d_model)
    x[0, 1] *= 100
    edited = Steering(SITE, dictionary, [Steer(3, 5.0)], max_acts, sink_norm=50.0)(x)
    assert torch.equal(edited[0, 1], x[0, 1])
    assert not torch.equal(edited[0, 0], x[0, 0])


def test_only_the_positions_asked_for_are_steered(dictionary: Dictionary, max_acts: Tensor) -> None:
    x = torch.randn(2, 5, dictionary.d_model)
    where = torch.tensor([[True, False, True, False, False], [False] * 5])
    edited = Steering(SITE, dictionary, [Steer(3, 5.0)], max_acts)(x, where)
    assert torch.equal((edited != x).any(-1), where)


def test_rows_of_a_batch_are_steered_each_in_its_own_way(dictionary: Dictionary, max_acts: Tensor) -> None:
    x = torch.randn(3, 5, dictionary.d_model)
    steers = [Steer(3, 5.0), Steer(3, -1.0), Steer(9, 2.0)]
    rows = torch.tensor([[True, False, False], [False, True, True], [False, False, False]])
    edited = Steering(SITE, dictionary, steers, max_acts, rows=rows)(x)
    alone = [Steering(SITE, dictionary, some, max_acts)(x) for some in (steers[:1], steers[1:], [])]
    for row in range(3):
        torch.testing.assert_close(edited[row], alone[row][row])


def test_a_control_goes_as_far_in_another_direction(dictionary: Dictionary, max_acts: Tensor) -> None:
    x = torch.randn(1, 5, dictionary.d_model)
    direction = torch.nn.functional.normalize(torch.randn(1, D_MODEL), dim=1)
    steered = Steering(SITE, dictionary, [Steer(3, 5.0)], max_acts)(x) - x
    control = Steering(SITE, dictionary, [Steer(3, 5.0)], max_acts, directions=direction)(x) - x
    torch.testing.assert_close(control.norm(dim=-1), steered.norm(dim=-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((control @ direction[0]).abs(), control.norm(dim=-1), rtol=1e-4, atol=1e-4)


def test_clamping_sees_whether_a_feature_is_among_the_largest_of_all(dictionary: Dictionary, max_acts: Tensor) -> None:
    d, config = dictionary, {"architecture": "top_k", "k": 8}
    ranked = Dictionary(d.W_enc, d.b_enc, d.W_dec, d.b_dec, torch.zeros(D_SAE), config, rank_scale=torch.ones(D_SAE))
    x = torch.randn(1, 30, D_MODEL, generator=torch.Generator().manual_seed(6))
    acts = ranked.encode(x[0])
    chosen = int((acts[:, 9:] > 0).sum(0).argmax()) + 9
    assert 0 < int((acts[:, chosen] > 0).sum()) < int((ranked.pre_acts(x[0])[:, chosen] > 0).sum())
    expected = x[0] + (2 * max_acts[chosen] - acts[:, chosen])[:, None] * d.W_dec[chosen]
    torch.testing.assert_close(Steering(SITE, ranked, [Steer(chosen, 2.0)], max_acts)(x)[0], expected)


@pytest.mark.parametrize(
    ("steers", "why"),
    [
        ([Steer(D_SAE, 1.0)], "feature 64 does not exist: the dictionary has 0 to 63"),
        ([Steer(-1, 1.0)], "feature -1 does not exist"),
        ([Steer(DEAD, 1.0)], "feature 7 is dead"),
        ([Steer(1, float("nan"))], "strength nan"),
        ([Steer(1, float("inf"))], "strength inf"),
        ([Steer(1, 1.0), Steer(1, 2.0)], "steered twice"),
        ([Steer(1, -1.0, "min_clamp")], "min_clamp at -1 changes nothing"),
    ],
)
def test_steering_that_makes_no_sense_is_refused(
    dictionary: Dictionary, max_acts: Tensor, steers: list[Steer], why: str
) -> None:
    with pytest.raises(SteeringError, match=why):
        Steering(SITE, dictionary, steers, max_acts)


@pytest.fixture
def atlas(dictionary: Dictionary, max_acts: Tensor, tmp_path: Path) -> Atlas:
    """What steering reads of an atlas; a token counts as a sink above the norm 4 * 5."""
    store, slug = ArtifactStore(tmp_path), f"{SITE.slug}.batch_top_k.w{D_SAE}.k4"

    def features(draft: Draft) -> dict[str, int]:
        table = pa.table({"feature": range(D_SAE), "max_act": max_acts.tolist()})
        pq.write_table(table, draft.folder / "features.parquet")
        pq.write_table(pa.table({"feature": [0]}), draft.folder / "examples.parquet")
        return {}

    def scores(draft: Draft) -> dict[str, int]:
        table = pa.table({"feature": [1, 2], "output_score": [0.5, 0.1], "suggested_strength": [2.0, None]})
        pq.write_table(table, draft.folder / "scores.parquet")
        return {}

    store.make(Recipe("activations", SITE.slug, 1, {"sink_norm": 4.0}), lambda draft: {"median_norm": 5.0})
    store.make(Recipe("dictionary", slug, 1, {}), lambda draft: dictionary.save(draft.folder) or {})
    store.make(Recipe("features", slug, 1, {}), features)
    store.make(Recipe("steering", slug, 1, {}), scores)
    return Atlas.open(store)


def test_an_atlas_is_steered_in_units_of_its_own_maxima_around_its_own_sinks(
    atlas: Atlas, dictionary: Dictionary, max_acts: Tensor
) -> None:
    x = torch.randn(2, 30, D_MODEL, generator=torch.Generator().manual_seed(1)) * 3.5
    above = x.norm(dim=-1) > 20
    assert 0 < above.sum() < 60
    edited = Steering.of(atlas, STEERS[3])(x)
    assert torch.equal(edited, Steering(SITE, dictionary, STEERS[3], max_acts, sink_norm=20.0)(x))
    assert torch.equal((edited != x).any(dim=-1), ~above)
    with pytest.raises(SteeringError, match="feature 64 does not exist"):
        Steering.of(atlas, [Steer(D_SAE, 1.0)])


def test_strengths_that_will_hardly_do_good_are_allowed_and_said(atlas: Atlas) -> None:
    said = cautions(atlas, [Steer(1, 3.0), Steer(2, 10.0), Steer(3, -1000.0), Steer(1, 2.0)])
    assert len(said) == 2
    assert "feature 1: above its suggested strength of 2" in said[0]
    assert "feature 3: at -1000 times its maximum the text will be degenerate" in said[1]
