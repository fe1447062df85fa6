"""Two sites read together: the activations of the same tokens, side by side."""

import torch

from sae_core.activations.shards import ActivationError, Activations, Shard, Statistics


class Pair(Activations):
    """Activations of two sites of a model over one corpus; a row is [2, d_model]: what is read, and what is written.

    A token counts as a sink when it is one at either site. Statistics hold a row for each site.
    """

    def __init__(self, read: Activations, written: Activations) -> None:
        """Raises ActivationError when the sites' rows are not of the same tokens."""
        self._sites = read, written
        super().__init__(
            read.folder, read.paths, lambda n: torch.stack([site.acts(n) for site in self._sites], dim=1), read.device
        )
        self._kept = [int((~shard.is_sink).sum()) for shard in self.shards()]
        self.n_kept = sum(self._kept)

    def statistics(self) -> Statistics:
        """As `Activations.statistics`, of each site."""
        mean, square = zip(*(site.statistics() for site in self._sites), strict=True)
        return Statistics(torch.stack(mean), torch.cat(square))

    def _shard(self, number: int) -> Shard:
        read, written = (site.places(number) for site in self._sites)
        if not all(torch.equal(read[name], written[name]) for name in ("block", "offset", "token")):
            sites = " and ".join(str(site.folder) for site in self._sites)
            raise ActivationError(
                f"{sites} hold other tokens: read both sites over one corpus, with the same seed and shard_tokens"
            )
        return Shard(acts=self.acts(number), **read | {"is_sink": read["is_sink"] | written["is_sink"]})
