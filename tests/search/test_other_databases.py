"""
Vector databases by the real libraries: LanceDB's tables find what our index finds, its reranker orders as our search
does, and what docs/retrieval.md says of both and of Qdrant runs.
"""

import numpy as np
import pytest
import test_docs
import test_search
import tiny
from places import ROOT
from scoring_process import CAPTIONS, IMAGES
from test_search import parts

from unicoder_vl_hf import UnicoderVLForImageTextRetrieval
from unicoder_vl_hf.search import SearchIndex, build_index, search

WEIGHT = 3.0  # with which neither score nor similarity orders alone
folder = test_search.folder
indices = test_search.indices


def needs_lancedb():
    return pytest.importorskip("lancedb", reason="LanceDB is not installed: pip install '.[lancedb]'")


@pytest.fixture
def lance(indices, tmp_path):
    needs_lancedb()
    from unicoder_vl_hf.search import LanceIndex

    return LanceIndex.write(indices["images"], tmp_path / "lance")


def test_a_table_finds_what_the_index_finds(folder, indices, lance):
    from unicoder_vl_hf.search import LanceIndex

    encoder, scorer, _ = parts(folder)
    captions = LanceIndex.write(indices["captions"], lance.path, "captions")
    again = LanceIndex(lance.path)
    assert (len(again), len(captions)) == (len(IMAGES), len(indices["captions"]))
    assert repr(again).startswith(f"LanceIndex('{lance.path}', images=7, dim=6, encoder='{folder}/model'")
    for ours, theirs, queries in ((indices["images"], again, CAPTIONS), (indices["captions"], captions, IMAGES)):
        for options in ({"candidates": 3, "top_k": 2}, {"similarity_weight": WEIGHT}):
            expected, found = (search(queries, index, encoder, scorer, **options) for index in (ours, theirs))
            for hits, of_ours in zip(found, expected, strict=True):
                assert [hit.name for hit in hits] == [hit.name for hit in of_ours]
                for field in ("score", "similarity", "matching_score"):
                    wanted = [getattr(hit, field) for hit in of_ours]
                    np.testing.assert_allclose([getattr(hit, field) for hit in hits], wanted, atol=1e-5)
    positions, similarities = again.search(encoder.embed_captions(CAPTIONS[:1]), 99)
    assert positions.shape == similarities.shape == (1, 7)
    with pytest.raises(ValueError, match="top_k=0"):
        again.search(encoder.embed_captions(CAPTIONS[:1]), 0)
    with pytest.raises(ValueError, match=r"lance was made by the checkpoint .*, but given is"):
        search(CAPTIONS, again, test_search.other_checkpoint(folder), scorer)


def test_a_table_is_brought_up_to_date_and_a_strangers_is_kept(folder, indices, lance, tmp_path):
    from unicoder_vl_hf.search import LanceIndex

    encoder, scorer, store = parts(folder)
    two = build_index(encoder, store, tmp_path / "two", image_ids=IMAGES[:2])
    assert len(LanceIndex.write(two, lance.path)) == 2
    (hits,) = search(CAPTIONS[:1], LanceIndex(lance.path), encoder, scorer)
    assert {hit.name for hit in hits} == set(IMAGES[:2])
    assert len(LanceIndex.write(indices["images"], lance.path)) == 7
    lance.table.checkout_latest()
    lance.table.add_columns({"licence": "'CC0'"})
    with pytest.raises(ValueError, match=r"'images' of .* has the columns .*'licence'.* name another table"):
        LanceIndex.write(two, lance.path)
    assert len(LanceIndex(lance.path)) == 7
    database = needs_lancedb().connect(lance.path)
    database.create_table("other", [{"image_id": "x", "vector": [1.0, 0.0]}])
    with pytest.raises(ValueError, match=r"'other' of .* does not tell the encoder of its vectors"):
        LanceIndex(lance.path, "other")
    with pytest.raises(ValueError, match="'none' was not found"):
        LanceIndex(lance.path, "none")
    with pytest.raises(ValueError, match=r"nowhere is no folder of a LanceDB"):
        LanceIndex(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_its_reranker_orders_as_a_search(folder, indices, lance, weight):
    """By vectors, by full text and by both; with a filter; the weight is that of a search."""
    from unicoder_vl_hf.search import UnicoderVLReranker

    encoder, scorer, _ = parts(folder)
    options = {} if weight is None else {"similarity_weight": weight}
    (expected,) = search(CAPTIONS[:1], indices["images"], encoder, scorer, **options)
    scores = {hit.name: hit.score for hit in expected}
    reranker, vector = UnicoderVLReranker(scorer, encoder, **options), encoder.embed_captions(CAPTIONS[:1])[0]

    def check(found, names):
        assert found["image_id"].to_pylist() == [name for name in scores if name in names]
        of_found = [scores[name] for name in found["image_id"].to_pylist()]
        np.testing.assert_allclose(found["_relevance_score"].to_numpy(), of_found, atol=1e-5)

    by_vector = lance.table.search(vector).limit(7)
    check(by_vector.rerank(reranker, query_string=CAPTIONS[0]).to_arrow(), IMAGES)
    some = lance.table.search(vector).where("image_id < 'image 3'", prefilter=True)
    check(some.rerank(reranker, query_string=CAPTIONS[0]).to_arrow(), IMAGES[:3])
    none = lance.table.search(vector).where("image_id = 'none'", prefilter=True)
    assert len(none.rerank(reranker, query_string=CAPTIONS[0]).to_arrow()) == 0
    lance.table.add_columns(
        {"text": "concat(image_id, ' of ', case when image_id < 'image 2' then 'dog' else 'x' end)"}
    )
    lance.table.create_index("text", config=needs_lancedb().index.FTS())
    check(reranker.rerank_fts(CAPTIONS[0], lance.table.search("dog", query_type="fts").to_arrow()), IMAGES[:2])
    for score, columns in (("relevance", set()), ("all", {"_distance", "_score"})):
        both = lance.table.search(query_type="hybrid").vector(vector).text("dog").limit(3)
        found = both.rerank(UnicoderVLReranker(scorer, encoder, return_score=score, **options)).to_arrow()
        assert columns == {"_distance", "_score"} & set(found.column_names) and len(found) >= 3
        names = found["image_id"].to_pylist()
        dog = scorer.score(["dog"], names)[0]
        if weight is not None:
            dog = (
                dog
                + weight
                * indices["images"].embeddings[[IMAGES.index(name) for name in names]]
                @ (encoder.embed_captions(["dog"])[0])
            )
        np.testing.assert_allclose(found["_relevance_score"].to_numpy(), dog, atol=1e-5)
        assert (np.diff(dog) <= 1e-6).all()


def test_what_a_reranker_lacks(folder, lance):
    from unicoder_vl_hf.search import UnicoderVLReranker

    encoder, scorer, _ = parts(folder)
    with pytest.raises(ValueError, match=r"similarity_weight=3\.0, and there is no encoder"):
        UnicoderVLReranker(scorer, similarity_weight=3.0)
    found = lance.table.search(encoder.embed_captions(CAPTIONS[:1])[0]).select(["image_id", "_distance"]).to_arrow()
    assert len(UnicoderVLReranker(scorer, encoder).rerank_vector(CAPTIONS[0], found)) == 7
    with pytest.raises(ValueError, match=r"has no column \['vector'\]"):
        UnicoderVLReranker(scorer, encoder, similarity_weight=1.0).rerank_vector(CAPTIONS[0], found)
    with pytest.raises(ValueError, match=r"has no column \['file'\]"):
        UnicoderVLReranker(scorer, column="file").rerank_vector(CAPTIONS[0], found)


@pytest.mark.parametrize(
    ("library", "told", "result"), [("lancedb", "LanceIndex", "rows"), ("qdrant_client", "QdrantClient", "best")]
)
def test_what_the_page_says(folder, tmp_path, monkeypatch, library, told, result):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install '.[dev]'")
    (code,) = [code for code in test_docs.blocks(ROOT / "docs" / "retrieval.md", "python") if told in code]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    fields = {"projection_dim": 6, "first_stage_trained": True, "similarity_weight": WEIGHT}
    tiny.model(UnicoderVLForImageTextRetrieval, **fields).save_pretrained("runs/search")
    tiny.processor().save_pretrained("runs/search")
    (tmp_path / "regions").symlink_to(folder / "store")
    encoder, scorer, store = parts(tmp_path / "runs", "search", tmp_path / "regions")
    build_index(encoder, store, "images.index")
    names = {}
    exec(code, names)
    (expected,) = search(["two dogs in the snow"], SearchIndex("images.index"), encoder, scorer)
    found = [row if isinstance(row, str) else row["image_id"] for row in names[result]]
    assert found == [hit.name for hit in expected] and len(found) == 7
