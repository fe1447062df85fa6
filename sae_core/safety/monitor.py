"""Alerts on text: a concept's feature above a threshold that was set for a chosen rate of false alarms.

A threshold is the k-th largest value of n texts that are not about the concept, k = floor(rate * (n + 1)): by exchange-
ability a new such text exceeds it with a chance of at most `rate` (split conformal prediction, Papadopoulos et al.
2002). That holds for texts like those; for others the rate must be measured again. Silence proves nothing.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from transformers import DynamicCache

from sae_core.artifacts import ArtifactError
from sae_core.atlas import Atlas
from sae_core.dictionary import Dictionary
from sae_core.prompt_reader import PromptError, PromptReader
from sae_core.safety.shapes import Alert
from sae_core.stages import report_of

MONITOR = "monitor.json"


@dataclass(frozen=True)
class Detector:
    """A feature that stands for a concept, with all that its thresholds follow from."""

    concept: str
    feature: int
    label: str
    negatives: list[float]
    """Its largest value in each of the calibration texts that are not about the concept, in falling order."""
    slope: float
    intercept: float
    """Log-odds that a text is about the concept, by its value, where half of all texts are (Platt 1999)."""

    def threshold(self, false_positive_rate: float) -> float:
        """The value at which an alert is raised. Raises PromptError when there are too few negatives for the rate."""
        n = len(self.negatives)
        k = math.floor(false_positive_rate * (n + 1))
        if k < 1:
            raise PromptError(
                f"{self.concept}: {n} calibration texts cannot hold a false-positive rate of {false_positive_rate:g}: "
                f"ask for {1 / (n + 1):.3g} or more, or give the concept more calibration texts"
            )
        return max(self.negatives[k - 1], float(np.nextafter(np.float32(0), np.float32(1))))

    def probability(self, value: float, base_rate: float = 0.5) -> float:
        """Chance that a text with this value is about the concept, when a share `base_rate` of all texts is."""
        odds = self.slope * value + self.intercept + math.log(base_rate / (1 - base_rate))
        return 1 / (1 + math.exp(-max(min(odds, 500.0), -500.0)))


def fit_detector(
    concept: str, feature: int, label: str, positive: Float[np.ndarray, " p"], negative: Float[np.ndarray, " n"]
) -> Detector:
    """A detector from the largest values of calibration texts. Raises PromptError when a side is empty."""
    if not len(positive) or not len(negative):
        raise PromptError(f"{concept}: no calibration texts on one side")
    values = np.array([*positive, *negative], np.float64)[:, None]
    scale = float(values.std()) or 1.0
    model = LogisticRegression(class_weight="balanced")
    model.fit(values / scale, np.repeat([1, 0], [len(positive), len(negative)]))
    falling = np.sort(negative)[::-1].astype(float).tolist()
    return Detector(concept, feature, label, falling, float(model.coef_[0, 0]) / scale, float(model.intercept_[0]))


def save_detectors(detectors: Sequence[Detector], path: Path) -> None:
    """Write them as JSON."""
    path.write_text(json.dumps([asdict(detector) for detector in detectors], ensure_ascii=False, indent=1), "utf-8")


def load_detectors(path: Path, concepts: Sequence[str] = ()) -> list[Detector]:
    """Those of the concepts; of all when none is named. Raises PromptError for an unknown one."""
    found = {row["concept"]: Detector(**row) for row in json.loads(path.read_text("utf-8"))}
    if unknown := [name for name in concepts if name not in found]:
        raise PromptError(f"no monitor for {unknown[0]!r}: the audit calibrated {', '.join(found) or 'none'}")
    return [found[name] for name in (concepts or found)]


def detectors_of(atlas: Atlas, concepts: Sequence[str] = ()) -> list[Detector]:
    """Those that the audit of the atlas calibrated, as `load_detectors`, with their features' labels as they are now.

    Raises ArtifactError when there is none.
    """
    if (audit := report_of(atlas.store, "safety", atlas.dictionary)) is None:
        raise ArtifactError(f"no audit of {atlas.dictionary} has set thresholds: `mind-atlas audit` does")
    found = load_detectors(audit.folder / MONITOR, concepts)
    return [replace(detector, label=atlas.shown(detector.feature)) for detector in found]


class Monitor:
    """Watches texts, whole or token by token, for the concepts of some detectors."""

    def __init__(
        self, reader: PromptReader, detectors: Sequence[Detector], false_positive_rate: float = 0.05,
        base_rate: float = 0.5,
    ) -> None:  # fmt: skip
        if not 0 < base_rate < 1:
            raise PromptError(f"base rate {base_rate}: give a share between 0 and 1")
        self.reader, self.detectors, self.base_rate = reader, list(detectors), base_rate
        self._encode = _Columns(reader.dictionary, [d.feature for d in detectors])
        least = self._encode.threshold.float().cpu().numpy()  # no feature that fires has a smaller value
        self.thresholds = np.maximum(np.array([d.threshold(false_positive_rate) for d in detectors], np.float32), least)

    def scan(self, texts: Sequence[str]) -> list[list[Alert]]:
        """The alerts of each text, by place and concept. Raises PromptError for a text without a token."""
        windows = self.reader.windows(texts)
        values = {(w.window.text, w.window.start): self.values(w.acts) for b in self.reader.read(windows) for w in b}
        found: list[list[Alert]] = [[] for _ in texts]
        trackers = [_Tracker(self, number) for number in range(len(texts))]
        for window in windows:
            found[window.text] += trackers[window.text].push(values[window.text, window.start])
        return [sorted(alerts + tracker.close()) for alerts, tracker in zip(found, trackers, strict=True)]

    def stream(self) -> "Stream":
        """For one text that comes token by token."""
        return Stream(self)

    def values(self, acts: Float[torch.Tensor, "tokens d_model"]) -> Float[np.ndarray, "tokens detectors"]:
        """The detectors' features on each token; 0 on attention sinks."""
        values = self._encode(acts)
        values[acts.norm(dim=1) > self.reader.sink_norm] = 0
        return values.cpu().numpy()


class Stream:
    """One text, token by token, with the keys and values of what came before kept: each token is computed once."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor, self._tracker = monitor, _Tracker(monitor, 0)
        self._room, self._cache = 0, DynamicCache()

    def push(self, ids: Sequence[int]) -> list[Alert]:
        """Take the next tokens; the alerts whose runs have ended."""
        reader, alerts = self._monitor.reader, []
        rest = list(ids)
        while rest:
            lead = []
            if not self._room:  # the same windows as in a whole text, each a context of its own
                self._room, self._cache, lead = reader.window_tokens, DynamicCache(), reader.start
            now, rest = rest[: self._room], rest[self._room :]
            self._room -= len(now)
            batch = torch.tensor([[*lead, *now]])
            acts = reader.lm.capture_next(reader.hook, reader.layer, batch, self._cache)[0, len(lead) :].float()
            alerts += self._tracker.push(self._monitor.values(acts))
        return alerts

    def close(self) -> list[Alert]:
        """The text has ended: the alerts whose runs end with it."""
        return self._tracker.close()


class _Tracker:
    """Runs of tokens at or above the thresholds, over as many pieces of a text as there are."""

    def __init__(self, monitor: Monitor, text: int) -> None:
        self.monitor, self.text, self.at = monitor, text, 0
        self.open: dict[int, tuple[int, float]] = {}
        """Start and largest value of the runs that go on, by detector."""

    def push(self, values: Float[np.ndarray, "tokens detectors"]) -> list[Alert]:
        ended = []
        fires = values >= self.monitor.thresholds
        busy = np.flatnonzero(fires.any(1) | np.append(bool(self.open), fires[:-1].any(1)))
        for token in busy.tolist():
            for detector in np.flatnonzero(fires[token]).tolist():
                start, most = self.open.get(detector, (self.at + token, 0.0))
                self.open[detector] = (start, max(most, float(values[token, detector])))
            for detector in [d for d in self.open if not fires[token, d]]:
                ended.append(self._alert(detector, self.at + token))
        self.at += len(values)
        return ended

    def close(self) -> list[Alert]:
        return [self._alert(detector, self.at) for detector in list(self.open)]

    def _alert(self, detector: int, stop: int) -> Alert:
        start, value = self.open.pop(detector)
        d = self.monitor.detectors[detector]
        chance = d.probability(value, self.monitor.base_rate)
        bound = float(self.monitor.thresholds[detector])
        return Alert(self.text, d.concept, d.feature, d.label, start, stop, value, chance, bound)


class _Columns:
    """Some features of a dictionary, without the others where that is enough."""

    def __init__(self, dictionary: Dictionary, features: Sequence[int]) -> None:
        self.dictionary, self.features = dictionary, list(features)
        self.W_enc = dictionary.W_enc[:, self.features].contiguous()
        self.b_enc, self.threshold = dictionary.b_enc[self.features], dictionary.threshold[self.features]

    def __call__(self, acts: Float[torch.Tensor, "tokens d_model"]) -> Float[torch.Tensor, "tokens features"]:
        if self.dictionary.rank_scale is not None:  # each fires only if it is among the largest of all
            return self.dictionary.encode(acts)[:, self.features]
        z = acts @ self.W_enc + self.b_enc
        return z * (z > self.threshold)


def read_stream(lines: Iterator[str], tokenizer: Any = None) -> Iterator[str]:
    """Texts from lines: plain, or JSON with `text` or with `messages`, as `chat_text` puts them.

    Args:
        lines: of text; a line that begins with `{` is JSON. Empty ones are passed over.
        tokenizer: the model's, whose chat template is applied.

    Raises:
        PromptError: a line is no such JSON.
    """
    for number, line in enumerate(lines, 1):
        stripped = line.strip()
        if not stripped:
            continue
        if not stripped.startswith("{"):
            yield stripped
            continue
        try:
            row = json.loads(stripped)
            turns = [{"role": t["role"] + "", "content": t["content"] + ""} for t in row.get("messages", ())]
            yield chat_text(turns, tokenizer) if "messages" in row else row["text"] + ""
        except (ValueError, KeyError, TypeError):
            raise PromptError(
                f'line {number} is neither {{"text": "..."}} nor {{"messages": [{{"role": "user", "content": "..."}}]}}'
            ) from None


def chat_text(turns: Sequence[Mapping[str, str]], tokenizer: Any) -> str:
    """A conversation as the model is given it: by its chat template, or the turns' contents line by line."""
    if not getattr(tokenizer, "chat_template", None):
        return "\n".join(turn["content"] for turn in turns)
    return tokenizer.apply_chat_template(list(turns), tokenize=False)
