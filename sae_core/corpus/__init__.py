"""Text of any origin as documents and as blocks of tokens, each traceable to the other."""

from sae_core.corpus.build import build_corpus
from sae_core.corpus.documents import CorpusError, Document
from sae_core.corpus.packing import PADDING, Blocks
from sae_core.corpus.reader import Corpus

__all__ = ["PADDING", "Blocks", "Corpus", "CorpusError", "Document", "build_corpus"]
