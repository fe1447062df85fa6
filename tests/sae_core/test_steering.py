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
from sae_core.steering import Clamp, SteeringError, atlas_edit, clamp_edit, default_and_steered
from sae_core.study import ModelSettings

D_MODEL, D_SAE = 32, 64
DEAD, SILENT = 7, 8


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


CLAMPS = [[Clamp(3, 10.0)], [Clamp(0, -2.0)], [Clamp(5, 0.0)], [Clamp(1, 5.0), Clamp(40, 0.0), Clamp(41, 2.5)]]


@pytest.mark.parametrize("clamps", CLAMPS, ids=str)
def test_clamping_equals_the_full_decoder_with_clamped_features_plus_the_error(
    lm: LanguageModel, ids: Tensor, dictionary: Dictionary, max_acts: Tensor, clamps: list[Clamp]
) -> None:
    def spliced(x: Tensor) -> Tensor:
        rows = x.reshape(-1, D_MODEL)
        acts = dictionary.encode(rows)
        error = rows - dictionary.decode(acts)
        for feature, strength in clamps:
            acts[:, feature] = strength * max_acts[feature]
        return (dictionary.decode(acts) + error).view_as(x)

    with lm.edit("resid_post", 2, spliced):
        expected = lm.logits(ids)
    with lm.edit("resid_post", 2, clamp_edit(dictionary, clamps, max_acts)):
        steered = lm.logits(ids)
    torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)
    assert (steered - lm.logits(ids)).abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_nothing_to_change_leaves_the_logits_bit_equal(
    tiny_model: Path, ids: Tensor, dictionary: Dictionary, max_acts: Tensor, precision: str
) -> None:
    lm = LanguageModel.load(ModelSettings(source=str(tiny_model)), precision=precision)
    plain = lm.logits(ids)
    for clamps in ([], [Clamp(SILENT, 0.0)]):
        with lm.edit("resid_post", 2, clamp_edit(dictionary, clamps, max_acts)):
            assert torch.equal(lm.logits(ids), plain)


def test_attention_sinks_stay_as_they_are(dictionary: Dictionary, max_acts: Tensor) -> None:
    x = torch.randn(1, 3, dictionary.d_model)
    x[0, 1] *= 100
    edited = clamp_edit(dictionary, [Clamp(3, 5.0)], max_acts, sink_norm=50.0)(x)
    assert torch.equal(edited[0, 1], x[0, 1])
    assert not torch.equal(edited[0, 0], x[0, 0])


def test_clamping_sees_whether_a_feature_is_among_the_largest_of_all(dictionary: Dictionary, max_acts: Tensor) -> None:
    d, config = dictionary, {"architecture": "top_k", "k": 8}
    ranked = Dictionary(d.W_enc, d.b_enc, d.W_dec, d.b_dec, torch.zeros(D_SAE), config, rank_scale=torch.ones(D_SAE))
    x = torch.randn(1, 30, D_MODEL, generator=torch.Generator().manual_seed(6))
    acts = ranked.encode(x[0])
    chosen = int((acts[:, 9:] > 0).sum(0).argmax()) + 9
    assert 0 < int((acts[:, chosen] > 0).sum()) < int((ranked.pre_acts(x[0])[:, chosen] > 0).sum())
    expected = x[0] + (2 * max_acts[chosen] - acts[:, chosen])[:, None] * d.W_dec[chosen]
    torch.testing.assert_close(clamp_edit(ranked, [Clamp(chosen, 2.0)], max_acts)(x)[0], expected)


def test_steering_holds_through_generation(lm: LanguageModel, dictionary: Dictionary, max_acts: Tensor) -> None:
    with lm.edit("resid_post", 2, clamp_edit(dictionary, [Clamp(3, 50.0)], max_acts)):
        steered = "".join(lm.generate("The river", 10))
    assert steered != "".join(lm.generate("The river", 10))


@pytest.mark.parametrize(
    ("clamps", "why"),
    [
        ([Clamp(D_SAE, 1.0)], "feature 64 does not exist: the dictionary has 0 to 63"),
        ([Clamp(-1, 1.0)], "feature -1 does not exist"),
        ([Clamp(DEAD, 1.0)], "feature 7 never fires"),
        ([Clamp(1, float("nan"))], "strength nan"),
        ([Clamp(1, float("inf"))], "strength inf"),
        ([Clamp(1, 1.0), Clamp(1, 2.0)], "clamped twice"),
    ],
)
def test_a_clamp_that_makes_no_sense_is_refused(
    dictionary: Dictionary, max_acts: Tensor, clamps: list[Clamp], why: str
) -> None:
    with pytest.raises(SteeringError, match=why):
        clamp_edit(dictionary, clamps, max_acts)


@pytest.fixture
def atlas(dictionary: Dictionary, max_acts: Tensor, tmp_path: Path) -> Atlas:
    """What steering reads of an atlas; a token counts as a sink above the norm 4 * 5."""
    store, site = ArtifactStore(tmp_path), Site("tiny-llama", "resid_post", 2, "mini")
    slug = f"{site.slug}.batch_top_k.w{D_SAE}.k4"

    def features(draft: Draft) -> dict[str, int]:
        table = pa.table({"feature": range(D_SAE), "max_act": max_acts.tolist()})
        pq.write_table(table, draft.folder / "features.parquet")
        pq.write_table(pa.table({"feature": [0]}), draft.folder / "examples.parquet")
        return {}

    store.make(Recipe("activations", site.slug, 1, {"sink_norm": 4.0}), lambda draft: {"median_norm": 5.0})
    store.make(Recipe("dictionary", slug, 1, {}), lambda draft: dictionary.save(draft.folder) or {})
    store.make(Recipe("features", slug, 1, {}), features)
    return Atlas.open(store)


def test_an_atlas_is_steered_in_units_of_its_own_maxima_around_its_own_sinks(
    atlas: Atlas, dictionary: Dictionary, max_acts: Tensor
) -> None:
    x = torch.randn(2, 30, D_MODEL, generator=torch.Generator().manual_seed(1)) * 3.5
    above = x.norm(dim=-1) > 20
    assert 0 < above.sum() < 60
    edited = atlas_edit(atlas, CLAMPS[3])(x)
    assert torch.equal(edited, clamp_edit(dictionary, CLAMPS[3], max_acts, sink_norm=20.0)(x))
    assert torch.equal((edited != x).any(dim=-1), ~above)
    with pytest.raises(SteeringError, match="feature 64 does not exist"):
        atlas_edit(atlas, [Clamp(D_SAE, 1.0)])


def test_the_default_answer_is_the_models_own_and_the_steered_one_is_made_under_the_edit(
    atlas: Atlas, lm: LanguageModel
) -> None:
    edit, turns = atlas_edit(atlas, [Clamp(3, 50.0)]), [{"role": "user", "content": "The river"}]
    answers = default_and_steered(lm, atlas.site, edit, turns, 20, 0.7, 5)
    assert answers.default == "".join(lm.generate(turns, 20, 0.7, 5)) != answers.steered
    with lm.edit("resid_post", 2, edit):
        assert answers.steered == "".join(lm.generate(turns, 20, 0.7, 5))
