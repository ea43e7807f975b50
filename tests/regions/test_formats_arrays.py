"""Readers of the formats of LXMERT, VinVL, BAN, SCAN and FRCNN, on files made by `foreign_arrays`."""

import functools
import importlib
import json
import pickle
import struct
from pathlib import Path

import foreign_arrays as foreign
import numpy as np
import pytest
from foreign_arrays import CLASSES, IMAGES, WRITERS
from foreign_readers import reader

from unicoder_vl_hf import RegionRecord
from unicoder_vl_hf.regions.formats import (
    FORMATS,
    detect_format,
    frcnn_arrow,
    hdf5,
    lxmert_tsv,
    read_records,
    scan_npy,
    vinvl_tsv,
)

NUMBERS = [str(image.number) for image in IMAGES]
FIELDS = ("boxes", "object_ids", "object_scores", "attribute_ids", "attribute_scores", "class_probabilities")


@functools.cache
def all_writers() -> dict:
    """Of this module's formats and of those that `foreign_pickles` makes."""
    try:
        others = importlib.import_module("foreign_pickles").WRITERS
    except ModuleNotFoundError:
        others = {}
    return {**WRITERS, **others}


def write(name: str, folder: Path) -> Path:
    """The example of a format, where what writes it is installed."""
    folder.mkdir(exist_ok=True)
    try:
        return all_writers()[name](folder)
    except ImportError as error:
        pytest.skip(str(error))


def check(record: RegionRecord, image: foreign.Image, *known: str, rows: int | None = None) -> None:
    """That a record holds the fields `known` of an image, and no others. Boxes are pixels if `size` is among them."""
    size = (image.width, image.height) if "size" in known else (None, None)
    assert (record.image_width, record.image_height) == size
    assert np.array_equal(record.features, image.features[:rows])
    assert record.features.dtype == np.float32
    for field in FIELDS:
        value = getattr(record, field)
        if field not in known:
            assert value is None, field
        elif field == "class_probabilities":
            assert value.shape == (len(record), 1600)
            assert np.array_equal(value.argmax(axis=1), image.object_ids)
        elif field == "boxes":
            expected = image.boxes if "size" in known else image.fractions
            np.testing.assert_allclose(value, expected[:rows], rtol=1e-6)
        else:
            assert np.array_equal(value, getattr(image, field)[:rows]), field


def errors_name(path: Path, says: str, read=read_records) -> None:
    with pytest.raises(ValueError, match=says) as error:
        list(read(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", sorted(all_writers()))
def test_each_format_is_told_from_all_others(name, tmp_path):
    path = write(name, tmp_path)
    assert [other for other, module in FORMATS.items() if module.matches(path)] == [name]


@pytest.mark.parametrize("name", WRITERS)
def test_folders_are_told_too(name, tmp_path):
    path = write(name, tmp_path)
    if path.suffix == ".datasets":
        path = path.rename(path.with_suffix(".arrow"))
    assert detect_format(tmp_path) == name
    assert [record.image_id for record in read_records(tmp_path)] == [r.image_id for r in read_records(path)]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    "content", [b"", b"\n", b"a caption\thttp://x\n", b"1" + b"\t1" * 9, b"\x93NUMPY", b"\xff" * 99, b"9" * 9999]
)
def test_other_content_matches_nothing(name, content, tmp_path):
    path = write(name, tmp_path / "right")
    path = path / "features.tsv" if path.is_dir() else path
    other = tmp_path / path.name
    other.write_bytes(content)
    assert not FORMATS[name].matches(other)
    assert not FORMATS[name].matches(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert not FORMATS[name].matches(tmp_path / "empty")


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_cut_short_is_an_error_that_names_it(name, tmp_path):
    source = write(name, tmp_path / "whole")
    target = source / "features.tsv" if source.is_dir() else source
    content = target.read_bytes()
    for length in (0, 7, len(content) // 3, len(content) - 30):
        target.write_bytes(content[:length])
        with pytest.raises(ValueError, match="whole"):
            list(reader(FORMATS[name])(source))


def test_a_line_cut_at_a_whole_number_of_rows(tmp_path):
    """What is left would be features of half the width."""
    path = foreign.write_rows(tmp_path / "a.tsv", [foreign.lxmert_row(IMAGES[0])])
    features = foreign.lxmert_row(IMAGES[0])["features"]
    path.write_text(path.read_text().removesuffix("\n").removesuffix(features[len(features) // 2 :]))
    errors_name(path, "line 1: the line has no end", reader(lxmert_tsv))


def test_an_arrow_stream_cut_between_two_batches(tmp_path):
    path = old_frcnn(tmp_path / "a.arrow", b"")
    path.write_bytes(path.read_bytes().removesuffix(frcnn_arrow.END))
    errors_name(path, "cut short", reader(frcnn_arrow))


@pytest.mark.parametrize("name", WRITERS)
def test_skipped_images_are_not_decoded(name, tmp_path, monkeypatch):
    source = write(name, tmp_path)
    first, *others = [record.image_id for record in read_records(source)]
    made = []
    checked = RegionRecord.__post_init__
    monkeypatch.setattr(RegionRecord, "__post_init__", lambda self: (made.append(self.image_id), checked(self))[1])
    assert [record.image_id for record in read_records(source, skip={first})] == others
    assert made == others


# LXMERT


def test_lxmert(tmp_path):
    records = list(read_records(foreign.write_lxmert(tmp_path)))
    assert [record.image_id for record in records] == [image.name for image in IMAGES]
    for record, image in zip(records, IMAGES, strict=True):
        check(record, image, "size", *FIELDS[:-1])


def test_lxmert_variant_drops_the_background(tmp_path):
    path = foreign.write_lxmert(tmp_path, foreign.lxmert_variant_row)
    for record, image in zip(reader(lxmert_tsv)(path), IMAGES, strict=True):
        check(record, image, "size", *FIELDS)
        # Not a copy of the column beside: the probability of each region's own class.
        probabilities = record.class_probabilities[np.arange(len(record)), record.object_ids]
        assert np.array_equal(probabilities, image.object_scores)


def test_lxmert_writes_what_lxmert_reads(tmp_path):
    records = list(reader(lxmert_tsv)(foreign.write_lxmert(tmp_path)))
    path = tmp_path / "ours.tsv"
    lxmert_tsv.write(records, path)
    for item, image in zip(foreign.load_obj_tsv(path), IMAGES, strict=True):
        assert (item["img_id"], item["img_h"], item["img_w"]) == (image.name, image.height, image.width)
        for key, field in [
            ("objects_id", "object_ids"),
            ("objects_conf", "object_scores"),
            ("attrs_id", "attribute_ids"),
            ("attrs_conf", "attribute_scores"),
            ("boxes", "boxes"),
            ("features", "features"),
        ]:
            assert np.array_equal(item[key], getattr(image, field)), key
    assert path.read_bytes() == (tmp_path / "val2014_obj36.tsv").read_bytes().replace(b"\r\n", b"\n")


def test_lxmert_writes_unknown_as_none(tmp_path):
    features = np.arange(8, dtype=np.float16).reshape(2, 4)
    boxes = np.array([[-0.5, 0, 4, 8], [1, 2, 3, 8.75]], np.float32)
    record = RegionRecord("a", image_width=4, image_height=8, boxes=boxes, features=features)
    lxmert_tsv.write([record], tmp_path / "a.tsv")
    (item,) = foreign.load_obj_tsv(tmp_path / "a.tsv")
    assert item["objects_id"].tolist() == item["attrs_id"].tolist() == [-1, -1]
    assert item["objects_conf"].tolist() == item["attrs_conf"].tolist() == [0, 0]
    assert item["boxes"].tolist() == [[0, 0, 4, 8], [1, 2, 3, 8]]  # LXMERT refuses boxes that are not inside
    (again,) = reader(lxmert_tsv)(tmp_path / "a.tsv")
    assert np.array_equal(again.features.astype(np.float16), features)
    assert again.object_ids is again.object_scores is again.attribute_ids is again.attribute_scores is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_width": None, "image_height": None, "boxes": None}, "'bad': the boxes must be known"),
        ({"image_width": None, "image_height": None, "boxes": np.zeros((1, 4))}, "'bad': the image size must be known"),
        ({"image_id": "bad\tname"}, "holds a tab"),
    ],
)
def test_lxmert_writes_whole_files_or_none(changes, says, tmp_path):
    whole = {"image_width": 4, "image_height": 8, "boxes": np.zeros((1, 4)), "features": np.zeros((1, 3))}
    path = tmp_path / "a.tsv"
    with pytest.raises(ValueError, match=says):
        lxmert_tsv.write([RegionRecord("good", **whole), RegionRecord(**{"image_id": "bad", **whole, **changes})], path)
    assert not list(tmp_path.iterdir())
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"a\.tsv exists already"):
        lxmert_tsv.write([RegionRecord("good", **whole)], path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"img_h": 640, "img_w": 360}, "width and height swapped"),
        ({"img_h": "high"}, "img_h is b'high'"),
        ({"num_boxes": 0}, "num_boxes is 0"),
        ({"num_boxes": -3}, "num_boxes is -3"),
        ({"num_boxes": 2}, "objects_id has 24 bytes, expected 2 equal rows of int64"),
        ({"objects_id": foreign.encode(np.arange(3, dtype=np.int32))}, "objects_id has 12 bytes, expected 3"),
        ({"objects_id": foreign.encode(np.arange(6))}, r"object_ids have shape \(6,\)"),
        ({"objects_conf": foreign.encode(np.full(3, 7, np.float32))}, "object_scores hold 7"),
        ({"boxes": foreign.encode(IMAGES[0].boxes[:, [1, 0, 3, 2]])}, "outside"),
        ({"features": "no base64"}, "features is no base64"),
    ],
)
def test_lxmert_errors_name_the_place(changes, says, tmp_path):
    path = foreign.write_rows(tmp_path / "a.tsv", [{**foreign.lxmert_row(IMAGES[0]), **changes}])
    errors_name(path, f"line 1: Image '{IMAGES[0].name}': .*{says}", reader(lxmert_tsv))


def test_lxmert_of_another_number_of_columns(tmp_path):
    row = foreign.lxmert_row(IMAGES[0]) | {"more": "x"}
    errors_name(foreign.write_rows(tmp_path / "a.tsv", [row]), "11 columns, expected img_id, img_h", reader(lxmert_tsv))


# VinVL

read_vinvl = functools.partial(reader(vinvl_tsv), class_names=CLASSES)


def test_vinvl(tmp_path):
    records = list(read_vinvl(foreign.write_vinvl(tmp_path)))
    assert [record.image_id for record in records] == NUMBERS
    for record, image in zip(records, IMAGES, strict=True):
        check(record, image, "size", "boxes", "object_ids", "object_scores")


def test_vinvl_captioning_layout_knows_no_size(tmp_path):
    records = list(read_vinvl(foreign.write_vinvl_captioning(tmp_path)))
    assert [record.image_id for record in records] == NUMBERS
    for record, image in zip(records, IMAGES, strict=True):
        check(record, image, "boxes", "object_ids", "object_scores")


def test_vinvl_without_class_names_or_labels(tmp_path):
    source = foreign.write_vinvl(tmp_path)
    for record, image in zip(reader(vinvl_tsv)(source), IMAGES, strict=True):
        check(record, image, "size", "boxes", "object_scores")
    (tmp_path / "predictions.tsv").unlink()
    for record, image in zip(read_vinvl(source), IMAGES, strict=True):
        check(record, image, "boxes")


def objects(image: foreign.Image, change) -> dict:
    """A label file whose objects were changed."""
    return {**foreign.vinvl_label(image), "objects": change(foreign.vinvl_objects(image))}


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found[:-1],
        lambda found: found[::-1],
        lambda found: [{**entry, "rect": entry["rect"][::-1]} for entry in found],
        lambda found: [{"class": entry["class"], "conf": entry["conf"]} for entry in found],
        lambda found: [{**entry, "rect": ["left", "top", "right", "bottom"]} for entry in found],
        lambda found: [{**entry, "rect": [10**400] * 4} for entry in found],
        lambda found: [],
    ],
    ids=["fewer", "another order", "other boxes", "no boxes", "no numbers", "no such numbers", "none"],
)
@pytest.mark.parametrize("sizes", [True, False])
def test_vinvl_labels_that_are_not_of_these_regions_are_not_taken(change, sizes, tmp_path):
    def label(image):
        return objects(image, change) if sizes else change(foreign.vinvl_objects(image))

    for record, image in zip(read_vinvl(foreign.write_vinvl(tmp_path, label)), IMAGES, strict=True):
        check(record, image, "boxes", *["size"] * sizes)


def test_vinvl_labels_in_another_order_of_images(tmp_path):
    source = foreign.write_vinvl(tmp_path)
    lines = (source / "predictions.tsv").read_text().splitlines()
    (source / "predictions.tsv").write_text("\n".join([lines[2], lines[0], "other\t[]", lines[1]]) + "\n")
    for record, image in zip(read_vinvl(source), IMAGES, strict=True):
        check(record, image, "size", "boxes", "object_ids", "object_scores")
    (source / "predictions.tsv").write_text(lines[1] + "\n")
    known = [record.object_ids is not None for record in read_vinvl(source)]
    assert known == [False, True, False]


def test_vinvl_labels_are_read_once(tmp_path):
    """In any order of images: looking back does not lose the place, from which on nothing was read yet."""
    path = tmp_path / "predictions.tsv"
    path.write_bytes(b"a\t1\nb\t2\nc\t3\nd\t4\n")
    passed = {}
    with path.open("rb") as file:
        assert vinvl_tsv._find(file, passed, b"c") == b"3\n"
        assert (passed, file.tell()) == ({b"a": 0, b"b": 4}, 12)
        assert vinvl_tsv._find(file, passed, b"a") == b"1\n"
        assert (passed, file.tell()) == ({b"b": 4}, 12)
        assert vinvl_tsv._find(file, passed, b"d") == b"4\n"
        assert vinvl_tsv._find(file, passed, b"e") is None
    assert passed == {b"b": 4}


def test_vinvl_height_before_width(tmp_path):
    """A script that many used puts the height of the box into column 2052 and its width into 2053."""

    def swapped(image):
        return foreign.vinvl_features(image)[:, [*range(foreign.DIM + 4), -1, -2]]

    rows = [[str(image.number), str(len(image.boxes)), foreign.encode(swapped(image))] for image in IMAGES]
    for record, image in zip(
        reader(vinvl_tsv)(foreign.tsv_writer(tmp_path / "features.tsv", rows)), IMAGES, strict=True
    ):
        check(record, image, "boxes")


def test_vinvl_rectangles_beyond_the_image(tmp_path):
    """The features were clipped to the image, the labels not."""

    def label(image):
        outside = [[-9, -9, image.width + 9, image.height + 9], *image.boxes[1:].tolist()]
        return objects(image, lambda found: [{**e, "rect": r} for e, r in zip(found, outside, strict=True)])

    source = foreign.write_vinvl(tmp_path, label)
    whole = np.array([0, 0, 1, 1], np.float32)
    rows = []
    for image in IMAGES:
        features = foreign.vinvl_features(image)
        features[0, -6:] = [*whole, 1, 1]
        rows.append([str(image.number), str(len(image.boxes)), foreign.encode(features)])
    foreign.tsv_writer(tmp_path / "features.tsv", rows)
    for record, image in zip(read_vinvl(source), IMAGES, strict=True):
        assert np.array_equal(record.object_ids, image.object_ids)


def vinvl_line(key="k", n="3", features=None) -> list[str]:
    return [key, n, foreign.encode(foreign.vinvl_features(IMAGES[0]) if features is None else features)]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (vinvl_line(n="0"), "num_boxes is 0"),
        (vinvl_line(n="5"), "features has 264 bytes, expected 5"),
        (vinvl_line(features=IMAGES[0].features), "features end in .* expected x1, y1, x2, y2, width and height"),
        (vinvl_line(features=foreign.vinvl_features(IMAGES[0])[:, :3]), "features end in"),
        (vinvl_line(features=foreign.vinvl_features(IMAGES[0])[:, [*range(16), 17, 16, 18, 19, 20, 21]]), "features"),
        (["k", '{"num_boxes": 3, "features": "AAAA"'], "the second column is no JSON"),
        (["k", '{"num_boxes": "x", "features": "AAAA"}'], "num_boxes is b'x'"),
        (["k", '{"features": "AAAA"}'], "expected num_boxes and features"),
        (["k", "[" * 100_000 + '"features": "'], "the second column is no JSON"),
        (["k", "3", "AAAA", "more"], "4 columns"),
    ],
)
def test_vinvl_errors_name_the_place(line, says, tmp_path):
    good = {"num_boxes": 3, "features": vinvl_line()[2]}
    path = foreign.tsv_writer(tmp_path / "features.tsv", [["good", json.dumps(good)], line])
    errors_name(path, f"line 2: Image 'k': .*{says}", reader(vinvl_tsv))


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ({"image_w": "wide", "image_h": 1, "objects": []}, "image_w, image_h are"),
        ({"image_w": 640, "objects": []}, "image_w, image_h are"),
        ({"image_w": 10**400, "image_h": 1, "objects": []}, "image_w, image_h are"),
        ({"image_w": 0, "image_h": 1, "objects": []}, "image_width is 0"),
        ({"labels": []}, "expected a list of objects"),
        (["word"], "expected a list of objects"),
        (3, "expected a list of objects"),
        ([{**entry, "class": "unicorn"} for entry in foreign.vinvl_objects(IMAGES[0])], "class is 'unicorn'"),
        ([{**entry, "class": []} for entry in foreign.vinvl_objects(IMAGES[0])], "class is"),
        ([{**entry, "conf": 2} for entry in foreign.vinvl_objects(IMAGES[0])], "object_scores hold 2"),
    ],
)
def test_vinvl_errors_of_labels_name_the_place(label, says, tmp_path):
    source = foreign.write_vinvl(tmp_path, lambda image: label)
    with pytest.raises(ValueError, match=rf"features\.tsv, line 1: Image '{NUMBERS[0]}': .*{says}"):
        list(read_vinvl(source))


def test_vinvl_cut_between_two_lines(tmp_path):
    source = foreign.write_vinvl(tmp_path)
    lines = (source / "features.tsv").read_bytes().splitlines(keepends=True)
    (source / "features.tsv").write_bytes(b"".join(lines[:2]))
    with pytest.raises(ValueError, match=r"lineidx ends with .*features\.tsv has \d+ bytes: one of them was cut short"):
        list(reader(vinvl_tsv)(source))
    (source / "features.lineidx").unlink()
    assert len(list(reader(vinvl_tsv)(source))) == 2


# BAN, ReGAT


def test_hdf5(tmp_path):
    pytest.importorskip("h5py")
    records = list(read_records(foreign.write_hdf5(tmp_path)))
    assert [record.image_id for record in records] == NUMBERS
    for record, image in zip(records, IMAGES, strict=True):
        check(record, image, "boxes")


def test_hdf5_of_a_fixed_number_of_regions(tmp_path):
    pytest.importorskip("h5py")
    records = list(read_records(foreign.write_hdf5_fixed(tmp_path)))
    assert [record.image_id for record in records] == NUMBERS[::-1]
    for record, image in zip(records, reversed(IMAGES), strict=True):
        check(record, image, "boxes", rows=2)


@pytest.mark.parametrize("kind", ["json", "pkl"])
def test_hdf5_index_from_elsewhere(kind, tmp_path):
    pytest.importorskip("h5py")
    path = foreign.write_hdf5(tmp_path)
    (tmp_path / "val_imgid2idx.pkl").unlink()
    errors_name(path, r"none of \['val_imgid2idx\.pkl', 'val_imgid2idx\.json'")
    index = tmp_path / f"other.{kind}"
    index.write_bytes(json.dumps({"b": 2, "a": 0}).encode() if kind == "json" else pickle.dumps({"b": 2, "a": 0}))
    first, last = reader(hdf5)(path, index=index)
    assert (first.image_id, last.image_id) == ("a", "b")
    check(last, IMAGES[2], "boxes")


class Bomb:
    """Makes a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"a": 3}, "its row is 3"),
        ({"a": -1}, "its row is -1"),
        ({"a": 0, "b": 0}, "'b' has row 0"),
        ({"a": "0"}, "'a' has row '0'"),
        ({"a": 0.5}, "'a' has row 0.5"),
        ("a", "holds a str"),
    ],
)
@pytest.mark.parametrize("writer", [foreign.write_hdf5, foreign.write_hdf5_fixed])
def test_hdf5_errors_of_the_index(writer, index, says, tmp_path):
    pytest.importorskip("h5py")
    path = writer(tmp_path)
    (tmp_path / f"{path.stem}_imgid2idx.pkl").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match=rf"val.*{says}"):
        list(reader(hdf5)(path))


def test_hdf5_index_is_not_executed(tmp_path):
    pytest.importorskip("h5py")
    path = foreign.write_hdf5(tmp_path)
    (tmp_path / "val_imgid2idx.pkl").write_bytes(pickle.dumps({"a": Bomb(tmp_path / "executed")}))
    with pytest.raises(ValueError, match=r"val_imgid2idx\.pkl"):
        list(reader(hdf5)(path))
    assert not (tmp_path / "executed").exists()


def replace(path: Path, name: str, data, **options) -> Path:
    """Another dataset of this name, or none."""
    import h5py

    with h5py.File(path, "a") as file:
        del file[name]
        if data is not None:
            file.create_dataset(name, data=data, **options)
    return path


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("image_features", None, "there is no image_features"),
        ("image_features", np.zeros(9), "image_features is .* expected numbers of 2 or 3 dimensions"),
        ("image_features", np.array([[b"x"]]), "image_features is .* expected numbers"),
        ("image_features", np.full((9, 4), np.nan, np.float32), "finite"),
        ("spatial_features", np.zeros((2, 6)), "boxes have shape"),
        ("spatial_features", np.array([[0.5, 0.5, 0.1, 0.1, 0.4, 0.4]] * 9), "inverted"),
        ("pos_boxes", None, "pos_boxes"),
        ("pos_boxes", np.array([[3, 0]] * 3), r"pos_boxes is \[3, 0\]"),
        ("pos_boxes", np.array([[0, 10]] * 3), r"pos_boxes is \[0, 10\], expected rows within 0\.\.9"),
        ("pos_boxes", np.array([[-1, 3]] * 3), r"pos_boxes is \[-1, 3\]"),
        ("pos_boxes", np.array([[0.5, 3]] * 3), "."),
    ],
)
def test_hdf5_errors_name_the_file(name, data, says, tmp_path):
    pytest.importorskip("h5py")
    errors_name(replace(foreign.write_hdf5(tmp_path), name, data), says, reader(hdf5))


def test_hdf5_that_promises_terabytes(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = foreign.write_hdf5(tmp_path)
    # Of many regions, or of one in a chunk that must be read whole.
    for last, options in ((2**31 - 1, {}), (1, {"chunks": (2**24, 16)})):
        with h5py.File(path, "a") as file:
            del file["image_features"]
            file.create_dataset("image_features", (2**40, 16), "f", **options)
            file["pos_boxes"][0] = [0, last]
        errors_name(path, "takes .* bytes, expected", reader(hdf5))


def test_hdf5_pixels_without_a_size_are_no_boxes(tmp_path):
    pytest.importorskip("h5py")
    path = replace(foreign.write_hdf5(tmp_path), "spatial_features", None)
    for record, image in zip(reader(hdf5)(path), IMAGES, strict=True):
        check(record, image)


def test_hdf5_missing_library_names_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "a.hdf5"
    path.write_bytes(hdf5.SIGNATURE)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    assert hdf5.matches(path)
    with pytest.raises(ImportError, match=r"'\.\[hdf5\]'"):
        list(reader(hdf5)(path))


# SCAN


@pytest.mark.parametrize("repeat", [1, 5])
def test_scan(repeat, tmp_path):
    records = list(read_records(foreign.write_scan(tmp_path, repeat)))
    assert [record.image_id for record in records] == ["0", "1", "2"]
    for record, image in zip(records, IMAGES, strict=True):
        check(record, image, rows=2)


@pytest.mark.parametrize("repeat", [1, 5])
@pytest.mark.parametrize("kind", ["txt", "json"])
def test_scan_names(repeat, kind, tmp_path):
    path = foreign.write_scan(tmp_path, repeat)
    index = tmp_path / "dev_ids.txt"
    if kind == "json":
        index = tmp_path / "names.json"
        index.write_text(json.dumps(NUMBERS))
    assert [record.image_id for record in reader(scan_npy)(path, index=index)] == NUMBERS
    assert [record.image_id for record in reader(scan_npy)(path, skip={NUMBERS[1]}, index=index)] == NUMBERS[::2]
    for names, says in ((["a", "b"], "has 2 names, but .* has 3 images"), ([], "names no image")):
        index.write_text(json.dumps(names) if kind == "json" else "".join(f"{name}\n" for name in names))
        with pytest.raises(ValueError, match=f"{index.name} {says}"):
            list(reader(scan_npy)(path, index=index))


def test_scan_five_different_images_are_five(tmp_path):
    np.save(tmp_path / "dev_ims.npy", np.arange(5 * 2 * 3, dtype=np.float32).reshape(5, 2, 3))
    records = list(reader(scan_npy)(tmp_path))
    assert [record.image_id for record in records] == ["0", "1", "2", "3", "4"]
    assert records[4].features.tolist() == [[24, 25, 26], [27, 28, 29]]


def test_scan_is_not_read_into_memory(tmp_path):
    record = next(reader(scan_npy)(foreign.write_scan(tmp_path)))
    base = record.features
    while isinstance(base, np.ndarray):
        base = base.base
    assert "mmap" in repr(base.obj if isinstance(base, memoryview) else base)


def npy_header(shape: str, descr: str = "<f4") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (npy_header(f"({2**40}, 36, 2048)"), "has 0 bytes of data"),
        (npy_header("(1, 2, 3)", "|O") + pickle.dumps(0), "pickled int"),
        (npy_header("(4, 3)") + bytes(48), "expected .images, regions, D."),
        (npy_header("(1, 2, 3)") + b"\xff" * 24, "finite"),
        (npy_header("(1, 0, 3)"), "n >= 1"),
        (b"", "is empty"),
    ],
)
def test_scan_errors_name_the_file(content, says, tmp_path):
    path = tmp_path / "dev_ims.npy"
    path.write_bytes(content)
    errors_name(path, says, reader(scan_npy))


def test_scan_repeats_all_or_none(tmp_path):
    rows = np.repeat(np.arange(12, dtype=np.float32).reshape(2, 2, 3), 5, axis=0)
    rows[7] += 1
    np.save(tmp_path / "dev_ims.npy", rows)
    errors_name(tmp_path / "dev_ims.npy", "Image '1': rows 5 to 9 differ", reader(scan_npy))


def test_scan_several_splits_need_a_choice(tmp_path):
    np.save(tmp_path / "test_ims.npy", np.load(foreign.write_scan(tmp_path)))
    errors_name(tmp_path, "has 2 files", reader(scan_npy))


# Hugging Face's FRCNN


def test_frcnn(tmp_path):
    records = list(read_records(foreign.write_frcnn(tmp_path)))
    assert [record.image_id for record in records] == NUMBERS
    for record, image in zip(records, IMAGES, strict=True):
        check(record, image, *FIELDS[:-1])
        assert len(record) == len(image.boxes) < foreign.SLOTS  # and not the padding


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"preds_per_image": np.array([0])}, "preds_per_image is 0, expected 1 to 5"),
        ({"preds_per_image": np.array([6])}, "preds_per_image is 6"),
        ({"boxes": np.full((1, 5, 4), 7.0)}, "expected fractions in 0..1"),
        ({"obj_ids": np.full((1, 5), 0.5)}, "object_ids hold 0.5"),
        ({"obj_probs": np.full((1, 5), np.nan)}, "finite"),
    ],
)
def test_frcnn_errors_name_the_file(changes, says, tmp_path):
    path = foreign.write_frcnn(tmp_path, foreign.frcnn_output(IMAGES[0], **changes))
    errors_name(path, f"Image '{NUMBERS[0]}': .*{says}", reader(frcnn_arrow))


def old_frcnn(path: Path, payload: bytes, **changes) -> Path:
    """As `datasets` 1 wrote it: the type of the nested lists is a pickle."""
    import pyarrow as pa

    image = IMAGES[1]
    out = foreign.frcnn_output(image)
    nested = {"boxes", "roi_features"}
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payload}
    columns = {name: pa.array(value.tolist() if value.ndim > 1 else value) for name, value in out.items()}
    columns |= changes
    schema = pa.schema(
        [pa.field(name, column.type, metadata=metadata if name in nested else None) for name, column in columns.items()]
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch(list(columns.values()), schema=schema))
    return path


def test_frcnn_of_old_versions_is_read_and_not_executed(tmp_path):
    trace = tmp_path / "executed"
    (record,) = read_records(old_frcnn(tmp_path / "old.arrow", pickle.dumps(Bomb(trace))))
    check(record, IMAGES[1], *FIELDS[:-1])
    assert not trace.exists()


def test_frcnn_unknown_values_are_errors(tmp_path):
    import pyarrow as pa

    boxes = pa.array([[[0, 0, 1, None], [0, 0, 1, 1], *[[0, 0, 0, 0]] * 3]], pa.list_(pa.list_(pa.float32())))
    for name, column, says in [
        ("boxes", boxes, "finite"),
        ("boxes", pa.array([None], boxes.type), "reshape"),
        ("img_id", pa.array([None], pa.int32()), "img_id is unknown"),
        ("preds_per_image", pa.array([np.inf]), "infinity"),
    ]:
        errors_name(old_frcnn(tmp_path / "a.arrow", b"", **{name: column}), says, reader(frcnn_arrow))


def test_frcnn_offsets_beyond_the_data_do_not_crash(tmp_path):
    path = old_frcnn(tmp_path / "a.arrow", b"")
    offsets = struct.pack("<6i", 0, 4, 8, 12, 16, 20)
    content = path.read_bytes()
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, struct.pack("<6i", 0, 4, 8, 12, 16, 2**30)))
    errors_name(path, "offset", reader(frcnn_arrow))


def test_frcnn_missing_columns(tmp_path):
    import pyarrow as pa

    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, pa.schema({"x": pa.int8()})):
        pass
    assert not frcnn_arrow.matches(tmp_path / "a.arrow")
    errors_name(tmp_path / "a.arrow", "'img_id'.* missing", reader(frcnn_arrow))
