"""
LanceDB as the first stage of a search: an index in a table of it, and a reranker by our scores. Extra: `[lancedb]`.
"""

import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa

from ..extras import optional_import
from ..scoring.scorer import ImageTextScorer
from .encoders import DualEncoder
from .index import SearchIndex
from .two_stage import SimilarityWeight

if TYPE_CHECKING:
    from lancedb.rerankers import Reranker
else:
    Reranker = optional_import("lancedb.rerankers", "lancedb").Reranker

FACTS = b"unicoder_vl_index"  # in the metadata of a table's schema
COLUMNS = {"images": "image_id", "captions": "caption"}
VECTOR = "vector"


class LanceIndex(SearchIndex):
    """
    An index in a table of LanceDB, with columns `image_id` (or `caption`) and `vector`. [`search`] takes it as it takes
    any index; `table` is LanceDB's own, whose approximate structures must be made with `metric="cosine"`.

    Args:
        path (`str` or `os.PathLike`): The folder of the database.
        table (`str`, *optional*, defaults to `"images"`): The name of the table.

    Raises:
        `ValueError`: there is no such database or table, or [`LanceIndex.write`] did not make it.
    """

    def __init__(self, path: str | PathLike[str], table: str = "images"):
        self.path = Path(path)
        if not self.path.is_dir():  # LanceDB would make it
            raise ValueError(f"{path} is no folder of a LanceDB. Make one with `LanceIndex.write`.")
        self.table: Any = optional_import("lancedb", "lancedb").connect(self.path).open_table(table)
        facts = (self.table.schema.metadata or {}).get(FACTS)
        if facts is None:
            raise ValueError(
                f"The table {table!r} of {path} does not tell the encoder of its vectors: `LanceIndex.write` makes "
                "one that does; UnicoderVLReranker takes any."
            )
        self.facts = json.loads(facts)
        self.items = self.facts["items"]
        self.names: list[str] = []  # of those that were found so far
        self._places: dict[str, int] = {}

    @classmethod
    def write(cls, index: SearchIndex, path: str | PathLike[str], table: str = "images") -> Self:
        """
        Writes an index into a new table, or anew into its own, which stays until the new one is complete.

        Raises:
            `ValueError`: the table has columns that are not the index's, and would be lost.
        """
        database = optional_import("lancedb", "lancedb").connect(path)
        metadata = {FACTS: json.dumps(index.facts | {"faiss": None}).encode()}
        vector = pa.list_(pa.float32(), index.facts["dim"])
        schema = pa.schema([(COLUMNS[index.items], pa.string()), (VECTOR, vector)], metadata)
        if (
            table in database.list_tables().tables
            and (known := database.open_table(table).schema).names != schema.names
        ):
            raise ValueError(
                f"The table {table!r} of {path} has the columns {known.names}, and {schema.names} would be written: "
                "name another table."
            )
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(index.embeddings)), type=vector)
        rows = pa.Table.from_arrays([pa.array(index.names, pa.string()), vectors], schema=schema)
        database.create_table(table, rows, mode="overwrite")
        return cls(path, table)

    def __len__(self) -> int:
        return self.table.count_rows()

    def search(self, queries: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Finds the items nearest to each query, see [`SearchIndex.search`]; equally near ones in any order."""
        if top_k < 1:
            raise ValueError(f"top_k={top_k}; expected at least 1.")
        shape = len(queries), min(top_k, len(self))
        positions, similarities = np.full(shape, -1), np.full(shape, -np.inf, dtype=np.float32)
        for row, query in enumerate(np.asarray(queries, dtype=np.float32)):
            found = self.table.search(query).distance_type("cosine").limit(top_k).to_arrow()
            names = found[COLUMNS[self.items]].to_pylist()
            positions[row, : len(names)] = [self._places.setdefault(name, len(self._places)) for name in names]
            similarities[row, : len(names)] = 1 - found["_distance"].to_numpy()
        self.names = list(self._places)
        return positions, similarities


class UnicoderVLReranker(Reranker):
    """
    A reranker of LanceDB, for what a sentence finds in a table of images by vectors, full text or both: ordered by
    score + weight x similarity, as [`search`] orders, in the column `_relevance_score`.

    Args:
        scorer ([`ImageTextScorer`]): Scores the sentence with the images found.
        encoder ([`DualEncoder`], *optional*): The encoder of the table's vectors, which gives the similarity. Without
            it images are ordered by the score alone.
        similarity_weight (`float`, *optional*): The weight of the similarity; see [`SimilarityWeight.of`].
        column (`str`, *optional*, defaults to `"image_id"`): The column of image ids, or files, that the scorer takes.
        return_score (`str`, *optional*, defaults to `"relevance"`): `"all"` keeps LanceDB's own scores, too.

    Raises:
        `ValueError`: the weight is below 0, or not 0 without an encoder; what is found lacks a column.

    Example:

    ```python
    >>> table.search(encoder.embed_captions(["two dogs"])[0]).rerank(UnicoderVLReranker(scorer, encoder), "two dogs")
    ```
    """

    def __init__(
        self,
        scorer: ImageTextScorer,
        encoder: DualEncoder | None = None,
        *,
        similarity_weight: float | None = None,
        column: str = "image_id",
        return_score: str = "relevance",
    ):
        super().__init__(return_score)
        self.scorer, self.encoder, self.column = scorer, encoder, column
        self.weight = SimilarityWeight.of(similarity_weight, encoder, scorer)
        if self.weight.value and encoder is None:
            raise ValueError(
                f"similarity_weight={similarity_weight}, and there is no encoder of a similarity: give it."
            )

    def rerank_vector(self, query: str, vector_results: pa.Table) -> pa.Table:
        """Orders what vectors found."""
        return self._ordered(query, vector_results)

    def rerank_fts(self, query: str, fts_results: pa.Table) -> pa.Table:
        """Orders what full text found."""
        return self._ordered(query, fts_results)

    def rerank_hybrid(self, query: str, vector_results: pa.Table, fts_results: pa.Table) -> pa.Table:
        """Orders what vectors and full text found."""
        merge = self._merge_and_keep_scores if self.score == "all" else self.merge_results
        return self._ordered(query, merge(vector_results, fts_results))

    def _ordered(self, query: str, found: pa.Table) -> pa.Table:
        needed = [self.column, VECTOR][: 2 if self.weight.value else 1]
        if missing := [name for name in needed if name not in found.column_names]:
            raise ValueError(f"What was found has no column {missing}, but {found.column_names}: select it, too.")
        scores = np.zeros(0, dtype=np.float32)
        if len(found):
            scores = self.scorer.score([query], found[self.column].to_pylist())[0]
            if self.encoder is not None and self.weight.value:
                vectors = np.stack(found[VECTOR].to_numpy())
                scores = scores + self.weight.value * (vectors @ self.encoder.embed_captions([query])[0])
        scored = found.append_column("_relevance_score", pa.array(scores, pa.float32()))
        return self._keep_relevance_score(scored).sort_by([("_relevance_score", "descending")])
