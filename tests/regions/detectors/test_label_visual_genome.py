"""From photos to labels: the classifier of the detector that found the regions gives their classes again."""

import dataclasses
import json

import numpy as np
import pytest

from unicoder_vl_hf import RegionStore
from unicoder_vl_hf.cli import main
from unicoder_vl_hf.regions.conversion import write_store

pytest.importorskip("torchvision")

import torch
from PIL import Image
from visual_genome_files import Reference, frcnn_weights, small_yaml, write_files


@pytest.fixture
def detector(tmp_path):
    torch.manual_seed(0)
    return write_files(tmp_path / "frcnn", small_yaml(), frcnn_weights(Reference(small_yaml()).eval()))


def test_labels_are_those_of_the_detector(detector, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for name, shape in (("a", (60, 90, 3)), ("b", (80, 50, 3))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(tmp_path / "photos" / f"{name}.png")
    family = f"visual-genome:{detector}"
    options = ["-o", "max_regions=5", "-o", "min_regions=5", "--num-workers", "0", "--dtype", "float32"]
    extract = ["extract", str(tmp_path / "photos"), str(tmp_path / "store"), "--detector", family, *options]
    assert main(extract) == 0, capsys.readouterr().err
    store = RegionStore(tmp_path / "store")
    told = store.provenance
    names = {key: told[key] for key in ("detector", "detector_revision", "box_type", "thresholds", "dtype")}
    write_store(without_classes(store), tmp_path / "bare", **names)

    assert main(["label", str(tmp_path / "bare"), str(tmp_path / "labelled"), "--detector", family]) == 0
    labelled = RegionStore(tmp_path / "labelled")
    for image_id, record in store.items():
        assert record.num_regions == 5
        np.testing.assert_array_equal(labelled[image_id].object_ids, record.object_ids)
        np.testing.assert_allclose(labelled[image_id].object_scores, record.object_scores, rtol=1e-5)
        np.testing.assert_array_equal(labelled[image_id].attribute_ids, record.attribute_ids)
    assert labelled.provenance["num_classes"] == told["num_classes"]
    assert json.loads(json.dumps(labelled.provenance["thresholds"])) == told["thresholds"]

    write_store(without_classes(store), tmp_path / "foreign", **names | {"detector_revision": "another"})
    assert main(["label", str(tmp_path / "foreign"), str(tmp_path / "wrong"), "--detector", family]) == 1
    assert "another, but this classifier is of" in capsys.readouterr().err


def without_classes(store):
    unknown = dict.fromkeys(("object_ids", "object_scores", "attribute_ids", "attribute_scores"))
    return (dataclasses.replace(record, **unknown) for record in store.values())
