"""Object classes for a store without, by a classifier that is known by hand; stopped, finished and begun anew."""

import json

import numpy as np
import pytest
from region_stores import files_of, make, write_store

from unicoder_vl_hf import RegionRecord, RegionStore
from unicoder_vl_hf.regions.labelling import label
from unicoder_vl_hf.regions.validation import validate

DETECTOR = {"detector": "vg", "detector_revision": "abc"}


class Classifier:
    """Class = where the feature is largest. `seen` counts the images; `stop` is the one that Ctrl-C meets."""

    def __init__(self, num_classes: int = 8, stop: int | None = None):
        self.provenance = {**DETECTOR, "num_classes": num_classes, "class_names": None}
        self.seen, self.stop = 0, stop

    def classify(self, features):
        if self.seen == self.stop:
            raise KeyboardInterrupt
        self.seen += 1
        return features.argmax(1), np.full(len(features), 0.5, np.float32), None, None


def bare(number: int) -> RegionRecord:
    record = make(number)
    return RegionRecord(record.image_id, features=record.features, boxes=None)


@pytest.fixture
def store(tmp_path):
    return write_store(map(bare, range(10)), tmp_path / "store", **DETECTOR)


def assert_labelled(labelled: RegionStore, store: RegionStore):
    assert list(labelled) == list(store) and list(validate(labelled)) == []
    for image_id, record in labelled.items():
        np.testing.assert_array_equal(record.object_ids, store[image_id].features.argmax(1))
        np.testing.assert_array_equal(record.features, store[image_id].features)


def test_stopped_it_goes_on_without_classifying_again(store, tmp_path):
    whole = label(store, tmp_path / "whole", Classifier(), shard_size=300)
    folder = tmp_path / "labelled"
    with pytest.raises(KeyboardInterrupt):
        label(store, folder, Classifier(stop=8), shard_size=300)
    done = sum(facts["images"] for facts in json.loads((folder / "unfinished.json").read_text())["shards"])
    assert 0 < done < 8
    with pytest.raises(ValueError, match="num_classes=8, not 9: go on with equal settings, begin anew with --restart"):
        label(store, folder, Classifier(num_classes=9), shard_size=300)
    with pytest.raises(ValueError, match="holds an unfinished store"):
        label(store, folder, Classifier(), resume=False, shard_size=300)
    classifier = Classifier()
    assert_labelled(label(store, folder, classifier, shard_size=300), store)
    assert classifier.seen == 10 - done and files_of(folder) == files_of(whole.path)


def test_finished_it_stays_as_it_is(store, tmp_path, caplog):
    folder = label(store, tmp_path / "labelled", Classifier()).path
    before = files_of(folder)
    assert_labelled(label(store, folder, Classifier(stop=0)), store)
    assert f"{folder} is finished, and stays as it is" in caplog.text and files_of(folder) == before
    caplog.clear()
    write_store([bare(10)], store.path, resume=True, **DETECTOR)
    classifier = Classifier()
    assert_labelled(label(RegionStore(store.path), folder, classifier), RegionStore(store.path))
    assert classifier.seen == 1 and "is finished" not in caplog.text


def test_restart_begins_anew(store, tmp_path):
    folder = label(store, tmp_path / "labelled", Classifier()).path
    anew = label(store, folder, Classifier(num_classes=9), restart=True)
    assert anew.provenance["num_classes"] == 9 and not list(tmp_path.glob("*.before-restart"))


@pytest.mark.parametrize("restart", [False, True])
def test_the_store_itself_is_no_place_for_its_labels(store, restart):
    before = files_of(store.path)
    with pytest.raises(ValueError, match="is the store to be labelled: take another folder"):
        label(store, store.path, Classifier(), restart=restart)
    assert files_of(store.path) == before


def test_labels_of_other_images_are_refused(store, tmp_path):
    other = write_store(map(bare, range(20, 23)), tmp_path / "other", **DETECTOR)
    folder = label(other, tmp_path / "labelled", Classifier()).path
    before = files_of(folder)
    with pytest.raises(ValueError, match=r"labelled holds images that .*store does not: begin anew"):
        label(store, folder, Classifier())
    assert files_of(folder) == before
