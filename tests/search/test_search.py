"""Indices and the search in two stages: against brute force, in both directions, and what is refused."""

import dataclasses
import json
import re
import shutil
import string
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import photo_world
import places
import pytest
import tiny
import torch
from PIL import Image
from scoring_process import CAPTIONS, IMAGES, STORE
from test_pictures import Page
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from unicoder_vl_hf import ImageTextScorer, RegionStore, RegionStoreWriter, UnicoderVLForImageTextRetrieval, cli
from unicoder_vl_hf.regions import remove_images
from unicoder_vl_hf.scoring import scorer as scorer_module
from unicoder_vl_hf.search import index as index_module
from unicoder_vl_hf.search.command import SearchResult, make_index, run_search
from unicoder_vl_hf.search.encoders import (
    Photos,
    TransformersDualEncoder,
    UnicoderVLDualEncoder,
    UntrainedFirstStage,
    open_transformers_encoder,
)
from unicoder_vl_hf.search.index import SearchIndex, build_index, nearest, remove_items
from unicoder_vl_hf.search.two_stage import Hit, SimilarityWeight, search, search_similar
from unicoder_vl_hf.tasks.retrieval import metrics as metrics_module, two_stage_report as report_module
from unicoder_vl_hf.tasks.retrieval.metrics import retrieval_metrics
from unicoder_vl_hf.tasks.retrieval.protocols import RetrievalFold
from unicoder_vl_hf.tasks.retrieval.two_stage_report import (
    SIMILARITY_WEIGHTS,
    describe_weight,
    measure_similarity_weight,
    two_stage_report,
)

# Of 9 captions and 7 images: two of them have two captions.
IMAGE_OF_CAPTION = np.array([0, 1, 2, 3, 4, 5, 6, 1, 2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a first stage, one without, their store, and its photos."""
    path = tmp_path_factory.mktemp("index")
    write_store(path / "store", STORE.values())
    torch.manual_seed(1)
    config = tiny.config(projection_dim=6, first_stage_trained=True)
    UnicoderVLForImageTextRetrieval(config).save_pretrained(path / "model")
    tiny.processor().save_pretrained(path / "model")
    tiny.model(UnicoderVLForImageTextRetrieval).save_pretrained(path / "untrained")
    tiny.processor().save_pretrained(path / "untrained")
    (path / "photos").mkdir()
    for number, image_id in enumerate(IMAGES):
        pixels = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        photo = Image.fromarray(pixels).resize((640, 480), Image.Resampling.NEAREST)
        photo.save(path / "photos" / f"{image_id}.png")
    pairs = zip(CAPTIONS, IMAGE_OF_CAPTION, strict=True)
    rows = [{"image_id": IMAGES[image], "caption": text} for text, image in pairs]
    (path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def write_store(path, records):
    with RegionStoreWriter(path) as writer:
        for record in records:
            writer.write(record)


def parts(folder, checkpoint="model", store="store"):
    store, processor = RegionStore(folder / store), tiny.processor()
    model = UnicoderVLForImageTextRetrieval.from_pretrained(folder / checkpoint).eval()
    scorer = ImageTextScorer(model, processor, store, verbose=False)
    return UnicoderVLDualEncoder(model, processor, store, folder / checkpoint), scorer, store


@pytest.fixture(scope="module")
def indices(folder):
    encoder, _, store = parts(folder)
    return {
        "images": build_index(encoder, store, folder / "images"),
        "captions": build_index(encoder, store, folder / "captions", captions=CAPTIONS),
    }


# Exact search


def test_nearest_equals_sorting_everything(monkeypatch):
    rng = np.random.default_rng(0)
    queries, embeddings = (rng.integers(-2, 3, (count, 3)).astype(np.float32) for count in (7, 50))
    products = queries @ embeddings.T
    assert any(len(set(row)) < len(row) for row in products.tolist())  # ties, many of them
    expected = np.argsort(-products, axis=1, kind="stable")
    for budget in (1, 120, 1 << 20):
        monkeypatch.setattr(index_module, "MAX_SIMILARITIES", budget)
        for top_k in (1, 4, 50):
            positions, similarities = nearest(queries, embeddings, top_k)
            np.testing.assert_array_equal(positions, expected[:, :top_k])
            np.testing.assert_array_equal(similarities, np.take_along_axis(products, positions, axis=1))


def test_an_index_holds_what_the_model_encodes(folder, indices):
    encoder, _, store = parts(folder)
    assert indices["images"].names == list(store) and indices["captions"].names == list(dict.fromkeys(CAPTIONS))
    processor = tiny.processor()
    with torch.no_grad():
        for image_id, found in zip(indices["images"].names, indices["images"].embeddings, strict=True):
            expected = encoder.model.encode_image(**processor(regions=store[image_id], return_tensors="pt"))[0]
            np.testing.assert_allclose(found, expected, atol=1e-5)
        for caption, found in zip(indices["captions"].names, indices["captions"].embeddings, strict=True):
            expected = encoder.model.encode_text(**processor(text=[caption], return_tensors="pt"))[0]
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_search_takes_all_where_there_are_fewer(indices):
    queries = indices["images"].embeddings[:2]
    positions, similarities = indices["images"].search(queries, 99)
    assert positions.shape == (2, len(IMAGES)) and positions[:, 0].tolist() == [0, 1]
    np.testing.assert_allclose(similarities[:, 0], 1, atol=1e-6)
    with pytest.raises(ValueError, match=r"top_k=0; expected at least 1"):
        indices["images"].search(queries, 0)


def test_faiss_finds_the_same(folder, indices):
    pytest.importorskip("faiss")
    encoder, scorer, store = parts(folder)
    exact = indices["images"]
    for structure in ("Flat", "HNSW8"):
        index = build_index(encoder, store, folder / structure, faiss=structure)
        for found, expected in zip(index.search(exact.embeddings, 3), exact.search(exact.embeddings, 3), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)
        again = SearchIndex(folder / structure).search(exact.embeddings, 3)[0]
        np.testing.assert_array_equal(again, exact.search(exact.embeddings, 3)[0])
    found, expected = (search(CAPTIONS, of, encoder, scorer, top_k=3) for of in (index, exact))
    assert [[hit.name for hit in hits] for hits in found] == [[hit.name for hit in hits] for hits in expected]


def test_candidates_that_an_approximate_search_lacks_are_no_hits(folder, indices, monkeypatch):
    encoder, scorer, _ = parts(folder)
    positions, similarities = np.array([[2, -1, 0]]), np.array([[0.5, -np.inf, 0.1]], dtype=np.float32)
    monkeypatch.setattr(indices["images"], "search", lambda queries, top_k: (positions, similarities))
    (hits,) = search([CAPTIONS[0]], indices["images"], encoder, scorer, similarity_weight=10.0)
    assert {hit.name for hit in hits} == {IMAGES[2], IMAGES[0]}


def test_faiss_that_is_not_installed_names_the_extra(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    encoder, _, store = parts(folder)
    with pytest.raises(ImportError, match=r"'\.\[faiss\]'"):
        build_index(encoder, store, tmp_path / "index", faiss="Flat")


# The folder


def test_an_index_goes_on_after_a_kill(folder, indices, tmp_path, monkeypatch):
    encoder, _, store = parts(folder)
    monkeypatch.setattr(index_module, "BLOCK_ITEMS", 2)
    embedded, embed = [], encoder.embed_images

    def killed(image_ids):
        if len(embedded) == 3:
            raise KeyboardInterrupt
        embedded.extend([image_ids])
        return embed(image_ids)

    monkeypatch.setattr(encoder, "embed_images", killed)
    with pytest.raises(KeyboardInterrupt):
        build_index(encoder, store, tmp_path / "index")
    assert not (tmp_path / "index").exists()
    with pytest.raises(ValueError, match=r"holds scores of another job: encoder was.* --restart begins anew\."):
        build_index(other_checkpoint(folder), store, tmp_path / "index")
    monkeypatch.setattr(encoder, "embed_images", lambda image_ids: embedded.append(image_ids) or embed(image_ids))
    index = build_index(encoder, store, tmp_path / "index")
    assert embedded == [IMAGES[:2], IMAGES[2:4], IMAGES[4:6], IMAGES[6:]]
    np.testing.assert_allclose(index.embeddings, indices["images"].embeddings, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_other_captions_do_not_go_on_where_these_stopped(folder, tmp_path, monkeypatch):
    encoder, _, store = parts(folder)
    monkeypatch.setattr(index_module, "save_file", None)  # so that it stops after the embeddings
    with pytest.raises(TypeError):
        build_index(encoder, store, tmp_path / "index", captions=["a dog", "a cat"])
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"holds scores of another job: names_sha256 was"):
        build_index(encoder, store, tmp_path / "index", captions=["a dog", "the cat"])
    index = build_index(encoder, store, tmp_path / "index", captions=["a dog", "a cat"])
    np.testing.assert_allclose(index.embeddings, encoder.embed_captions(["a dog", "a cat"]), atol=1e-6)


def test_an_index_is_whole_or_not_there(folder, tmp_path, monkeypatch):
    encoder, _, store = parts(folder)
    write = index_module.write_json

    def full(path, value):
        if path.name == "index.json":
            raise OSError("no space left on device")
        write(path, value)

    monkeypatch.setattr(index_module, "write_json", full)
    with pytest.raises(OSError, match="no space"):
        build_index(encoder, store, tmp_path / "index")
    assert not (tmp_path / "index").exists()
    monkeypatch.undo()
    assert len(build_index(encoder, store, tmp_path / "index")) == len(IMAGES)


def test_a_complete_index_is_opened_again_and_none_other_overwritten(folder, indices, tmp_path, monkeypatch):
    encoder, _, store = parts(folder)
    monkeypatch.setattr(encoder, "embed_images", None)  # none is embedded again
    again = build_index(encoder, store, folder / "images")
    assert again.path == folder / "images" and np.array_equal(again.embeddings, indices["images"].embeddings)
    holds = "exists and holds something else: name another folder"
    for options in ({"image_ids": IMAGES[:2]}, {"captions": CAPTIONS}, {"captions": IMAGES}, {"faiss": "Flat"}):
        with pytest.raises(ValueError, match=f"images {holds}"):
            build_index(encoder, store, folder / "images", **options)
    with pytest.raises(ValueError, match=r"was made by the checkpoint .*, in another folder or by --restart\."):
        build_index(other_checkpoint(folder), store, folder / "images")
    write_store(tmp_path / "other", [tiny.record(image_id, 2) for image_id in IMAGES])
    with pytest.raises(ValueError, match=r"was made from the store"):
        build_index(encoder, RegionStore(tmp_path / "other"), folder / "images")
    with pytest.raises(ValueError, match=f"photos {holds}"):
        build_index(encoder, store, folder / "photos")
    assert len(list((folder / "photos").iterdir())) == len(IMAGES)


def test_an_index_finds_its_folders_from_elsewhere_and_names_the_option_where_they_are_gone(
    folder, tmp_path, monkeypatch, capsys
):
    for name in ("store", "model"):
        shutil.copytree(folder / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second finds it complete
        code, output = run(capsys, "index", "store", "--model", "model", "--output", "index")
        assert code == 0 and "index is complete: 7 images, 6 numbers each, by model." in output
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    words = ["search", CAPTIONS[0], "--index", tmp_path / "index"]
    assert run(capsys, *words)[0] == 0
    for name, option in (("model", "--model"), ("store", "--regions")):
        (tmp_path / name).rename("moved")
        code, error = run(capsys, *words)
        assert code == 1
        assert f"made with {tmp_path / name}, which is not there any more: say where it is, {option}.\n" in error
        assert run(capsys, *words, option, "moved")[0] == 0
        Path("moved").rename(tmp_path / name)


def test_a_name_of_the_hub_stays_a_name(folder, tmp_path):
    encoder, _, store = parts(folder)
    encoder.name = "owner/model"
    assert build_index(encoder, store, tmp_path / "index").facts["encoder"]["name"] == "owner/model"


def test_what_is_no_index_is_refused(folder, indices, tmp_path):
    with pytest.raises(ValueError, match=r"is no index: it has no index\.json"):
        SearchIndex(folder / "store")
    shutil.copytree(folder / "images", tmp_path / "broken")
    names = json.loads((tmp_path / "broken" / "names.json").read_text())
    (tmp_path / "broken" / "names.json").write_text(json.dumps(names[:-1]))
    with pytest.raises(ValueError, match=r"names 6 images and holds 7 embeddings, expected 7 of each"):
        SearchIndex(tmp_path / "broken")
    with pytest.raises(ValueError, match="no captions to index"):
        build_index(*parts(folder)[::2], tmp_path / "none", captions=[])


def other_checkpoint(folder):
    """Of the same configuration and another name, one weight of it different."""
    encoder, _, _ = parts(folder)
    with torch.no_grad():
        encoder.model.bert.encoder.layer[0].attention.self.query.bias[0] += 1e-3
    encoder.name = "elsewhere"
    return encoder


def test_another_checkpoint_or_store_is_refused_naming_both(folder, indices, tmp_path):
    encoder, scorer, store = parts(folder)
    index = indices["images"]
    index.check(encoder, store)
    moved = shutil.copytree(folder / "store", tmp_path / "moved")
    index.check(store=RegionStore(moved))  # the same store elsewhere
    encoder.name = "renamed"
    index.check(encoder)  # the same weights
    with pytest.raises(ValueError, match=rf"was made by the checkpoint {folder}/model \(.*but given is elsewhere \("):
        search([CAPTIONS[0]], index, other_checkpoint(folder), scorer)
    records = [tiny.record(image_id, 2) for image_id in IMAGES]
    write_store(tmp_path / "other", records)
    scorer.store = RegionStore(tmp_path / "other")
    assert index.outdated(scorer.store) is None  # it is another one
    with pytest.raises(ValueError, match=rf"from the store {folder}/store \(.*but given is {tmp_path}/other \("):
        search([CAPTIONS[0]], index, encoder, scorer)


def test_captions_that_repeat_are_taken_once_and_those_without_an_image_in_the_store_left_out(
    folder, tmp_path, capsys, caplog
):
    rows = [{"image_id": image_id, "caption": "a dog"} for image_id in IMAGES[:3]]
    rows.append({"image_id": "elsewhere", "caption": "grass"})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["index", folder / "store", "--model", folder / "model", "--output", tmp_path / "index"]
    assert run(capsys, *words, "--captions", tmp_path / "captions.jsonl")[0] == 0
    assert SearchIndex(tmp_path / "index").names == ["a dog"]
    assert f"{tmp_path}/captions.jsonl: 2 of 3 captions repeat an earlier one; each text is taken once." in caplog.text


def test_an_untrained_first_stage_is_refused_with_a_way_out(folder, tmp_path, capsys):
    with pytest.raises(UntrainedFirstStage, match=r"unicoder-vl train-first-stage .*untrained CAPTIONS"):
        parts(folder, "untrained")
    store, output = str(folder / "store"), str(tmp_path / "index")
    assert cli.main(["index", store, "--model", str(folder / "untrained"), "--output", output]) == 1
    error = capsys.readouterr().err
    assert "was not trained" in error
    assert "--exhaustive`: about 0 s for a caption with 7 images, float32 on cpu" in error
    assert not list(tmp_path.iterdir())


# Two stages


@pytest.mark.parametrize(("candidates", "weight"), [(1, 0.0), (3, 0.0), (99, 0.0), (99, 0.3)])
def test_two_stages_equal_brute_force(folder, indices, candidates, weight):
    encoder, scorer, _ = parts(folder)
    with torch.no_grad():
        similarities = encoder.embed_captions(CAPTIONS) @ encoder.embed_images(IMAGES).T
    scores = scorer.score(CAPTIONS, IMAGES) + weight * similarities
    # Of images for captions, then of captions for images, each text once.
    for queries, names, near, exact in (
        (CAPTIONS, IMAGES, similarities, scores),
        (IMAGES, CAPTIONS, similarities.T, scores.T),
    ):
        index = indices["images" if queries is CAPTIONS else "captions"]
        kept = [names.index(name) for name in index.names]
        options = {"candidates": candidates, "similarity_weight": weight}
        found = search(queries, index, encoder, scorer, top_k=2, **options)
        for hits, of_query, row in zip(found, near[:, kept], exact[:, kept], strict=True):
            chosen = np.argsort(-of_query, kind="stable")[: max(candidates, 2)]
            best = chosen[np.argsort(-row[chosen], kind="stable")[:2]]
            assert [hit.name for hit in hits] == [index.names[place] for place in best]
            np.testing.assert_allclose([hit.score for hit in hits], row[best], atol=1e-5)
            np.testing.assert_allclose([hit.similarity for hit in hits], of_query[best], atol=1e-5)
            alone = [hit.score - weight * hit.similarity for hit in hits]
            np.testing.assert_allclose([hit.matching_score for hit in hits], alone, atol=1e-5)


# The weight of the similarity


def test_a_search_takes_the_weight_that_was_measured_for_its_two_stages(folder, indices):
    encoder, scorer, _ = parts(folder)
    (plain,) = search([CAPTIONS[0]], indices["images"], encoder, scorer)
    assert SimilarityWeight.of(None, encoder, scorer) == SimilarityWeight(0.0, "unknown")
    assert all(hit.score == hit.matching_score for hit in plain)
    encoder.model.config.similarity_weight = 30
    assert SimilarityWeight.of(None, encoder, scorer) == SimilarityWeight(30.0, "measured")
    (measured,) = search([CAPTIONS[0]], indices["images"], encoder, scorer)
    (asked_for,) = search([CAPTIONS[0]], indices["images"], encoder, scorer, similarity_weight=30.0)
    assert measured == asked_for != plain
    (alone,) = search([CAPTIONS[0]], indices["images"], encoder, scorer, similarity_weight=0)
    assert alone == plain and SimilarityWeight.of(0, encoder, scorer) == SimilarityWeight(0, "given")
    # It says nothing of how another first stage goes with this model, nor of this one with another model.
    other, other_scorer, _ = parts(folder)
    assert SimilarityWeight.of(None, other, scorer).origin == "unknown"
    assert SimilarityWeight.of(None, encoder, other_scorer).origin == "unknown"
    assert SimilarityWeight.of(None, Given(np.eye(3)), scorer).origin == "unknown"
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"similarity_weight=.*; expected a number that is at least 0"):
            search([CAPTIONS[0]], indices["images"], encoder, scorer, similarity_weight=wrong)


def slow_recall_sum(scores, similarities, right, weight, candidates, queries):
    """By one query after another: candidates by similarity, then by the sum; a wrong one of an equal sum is before."""
    total = 0.0
    for matrix, near, columns in (
        (scores, similarities, [[image] for image in right]),
        (scores.T, similarities.T, [[c for c, i in enumerate(right) if i == image] for image in range(len(scores.T))]),
    ):
        asked = [number * len(matrix) // min(queries, len(matrix)) for number in range(min(queries, len(matrix)))]
        ranks = []
        for query in asked:
            proposed = sorted(range(len(matrix[query])), key=lambda item: -near[query][item])[:candidates]
            sums = {item: matrix[query][item] + weight * near[query][item] for item in proposed}
            found = [sums[item] for item in columns[query] if item in sums]
            wrong = [value for item, value in sums.items() if item not in columns[query]]
            ranks.append(1 + sum(value >= max(found) for value in wrong) if found else np.inf)
        total += sum(np.mean([rank <= k for rank in ranks]) for k in (1, 5, 10))
    return total


def test_the_weight_is_the_smallest_of_the_best_by_a_slow_loop(monkeypatch):
    images, captions, candidates, queries = 13, 30, 12, 9
    chosen = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        right = np.concatenate([np.arange(images), rng.integers(0, images, captions - images)])
        rows = datasets.Dataset.from_dict(
            {"image_id": [f"i{i}" for i in right], "caption": [f"c{c}" for c in range(captions)]}
        )
        # Sums that float32 holds exactly, with many ties; either stage knows something of what is right.
        matches = right[:, None] == np.arange(images)
        scores = rng.integers(-9, 10, (captions, images)) + matches * rng.integers(0, 12)
        similarities = rng.integers(-4, 5, (captions, images)) / 8 + matches * rng.integers(0, 5) / 8
        for name, value in (("CANDIDATES", candidates), ("QUERIES", queries), ("IMAGES", images)):
            monkeypatch.setattr(report_module, f"WEIGHING_{name}", value)
        scorer = GivenScores(scores)
        report = measure_similarity_weight(Given(similarities), scorer, rows)
        expected = {
            weight: slow_recall_sum(scores, similarities, right, weight, candidates, queries)
            for weight in SIMILARITY_WEIGHTS
        }
        assert {row.similarity_weight: row.recall_sum for row in report.rows[1:]} == pytest.approx(expected)
        best = min(weight for weight in expected if expected[weight] > max(expected.values()) - 1e-9)
        assert scorer.model.config.similarity_weight == report.best.similarity_weight == best
        says = describe_weight(report)
        assert f"score + {best:g} similarity" in says and f"split, {expected[best]:.3f} (by" in says
        chosen.add(best)
    assert len(chosen) >= 4 and 0 in chosen  # the weights differ from world to world


def test_what_is_measured_is_bounded(monkeypatch):
    for name, value in (("CANDIDATES", 2), ("QUERIES", 3), ("IMAGES", 5)):
        monkeypatch.setattr(report_module, f"WEIGHING_{name}", value)
    rows = datasets.Dataset.from_dict(
        {"image_id": [f"i{i // 2}" for i in range(40)], "caption": list(map(str, range(40)))}
    )
    scorer = GivenScores(np.eye(10, 5))
    report = measure_similarity_weight(Given(np.random.default_rng(0).random((10, 5))), scorer, rows)
    assert (report.num_images, report.num_captions) == (5, 10)  # every fourth of 20 images, with its captions
    assert report.num_queries == {"image_retrieval": 3, "text_retrieval": 3}
    assert report.rows[-1].pairs == len(scorer.pairs) <= (3 + 3) * 2


class Given:
    """Similarities as they are written down: caption c is near image i by `table[c][i]`."""

    dim, name = 3, "given"

    def __init__(self, table):
        self.table = np.array(table, dtype=np.float32)
        self.dim = self.table.shape[1]

    def embed_captions(self, captions):
        return self.table

    def embed_images(self, image_ids):
        return np.eye(self.dim, dtype=np.float32)

    def identity(self):
        return {"name": self.name}


class GivenScores:
    def __init__(self, table):
        self.table = np.array(table, dtype=np.float32)
        self.pairs = []
        self.model = SimpleNamespace(config=SimpleNamespace(similarity_weight=None))

    def score_pairs(self, captions, images, caption_index, image_index, max_length=44, output_dir=None):
        self.pairs += zip(caption_index.tolist(), image_index.tolist(), strict=True)
        return self.table[caption_index, image_index]


def test_numbers_below_one_are_refused(folder, indices):
    encoder, scorer, _ = parts(folder)
    for options in ({"top_k": 0}, {"candidates": -1}):
        with pytest.raises(ValueError, match=r"top_k=.*, candidates=.*; expected at least 1 of each"):
            search([CAPTIONS[0]], indices["images"], encoder, scorer, **options)


def test_one_query_caption_or_image_is_no_list(folder, indices, clip, tmp_path):
    encoder, scorer, store = parts(folder)
    calls = [clip.embed_captions, clip.embed_images, encoder.embed_captions, encoder.embed_images]
    calls += [lambda one, index=index: search(one, index, encoder, scorer) for index in indices.values()]
    calls += [lambda one: build_index(encoder, store, tmp_path / "index", captions=one)]
    calls += [lambda one: build_index(encoder, store, tmp_path / "index", image_ids=one)]
    for call in calls:
        with pytest.raises(ValueError, match=r" is 'cat', expected several: give a list, \['cat'\]"):
            call("cat")
    with pytest.raises(ValueError, match="queries is the record of image"):
        search(store[IMAGES[0]], indices["captions"], encoder, scorer)


def test_a_table_says_what_its_score_is():
    hits = [Hit("a dog", 12.5, 0.25, 10.0), Hit("a cat", -1.0, 0.5, -6.0)]
    plain = [
        "x",
        "rank     score  similarity",
        "   1   +12.500       0.250  a dog",
        "   2    -1.000       0.500  a cat",
    ]
    assert str(SearchResult("x", hits)).splitlines() == plain
    assert str(SearchResult("x", hits, weight=SimilarityWeight(10.0, "measured"))).splitlines() == [
        "x",
        "rank  score + 10 similarity     score  similarity",
        "   1                +12.500   +10.000       0.250  a dog",
        "   2                 -1.000    -6.000       0.500  a cat",
        "Ordered by score + 10 similarity, the weight that was measured on validation captions.",
    ]
    for origin, says in (
        ("measured", "score + 0 similarity, the weight that was measured on validation captions"),
        ("given", "score, the weight that was asked for"),
        ("unknown", "score alone: no weight of the similarity was measured for this checkpoint with this first stage"),
    ):
        result = SearchResult("x", hits, Path("g.html"), SimilarityWeight(0.0, origin))
        assert str(result).splitlines() == [*plain, f"Ordered by {says}.", "Gallery: g.html"]


def test_report_by_hand():
    fold = RetrievalFold(["a", "b", "c"], ["A", "B", "C"], np.array([0, 1, 2]))
    encoder = Given([[0.9, 0.8, 0.1], [0.7, 0.2, 0.3], [0.0, 0.6, 0.5]])
    scorer = GivenScores([[1.0, 5.0, 9.0], [0.0, 7.0, 9.0], [9.0, 2.0, 3.0]])
    report = two_stage_report(encoder, scorer, fold, candidates=(2, 1, 50))
    alone, one, two, every = report.rows
    # First stage: a finds A; b finds A, B last; c finds B, then C. Images: A finds a; B finds a, b last; C finds c.
    assert alone.metrics["image_retrieval_recall@1"] == pytest.approx(1 / 3)
    assert alone.metrics["text_retrieval_recall@1"] == pytest.approx(2 / 3)
    assert (alone.candidates, alone.pairs) == (0, 0)
    # The nearest one: A, A, B of the captions; a, a, c of the images. Pairs aA, bA, cB and aB, cC beside.
    assert one.pairs == 5 and one.ceiling == pytest.approx({"image_retrieval": 1 / 3, "text_retrieval": 2 / 3})
    assert one.metrics["image_retrieval_recall@1"] == pytest.approx(1 / 3)
    assert one.metrics["text_retrieval_recall@1"] == pytest.approx(2 / 3)
    # Two: (A, B), (A, C), (B, C) and (a, b), (a, c), (c, b). Caption a now prefers B, c prefers C; B prefers a still.
    assert two.ceiling == pytest.approx({"image_retrieval": 2 / 3, "text_retrieval": 2 / 3})
    assert two.metrics["image_retrieval_recall@1"] == pytest.approx(1 / 3)
    assert two.metrics["text_retrieval_recall@1"] == pytest.approx(1 / 3)
    assert two.pairs == 6  # the images propose the same
    exhaustive = retrieval_metrics(scorer.table, [0, 1, 2])
    assert every.pairs == 9 and every.ceiling == {"text_retrieval": 1.0, "image_retrieval": 1.0}
    for name in ("image_retrieval_recall@1", "text_retrieval_recall@1"):
        assert every.metrics[name] == exhaustive[name]
    assert len(scorer.pairs) == len(set(scorer.pairs)) == 9  # none is scored twice
    scorer.pairs.clear()
    (_, again) = two_stage_report(encoder, scorer, fold, candidates=(1,)).rows
    assert (again.pairs, again.metrics) == (5, one.metrics)
    assert sorted(scorer.pairs) == [(0, 0), (0, 1), (1, 0), (2, 1), (2, 2)]  # none but the proposed, of both directions
    # 10 times the similarity: a scores 10, 13, 10; b 7, 9, 12; c 9, 8, 8.
    both = two_stage_report(encoder, scorer, fold, candidates=(50,), similarity_weights=(10.0,)).rows[1].metrics
    assert [both[f"image_retrieval_recall@{k}"] for k in (1, 5)] == [0.0, 1.0]
    assert both["image_retrieval_mean_rank"] == pytest.approx((3 + 2 + 3) / 3)  # ties count against it
    # 100 times: the order of the first stage.
    by_first = two_stage_report(encoder, scorer, fold, candidates=(50,), similarity_weights=(100.0,)).rows[1].metrics
    assert by_first == alone.metrics
    # Several weights by one call: a row for each K and weight, and no pair is scored twice.
    scorer.pairs.clear()
    several = two_stage_report(encoder, scorer, fold, candidates=(50, 1), similarity_weights=(0.0, 10.0))
    assert [(row.candidates, row.similarity_weight) for row in several.rows] == [
        (0, 0.0), (1, 0.0), (1, 10.0), (50, 0.0), (50, 10.0)
    ]  # fmt: skip
    assert (several.rows[3].metrics, several.rows[4].metrics) == (every.metrics, both)
    assert len(scorer.pairs) == len(set(scorer.pairs)) == 9
    assert [line.split(" |")[0] for line in str(several).splitlines()[3:7]] == [
        "| 1", "| 1, score + 10 similarity", "| 50", "| 50, score + 10 similarity"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="similarity_weights is empty"):
        two_stage_report(encoder, scorer, fold, similarity_weights=())
    lines = str(report).splitlines()
    assert lines[2].startswith("| first stage alone | 0 |") and lines[4].startswith("| 2 | 6 |")
    assert "| 66.7, 66.7 | 33.3 |" in lines[4] and lines[-1].startswith("| all, not scored: the cost | 9 | about ")


def test_an_index_of_some_images(folder, tmp_path):
    encoder, _, store = parts(folder)
    index = build_index(encoder, store, tmp_path / "some", image_ids=[IMAGES[4], IMAGES[1]])
    assert index.names == [IMAGES[4], IMAGES[1]]
    assert np.array_equal(index.embeddings, encoder.embed_images([IMAGES[4], IMAGES[1]]))


def test_a_report_ranks_what_it_tells_and_nothing_else(monkeypatch):
    ranked = []

    def counting(name):
        rank = getattr(metrics_module, name)
        monkeypatch.setattr(metrics_module, name, lambda *arguments: (ranked.append(name), rank(*arguments))[1])

    counting("_rank_captions"), counting("_rank_images")
    fold = RetrievalFold(["a", "b", "c"], ["A", "B", "C"], np.array([0, 1, 2]))
    encoder = Given([[0.9, 0.8, 0.1], [0.7, 0.2, 0.3], [0.0, 0.6, 0.5]])
    report = two_stage_report(encoder, GivenScores(np.eye(3)), fold, (1, 2), similarity_weights=(0.0, 10.0))
    assert len(report.rows) == 5  # each of them ranks each direction once
    assert sorted(ranked) == ["_rank_captions"] * 5 + ["_rank_images"] * 5


def test_report_of_some_queries_by_hand():
    """Of five captions, the first and the third; of three images, the first and the second; among all."""
    fold = RetrievalFold(list("abcde"), ["A", "B", "C"], np.array([0, 1, 2, 2, 1]))
    encoder = Given([[0.9, 0.8, 0.1], [0.7, 0.2, 0.3], [0.7, 0.6, 0.5], [0.1, 0.1, 0.9], [0.8, 0.3, 0.4]])
    scorer = GivenScores([[1.0, 5.0, 0.0], [0.0, 7.0, 9.0], [9.0, 2.0, 3.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    alone, two = (report := two_stage_report(encoder, scorer, fold, candidates=[2], num_queries=2)).rows
    assert report.num_queries == {"image_retrieval": 2, "text_retrieval": 2}
    # a finds A, c finds A and B before C; of the images A finds a, and B finds a and c before e and b.
    directions = ("image_retrieval", "text_retrieval")
    assert [alone.metrics[f"{name}_recall@1"] for name in directions] == [0.5, 0.5]
    assert [alone.metrics[f"{name}_mean_rank"] for name in directions] == [2.0, 2.0]
    # Captions a and c with A and B; image A with a and e, B with a and c.
    assert sorted(scorer.pairs) == [(0, 0), (0, 1), (2, 0), (2, 1), (4, 0)] and two.pairs == 5
    assert two.ceiling == {"text_retrieval": 0.5, "image_retrieval": 0.5}
    # a prefers B; A prefers a; what is right for c, and for B, was not proposed.
    assert [two.metrics[f"{name}_recall@1"] for name in directions] == [0.0, 0.5]
    everything = two_stage_report(encoder, scorer, fold, candidates=[2], num_queries=9)
    assert everything.num_queries == {"image_retrieval": 5, "text_retrieval": 3}
    assert everything.rows[1].metrics == two_stage_report(encoder, scorer, fold, candidates=[2]).rows[1].metrics
    with pytest.raises(ValueError, match="num_queries=0; expected at least 1"):
        two_stage_report(encoder, scorer, fold, num_queries=0)


def test_report_of_a_model_at_full_depth_is_exhaustive(folder, tmp_path):
    encoder, scorer, _ = parts(folder)
    fold = RetrievalFold(CAPTIONS, IMAGES, IMAGE_OF_CAPTION)
    report = two_stage_report(encoder, scorer, fold, candidates=(2, 9), scores_dir=tmp_path / "scores")
    exhaustive = retrieval_metrics(scorer.score(CAPTIONS, IMAGES), IMAGE_OF_CAPTION)
    assert report.rows[-1].metrics == pytest.approx(exhaustive)
    assert report.rows[1].pairs < report.rows[2].pairs == len(CAPTIONS) * len(IMAGES)
    again = two_stage_report(encoder, scorer, fold, candidates=(2, 9), scores_dir=tmp_path / "scores")
    assert [row.metrics for row in again.rows] == [row.metrics for row in report.rows]
    assert again.rows[1].seconds is None  # it had them already
    with pytest.raises(ValueError, match=r"candidates=\(0,\)"):
        two_stage_report(encoder, scorer, fold, candidates=(0,))


# A dual encoder of transformers


@pytest.fixture(scope="module")
def clip(folder):
    return TransformersDualEncoder(save_clip(folder), Photos(folder / "photos"))


def save_clip(folder):
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{word}</w>" for word in tiny.WORDS[5:]), *string.ascii_lowercase]
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=5)
    CLIPModel(config).save_pretrained(folder / "clip")
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer).save_pretrained(folder / "clip")
    return folder / "clip"


def test_a_dual_encoder_of_transformers_as_first_stage(folder, clip):
    _, scorer, store = parts(folder)
    model, processor = clip.model, clip.processor
    with torch.no_grad():
        text = model(
            **processor(text=CAPTIONS, images=Image.open(folder / "photos" / f"{IMAGES[3]}.png"), return_tensors="pt",
                        padding=True, truncation=True, max_length=12)
        )  # fmt: skip
    index = build_index(clip, store, folder / "clip_images")
    np.testing.assert_allclose(clip.embed_captions(CAPTIONS), text.text_embeds, atol=1e-5)
    np.testing.assert_allclose(index.embeddings[3], text.image_embeds[0], atol=1e-5)
    (hits,) = search([CAPTIONS[2]], index, clip, scorer, top_k=7, candidates=7)
    expected = scorer.rank(CAPTIONS[2], IMAGES, top_k=7)
    assert [hit.name for hit in hits] == [name for name, _ in expected]
    np.testing.assert_allclose([hit.score for hit in hits], [score for _, score in expected], atol=1e-5)
    with pytest.raises(
        ValueError, match=r"by the checkpoint .*clip \(family clip.*but given is .*model \(family unicod"
    ):
        search([CAPTIONS[2]], index, parts(folder)[0], scorer)


def test_what_is_no_dual_encoder_is_refused(folder):
    with pytest.raises(ValueError, match=r"has no get_text_features and no get_image_features"):
        TransformersDualEncoder(folder / "model", None)


def test_a_photo_that_lacks_is_named(folder, clip):
    with pytest.raises(KeyError, match=r"photos has no photo 'image 99'"):
        clip.embed_images(["image 0", "image 99"])


# The commands


def run(capsys, *words):
    code = cli.main(list(map(str, words)))
    output = capsys.readouterr()
    return code, output.out if code == 0 else output.err


def test_commands(folder, clip, tmp_path, capsys, caplog, monkeypatch):
    index = tmp_path / "images"
    code, output = run(capsys, "index", folder / "store", "--model", folder / "model", "--output", index)
    assert code == 0 and f"{index} is complete: 7 images, 6 numbers each, by {folder / 'model'}." in output
    gallery = tmp_path / "gallery.html"
    words = ["search", CAPTIONS[1], "--index", index, "--top-k", 3]
    code, output = run(capsys, *words, "--photos", folder / "photos", "--gallery", gallery)
    expected = parts(folder)[1].rank(CAPTIONS[1], IMAGES, top_k=3)
    assert code == 0 and ranks(output) == [(name, f"{score:+.3f}") for name, score in expected]
    page = gallery.read_text()
    assert page.count("<figure") == 3 and expected[0][0] in page and "right image" not in page

    assert f"The best 3 of 7 images, ordered by {SimilarityWeight(0.0, 'unknown')}." in page
    assert f"\nOrdered by {SimilarityWeight(0.0, 'unknown')}.\n" in output

    code, output = run(capsys, *words, "--similarity-weight", 2)
    assert code == 0 and output.splitlines()[1] == "rank  score + 2 similarity     score  similarity"
    assert output.endswith("Ordered by score + 2 similarity, the weight that was asked for.\n")

    (tmp_path / "few").mkdir()
    shutil.copy(folder / "photos" / f"{expected[0][0]}.png", tmp_path / "few")
    junk = tmp_path / "few" / f"{expected[1][0]}.png"
    junk.write_text("junk!")
    gallery.unlink()
    code, output = run(capsys, *words, "--photos", tmp_path / "few", "--gallery", gallery)
    assert code == 0 and ranks(output) == [(name, f"{score:+.3f}") for name, score in expected]
    one, *blank = pictures(gallery)
    assert corners(blank[0]) == corners(blank[1]) == [(255, 255, 255)] * 2 != corners(one)
    assert (
        f"2 of 3 found images get a blank page:\n{junk} cannot be read: its 5 bytes are no image of a known format.\n"
        f"{tmp_path / 'few'} has no photo {expected[2][0]!r}; its ids are like"
    ) in caplog.text
    caplog.clear()
    assert run(capsys, *words, "--gallery", gallery)[0] == 0
    assert [corners(picture) for picture in pictures(gallery)] == [[(255, 255, 255)] * 2] * 3 and not caplog.text
    code, output = run(capsys, *words, "--photos", tmp_path / "none", "--gallery", gallery)
    assert code == 1 and "none does not exist" in output

    captions = tmp_path / "captions"
    options = ["--model", folder / "model", "--output", captions, "--captions", folder / "captions.jsonl"]
    assert run(capsys, "index", folder / "store", *options)[0] == 0
    expected = parts(folder)[1].rank_captions(IMAGES[2], CAPTIONS, top_k=2)
    STORE[IMAGES[2]].save(tmp_path / "record.npz")
    photo = shutil.copy(folder / "photos" / f"{IMAGES[2]}.png", tmp_path)
    for image, shown in (
        (["--image-id", IMAGES[2]], IMAGES[2]),
        (["--image", photo, "--photos", folder / "photos"], f"{photo}, the photo of the stored image 'image 2'"),
        (["--image", tmp_path / "record.npz"], f"{tmp_path}/record.npz, the saved regions of 'image 2'"),
    ):
        code, output = run(capsys, "search", *image, "--index", captions, "--top-k", 2)
        assert code == 0 and ranks(output) == [(name, f"{score:+.3f}") for name, score in expected]
        assert output.startswith(f"{shown}\n")
    code, output = run(capsys, "search", CAPTIONS[2], "--index", captions)
    assert code == 1 and "holds captions, but what is sought are images" in output
    code, output = run(capsys, *words, "--model", folder / "untrained")
    assert code == 1 and "was not trained" in output


def test_a_file_is_a_photo_and_an_id_an_id(folder, tmp_path, capsys, monkeypatch):
    """
    No file answers for the stored image whose name it bears, unless it is shown to be its photo: its own regions are
    found, here by no detector.
    """
    index, photos, known = tmp_path / "captions", folder / "photos", IMAGES[2]
    build_index(*parts(folder)[::2], index, captions=CAPTIONS)
    monkeypatch.chdir(tmp_path)
    for name in ("same", "other"):
        Path(name).mkdir()
    shutil.copy(photos / f"{known}.png", Path("same"))
    Image.new("RGB", (640, 480), "red").save(Path("other", f"{known}.png"))
    Image.new("RGB", (640, 480), "red").save("new.jpg")
    Path("link").symlink_to("other")

    def searched(*words):
        return run(capsys, "search", *words, "--index", index)

    asked = searched("--image-id", known)
    assert asked[0] == 0
    code, output = searched("--image", f"same/{known}.png", "--photos", photos)  # the same bytes elsewhere
    assert code == 0 and ranks(output) == ranks(asked[1])
    unknown = "The regions that the model was trained on come from no detector"
    for words, *says in (
        ([f"same/{known}.png"], unknown, "name the detector (detector=, --detector)"),  # nothing shows what it is
        ([f"other/{known}.png", "--photos", photos], unknown),
        ([f"other/{known}.png", "--photos", tmp_path / "new.jpg"], unknown),
        ([f"other/{known}.png", "--photos", "other"], unknown),  # this very file
        ([f"link/{known}.png", "--photos", "other"], unknown),
        (["new.jpg", "--photos", photos], unknown),
        (["new.jpg", "--detector", "gird:x"], "The detector is 'gird:x', expected FAMILY:NAME"),
        ([known], "there is no such file", f"has an image of that id: --image-id {known}"),
        ([f"other/{known}"], f"--image other/{known}: there is no such file.\n"),
        (["none.npz"], "there is no such file"),
    ):
        code, output = searched("--image", *words)
        assert code == 1 and all(each in output for each in says), output
    code, output = searched("--image-id", "new.jpg")
    assert code == 1 and "has no image 'new.jpg'; its ids are like ['image 0'," in output
    assert "It is a file: --image new.jpg." in output
    assert "Did you mean 'image 2'?" in searched("--image-id", "imgae 2")[1]
    assert "Did you mean 'image 2'?" in searched("--image-id", "002")[1]
    shutil.copy(photos / f"{known}.png", known)  # a word that is both
    code, output = searched("--image", known, "--photos", photos)
    assert code == 1 and "is a file, and the id of an image of" in output
    assert f"--image ./{known} for the file, or --image-id {known} for the stored image" in output
    assert searched("--image-id", known) == asked
    # From Python it is the same.
    for image, error in ((Path("other", f"{known}.png"), ValueError), (IMAGES[0], FileNotFoundError)):
        with pytest.raises(error, match=f"{unknown}|there is no such file"):
            run_search(image=image, index=str(index))
    assert [hit.name for hit in run_search(image_id=known, index=str(index)).hits] == [
        name for name, _ in ranks(asked[1])
    ]


def test_a_photo_whose_id_is_its_path(folder, tmp_path, capsys):
    """Two files of one stem are two photos, where the store says so."""
    for place in ("a", "b"):
        (tmp_path / "photos" / place).mkdir(parents=True)
        Image.new("RGB", (640, 480), {"a": "red", "b": "blue"}[place]).save(tmp_path / "photos" / place / "x.png")
    records = [tiny.record(f"{place}/x.png", count) for place, count in (("a", 2), ("b", 3))]
    write_store(tmp_path / "store", records)
    store, model = tmp_path / "store", ["--model", folder / "model"]
    words = ["index", store, *model, "--captions", tmp_path / "captions.jsonl", "--output", tmp_path / "captions"]
    rows = [{"image_id": record.image_id, "caption": text} for record, text in zip(records, CAPTIONS, strict=False)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(capsys, *words)[0] == 0
    words = ["search", "--image", tmp_path / "photos" / "b" / "x.png", "--index", tmp_path / "captions"]
    words += ["--photos", tmp_path / "photos"]
    code, output = run(capsys, *words)
    assert code == 1 and "both have the id 'x'" in output and "--ids path" in output
    code, output = run(capsys, *words, "--photo-ids", "path")
    assert code == 1 and "come from no detector" in output  # this very file is no proof
    shutil.copytree(tmp_path / "photos", tmp_path / "same")
    words[2] = tmp_path / "same" / "b" / "x.png"
    code, output = run(capsys, *words, "--photo-ids", "path")
    assert code == 0 and output.startswith(f"{words[2]}, the photo of the stored image 'b/x.png'\n")


def test_a_photo_of_other_proportions_is_another_photo(folder, clip, tmp_path):
    record = STORE[IMAGES[0]]  # of 640 x 480
    for size, same in (
        ((640, 480), True),
        ((319, 240), True),
        ((33, 25), True),
        ((640, 427), False),
        ((480, 640), False),
    ):
        Image.new("RGB", size, "red").save(tmp_path / f"{IMAGES[0]}.png")
        photos = Photos(tmp_path)
        if same:
            assert photos.of(record).size == size
        else:
            with pytest.raises(ValueError, match=rf"image 0\.png has {size[0]} x {size[1]} pixels, but the regions"):
                photos.of(record)
    # What looks at photos looks at those of the store.
    encoder = open_transformers_encoder(str(folder / "clip"), STORE, str(tmp_path))
    with pytest.raises(ValueError, match=r"480 x 640 pixels, but the regions of 'image 0' were found in"):
        encoder.embed_images([IMAGES[0]])


def test_a_gallery_shows_each_photo_whole_then_its_surest_regions(folder, tmp_path, capsys):
    """And of regions without scores, such as the cells of a grid, none."""
    rng = np.random.default_rng(0)
    scored = [dataclasses.replace(record, object_scores=rng.random(len(record.features))) for record in STORE.values()]
    write_store(tmp_path / "scored", scored)
    for store, regions in ((tmp_path / "scored", True), (folder / "store", False)):
        index = tmp_path / f"{store.name}.index"
        words = ["index", store, "--model", folder / "model", "--output", index]
        (tmp_path / "two.jsonl").write_text("\n".join(json.dumps({"image_id": i, "caption": "x"}) for i in IMAGES[:2]))
        assert run(capsys, *words, "--images-of", tmp_path / "two.jsonl")[0] == 0
        words = ["search", CAPTIONS[0], "--index", index, "--gallery", tmp_path / "g.html"]
        assert run(capsys, *words, "--photos", folder / "photos")[0] == 0
        text = (tmp_path / "g.html").read_text()
        assert "The best 2 of 2 images, ordered by score alone" in text
        says = (
            "Each is shown whole, then with its 10 surest regions."
            if regions
            else "Each is shown whole; regions are not"
        )
        assert says in text
        for figure in Page(tmp_path / "g.html").sections[0]["figures"]:
            name = next(name for name in IMAGES if name in figure["text"])
            whole, *drawn = (np.asarray(picture.convert("RGB")) for picture in figure["pictures"])
            photo = np.asarray(Image.open(folder / "photos" / f"{name}.png"))
            np.testing.assert_array_equal(whole, photo)  # not a line on it
            assert len(drawn) == regions and (not regions or (drawn[0] != photo).any())
            assert re.search(r"score [+-][\d.]+, similarity -?0\.\d{3}$", figure["text"])
        assert run(capsys, *words)[0] == 0
        says = (
            "shown as its 10 surest regions on a blank page"
            if regions
            else "a blank page, without --photos; regions are"
        )
        assert says in (tmp_path / "g.html").read_text()
        for figure in Page(tmp_path / "g.html").sections[0]["figures"]:
            (picture,) = figure["pictures"]
            assert ((np.asarray(picture.convert("RGB")) != 255).any()) == regions


def test_one_option_indexes_one_split(folder, tmp_path, capsys):
    splits = ["train", "test", "test", "val", "test", "train", "train"]
    rows = [{"image_id": i, "caption": "x", "split": split} for i, split in zip(IMAGES, splits, strict=True)]
    rows += [
        {"image_id": IMAGES[1], "caption": "y", "split": "test"},
        {"image_id": "gone", "caption": "x", "split": "test"},
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["index", folder / "store", "--model", folder / "model"]
    for name, images in (("", IMAGES), (":test", [IMAGES[1], IMAGES[2], IMAGES[4]])):
        output = tmp_path / f"index{name[1:]}"
        code, says = run(capsys, *words, "--output", output, "--images-of", f"{tmp_path}/captions.jsonl{name}")
        assert code == 0 and SearchIndex(output).names == images and f": {len(images)} images" in says
    shutil.copy(tmp_path / "captions.jsonl", tmp_path / "a:test")  # a file of that name comes first
    assert run(capsys, *words, "--output", tmp_path / "colon", "--images-of", tmp_path / "a:test")[0] == 0
    assert len(SearchIndex(tmp_path / "colon")) == 7
    for options, says in (
        (["--images-of", f"{tmp_path}/captions.jsonl:tset"], "has no split 'tset'; its splits are train, test, val"),
        (["--split", "test"], "--images-of CAPTIONS:test indexes the images of that split"),
        (["--images-of", "a", "--captions", "b"], "Give either --captions"),
    ):
        code, error = run(capsys, *words, "--output", tmp_path / "none", *options)
        assert code == 1 and says in error and not (tmp_path / "none").exists()


def test_the_same_command_goes_on_and_restart_begins_anew(folder, tmp_path, capsys, caplog, monkeypatch):
    output, options = tmp_path / "index", ["--model", folder / "model"]
    words = ["index", folder / "store", *options, "--output", output]
    monkeypatch.setattr(index_module, "BLOCK_ITEMS", 2)
    kill_after(monkeypatch, 2)
    assert run(capsys, *words)[0] == 130
    assert not output.exists()
    monkeypatch.undo()
    monkeypatch.setattr(index_module, "BLOCK_ITEMS", 2)
    code, says = run(capsys, *words)
    assert code == 0 and says.endswith(f"by {folder / 'model'}.\n")
    assert f"{output} was begun before: 2 of 4 blocks are embedded." in caplog.text
    code, says = run(capsys, *words)
    assert code == 0 and says.endswith("It was complete before; --add adds what is new, --restart begins anew.\n")
    # Another job in its place: only when it is complete.
    old = {path.name: path.read_bytes() for path in output.iterdir()}
    (tmp_path / "two.jsonl").write_text("\n".join(json.dumps({"image_id": i, "caption": "x"}) for i in IMAGES[:2]))
    other = [*words, "--images-of", tmp_path / "two.jsonl"]
    code, says = run(capsys, *other)
    assert code == 1 and "holds something else: name another folder for the index, or replace it by --restart." in says
    kill_after(monkeypatch, 0)
    assert run(capsys, *other, "--restart")[0] == 130
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in output.iterdir()} == old
    assert run(capsys, *other, "--restart")[0] == 0
    assert SearchIndex(output).names == IMAGES[:2] and sorted(each.name for each in tmp_path.iterdir()) == [
        "index",
        "two.jsonl",
    ]
    # A kill between the two renames leaves both, and the old one is put back before anything is begun.
    work = tmp_path / "index.partial"
    work.mkdir()
    output.rename(work / "old")
    kill_after(monkeypatch, 0)
    assert run(capsys, *words, "--restart")[0] == 130
    monkeypatch.undo()
    assert SearchIndex(output).names == IMAGES[:2]
    # What is no index stays.
    code, says = run(capsys, "index", folder / "store", *options, "--output", folder / "photos", "--restart")
    assert code == 1 and "exists and is no index" in says and len(list((folder / "photos").iterdir())) == len(IMAGES)


def test_an_index_grows_and_shrinks_with_its_store(folder, tmp_path, capsys, caplog, monkeypatch):
    """What is there is not embedded again, and stays valid until the new is complete."""
    monkeypatch.setattr(index_module, "BLOCK_ITEMS", 2)
    store, output = tmp_path / "store", tmp_path / "index"
    write_store(store, [STORE[name] for name in IMAGES[:4]])
    words = ["index", store, "--model", folder / "model", "--output", output]
    assert run(capsys, *words)[0] == 0
    grow(store, IMAGES[4:])
    code, says = run(capsys, *words)
    assert code == 1 and says.startswith(f"unicoder-vl index: {store} has changed since {output} was made from it: ")
    assert "`unicoder-vl index … --add` brings that up to date" in says
    code, says = run(capsys, "search", CAPTIONS[0], "--index", output)
    assert code == 1 and "has changed since" in says
    caplog.clear()
    code, says = run(capsys, "search", "--image-id", IMAGES[0], "--index", output)
    assert code == 0 and says.startswith(IMAGES[0]) and f"{store} has changed since {output} was made" in caplog.text
    kill_after(monkeypatch, 1)
    assert run(capsys, *words, "--add")[0] == 130
    monkeypatch.undo()
    assert SearchIndex(output).names == IMAGES[:4]
    monkeypatch.setattr(index_module, "BLOCK_ITEMS", 2)
    embedded = []
    embed = UnicoderVLDualEncoder.embed_images
    monkeypatch.setattr(
        UnicoderVLDualEncoder, "embed_images", lambda self, names: embedded.extend(names) or embed(self, names)
    )
    code, says = run(capsys, *words, "--add")
    assert code == 0 and says.startswith(f"{output} is complete: 7 images") and says.endswith("There were 4 before.\n")
    assert embedded == IMAGES[6:]  # the block before the kill is not lost
    grown = SearchIndex(output)
    assert grown.names == IMAGES
    expected = build_index(parts(folder)[0], RegionStore(store), tmp_path / "whole")
    np.testing.assert_allclose(grown.embeddings, expected.embeddings, rtol=0, atol=1e-6)
    embedded.clear()
    assert run(capsys, *words, "--add")[0] == 0 and not embedded  # nothing is new
    code, says = run(capsys, *words, "--remove", IMAGES[1], IMAGES[5])
    assert code == 0 and says == f"{output} is complete: 5 items, without 2.\n"
    rest = [name for name in IMAGES if name not in (IMAGES[1], IMAGES[5])]
    assert SearchIndex(output).names == rest
    np.testing.assert_array_equal(SearchIndex(output).embeddings, grown.embeddings[[0, 2, 3, 4, 6]])
    code, says = run(capsys, *words, "--remove", "image 99")
    assert code == 1 and "has no 'image 99' among its 5 images" in says
    remove_images(store, [IMAGES[2]])  # what the store has no more leaves the index
    code, says = run(capsys, *words, "--add")
    assert code == 0 and SearchIndex(output).names == [name for name in rest if name != IMAGES[2]] + IMAGES[1:2] + [
        IMAGES[5]
    ]
    code, says = run(capsys, *words, "--add", "--captions", folder / "captions.jsonl")
    assert code == 1 and "holds images, with faiss=None, and given are captions" in says
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "store", "whole"]


@pytest.mark.parametrize("was_complete", [True, False])
def test_an_interrupted_addition_goes_on_though_the_store_has_grown_since(
    folder, tmp_path, capsys, caplog, monkeypatch, was_complete
):
    """What was embedded is not embedded again; what has come since is added by the same command."""
    store, output = tmp_path / "store", tmp_path / "index"
    monkeypatch.setattr(index_module, "BLOCK_ITEMS", 2)
    words = ["index", store, "--model", folder / "model", "--output", output, "--add"]
    write_store(store, [STORE[IMAGES[0]]])
    if was_complete:
        assert run(capsys, *words)[0] == 0
    grow(store, IMAGES[1:6])
    kill_after(monkeypatch, 1)
    assert run(capsys, *words)[0] == 130
    monkeypatch.undo()
    monkeypatch.setattr(index_module, "BLOCK_ITEMS", 2)
    grow(store, IMAGES[6:])
    code, says = run(capsys, *words[:-1])
    assert code == 1 and ("has changed since" if was_complete else "--add goes on where the store has grown") in says
    embedded, embed = [], UnicoderVLDualEncoder.embed_images
    monkeypatch.setattr(
        UnicoderVLDualEncoder, "embed_images", lambda self, names: embedded.extend(names) or embed(self, names)
    )
    code, says = run(capsys, *words)
    assert code == 0 and says.startswith(f"{output} is complete: 7 images")
    assert embedded == IMAGES[3 if was_complete else 2 :] and "1 of 3 blocks are embedded" in caplog.text
    expected = build_index(parts(folder)[0], RegionStore(store), tmp_path / "whole")
    assert SearchIndex(output).names == IMAGES and SearchIndex(output).facts["store"] == expected.facts["store"]
    np.testing.assert_allclose(SearchIndex(output).embeddings, expected.embeddings, rtol=0, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "store", "whole"]


def grow(store, names):
    with RegionStoreWriter(store, resume=True) as writer:
        for name in names:
            writer.write(STORE[name])


def test_blocks_of_a_restart_are_none_of_an_addition(folder, tmp_path, monkeypatch):
    """Both are of the same names; those that an addition embeds begin behind what is there."""
    encoder, _, store = parts(folder)
    monkeypatch.setattr(index_module, "BLOCK_ITEMS", 2)
    output, whole = tmp_path / "index", build_index(encoder, store, tmp_path / "whole").embeddings
    for first, second in (({"restart": True}, {"add": True}), ({"add": True}, {})):
        build_index(encoder, store, output, image_ids=IMAGES[:3], restart=True)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            kill_after(patch, 1)
            build_index(encoder, store, output, **first)
        if not second:
            shutil.rmtree(output)
        with pytest.raises(ValueError, match=r"another job: embedded_sha256 was .*--restart begins anew"):
            build_index(encoder, store, output, **second)
        np.testing.assert_array_equal(build_index(encoder, store, output, restart=True).embeddings, whole)


def test_a_structure_that_faiss_does_not_take_costs_no_embedding(folder, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    encoder, _, store = parts(folder)
    embed = encoder.embed_images
    monkeypatch.setattr(encoder, "embed_images", lambda names: pytest.fail("embedded"))
    with pytest.raises(ValueError, match=r"--faiss\) is 'NOPE', which FAISS does not understand for 6 numbers"):
        build_index(encoder, store, tmp_path / "index", faiss="NOPE")
    monkeypatch.setattr(encoder, "embed_images", embed)
    with pytest.raises(ValueError, match=r"'IVF100,Flat' does not take these 7 embeddings .*give another structure"):
        build_index(encoder, store, tmp_path / "index", faiss="IVF100,Flat")
    monkeypatch.setattr(encoder, "embed_images", lambda names: pytest.fail("embedded again"))
    assert build_index(encoder, store, tmp_path / "index", faiss="Flat").names == IMAGES


def test_what_an_index_lacks_is_named(folder, indices, tmp_path):
    index = shutil.copytree(indices["images"].path, tmp_path / "index")
    (index / "names.json").write_text((index / "names.json").read_text()[:-9])
    with pytest.raises(ValueError, match=r"names\.json, line \d+, column \d+: malformed json"):
        SearchIndex(index)
    for content in ("{}", "[]"):
        (index / "index.json").write_text(content)
        with pytest.raises(ValueError, match=r"index has format_version None, expected \d: make it again"):
            SearchIndex(index)


def test_taking_out_goes_with_nothing_else():
    for options, message in (
        ({"remove": []}, "names nothing to take out"),
        ({"remove": ["a"], "add": True}, "leave --add out"),
        ({"remove": ["a"], "captions": "c"}, "leave --captions out"),
    ):
        with pytest.raises(ValueError, match=message):
            make_index("store", "index", **options)


def test_a_gallery_in_a_new_folder_of_a_store_that_has_shrunk(folder, tmp_path, capsys, caplog):
    write_store(tmp_path / "store", STORE.values())
    words = ["index", tmp_path / "store", "--model", folder / "model", "--output", tmp_path / "index"]
    assert run(capsys, *words)[0] == 0
    remove_images(tmp_path / "store", [IMAGES[1]])
    gallery = tmp_path / "new" / "g.html"
    code, says = run(capsys, "search", "--image-id", IMAGES[0], "--index", tmp_path / "index", "--gallery", gallery)
    assert code == 0 and IMAGES[1] in says and gallery.exists()
    assert f"store has no image {IMAGES[1]!r} any more" in caplog.text


def test_an_index_behind_a_link(folder, tmp_path):
    encoder, _, store = parts(folder)
    (tmp_path / "elsewhere").mkdir()
    (link := tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "real")
    names = list(store)
    build_index(encoder, store, link)
    remove_items(link, names[:1])
    assert build_index(encoder, store, link, restart=True).names == names
    assert link.is_symlink() and [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["real"]


def test_captions_are_added_to_their_index(folder, tmp_path):
    encoder, _, store = parts(folder)
    build_index(encoder, store, tmp_path / "index", captions=CAPTIONS[:3])
    grown = build_index(encoder, store, tmp_path / "index", captions=CAPTIONS[2:6], add=True)
    assert grown.names == CAPTIONS[:6]
    found = grown.search(encoder.embed_captions([CAPTIONS[4]]), 1)[0]
    assert grown.names[found[0, 0]] == CAPTIONS[4]


def kill_after(monkeypatch, blocks):
    write, written = index_module.BlockFolder.write, []

    def killed(self, block, values):
        if len(written) == blocks:
            raise KeyboardInterrupt
        written.append(block)
        write(self, block, values)

    monkeypatch.setattr(index_module.BlockFolder, "write", killed)


def test_an_index_says_what_it_is(folder, indices):
    assert repr(indices["captions"]) == (
        f"SearchIndex('{folder}/captions', captions={len(set(CAPTIONS))}, dim=6, encoder='{folder}/model', "
        f"store='{folder}/store', faiss=None)"
    )


def pictures(gallery):
    return [figure["picture"].convert("RGB") for figure in Page(gallery).sections[0]["figures"]]


def corners(picture):
    """Where no region was drawn."""
    return [picture.getpixel(place) for place in ((0, 0), (picture.width - 1, picture.height - 1))]


def ranks(output):
    rows = [line.split(maxsplit=3) for line in output.splitlines() if line[:4].strip().isdigit()]
    return [(row[-1], row[1]) for row in rows]


def test_exhaustive_search_says_first_how_long(folder, capsys, monkeypatch):
    monkeypatch.setattr(scorer_module, "PLAN_FROM_PASSES", 0)  # short as it is
    options = ["--exhaustive", "--model", folder / "untrained", "--regions", folder / "store", "--top-k", 9]
    assert cli.main(list(map(str, ["search", CAPTIONS[1], *options]))) == 0
    shown = capsys.readouterr()
    assert "Scoring 1 caption x 7 images: 7 pairs" in shown.err and "about 0 s" in shown.err
    lines = [line.split(maxsplit=2)[2].strip() for line in shown.out.splitlines() if line[:4].strip().isdigit()]
    model = UnicoderVLForImageTextRetrieval.from_pretrained(folder / "untrained")
    scorer = ImageTextScorer(model, tiny.processor(), STORE, verbose=False)
    assert lines == [name for name, _ in scorer.rank(CAPTIONS[1], IMAGES)]
    found = run_search(
        image_id=IMAGES[0],
        exhaustive=True,
        model=str(folder / "untrained"),
        regions=str(folder / "store"),
        captions=str(folder / "captions.jsonl"),
    )
    expected = scorer.rank_captions(IMAGES[0], list(dict.fromkeys(CAPTIONS)))
    assert [hit.name for hit in found.hits] == [name for name, _ in expected]


def test_a_dual_encoder_from_the_command_line(folder, clip, tmp_path, capsys):
    index, photos = tmp_path / "clip", ["--photos", folder / "photos"]
    shutil.copytree(folder / "clip", tmp_path / "encoder")
    words = ["index", folder / "store", "--dual-encoder", tmp_path / "encoder", "--output", index]
    assert "looks at photos" in run(capsys, *words)[1]
    assert run(capsys, *words, *photos)[0] == 0
    code, output = run(capsys, "search", CAPTIONS[0], "--index", index)
    assert code == 1 and "give --model, a checkpoint of ours that scores" in output
    code, output = run(capsys, "search", CAPTIONS[0], "--index", index, "--model", folder / "untrained", "--top-k", 7)
    assert code == 0 and sorted(name for name, _ in ranks(output)) == IMAGES
    assert "either --model" in run(capsys, *words, "--model", folder / "model")[1]
    (tmp_path / "encoder").rename(tmp_path / "moved")
    code, output = run(capsys, "search", CAPTIONS[0], "--index", index, "--model", folder / "untrained")
    assert code == 1 and "encoder, which is not there any more: say where it is, --dual-encoder" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a sentence"),
        ({"text": "a", "image": "b"}, "either a sentence"),
        ({"image": "a", "image_id": "b"}, "either a sentence"),
        ({"text": "a", "index": "i", "split": "test"}, "--captions and --split say what --exhaustive searches"),
        ({"image": "a", "index": "i", "captions": "c"}, "--captions and --split say what --exhaustive searches"),
        ({"text": "a"}, "either --index"),
        ({"text": "a", "index": "i", "exhaustive": True}, "either --index"),
        ({"text": "a", "exhaustive": True}, "--exhaustive needs --model and --regions"),
        ({"text": "a", "exhaustive": True, "dual_encoder": "clip"}, "no first stage: leave --dual-encoder out"),
        ({"image": "a", "exhaustive": True, "gallery": "g", "photos": "p"}, "--gallery shows images that are found"),
        ({"text": " ", "index": "i"}, "The sentence is empty"),
        ({"text": "a", "index": "i", "top_k": 0}, "--top-k is 0, expected at least 1"),
        ({"image": "a", "exhaustive": True, "top_k": -1}, "--top-k is -1, expected at least 1"),
        ({"text": "a", "index": "i", "candidates": 0}, "--candidates is 0, expected at least 1"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        run_search(**arguments)


def test_the_script_of_the_report(folder, clip, tmp_path, capsys):
    script = places.script("evaluate_two_stage")
    rows = [json.loads(line) | {"split": "test"} for line in (folder / "captions.jsonl").read_text().splitlines()]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = {"captions": tmp_path / "captions.jsonl", "regions": folder / "store", "output": tmp_path / "report.json"}
    shared["candidates"] = "9"
    clip = {"dual_encoder": folder / "clip", "photos": folder / "photos"}
    ours = {"dual_encoder": folder / "model"}  # whose first stage proposes what another one scores
    for model, options in (("model", {}), ("untrained", ours), ("untrained", clip)):
        words = [[f"--{name}", str(value)] for name, value in (shared | options | {"model": folder / model}).items()]
        script.main([word for pair in words for word in pair])
        report = json.loads((tmp_path / "report.json").read_text())
        loaded = UnicoderVLForImageTextRetrieval.from_pretrained(folder / model)
        scorer = ImageTextScorer(loaded, tiny.processor(), STORE, verbose=False)
        exhaustive = retrieval_metrics(scorer.score(CAPTIONS, IMAGES), IMAGE_OF_CAPTION)
        assert report["report"]["rows"][1]["metrics"] == pytest.approx(exhaustive)
        assert report["first_stage"]["family"] == ("clip" if options == clip else "unicoder-vl")
        assert report["first_stage"]["name"] == str(options.get("dual_encoder", folder / model))
        near = parts(folder)[0]
        by_first = retrieval_metrics(near.embed_captions(CAPTIONS) @ near.embed_images(IMAGES).T, IMAGE_OF_CAPTION)
        assert (report["report"]["rows"][0]["metrics"] == pytest.approx(by_first)) == (options != clip)
        assert "Retrieval: 7 images, all 9 captions; first stage" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"clip looks at photos: give --photos"):
        blind = shared | {"model": folder / "model", "dual_encoder": folder / "clip"}
        script.main([word for name, value in blind.items() for word in (f"--{name}", str(value))])
    # By default the score alone, and the weight that the checkpoint was measured with.
    measured = UnicoderVLForImageTextRetrieval.from_pretrained(folder / "model", similarity_weight=30)
    measured.save_pretrained(tmp_path / "measured")
    tiny.processor().save_pretrained(tmp_path / "measured")
    words = [word for name, value in shared.items() for word in (f"--{name}", str(value))]
    script.main([*words, "--model", str(tmp_path / "measured")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["similarity_weight"] for row in report["report"]["rows"]] == [0, 0, 30]
    said = "score + 30 similarity, the weight that was measured on validation captions"
    assert report["order_of_a_search"] == said and f"A search orders by {said}.\n" in capsys.readouterr().out
    script.main([*words, "--model", str(folder / "model"), "--num_queries", "8", "--similarity_weight", "0", "10"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["similarity_weight"] for row in report["report"]["rows"]] == [0, 0, 10]
    assert "weights_sha256" in report["first_stage"] and "scoring_weights_sha256" in report["checkpoint"]
    title = "Retrieval: 7 images, all 9 captions, asked with 8 captions and 7 images, drawn evenly"
    assert f"{title}; first stage" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["test"] == title


def test_any_photo_is_a_query(tmp_path, capsys, monkeypatch):
    """By its own regions, whatever its name: it finds what the same photo finds that is in the store."""
    world = photo_world.build(tmp_path)
    (world / "captions.jsonl").write_text(
        "\n".join(json.dumps({"image_id": photo_world.IDS[0], "caption": text}) for text in photo_world.CAPTIONS)
    )
    exhaustive = ["search", "--exhaustive", "--regions", world / "store", "--model", world / "model"]
    exhaustive += ["--captions", world / "captions.jsonl"]
    code, stored = run(capsys, *exhaustive, "--image-id", photo_world.IDS[2])
    assert code == 0
    shutil.copy(world / "photos" / f"{photo_world.IDS[2]}.png", tmp_path / f"{photo_world.IDS[0]}.png")
    monkeypatch.chdir(tmp_path)
    code, found = run(capsys, *exhaustive, "--image", f"{photo_world.IDS[0]}.png")
    assert code == 0 and ranks(found) == ranks(stored)
    assert found.startswith(
        "photo_0.png, a photo whose regions are found anew (the stored image 'photo_0' has its name)\n"
    )
    code, found = run(capsys, *exhaustive, "--image", "photo_0.png", "--detector", f"grid:{world / 'encoder'}")
    assert code == 0 and ranks(found) == ranks(stored)
    fields = {"projection_dim": 6, "first_stage_trained": True, "region_feature_dim": photo_world.FEATURE_DIM}
    tiny.model(UnicoderVLForImageTextRetrieval, **fields).save_pretrained(world / "model")
    words = ["--model", world / "model", "--captions", world / "captions.jsonl", "--output", world / "index"]
    code, output = run(capsys, "index", world / "store", *words)
    assert code == 0, output
    cache = ["--cache", world / "cache"]
    for index, options in (("index", []), ("images", []), ("images", cache), ("index", cache)):
        if not (world / index).exists():
            assert run(capsys, "index", world / "store", *words[:2], "--output", world / index)[0] == 0
        code, found = run(capsys, "search", "--index", world / index, "--image", "photo_0.png", *options)
        code, stored = run(capsys, "search", "--index", world / index, "--image-id", photo_world.IDS[2])
        assert code == 0 and ranks(found) == ranks(stored)
    assert len(RegionStore(world / "cache")) == 1
    # A first stage that sees the photo itself proposes, and the detector finds the regions that are scored.
    clip = save_clip(world)
    store, captions = RegionStore(world / "store"), photo_world.CAPTIONS
    opened = open_transformers_encoder(str(clip), store, str(world / "photos"))
    build_index(opened, store, world / "by_clip", captions=captions)
    words = ["search", "--index", world / "by_clip", "--model", world / "model", "--candidates", 2, "--top-k", 2]
    code, found = run(capsys, *words, "--image", "photo_0.png")
    code, stored = run(capsys, *words, "--image-id", photo_world.IDS[2], "--photos", world / "photos")
    assert code == 0 and ranks(found) == ranks(stored) and len(ranks(found)) == 2
    scorer = ImageTextScorer.from_pretrained(world / "model", store, verbose=False)
    for image in ("./photo_0.png", Path("photo_0.png"), Image.open("photo_0.png")):
        (hits,) = search([image], SearchIndex(world / "by_clip"), opened, scorer, top_k=2, candidates=2)
        assert [hit.name for hit in hits] == [name for name, _ in ranks(stored)]


def test_ids_that_are_files_too_are_ids_in_a_search(tmp_path, capsys, monkeypatch):
    """In the folder of the photos, where ids are paths; a name that could be both is refused for `--image` alone."""
    world = photo_world.build(tmp_path)
    shutil.rmtree(world / "store")
    monkeypatch.chdir(world / "photos")
    detector = ["--detector", f"grid:{world / 'encoder'}", "-o", "grid_size=2", "-o", "image_size=32"]
    assert run(capsys, "extract", ".", world / "store", *detector, "--ids", "path", "--num-workers", 0)[0] == 0
    exhaustive = ["search", "--exhaustive", "--regions", world / "store", "--model", world / "model"]
    code, output = run(capsys, *exhaustive, photo_world.CAPTIONS[0])
    assert code == 0 and {name for name, _ in ranks(output)} == {f"{name}.png" for name in photo_world.IDS}
    (world / "c.jsonl").write_text(
        "\n".join(json.dumps({"image_id": "photo_0.png", "caption": text}) for text in photo_world.CAPTIONS)
    )
    exhaustive += ["--captions", world / "c.jsonl"]
    code, by_id = run(capsys, *exhaustive, "--image-id", "photo_1.png")
    code, by_file = run(capsys, *exhaustive, "--image", "./photo_1.png")
    assert code == 0 and ranks(by_id) == ranks(by_file)
    code, output = run(capsys, *exhaustive, "--image", "photo_1.png")
    assert code == 1 and "give --image ./photo_1.png for the file, or --image-id photo_1.png" in output


def test_an_image_finds_images_like_it(folder, indices, clip, tmp_path, capsys, monkeypatch):
    """By the similarity of their embeddings, from Python and by the command, whatever the form of the image."""
    encoder, _, store = parts(folder)
    near = indices["images"].embeddings @ indices["images"].embeddings[2]
    wanted = [IMAGES[place] for place in np.argsort(-near, kind="stable")[:3]]
    for image in (IMAGES[2], store[IMAGES[2]]):
        (hits,) = search_similar([image], indices["images"], encoder, top_k=3)
        assert [hit.name for hit in hits] == wanted and wanted[0] == IMAGES[2]
        np.testing.assert_allclose([hit.similarity for hit in hits], np.sort(near)[::-1][:3], atol=1e-6)
        assert all(hit.score == hit.similarity and hit.is_alike for hit in hits)
    words = ["search", "--image-id", IMAGES[2], "--top-k", 3]
    gallery = ["--photos", folder / "photos", "--gallery", tmp_path / "gallery.html"]
    code, output = run(capsys, *words, "--index", folder / "images", *gallery)
    table = [f"{rank:>4}  {similarity:>10.3f}  {name}" for rank, (name, similarity) in enumerate(
        zip(wanted, np.sort(near)[::-1], strict=False), start=1)]  # fmt: skip
    assert code == 0 and output.splitlines()[1:-1] == [
        "rank  similarity",
        *table,
        "Ordered by the similarity of two images in the first stage.",
    ]
    code, output = run(capsys, *words, "--index", folder / "images", "--json")
    assert [hit["matching_score"] for hit in json.loads(output, parse_constant=pytest.fail)["hits"]] == [None] * 3
    page = (tmp_path / "gallery.html").read_text()
    assert "The best 3 of 7 images, ordered by the similarity of two images in the first stage." in page
    assert f"similarity {near.max():.3f}" in page and "score" not in page.partition("<figure")[2].lower()
    code, output = run(capsys, *words, "--index", folder / "images", "--similarity-weight", 1)
    assert code == 1 and "leave --similarity-weight out" in output
    code, output = run(capsys, *words, "--index", folder / "captions", *gallery)
    assert code == 1 and "an image finds captions here" in output
    with pytest.raises(ValueError, match="captions holds captions: give an index of images"):
        search_similar([IMAGES[2]], indices["captions"], encoder)
    with pytest.raises(ValueError, match="was made by the checkpoint"):
        search_similar([IMAGES[2]], indices["images"], clip)
    # CLIP sees photos: those of the store by their ids, and any other as it is.
    build_index(clip, store, tmp_path / "clip")
    photos = ["--photos", folder / "photos"]
    stored = run(capsys, *words, "--index", tmp_path / "clip", *photos)
    assert stored[0] == 0 and IMAGES[2] in stored[1].splitlines()[2]
    new = shutil.copy(folder / "photos" / f"{IMAGES[2]}.png", tmp_path / "new.png")
    found = run(capsys, "search", "--image", new, "--top-k", 3, "--index", tmp_path / "clip")
    assert found == (0, stored[1].replace(IMAGES[2], f"{new}, a photo", 1))
    code, output = run(capsys, *words, "--index", tmp_path / "clip")
    assert code == 1 and "clip looks at photos: give --photos" in output
    store[IMAGES[2]].save(tmp_path / "record.npz")
    code, output = run(capsys, "search", "--image", tmp_path / "record.npz", "--index", tmp_path / "clip")
    assert code == 1 and "clip embeds photos, and the regions of 'image 2' are none: give the photo" in output
    (tmp_path / "text.png").write_text("text")
    code, output = run(capsys, "search", "--image", tmp_path / "text.png", "--index", tmp_path / "clip")
    assert code == 1 and "text.png is no photo that can be read: its 4 bytes" in output
