"""
Readers and writers of UNITER, Volta, ViLBERT-MT, MMF and MILVLG, on the files of `foreign_pickles`; and what they stand
on: the unpickler that executes nothing, and the reader of LMDB that trusts nothing.
"""

import binascii
import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

lmdb = pytest.importorskip("lmdb")
msgpack = pytest.importorskip("msgpack")
msgpack_numpy = pytest.importorskip("msgpack_numpy")

import foreign_pickles as foreign  # noqa: E402
from foreign_arrays import CLASSES, IMAGES, Image  # noqa: E402
from foreign_readers import reader  # noqa: E402

from unicoder_vl_hf import RegionRecord, RegionStore  # noqa: E402
from unicoder_vl_hf.regions.conversion import write_store  # noqa: E402
from unicoder_vl_hf.regions.formats import (  # noqa: E402
    _lmdb,
    detect_format,
    milvlg_npz,
    mmf_lmdb,
    mmf_npy,
    read_records,
    restricted_pickle,
    uniter_lmdb,
    uniter_npz,
    volta_lmdb,
)

BY_NAME = sorted(IMAGES, key=lambda image: image.name)  # the order of keys and file names


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def assert_equal(found, expected) -> None:
    if isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert np.array_equal(found, expected)
    else:
        assert (found, type(found)) == (expected, type(expected))


def assert_same_records(found, expected) -> None:
    found, expected = list(found), list(expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for field, value in vars(other).items():
            assert_equal(getattr(one, field), value)


# The unpickler.

PLAIN = {
    "f4": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
    "transposed": np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
    "big endian": np.arange(3, dtype=">f8"),
    "words": np.array(["cat", "é"]),
    "bytes": np.array([b"a", b"bc"]),
    "empty": np.zeros((0, 4), np.float32),
    "dict inside": np.array({"a": 1}),
    "scalar": np.float32(0.5),
    "flag": np.bool_(True),
    "nested": [1, -(10**30), 2.5, None, True, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, [[]], "é", b"\xff"],
    7: "an integer key",
}


@pytest.mark.parametrize("protocol", range(6))
def test_unpickler_reads_what_pickle_reads(protocol):
    found = restricted_pickle.load(pickle.dumps(PLAIN, protocol), "here")
    assert list(found) == list(PLAIN)
    for key, value in PLAIN.items():
        assert_equal(found[key], value)
    shared = [PLAIN["f4"], PLAIN["f4"]]
    first, second = restricted_pickle.load(pickle.dumps(shared, protocol), "here")
    assert first is second


def test_unpickler_knows_numpy_before_version_2():
    data = pickle.dumps([np.arange(3), np.int64(4)], 2)
    assert b"numpy._core" in data
    array, scalar = restricted_pickle.load(data.replace(b"numpy._core", b"numpy.core"), "here")
    assert (array.tolist(), scalar) == ([0, 1, 2], 4)


def test_unpickler_reads_python_2():
    """Text is bytes there, and holds the numbers of arrays."""
    data = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x08" + np.array([1.5, -2], "<f4").tobytes() + b"tb."
    )
    assert pickle.loads(data, encoding="latin-1").tolist() == [1.5, -2]
    assert restricted_pickle.load(data, "here").tolist() == [1.5, -2]


@pytest.mark.parametrize("protocol", range(6))
def test_unpickler_executes_nothing(protocol, tmp_path):
    data = pickle.dumps({"features": [np.zeros(2), Bomb(tmp_path / "executed")]}, protocol)
    with pytest.raises(ValueError, match=r"^a\.npy: .*names (pathlib|builtins|__builtin__)\."):
        restricted_pickle.load(data, "a.npy")
    assert not (tmp_path / "executed").exists()
    pickle.loads(data)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "value", [os.system, np.load, np.frombuffer, np.ndarray, eval, getattr, Exception, Path("x"), {1, 2}, 1j, Image]
)
def test_unpickler_refuses(value):
    data = pickle.dumps(value)
    if value is np.ndarray:  # the name alone is harmless, and of no use
        data = data[:-1] + b")R."
    with pytest.raises(ValueError, match=r"^here: "):
        restricted_pickle.load(data, "here")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b".",
        b"(.",
        b"K\x01K\x02.",
        b"h\x00.",
        b"a.",
        b"K\x01b.",
        b"]K\x01b.",
        b"}K\x01s.",
        b"K\x01K\x02K\x03s.",
        b"\x8e" + b"\xff" * 7 + b"\x7f.",  # bytes of 2**63
        b"\x96" + struct.pack("<Q", 2**40) + b".",  # a bytearray of a terabyte
        b"\x95" + b"\xff" * 8 + b"N",
        b"I" + b"9" * 5000 + b"\n.",
        b"}" + b")" + b"\x85" * 10**5 + b"Ns.",  # a key that hashes 100,000 tuples deep
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R.",  # never filled
        pickle.dumps(np.array([{}, {}], object)),
        pickle.dumps(np.zeros(3, "f4,i4")),
        pickle.dumps(np.zeros(3, np.complex64)),
        pickle.dumps(np.array(["2020"], "M8[s]")),
        pickle.dumps(np.arange(1000))[:-100],
        pickle.dumps(np.arange(1000)).replace(b"i8", b"O8"),
    ],
)
def test_unpickler_refuses_damage_and_bombs(data):
    with pytest.raises(ValueError, match=r"^here: "):
        print(restricted_pickle.load(data, "here"))


def test_unpickler_needs_no_room_for_slots_between():
    """Slot 2**32 - 1, for which pickle allocates 64 GB."""
    assert restricted_pickle.load(b"K\x01r\xff\xff\xff\xff.", "here") == 1


def test_npy_against_numpy(tmp_path):
    for name, array in PLAIN.items():
        if isinstance(array, np.ndarray):
            np.save(tmp_path / "a.npy", array)
            found = restricted_pickle.load_npy((tmp_path / "a.npy").read_bytes(), "here")
            assert_equal(found, np.load(tmp_path / "a.npy", allow_pickle=True))
            assert name


@pytest.mark.parametrize(
    ("shape", "descr"),
    [
        ("(2, 4)", "<f4"),
        ("(1000000000000,)", "<f4"),
        ("(4294967296, 4294967296, 0)", "<f4"),
        ("(-3,)", "<f4"),
        ("3", "<f4"),
        ("(" + "1" * 5000 + ",)", "<f4"),
        ("(" * 5000 + ")" * 5000, "<f4"),
        ("(3,)", "<f8"),
        ("(3,)", "<f3"),
        ("(3,)", "|V4"),
        ("(0,)", "|S999999999999"),
        ("(3,)", "|O"),
    ],
)
def test_npy_headers_that_lie(shape, descr):
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    data = b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header + bytes(12)
    with pytest.raises(ValueError, match=r"^here"):
        print(restricted_pickle.load_npy(data, "here").shape == (4294967296, 4294967296, 0) and pytest.fail("a view"))


def test_npz_bombs_are_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(restricted_pickle, "MAX_MEMBER_BYTES", 1000)
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(2000), y=np.zeros(2))
    with pytest.raises(ValueError, match=r"a\.npz: x unpacks to 16128 bytes"):
        restricted_pickle.load_npz(tmp_path / "a.npz", "a.npz")
    assert restricted_pickle.load_npz(tmp_path / "a.npz", "a.npz", ["y"])["y"].tolist() == [0, 0]


# LMDB.


def write_many(path: Path, **options) -> dict[bytes, bytes]:
    """Thousands of keys: the tree has branches, some values have many pages, some are written again, some deleted."""
    rng = np.random.default_rng(0)
    keys = [f"{number * 7919 % 5000:05d}".encode() + b"x" * (number % 200) for number in range(5000)]
    values = {key: rng.bytes(int(size)) for key, size in zip(keys, rng.integers(0, 3000, len(keys)), strict=True)}
    values[keys[17]] = rng.bytes(10**6)
    with lmdb.open(str(path), map_size=2**30, **options) as environment:
        with environment.begin(write=True) as transaction:
            for key, value in values.items():
                transaction.put(key, value[::-1])
        with environment.begin(write=True) as transaction:
            for key in keys[::3]:
                transaction.delete(key)
                del values[key]
        with environment.begin(write=True) as transaction:
            for key in keys[1::3]:
                transaction.put(key, values[key])
        with environment.begin(write=True) as transaction:
            for key in keys[2::3]:
                transaction.put(key, values[key])
    return values


@pytest.mark.parametrize("options", [{}, {"subdir": False}, {"writemap": True}])
def test_lmdb_against_the_library(options, tmp_path):
    values = write_many(tmp_path / "db", **options)
    found = [(key, value()) for key, value in _lmdb.entries(tmp_path / "db")]
    assert found == sorted(values.items())
    with lmdb.open(str(tmp_path / "db"), readonly=True, subdir=options.get("subdir", True)) as environment:
        assert environment.stat()["depth"] > 2
        with environment.begin() as transaction:
            assert found == list(transaction.cursor())
    if not options:
        assert found == [(key, value()) for key, value in _lmdb.entries(tmp_path / "db" / "data.mdb")]


def test_lmdb_cut_short_or_none(tmp_path):
    write_many(tmp_path / "db")
    file = tmp_path / "db" / "data.mdb"
    content = file.read_bytes()
    for size in (0, 1, 100, 4096, 5000, 8192, 20000, len(content) // 2):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"data\.mdb is damaged, cut short or no LMDB"):
            for _, value in _lmdb.entries(tmp_path / "db"):
                value()
    file.write_bytes(bytes(8192))
    with pytest.raises(ValueError, match=r"data\.mdb is damaged.*magic 0x0"):
        list(_lmdb.entries(tmp_path / "db"))
    file.unlink()
    with pytest.raises(ValueError, match=r"data\.mdb is no file, expected an LMDB"):
        list(_lmdb.entries(tmp_path / "db"))


def test_lmdb_whose_last_value_is_cut_short(tmp_path):
    path = foreign.write_lmdb(tmp_path / "db", {"a": bytes(100_000)}, b"keys", b"")
    os.truncate(path / "data.mdb", (path / "data.mdb").stat().st_size - 3 * 4096)
    with pytest.raises(ValueError, match=r"it has \d+ bytes, but byte \d+ is asked for"):
        next(value() for _, value in _lmdb.entries(path))


def test_lmdb_loops_end(tmp_path):
    """A branch that points to its own page."""
    write_many(tmp_path / "db")
    file = tmp_path / "db" / "data.mdb"
    content = bytearray(file.read_bytes())
    for page in range(2, len(content) // 4096):
        start = page * 4096
        flags, lower = struct.unpack_from("<HH", content, start + 10)
        if flags == 1 and struct.unpack_from("<Q", content, start) == (page,):
            for node in struct.unpack_from(f"<{(lower - 16) // 2}H", content, start + 16):
                struct.pack_into("<HHH", content, start + node, page, 0, 0)
    file.write_bytes(content)
    with pytest.raises(ValueError, match="deeper than 32"):
        list(_lmdb.entries(tmp_path / "db"))


def test_two_readers_in_one_process(tmp_path):
    path = foreign.uniter_lmdb(tmp_path)
    for one, other in zip(reader(uniter_lmdb)(path), reader(uniter_lmdb)(path), strict=True):
        assert one.image_id == other.image_id


# All formats.


@pytest.mark.parametrize("name", foreign.WRITERS)
def test_detection(name, tmp_path):
    path = foreign.WRITERS[name](tmp_path)
    assert detect_format(path) == name
    if (path / "data.mdb").exists():
        assert detect_format(path / "data.mdb") == name
    assert [record.num_regions for record in read_records(path)] in ([3, 2, 4], [4, 3, 2])


@pytest.mark.parametrize("name", foreign.WRITERS)
def test_skipped_images_are_not_decoded(name, tmp_path, monkeypatch):
    path = foreign.WRITERS[name](tmp_path)
    records = list(read_records(path))
    for function in ("load", "load_npy", "load_npz"):
        monkeypatch.setattr(restricted_pickle, function, pytest.fail)
    monkeypatch.setattr(binascii, "a2b_base64", pytest.fail)
    monkeypatch.setattr(msgpack, "unpackb", pytest.fail)
    assert list(read_records(path, name, skip={record.image_id for record in records})) == []


def test_an_image_alone(tmp_path):
    """One file of a folder, by its path."""
    image = IMAGES[1]
    for name, file in (
        ("uniter-npz", f"{image.name}.npz"),
        ("milvlg-npz", f"{image.name}.npz"),
        ("mmf-npy", f"{image.name}.npy"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        foreign.WRITERS[name](folder)
        (record,) = read_records(folder / file)
        assert (record.image_id, record.num_regions) == (image.name, 2)


# UNITER.


def assert_uniter(records, images=BY_NAME, n=None) -> None:
    for record, image in zip(records, images, strict=True):
        assert record.image_id == image.name
        assert record.image_width is record.image_height is None
        assert_equal(record.boxes, image.fractions.astype(np.float16).astype(np.float32)[:n])
        assert_equal(record.features, image.features.astype(np.float16)[:n])
        assert_equal(record.object_ids, image.object_ids[:n])
        assert_equal(record.object_scores, image.object_scores[:n])
        assert_equal(record.class_probabilities, foreign.probabilities(image)[:n, 1:])
        assert record.class_probabilities.shape[1] == len(CLASSES)
        assert record.attribute_ids is record.attribute_scores is None


@pytest.mark.parametrize("suffix", ["", "_compressed"])
@pytest.mark.parametrize("name", ["feat_th0.2_max100_min10", "feat_numbb36", "all", "another"])
def test_uniter_lmdb(name, suffix, tmp_path):
    path = foreign.uniter_lmdb(tmp_path, name + suffix, allow_pickle=np.array(True))
    assert detect_format(path) == "uniter-lmdb"
    assert_uniter(read_records(path))
    np.testing.assert_allclose(
        next(read_records(path)).locations()[0], [1 / 500, 2 / 336, 499 / 500, 7 / 336, 498 * 5 / 500 / 336], atol=1e-3
    )


def many_regions(scores: list[float]) -> Image:
    n = len(scores)
    boxes = np.linspace(1, 100, 4 * n, dtype=np.float32).reshape(n, 4)
    features = np.arange(4 * n, dtype=np.float32).reshape(n, 4)
    ids = np.arange(n) % len(CLASSES)
    return Image(7, 320, 240, boxes, features, ids, np.array(scores, np.float32), ids, np.zeros(n, np.float32))


@pytest.mark.parametrize(
    ("name", "scores", "n"),
    [
        ("all", [0.5] * 12 + [0.125] * 8, 12),
        ("all", [0.125] * 8 + [0.5] * 12, 12),  # the FIRST so many, as UNITER does
        ("all", [0.5] * 3 + [0.125] * 17, 10),
        ("all", [0.5] * 3, 3),
        ("all", [0.5] * 120, 100),
        ("feat_numbb5", [0.5] * 20, 5),
        ("feat_numbb36", [0.5] * 20, 20),
        ("another", [0.125] * 20, 20),
    ],
)
def test_uniter_rows_by_the_name_of_the_folder(name, scores, n, tmp_path):
    image = many_regions(scores)
    assert_uniter(read_records(foreign.uniter_lmdb(tmp_path, name, [image])), [image], n)


@pytest.mark.parametrize(("count", "n"), [(7, 7), (20, 20), (30, 20), (None, 20)])
def test_uniter_rows_by_the_file_beside(count, n, tmp_path):
    image = many_regions([0.5] * 20)
    path = foreign.uniter_lmdb(tmp_path, images=[image])
    sidecar = tmp_path / "nbb_th0.2_max100_min10.json"
    assert sidecar.exists()
    sidecar.write_text(json.dumps({f"{image.name}.npz": count})) if count else sidecar.unlink()
    assert_uniter(read_records(path), [image], n)
    assert_uniter(read_records(path / "data.mdb"), [image], n)
    sidecar.write_text('{"x": "y"}')
    with pytest.raises(ValueError, match=r"nbb_th0\.2_max100_min10\.json is no JSON of"):
        list(read_records(path))


def test_uniter_provenance():
    for name, thresholds in {
        "feat_th0.2_max100_min10": {"score": 0.2, "max_regions": 100, "min_regions": 10},
        "feat_th0.15_max50_min5_compressed/data.mdb": {"score": 0.15, "max_regions": 50, "min_regions": 5},
        "feat_numbb36": {"max_regions": 36},
        "all": {"score": 0.2, "max_regions": 100, "min_regions": 10},
    }.items():
        assert uniter_lmdb.provenance(f"/data/flickr30k/{name}") == {"thresholds": thresholds}
    assert uniter_lmdb.provenance("/data/flickr30k/other") == {}


def uniter_changes(**changes) -> dict:
    arrays = {**foreign.uniter_arrays(IMAGES[0]), **changes}
    return {name: array for name, array in arrays.items() if array is not None}


SWAPPED = foreign.uniter_arrays(IMAGES[0])["norm_bb"][:, [1, 0, 3, 2, 4, 5]]
UNITER_MISTAKES = [
    ({"norm_bb": SWAPPED}, "columns may be in another order"),
    ({"norm_bb": IMAGES[0].boxes}, r"norm_bb have shape \(3, 4\)"),
    (
        {"norm_bb": np.hstack([IMAGES[0].boxes, IMAGES[0].boxes[:, 2:] - IMAGES[0].boxes[:, :2]])},
        "image size is unknown",
    ),
    ({"norm_bb": None}, "norm_bb'] missing"),
    ({"features": None}, "features'] missing"),
    ({"features": np.zeros(3)}, "features have shape"),
    ({"features": np.array("x")}, "features is an array of shape"),
    ({"conf": np.array([[0.5], [0.5]])}, "object_scores have shape"),
    ({"conf": np.array([[50], [25], [12]])}, "object_scores hold 50"),
    ({"soft_labels": np.zeros(3)}, "soft_labels have shape"),
]


@pytest.mark.parametrize(("changes", "says"), UNITER_MISTAKES)
@pytest.mark.parametrize("layout", ["msgpack", "npz in LMDB", "npz"])
def test_uniter_mistakes(layout, changes, says, tmp_path):
    arrays = uniter_changes(**changes)
    npz = io.BytesIO()
    np.savez(npz, **arrays)
    if layout == "npz":
        path, name = tmp_path / "bad.npz", "uniter-npz"
        path.write_bytes(npz.getvalue())
    else:
        name = "uniter-lmdb"
        value = msgpack.dumps(arrays, default=msgpack_numpy.encode) if layout == "msgpack" else npz.getvalue()
        path = foreign.write_lmdb(tmp_path / "another", {"bad.npz": value}, b"__keys__", b'["bad.npz"]')
    with pytest.raises(ValueError, match=says) as error:
        list(read_records(path, name))
    assert str(path) in str(error.value)
    assert "'bad'" in str(error.value)


@pytest.mark.parametrize("name", ["all", "feat_th0.2_max100_min10"])
def test_uniter_pickles_are_not_executed(name, tmp_path):
    trace = tmp_path / "executed"
    arrays = uniter_changes(features=np.array([Bomb(trace)], object))
    value = msgpack.dumps(arrays, default=msgpack_numpy.encode)
    path = foreign.write_lmdb(tmp_path / name, {"bad.npz": value}, b"__keys__", b'["bad.npz"]')
    with pytest.raises(ValueError, match=r"'bad': the msgpack cannot be read: dtype"):
        list(read_records(path))
    assert not trace.exists()
    msgpack.loads(value, object_hook=msgpack_numpy.decode)
    assert trace.exists()


@pytest.mark.parametrize(
    "value", [b"", b"\x81", b"\xdf\xff\xff\xff\xff", b"\x91" * 5000, b"PK\x03\x04", b"[]", b"\xc1", b"\x82\xa1x"]
)
def test_uniter_values_that_are_none(value, tmp_path):
    path = foreign.write_lmdb(tmp_path / "all", {"bad.npz": value}, b"__keys__", b"[]")
    with pytest.raises(ValueError, match="'bad'"):
        list(reader(uniter_lmdb)(path))


def uniter_load(img_dir: Path, db_name: str) -> dict[str, dict]:
    """As UNITER's DetectFeatLmdb opens and reads, `get_dump` for every key."""
    compress = db_name.endswith("_compressed")
    plain = db_name.removesuffix("_compressed")
    nbb = img_dir / f"{plain.replace('feat', 'nbb')}.json"
    dumps = {}
    with lmdb.open(f"{img_dir}/{db_name}", readonly=True, create=False) as env, env.begin(buffers=True) as txn:
        names = json.loads(bytes(txn.get(key=b"__keys__")).decode("utf-8"))
        name2nbb = json.loads(nbb.read_text()) if plain.startswith("feat_th") else dict.fromkeys(names, int(plain[10:]))
        for file_name in names:
            dump = txn.get(file_name.encode("utf-8"))
            if compress:
                with io.BytesIO(dump) as reader:
                    img_dump = dict(np.load(reader, allow_pickle=True).items())
            else:
                img_dump = msgpack.loads(dump, raw=False, object_hook=msgpack_numpy.decode)
            out = {k: arr.astype(np.float32) if arr.dtype == np.float16 else arr for k, arr in img_dump.items()}
            dumps[file_name] = {k: arr[: name2nbb[file_name], ...] for k, arr in out.items()}
            assert len(dumps[file_name]["features"]) == name2nbb[file_name]
    return dumps


@pytest.mark.parametrize("db_name", ["feat_th0.2_max100_min10", "feat_th0.2_max100_min10_compressed"])
def test_uniter_round_trip_and_its_own_loader(db_name, tmp_path):
    source = foreign.uniter_lmdb(tmp_path, db_name)
    records = list(read_records(source))
    write_store(records, tmp_path / "store")
    store = RegionStore(tmp_path / "store")
    target = tmp_path / "written" / db_name
    target.parent.mkdir()
    uniter_lmdb.write(store.values(), target)
    assert_same_records(read_records(target), records)
    assert {file.name for file in target.parent.iterdir()} == {db_name, "nbb_th0.2_max100_min10.json"}
    expected, found = uniter_load(tmp_path, db_name), uniter_load(target.parent, db_name)
    assert sorted(found) == sorted(expected)
    for name in expected:
        assert list(found[name]) == ["features", "norm_bb", "conf", "soft_labels"]
        for key, array in expected[name].items():
            if key in ("features", "conf"):
                assert_equal(found[name][key], array)
            else:  # w and h, and the background, are computed again
                np.testing.assert_allclose(found[name][key], array, atol=1e-3)
        assert np.array_equal(found[name]["soft_labels"][:, 1:], expected[name]["soft_labels"][:, 1:])


def test_uniter_lmdb_of_a_fixed_number(tmp_path):
    image = many_regions([0.5] * 4)
    records = list(read_records(foreign.uniter_lmdb(tmp_path, "all", [image])))
    uniter_lmdb.write(records, tmp_path / "feat_numbb4")
    assert_uniter(read_records(tmp_path / "feat_numbb4"), [image])
    assert len(uniter_load(tmp_path, "feat_numbb4")) == 1
    with pytest.raises(ValueError, match="4 regions, expected 5"):
        uniter_lmdb.write(records, tmp_path / "feat_numbb5")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["all", "feat_numbb4"]


def test_uniter_writes_pixels_as_fractions_and_nothing_unknown(tmp_path):
    record = RegionRecord(
        "a", image_width=200, image_height=50, boxes=[[20, 10, 120, 45]], features=np.ones((1, 3), np.float32)
    )
    uniter_npz.write([record], tmp_path / "npz")
    with np.load(tmp_path / "npz" / "a.npz") as arrays:
        assert sorted(arrays) == ["features", "norm_bb"]
        np.testing.assert_allclose(arrays["norm_bb"], [[0.1, 0.2, 0.6, 0.9, 0.5, 0.7]], rtol=1e-6)
        assert_equal(arrays["features"], record.features)


@pytest.mark.parametrize(
    ("write", "ids", "boxes", "says"),
    [
        (uniter_lmdb.write, ["a"], None, "'a': boxes must be known"),
        (uniter_npz.write, ["a"], None, "'a': boxes must be known"),
        (uniter_lmdb.write, ["a", "a"], [[0, 0, 1, 1]], "'a' comes twice"),
        (uniter_npz.write, ["a", "a"], [[0, 0, 1, 1]], "'a': the id is here already"),
        (uniter_lmdb.write, ["a" * 600], [[0, 0, 1, 1]], "too long for an LMDB"),
        (uniter_npz.write, ["a/b"], [[0, 0, 1, 1]], "no name of a file"),
    ],
)
def test_uniter_refuses_to_write(write, ids, boxes, says, tmp_path):
    records = [RegionRecord(image_id, boxes=boxes, features=[[1.0]]) for image_id in ids]
    with pytest.raises(ValueError, match=says):
        write(records, tmp_path / "feat_th0.2_max100_min10")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [uniter_lmdb.write, uniter_npz.write, milvlg_npz.write])
def test_nothing_is_written_over(write, tmp_path):
    target = tmp_path / "feat_th0.2_max100_min10"
    target.mkdir()
    with pytest.raises(ValueError, match="exists already"):
        write([], target)
    (tmp_path / "nbb_th0.5_max9_min1.json").touch()
    with pytest.raises(ValueError, match=r"nbb_th0\.5_max9_min1\.json exists already"):
        uniter_lmdb.write([], tmp_path / "feat_th0.5_max9_min1_compressed")
    with pytest.raises(ValueError, match="UNITER finds no folder of this name"):
        uniter_lmdb.write([], tmp_path / "regions")


def test_uniter_npz_round_trip(tmp_path):
    (tmp_path / "npz").mkdir()
    records = list(read_records(foreign.uniter_npz(tmp_path / "npz")))
    assert_uniter(records)
    uniter_npz.write(write_store(records, tmp_path / "store").values(), tmp_path / "written")
    assert_same_records(read_records(tmp_path / "written"), records)


# Volta and ViLBERT-MT.


@pytest.mark.parametrize("row", [foreign.volta_row, foreign.volta_arrays, foreign.vilbert_arrays])
@pytest.mark.parametrize("options", [{}, {"subdir": False}, {"protocol": 2}])
def test_volta(row, options, tmp_path):
    path = foreign.volta_lmdb(tmp_path, row, **options)
    assert detect_format(path) == "volta-lmdb"
    for record, image in zip(read_records(path), BY_NAME, strict=True):
        assert record.image_id == image.name
        assert (record.image_width, record.image_height) == (image.width, image.height)
        assert_equal(record.boxes, image.boxes)
        assert_equal(record.features, image.features)
        labelled = row is not foreign.vilbert_arrays
        assert_equal(record.object_ids, image.object_ids if labelled else None)
        assert_equal(record.object_scores, image.object_scores if labelled else None)
        assert_equal(record.attribute_ids, image.attribute_ids if labelled else None)
        assert_equal(record.attribute_scores, image.attribute_scores if labelled else None)
        known = foreign.probabilities(image)[:, 1:].astype(np.float32) if row is foreign.volta_row else None
        assert_equal(record.class_probabilities, known)


def test_vilbert_counts_boxes_that_scored(tmp_path):
    """The rest are there too, and its reader takes them."""
    path = foreign.volta_lmdb(tmp_path, lambda image: foreign.vilbert_arrays(image) | {"num_boxes": 1})
    assert [record.num_regions for record in read_records(path)] == [4, 3, 2]


@pytest.mark.parametrize(
    ("row", "changes", "says"),
    [
        (foreign.volta_row, {"num_boxes": "5"}, "features has .* bytes, expected 5"),
        (foreign.volta_row, {"num_boxes": "0"}, "num_boxes is 0"),
        (foreign.volta_row, {"num_boxes": "many"}, "num_boxes is 'many'"),
        (foreign.volta_row, {"num_boxes": None}, "only num_boxes could tell: it is missing"),
        (foreign.volta_row, {"img_h": "640", "img_w": "360"}, "width and height swapped"),
        (foreign.volta_row, {"img_w": "wide"}, "img_w is 'wide'"),
        (foreign.volta_row, {"features": "!!!"}, "features is no base64"),
        (foreign.volta_row, {"boxes": foreign.encode(IMAGES[0].features)}, "boxes have shape"),
        (foreign.volta_row, {"boxes": foreign.encode(IMAGES[0].boxes[:, [2, 3, 0, 1]])}, "inverted"),
        (foreign.volta_row, {"boxes": foreign.encode(IMAGES[0].boxes[:, [1, 0, 3, 2]])}, "outside|inverted"),
        (foreign.volta_row, {"objects_conf": foreign.encode(np.array([5, 0, 2], np.float32))}, "object_scores hold 5"),
        (
            foreign.volta_row,
            {"objects_id": foreign.encode(np.array([4, 0, 5]))},
            "object_ids hold 5, expected ids below 5",
        ),
        (foreign.volta_row, {"img_id": "another"}, "img_id is 'another', unlike the key"),
        (foreign.volta_arrays, {"num_boxes": 2}, "num_boxes is 2, but features have 3 rows"),
        (foreign.volta_arrays, {"boxes": IMAGES[0].boxes.T}, "boxes have shape"),
        (foreign.volta_arrays, {"img_h": np.zeros(2)}, "img_h is an array of shape"),
        (foreign.volta_arrays, {"features": [[1.0]]}, "features is a list"),
        (foreign.volta_arrays, {"features": foreign.encode(IMAGES[0].features)}, "only num_boxes could tell"),
        (foreign.vilbert_arrays, {"num_boxes": 4}, "num_boxes is 4, but features have 3 rows"),
        (foreign.vilbert_arrays, {"image_w": np.inf}, "image_w is inf"),
    ],
)
def test_volta_mistakes(row, changes, says, tmp_path):
    path = foreign.pickled_lmdb(tmp_path / "db", {IMAGES[0].name: row(IMAGES[0]) | changes})
    with pytest.raises(ValueError, match=says) as error:
        list(reader(volta_lmdb)(path))
    place = f"{path}, key '{IMAGES[0].name}': Image '{IMAGES[0].name}': "
    assert str(error.value).startswith(place)


@pytest.mark.parametrize("name", ["volta-lmdb", "mmf-lmdb"])
def test_pickles_in_lmdb_are_not_executed(name, tmp_path):
    trace = tmp_path / "executed"
    fields = OrderedDict(foreign.volta_arrays(IMAGES[0]) | {"more": Bomb(trace)})
    path = foreign.pickled_lmdb(tmp_path / "db", {"bad": fields})
    with pytest.raises(ValueError, match=r"image 'bad': the pickle cannot be read: it names"):
        list(read_records(path, name))
    # Nor the list of keys, which is not read at all.
    path = foreign.write_lmdb(tmp_path / "keys", {}, b"keys", pickle.dumps(Bomb(trace)))
    assert list(read_records(path, name)) == []
    assert not trace.exists()


# Opcodes of a tuple deeper than Python recurses, and of one of 3**50 numbers once printed.
DEEP = b")" + b"\x85" * 100_000
WIDE = b"K\x01" + b"".join(b"q%ch%ch%c\x87" % (slot, slot, slot) for slot in range(200, 250))


@pytest.mark.parametrize("value", [DEEP, WIDE], ids=["deep", "wide"])
@pytest.mark.parametrize("field", ["img_h", "boxes", "img_id", "num_boxes", "objects_id"])
def test_what_is_nested_is_not_printed(value, field, tmp_path):
    fields = pickle.dumps(foreign.volta_row(IMAGES[0]) | {field: "XXX"}, 2).replace(b"X\x03\0\0\0XXX", value)
    path = foreign.write_lmdb(tmp_path / "db", {IMAGES[0].name: fields}, b"keys", b"")
    with pytest.raises(ValueError, match=f"{field} is a tuple"):
        list(reader(volta_lmdb)(path))


@pytest.mark.parametrize("value", [DEEP, WIDE], ids=["deep", "wide"])
@pytest.mark.parametrize(
    "data",
    [
        b"%b\x8c\x01a\x93.",  # as the module of a global
        b"%bK\x01\x85R.",  # as what is called
        b"cnumpy\ndtype\nU\x02f4\x85R(K\x03%bNNNK\x00K\x00K\x00tb.",  # as the byte order
        b"cnumpy.core.numeric\n_frombuffer\n(C\x01acnumpy\ndtype\nU\x02u1\x85R(K\x03U\x01|NNNK\x00K\x00K\x00tb%bU\x01CtR.",
    ],
)
def test_what_is_nested_is_not_printed_by_the_unpickler(data, value):
    with pytest.raises(
        ValueError, match=r"^here: the pickle cannot be read: (it names something|it calls|dtype|an array has as shape)"
    ):
        restricted_pickle.load(data % value, "here")


# MMF.


def assert_mmf(records, prefix="", background=False) -> None:
    for record, image in zip(records, BY_NAME, strict=True):
        assert record.image_id == prefix + image.name
        assert (record.image_width, record.image_height) == (image.width, image.height)
        assert_equal(record.boxes, image.boxes)
        assert_equal(record.features, image.features)
        assert_equal(record.object_ids, image.object_ids)
        assert_equal(record.object_scores, image.object_scores)
        assert_equal(record.class_probabilities, foreign.probabilities(image)[:, 1:].astype(np.float32))


@pytest.mark.parametrize("background", [False, True])
def test_mmf(background, tmp_path):
    assert_mmf(reader(mmf_npy)(foreign.mmf_npy(tmp_path, background), background=background))
    assert_mmf(reader(mmf_lmdb)(foreign.mmf_lmdb(tmp_path, background), background=background), "val/")


def test_mmf_folders_below(tmp_path):
    (tmp_path / "val").mkdir()
    foreign.mmf_npy(tmp_path / "val")
    assert detect_format(tmp_path) == "mmf-npy"
    assert_mmf(read_records(tmp_path), "val/")


def mmf_info(**changes) -> dict:
    return foreign.mmf_info(IMAGES[0]) | changes


def mmf_record(folder: Path, info, **options) -> RegionRecord:
    np.save(folder / "a.npy", IMAGES[0].features)
    np.save(folder / "a_info.npy", info)
    (record,) = reader(mmf_npy)(folder, **options)
    return record


def test_mmf_background_shows_by_visual_genome_columns(tmp_path):
    probabilities = np.zeros((3, 1601), np.float32)
    probabilities[[0, 1, 2], [0, 1600, 1]] = 0.5
    probabilities[0, 7] = 0.25
    info = mmf_info(objects=np.array([0, 1600, 1]), cls_prob=probabilities)
    for background in (None, True):
        record = mmf_record(tmp_path, info, background=background)
        assert record.object_ids.tolist() == [-1, 1599, 0]
        assert record.object_scores.tolist() == [0.25, 0.5, 0.5]
        assert_equal(record.class_probabilities, probabilities[:, 1:])
    with pytest.raises(ValueError, match=r"a\.npy: Image 'a': cls_prob has 1601 columns, but background is False"):
        mmf_record(tmp_path, info, background=False)
    info = mmf_info(objects=np.array([0, 1599, 1]), cls_prob=probabilities[:, 1:])
    assert mmf_record(tmp_path, info).object_ids.tolist() == [0, 1599, 1]
    with pytest.raises(ValueError, match="cls_prob has 1600 columns, but background is True"):
        mmf_record(tmp_path, info, background=True)


def test_mmf_of_the_frcnn_script(tmp_path):
    """One score a region, and a number of boxes that is an option."""
    record = mmf_record(tmp_path, mmf_info(cls_prob=IMAGES[0].object_scores, num_boxes=100))
    assert_equal(record.object_scores, IMAGES[0].object_scores)
    assert record.class_probabilities is None


def test_mmf_features_alone(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES[0].features)
    (record,) = reader(mmf_npy)(tmp_path)
    assert_equal(record.features, IMAGES[0].features)
    assert all(value is None for name, value in vars(record).items() if name not in ("image_id", "features"))
    path = foreign.pickled_lmdb(tmp_path / "db", {"a": {"feature_path": "a", "features": IMAGES[0].features}})
    assert_same_records(read_records(path), [record])


@pytest.mark.parametrize(
    ("info", "says"),
    [
        (mmf_info(image_width=600, image_height=338), "RESIZED photo beside boxes of the original"),
        (mmf_info(image_width=360, image_height=640), "width and height swapped"),
        (mmf_info(bbox=IMAGES[0].boxes[:, [1, 0, 3, 2]]), "outside|inverted"),
        (mmf_info(bbox=IMAGES[0].boxes[:2]), "boxes have shape"),
        (mmf_info(objects=np.array([1.5, 0, 2])), "object_ids hold 1.5"),
        (mmf_info(objects=np.array([5, 0, 2])), "object_ids hold 5"),
        (mmf_info(image_width=None), "image_width is None although"),
        ([1, 2], "expected one pickled dict"),
        ({"bbox": {}}, "bbox is a dict"),
    ],
)
def test_mmf_mistakes(info, says, tmp_path):
    with pytest.raises(ValueError, match=says) as error:
        mmf_record(tmp_path, info)
    assert str(error.value).startswith(str(tmp_path / "a.npy"))


def test_mmf_pickles_are_not_executed(tmp_path):
    trace = tmp_path / "executed"
    with pytest.raises(ValueError, match=r"a_info\.npy: the pickle cannot be read: it names"):
        mmf_record(tmp_path, {"bbox": Bomb(trace)})
    assert not trace.exists()


# MILVLG.


@pytest.mark.parametrize("background", [False, True])
def test_milvlg_classes_of_the_pickle(background, tmp_path):
    records = reader(milvlg_npz)(foreign.milvlg_npz(tmp_path, background), background=background)
    for record, image in zip(records, BY_NAME, strict=True):
        assert record.image_id == image.name
        assert (record.image_width, record.image_height) == (image.width, image.height)
        assert_equal(record.boxes, image.boxes)
        assert_equal(record.features, image.features.astype(np.float16))
        assert_equal(record.object_ids, image.object_ids)
        assert_equal(record.object_scores, image.object_scores)
        assert_equal(record.attribute_ids, image.attribute_ids)
        assert_equal(record.attribute_scores, image.attribute_scores)


def test_milvlg_round_trip(tmp_path):
    (tmp_path / "npz").mkdir()
    records = list(read_records(foreign.milvlg_npz(tmp_path / "npz")))
    milvlg_npz.write(write_store(records, tmp_path / "store").values(), tmp_path / "written")
    assert_same_records(read_records(tmp_path / "written"), records)
    for image in IMAGES:
        with np.load(tmp_path / "written" / f"{image.name}.npz", allow_pickle=True) as found:
            expected = foreign.milvlg_arrays(image)
            assert list(found) == list(expected)
            for key, value in expected.pop("info").items():
                assert_equal(found["info"].item()[key], value)
            for key, value in expected.items():
                assert np.array_equal(found[key], value)


def test_milvlg_needs_boxes_in_pixels(tmp_path):
    record = RegionRecord("a", boxes=[[0, 0, 1, 1]], features=[[1.0]])
    with pytest.raises(ValueError, match="'a': boxes and image size must be known"):
        milvlg_npz.write([record], tmp_path / "npz")


def test_an_npz_packed_as_none_is(tmp_path):
    """By LZMA, whose errors are of a kind of their own."""
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name in milvlg_npz.REQUIRED:
            archive.writestr(f"{name}.npy", b"")
    with pytest.raises(ValueError, match=r"x is packed by method 14, which np.savez never"):
        list(reader(milvlg_npz)(path))


def test_an_encrypted_npz(tmp_path):
    foreign.milvlg_npz(tmp_path)
    path = tmp_path / f"{IMAGES[0].name}.npz"
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offsets = [info.header_offset for info in archive.infolist()]
    for offset in [*offsets, content.index(b"PK\x01\x02") + 2]:
        content[offset + 6] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        list(reader(milvlg_npz)(path))
