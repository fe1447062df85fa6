"""Circuits against what they estimate: patches and ablations done one at a time, and sums that must come out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sae_core.circuits.faithfulness import Runner, curve
from sae_core.circuits.graph import ERROR, OUTPUT, Node, edges, effects, means, nodes
from sae_core.circuits.network import Batch, Network, Place
from sae_core.language_model import LanguageModel
from sae_core.prompt_reader import PromptReader

SITES = [("resid_post", 0), ("resid_post", 1), ("resid_post", 2)]
PROMPTS = [("The old bridge rose", "The lazy dog rose"), ("Rain fell on the", "A planet on the")]


def places(lm: LanguageModel, reader_at: Callable[..., PromptReader], sites: list = SITES) -> list[Place]:
    return [
        Place(f"d{n}", site, reader_at(lm, *site).dictionary, reader_at(lm, *site).sink_norm)
        for n, site in enumerate(sites)
    ]


@pytest.fixture(scope="module")
def network(lm: LanguageModel, reader_at: Callable[..., PromptReader]) -> Network:
    return Network(lm, places(lm, reader_at)[::-1])


@pytest.fixture(scope="module")
def batches(network: Network) -> list[Batch]:
    """Two lengths; each prompt against another of the same."""
    rows = []
    for text, other in PROMPTS:
        one, two = (network.lm.tokenizer(t).input_ids for t in (text, other))
        n = min(len(one), len(two))
        rows += [(one[:n], two[:n], 300, 301), (two[:n], one[:n], 301, 300)]
    return list(network.batches(rows))


def patched(network: Network, batch: Batch, at: int, make: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.no_grad():
        return network.value(batch, lambda number, read, x: make(x) if number == at else x)


def test_places_are_in_the_order_of_a_pass_and_prompts_of_one_length_together(network: Network, batches: list[Batch]):
    assert [place.acts_at for place in network.places] == SITES
    assert sorted(len(batch.ids) for batch in batches) in ([2, 2], [4])
    assert all(batch.ids.shape == batch.contrast.shape for batch in batches)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_effect_is_the_beginning_of_what_a_patch_does(network: Network, batches: list[Batch], at: int) -> None:
    """Every feature moved a little of the way to the contrast's value, at all tokens, in a pass of its own."""
    mean, h = means(network, batches), 1e-2
    found = effects(network, batches, mean)[at]
    place = network.places[at]
    for feature in [*torch.argsort(-found.effect[:-1].abs())[:6].tolist(), ERROR]:
        moved = 0.0
        for batch in batches:
            seen, other = network.seen(batch)[at], network.seen(batch.other_side)[at]
            if feature == ERROR:
                step = seen.error - other.error
            else:
                step = (seen.acts - other.acts)[..., feature, None] * place.dictionary.W_dec[feature]
            up, down = (patched(network, batch, at, lambda x, s=s, d=step: x + s * h * d) for s in (1, -1))
            moved += float((up - down).double().sum()) / (2 * h)
        assert float(found.effect[feature]) == pytest.approx(moved / 4, rel=0.05, abs=0.01)


def test_what_leaves_a_node_adds_up_to_its_effect(network: Network, batches: list[Batch]) -> None:
    mean = means(network, batches)
    every = nodes(effects(network, batches, mean))
    found = edges(network, batches, mean, every)
    assert {(e.source[0], e.target[0]) for e in found} == {(0, 1), (1, 2), (2, OUTPUT)}
    leaving: dict[tuple[int, int], float] = {}
    for edge in found:
        leaving[edge.source] = leaving.get(edge.source, 0.0) + edge.weight
    for node in every:
        assert leaving.get((node.place, node.feature), 0.0) == pytest.approx(node.effect, abs=2e-4, rel=1e-3)
    assert len(every) > 50


def test_an_edge_is_the_slope_of_a_features_contribution(network: Network, batches: list[Batch]) -> None:
    """The downstream feature read again after the upstream one was moved, one feature at one place at a time."""
    mean, h = means(network, batches), 1e-3
    every = nodes(effects(network, batches, mean))
    up = next(n for n in every if n.place == 0 and n.feature != ERROR)
    for down in [n for n in every if n.place == 1 and n.feature != ERROR][:4]:
        (weight,) = (e.weight for e in edges(network, batches, mean, [up, down]) if e.target == down[:2])
        moved = 0.0
        for batch in batches:
            seen, other = network.seen(batch), network.seen(batch.other_side)
            far = (seen[0].acts - other[0].acts)[..., up.feature, None]
            step = far * network.places[0].dictionary.W_dec[up.feature]
            slope = _slope(network, batch, 1) @ network.places[1].dictionary.W_dec[down.feature]
            z = []
            for sign in (1, -1):
                seen_there: list[Tensor] = []
                with torch.no_grad():
                    network.value(batch, lambda n, r, x, s=sign, d=step, k=seen_there: _look(n, x, s * h * d, k))
                d = network.places[1].dictionary
                z.append(seen_there[0] @ d.W_enc[:, down.feature] + d.b_enc[down.feature])
            on = seen[1].acts[..., down.feature] != 0
            moved += float((((z[0] - z[1]) / (2 * h)) * on * slope).double().sum())
        assert weight == pytest.approx(moved / 4, rel=0.05, abs=2e-3)


def _look(number: int, x: Tensor, step: Tensor, kept: list[Tensor]) -> Tensor:
    if number == 1:
        kept.append(x.clone())
    return x + step if number == 0 else x


def _slope(network: Network, batch: Batch, at: int) -> Tensor:
    kept: list[Tensor] = []

    def keep(number: int, read: Tensor, x: Tensor) -> Tensor:
        if number == at:
            kept.append(x.detach().requires_grad_())
            return kept[0]
        return x

    return torch.autograd.grad(network.value(batch, keep).sum(), kept)[0]


def test_where_the_rest_is_linear_an_effect_is_what_the_patch_does(tiny_model, reader_at) -> None:
    from sae_core.study import ModelSettings

    lm = LanguageModel.load(ModelSettings(source=str(tiny_model)), precision="float32")
    lm.model.model.norm = nn.Identity()  # from the last layer on there is the unembedding, and nothing else
    network = Network(lm, places(lm, reader_at, [("resid_post", 3)]))
    ids = lm.tokenizer("The old bridge").input_ids
    other = lm.tokenizer("The lazy dog").input_ids[: len(ids)]
    (batch,) = network.batches([(ids[: len(other)], other, 300, 301)])
    mean = means(network, [batch])
    (found,) = effects(network, [batch], mean)
    (seen,), (there,) = network.seen(batch), network.seen(batch.other_side)
    assert float(found.effect.sum()) == pytest.approx(
        float(network.value(batch) - network.value(batch.other_side)), rel=1e-3
    )
    top = int(found.effect[:-1].abs().argmax())
    step = (seen.acts - there.acts)[..., top, None] * network.places[0].dictionary.W_dec[top]
    without = patched(network, batch, 0, lambda x: x - step)
    assert float(found.effect[top]) == pytest.approx(float(network.value(batch) - without), rel=1e-3, abs=1e-4)
    (integrated,) = effects(network, [batch], mean, steps=3)
    assert integrated.effect == pytest.approx(found.effect, rel=1e-3, abs=1e-4)


def test_integrated_effects_of_a_place_add_up_to_the_whole_difference(network: Network, batches: list[Batch]) -> None:
    network = network.with_places(network.places[:1])
    (one,) = effects(network, batches, means(network, batches), steps=20)
    whole = 0.0
    for batch in batches:
        there = network.seen(batch.other_side)[0].x
        whole += float((network.value(batch) - patched(network, batch, 0, lambda _, there=there: there)).sum())
    assert float(one.effect.sum()) == pytest.approx(whole / 4, rel=0.02)


def test_without_a_contrast_the_mean_is_the_base(network: Network, batches: list[Batch]) -> None:
    alone = [batch._replace(contrast=None) for batch in batches]
    mean = means(network, alone)
    far = [m.of(alone[0].ids.shape[1]) for m in mean]
    seen = network.seen(alone[0])
    hand = torch.cat([b.ids for b in alone]) if len(alone) == 1 else None
    if hand is not None:
        assert far[0].acts == pytest.approx(seen[0].acts.mean(0), abs=1e-5)
    assert sum(float(e.effect.abs().sum()) for e in effects(network, alone, mean)) > 0


def test_everything_is_the_model_and_nothing_is_the_means(network: Network, batches: list[Batch]) -> None:
    mean = means(network, batches)
    runner = Runner(network, batches, mean)
    plain = float(torch.cat([network.value(batch) for batch in batches]).mean())
    assert runner.full == pytest.approx(plain, abs=1e-3)
    every = {(n.place, n.feature) for n in nodes(effects(network, batches, mean))}
    assert runner.faithfulness(set()) == pytest.approx(0, abs=1e-4)
    assert runner.faithfulness(set(), everything_but=True) == pytest.approx(1, abs=1e-4)
    # what does not fire on the plain prompts may fire in the run of a circuit, so all features are named here
    named = {(p, i) for p in range(3) for i in range(64)} | {(p, ERROR) for p in range(3)}
    assert runner.faithfulness(named) == pytest.approx(1, abs=1e-3)
    assert every <= named


def test_a_circuit_is_run_as_by_hand(network: Network, batches: list[Batch]) -> None:
    mean = means(network, batches)
    runner, keys = Runner(network, batches, mean), {(0, 3), (1, 5), (1, ERROR), (2, 7), (2, 8)}
    total = 0.0
    for batch in batches:
        length = batch.ids.shape[1]

        def by_hand(number: int, read: Tensor, x: Tensor, length: int = length) -> Tensor:
            place, out = network.places[number].dictionary, x.clone()
            for row in range(len(x)):
                for at in range(length):
                    m = mean[number].acts[at - length], mean[number].error[at - length]
                    acts = place.encode(x[row, at][None])
                    missed = x[row, at] - place.decode(acts)[0]
                    made = place.b_dec + (missed if (number, ERROR) in keys else m[1])
                    for i in range(64):
                        made = made + (acts[0, i] if (number, i) in keys else m[0][i]) * place.W_dec[i]
                    out[row, at] = made
            return out

        with torch.no_grad():
            total += float(network.value(batch, by_hand).sum())
    assert runner.value(runner.kept(keys)) == pytest.approx(total / 4, abs=1e-3)


def test_a_curve_begins_at_nothing_and_ends_at_everything(network: Network, batches: list[Batch]) -> None:
    mean = means(network, batches)
    found = nodes(effects(network, batches, mean))
    points, ends = curve(network, batches, batches, found)
    by = {kind: [p for p in points if p.kind == kind] for kind in {p.kind for p in points}}
    assert by.keys() == {"circuit", "without", "random", "features", "random_features", "neurons", "without_neurons"}
    assert [p.faithfulness for p in by["circuit"] if p.nodes == 0] == [0]
    assert by["neurons"][-1].faithfulness == pytest.approx(1, abs=1e-3)
    assert by["neurons"][-1].nodes == 3 * 32
    assert by["circuit"][-1].nodes == len(found)
    assert all(p.low - 1e-9 <= p.faithfulness <= p.high + 1e-9 for p in points)
    assert curve(network, batches, batches, found)[0] == points
    assert ends["full"] != ends["empty"]


def test_a_transcoder_reads_at_one_site_and_acts_at_another(lm, reader_at) -> None:
    coder = reader_at(lm, "mlp_in", 1, architecture="transcoder", writes="mlp_out", writes_layer=1).dictionary
    before, after = (reader_at(lm, "resid_post", layer).dictionary for layer in (0, 2))
    network = Network(
        lm,
        [
            Place("a", ("resid_post", 0), before, 1e9),
            Place("b", ("mlp_in", 1), coder, 1e9, ("mlp_out", 1)),
            Place("c", ("resid_post", 2), after, 1e9),
        ],
    )
    ids = lm.tokenizer("The old bridge rose").input_ids
    (batch,) = network.batches([(ids, list(reversed(ids)), 300, 301)])
    mean = means(network, [batch])
    every = nodes(effects(network, [batch], mean))
    found = edges(network, [batch], mean, every)
    assert {(0, 1), (0, 2), (1, 2)} <= {(e.source[0], e.target[0]) for e in found}  # beside the MLP, and through it
    seen = network.seen(batch)[1]
    assert torch.allclose(seen.x, coder.decode(seen.acts[0])[None] + seen.error, atol=1e-4)
    for node in [n for n in every if n.place == 0][:20]:
        leaving = sum(e.weight for e in found if e.source == node[:2])
        assert leaving == pytest.approx(node.effect, rel=1e-3, abs=2e-4)


def test_nodes_are_the_largest_first_and_only_those_that_fire(network: Network, batches: list[Batch]) -> None:
    found = nodes(effects(network, batches, means(network, batches)))
    sizes = [abs(node.effect) for node in found]
    assert sizes == sorted(sizes, reverse=True)
    assert all(0 < node.prompts <= 1 for node in found)
    assert isinstance(found[0], Node)
    assert len({(n.place, n.feature) for n in found}) == len(found)
