from .command import SearchResult as SearchResult, make_index as make_index, run_search as run_search
from .encoders import (
    DualEncoder as DualEncoder,
    Photos as Photos,
    TransformersDualEncoder as TransformersDualEncoder,
    UnicoderVLDualEncoder as UnicoderVLDualEncoder,
    open_dual_encoder as open_dual_encoder,
)
from .explaining import explain_on_photo as explain_on_photo
from .index import SearchIndex as SearchIndex, build_index as build_index, remove_items as remove_items
from .lance import LanceIndex as LanceIndex, UnicoderVLReranker as UnicoderVLReranker
from .two_stage import (
    Hit as Hit,
    SimilarityWeight as SimilarityWeight,
    rerank as rerank,
    search as search,
    search_similar as search_similar,
)
