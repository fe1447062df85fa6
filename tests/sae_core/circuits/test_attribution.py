"""Attribution against what it is a guess of: finite differences, closed forms, and hooks written by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sae_core.circuits import attribution
from sae_core.circuits.attribution import Attribution, AttributionError, Change, Trace, compared
from sae_core.language_model import LanguageModel, ModelError
from sae_core.names import Hook, Site
from sae_core.prompt_reader import PromptError, PromptReader
from sae_core.steering import Steer, Steering
from sae_core.study import ModelSettings

D_SAE = 64
ReaderAt = Callable[..., PromptReader]
PROMPT = "The old bridge rose over the river."
SITES: list[tuple[Hook, int]] = [("resid_pre", 0), ("mlp_out", 1), ("attn_out", 2), ("resid_post", 2)]


def difference(lm: LanguageModel, found: Attribution, site: tuple[Hook, int], ids: Tensor, x: Tensor) -> float:
    """m with `x` at the site, by a whole pass."""
    with lm.edit(*site, lambda _: x[None]):
        last = lm.logits(ids)[0, -1].double()
    return float(last[found.target.id] - last[found.against.id])


@pytest.mark.parametrize("sunk", [False, True])
@pytest.mark.parametrize("site", SITES)
def test_features_and_error_add_up_to_the_finite_difference(
    lm: LanguageModel, reader_at: ReaderAt, site: tuple[Hook, int], sunk: bool
) -> None:
    trace = Trace(reader_at(lm, *site), PROMPT)
    if sunk:
        trace = Trace(reader_at(lm, *site, float(trace.x.norm(dim=1).median())), PROMPT)
    found, x, base = trace.attribute(), trace.x, trace.base
    h = 0.01
    up, down = (difference(lm, found, site, trace.ids, base + (1 + s) * (x - base)) for s in (h, -h))
    assert found.of_features + found.of_error == pytest.approx((up - down) / (2 * h), rel=0.02, abs=0.005)
    assert found.difference == pytest.approx(difference(lm, found, site, trace.ids, x), abs=1e-4)
    assert found.base == pytest.approx(difference(lm, found, site, trace.ids, base), abs=1e-4)
    total = found.base + found.of_features + found.of_error + found.rest
    assert total == pytest.approx(found.difference)
    assert len(found.values) > 20


@pytest.mark.parametrize("site", SITES)
def test_an_attribution_is_the_beginning_of_what_an_ablation_does(
    lm: LanguageModel, reader_at: ReaderAt, site: tuple[Hook, int]
) -> None:
    trace, h = Trace(reader_at(lm, *site), PROMPT), 0.02
    found = trace.attribute()
    for place in found.top(5).tolist():
        node = found.node(place)
        part = node.act * trace.dictionary.W_dec[node.feature]
        up, down = trace.x.clone(), trace.x.clone()
        up[node.position] += h * part
        down[node.position] -= h * part
        slope = difference(lm, found, site, trace.ids, up) - difference(lm, found, site, trace.ids, down)
        assert node.attribution == pytest.approx(slope / (2 * h), rel=0.03, abs=0.005)


def test_where_the_rest_of_the_model_is_linear_everything_is_known(tiny_model: Path, reader_at: ReaderAt) -> None:
    lm = LanguageModel.load(ModelSettings(source=str(tiny_model)), precision="float32")
    lm.model.model.norm = nn.Identity()  # from the last layer on there is the unembedding, and nothing else
    trace = Trace(reader_at(lm, "resid_post", 3), PROMPT)
    found = trace.attribute()
    weight = lm.model.get_output_embeddings().weight
    towards = weight[found.target.id] - weight[found.against.id]
    acts = trace.dictionary.encode(trace.x)
    expected = acts * (trace.dictionary.W_dec @ towards)
    expected[:-1] = 0  # only the last token is read there
    torch.testing.assert_close(expected[found.acts.row, found.acts.feature], found.values, atol=1e-4, rtol=1e-4)
    error = (trace.x - trace.dictionary.decode(acts))[-1] @ towards
    torch.testing.assert_close(found.errors[-1], error, atol=1e-4, rtol=1e-4)
    assert found.base == pytest.approx(float(trace.dictionary.b_dec @ towards), abs=1e-4)
    assert found.rest == pytest.approx(0, abs=1e-3)
    top = found.top(30)
    torch.testing.assert_close(trace.ablated(found, top), found.values[top], atol=1e-3, rtol=1e-3)


def test_integrated_gradients_leave_hardly_any_rest(lm: LanguageModel, reader_at: ReaderAt) -> None:
    trace = Trace(reader_at(lm, "mlp_out", 1), PROMPT)  # the residual stream goes around it, so the way is smooth
    plain, integrated = trace.attribute(), trace.attribute(steps=32)
    assert abs(plain.rest) > 0.1
    assert abs(integrated.rest) < 0.05 * abs(plain.rest)
    assert integrated.difference == plain.difference


def test_ablation_is_what_a_hook_by_hand_does(
    lm: LanguageModel, reader_at: ReaderAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = Trace(reader_at(lm, "resid_post", 1), PROMPT)
    found = trace.attribute()
    places = found.top(6)
    effects = trace.ablated(found, places)
    for place, effect in zip(places.tolist(), effects.tolist(), strict=True):
        node = found.node(place)

        def without(_: object, __: object, output: Tensor, node: object = node) -> Tensor:
            changed = output.clone()
            changed[0, node.position] -= node.act * trace.dictionary.W_dec[node.feature]  # type: ignore[attr-defined]
            return changed

        handle = lm.model.model.layers[1].register_forward_hook(without)
        last = lm.logits(trace.ids)[0, -1]
        handle.remove()
        left = float(last[found.target.id] - last[found.against.id])
        assert effect == pytest.approx(found.difference - left, abs=1e-4)
    monkeypatch.setattr(attribution, "BATCH_TOKENS", 1)  # a row at a time
    torch.testing.assert_close(trace.ablated(found, places), effects, atol=1e-4, rtol=1e-3)


def test_what_a_transcoder_reads_is_attributed_where_it_writes(lm: LanguageModel, reader_at: ReaderAt) -> None:
    reader = reader_at(lm, "mlp_in", 1, architecture="transcoder", writes="mlp_out", writes_layer=1)
    trace, h = Trace(reader, PROMPT), 0.01
    found = trace.attribute()
    read, written = lm.capture_many([("mlp_in", 1), ("mlp_out", 1)], trace.ids)
    acts = trace.dictionary.encode(read[0])
    torch.testing.assert_close(acts[found.acts.row, found.acts.feature], found.acts.value)
    torch.testing.assert_close(trace.x, written[0])
    up, down = (
        difference(lm, found, ("mlp_out", 1), trace.ids, trace.base + (1 + s) * (trace.x - trace.base)) for s in (h, -h)
    )
    assert found.of_features + found.of_error == pytest.approx((up - down) / (2 * h), rel=0.03, abs=0.005)


@pytest.mark.parametrize("position", [None, 3])
def test_a_clamped_feature_gives_the_logits_of_steering(
    lm: LanguageModel, reader_at: ReaderAt, position: int | None
) -> None:
    trace = Trace(reader_at(lm, "resid_post", 1), PROMPT)
    feature, maxima = int(trace.acts.feature[trace.acts.row == 3][0]), torch.ones(D_SAE)
    steering = Steering(
        Site("tiny", "resid_post", 1, "x"), trace.dictionary, [Steer(feature, 2.5), Steer(5, 0.0)], maxima
    )
    where = torch.zeros_like(trace.ids, dtype=torch.bool)
    where[0, slice(None) if position is None else position] = True
    with steering.applied(lm, where):
        expected = lm.logits(trace.ids)[0, -1]
    changed = trace.changed([Change(feature, 2.5, position), Change(5, 0.0, position)])
    torch.testing.assert_close(changed, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(trace.changed([]), lm.logits(trace.ids)[0, -1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(changed, trace.clean, atol=1e-3)


def test_attention_sinks_have_no_features_and_stay_as_they_are(lm: LanguageModel, reader_at: ReaderAt) -> None:
    plain = Trace(reader_at(lm, "resid_post", 2), PROMPT)
    norms = plain.x.norm(dim=1)
    bound = float(norms.median())
    trace = Trace(reader_at(lm, "resid_post", 2, sink_norm=bound), PROMPT)
    found = trace.attribute()
    sinks = norms > bound
    assert 0 < int(sinks.sum()) < len(sinks)
    assert torch.equal(found.is_sink, sinks)
    assert not set(found.acts.row.tolist()) & set(sinks.nonzero().flatten().tolist())
    assert torch.equal(found.errors[sinks], torch.zeros(int(sinks.sum())))
    assert torch.equal(trace.base[sinks], trace.x[sinks])
    sink = int(sinks.nonzero()[0])
    torch.testing.assert_close(trace.changed([Change(1, 9.0, sink)]), trace.clean, atol=1e-4, rtol=1e-4)


def test_sums_by_token_and_by_feature_are_those_of_a_dense_table(lm: LanguageModel, reader_at: ReaderAt) -> None:
    trace = Trace(reader_at(lm, "resid_post", 2), PROMPT)
    found = trace.attribute()
    dense = torch.zeros(len(trace.x), D_SAE)
    dense[found.acts.row, found.acts.feature] = found.values
    torch.testing.assert_close(found.heat, dense.sum(1))
    sums = found.by_feature()
    assert list(sums.values()) == pytest.approx(dense.sum(0)[list(sums)].tolist(), abs=1e-5)
    largest = found.values.abs()[found.top(10)]
    assert torch.equal(largest, found.values.abs().sort(descending=True).values[:10])


def test_of_two_prompts_each_features_voice_in_both_is_told(lm: LanguageModel, reader_at: ReaderAt) -> None:
    reader = reader_at(lm, "resid_post", 2)
    left, right = (Trace(reader, text).attribute(" the", " dog") for text in (PROMPT, "The old planet turns around."))
    rows = compared(left, right, 8)
    sizes = [max(abs(row.left), abs(row.right)) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert len(rows) == 8
    for row in rows:
        assert (row.left, row.right) == (
            left.by_feature().get(row.feature, 0), right.by_feature().get(row.feature, 0)
        )  # fmt: skip
    assert all(row.stays for row in compared(left, left, 5))
    inverted = replace(left, values=-left.values)
    assert not any(row.stays for row in compared(left, inverted, 5))


def test_without_a_target_the_likeliest_token_stands_against_the_next(lm: LanguageModel, reader_at: ReaderAt) -> None:
    trace = Trace(reader_at(lm, "resid_post", 2), PROMPT)
    first, second = lm.logits(trace.ids)[0, -1].topk(2).indices.tolist()
    found = trace.attribute()
    assert (found.target.id, found.against.id) == (first, second)
    assert found.target.probability == pytest.approx(float(lm.logits(trace.ids)[0, -1].softmax(0)[first]), rel=1e-3)
    (dog,) = lm.tokenizer(" dog").input_ids
    assert trace.attribute(target=" dog").against.id == first
    assert trace.attribute(against=" dog").target.id == first
    trace.clean[dog] += 100  # now it is the likeliest itself
    assert trace.attribute(target=" dog").against.id == first
    assert trace.attribute(against=" dog").target.id == first


def test_of_a_target_of_several_tokens_the_first_counts_and_that_is_said(
    lm: LanguageModel, reader_at: ReaderAt
) -> None:
    ids = lm.tokenizer(" bridges of rivers").input_ids
    trace = Trace(reader_at(lm, "resid_post", 2), PROMPT)
    found = trace.attribute(" bridges of rivers", " dog")
    assert trace.attribute(found.target.id, found.against.id).difference == found.difference
    assert len(ids) > 1
    assert found.target.id == ids[0]
    assert f"has {len(ids)} tokens: the first, {found.target.token!r}, stands for it" in found.notes[0]


def test_a_token_without_probability_is_attributed_and_said(
    lm: LanguageModel, reader_at: ReaderAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = Trace(reader_at(lm, "resid_post", 2), PROMPT)
    token = lm.tokenizer(" dog").input_ids[0]
    trace.clean[token] -= 100
    found = trace.attribute(target=" dog", against=" the")
    assert found.target.probability < 1e-30
    assert any("no probability" in note for note in found.notes)
    trace.clean[token] = -torch.inf
    with pytest.raises(AttributionError, match="are not finite"):
        trace.attribute(target=" dog", against=" the")


def test_a_prompt_of_one_token_is_attributed_and_one_of_sinks_alone_says_so(
    lm: LanguageModel, reader_at: ReaderAt
) -> None:
    found = Trace(reader_at(lm, "resid_post", 2), "a").attribute()
    assert len(found.tokens) == 1
    assert len(found.values) > 0
    trace = Trace(reader_at(lm, "resid_post", 2, sink_norm=0.0), "a")
    sunk = trace.attribute()
    assert len(trace.ablated(sunk, sunk.top(10))) == 0
    assert len(sunk.values) == 0
    assert sunk.of_features == sunk.of_error == 0
    assert sunk.base == pytest.approx(sunk.difference, abs=1e-5)
    assert "all tokens are attention sinks" in sunk.notes[0]


@pytest.mark.parametrize(
    ("ask", "why"),
    [
        (lambda reader: Trace(reader, "").attribute(), "holds no token"),
        (lambda reader: Trace(reader, PROMPT).attribute(" the", " the"), "both begin with the token"),
        (lambda reader: Trace(reader, "a b " * 1100), "give at most 2,048"),
        (lambda reader: Trace(reader, "a b " * 400), "exceed the model's context of 512"),
        (lambda reader: Trace(reader, PROMPT).changed([Change(D_SAE, 0.0)]), "feature 64 does not exist"),
        (lambda reader: Trace(reader, PROMPT).changed([Change(-1, 0.0)]), "feature -1 does not exist"),
        (lambda reader: Trace(reader, PROMPT).changed([Change(1, 0.0, 99)]), "no token 99"),
        (lambda reader: Trace(reader, PROMPT).changed([Change(1, 0.0, 2), Change(1, 1.0)]), "changed twice"),
    ],
)
def test_what_cannot_be_attributed_is_refused_in_one_line(
    lm: LanguageModel, reader_at: ReaderAt, ask: Callable[[PromptReader], object], why: str
) -> None:
    with pytest.raises((AttributionError, PromptError, ModelError), match=why) as refused:
        ask(reader_at(lm, "resid_post", 2))
    assert "\n" not in str(refused.value)


def test_a_transcoder_that_does_not_say_what_it_writes_is_refused(lm: LanguageModel, reader_at: ReaderAt) -> None:
    with pytest.raises(AttributionError, match="does not say which site it writes"):
        Trace(reader_at(lm, "mlp_in", 1, architecture="transcoder"), PROMPT)


def test_a_model_that_cannot_be_resumed_is_run_from_the_start(
    lm: LanguageModel, reader_at: ReaderAt, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_at(lm, "resid_post", 2)
    usual = Trace(reader, PROMPT).attribute()
    resumed = LanguageModel.resumed
    monkeypatch.setattr(LanguageModel, "resumed", lambda self, layer, acts: resumed(self, layer, 2 * acts + 1))
    trace = Trace(reader_at(lm, "attn_out", 1), PROMPT)
    assert not trace._resumes
    assert Trace(reader, PROMPT).attribute().difference == pytest.approx(usual.difference, abs=1e-4)
