"""Sparse dictionaries: one small module an architecture, the kernels they share, and the saved, folded result."""

from sae_core.dictionary.folded import Dictionary, DictionaryError
from sae_core.dictionary.sparse import SparseActs

__all__ = ["Dictionary", "DictionaryError", "SparseActs"]
