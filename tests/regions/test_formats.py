"""Readers of foreign formats, on files written by the foreign tools' own calls, with w != h and asymmetric boxes."""

import base64
import csv
import json
from pathlib import Path

import numpy as np
import pytest
from foreign_readers import reader
from places import SHARED

from unicoder_vl_hf import RegionStore
from unicoder_vl_hf.regions.conversion import convert
from unicoder_vl_hf.regions.formats import bottom_up_tsv, detect_format, milvlg_npz, read_records

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the development data is not here: {DATA}")

WIDTH, HEIGHT = 640, 480
BOXES = np.array([[10, 20, 630, 40], [5, 300, 25, 470], [0, 0, 640, 480]], np.float32)
FEATURES = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)


def encode(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array)).decode()


def tsv_row(**changes) -> dict:
    """As bottom-up-attention's generate_tsv.py makes it."""
    row = {
        "image_id": 150367,
        "image_w": WIDTH,
        "image_h": HEIGHT,
        "num_boxes": 3,
        "boxes": encode(BOXES),
        "features": encode(FEATURES),
    }
    return {**row, **changes}


def write_tsv(path: Path, *rows: dict) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, delimiter="\t", fieldnames=list(tsv_row()))
        writer.writerows(rows)
    return path


def write_npz(path: Path, **changes) -> Path:
    """As bottom-up-attention.pytorch's extract_features.py makes it, labels beside `info` in the variant."""
    arrays = {
        "x": FEATURES.astype(np.float16),
        "bbox": BOXES,
        "num_bbox": 3,
        "image_h": HEIGHT,
        "image_w": WIDTH,
        "info": {"objects_id": np.array([1, 2, 3])},
        "objects_id": np.array([7, -1, 0]),
        "objects_conf": np.array([0.5, 0.25, 1], np.float16),
        "attrs_id": np.array([3, 2, 1]),
        "attrs_conf": np.array([0.125, 0.25, 0.5], np.float32),
    }
    arrays |= changes
    np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_bottom_up_tsv(tmp_path):
    path = write_tsv(tmp_path / "trainval.tsv", tsv_row(), tsv_row(image_id="second"))
    first, second = read_records(path)
    assert (first.image_id, second.image_id) == ("150367", "second")
    assert (first.image_width, first.image_height) == (WIDTH, HEIGHT)
    assert np.array_equal(first.boxes, BOXES)
    assert np.array_equal(first.features, FEATURES)
    assert first.features.dtype == np.float32
    for name in ("object_ids", "object_scores", "attribute_ids", "attribute_scores", "class_probabilities"):
        assert getattr(first, name) is None
    np.testing.assert_allclose(first.locations()[0], [10 / 640, 20 / 480, 630 / 640, 40 / 480, 620 * 20 / 640 / 480])


def test_bottom_up_tsv_folders_and_parts(tmp_path):
    write_tsv(tmp_path / "a.tsv.1", tsv_row(image_id="b"))
    write_tsv(tmp_path / "a.tsv.0", tsv_row(image_id="a"))
    (tmp_path / "notes.txt").write_text("not a tsv")
    assert [record.image_id for record in read_records(tmp_path)] == ["a", "b"]
    assert [record.image_id for record in read_records(tmp_path, skip={"a"})] == ["b"]


def test_bottom_up_tsv_is_read_a_line_at_a_time(tmp_path):
    path = write_tsv(tmp_path / "a.tsv", tsv_row(), tsv_row(image_id="bad", num_boxes=4))
    records = read_records(path)
    assert next(records).image_id == "150367"
    with pytest.raises(ValueError, match="line 2"):
        next(records)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_w": HEIGHT, "image_h": WIDTH}, "width and height swapped"),
        ({"image_w": "wide"}, "image_w is b'wide'"),
        ({"image_h": 0}, "image_height is 0"),
        ({"num_boxes": 0}, "num_boxes is 0"),
        ({"num_boxes": 5}, "boxes has 48 bytes, expected 5"),
        ({"boxes": encode(BOXES[:, :3])}, "boxes have shape"),
        ({"boxes": "!!!!"}, "boxes is no base64"),
        ({"features": "AAA"}, "features is no base64"),
        ({"features": ""}, "features has 0 bytes"),
        ({"boxes": encode(BOXES[:, [2, 3, 0, 1]])}, "inverted"),
        ({"boxes": encode(BOXES[:, [1, 0, 3, 2]])}, "outside"),
        ({"features": encode(FEATURES * np.float32("nan"))}, "finite"),
        ({"image_id": ""}, "image_id"),
    ],
)
def test_bottom_up_tsv_errors_name_the_place(changes, says, tmp_path):
    path = write_tsv(tmp_path / "a.tsv", tsv_row(image_id="fine"), tsv_row(**{"image_id": "bad", **changes}))
    with pytest.raises(ValueError, match=says) as error:
        list(reader(bottom_up_tsv)(path))
    assert f"{path}, line 2: " in str(error.value)
    assert "'bad'" in str(error.value) or "image_id" in changes


def test_bottom_up_tsv_of_another_layout_or_cut_short(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("\t".join(["id"] * 10) + "\n")
    with pytest.raises(ValueError, match=r"10 columns.*LXMERT"):
        list(reader(bottom_up_tsv)(path))
    write_tsv(path, tsv_row())
    for length in (3, 20, 60, 200):
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(ValueError, match="line 1"):
            list(reader(bottom_up_tsv)(path))
        write_tsv(path, tsv_row())


def test_milvlg_npz(tmp_path):
    path = write_npz(tmp_path / "COCO_val2014_000000391895.npz")
    (record,) = read_records(path)
    assert record.image_id == "COCO_val2014_000000391895"
    assert (record.image_width, record.image_height) == (WIDTH, HEIGHT)
    assert np.array_equal(record.boxes, BOXES)
    assert record.features.dtype == np.float16
    assert np.array_equal(record.features, FEATURES.astype(np.float16))
    assert record.object_ids.tolist() == [7, -1, 0]
    assert record.object_scores.tolist() == [0.5, 0.25, 1]
    assert record.attribute_ids.tolist() == [3, 2, 1]
    assert record.attribute_scores.tolist() == [0.125, 0.25, 0.5]
    assert record.class_probabilities is None


def test_milvlg_labels_inside_the_pickle(tmp_path):
    bare = dict.fromkeys(("objects_id", "objects_conf", "attrs_id", "attrs_conf"))
    (record,) = reader(milvlg_npz)(write_npz(tmp_path / "a.npz", **bare))
    assert record.object_ids.tolist() == [1, 2, 3]
    assert record.object_scores is record.attribute_ids is record.attribute_scores is None


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("key", ["info", "x", "objects_id"])
def test_milvlg_pickles_are_never_executed(key, tmp_path):
    trace = tmp_path / "executed"
    path = write_npz(tmp_path / "a.npz", **{key: np.array(Bomb(trace), dtype=object)})
    with pytest.raises(ValueError, match=rf"a\.npz, member '{key}'.*pathlib\.Path"):
        list(reader(milvlg_npz)(path))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_w": HEIGHT, "image_h": WIDTH}, "width and height swapped"),
        ({"image_w": np.array([1, 2])}, "image_w is an array of shape"),
        ({"image_h": 0}, "image_height is 0"),
        ({"num_bbox": 4}, "num_bbox is 4, but x has 3 rows"),
        ({"bbox": None}, r"\['bbox'\] missing"),
        ({"bbox": BOXES[:2]}, "boxes have shape"),
        ({"bbox": BOXES[:, [2, 3, 0, 1]]}, "inverted"),
        ({"objects_id": np.array([1, 2])}, "object_ids have shape"),
        ({"objects_conf": np.array([1, 2, 3.0])}, "object_scores hold"),
        ({"x": np.zeros((0, 4)), "num_bbox": 0}, "n >= 1"),
    ],
)
def test_milvlg_errors_name_the_file(changes, says, tmp_path):
    path = write_npz(tmp_path / "bad.npz", **changes)
    with pytest.raises(ValueError, match=says) as error:
        list(reader(milvlg_npz)(path))
    assert str(path) in str(error.value)
    assert "'bad'" in str(error.value)


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_milvlg_files_cut_short(share, tmp_path):
    path = write_npz(tmp_path / "bad.npz")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"bad\.npz"):
        list(reader(milvlg_npz)(path))


def test_detection(tmp_path):
    assert detect_format(write_tsv(tmp_path / "a.tsv", tsv_row())) == "bottom-up-tsv"
    assert detect_format(write_npz(tmp_path / "b.npz")) == "milvlg-npz"
    with pytest.raises(ValueError, match="could be any of"):
        detect_format(tmp_path)
    with pytest.raises(FileNotFoundError):
        detect_format(tmp_path / "nothing")
    other = tmp_path / "other"
    other.mkdir()
    for write in (
        lambda path: np.savez(path / "other.npz", features=FEATURES, boxes=BOXES),
        lambda path: (path / "lxmert.tsv").write_text("\t".join(["1"] * 10)),
        lambda path: (path / "captions.tsv").write_text("a caption\thttp://x\n"),
    ):
        write(other)
        with pytest.raises(ValueError, match="none of the known formats"):
            detect_format(other)
    with pytest.raises(ValueError, match="expected one of"):
        read_records(tmp_path / "a.tsv", "lxmert")


def test_convert_resumes_where_it_stopped(tmp_path):
    source = write_tsv(
        tmp_path / "a.tsv", tsv_row(image_id="a"), tsv_row(image_id="b"), tsv_row(image_id="c", image_w=0)
    )
    options = {"dtype": "float32", "shard_size": 1, "detector": "vg"}
    with pytest.raises(ValueError, match="line 3"):
        convert(source, tmp_path / "store", **options)
    write_tsv(source, tsv_row(image_id="a"), tsv_row(image_id="b"), tsv_row(image_id="c"))
    store = convert(source, tmp_path / "store", resume=True, **options)
    assert list(store) == ["a", "b", "c"]
    assert store.provenance["source_format"] == "bottom-up-tsv"
    assert store.provenance["detector"] == "vg"
    for record in store.values():
        assert np.array_equal(record.features, FEATURES)


@needs_data
def test_the_real_bottom_up_file():
    (record,) = read_records(DATA / "bottom_up")
    assert (record.image_id, record.image_width, record.image_height) == ("150367", 640, 480)
    assert record.features.shape == (36, 2048)
    # Against the field's own way of reading it.
    with open(next((DATA / "bottom_up").glob("*.tsv"))) as file:
        csv.field_size_limit(2**30)
        (row,) = csv.DictReader(file, list(tsv_row()), delimiter="\t")
    boxes = np.frombuffer(base64.b64decode(row["boxes"]), np.float32).reshape(36, 4)
    features = np.frombuffer(base64.b64decode(row["features"]), np.float32).reshape(36, -1)
    assert np.array_equal(record.boxes, boxes)
    assert np.array_equal(record.features, features)


@needs_data
def test_real_flickr8k_regions(tmp_path):
    sample = tmp_path / "sample"
    sample.mkdir()
    files = sorted((DATA / "flickr8k" / "regions").glob("*.npz"))[::80]
    for file in files:
        (sample / file.name).symlink_to(file)
    convert(sample, tmp_path / "store", class_names=[str(k) for k in range(80)])
    store = RegionStore(tmp_path / "store")
    assert len(store) == len(files) == 100
    for file in files:
        record = store[file.stem]
        with np.load(file) as arrays:
            assert np.array_equal(record.features, arrays["x"])
            assert np.array_equal(record.boxes, arrays["bbox"])
            assert np.array_equal(record.object_ids, arrays["objects_id"])
            assert np.array_equal(record.object_scores, arrays["objects_conf"].astype(np.float32))
            assert (record.image_width, record.image_height) == (arrays["image_w"], arrays["image_h"])
    known = json.loads((DATA / "flickr8k" / "dataset_flickr8k.json").read_text())["images"]
    assert set(store) <= {Path(image["filename"]).stem for image in known}
