"""Text to tokens to batches: corpora, tokenizers, token shards and loaders. Knows nothing of models.

The way of a batch: `open_corpus` (text) -> `make_tokenizer` (ids) -> `token_shards` (ids on disk) -> `TokenLoader`,
`EvalWindows` or `document_batches` (tensors). A name below is imported when it is first used, so that `import fusedgpt.data` costs nothing and
text can be had without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .corpus import Corpus as Corpus
    from .corpus import open_corpus as open_corpus
    from .documents import document_batches as document_batches
    from .documents import encode_document as encode_document
    from .loader import TokenLoader as TokenLoader
    from .shards import TokenShards as TokenShards
    from .shards import token_shards as token_shards
    from .shards import tokenize as tokenize
    from .tokenizers import Tokenizer as Tokenizer
    from .tokenizers import load_tokenizer as load_tokenizer
    from .tokenizers import make_tokenizer as make_tokenizer
    from .windows import EvalWindows as EvalWindows
    from .windows import WindowDataset as WindowDataset

_PUBLIC = {
    "corpus": ("Corpus", "open_corpus"),
    "documents": ("document_batches", "encode_document"),
    "loader": ("TokenLoader",),
    "shards": ("TokenShards", "token_shards", "tokenize"),
    "tokenizers": ("Tokenizer", "load_tokenizer", "make_tokenizer"),
    "windows": ("EvalWindows", "WindowDataset"),
}


def __getattr__(name: str) -> Any:
    for module, names in _PUBLIC.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
