import json

import pytest

from sae_core.labels import build_labels
from sae_core.labels.estimate import estimate_labels
from sae_core.study import LabelSettings


def settings(endpoint, **more) -> LabelSettings:
    prices = {"prompt_price": 0.1, "completion_price": 0.4}
    return LabelSettings(model="m", base_url=endpoint.url, **{"features": 6, "judged": 0} | prices | more)


def test_an_estimate_asks_nobody_and_writes_nothing(endpoint, make_features, cache):
    estimate = estimate_labels(settings(endpoint), make_features(8, dead=()))
    assert (estimate.features, estimate.requests, estimate.cached) == (6, 6, 0)
    expected = (estimate.prompt_tokens * 0.1 + estimate.completion_tokens * 0.4) / 1e6
    assert estimate.dollars == pytest.approx(expected)
    assert endpoint.requests == []
    assert not list(cache.rglob("*"))


def test_an_estimate_foretells_what_is_sent(endpoint, make_features, tmp_path):
    features = make_features(8, dead=())
    estimate = estimate_labels(settings(endpoint), features)
    (tmp_path / "out").mkdir()
    build_labels(settings(endpoint), features, tmp_path / "out")
    assert len(endpoint.requests) == estimate.requests
    sent = sum(len(m["content"].encode()) for request in endpoint.requests for m in request["messages"])
    assert sent / 4 < estimate.prompt_tokens < sent / 3


def test_what_is_answered_already_is_free(endpoint, make_features, tmp_path):
    features = make_features(8, dead=())
    (tmp_path / "out").mkdir()
    build_labels(settings(endpoint, features=4), features, tmp_path / "out")
    assert estimate_labels(settings(endpoint), features)[1:3] == (2, 4)
    assert estimate_labels(settings(endpoint), features, [0])[:3] == (1, 0, 1)


def test_an_unknown_price_is_said_to_be_unknown(endpoint, make_features):
    unknown = settings(endpoint, prompt_price=None, completion_price=None)
    assert json.loads(json.dumps(estimate_labels(unknown, make_features())._asdict()))["dollars"] is None


def test_a_local_model_s_estimate_is_free_and_starts_no_server(make_features, monkeypatch):
    def serve(*args: object) -> None:
        raise AssertionError("a server was started")

    monkeypatch.setattr("sae_core.labels.endpoint.local_server", serve)
    assert estimate_labels(LabelSettings(features=2), make_features()).dollars == 0.0
