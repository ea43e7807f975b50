"""What docs/scoring.md shows of other people's tools, by the real libraries: the page's own lines, on tiny models."""

import shutil
from pathlib import Path

import numpy as np
import photo_world
import pytest
import test_docs
from datasets.fingerprint import Hasher
from photo_world import CAPTIONS, IDS
from places import ROOT

from unicoder_vl_hf import ImageTextScorer, RegionRecord, RegionStore
from unicoder_vl_hf.scoring import Calibration


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
