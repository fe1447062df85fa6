"""The same text under many kinds of steering, from the layer that is steered on: what comes before is read once."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.steering import Steering
from sae_core.steering_texts import Subject


class Passage(NamedTuple):
    """Tokens, and how many of the last predictions are looked at."""

    ids: Sequence[int]
    looked_at: int


class Replay:
    """Passages that the model has read as it is.

    Attributes:
        before: for each passage, the logits at what is looked at.
    """

    before: list[Float[Tensor, "looked_at vocab"]]

    def __init__(self, subject: Subject, passages: Sequence[Passage]) -> None:
        self._subject, self._passages = subject, passages
        lm, layer = subject.lm, subject.site.layer
        self._ids = [torch.tensor([list(passage.ids)], device=lm.device) for passage in passages]
        self._inputs = [lm.capture("resid_pre", layer, ids) for ids in self._ids]
        whole = zip(self._ids, passages, strict=True)
        self.before = [lm.logits(ids)[0, -passage.looked_at :].float() for ids, passage in whole]
        self._resumes = True
        alike = (torch.allclose(self.logits(n, 1)[0], b, rtol=1e-2, atol=1e-2) for n, b in enumerate(self.before))
        self._resumes = all(alike)

    @torch.no_grad()
    def logits(self, number: int, rows: int, steering: Steering | None = None) -> Float[Tensor, "rows looked_at vocab"]:
        """Logits of a passage, in as many rows; the layers before the site run only where they must."""
        lm, ids, looked_at = self._subject.lm, self._ids[number].expand(rows, -1), self._passages[number].looked_at
        with ExitStack() as stack:
            if self._resumes:
                acts = self._inputs[number].expand(rows, -1, -1)
                stack.enter_context(lm.resumed(self._subject.site.layer, acts))
            if steering is not None:
                stack.enter_context(steering.applied(lm))
            return lm.last_logits(ids, looked_at)
