"""Searches with trained models: encoders, indexes, and the two stages. The function is `search.search`."""

from typing import TYPE_CHECKING

from ..lazy import lazily

if TYPE_CHECKING:
    from .command import SearchResult, make_index, run_search
    from .encoders import DualEncoder, Photos, TransformersDualEncoder, UnicoderVLDualEncoder, open_dual_encoder
    from .index import SearchIndex, build_index
    from .two_stage import Hit, SimilarityWeight, rerank, search

__getattr__, __dir__ = lazily(
    __name__,
    {
        "command": ["SearchResult", "make_index", "run_search"],
        "encoders": ["DualEncoder", "Photos", "TransformersDualEncoder", "UnicoderVLDualEncoder", "open_dual_encoder"],
        "index": ["SearchIndex", "build_index"],
        "two_stage": ["Hit", "SimilarityWeight", "rerank", "search"],
    },
)

__all__ = [
    "DualEncoder",
    "Hit",
    "Photos",
    "SearchIndex",
    "SearchResult",
    "SimilarityWeight",
    "TransformersDualEncoder",
    "UnicoderVLDualEncoder",
    "build_index",
    "make_index",
    "open_dual_encoder",
    "rerank",
    "run_search",
    "search",
]
