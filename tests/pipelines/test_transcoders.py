"""Transcoders of two layers, from a study through the pipeline, and what they do inside the model."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest
import torch
from torch import Tensor

from assets.partitions import STUDIES
from assets.resources import Workshop
from pipelines.definitions import defs
from pipelines.run import bring_up_to_date
from sae_core.activations.pair import open_sites
from sae_core.artifacts import ArtifactStore
from sae_core.dictionary import Dictionary
from sae_core.dictionary.folded import DictionaryError
from sae_core.features import Features
from sae_core.language_model import LanguageModel
from sae_core.metrics import splice
from sae_core.names import DictionarySpec
from sae_core.steering import Steer, Steering, SteeringError


@dataclass
class Coders:
    """What the study's run left."""

    store: ArtifactStore
    passes: list[set[tuple[str, int]]]
    """The sites of each pass of the model."""

    @property
    def spec(self) -> DictionarySpec:
        """The deeper one."""
        return DictionarySpec.parse(self.store.slugs("dictionary")[1])

    @property
    def dictionary(self) -> Dictionary:
        return Dictionary.load(self.store.get("dictionary", self.spec.slug).folder)

    def activations(self, hook: str) -> Path:
        """Those of the deeper layer."""
        return self.store.get("activations", self.spec.site._replace(hook=hook).slug).folder


@pytest.fixture(scope="module")
def coders(tiny_study: Path, tmp_path_factory: pytest.TempPathFactory) -> Coders:
    """The study, made up to its atlases."""
    passes: list[set[tuple[str, int]]] = []
    capture_many = LanguageModel.capture_many

    def noted(self: LanguageModel, sites: Sequence[tuple[str, int]], ids: Tensor, *rest: Tensor) -> list[Tensor]:
        if ids.shape[1] == 32:  # a block, and no prompt
            passes.append(set(sites))
        return capture_many(self, sites, ids, *rest)

    workshop = Workshop(root=str(tmp_path_factory.mktemp("coders")), device="cpu")
    with pytest.MonkeyPatch.context() as patch, dg.DagsterInstance.ephemeral() as instance:
        patch.setattr(LanguageModel, "capture_many", noted)
        assert list(bring_up_to_date(STUDIES.get("coders"), workshop, instance, log_level="CRITICAL"))
    return Coders(workshop.store, passes)


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> LanguageModel:
    return LanguageModel.load(STUDIES.get("coders").model, precision="float32")


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 512, (3, 16), generator=torch.Generator().manual_seed(0))


def test_all_sites_are_read_in_one_pass_and_each_atlas_is_finished(coders: Coders) -> None:
    wanted = {("mlp_in", 0), ("mlp_in", 2), ("mlp_out", 0), ("mlp_out", 2)}
    assert coders.passes
    assert all(sites == wanted for sites in coders.passes)
    assert len(coders.store.slugs("activations")) == 4
    names = [slug.removeprefix("tiny-llama.") for slug in coders.store.slugs("atlas")]
    assert names == [f"mlp_in.{at}.coders.transcoder.mlp_out.{at}.w64.k4" for at in ("L00", "L02")]
    assert coders.store.get("steering", coders.spec.slug).manifest.summary["n_scored"] == 8


def test_a_transcoder_hangs_on_both_of_its_sites(coders: Coders) -> None:
    parents = coders.store.get("dictionary", coders.spec.slug).manifest.parents
    sites = {f"activations/{coders.spec.site._replace(hook=hook).slug}" for hook in ("mlp_in", "mlp_out")}
    assert parents.keys() == {"corpus/coders"} | sites
    graph = defs.resolve_asset_graph()
    child, parent = (graph.get(dg.AssetKey(name)) for name in ("dictionary", "activations"))
    mapping = graph.get_partition_mapping(child.key, parent.key)
    with dg.DagsterInstance.ephemeral() as instance, dg.partition_loading_context(dynamic_partitions_store=instance):
        mapped = mapping.get_upstream_mapped_partitions_result_for_partitions(
            child.partitions_def.subset_with_partition_keys([coders.spec.slug]),
            child.partitions_def, parent.partitions_def,
        )  # fmt: skip
    assert {f"activations/{slug}" for slug in mapped.partitions_subset.get_partition_keys()} == sites


def test_fvu_is_of_what_is_written_and_features_fire_on_what_is_read(coders: Coders) -> None:
    held_out = open_sites(coders.activations("mlp_in"), coders.activations("mlp_out"), "held_out")
    pairs = torch.cat([shard.acts[~shard.is_sink] for shard in held_out.shards()])
    read, written = pairs[:, 0].double(), pairs[:, 1].double()
    d = coders.dictionary
    z = read @ d.W_enc.double() + d.b_enc.double()
    given = (z * (z > d.threshold.double())) @ d.W_dec.double() + d.b_dec.double()
    fvu = (given - written).square().sum() / (written - written.mean(0)).square().sum()
    assert coders.store.get("dictionary", coders.spec.slug).manifest.summary["fvu"] == pytest.approx(
        float(fvu), rel=1e-4
    )
    train = open_sites(coders.activations("mlp_in"))
    acts = torch.cat([d.encode(shard.acts[~shard.is_sink]) for shard in train.shards()])
    table = Features.open(coders.store.get("features", coders.spec.slug).folder).table()
    torch.testing.assert_close(torch.tensor(table["max_act"].to_numpy()), acts.max(0).values, rtol=1e-4, atol=1e-5)


def test_the_splice_puts_what_it_writes_in_place_of_what_the_mlp_gives(
    coders: Coders, lm: LanguageModel, ids: Tensor
) -> None:
    d = coders.dictionary
    read = lm.capture("mlp_in", 2, ids)
    with lm.edit("mlp_out", 2, lambda _: d.decode(d.encode(read.flatten(0, 1))).view_as(read)):
        expected = lm.logits(ids)
    nothing = torch.zeros_like(ids, dtype=torch.bool)
    spliced = splice(lm, "mlp_in", 2, d, torch.zeros(32), ids, torch.zeros_like(ids), nothing)
    ce = -expected[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()
    assert spliced.ce_spliced == pytest.approx(float(ce), rel=1e-5)
    with lm.edit("mlp_out", 2, torch.zeros_like):
        without = lm.logits(ids)
    ce = -without[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()
    assert spliced.ce_zero_ablated == pytest.approx(float(ce), rel=1e-5)


def test_steering_changes_what_is_written_by_features_of_what_is_read(
    coders: Coders, lm: LanguageModel, ids: Tensor
) -> None:
    d = coders.dictionary
    max_acts = torch.tensor(
        Features.open(coders.store.get("features", coders.spec.slug).folder).table()["max_act"].to_numpy()
    )
    feature = int(max_acts.argmax())
    f = d.encode(lm.capture("mlp_in", 2, ids).flatten(0, 1))[:, feature].view(*ids.shape, 1)
    change = (3 * max_acts[feature] - f) * d.W_dec[feature]
    with lm.edit("mlp_out", 2, lambda y: y + change):
        expected = lm.logits(ids)
    with Steering(coders.spec.site, d, [Steer(feature, 3.0)], max_acts).applied(lm):
        torch.testing.assert_close(lm.logits(ids), expected, rtol=1e-4, atol=1e-4)
    assert (expected - lm.logits(ids)).abs().max() > 1e-3


def test_a_transcoder_that_does_not_say_what_it_writes_cannot_steer(coders: Coders) -> None:
    d = coders.dictionary
    config = {key: value for key, value in d.config.items() if key != "writes_layer"}
    mute = Dictionary(d.W_enc, d.b_enc, d.W_dec, d.b_dec, d.threshold, config)
    with pytest.raises(SteeringError, match=r"does not say which site it writes, .* do nothing at mlp_in"):
        Steering(coders.spec.site, mute, [Steer(0, 1.0)], torch.ones(64))


def test_a_written_site_that_is_none_is_refused(coders: Coders, tmp_path: Path) -> None:
    folder = shutil.copytree(coders.store.get("dictionary", coders.spec.slug).folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"writes": "nowhere"}), "utf-8")
    with pytest.raises(DictionaryError, match="it writes 'nowhere' of layer 2, which is no site"):
        Dictionary.load(folder)
