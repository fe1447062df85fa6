"""Features and errors at 0 wherever a model reads, and what that does to a task and to text that is not of the task."""

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from sae_core.circuits.build import read_prompt
from sae_core.circuits.edit import Edit, EditedPrompt, Key, Level
from sae_core.circuits.network import Network, Visit
from sae_core.circuits.reader import ERROR, Circuit
from sae_core.circuits.tasks import Prompt
from sae_core.corpus.reader import Corpus

DRAWS = 3
"""Random choices that stand beside a chosen one."""
_HELD_OUT = 2048
"""Tokens of held-out text on which the loss is measured."""


def without(network: Network, keys: Collection[Key]) -> Visit:
    """The model with features, and what dictionaries miss, at 0; attention sinks stay as they are."""
    by_place: dict[int, list[int]] = {}
    for number, feature in keys:
        by_place.setdefault(number, []).append(feature)

    def take(number: int, read: Tensor, x: Tensor) -> Tensor:
        if not (own := by_place.get(number)):
            return x
        place, features = network.places[number], [feature for feature in own if feature != ERROR]
        acts = place.encode(read)
        gone = acts[..., features] @ place.dictionary.W_dec[features]
        if ERROR in own:
            gone = gone + (x - place.decode(acts))
        return x - gone * (read.norm(dim=-1) <= place.sink_norm)[..., None]

    return take


class HeldOut:
    """Text of a corpus that no dictionary was trained on, and the model's loss on it."""

    def __init__(self, network: Network, corpus: Path) -> None:
        blocks = Corpus.open(corpus).held_out
        n = max(1, _HELD_OUT // blocks.token_ids.shape[1])
        ids, documents = (torch.as_tensor(column[:n]).long() for column in (blocks.token_ids, blocks.documents))
        counted = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
        self._network = network
        self.blocks = list(zip(ids.to(network.lm.device), counted.to(network.lm.device), strict=True))
        """Tokens, and which of them but the first are told by the one before: those of its document."""

    def loss(self, visit: Visit | None = None) -> float:
        """Cross-entropy, in nats a token."""
        return sum(self.nats(*block, visit) for block in self.blocks) / sum(int(mask.sum()) for _, mask in self.blocks)

    @torch.no_grad()
    def nats(self, ids: Int64[Tensor, " block"], counted: Bool[Tensor, " rest"], visit: Visit | None) -> float:
        """Of a block's counted tokens together."""
        with self._network.visited(visit):
            logits = self._network.lm.logits(ids[None])[0, :-1].float()
        return float(cross_entropy(logits[counted], ids[1:][counted], reduction="sum"))


def ablate(network: Network, circuit: Circuit, corpus: Path, chosen: Collection[Key], seed: int = 0) -> Iterator[Edit]:
    """The task and held-out text without some nodes of its circuit, after every pass but the first.

    Args:
        network: the model and the circuit's dictionaries.
        circuit: whose prompts are asked: those that measured it.
        corpus: folder of the corpus whose held-out text is read.
        chosen: nodes of the circuit.
        seed: of the random draws.
    """
    reads = [read_prompt(network, Prompt(*prompt), []) for prompt in circuit.prompts[circuit.found_on :]]
    reads.sort(key=lambda one: len(one.ids))  # as batches have them
    batches, text = list(network.batches([one.row for one in reads])), HeldOut(network, corpus)
    draws = _draws(circuit, chosen, np.random.default_rng(seed))
    visits = [None, without(network, chosen), *(without(network, keys) for keys in draws)]
    errors = sum(feature == ERROR for _, feature in chosen)
    told: list[np.ndarray] = []
    nats, tokens, done = np.zeros(len(visits)), 0, 0

    def known() -> Edit:
        losses = [float(one) / tokens if tokens else None for one in nats]
        levels = [Level(float(m.mean()), float((m > 0).mean()), loss) for m, loss in zip(told, losses, strict=False)]
        prompts = [
            EditedPrompt(*one.prompt, float(before), float(after))
            for one, before, after in zip(reads, told[0], told[1], strict=True)
        ]
        drawn = len(draws[0]) - errors if draws else 0
        total = len(visits) * (1 + len(text.blocks))
        return Edit(levels[0], levels[1], levels[2:], len(chosen) - errors, errors, drawn, prompts, tokens, done, total)

    for visit in visits:
        with torch.no_grad():
            told.append(torch.cat([network.value(batch, visit) for batch in batches]).double().cpu().numpy())
        done += 1
        if visit is not None:
            yield known()
    for ids, counted in text.blocks:
        new = np.zeros(len(visits))
        for number, visit in enumerate(visits):
            new[number], done = text.nats(ids, counted, visit), done + 1
            if number < len(visits) - 1:
                yield known()
        nats, tokens = nats + new, tokens + int(counted.sum())
        yield known()


def _draws(circuit: Circuit, chosen: Collection[Key], rng: np.random.Generator) -> list[set[Key]]:
    """As many other features of the circuit at each place, and the same errors; none when there are no others."""
    features = [key for key in chosen if key[1] != ERROR]
    others = [(n.place, n.feature) for n in circuit.nodes if n.feature != ERROR and (n.place, n.feature) not in chosen]
    drawn = []
    for _ in range(DRAWS):
        keys: set[Key] = set()
        for place in sorted({place for place, _ in features}):
            pool, wanted = [key for key in others if key[0] == place], sum(key[0] == place for key in features)
            keys |= {pool[i] for i in rng.choice(len(pool), min(wanted, len(pool)), replace=False)} if pool else set()
        if keys:
            drawn.append(keys | {key for key in chosen if key[1] == ERROR})
    return drawn
