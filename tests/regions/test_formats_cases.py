"""
Feature files as people bring them, in the shape of public bug reports: other types than the tools write, broken and
repeated images, and layouts beside the known ones. Each with the value that is right.
"""

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path

import foreign_arrays as arrays
import numpy as np
import pytest
from foreign_arrays import CLASSES, IMAGES, Image
from foreign_readers import reader

from unicoder_vl_hf import RegionStore, logging
from unicoder_vl_hf.cli import main
from unicoder_vl_hf.regions.conversion import convert
from unicoder_vl_hf.regions.formats import (
    FORMATS,
    _numbers,
    detect_format,
    frcnn_arrow,
    hdf5,
    lxmert_tsv,
    milvlg_npz,
    mmf_npy,
    read_records,
    scan_npy,
    vinvl_tsv,
    vlbert_json,
)
from unicoder_vl_hf.regions.shards import to_bfloat16

try:
    import foreign_pickles as pickles
except ModuleNotFoundError:  # of the extra [lmdb]
    pickles = None

needs_lmdb = pytest.mark.skipif(pickles is None, reason="lmdb, msgpack or msgpack_numpy is missing")

BOXES = np.array([[10, 20, 630, 40], [5, 300, 25, 470], [0, 0, 640, 480], [7, 8, 9, 11]], np.float32)


def numbers(n: int = 4, columns: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, columns)).astype(np.float32)


def encode(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def line(image_id, features=None, n: int = 4, wrap: Callable[[str], str] = str, cut: int | None = None) -> str:
    """Of bottom-up attention's TSV."""
    features = numbers(n) if features is None else features
    return f"{image_id}\t640\t480\t{n}\t{wrap(encode(BOXES[:n]))}\t{wrap(encode(features)[:cut])}\n"


@pytest.fixture
def write(tmp_path):
    def write_lines(*lines: str) -> Path:
        path = tmp_path / "features.tsv"
        path.write_text("".join(lines))
        return path

    return write_lines


# Types that nothing tells.

DTYPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "float16": lambda a: a.astype("<f2"),
    "float64": lambda a: a.astype("<f8"),
    "bfloat16": to_bfloat16,
    "float16-swapped": lambda a: a.astype(">f2"),
    "float32-swapped": lambda a: a.astype(">f4"),
    "float64-swapped": lambda a: a.astype(">f8"),
}


def bottom_up(folder: Path, array: np.ndarray) -> Path:
    (folder / "a.tsv").write_text(line("1", array))
    return folder / "a.tsv"


def lxmert(folder: Path, array: np.ndarray) -> Path:
    row = arrays.lxmert_row(IMAGES[2]) | {"features": encode(array)}
    return arrays.write_rows(folder / "a.tsv", [row])


def vinvl(folder: Path, array: np.ndarray) -> Path:
    label = {"image_w": 640, "image_h": 480, "objects": [{"class": "cat", "rect": box.tolist()} for box in BOXES]}
    arrays.tsv_writer(folder / "features.tsv", [["1", "4", encode(array)]])
    arrays.tsv_writer(folder / "predictions.tsv", [["1", json.dumps(label)]])
    return folder


def volta(folder: Path, array: np.ndarray) -> Path:
    return pickles.pickled_lmdb(
        folder / "db", {"1": pickles.volta_row(IMAGES[2]) | {"img_id": "1", "features": encode(array)}}
    )


def vlbert(folder: Path, array: np.ndarray) -> Path:
    (folder / "1.json").write_text(json.dumps(pickles.vlbert_fields(IMAGES[2]) | {"features": encode(array)}))
    return folder / "1.json"


BASE64 = [bottom_up, lxmert, vinvl, pytest.param(volta, marks=needs_lmdb), pytest.param(vlbert, marks=needs_lmdb)]


@pytest.mark.parametrize("write_one", BASE64)
@pytest.mark.parametrize("dtype", DTYPES)
def test_base64_of_another_type_is_recognised_and_can_be_stated(dtype, write_one, tmp_path):
    source = write_one(tmp_path, DTYPES[dtype](numbers()))
    with pytest.raises(
        ValueError, match=rf"no float32: .*bytes look like {dtype} \(16 columns\).*--feature-dtype {dtype}"
    ):
        list(read_records(source))
    (record,) = read_records(source, feature_dtype=dtype)
    assert record.features.shape == (4, 16)
    np.testing.assert_allclose(record.features.astype(np.float32), numbers(), rtol=2**-8)
    for stated in ("float32", None):
        (record,) = read_records(write_one(new(tmp_path), numbers()), feature_dtype=stated)
        assert np.array_equal(record.features, numbers())


def new(folder: Path) -> Path:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    return folder


def as_bytes(features: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(features).view(np.uint8)


def npz(folder: Path, array: np.ndarray) -> Path:
    np.savez(folder / "1.npz", x=array, bbox=BOXES, image_w=640, image_h=480)
    return folder / "1.npz"


def npy(folder: Path, array: np.ndarray) -> Path:
    np.save(folder / "1.npy", array)
    np.save(folder / "1_info.npy", {"bbox": BOXES, "image_width": 640, "image_height": 480})
    return folder / "1.npy"


def scan(folder: Path, array: np.ndarray) -> Path:
    np.save(folder / "dev_ims.npy", array[None])
    return folder / "dev_ims.npy"


def groups(folder: Path, array: np.ndarray) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "a.h5", "w") as file:
        for name, value in {"img_h": 480, "img_w": 640, "boxes": BOXES, "features": array}.items():
            file.create_dataset(f"1/{name}", data=value)
    return folder / "a.h5"


def rows(folder: Path, array: np.ndarray) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "a.h5", "w") as file:
        file["image_features"], file["spatial_features"] = array, BOXES[:, [0, 1, 2, 3, 0, 1]] / 640
        file["pos_boxes"] = np.array([[0, 4]])
    (folder / "a_imgid2idx.json").write_text('{"1": 0}')
    return folder / "a.h5"


def arrow(folder: Path, array: np.ndarray) -> Path:
    import pyarrow as pa

    values = {name: [0.5] * 4 for name in ("obj_probs", "attr_probs")} | dict.fromkeys(
        ("obj_ids", "attr_ids"), [1.0] * 4
    )
    values |= {"img_id": 1, "preds_per_image": 4, "boxes": (BOXES / 640).tolist(), "roi_features": array.tolist()}
    types = {"roi_features": pa.list_(pa.list_(pa.from_numpy_dtype(array.dtype)))}
    batch = pa.record_batch({name: pa.array([value], types.get(name)) for name, value in values.items()})
    with pa.OSFile(str(folder / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return folder / "a.arrow"


def uniter(folder: Path, array: np.ndarray) -> Path:
    boxes = BOXES / 640
    np.savez(folder / "1.npz", features=array, norm_bb=np.hstack([boxes, boxes[:, 2:] - boxes[:, :2]]))
    return folder / "1.npz"


def mmf(folder: Path, array: np.ndarray) -> Path:
    return pickles.pickled_lmdb(folder / "db", {"1": {"feature_path": "1", "features": array}})


ARRAYS = [npz, npy, scan, groups, rows, arrow, uniter, pytest.param(mmf, marks=needs_lmdb)]


@pytest.mark.parametrize("write_one", ARRAYS)
def test_arrays_of_bytes_are_no_features_until_their_type_is_stated(write_one, tmp_path):
    format = detect_format(write_one(new(tmp_path), numbers()))
    source = write_one(new(tmp_path), as_bytes(numbers().astype(np.float16)))
    with pytest.raises(ValueError, match=r"are whole numbers \(uint8\).*--feature-dtype"):
        list(read_records(source, format))
    (record,) = read_records(source, format, feature_dtype="float16")
    assert np.array_equal(record.features, numbers().astype(np.float16))
    source = write_one(new(tmp_path), numbers())
    (record,) = read_records(source, format, feature_dtype="float32")
    assert np.array_equal(record.features, numbers())
    with pytest.raises(ValueError, match="float32 as the file says, not float16"):
        list(read_records(source, format, feature_dtype="float16"))


def test_every_format_can_be_told_the_type():
    for module in FORMATS.values():
        assert "feature_dtype" in module.items.__kwdefaults__
    with pytest.raises(ValueError, match="feature_dtype is 'f2', expected one of float16, float32"):
        read_records("a.tsv", "bottom-up-tsv", feature_dtype="f2")


FEATURES = {
    "uniform": lambda rng, shape: rng.random(shape),
    "signed": lambda rng, shape: rng.standard_normal(shape),
    "sparse": lambda rng, shape: np.maximum(rng.standard_normal(shape) - 1, 0),
    "pooled": lambda rng, shape: np.maximum(rng.standard_normal((*shape, 9)) - 2, 0).mean(-1),
    "of unit length": lambda rng, shape: rng.standard_normal(shape) / 45,
    "of many scales": lambda rng, shape: np.exp(2 * rng.standard_normal(shape)),
    "whole": lambda rng, shape: rng.integers(0, 1000, shape),
    "one value": lambda rng, shape: np.full(shape, 0.5),
    "zeros": lambda rng, shape: np.zeros(shape),
}


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("seed", range(3))
def test_float32_is_taken_for_float32(kind, seed):
    """Also what was rounded to fewer bits before."""
    features = FEATURES[kind](np.random.default_rng(seed), (10, 512)).astype(np.float32)
    for rounded in (
        features,
        features.astype(np.float16).astype(np.float32),
        _numbers.from_bfloat16(to_bfloat16(features)),
    ):
        assert np.array_equal(_numbers.features("1", "features", encode(rounded), 10, None), rounded)


@pytest.mark.parametrize("kind", ["uniform", "signed", "sparse", "pooled", "of unit length", "of many scales"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_other_types_are_not(kind, dtype, seed):
    features = FEATURES[kind](np.random.default_rng(seed), (10, 512)).astype(np.float32)
    with pytest.raises(ValueError, match=rf"look like {dtype} \(512 columns\):"):
        _numbers.features("1", "features", encode(DTYPES[dtype](features)), 10, None)


def test_float64_that_was_float16():
    """Its lower halves are zero: as float32 every second number is, and the others are near 2."""
    features = encode(numbers(10, 512).astype(np.float16).astype(np.float64))
    with pytest.raises(ValueError, match=r"every second one would be zero.*look like float64 \(512 columns\)"):
        _numbers.features("1", "features", features, 10, None)


def test_bytes_that_look_like_no_type(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, 4096).astype(np.uint8)
    noise[3::4] &= 0x3F  # all finite
    with pytest.raises(ValueError, match=r"no other type; .*--feature-dtype float32\) takes them as they are"):
        _numbers.features("1", "features", encode(noise), 4, None)
    assert _numbers.features("1", "features", encode(noise), 4, "float32").shape == (4, 256)


def test_a_number_of_bytes_that_float32_does_not_have(write):
    says = r"198 bytes are not 3 equal rows of float32; the bytes look like float16 \(33 columns\)"
    with pytest.raises(ValueError, match=says):
        list(read_records(write(line(1, numbers(3, 33).astype(np.float16), 3))))


@pytest.mark.parametrize("dtype", ["<f8", "<i8", "<i4"])
def test_boxes_of_another_type_are_told_by_their_size(dtype, write):
    fields = line(1).split("\t")
    fields[4] = encode(BOXES.astype(dtype))
    (record,) = read_records(write("\t".join(fields)))
    assert np.array_equal(record.boxes, BOXES)


def test_no_advice_makes_it_worse(write, tmp_path, capsys):
    source = write(line(1, numbers().astype(np.float64)))
    assert main(["convert", str(source), str(tmp_path / "store")]) == 1
    error = capsys.readouterr().err
    assert "--feature-dtype float64" in error and "--dtype" not in error.replace("--feature-dtype", "")
    # Nor where the user insists.
    assert main(["convert", str(source), str(tmp_path / "store"), "--feature-dtype", "float32"]) == 1
    error = capsys.readouterr().err
    assert f"{source}, line 1: Image '1': features hold" in error and "read as a wrong type" in error
    assert "--dtype float32" not in error
    assert main(["convert", str(source), str(tmp_path / "store"), "--feature-dtype", "float64"]) == 0
    assert np.array_equal(RegionStore(tmp_path / "store")["1"].features, numbers().astype(np.float16))


def test_another_type_is_no_image_to_be_skipped(write, tmp_path):
    source = write(line(1), line(2, numbers().astype(np.float64)))
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"line 2: .*look like float64 .*--feature-dtype float64\) states it\.$"):
            convert(source, tmp_path / str(workers), skip_broken=True, workers=workers)


# Broken images.


def rows_of(store: RegionStore) -> list[dict]:
    return [json.loads(row) for row in (store.path / "skipped.jsonl").read_text().splitlines()]


def content(store: RegionStore) -> dict[str, list]:
    return {image_id: record.features.tolist() for image_id, record in sorted(store.items())}


CUT_THEN_WHOLE = (line(1), line(2, cut=101), line(2, numbers(seed=2)), line(3))


def converted(source: Path, folder: Path, resumed: bool, workers: int = 1, **options) -> RegionStore:
    """By one call, or by two of which the first is stopped by a last line that is cut."""
    options = {"skip_broken": True, "shard_size": 1, "workers": workers} | options
    if resumed:
        whole = source.read_text()
        source.write_text(f"{whole}last\t640")
        with pytest.raises(ValueError, match="has no end"):
            convert(source, folder, **options | {"skip_broken": False})
        source.write_text(whole)
    return convert(source, folder, **options)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("shard_size", [1, 2**20])
def test_broken_lines_are_left_out_and_listed(workers, shard_size, write, tmp_path, caplog):
    source = write(*CUT_THEN_WHOLE, "4\t640\t480\t0\t\t\n", line(5), line(6)[:60])
    with pytest.raises(ValueError, match=rf"{source}, line [257]: .*--skip-broken"):
        convert(source, tmp_path / "store", workers=workers, shard_size=shard_size)
    store = convert(source, tmp_path / "store", workers=workers, shard_size=shard_size, skip_broken=True)
    assert sorted(store) == ["1", "2", "3", "5"]
    assert np.array_equal(store["2"].features, numbers(seed=2).astype(np.float16))
    found = sorted(rows_of(store), key=lambda row: row["place"])
    assert [(row["image_id"], row["place"]) for row in found] == [("2", "line 2"), ("4", "line 5"), ("6", "line 7")]
    for row, says in zip(found, ("no base64", "num_boxes is 0", "no end"), strict=True):
        assert row["file"] == str(source) and says in row["reason"]
    assert f"3 left out: {store.path / 'skipped.jsonl'}" in caplog.text


@pytest.mark.parametrize("workers", [1, 2])
def test_what_was_broken_before_a_stop_stays_listed(workers, write, tmp_path, monkeypatch, caplog):
    """The whole line of the same id was written; the broken one before it is not taken for it."""
    source = write(*CUT_THEN_WHOLE, *(line(i) for i in range(4, 20)), "last\t640\n", line(2, numbers(seed=2)))
    options = {"workers": workers, "shard_size": 1, "skip_broken": True}
    expected = convert(source, tmp_path / "at once", **options)
    with pytest.raises(KeyboardInterrupt):
        stopped(source, tmp_path / "store", monkeypatch, workers)
    caplog.clear()
    store = convert(source, tmp_path / "store", **options)
    assert content(store) == content(expected)
    assert {row["place"] for row in rows_of(store)} == {"line 2", "line 21"}
    assert {row["place"] for row in rows_of(expected)} == {"line 2", "line 21"}
    assert "1 image(s) came again" in caplog.text


def test_what_was_broken_before_a_stop_may_have_been_mended(write, tmp_path, monkeypatch):
    source = write(*CUT_THEN_WHOLE)
    with pytest.raises(KeyboardInterrupt):
        stopped(source, tmp_path / "store", monkeypatch, 1)
    source.write_text("".join((line(1), line(2, numbers(seed=2)), *CUT_THEN_WHOLE[2:])))
    store = convert(source, tmp_path / "store", shard_size=1)
    assert len(store) == 3 and not (store.path / "skipped.jsonl").exists()


def stopped(source: Path, folder: Path, monkeypatch, workers: int) -> None:
    """Runs a conversion that is told to stop when all is written but the manifest."""
    from unicoder_vl_hf.regions import conversion, store

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "finish_store", stop)
        if workers > 1:  # in this process, so that the patch holds
            patch.setattr(conversion._Task, "share", lambda task, parts, n: task.run(parts / "0", 0, n))
        convert(source, folder, skip_broken=True, workers=workers, shard_size=1)


def test_a_width_of_its_own_is_broken_whoever_reads_it(write, tmp_path):
    """The first whole image tells the width, also to the worker that does not write it."""
    odd = [line(f"odd {i}", numbers(columns=8)) for i in range(8)]
    source = write(line("first", cut=11), line("a"), *odd, *(line(i) for i in range(20)))
    for workers in (1, 2):
        store = convert(source, tmp_path / str(workers), skip_broken=True, workers=workers)
        assert len(store) == 21 and store.feature_dim == 16
        assert sorted(row["image_id"] for row in rows_of(store)) == ["first", *(f"odd {i}" for i in range(8))]


def test_what_the_writer_refuses_names_the_place(write, tmp_path):
    source = write(line("a"), line("b", numbers() * 1e6), line("c", numbers(columns=8)))
    with pytest.raises(ValueError, match=rf"{source}, line 2: Image 'b': features hold a magnitude"):
        convert(source, tmp_path / "store")
    store = convert(source, tmp_path / "store", skip_broken=True)
    assert [(row["image_id"], row["place"]) for row in rows_of(store)] == [("b", "line 2"), ("c", "line 3")]
    lines = arrays.write_lxmert(tmp_path)
    with pytest.raises(
        ValueError, match=rf"{lines}, line 1: Image '{IMAGES[0].name}': object_ids hold 4, expected ids b"
    ):
        convert(lines, tmp_path / "other", num_classes=4)


def test_nothing_whole_is_no_store(write, tmp_path):
    source = write(line(1, cut=11), line(2, cut=11))
    with pytest.raises(ValueError, match=rf"all 2 images were skipped; the first reason: {source}, line 1: Image '1'"):
        convert(source, tmp_path / "store", skip_broken=True)
    assert list(tmp_path.iterdir()) == [source]


def damaged(write_one: Callable, damage: Callable) -> Callable[[Path], tuple[Path, str]]:
    """A writer of an example in which the first image is broken, and the place that must be named."""

    def write_damaged(folder: Path) -> tuple[Path, str]:
        source = write_one(folder)
        return source, damage(source)

    return write_damaged


def no_npz(folder: Path) -> str:
    file = min(folder.glob("*.np[yz]"))
    file.write_bytes(file.read_bytes()[:200])
    return str(file)


def no_json(folder: Path) -> str:
    file = min(folder.glob("*.json"))
    file.write_bytes(file.read_bytes()[:200])
    return str(file)


def first_line_cut(source: Path) -> str:
    file = source / "features.tsv" if source.is_dir() else source
    first, rest = file.read_bytes().split(b"\n", 1)
    file.write_bytes(first[:-30] + b"\n" + rest)
    index = file.with_suffix(".lineidx")
    index.unlink(missing_ok=True)
    return f"{file}, line 1"


def no_box(source: Path) -> str:
    import h5py

    with h5py.File(source, "a") as file:
        name = min(file) if "image_features" not in file else ""
        file[f"{name}/spatial_features" if not name else f"{name}/boxes"][0] = [9e9] * (4 if name else 6)
    return f"{source}, group '{name}'" if name else f"{source}, row 0"


def not_finite(source: Path) -> str:
    rows = np.load(source)
    rows[0, 0, 0] = np.nan
    np.save(source, rows)
    return f"{source}, row 0"


def no_pickle(source: Path) -> str:
    import lmdb

    with lmdb.open(str(source), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        key = min(key for key, _ in transaction.cursor() if b"keys" not in key)
        transaction.put(key, transaction.get(key)[:50])
    return f"{source}, key '{key.decode()}'"


def frcnn_with_a_wrong_one(folder: Path) -> Path:
    wrong = arrays.frcnn_output(IMAGES[0], boxes=np.full((1, 5, 4), 7.0))
    return arrays.write_frcnn(folder, wrong, *map(arrays.frcnn_output, IMAGES[1:]))


DAMAGED = {
    "lxmert-tsv": damaged(arrays.write_lxmert, first_line_cut),
    "vinvl-tsv": damaged(arrays.write_vinvl, first_line_cut),
    "hdf5": damaged(arrays.write_hdf5, no_box),
    "volta-hdf5": damaged(arrays.write_volta_hdf5, no_box),
    "scan-npy": damaged(arrays.write_scan, not_finite),
    "frcnn-arrow": damaged(frcnn_with_a_wrong_one, lambda source: f"{source}, row 0"),
}
if pickles is not None:
    DAMAGED |= {
        "bottom-up-tsv": damaged(pickles.bottom_up_tsv, first_line_cut),
        "milvlg-npz": damaged(pickles.milvlg_npz, no_npz),
        "uniter-npz": damaged(pickles.uniter_npz, no_npz),
        "uniter-lmdb": damaged(pickles.uniter_lmdb, no_pickle),
        "volta-lmdb": damaged(pickles.volta_lmdb, no_pickle),
        "mmf-lmdb": damaged(pickles.mmf_lmdb, no_pickle),
        "mmf-npy": damaged(pickles.mmf_npy, no_npz),
        "vlbert-json": damaged(pickles.vlbert_json, no_json),
    }


@pytest.mark.parametrize("name", DAMAGED)
def test_every_format_goes_on_behind_what_is_broken(name, tmp_path):
    if "hdf5" in name:
        pytest.importorskip("h5py")
    (tmp_path / "source").mkdir()
    source, place = DAMAGED[name](tmp_path / "source")
    with pytest.raises(ValueError) as error:
        convert(source, tmp_path / "store", format=name)
    assert str(error.value).startswith(place)
    store = convert(source, tmp_path / "store", format=name, skip_broken=True)
    assert len(store) == len(IMAGES) - 1
    (row,) = rows_of(store)
    assert ", ".join(filter(None, (row["file"], row.get("place")))) == place and row["reason"].startswith(place)


def test_all_formats_are_tried():
    assert DAMAGED.keys() == FORMATS.keys() or pickles is None


@needs_lmdb
@pytest.mark.parametrize("make", [pickles and pickles.uniter_lmdb, pickles and pickles.volta_lmdb])
def test_a_cut_lmdb_is_called_cut(make, tmp_path):
    source = make(tmp_path)
    data = source / "data.mdb"
    os.truncate(data, data.stat().st_size - 4096)
    for path in (source, data):
        with pytest.raises(ValueError, match=rf"{data} is damaged.*it was cut short: it has \d+ bytes"):
            detect_format(path)


@pytest.mark.parametrize("name", ["npz", "h5"])
def test_other_files_that_were_cut_are_called_cut(name, tmp_path):
    path = npz(tmp_path, numbers()) if name == "npz" else groups(tmp_path, numbers())
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=rf"{path} is .*cut short"):
        detect_format(path)


def test_a_folder_is_known_though_one_file_is_damaged(tmp_path):
    for name in "abc":
        npz(tmp_path, numbers()).rename(tmp_path / f"{name}.npz")
    for name in "abc":
        data = (tmp_path / f"{name}.npz").read_bytes()
        (tmp_path / f"{name}.npz").write_bytes(data[:100])
        assert detect_format(tmp_path) == "milvlg-npz"
        (tmp_path / f"{name}.npz").write_bytes(data)


def test_an_id_that_is_no_text(tmp_path):
    source = tmp_path / "features.tsv"
    source.write_bytes(line("a").encode() + b"\xff" + line("b").encode())
    with pytest.raises(ValueError, match=rf"{source}, line 2: the image_id .*is no UTF-8"):
        list(read_records(source))
    assert list(convert(source, tmp_path / "store", skip_broken=True)) == ["a"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_name_of_a_file_that_is_no_text(workers, tmp_path):
    (tmp_path / "source").mkdir()
    npz(tmp_path / "source", numbers())
    name = os.fsencode(tmp_path / "source") + b"/\xff.npz"
    Path(os.fsdecode(name)).write_bytes((tmp_path / "source" / "1.npz").read_bytes())
    with pytest.raises(ValueError, match=r"the image_id '\\udcff' is no text"):
        convert(tmp_path / "source", tmp_path / "store", workers=workers)
    store = convert(tmp_path / "source", tmp_path / "store", skip_broken=True, workers=workers)
    assert list(store) == ["1"] and len(rows_of(store)) == 1


def test_a_list_that_a_kill_cut_short(write, tmp_path, monkeypatch):
    source = write(*CUT_THEN_WHOLE)
    with pytest.raises(KeyboardInterrupt):
        stopped(source, tmp_path / "store", monkeypatch, 1)
    with (tmp_path / "store" / "skipped.jsonl").open("a") as file:
        file.write('{"image_id": "\u2028')
    with pytest.raises(KeyboardInterrupt):
        stopped(source, tmp_path / "store", monkeypatch, 1)
    store = convert(source, tmp_path / "store", skip_broken=True, shard_size=1)
    assert len(store) == 3 and [row["place"] for row in rows_of(store)] == ["line 2"]


# Repeated images.


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("shard_size", [1, 2**20])
@pytest.mark.parametrize("resumed", [False, True])
def test_an_equal_repetition_is_taken_once_and_counted(resumed, shard_size, workers, write, tmp_path, caplog):
    source = write(line(1), line(2), line(3), line(2), *(line(i) for i in range(4, 9)), line(8), line(1))
    store = converted(source, tmp_path / "store", resumed, workers, shard_size=shard_size)
    assert sorted(store) == [str(i) for i in range(1, 9)]
    assert "3 image(s) came again, the same as before, and were taken once" in caplog.text
    assert not (store.path / "skipped.jsonl").exists()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("shard_size", [1, 2**20])
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("skip_broken", [False, True])
def test_a_differing_repetition_names_both_places(skip_broken, resumed, shard_size, workers, write, tmp_path):
    source = write(line(1), line(2), line(3), line(2, n=3), line(4))
    options = {"workers": workers, "shard_size": shard_size, "skip_broken": skip_broken}
    for _ in range(1 + resumed):
        with pytest.raises(
            ValueError, match=rf"Image '2' is in {source}, line 2, and in {source}, line 4, which differ"
        ):
            convert(source, tmp_path / "store", **options)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("shard_size", [1, 2**20])
@pytest.mark.parametrize("resumed", [False, True])
def test_the_first_of_differing_repetitions_is_kept(resumed, shard_size, workers, write, tmp_path, caplog):
    source = write(line(1), line(2), line(3), line(2, n=3), line(2), line(4), line(2, n=2))
    store = converted(source, tmp_path / "store", resumed, workers, shard_size=shard_size, keep_first=True)
    assert sorted(store) == ["1", "2", "3", "4"]
    _, first, *_ = read_records(source)
    assert np.array_equal(store["2"].features, first.features.astype(np.float16))
    assert [(row["image_id"], row["place"]) for row in rows_of(store)] == [("2", "line 4"), ("2", "line 7")]
    assert all("another image of the id '2' came first, and differs" in row["reason"] for row in rows_of(store))
    assert "2 left out" in caplog.text and "1 image(s) came again" in caplog.text


@pytest.mark.parametrize("workers", [1, 2])
def test_ids_that_become_one(workers, tmp_path):
    """By their places, also where their source ids hash to two workers."""
    from unicoder_vl_hf.data.image_ids import id_mapping

    source = tmp_path / "features.tsv"
    source.write_text("".join(line(f"{folder}/{i}.jpg") for i in range(6) for folder in ("train", "val")))
    store = convert(source, tmp_path / "store", rename=id_mapping("stem"), workers=workers)
    assert sorted(store) == [str(i) for i in range(6)]
    source.write_text(source.read_text() + line("test/3.jpg", n=3))
    with pytest.raises(ValueError, match=rf"Image '3' is in {source}, line 7, and in {source}, line 13"):
        convert(source, tmp_path / "other", rename=id_mapping("stem"), workers=workers)


def test_a_repetition_behind_a_broken_one_names_the_whole(write, tmp_path):
    source = write(line(1, cut=11), line(1), line(1, n=3))
    with pytest.raises(ValueError, match=r"line 2, and in .*line 3"):
        convert(source, tmp_path / "store", skip_broken=True)


# More layouts.


def check(record, image: Image, **changes) -> None:
    """That a record holds what the image has, but for `changes`."""
    expected = {
        "image_width": image.width,
        "image_height": image.height,
        "boxes": image.boxes,
        "features": image.features,
        "object_ids": image.object_ids,
        "object_scores": image.object_scores,
        "attribute_ids": image.attribute_ids,
        "attribute_scores": image.attribute_scores,
        "class_probabilities": None,
    }
    for field, value in (expected | changes).items():
        np.testing.assert_array_equal(getattr(record, field), value, err_msg=field)


NO_ATTRIBUTES = {"attribute_ids": None, "attribute_scores": None}
BY_NAME = sorted(IMAGES, key=lambda image: image.name)


def test_python_bytes_around_base64(write, tmp_path):
    for quote in "'\"":
        source = write(*(line(i, wrap=f"b{quote}{{}}{quote}".format) for i in (1, 2)))
        for record in read_records(source):
            assert np.array_equal(record.boxes, BOXES) and np.array_equal(record.features, numbers())
    wrapped = {"objects_id", "objects_conf", "attrs_id", "attrs_conf", "boxes", "features"}
    source = arrays.write_lxmert(
        tmp_path, lambda image: {k: f"b'{v}'" if k in wrapped else v for k, v in arrays.lxmert_row(image).items()}
    )
    for record, image in zip(read_records(source), IMAGES, strict=True):
        check(record, image)
    rows = [[str(i), "4", f"b'{encode(numbers(columns=60))}'"] for i in range(2)]
    assert detect_format(arrays.tsv_writer(tmp_path / "vinvl.tsv", rows)) == "vinvl-tsv"


def test_vinvl_boxes_of_the_predictions(tmp_path, caplog):
    logging.warn_once.cache_clear()
    source = arrays.write_vinvl_own(tmp_path)
    for record, image in zip(read_records(source, class_names=CLASSES), IMAGES, strict=True):
        check(record, image, **NO_ATTRIBUTES)
    assert not caplog.text
    for record, image in zip(read_records(source), IMAGES, strict=True):
        check(record, image, **NO_ATTRIBUTES, object_ids=None)
    assert "are left out: give their list, class_names (--class-names FILE)" in caplog.text
    assert len(caplog.records) == 1  # of any number of images


def test_vinvl_boxes_whose_number_differs_are_not_taken(tmp_path):
    source = arrays.write_vinvl_own(tmp_path, lambda image: arrays.vinvl_label(image) | {"objects": [{}] * 2})
    with pytest.raises(
        ValueError, match=r"line 1: .*features of 3 regions have no boxes, and the labels have 2 objects"
    ):
        list(read_records(source))
    (tmp_path / "predictions.tsv").unlink()
    with pytest.raises(ValueError, match=r"no boxes, or other ones, and no predictions\.tsv beside them has"):
        list(read_records(source))


def test_vinvl_boxes_without_a_size_are_unknown(tmp_path, caplog):
    logging.warn_once.cache_clear()
    source = arrays.write_vinvl_own(tmp_path, arrays.vinvl_objects)
    sizeless = {"image_width": None, "image_height": None, "boxes": None}
    for record, image in zip(read_records(source, class_names=CLASSES), IMAGES, strict=True):
        check(record, image, **NO_ATTRIBUTES, **sizeless)
    assert len(caplog.records) == 1 and "nothing tells the size of their image" in caplog.text


def test_vinvl_columns_in_another_order_are_no_features(tmp_path):
    """2,054 columns hold a box, and are not believed to be features when it is in another order."""
    label = {"image_w": 640, "image_h": 480, "objects": [{"rect": box.tolist()} for box in BOXES]}
    arrays.tsv_writer(tmp_path / "features.tsv", [["1", "4", encode(numbers(columns=2054))]])
    arrays.tsv_writer(tmp_path / "predictions.tsv", [["1", json.dumps(label)]])
    with pytest.raises(ValueError, match="features end in"):
        list(reader(vinvl_tsv)(tmp_path))


def test_volta_hdf5(tmp_path):
    pytest.importorskip("h5py")
    source = arrays.write_volta_hdf5(tmp_path)
    assert detect_format(source) == detect_format(tmp_path) == "volta-hdf5"
    for record, image in zip(read_records(source), BY_NAME, strict=True):
        assert record.image_id == image.name
        check(record, image)


def test_volta_hdf5_of_ids_with_folders(tmp_path):
    h5py = pytest.importorskip("h5py")
    source = arrays.write_volta_hdf5(tmp_path, lambda image: f"train/a.{image.number}.jpg")
    with h5py.File(source, "a") as file:
        file["train/again"] = file["train"]  # a loop
        file["elsewhere"] = h5py.ExternalLink("other.h5", "/")
    assert [record.image_id for record in read_records(source)] == [f"train/a.{image.number}.jpg" for image in BY_NAME]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("features", None, None),
        ("boxes", None, r"\['boxes'\] missing"),
        ("boxes", np.array([b"x"]), "boxes is .* expected an array of numbers"),
        ("img_h", np.zeros(2), "img_h is an array of shape"),
        ("obj_id", np.array([0.5, 0, 1]), "object_ids hold 0.5"),
    ],
)
def test_volta_hdf5_mistakes(name, value, says, tmp_path):
    h5py = pytest.importorskip("h5py")
    source = arrays.write_volta_hdf5(tmp_path)
    with h5py.File(source, "a") as file:
        del file[BY_NAME[1].name][name]
        if value is not None:
            file[BY_NAME[1].name][name] = value
    if says is None:  # a group without features is no image
        assert len(list(read_records(source))) == 2
        return
    with pytest.raises(ValueError, match=rf"{source}, group '{BY_NAME[1].name}': Image '{BY_NAME[1].name}': {says}"):
        list(read_records(source))


def test_volta_hdf5_that_promises_terabytes(tmp_path):
    h5py = pytest.importorskip("h5py")
    source = groups(tmp_path, numbers())
    with h5py.File(source, "a") as file:
        del file["1/features"]
        file["1"].create_dataset("features", (2**40, 16), "f")
    with pytest.raises(ValueError, match=r"features takes \d+ bytes, expected"):
        list(read_records(source))


@needs_lmdb
def test_volta_columns_that_are_none_are_unknown(tmp_path):
    source = pickles.volta_lmdb(tmp_path, pickles.volta_row_with_none)
    assert detect_format(source) == "volta-lmdb"
    for record, image in zip(read_records(source), BY_NAME, strict=True):
        check(record, image, **NO_ATTRIBUTES)
    bad = pickles.pickled_lmdb(
        tmp_path / "db", {"a": pickles.volta_row_with_none(IMAGES[0]) | {"img_id": None, "boxes": None}}
    )
    with pytest.raises(ValueError, match=r"Image 'a': \['boxes'\] missing"):
        list(read_records(bad, "volta-lmdb"))


@needs_lmdb
def test_none_is_unknown_in_other_formats_too(tmp_path):
    labels = ("objects_id", "objects_conf", "attrs_id", "attrs_conf")
    unknown = {"object_ids": None, "object_scores": None} | NO_ATTRIBUTES
    for inside in (True, False):
        values = pickles.milvlg_arrays(IMAGES[0])
        values["info"] |= dict.fromkeys(labels)
        np.savez(tmp_path / "a.npz", **values if inside else {**values, **dict.fromkeys(labels)})
        (record,) = reader(milvlg_npz)(tmp_path / "a.npz")
        check(record, IMAGES[0], **unknown, features=IMAGES[0].features.astype(np.float16))


def test_lxmert_without_attributes(tmp_path):
    source = arrays.write_lxmert(tmp_path, arrays.lxmert_row_without_attributes)
    assert detect_format(source) == "lxmert-tsv"
    for record, image in zip(reader(lxmert_tsv)(source), IMAGES, strict=True):
        check(record, image, **NO_ATTRIBUTES)


@needs_lmdb
@pytest.mark.parametrize("make", [pickles and pickles.vlbert_json, pickles and pickles.vlbert_zip])
def test_vlbert(make, tmp_path):
    source = make(tmp_path)
    assert detect_format(source) == "vlbert-json"
    records = {record.image_id: record for record in read_records(source)}
    for image in IMAGES:
        probabilities = arrays.class_probabilities(image)[:, 1:]
        rows = np.arange(len(image.boxes))
        check(
            records[image.name],
            image,
            object_ids=probabilities.argmax(axis=1),
            object_scores=probabilities.max(axis=1),
            attribute_scores=np.full(len(rows), 0.25, np.float32),
            class_probabilities=probabilities,
        )
        assert np.array_equal(probabilities[rows, image.object_ids], image.object_scores)
    with pytest.raises(ValueError, match="classes has 1601 columns, but background is False"):
        list(read_records(source, background=False))


@needs_lmdb
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"classes": None, "attrs": None}, None),
        ({"boxes": None}, r"\['boxes'\] missing"),
        ({"boxes": [1, 2]}, "boxes is a list, expected base64"),
        ({"num_boxes": "many"}, "num_boxes is 'many'"),
        ({"num_boxes": 0}, "num_boxes is 0"),
        ({"image_w": None}, r"\['image_w'\] missing"),
    ],
)
def test_vlbert_mistakes(changes, says, tmp_path):
    path = tmp_path / "1.json"
    path.write_text(json.dumps(pickles.vlbert_fields(IMAGES[0]) | changes))
    if says is None:
        (record,) = read_records(path)
        check(record, IMAGES[0], object_ids=None, object_scores=None, **NO_ATTRIBUTES)
        return
    with pytest.raises(ValueError, match=rf"{path}: Image '1': {says}"):
        list(reader(vlbert_json)(path))


@needs_lmdb
def test_milvlg_whose_boxes_are_called_boxes(tmp_path):
    source = pickles.milvlg_npz_boxes(tmp_path)
    assert detect_format(source) == "milvlg-npz"
    for record, image in zip(read_records(source), BY_NAME, strict=True):
        check(record, image, features=image.features.astype(np.float16))


@needs_lmdb
def test_pythia_features_alone(tmp_path):
    source = pickles.pythia_npy(tmp_path)
    unknown = {"image_width": None, "image_height": None, "boxes": None, "object_ids": None, "object_scores": None}
    for path in (source, source / f"{BY_NAME[0].name}.npy"):
        assert detect_format(path) == "mmf-npy"
        for record, image in zip(read_records(path), BY_NAME, strict=False):
            check(record, image, **unknown, **NO_ATTRIBUTES)


@pytest.mark.parametrize(
    "array", [np.zeros((5000, 512), "f4"), np.zeros((2, 3, 4), "f4"), np.zeros(9), np.zeros((3, 8), "i8")]
)
def test_other_matrices_are_no_features_of_an_image(array, tmp_path):
    np.save(tmp_path / "a.npy", array)
    assert not mmf_npy.matches(tmp_path / "a.npy")


# Names of classes.


@pytest.mark.parametrize(
    "name", [name for name, module in FORMATS.items() if name not in ("bottom-up-tsv", "hdf5", "scan-npy")]
)
def test_names_of_classes_for_all_that_have_ids(name, tmp_path):
    if "hdf5" in name:
        pytest.importorskip("h5py")
    writers = arrays.WRITERS | (pickles.WRITERS if pickles else {})
    if name not in writers:
        pytest.skip("lmdb is missing")
    source = writers[name](tmp_path)
    names = [*CLASSES, *(f"class {i}" for i in range(len(CLASSES), 1600))]
    store = convert(source, tmp_path / "store", format_options={"class_names": names})
    assert store.provenance["class_names"] == names and store.provenance["num_classes"] == 1600
    assert any(record.object_ids is not None for record in store.values())
    with pytest.raises(
        ValueError, match=f"{source}.*(expected ids below the store's 2 classes|none of the 2 class_names)"
    ):
        convert(source, tmp_path / "few", format_options={"class_names": CLASSES[:2]})
    with pytest.raises(ValueError, match="class_names begin with '__background__': take it out"):
        convert(source, tmp_path / "more", format_options={"class_names": ["__background__", *names]})


@pytest.mark.parametrize("module", [hdf5, scan_npy])
def test_names_of_classes_where_there_are_no_ids(module, tmp_path):
    with pytest.raises(ValueError, match=r"no option \['class_names'\].*no object ids that could have names"):
        read_records(tmp_path, module.NAME, class_names=CLASSES)


def test_the_options_of_the_command(tmp_path, capsys):
    source = arrays.write_lxmert(tmp_path)
    first_line_cut(source)
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    arguments = ["convert", str(source), str(tmp_path / "store"), "--class-names", str(tmp_path / "names.txt")]
    assert main(arguments) == 1
    assert "--skip-broken" in capsys.readouterr().err
    assert main([*arguments, "--skip-broken"]) == 0
    store = RegionStore(tmp_path / "store")
    assert store.provenance["class_names"] == CLASSES and len(store) == 2
    assert len(rows_of(store)) == 1


def test_arrow_files_cut_short_are_skipped_whole(tmp_path):
    from foreign_arrays import write_frcnn

    (tmp_path / "a").mkdir()
    source = write_frcnn(tmp_path / "a").rename(tmp_path / "a" / "a.arrow")
    (tmp_path / "a" / "b.arrow").write_bytes(source.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"b\.arrow.*cut short"):
        list(reader(frcnn_arrow)(tmp_path / "a"))
    store = convert(tmp_path / "a", tmp_path / "store", skip_broken=True)
    assert len(store) == len(IMAGES)
    assert [(row["image_id"], row["file"]) for row in rows_of(store)] == [("b.arrow", str(tmp_path / "a" / "b.arrow"))]
