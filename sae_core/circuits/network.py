"""A model with dictionaries at several of its sites, run with anything put in the place of what they hold.

At each place, x = decode(f(x)) + error. A run may keep a part as it comes, or put another in its place, before the
model goes on; what comes after is computed from that. Attention sinks, on which no dictionary is trained, always stay.

Prompts of equal length run together, so that there is no padding; the memory of a batch is bounded by `BATCH_ACTS`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from sae_core.artifacts import ArtifactStore
from sae_core.atlas import sink_norm
from sae_core.dictionary import Dictionary
from sae_core.errors import MindAtlasError
from sae_core.language_model import LanguageModel
from sae_core.names import REACHED, Hook
from sae_core.study import Study

BATCH_ACTS = 2**24
"""Dense feature activations of one place that are held at once: prompts of a batch, times their length, times d_sae."""

Row = tuple[list[int], list[int] | None, int, int]
"""A prompt: its tokens, those of its contrast, the token that should follow, and one that should not."""
Visit = Callable[[int, Tensor, Tensor], Tensor]
"""Takes the number of a place, what is read there and what is there, [batch, length, d_model], float32, and returns
what shall be there."""


class CircuitError(MindAtlasError):
    """A circuit that cannot be found; the message says what is missing and the cure."""


class Coordinates:
    """What stands in for a dictionary where neurons are the features: each coordinate of x is one, and nothing is lost.

    Attributes: as those of `Dictionary`.
    """

    def __init__(self, d_model: int, device: torch.device) -> None:
        self.d_sae = d_model
        self.W_enc = self.W_dec = torch.eye(d_model, device=device)
        self.b_enc = torch.zeros(d_model, device=device)

    def encode(self, x: Float32[Tensor, "batch d_model"]) -> Float32[Tensor, "batch d_model"]:
        """x itself."""
        return x

    def decode(self, acts: Float32[Tensor, "batch d_model"]) -> Float32[Tensor, "batch d_model"]:
        """The same."""
        return acts


@dataclass(frozen=True)
class Place:
    """Where a dictionary is."""

    name: str
    """The dictionary's."""
    reads: tuple[Hook, int]
    dictionary: Dictionary | Coordinates
    sink_norm: float
    """Tokens of a larger norm, where it reads, are attention sinks."""
    writes: tuple[Hook, int] | None = None
    """Where its features act, when that is not where it reads (a transcoder)."""

    @property
    def acts_at(self) -> tuple[Hook, int]:
        """Kind and layer of the site where its features act."""
        return self.writes or self.reads

    @property
    def order(self) -> tuple[int, int]:
        """When a forward pass comes by the site where its features act."""
        hook, layer = self.acts_at
        return layer, REACHED.index(hook)

    def encode(self, x: Float32[Tensor, "*batch d_model"]) -> Float32[Tensor, "*batch d_sae"]:
        """Feature activations, dense."""
        return self.dictionary.encode(x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    def decode(self, acts: Float32[Tensor, "*batch d_sae"]) -> Float32[Tensor, "*batch d_model"]:
        """What they add up to."""
        return self.dictionary.decode(acts.flatten(0, -2)).unflatten(0, acts.shape[:-1])

    def split(
        self, read: Float32[Tensor, "*batch d_model"], x: Float32[Tensor, "*batch d_model"]
    ) -> tuple[Float32[Tensor, "*batch d_sae"], Float32[Tensor, "*batch d_model"]]:
        """Features of what is read, and what they miss of what is there."""
        acts = self.encode(read)
        return acts, x - self.decode(acts)


def places_of(
    store: ArtifactStore, study: Study, device: torch.device, last_layer: int | None = None
) -> list[Place]:  # fmt: skip
    """The first dictionary of each of a study's sites, up to a layer, where it is.

    Raises ArtifactError when one is not made.
    """
    found = []
    for one, settings in study.first_trainings:
        if last_layer is not None and one.site.layer > last_layer:
            continue
        slug = one.spec(settings).slug
        dictionary = Dictionary.load(store.get("dictionary", slug).folder, device)
        bound, read = sink_norm(store.get("activations", one.site.slug)), (one.site.hook, one.site.layer)
        found.append(Place(slug, read, dictionary, bound, dictionary.writes))
    return found


class Batch(NamedTuple):
    """Prompts of one length."""

    ids: Int64[Tensor, "batch length"]
    contrast: Int64[Tensor, "batch length"] | None
    """What each is held against, token by token."""
    target: Int64[Tensor, " batch"]
    against: Int64[Tensor, " batch"]

    @property
    def other_side(self) -> "Batch":
        """The contrasts as prompts; asked for the same tokens."""
        assert self.contrast is not None, "there is none"
        return Batch(self.contrast, self.ids, self.target, self.against)


class Seen(NamedTuple):
    """What a run found at one place."""

    x: Float32[Tensor, "batch length d_model"]
    acts: Float32[Tensor, "batch length d_sae"]
    """0 on sinks."""
    error: Float32[Tensor, "batch length d_model"]
    """0 on sinks."""
    is_sink: Bool[Tensor, "batch length"]


class Network:
    """A model with dictionaries at places, in the order in which a forward pass comes by."""

    def __init__(self, lm: LanguageModel, places: Sequence[Place]) -> None:
        self.lm = lm
        self.places = sorted(places, key=lambda place: place.order)

    def with_places(self, places: Sequence[Place]) -> "Network":
        """The same model and behavior with other dictionaries."""
        return Network(self.lm, places)

    def value(self, batch: Batch, visit: Visit | None = None) -> Float32[Tensor, " batch"]:
        """What is explained: the logit of the target less that of the other token, after the last one.

        Differentiable in what `visit` puts in.
        """
        with self.visited(visit):
            logits = self.lm.last_logits(batch.ids)[:, -1]
        return (logits.gather(1, batch.target[:, None]) - logits.gather(1, batch.against[:, None])).squeeze(1)

    def visited(self, visit: Visit | None) -> ExitStack:
        """Inside the `with`, forward passes go through `visit` at every place."""
        stack = ExitStack()
        if visit is not None:
            for number, place in enumerate(self.places):
                stack.enter_context(self.lm.edit_from(place.reads, place.acts_at, partial(_in_its_type, visit, number)))
        return stack

    @torch.no_grad()
    def seen(self, batch: Batch) -> list[Seen]:
        """What the model as it is has at every place."""
        found: list[Seen] = []

        def look(number: int, read: Tensor, x: Tensor) -> Tensor:
            place = self.places[number]
            acts, error = place.split(read, x)
            is_sink = read.norm(dim=-1) > place.sink_norm
            kept = ~is_sink[..., None]
            found.append(Seen(x.clone(), acts * kept, error * kept, is_sink))
            return x

        self.value(batch, look)
        return found

    def batches(self, prompts: Sequence[Row]) -> Iterator[Batch]:
        """Prompts of equal length together, the shortest first."""
        widest = max((place.dictionary.d_sae for place in self.places), default=self.lm.d_model)
        for length, same in groupby(sorted(prompts, key=lambda prompt: len(prompt[0])), lambda p: len(p[0])):
            rows, most = list(same), max(1, BATCH_ACTS // (length * widest))
            for at in range(0, len(rows), most):
                ids, contrasts, target, against = zip(*rows[at : at + most], strict=True)
                contrast = None if contrasts[0] is None else self._tensor(contrasts)
                yield Batch(self._tensor(ids), contrast, self._tensor(target), self._tensor(against))

    def _tensor(self, rows: Sequence[object]) -> Int64[Tensor, "*shape"]:
        return torch.tensor(rows, device=self.lm.device)


def _in_its_type(visit: Visit, number: int, read: Tensor, x: Tensor) -> Tensor:
    """A copy: the model may go on to add to it in place."""
    return visit(number, read.float(), x.float()).to(x.dtype, copy=True)
