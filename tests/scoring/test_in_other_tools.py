"""What docs/scoring.md shows of other people's tools, by the real libraries: the page's own lines, on tiny models."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import photo_world
import pytest
import test_docs
import tiny
from datasets.fingerprint import Hasher
from photo_world import CAPTIONS, IDS
from places import ROOT

from unicoder_vl_hf import ImageTextScorer, RegionRecord, RegionStore, UnicoderVLForImageTextRetrieval
from unicoder_vl_hf.scoring import Calibration
from unicoder_vl_hf.search import UnicoderVLDualEncoder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """What the page calls by name, beside the photos and the store of the world."""
    world = photo_world.build(tmp_path_factory.mktemp("tools"))
    (world / "runs").mkdir()
    (world / "model").rename(world / "runs" / "mine-retrieval")
    for name, file in zip(IDS, ("photo.jpg", "other.jpg"), strict=False):
        shutil.copy(world / "photos" / f"{name}.png", world / file)  # told by its content
    return world


@pytest.fixture
def stored(world, monkeypatch) -> np.ndarray:
    """The scores of the page's two captions with the stored images, `(2, M)`, in the folder of the page."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(world / "datasets"))
    scorer = ImageTextScorer.from_pretrained("runs/mine-retrieval", "store", verbose=False)
    return scorer.score(["a dog runs", "a cat sleeps"], IDS)


def block(words: str) -> str:
    (code,) = [code for code in test_docs.blocks(ROOT / "docs" / "scoring.md", "python") if words in code]
    return code


def test_dataset_map(world, stored):
    names: dict = {}
    exec(block("datasets.Dataset"), names)
    wanted = np.diagonal(stored)
    np.testing.assert_allclose(names["scored"]["score"], wanted, rtol=0, atol=1e-5)
    store = RegionStore("store")
    for row, image_id in zip(names["found"]["regions"], IDS, strict=False):
        record = RegionRecord.from_dict(row)
        np.testing.assert_array_equal(record.features, store[image_id].features)
        np.testing.assert_array_equal(record.boxes, store[image_id].boxes)
    scorer, pairs = names["scorer"], np.arange(2)
    direct = names["photos"].map(
        lambda batch: {"score": scorer.score_pairs(batch["caption"], batch["image"], pairs, pairs)}, batched=True
    )
    np.testing.assert_allclose(direct["score"], wanted, rtol=0, atol=1e-5)
    # What was mapped before is taken, in this process and in the next, whatever was done meanwhile.
    again: dict = {}
    exec(block("datasets.Dataset"), again)
    for name in ("found", "scored"):
        assert again[name]._fingerprint == names[name]._fingerprint


def test_fingerprints_change_with_what_matters_alone(world, stored):
    store = RegionStore("store")
    scorer = ImageTextScorer.from_pretrained("runs/mine-retrieval", store, verbose=False)
    before = Hasher.hash(scorer)
    scorer.score(CAPTIONS, [IDS[0], Path("photo.jpg")])
    assert Hasher.hash(scorer) == before
    scorer.processor(text=CAPTIONS, max_length=3, padding="max_length")
    assert Hasher.hash(scorer) == before
    scorer.model.config.calibration = vars(Calibration.fit(np.arange(4.0), np.arange(4) > 1))
    calibrated = Hasher.hash(scorer)
    scorer.match(CAPTIONS, IDS)
    assert Hasher.hash(scorer) == calibrated != before
    scorer.model.matching_head.bias.data += 1
    assert Hasher.hash(scorer) != calibrated
    same, finer = (
        ImageTextScorer.from_pretrained("runs/mine-retrieval", store, detector_options=options, verbose=False)
        for options in (None, {"grid_size": 3})
    )
    assert Hasher.hash(same) == before != Hasher.hash(finer)


def test_mteb_in_two_stages(world, stored, monkeypatch):
    """Its own rankings are ours: the first stage's by similarity, then of the best of these by score."""
    mteb = pytest.importorskip("mteb", reason="mteb is not installed: pip install '.[mteb]'")
    pytest.importorskip("sentence_transformers", reason="it is not installed: pip install '.[sentence-transformers]'")
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    fields = {"projection_dim": 6, "first_stage_trained": True, "region_feature_dim": photo_world.FEATURE_DIM}
    tiny.model(UnicoderVLForImageTextRetrieval, **fields).save_pretrained("runs/search")
    tiny.processor(
        feature_dim=photo_world.FEATURE_DIM, region_provenance=RegionStore("store").provenance
    ).save_pretrained("runs/search")

    class Photos(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Photos",
            description="Six photos.",
            dataset={"path": "none", "revision": "1"},
            type="Any2AnyRetrieval",
            category="t2i",
            modalities=["text", "image"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, num_proc=None, **kwargs):
            photos = datasets.Dataset.from_dict({"id": IDS, "image": [f"photos/{name}.png" for name in IDS]})
            split = {
                "corpus": photos.cast_column("image", datasets.Image()).add_column("modality", ["image"] * len(IDS)),
                "queries": datasets.Dataset.from_dict({"id": ["0", "1", "2"], "text": CAPTIONS}),
                "relevant_docs": {str(row): {IDS[row]: 1} for row in range(3)},
                "top_ranked": None,
            }
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    monkeypatch.setattr(mteb, "get_task", lambda name: Photos())
    code, names = block("import mteb").replace("top_k=100", "top_k=3"), {}
    exec(code.replace("top_k=3), ", 'top_k=3), prediction_folder="reranked", '), names)
    assert len(RegionStore("found")) == len(IDS)
    encoder, scorer = names["first"].encoder, ImageTextScorer.from_pretrained("runs/search", "store", verbose=False)
    near = (
        encoder.embed_captions(CAPTIONS)
        @ UnicoderVLDualEncoder(scorer.model, scorer.processor, scorer.store, "runs/search").embed_images(IDS).T
    )
    scores = scorer.score(CAPTIONS, IDS)
    for folder, values, count in (("ranked", near, 6), ("reranked", scores, 3)):
        (file,) = Path(folder).rglob("*.json")
        found = json.loads(file.read_text())["default"]["test"]
        for row, of_query in enumerate(values):
            candidates = np.argsort(-near[row])[:count]
            assert found[str(row)] == pytest.approx({IDS[at]: float(of_query[at]) for at in candidates}, abs=1e-5)
    assert 0 <= names["reranked"].task_results[0].get_score() <= 1
