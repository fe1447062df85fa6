"""A task without nodes of its circuit, beside the same done by hand: hooks, one token at a time."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from assets.partitions import STUDIES
from sae_core.artifacts import ArtifactStore
from sae_core.atlas import sink_norm
from sae_core.circuits.edit import Edit, EditError, at_layers, edited
from sae_core.circuits.reader import ERROR, Circuit, NoCircuitError, read_circuit
from sae_core.dictionary import Dictionary
from sae_core.language_model import LanguageModel

SLUG = "tiny-circuits.mini"


@pytest.fixture(scope="module")
def circuit(circuit_store: Path) -> Circuit:
    return read_circuit(ArtifactStore(circuit_store), SLUG)


@pytest.fixture(scope="module")
def keys(circuit: Circuit) -> list[tuple[int, int]]:
    """Two features of one place, one of the other, and an error."""
    by_place = [[(n.place, n.feature) for n in circuit.nodes if n.place == p and n.feature != ERROR] for p in (0, 1)]
    fewer, more = sorted(by_place, key=len)
    (error, *_) = [(n.place, n.feature) for n in circuit.nodes if n.feature == ERROR]
    return [*more[:2], fewer[0], error]


@pytest.fixture(scope="module")
def run(circuit_store: Path, lm: LanguageModel) -> Callable[[list[tuple[int, int]]], list[Edit]]:
    store, study = ArtifactStore(circuit_store), STUDIES.get("tiny-circuits")
    return lambda keys: list(edited(store, study, SLUG, keys, lambda: lm))


@pytest.fixture(scope="module")
def told(run: Callable[[list[tuple[int, int]]], list[Edit]], keys: list[tuple[int, int]]) -> list[Edit]:
    return run(keys)


def by_hand(circuit_store: Path, lm: LanguageModel, circuit: Circuit, keys: list[tuple[int, int]], ids: list[int]):
    """Logits of a pass with the nodes taken out; `keys` may be none."""
    store, handles = ArtifactStore(circuit_store), []
    for number, place in enumerate(circuit.places):
        own = [feature for at, feature in keys if at == number]
        made = Dictionary.load(store.get("dictionary", place.dictionary).folder, torch.device("cpu"))
        sinks = sink_norm(store.get("activations", place.dictionary.rsplit(".", 3)[0]))

        def hook(module: object, arguments: object, out: Tensor, own=own, made=made, sinks=sinks) -> Tensor:
            out = out.clone()
            for at, x in enumerate(out[0].clone()):
                acts = made.encode(x[None])[0]
                rebuilt = made.b_dec + sum(acts[i] * made.W_dec[i] for i in acts.nonzero()[:, 0])
                for feature in own if x.norm() <= sinks else []:
                    out[0, at] -= x - rebuilt if feature == ERROR else acts[feature] * made.W_dec[feature]
            return out

        handles.append(lm.model.model.layers[place.layer].register_forward_hook(hook))
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids])).logits[0]
    for handle in handles:
        handle.remove()
    return logits


def test_what_is_told_is_what_passes_by_hand_give(circuit_store: Path, lm: LanguageModel, circuit: Circuit, keys, told):
    *_, last = told
    ids = {text: lm.tokenizer(text, add_special_tokens=False).input_ids[0] for text in (" the", " a")}
    assert sorted(one.text for one in last.prompts) == sorted(text for text, *_ in circuit.prompts[circuit.found_on :])
    for one in last.prompts:
        prompt = lm.tokenizer(one.text, add_special_tokens=False).input_ids
        for some, value in (([], one.before), (keys, one.after)):
            logits = by_hand(circuit_store, lm, circuit, some, prompt)[-1]
            assert value == pytest.approx(float(logits[ids[one.target]] - logits[ids[one.against]]), abs=2e-3)
    for level, values in (
        (last.before, [p.before for p in last.prompts]),
        (last.after, [p.after for p in last.prompts]),
    ):
        assert level.difference == pytest.approx(np.mean(values), abs=1e-9)
        assert level.right == np.mean(np.array(values) > 0)
    assert last.before.right == 1
    assert last.after.difference != pytest.approx(last.before.difference, abs=1e-2)


def test_the_loss_elsewhere_is_that_of_held_out_tokens_by_hand(
    circuit_store: Path, lm: LanguageModel, circuit: Circuit, keys, told
):
    *_, last = told
    (file,) = (circuit_store / "corpus").glob("*/*/held_out.safetensors")
    blocks = load_file(file)
    count = max(1, 2048 // blocks["token_ids"].shape[1])
    for some, value in (([], last.before.loss), (keys, last.after.loss)):
        nats = []
        for ids, documents in zip(blocks["token_ids"][:count], blocks["documents"][:count], strict=True):
            said = by_hand(circuit_store, lm, circuit, some, ids.tolist()).log_softmax(-1)
            for at, (one, following) in enumerate(pairwise(documents)):
                if one == following >= 0:
                    nats.append(-float(said[at, ids[at + 1]]))
        assert value == pytest.approx(np.mean(nats), abs=1e-3)
        assert last.tokens == len(nats)


def test_random_draws_are_as_many_other_features(told):
    *_, last = told
    assert (last.features, last.errors) == (3, 1)
    assert 0 < last.drawn <= 3
    assert len(last.random) == 3
    assert len({level.difference for level in last.random}) > 1


def test_everything_of_a_circuit_leaves_nothing_to_draw(circuit: Circuit, run):
    *_, last = run([(node.place, node.feature) for node in circuit.nodes])
    assert (last.random, last.drawn) == ([], 0)


def test_the_task_is_told_first_and_losses_come_block_by_block(told):
    assert (told[0].before.loss, told[0].random) == (None, [])
    assert [edit.done for edit in told] == sorted({edit.done for edit in told})
    assert told[-1].done == told[-1].total == 5 * (1 + len({edit.tokens for edit in told} - {0}))


def test_nodes_that_the_circuit_does_not_have_are_refused_in_one_line(circuit_store: Path, circuit: Circuit, run):
    with pytest.raises(EditError, match=r"has no node \d:63: choose among the \d+ that it has"):
        free = next(p for p in (0, 1) if (p, 63) not in {(n.place, n.feature) for n in circuit.nodes})
        run([(free, 63)])
    with pytest.raises(EditError, match=r"has no node \?:1"):
        run([(9, 1)])
    with pytest.raises(EditError, match="no node was chosen"):
        run([])
    with pytest.raises(EditError, match="no dictionary at layer 7: there are 1, 2"):
        at_layers(circuit, [(7, 1)])
    assert at_layers(circuit, [(2, 5), (1, ERROR)]) == [(1, 5), (0, ERROR)]


def test_a_circuit_of_a_dictionary_that_was_made_anew_is_not_asked(circuit_store: Path, keys, run, monkeypatch):
    real = ArtifactStore.manifest

    def anew(store: ArtifactStore, stage: str, slug: str):
        found = real(store, stage, slug)
        return replace(found, fingerprint="0" * 16) if stage == "dictionary" and found else found

    monkeypatch.setattr(ArtifactStore, "manifest", anew)
    with pytest.raises(NoCircuitError, match="made anew since"):
        run(keys)
