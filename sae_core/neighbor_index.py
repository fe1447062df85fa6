"""`NeighborIndex`: the finished index of decoder rows, asked. Light: FAISS and numpy, no torch."""

from pathlib import Path

import faiss
import numpy as np
from jaxtyping import Float32, Int64

from sae_core.errors import MindAtlasError

INDEX = "decoder.faiss"


class NeighborError(MindAtlasError):
    """Nearest features that cannot be looked up."""


class NeighborIndex:
    """The unit decoder rows of a dictionary, searched by cosine. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        """Raises NeighborError when `folder` holds no index."""
        path = folder / INDEX
        if not path.is_file():
            raise NeighborError(f"{path} is missing: make the neighbors again with `mind-atlas run`")
        self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)  # rows stay in the file until they are asked

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def rows(self, features: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, "n d_model"]:
        """Unit decoder rows of features."""
        return self._index.reconstruct_batch(features)

    def near(self, feature: int, count: int) -> tuple[Float32[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Cosines and numbers of the `count` features nearest to one, itself left out; fewer when there are fewer.

        Raises NeighborError when there is no such feature.
        """
        if not 0 <= feature < len(self):
            raise NeighborError(f"there is no feature {feature}: this dictionary has features 0 to {len(self) - 1}")
        cosines, found = self._index.search(self.rows(np.array([feature])), min(count + 1, len(self)))
        others = (found[0] != feature) & (found[0] >= 0)  # a graph may find fewer than asked
        return cosines[0][others][:count].clip(-1, 1), found[0][others][:count]
