"""SHIFT on a model whose features are known: what is taken out is gone, and a probe without its cue has none."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_core.circuits.graph import ERROR, Node
from sae_core.circuits.network import CircuitError, Network, Place
from sae_core.circuits.shift import Probe, Shift, load_biographies, write_texts
from sae_core.language_model import LanguageModel
from sae_core.prompt_reader import PromptReader

EVERY = [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_texts_of_a_pair_differ_in_the_cue_alone_and_test_texts_share_no_sentence() -> None:
    made_of = load_biographies()
    find, test = (write_texts(made_of, part, EVERY, 6, 0) for part in ("find", "test"))
    assert len(find) == 24
    cue = {w.lower() for c in (0, 1) for w in (*made_of.names[c], *made_of.words[c])}
    for text in (*find, *test):
        one, other = (re.findall(r"\w+", t) for t in (text.text, text.twin))
        differ = {w.lower() for a, b in zip(one, other, strict=True) if a != b for w in (a, b)}
        assert differ
        assert differ <= cue
        assert not cue & {w.lower() for w in re.findall(r"\w+", text.plain)}
    sentences = [set(part.professor + part.nurse + part.filler) for part in (made_of.find, made_of.test)]
    assert not sentences[0] & sentences[1]
    assert [(t.label, t.cue) for t in write_texts(made_of, "find", [(0, 0), (1, 1)], 2, 0)] == [(0, 0)] * 2 + [
        (1, 1)
    ] * 2


def test_a_probe_finds_what_tells_two_kinds_apart() -> None:
    rng = torch.Generator().manual_seed(0)
    x, labels = torch.randn(60, 5, generator=rng), [0, 1] * 30
    x[1::2, 2] += 4
    probe = Probe.train(x, labels)
    assert (probe.says(x) == labels).mean() > 0.9
    assert int(probe.weight.abs().argmax()) == 2


@pytest.fixture(scope="module")
def run(lm: LanguageModel, reader_at: Callable[..., PromptReader], circuit_store: Path) -> Shift:
    places = [Place(f"d{n}", ("resid_post", n), reader_at(lm, "resid_post", n).dictionary, 1e9) for n in (1, 2)]
    (corpus,) = (circuit_store / "corpus").glob("*/*/held_out.safetensors")
    return Shift(Network(lm, places), corpus.parent, load_biographies(), kept=20, each=8)


def test_taking_out_a_feature_is_what_it_says(run: Shift) -> None:
    node = next(n for n in run.circuit if n.feature != ERROR and n.place == 1)
    place = run.network.places[1]
    text = run.test[0]
    ids = torch.tensor([run._ids(text.text)])
    x = run.network.lm.capture("resid_post", 2, ids)[0]
    by_hand = (x - place.encode(x)[:, [node.feature]] * place.dictionary.W_dec[node.feature]).mean(0)
    assert run.read([text], run.without([node]))[0] == pytest.approx(by_hand, abs=1e-4)
    assert run.read([text])[0] == pytest.approx(x.mean(0), abs=1e-4)


def test_effects_on_the_probe_add_up_to_its_logits(run: Shift) -> None:
    """The probe is linear at its own place, so there the effects are exact."""
    last = [n for n in run.found if n.place == 1]
    batches = run._batches([t for label in (0, 1) for t in [t for t in run.train if t.label == label][:8]])
    clean = torch.cat([run.network.value(batch) for batch in batches]).mean()

    def at_mean(number: int, read: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if number == 0:
            return x
        mean = run._mean[1].of(x.shape[1])
        return (run.network.places[1].decode(mean.acts) + mean.error).expand_as(x)

    with torch.no_grad():
        empty = torch.cat([run.network.value(batch, at_mean) for batch in batches]).mean()
    assert sum(n.effect for n in last) == pytest.approx(float(clean - empty), rel=1e-2, abs=1e-2)


def test_every_way_is_measured_beside_its_controls(run: Shift) -> None:
    labels = {(n.place, n.feature): "fires on ' she'" if i % 2 else "theory" for i, n in enumerate(run.circuit)}
    chosen = run.labeled(labels)
    assert chosen == [n for i, n in enumerate(run.circuit) if i % 2 and n.feature != ERROR]
    assert run.labeled(labels, ["theory"]) == [n for i, n in enumerate(run.circuit) if not i % 2 and n.feature != ERROR]
    scores = {score.how: score for score in run.measure({"SHIFT": chosen[:3]})}
    assert len(scores) == 7
    assert all(0 <= value <= 1 for s in scores.values() for value in (s.label, s.cue, s.worst))
    assert all(s.worst <= s.label for s in scores.values())
    assert scores["SHIFT"].features == 3
    assert scores["SHIFT"].loss is not None
    assert np.isfinite(scores["SHIFT"].loss)
    assert run.loss([]) == pytest.approx(0, abs=1e-6)


def test_features_are_named_by_layer_and_number(run: Shift) -> None:
    (node,) = run.named([(2, 5)])
    assert (node.place, node.feature) == (1, 5)
    for bad in [(7, 5), (2, 64), (2, -1)]:
        with pytest.raises(CircuitError, match="there is no feature"):
            run.named([bad])


def test_a_file_that_holds_no_biographies_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text('name = "x"\n', "utf-8")
    with pytest.raises(CircuitError, match="Field required"):
        load_biographies(tmp_path / "b.toml")
    assert Node(0, 1, 2.0, 3.0, 0.5).effect == 2
