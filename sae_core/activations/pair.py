"""Two sites read together: the activations of the same tokens, side by side."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.activations.encoding import EVERY, ActivationError, Rows
from sae_core.activations.shards import Activations, Split, Statistics


class Pair(Activations):
    """Activations of two sites of a model over one corpus; a row is [2, d_model]: what is read, and what is written.

    A token counts as a sink when it is one at either site. Statistics hold a row for each site.
    """

    def __init__(self, read: Activations, written: Activations) -> None:
        """Raises ActivationError when the sites' rows are not of the same tokens."""
        self._sites = read, written
        super().__init__(read.folder, read.paths, self._both, read.device, self._both_ahead)
        self._kept = [int((~self.places(number)["is_sink"]).sum()) for number in range(len(self.paths))]
        self.n_kept = sum(self._kept)

    def statistics(self) -> Statistics:
        """As `Activations.statistics`, of each site."""
        mean, square = zip(*(site.statistics() for site in self._sites), strict=True)
        return Statistics(torch.stack(mean), torch.cat(square))

    def _both(self, number: int, rows: Rows = EVERY, /) -> Float[Tensor, "tokens 2 d_model"]:
        return torch.stack([site.acts(number, rows) for site in self._sites], dim=1)

    def _both_ahead(self, number: int) -> None:
        for site in self._sites:
            site.ahead(number)

    def places(self, number: int) -> dict[str, Tensor]:
        """As `Activations.places`, of both sites."""
        read, written = (site.places(number) for site in self._sites)
        if not all(torch.equal(read[name], written[name]) for name in ("block", "offset", "token")):
            sites = " and ".join(str(site.folder) for site in self._sites)
            raise ActivationError(
                f"{sites} hold other tokens: read both sites over one corpus, with the same seed and shard_tokens"
            )
        return read | {"is_sink": read["is_sink"] | written["is_sink"]}


def open_sites(read: Path, written: Path | None = None, split: Split = "train", device: str = "cpu") -> Activations:
    """The activations in a folder, or with those of what is written, in another, the pairs of both.

    Raises ActivationError as `Activations.open` and `Pair`.
    """
    first = Activations.open(read, split, device)
    return first if written is None else Pair(first, Activations.open(written, split, device))
