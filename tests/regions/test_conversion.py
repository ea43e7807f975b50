"""Foreign files → stores: by one process or two, resumed, renamed, and joined with captions."""

import base64
import dataclasses
import json
import zlib
from contextlib import suppress

import numpy as np
import pytest
from foreign_arrays import IMAGES, WRITERS as ARRAYS
from foreign_pickles import WRITERS as PICKLES

from unicoder_vl_hf import RegionRecord, RegionStore, RegionStoreWriter, files
from unicoder_vl_hf.data.captions import join, read_captions
from unicoder_vl_hf.data.image_ids import id_mapping
from unicoder_vl_hf.files import locked
from unicoder_vl_hf.regions import conversion
from unicoder_vl_hf.regions.conversion import convert, export
from unicoder_vl_hf.regions.formats import FORMATS, detect_format, read_records
from unicoder_vl_hf.regions.labelling import label

WRITERS = ARRAYS | PICKLES
# What makes the ids of a format those of Karpathy's file, where they are not already.
NUMBERS = "{captions}:cocoid"
IDS = {
    "bottom-up-tsv": NUMBERS,
    "vinvl-tsv": NUMBERS,
    "hdf5": NUMBERS,
    "frcnn-arrow": NUMBERS,
    "scan-npy": "{captions}:row",
    "mmf-lmdb": "stem",
}


@pytest.fixture
def karpathy(tmp_path):
    images = [
        {
            "filename": f"{image.name}.jpg",
            "imgid": row,
            "cocoid": image.number,
            "split": "val",
            "sentences": [{"raw": f"caption {row}", "sentid": row, "imgid": row}],
        }
        for row, image in enumerate(IMAGES)
    ]
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"dataset": "coco", "images": images}))
    return path


def test_every_format_has_a_fixture():
    assert FORMATS.keys() == WRITERS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_joins_with_karpathy(name, karpathy, tmp_path):
    source = WRITERS[name](tmp_path)
    assert detect_format(source) == name
    rule = IDS.get(name)
    rename = None if rule is None else id_mapping(rule.format(captions=karpathy))
    store = convert(source, tmp_path / "store", rename=rename)
    assert store.provenance["source_format"] == name
    _, report = join(read_captions(karpathy), store)
    assert (report.matched, report.missing, report.unused) == (len(IMAGES), 0, 0)
    assert sorted(store) == sorted(image.name for image in IMAGES)
    if rule is None:
        return
    plain = convert(source, tmp_path / "plain")
    with pytest.raises(ValueError, match=IMAGES[0].name):
        join(read_captions(karpathy), plain)


def write_lines(path, numbers, damaged=None):
    with path.open("w") as file:
        for number in numbers:
            features = np.full((2, 4), number, np.float32)
            boxes = np.array([[0, 0, number, 10], [1, 2, 3, 4]], np.float32)
            fields = [number, 100, 60, 2, base64.b64encode(boxes).decode(), base64.b64encode(features).decode()]
            if number == damaged:
                fields[5] = fields[5][:-8]
            file.write("\t".join(map(str, fields)) + "\n")
    return path


def assert_holds(store, numbers):
    assert len(store) == len(numbers)
    for number in numbers:
        record = store[str(number)]
        assert (record.features == number).all() and record.boxes[0, 2] == number


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_share_the_images(workers, tmp_path):
    source = write_lines(tmp_path / "features.tsv", range(1, 30))
    store = convert(source, tmp_path / "store", workers=workers, detector="vg", detector_revision="1")
    assert_holds(store, range(1, 30))
    assert (store.provenance["detector"], store.provenance["source_format"]) == ("vg", "bottom-up-tsv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.tsv", "store"]


def test_more_workers_than_images(tmp_path):
    source = write_lines(tmp_path / "features.tsv", [1])
    assert_holds(convert(source, tmp_path / "store", workers=2), [1])
    with pytest.raises(ValueError, match="holds a store"):
        convert(source, tmp_path / "store", workers=2, resume=False)


def test_parts_whose_removal_was_interrupted(tmp_path):
    source = write_lines(tmp_path / "features.tsv", range(1, 6))
    convert(source, tmp_path / "store", workers=2)
    (tmp_path / ".store.parts").mkdir()
    assert_holds(convert(source, tmp_path / "store", workers=2, resume=True), range(1, 6))
    assert not (tmp_path / ".store.parts").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_resuming_after_an_error_reads_no_image_twice(workers, tmp_path):
    source = write_lines(tmp_path / "features.tsv", range(1, 30), damaged=20)
    with pytest.raises(ValueError, match=r"features\.tsv, line 20: Image '20': features"):
        convert(source, tmp_path / "store", workers=workers, shard_size=100)
    with pytest.raises((ValueError, FileNotFoundError)):
        RegionStore(tmp_path / "store")
    write_lines(source, range(1, 30))
    with pytest.raises(ValueError, match="and resume=False refuses both"):
        convert(source, tmp_path / "store", workers=workers, shard_size=100, resume=False)
    assert_holds(convert(source, tmp_path / "store", workers=workers, shard_size=100), range(1, 30))


def test_a_failure_before_the_first_shard_binds_nobody(tmp_path):
    source = write_lines(tmp_path / "features.tsv", range(1, 6), damaged=4)
    for options in ({}, {"num_classes": 7}):
        with pytest.raises(ValueError, match="line 4"):
            convert(source, tmp_path / "store", **options)
        assert list(tmp_path.iterdir()) == [source]
    write_lines(source, range(1, 6))
    assert_holds(convert(source, tmp_path / "store", num_classes=8), range(1, 6))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_start_leaves_what_is_not_its_own(workers, tmp_path, monkeypatch):
    source, folder = write_lines(tmp_path / "features.tsv", [1], damaged=1), tmp_path / "store"

    def share(self, parts, workers):
        (parts / "0").mkdir(parents=True)
        raise ValueError("line 1")

    monkeypatch.setattr(conversion._Task, "share", share)
    folder.mkdir()
    (folder / "notes.txt").touch()
    with pytest.raises(ValueError, match="line 1"):
        convert(source, folder, workers=workers)
    assert sorted(tmp_path.rglob("*")) == [source, folder, folder / "notes.txt"]
    monkeypatch.setattr(files, "LOCK_PATIENCE", 0)
    (folder / conversion.PLAN).touch()
    with locked(folder), pytest.raises(ValueError, match="is being written by another process"):
        convert(source, folder, workers=workers)
    assert (folder / conversion.PLAN).exists()  # of that process


@pytest.mark.parametrize("finished", [False, True])
def test_resuming_with_other_settings_is_refused_by_name(finished, tmp_path):
    source = write_lines(tmp_path / "features.tsv", range(1, 6), damaged=None if finished else 5)
    options = {"rename": id_mapping("stem"), "shard_size": 1}
    with suppress(ValueError):
        convert(source, tmp_path / "store", **options)
    write_lines(source, range(1, 7))
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    with pytest.raises(ValueError, match="store was begun with ids='stem', not 'coco': go on with equal settings"):
        convert(source, tmp_path / "store", **options | {"rename": id_mapping("coco")}, resume=True)
    with pytest.raises(ValueError, match=r"store was begun with ids='stem', not None"):
        convert(source, tmp_path / "store", resume=True)
    with pytest.raises(ValueError, match=r"store was begun with feature_dtype=None, not 'float32'"):
        convert(source, tmp_path / "store", **options, resume=True, format_options={"feature_dtype": "float32"})
    with pytest.raises(ValueError, match=r"num_classes=None, not 7: .*`unicoder-vl merge --num-classes` tells"):
        convert(source, tmp_path / "store", **options, resume=True, num_classes=7)
    if not finished:
        with pytest.raises(ValueError, match=r"store was begun with workers=1, not 2"):
            convert(source, tmp_path / "store", **options, resume=True, workers=2)
    with pytest.raises(ValueError, match="or the beginning of one, and resume=False refuses both"):
        convert(source, tmp_path / "store", **options, resume=False)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    assert_holds(convert(source, tmp_path / "store", **options, resume=True), range(1, 7))


# The same command goes on.


def test_what_is_finished_is_said_and_left(tmp_path, caplog):
    source = write_lines(tmp_path / "features.tsv", range(1, 6))
    convert(source, tmp_path / "store")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    write_lines(source, range(1, 9))
    for workers in (1, 2):
        caplog.clear()
        assert_holds(convert(source, tmp_path / "store", workers=workers), range(1, 6))
        assert f"{tmp_path / 'store'} is finished, and stays as it is; --restart begins anew" in caplog.text
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    assert_holds(convert(source, tmp_path / "store", resume=True), range(1, 9))


def test_finished_of_another_source_is_not_what_was_asked_for(tmp_path):
    source = write_lines(tmp_path / "features.tsv", range(1, 6))
    other = write_lines(tmp_path / "more.tsv", range(6, 9))
    convert(source, tmp_path / "store")
    for settings, says in (({}, rf"store was begun with source='{source}', not '{other}'"), ({"dtype": "float32"}, "")):
        with pytest.raises(ValueError, match=says or r"dtype='float16', not 'float32': .*--restart"):
            convert(other if says else source, tmp_path / "store", **settings)
    assert_holds(convert(other, tmp_path / "store", resume=True), range(1, 9))


@pytest.mark.parametrize("workers", [1, 2])
def test_restart_begins_anew_with_other_settings(workers, tmp_path):
    source = write_lines(tmp_path / "features.tsv", range(1, 30), damaged=20)
    with pytest.raises(ValueError, match="line 20"):
        convert(source, tmp_path / "store", workers=workers, shard_size=100)
    write_lines(source, range(1, 6))
    store = convert(source, tmp_path / "store", restart=True, dtype="float32", workers=3 - workers)
    assert_holds(store, range(1, 6))
    store = convert(source, tmp_path / "store", restart=True, workers=workers)
    assert store.provenance["dtype"] == "float16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.tsv", "store"]


def test_a_restart_that_fails_at_once_keeps_what_was_there(tmp_path):
    source = write_lines(tmp_path / "features.tsv", range(1, 6))
    convert(source, tmp_path / "store")
    write_lines(source, range(1, 6), damaged=1)
    with pytest.raises(ValueError, match="line 1"):
        convert(source, tmp_path / "store", restart=True)
    assert_holds(RegionStore(tmp_path / "store"), range(1, 6))
    with pytest.raises(ValueError, match="both the source and the store"):
        convert(tmp_path / "store", tmp_path / "store", restart=True)


def as_begun_before(folder, **plan):
    """The plan as it was written until class names were kept and workers shared images by their new ids."""
    (folder / conversion.PLAN).write_text(json.dumps({"workers": 1, "ids": None} | plan))


def test_what_was_begun_before_goes_on(tmp_path):
    source = write_lines(tmp_path / "features.tsv", range(1, 30), damaged=20)
    with pytest.raises(ValueError, match="line 20"):
        convert(source, tmp_path / "store", shard_size=100)
    as_begun_before(tmp_path / "store")
    write_lines(source, range(1, 30))
    assert_holds(convert(source, tmp_path / "store", shard_size=100), range(1, 30))


def test_class_names_that_were_not_kept_stay_so(tmp_path):
    from foreign_arrays import CLASSES, write_vinvl

    source = write_vinvl(tmp_path)
    names = {"class_names": CLASSES}
    lines = (source / "features.tsv").read_bytes()
    (source / "features.tsv").write_bytes(lines[:-1])
    (source / "features.lineidx").unlink()
    with pytest.raises(ValueError, match="line 3: the line has no end"):
        convert(source, tmp_path / "store", format_options=names, shard_size=1)
    as_begun_before(tmp_path / "store", **names)
    unfinished = tmp_path / "store" / "unfinished.json"
    unfinished.write_text(unfinished.read_text().replace(json.dumps(CLASSES, indent=2).replace("\n", "\n    "), "null"))
    unfinished.write_text(unfinished.read_text().replace('"num_classes": 5', '"num_classes": null'))
    assert json.loads(unfinished.read_text())["provenance"]["class_names"] is None
    (source / "features.tsv").write_bytes(lines)
    store = convert(source, tmp_path / "store", format_options=names, shard_size=1)
    assert len(store) == 3 and store.provenance["class_names"] is None


def test_workers_that_shared_source_ids_still_do(tmp_path):
    """What one of two wrote of images that the other would now take is not written twice."""
    numbers = range(1, 30)
    old_ids = {f"{'x' * (number % 5)}/{number}": str(number) for number in numbers}
    source = write_lines(tmp_path / "features.tsv", numbers)
    lines = source.read_text().splitlines(keepends=True)
    source.write_text(
        "".join(old_id.rpartition("/")[0] + "/" + line for old_id, line in zip(old_ids, lines, strict=True))
    )
    share = [old_id for old_id in old_ids if zlib.crc32(old_id.encode()) % 2 == 0]
    assert any(zlib.crc32(old_ids[old_id].encode()) % 2 == 1 for old_id in share)
    part = tmp_path / ".store.parts" / "0"
    with RegionStoreWriter(part, source_format="bottom-up-tsv", shard_size=1) as writer:
        for record in read_records(source):
            if record.image_id in share:
                writer.write(dataclasses.replace(record, image_id=old_ids[record.image_id]))
    (tmp_path / "store").mkdir()
    as_begun_before(tmp_path / "store", workers=2, ids="stem")
    store = convert(source, tmp_path / "store", rename=id_mapping("stem"), workers=2, shard_size=1)
    assert_holds(store, numbers)


@pytest.mark.parametrize("workers", [1, 2])
def test_images_without_an_id_are_left_out_and_listed(workers, tmp_path):
    source = write_lines(tmp_path / "features.tsv", range(1, 6))
    (tmp_path / "ids.csv").write_text("source_id,image_id\n1,1\n3,3\n4,4\n")
    rename = id_mapping(str(tmp_path / "ids.csv"))
    with pytest.raises(ValueError, match=r"Image '2' is not in .*ids\.csv, .* skip_unmapped=True \(--skip-unmapped\)"):
        convert(source, tmp_path / "store", rename=rename)
    assert_holds(convert(source, tmp_path / "store", rename=rename, skip_unmapped=True, workers=workers), [1, 3, 4])
    rows = [json.loads(line) for line in (tmp_path / "store" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(row["image_id"] for row in rows) == ["2", "5"]
    assert all(row["file"] == str(source) and "is not in" in row["reason"] for row in rows)
    assert sorted(row["place"] for row in rows) == ["line 2", "line 5"]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_an_earlier_source_left_out_stays_listed(workers, tmp_path):
    first = write_lines(tmp_path / "first.tsv", range(1, 4), damaged=2)
    second = write_lines(tmp_path / "second.tsv", range(4, 7), damaged=5)
    for source, options in ((first, {}), (second, {"resume": True}), (second, {"resume": True})):
        convert(source, tmp_path / "store", skip_broken=True, workers=workers, **options)
    rows = [json.loads(line) for line in (tmp_path / "store" / "skipped.jsonl").read_text().splitlines()]
    assert [(row["image_id"], row["file"]) for row in rows] == [("2", str(first)), ("5", str(second))]


def test_a_conversion_to_a_link_may_begin_anew(tmp_path):
    source, link = write_lines(tmp_path / "features.tsv", range(1, 4)), tmp_path / "link"
    (tmp_path / "elsewhere" / "real").mkdir(parents=True)
    link.symlink_to(tmp_path / "elsewhere" / "real")
    for options in ({}, {"restart": True}, {"restart": True, "workers": 2}):
        assert_holds(convert(source, link, **options), [1, 2, 3])
    assert link.is_symlink() and [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["real"]


def test_ids_that_become_one_are_an_error(karpathy, tmp_path):
    source = write_lines(tmp_path / "features.tsv", [1, 2])
    (tmp_path / "ids.csv").write_text("source_id,image_id\n1,dog\n2,dog\n")
    with pytest.raises(ValueError, match="dog"):
        convert(source, tmp_path / "store", rename=id_mapping(str(tmp_path / "ids.csv")))


def test_an_option_that_a_format_does_not_have(tmp_path):
    source = write_lines(tmp_path / "features.tsv", [1])
    with pytest.raises(ValueError, match=r"this format has no option \['background'\]"):
        convert(source, tmp_path / "store", format_options={"background": True})
    with pytest.raises(ValueError, match="workers is 0"):
        convert(source, tmp_path / "store", workers=0)


def write_store(path, **options):
    with RegionStoreWriter(path, dtype="float16", **options) as writer:
        for number in range(1, 4):
            rng = np.random.default_rng(number)
            writer.write(
                RegionRecord(
                    f"image_{number}",
                    image_width=100,
                    image_height=60,
                    boxes=np.array([[0, 0, 50, 10 * number], [20, 30, 90, 55]]),
                    features=rng.standard_normal((2, 8)).astype(np.float16),
                    object_ids=[number, 4],
                    object_scores=[0.75, 0.5],
                    attribute_ids=[2, 3],
                    attribute_scores=[0.25, 0.125],
                    class_probabilities=np.eye(6, dtype=np.float16)[[number, 4]] * [[0.75], [0.5]],
                )
            )
    return RegionStore(path)


WRITTEN = [name for name, module in FORMATS.items() if "write" in vars(module)]
NAMES = {"lxmert-tsv": "out.tsv", "uniter-lmdb": "feat_th0.2_max100_min10"}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_we_write_reads_back(name, tmp_path):
    store = write_store(tmp_path / "store", num_classes=6)
    written = tmp_path / NAMES.get(name, "out")
    export(store, written, name)
    back = {record.image_id: record for record in read_records(written, name)}
    assert back.keys() == set(store)
    for image_id, record in store.items():
        np.testing.assert_array_equal(back[image_id].features, record.features)
        np.testing.assert_allclose(back[image_id].locations(), record.locations(), atol=1e-3)
        np.testing.assert_array_equal(back[image_id].object_ids, record.object_ids)
    with pytest.raises((ValueError, FileExistsError), match=str(tmp_path)):
        export(store, written, name)


NOT_WRITTEN = {
    "lxmert-tsv": {"class_probabilities"},
    "milvlg-npz": {"class_probabilities"},
    "uniter-npz": {"image_width", "image_height", "attribute_ids", "attribute_scores"},
    "uniter-lmdb": {"image_width", "image_height", "attribute_ids", "attribute_scores"},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_fields_that_a_format_cannot_hold_are_said_once(name, tmp_path, caplog):
    """What is lost is what does not read back, of a whole record and of one that lacks fields."""
    store = write_store(tmp_path / "store")
    whole = store["image_1"]
    for number, unknown in enumerate(([], ["class_probabilities"], ["object_ids", "attribute_ids"])):
        record = dataclasses.replace(whole, **dict.fromkeys(unknown))
        written = tmp_path / str(number) / NAMES.get(name, "out")
        written.parent.mkdir()
        FORMATS[name].write([record], written)
        (back,) = read_records(written, name)
        lost = {field for field in record.to_dict() if field not in back.to_dict()}
        assert set(FORMATS[name].not_written(record)) == lost
        assert lost == NOT_WRITTEN[name] or unknown
    export(store, tmp_path / NAMES.get(name, "out"), name)
    (said,) = [each.message for each in caplog.records]
    assert f"lacks fields that {name} cannot hold" in said and all(
        f"{field} (3 images)" in said for field in NOT_WRITTEN[name]
    )
    assert "object_ids" not in said


def test_classes_without_probabilities_are_lost_to_uniter():
    record = RegionRecord("x", features=[[1.0]], object_ids=[2])
    assert FORMATS["uniter-lmdb"].not_written(record) == ["object_ids"]
    other = dataclasses.replace(record, class_probabilities=[[0, 0.6, 0.4]])  # of which 1 is read back
    assert FORMATS["uniter-lmdb"].not_written(other) == ["object_ids"]
    assert FORMATS["uniter-lmdb"].not_written(dataclasses.replace(other, object_ids=[1])) == []


@pytest.mark.parametrize(
    ("name", "expected"), [("lxmert-tsv", r"out\.tsv"), ("uniter-lmdb", "feat_th0.2_max100_min10")]
)
def test_a_wrong_name_is_refused_before_any_record_is_read(name, expected, tmp_path, monkeypatch):
    store = write_store(tmp_path / "store")
    monkeypatch.setattr(RegionStore, "values", lambda self: pytest.fail("read"))
    with pytest.raises(ValueError, match=f"out: .*expected .*{expected}"):
        export(store, tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_called_empty(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="nothing is empty: no store was finished there"):
        convert(tmp_path / "nothing", tmp_path / "store")


def test_export_names_what_can_be_written(tmp_path):
    store = write_store(tmp_path / "store")
    with pytest.raises(ValueError, match=r"'scan-npy' cannot be written, only \['parquet', .*'lxmert-tsv'"):
        export(store, tmp_path / "out", "scan-npy")


class Classifier:
    """Class = where the feature is largest."""

    provenance = {"detector": "vg", "detector_revision": "abc", "num_classes": 8, "class_names": None}

    def classify(self, features):
        features = np.asarray(features, np.float32)
        return features.argmax(1), np.full(len(features), 0.5, np.float32), None, None


def test_labels_for_a_store_that_has_none(tmp_path):
    source = write_lines(tmp_path / "features.tsv", range(1, 5))
    declared = {"detector": "vg", "detector_revision": "abc", "detector_declared": True}
    store = convert(source, tmp_path / "store", **declared)
    labelled = label(store, tmp_path / "labelled", Classifier())
    assert list(labelled) == list(store)
    for image_id, record in labelled.items():
        assert record.object_ids.tolist() == [0, 0] and record.object_scores.tolist() == [0.5, 0.5]
        np.testing.assert_array_equal(record.features, store[image_id].features)
        np.testing.assert_array_equal(record.boxes, store[image_id].boxes)
    told = labelled.provenance
    assert (told["detector"], told["detector_declared"], told["num_classes"]) == ("vg", True, 8)
    with pytest.raises(ValueError, match="has object classes already"):
        label(labelled, tmp_path / "again", Classifier())


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ({}, "does not tell what found its regions.*--source-detector NAME@REVISION"),
        ({"detector": "vg"}, "does not tell what found its regions"),
        (
            {"detector": "vg", "detector_revision": "abd"},
            "holds the features of vg@abd, but this classifier is of vg@abc",
        ),
        ({"detector": "detr", "detector_revision": "abc"}, "holds the features of detr@abc"),
    ],
)
def test_labels_of_other_weights_are_refused(declared, says, tmp_path):
    store = convert(write_lines(tmp_path / "features.tsv", range(1, 5)), tmp_path / "store", **declared)
    with pytest.raises(ValueError, match=says):
        label(store, tmp_path / "labelled", Classifier())
    assert not (tmp_path / "labelled").exists()
