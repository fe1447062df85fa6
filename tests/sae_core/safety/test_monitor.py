import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_core.dictionary import Dictionary
from sae_core.language_model import LanguageModel
from sae_core.prompt_reader import PromptError, PromptReader
from sae_core.safety.monitor import Detector, Monitor, fit_detector, load_detectors, read_stream, save_detectors
from sae_core.study import ModelSettings

TEXTS = [
    "Rain fell on the old bridge while the river rose below it.", "def add(a, b):\n    return a + b\n" * 4,
    "Les enfants jouent dans le jardin.", "x",
]  # fmt: skip


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> LanguageModel:
    return LanguageModel.load(ModelSettings(source=str(tiny_model)), precision="float32")


@pytest.fixture(scope="module", params=[None, 2], ids=["thresholds", "top_k"])
def reader(request: pytest.FixtureRequest, lm: LanguageModel) -> PromptReader:
    rng = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(16, 32, generator=rng), dim=1)
    rank = None if request.param is None else torch.ones(16)
    dictionary = Dictionary(
        W_dec.T.clone(), torch.zeros(16), W_dec, torch.zeros(32), torch.full((16,), 0.2),
        {"architecture": "top_k", "k": request.param or 4}, rank,
    )  # fmt: skip
    return PromptReader(lm, dictionary, "resid_post", 2, 16, 1e9)


@pytest.fixture(scope="module")
def monitor(reader: PromptReader) -> Monitor:
    falling = [3.0 - 0.1 * i for i in range(29)]
    return Monitor(reader, [Detector(f"c{i}", i, "", falling, 1.0, -2.0) for i in (3, 7, 11)], 0.5)


def test_alerts_are_the_runs_of_tokens_at_or_above_the_threshold(monitor: Monitor, reader: PromptReader) -> None:
    found = monitor.scan(TEXTS)
    assert sum(map(len, found)) > 5
    for number, text in enumerate(TEXTS):
        ids = torch.tensor(reader.lm.tokenizer(text).input_ids)
        acts = torch.cat([reader.lm.capture("resid_post", 2, part[None])[0] for part in ids.split(16)])
        values = reader.dictionary.encode(acts).numpy()
        for detector, bound in zip(monitor.detectors, monitor.thresholds, strict=True):
            covered = np.zeros(len(ids), bool)
            for alert in (a for a in found[number] if a.concept == detector.concept):
                covered[alert.start : alert.stop] = True
                assert alert.value == pytest.approx(values[alert.start : alert.stop, detector.feature].max(), rel=1e-4)
                assert alert.text == number
            np.testing.assert_array_equal(covered, values[:, detector.feature] >= bound)


def test_a_feature_silent_in_calibration_alerts_wherever_it_fires(reader: PromptReader) -> None:
    silent = Monitor(reader, [Detector("c", 3, "", [0.0] * 29, 1.0, -2.0)], 0.5)
    assert silent.thresholds.tolist() == pytest.approx([0.2])  # the dictionary's, not the least number above 0
    ids = torch.tensor(reader.lm.tokenizer(TEXTS[0]).input_ids)[:16]
    fires = reader.dictionary.encode(reader.lm.capture("resid_post", 2, ids[None])[0])[:, 3] > 0
    covered = np.zeros(len(ids), bool)
    for alert in silent.scan(TEXTS[:1])[0]:
        covered[alert.start : alert.stop] = True
    np.testing.assert_array_equal(covered, fires.numpy())


@pytest.mark.parametrize("step", [1, 3, 100])
def test_a_stream_gives_the_same_alerts_as_the_whole_text(monitor: Monitor, reader: PromptReader, step: int) -> None:
    for text, whole in zip(TEXTS, monitor.scan(TEXTS), strict=True):
        ids = reader.lm.tokenizer(text).input_ids
        stream = monitor.stream()
        alerts = [alert for at in range(0, len(ids), step) for alert in stream.push(ids[at : at + step])]
        alerts = sorted(alerts + stream.close())
        places = [(a.concept, a.start, a.stop) for a in whole]
        assert sorted((a.concept, a.start, a.stop) for a in alerts) == sorted(places)
        by_place = {(a.concept, a.start): a.value for a in whole}
        assert all(by_place[a.concept, a.start] == pytest.approx(a.value, rel=1e-3) for a in alerts)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_the_rate_of_false_alarms_on_other_texts_is_what_was_asked_for(rate: float) -> None:
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(40):
        detector = fit_detector("c", 0, "", rng.normal(2, 1, 50), rng.normal(size=200).clip(-5))
        rates.append((rng.normal(size=1000) >= detector.threshold(rate)).mean())
    assert rate / 1.5 < np.mean(rates) <= rate * 1.1


def test_a_rate_that_the_calibration_texts_cannot_hold_is_refused() -> None:
    detector = fit_detector("scam", 0, "", np.array([1.0, 2.0]), np.zeros(9))
    assert detector.threshold(0.1) > 0  # never a yes where the feature is silent
    with pytest.raises(PromptError, match="scam: 9 calibration texts cannot hold"):
        detector.threshold(0.05)
    with pytest.raises(PromptError, match="no calibration texts"):
        fit_detector("scam", 0, "", np.zeros(0), np.zeros(1))


def test_probabilities_are_calibrated_and_follow_the_base_rate() -> None:
    rng = np.random.default_rng(1)
    detector = fit_detector("c", 0, "", rng.normal(2, 1, 4000), rng.normal(0, 1, 4000))
    for value in (0.0, 1.0, 2.5):  # two normals of equal width: log-odds 2 x - 2
        assert detector.probability(value) == pytest.approx(1 / (1 + np.exp(2 - 2 * value)), abs=0.03)
    odds = detector.probability(1.5, 0.01) / (1 - detector.probability(1.5, 0.01))
    assert odds == pytest.approx(detector.probability(1.5) / (1 - detector.probability(1.5)) / 99)


def test_detectors_are_written_and_read_back_and_an_unknown_concept_is_refused(tmp_path: Path) -> None:
    detectors = [
        fit_detector(name, i, "a", np.array([2.0]), np.array([1.0, 0.0])) for i, name in enumerate(("dna", "scam"))
    ]
    save_detectors(detectors, tmp_path / "m.json")
    assert load_detectors(tmp_path / "m.json") == detectors
    assert load_detectors(tmp_path / "m.json", ["scam"]) == detectors[1:]
    with pytest.raises(PromptError, match="no monitor for 'x': the audit calibrated dna, scam"):
        load_detectors(tmp_path / "m.json", ["x"])


def test_lines_are_texts_or_json_with_text_or_messages(lm: LanguageModel) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    lines = io.StringIO(f"plain\n\n{json.dumps({'text': 'a {b}'})}\n{json.dumps({'messages': chat})}\n")
    texts = list(read_stream(lines, lm.tokenizer))
    assert texts == ["plain", "a {b}", "<|start|>user\nHi<|end|>\n"]
    assert list(read_stream(iter([json.dumps({"messages": chat})]))) == ["Hi"]


@pytest.mark.parametrize("line", ['{"txt": 1}', "{", '{"messages": "x"}', '{"text": 5}', '{"messages": [{"role": 1}]}'])
def test_a_line_of_another_shape_is_refused_by_number(line: str) -> None:
    with pytest.raises(PromptError, match="line 2 is neither"):
        list(read_stream(iter(["fine", line])))
