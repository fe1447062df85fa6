"""Labels and scores beside delphi's: how many tokens each reads for a feature, and how well the labels score.

    pip download --no-deps eai-delphi==0.1.3 && unzip eai_delphi-0.1.3-py3-none-any.whl -d delphi
    python benchmarks/delphi.py --delphi delphi --atlas ATLAS                  tokens of 50 features, by part
    python benchmarks/delphi.py --delphi delphi --atlas ATLAS --compare 50 --folder RESULTS --minutes 10
                                                                               the scores, by the local model

delphi's prompts are those of its own modules, filled in as its scorers do at its default settings (40 examples for a
label; for detection and fuzzing 50 texts each in which the feature fires and 50 in which it does not, five a question,
windows of 32 tokens). Ours judge as many texts. A text that is missing to fill these numbers is taken again, which
changes no count of tokens. Tokens are those of a real tokenizer with its chat template, for the label and no control.

`--compare` labels N features with both prompts, and has the same model judge both labels on the same texts (`--texts`,
at most so many on each side), ours beside another feature's: by our questions, and then by delphi's, of which its
option for log-probabilities makes an AUC too. The score `embedding`, which asks nobody, is made of both as well. On two
cores with the local model, which we ask about one text at a time, it takes half a minute a feature for both labels, as
much for what we ask with 6 texts on each side, and two minutes for what delphi asks; `--base-url` and `--model` name
an endpoint (its key in OPENAI_API_KEY). `--minutes` makes pieces of it: run the same command again, and it goes on
from the results in `--folder` and the answers in the cache, with running totals on standard error.
"""

import argparse
import asyncio
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

import numpy as np

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from sae_core.artifacts import ArtifactStore  # noqa: E402
from sae_core.features import Example, Features  # noqa: E402
from sae_core.labels import prompts  # noqa: E402
from sae_core.labels.build import asked_all, choose_features  # noqa: E402
from sae_core.labels.client import ChatClient, Completion, RequestFailed  # noqa: E402
from sae_core.labels.endpoint import label_writer  # noqa: E402
from sae_core.labels.labeler import Labeler  # noqa: E402
from sae_core.labels.lexical import lexical_label  # noqa: E402
from sae_core.labels.reader import LabelRow  # noqa: E402
from sae_core.labels.scoring.items import Item, Names, Trial  # noqa: E402
from sae_core.labels.scoring.judge import Judge, ask, questions  # noqa: E402
from sae_core.labels.scoring.metrics import auc_pairs  # noqa: E402
from sae_core.labels.scoring.nearest import Texts  # noqa: E402
from sae_core.labels.scoring.score import Scorer  # noqa: E402
from sae_core.progress import silent  # noqa: E402
from sae_core.study import LabelSettings, ModelSettings  # noqa: E402

SHOWN, JUDGED, A_QUESTION = 40, 50, 5
"""delphi's defaults: examples for a label, texts on each side of a score, texts a question."""
PRICES = {"$0.10 and $0.40": (0.10, 0.40), "$2.50 and $10": (2.50, 10.0)}
"""Dollars a million tokens read and written."""
LABEL, OTHER = "names of the days of the week", "opening parentheses before a year"
SENTENCE = "Names of the days of the week, often after a preposition or before a part of the day."
"""A label of ours and one of delphi's, which is a sentence, where only tokens are counted."""
DEFAULT = "ours, by default with both controls"
WRITTEN = {"ours": 40 + 2 * 4 * 45, "delphi": 60 + 2 * 20 * 12, DEFAULT: 40 + 2 * 3 * 45}
"""Tokens of the answers: a label, and lists of numbers. Of ours 45 a question of 25 texts, half of them listed."""
TASKS = ("detection", "fuzzing")
T = TypeVar("T")


Messages = list[dict[str, str]]


class Delphi(NamedTuple):
    """Its prompts."""

    label: Callable[..., Messages]
    detection: Callable[..., Messages]
    fuzzing: Callable[..., Messages]

    @classmethod
    def load(cls, folder: Path) -> "Delphi":
        """From the unpacked wheel, of which only the modules of prompts are run: they need no other library."""
        sys.path[:0] = [str(folder / "delphi/explainers"), str(folder / "delphi/scorers/classifier")]
        from default.prompt_builder import build_prompt
        from prompts.detection_prompt import prompt as detection
        from prompts.fuzz_prompt import prompt as fuzzing

        return cls(build_prompt, detection, fuzzing)

    def ask_label(self, examples: Sequence[Example], maximum: float) -> Messages:
        """As its default explainer asks."""
        lines = [line for example in examples for line in (_highlighted(example), _strengths(example, maximum))]
        return self.label(examples="\n".join(lines), activations=True, cot=False)

    def ask(self, task: str, items: Sequence[Item], name: str) -> Messages:
        """As its scorers ask about one batch."""
        texts = (_whole(item, task == "fuzzing") for item in items)
        numbered = "\n".join(f"Example {i}: {text}" for i, text in enumerate(texts))
        return getattr(self, task)(examples=numbered, explanation=name)


def _whole(item: Item, marks: bool) -> str:
    return prompts.marked(item.tokens, item.marked if marks else [False] * len(item.tokens))


def _highlighted(example: Example) -> str:
    least = prompts.MARK_SHARE * max(example.acts)
    return prompts.marked(example.tokens, [act > least for act in example.acts])


def _strengths(example: Example, maximum: float) -> str:
    """Its line of activations: tenths of the feature's maximum, rounded up, of at most eleven tokens."""
    least = prompts.MARK_SHARE * max(example.acts)
    strong = [(token, act) for token, act in zip(example.tokens, example.acts, strict=True) if act > least][:11]
    return "Activations: " + "".join(f'("{token}" : {math.ceil(10 * act / maximum)}), ' for token, act in strong)


# ---- tokens


def count(features: Features, neighbors: Path, delphi: Delphi, tokenizer: str, n: int) -> dict[str, Any]:
    """Tokens read for a feature, by part; means over features."""
    size = Meter(tokenizer)
    sums: dict[str, dict[str, np.ndarray]] = {"ours": {}, "delphi": {}, DEFAULT: {}}

    def add(who: str, part: str, asked: Iterable[Messages]) -> None:
        tokens = sum((size(f"{who}, {part}", messages) for messages in asked), np.zeros(2))
        sums[who][part] = sums[who].get(part, 0.0) + tokens / len(chosen)

    chosen = choose_features(features.table(), n)
    default = LabelSettings()
    for trial in trials_without_model(features, neighbors, chosen):
        row, examples = features.feature(trial.feature), features.examples(trial.feature)
        shown = prompts.choose_examples(row, examples, default.examples, 0)
        for who in ("ours", DEFAULT):
            add(who, "label", [prompts.ask(row, [examples[i] for i in shown])])
        add("delphi", "label", [delphi.ask_label([*islice(cycle(examples), SHOWN)], row.max_act)])
        items = _filled(trial.items, JUDGED)
        full, few = (trial._replace(items=some) for some in (items, _filled(trial.items, default.score_examples)))
        for task in TASKS:
            add("ours", task, _asked(full, task, Names(LABEL, None, "")))
            add("delphi", task, [delphi.ask(task, batch, SENTENCE) for batch in _batches(items)])
            add(DEFAULT, task, _asked(few, task, Names(LABEL, OTHER, lexical_label(row))))
    total = {who: sum(parts.values())[0] for who, parts in sums.items()}
    dollars = {
        f"1,000 features at {name} a million": {
            who: round((total[who] * read_ + WRITTEN[who] * written) / 1000, 2) for who in total
        }
        for name, (read_, written) in PRICES.items()
    }
    return {
        "features": len(chosen), "tokenizer": tokenizer, "judged": 4 * JUDGED,
        "tokens read, and those that the prompt before did not begin with": {
            who: {part: np.round(tokens).astype(int).tolist() for part, tokens in parts.items()}
            for who, parts in sums.items()
        },
        "total": {who: round(tokens) for who, tokens in total.items()},
        "times": round(total["delphi"] / total["ours"], 2),
        "fixed, of a question": {task: int(size("", ask(task, [], LABEL))[0]) for task in TASKS},
    } | dollars  # fmt: skip


class Meter:
    """Counts tokens of prompts, and of each those after what it has in common with the one before of its kind."""

    def __init__(self, tokenizer: str) -> None:
        from sae_core.pretrained import load_tokenizer

        self._tokenizer = load_tokenizer(ModelSettings(source=tokenizer))
        self._before: dict[str, list[int]] = {}

    def __call__(self, kind: str, messages: Messages) -> np.ndarray:
        ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        before = self._before.get(kind, [])
        differs = (i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b)
        shared = next(differs, min(len(ids), len(before)))
        self._before[kind] = ids
        return np.array([len(ids), len(ids) - shared])


def _asked(trial: Trial, task: Any, names: Names) -> list[Messages]:
    return [messages for _, _, messages, _ in questions(trial._replace(names=names), task)]


def trials_without_model(features: Features, neighbors: Path, chosen: Iterable[int]) -> list[Trial]:
    """The texts that would be judged, but for the nearest ones, which it takes a model to find."""

    class NoTexts(Texts):
        def nearest(self, examples: Sequence[Example]) -> Iterable[int]:
            return ()

    settings = LabelSettings(score_examples=JUDGED)
    scorer = Scorer(settings, features, neighbors, NoTexts(settings.embedder, features))
    return scorer.trials([LabelRow(i, "lexical", "written", LABEL) for i in chosen], [], silent)


def _filled(items: Sequence[Item], count: int) -> list[Item]:
    """So many in which the feature fires and as many in which it does not, in random order."""
    sides = ([item for item in items if item.fires is fires] for fires in (True, False))
    some = [item for side in sides for item in islice(cycle(side), count)]
    return [some[i] for i in np.random.default_rng(0).permutation(len(some))]


def _batches(items: Sequence[Item]) -> list[Sequence[Item]]:
    return [items[i : i + A_QUESTION] for i in range(0, len(items), A_QUESTION)]


# ---- scores


class Result(NamedTuple):
    """What came of one feature, one way, by one task."""

    feature: int
    way: str
    task: str
    label: str
    scores: dict[str, float | None]
    """AUC for the label, and for another's where that is asked; None where nothing that was answered could be read."""
    tokens: int
    """Read for the judging."""


OURS, THEIRS, ALL_THEIRS = "our label, our questions", "delphi's label, our questions", "delphi's label and questions"
WITH_CONTROL = (OURS, ALL_THEIRS)
OWN, OTHER = "its label", "another's"


class Comparison:
    """The scores of both kinds of labels, by both kinds of questions, on the same texts by the same model.

    Each kind of question also asks about labels of other features, as a control.

    Args:
        client: answers everything.
        delphi: its prompts.
        scorer: draws the texts.
        settings: of our labels.
        at_once: requests under way at once.
        file: results so far, a line each; what is there is not done again.
        seconds: after so many, nothing more is begun.
    """

    def __init__(
        self, client: ChatClient, delphi: Delphi, scorer: Scorer, settings: LabelSettings, at_once: int, file: Path,
        seconds: float,
    ) -> None:  # fmt: skip
        self.client, self.delphi, self.scorer, self.settings, self.file = client, delphi, scorer, settings, file
        self.features = scorer.features
        self.judge = Judge(client, lambda attempt: None, settings.asks_each)
        self._tokens = 0
        self._places, self._end = asyncio.Semaphore(at_once), time.monotonic() + seconds

    @property
    def results(self) -> list[Result]:
        lines = self.file.read_text("utf-8").splitlines() if self.file.exists() else []
        return [Result(**json.loads(line)) for line in lines]

    async def run(self, chosen: Sequence[int]) -> None:
        """Label with both prompts, then judge, all features by our questions before the first by delphi's.

        What is asked in one way comes one after another, as what its prompts begin with stays read. Answers are in the
        cache: what was asked before costs a moment.
        """
        labeler = Labeler(self.client, self.features, self.settings, lambda attempt: None)
        rows: list[LabelRow] = []
        async for feature in self._while_time("our labels", chosen):
            rows += asked_all([await labeler.label(feature)], self.features, self.settings)
        if len(rows) < len(chosen):
            return
        trials = self.scorer.trials(rows, [], silent)
        theirs: list[str] = []
        async for trial in self._while_time("delphi's labels", trials):
            theirs.append(await self._explain(trial) or "unclear")
        if len(theirs) < len(trials):
            return
        done = {(result.feature, result.way, result.task) for result in self.results}
        labels = {OURS: [trial.names.own for trial in trials], THEIRS: theirs, ALL_THEIRS: theirs}
        rounds = [((OURS, THEIRS), task) for task in ("embedding", *TASKS)] + [((ALL_THEIRS,), task) for task in TASKS]
        wanted = [(i, way, task) for ways, task in rounds for i in range(len(trials)) for way in ways]
        left = [(i, way, task) for i, way, task in wanted if (trials[i].feature, way, task) not in done]
        async for i, way, task in self._while_time("judged", left):
            other = labels[way][(i + 1) % len(trials)] if way in WITH_CONTROL else None
            result = await self._judge(trials[i], way, task, labels[way][i], other)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result._asdict(), ensure_ascii=False) + "\n")
            _say(json.dumps(means(self.results)))

    async def _while_time(self, what: str, things: Sequence[T]) -> AsyncIterator[T]:
        for n, thing in enumerate(things):
            if time.monotonic() > self._end:
                _say(f"{what}: {n} of {len(things)}; the time is up, run again to go on")
                return
            yield thing
            _say(f"{what}: {n + 1} of {len(things)}")

    async def _judge(self, trial: Trial, way: str, task: Any, own: str, other: str | None) -> Result:
        before = self._tokens
        if way == ALL_THEIRS:
            names = {kind: name for kind, name in ((OWN, own), (OTHER, other)) if name}
            told = await asyncio.gather(*(self._by_delphi(trial, task, name) for name in names.values()))
            found = dict(zip(names, told, strict=True))
        else:
            named = trial._replace(names=Names(own, other, ""))
            answers = self.scorer.embed(named) if task == "embedding" else await self.judge.judge(named, task)
            found = {{"own": OWN, "shuffled": OTHER}[kind]: says for kind, says in answers.says.items()}
            self._tokens += answers.prompt_tokens
        scores = {kind: _auc(says, trial) for kind, says in found.items()}
        return Result(trial.feature, way, task, own, scores, self._tokens - before)

    async def _ask(self, messages: Messages, **more: Any) -> Completion | None:
        async with self._places:
            try:
                completion = await self.client.complete(messages, **more)
            except RequestFailed:
                return None
        self._tokens += completion.prompt_tokens
        return completion

    async def _explain(self, trial: Trial) -> str:
        examples, row = self.features.examples(trial.feature), self.features.feature(trial.feature)
        seen = {item.acts is not None and tuple(item.acts) for item in trial.items}
        unseen = [example for example in examples if tuple(example.acts) not in seen][:SHOWN]
        completion = await self._ask(self.delphi.ask_label(unseen, row.max_act), max_tokens=300, response_format=None)
        found = completion and re.search(r"\[EXPLANATION\]:\s*(.*)", completion.text, re.DOTALL)
        return found[1].strip()[:1000] if found else ""

    async def _by_delphi(self, trial: Trial, task: str, name: str) -> np.ndarray:
        more = {"max_tokens": 60, "response_format": None, "logprobs": True, "top_logprobs": 5}
        says: list[float] = []
        for batch in _batches(trial.items):
            completion = await self._ask(self.delphi.ask(task, batch, name), **more)
            given = _ones(completion) if completion else []
            says += given if len(given) == len(batch) else [math.nan] * len(batch)
        return np.array(says, float)


def _ones(completion: Completion) -> list[float]:
    """The log-odds of 1 at each place of a list of 1 and 0: as delphi's scorers have it with `log_prob`."""
    found = []
    for token, likeliest in completion.logprobs or ():
        if token.strip(" [,") in ("0", "1"):
            bits = {word: p for key, p in likeliest.items() if (word := key.strip(" [,")) in ("0", "1")}
            least = min(likeliest.values())
            found.append(bits.get("1", least) - bits.get("0", least))
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def columns(results: Sequence[Result]) -> dict[str, dict[int, float]]:
    """The scores by way, task and whose label, of each feature that has one."""
    found: dict[str, dict[int, float]] = {}
    for result in results:
        for kind, score in result.scores.items():
            if score is not None:
                found.setdefault(f"{result.way}, {result.task}, {kind}", {})[result.feature] = score
    return found


def means(results: Sequence[Result]) -> dict[str, list[float]]:
    """Mean score, and of how many features."""
    return {name: [round(fmean(of.values()), 3), len(of)] for name, of in columns(results).items()}


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """All of it; differences with their 95% intervals by a bootstrap over features."""
    found = columns(results)
    tasks = ("embedding", *TASKS)
    pairs = [(f"{way}, {task}, {OWN}", f"{way}, {task}, {OTHER}") for way in WITH_CONTROL for task in tasks]
    pairs += [(f"{OURS}, {task}, {OWN}", f"{way}, {task}, {OWN}") for way in (THEIRS, ALL_THEIRS) for task in tasks]
    return {
        "mean_and_features": means(results),
        "differences": {f"{a} - {b}": difference(found[a], found[b]) for a, b in pairs if {a, b} <= found.keys()},
        "tokens_read_judging": {
            way: sum(r.tokens for r in results if r.way == way) for way in (OURS, THEIRS, ALL_THEIRS)
        },
        "labels": sorted({(r.feature, r.way, r.label) for r in results}),
    }


def difference(first: dict[int, float], second: dict[int, float]) -> list[float]:
    """Mean difference over the features that have both, its interval, and how many they are."""
    both = np.array([first[feature] - second[feature] for feature in first.keys() & second.keys()])
    draws = np.random.default_rng(0).choice(both, (5000, len(both))).mean(1)
    return [*(round(float(v), 3) for v in (both.mean(), *np.percentile(draws, (2.5, 97.5)))), len(both)]


def _auc(says: np.ndarray, trial: Trial) -> float | None:
    pairs = auc_pairs(says, np.array([item.fires for item in trial.items]))
    return float(pairs.mean()) if pairs.size else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delphi", type=Path, required=True, help="folder of the unpacked wheel")
    parser.add_argument("--atlas", type=Path, required=True, help="MIND_ATLAS_HOME of a finished study")
    parser.add_argument("--dictionary", default="", help="default: the first one")
    parser.add_argument("--tokenizer", default="smollm2-135m-instruct", help="of a model with a chat template")
    parser.add_argument("--features", type=int, default=50, help="features whose tokens are counted")
    parser.add_argument("--compare", type=int, default=0, metavar="N", help="features scored both ways")
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="of --compare's results: what is there is not done again")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after so many, --compare begins nothing more")
    parser.add_argument("--model", default=LabelSettings().model)
    parser.add_argument("--base-url", default="")
    options = parser.parse_args()
    store, delphi = ArtifactStore(options.atlas), Delphi.load(options.delphi)
    slug = options.dictionary or store.slugs("features")[0]
    folder, neighbors = (store.get(stage, slug).folder for stage in ("features", "neighbors"))
    features = Features.open(folder)
    if not options.compare:
        print(json.dumps(count(features, neighbors, delphi, options.tokenizer, options.features), indent=1))
        return
    if not options.folder:
        parser.error("--compare wants --folder")
    settings = LabelSettings(
        model=options.model, base_url=options.base_url, features=options.compare, scorers=[],
        score_examples=options.texts,
    )  # fmt: skip
    options.folder.mkdir(parents=True, exist_ok=True)
    made = store.get("features", slug).manifest.fingerprint
    of = hashlib.sha256(f"{settings.model_dump_json(exclude={'features'})} {made} {prompts.VERSION}".encode())
    file = options.folder / f"results-{of.hexdigest()[:8]}.jsonl"  # other settings, other results
    scorer = Scorer(settings, features, neighbors)
    chosen = choose_features(features.table(), options.compare)
    key = os.environ.get("OPENAI_API_KEY") or "none"
    at_once = settings.concurrency if options.base_url else 1

    async def work(client: ChatClient) -> list[Result]:
        comparison = Comparison(client, delphi, scorer, settings, at_once, file, 60 * options.minutes)
        try:
            await comparison.run(chosen)
        finally:
            await client.close()
        return comparison.results

    with label_writer(settings, key, silent) as client:
        print(json.dumps(summary(asyncio.run(work(client))), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
