"""Activations: `harvest` runs a model over a corpus and stores them in shards, `Activations` reads them.

A shard holds the activations of blocks from all over the corpus (a seeded permutation deals the blocks out), its rows
shuffled, each with the block, the offset in it and the token it belongs to. So training reads a few shards at a time
and still sees mixed text, and every activation is traced back to its place.
"""

from sae_core.activations.encoding import ActivationError
from sae_core.activations.harvest import harvest
from sae_core.activations.pair import Pair
from sae_core.activations.shards import Activations, Shard, Statistics

__all__ = ["ActivationError", "Activations", "Pair", "Shard", "Statistics", "harvest"]
