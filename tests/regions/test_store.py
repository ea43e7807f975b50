"""The store against what went in, against the safetensors library, and against kills, forks and damaged files."""

import copy
import dataclasses
import errno
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import time
from multiprocessing.context import SpawnContext
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from region_stores import assert_same, files_of, make, write_store
from torch.utils.data import DataLoader, Dataset

from unicoder_vl_hf import RegionRecord, RegionStore, RegionStoreWriter, files
from unicoder_vl_hf.regions import shards as shards_module, store as store_module
from unicoder_vl_hf.regions.editing import subset_store
from unicoder_vl_hf.regions.tensor_files import TensorFileWriter


@pytest.fixture
def small(tmp_path):
    """40 images in several shards."""
    return write_store(map(make, range(40)), tmp_path / "store", shard_size=1000, detector="d")


def test_everything_comes_back_to_the_bit(small):
    assert len(list(small.path.glob("regions-*.safetensors"))) > 4
    assert list(small) == [make(number).image_id for number in range(40)]
    assert len(small) == 40
    assert small.num_regions == sum(make(number).num_regions for number in range(40))
    for number in np.random.default_rng(0).permutation(40):
        assert_same(small[make(number).image_id], make(number))
    # What comes out is a valid record, locations included.
    for number, record in enumerate(small.values()):
        again = RegionRecord.from_dict(record.to_dict())
        if again.boxes is not None:
            assert np.array_equal(again.locations(), make(number).locations())


def test_get_many_keeps_the_order_asked_for(small):
    numbers = [33, 2, 2, 17, 0, 39]
    for number, record in zip(numbers, small.get_many(make(n).image_id for n in numbers), strict=True):
        assert_same(record, make(number))
    assert small.get_many([]) == []


def test_one_image_id_is_no_list(tmp_path):
    """Its letters may be ids, too."""
    store = write_store([RegionRecord(letter, features=np.ones((1, 2))) for letter in "cat"], tmp_path / "store")
    calls = [store.get_many, store.will_need, store.region_counts, store.highest_object_ids]
    for call in [*calls, lambda image_ids: subset_store(store.path, image_ids, tmp_path / "subset")]:
        with pytest.raises(ValueError, match=r"image_ids is 'cat', expected several: give a list, \['cat'\]"):
            call("cat")


def test_what_was_announced_is_asked_for_once(small, monkeypatch):
    asked = []
    monkeypatch.setattr(shards_module.Shard, "will_need_row", lambda shard, row: asked.append(shard.image_ids[row]))
    first, second, third = (make(number).image_id for number in (33, 2, 17))
    small.will_need([first, second, first])
    assert asked == [second, first]  # in disk order
    for _ in range(2):
        for image_id, record in zip([second, third, second], small.get_many([second, third, second]), strict=True):
            assert record.image_id == image_id
    assert asked == [second, first, third, second, third]  # anew once it was read
    with pytest.raises(KeyError, match="has no image 'nobody'"):
        small.will_need(["nobody"])


def test_images_announced_and_never_read_are_forgotten(small, monkeypatch):
    monkeypatch.setattr(store_module, "MAX_COMING", 3)
    for number in range(40):
        small.will_need([make(number).image_id])
    assert len(small._coming) <= 4


def test_highest_object_ids_of_some_images(small):
    numbers = [33, 2, 2, 17, 0, 39, 1]
    ids = [make(number).object_ids for number in numbers]
    found = small.highest_object_ids(make(number).image_id for number in numbers)
    assert found.tolist() == [-2 if of_image is None else of_image.max() for of_image in ids]
    assert -2 in found and len(set(found.tolist())) > 3
    assert small.highest_object_ids([]).tolist() == []
    with pytest.raises(KeyError, match="has no image 'nobody'"):
        small.highest_object_ids(["nobody"])


def test_a_record_is_a_read_only_view(small):
    record = small[make(1).image_id]
    with pytest.raises(ValueError, match="read-only"):
        record.features[0, 0] = 1
    # It outlives the store and its files.
    for path in small.path.iterdir():
        path.unlink()
    del small
    assert_same(record, make(1))


def test_other_readers_open_the_shards(small):
    shard = safetensors.numpy.load_file(small.path / "regions-00000.safetensors")
    count = len(shard["present"])
    given = [make(number) for number in range(count)]
    assert np.array_equal(shard["features"], np.concatenate([record.features for record in given]))
    assert shard["region_offsets"].tolist() == [0, *np.cumsum([record.num_regions for record in given]).tolist()]
    assert shard["image_sizes"].tolist() == [[r.image_width or 0, r.image_height or 0] for r in given]
    names = bytes(shard["image_ids"])
    first, last = shard["image_id_offsets"][:2]
    assert names[first:last].decode() == given[0].image_id
    safetensors.torch.load_file(small.path / "regions-00000.safetensors")
    index = safetensors.numpy.load_file(small.path / "index.safetensors")
    assert (np.diff(index["hashes"].astype(object)) > 0).all()


def test_every_tensor_begins_on_a_multiple_of_its_item_size(tmp_path):
    """With features and ids of odd length, as NumPy, torch and the SIMD code below them like it."""
    for width in (1, 3, 5):
        records = [RegionRecord("odd", features=np.ones((1, width)), object_ids=[1], boxes=[[0, 0, 1, 1]])]
        store = write_store(records, tmp_path / f"store {width}")
        assert all(value.flags.aligned for value in store["odd"].to_dict().values() if isinstance(value, np.ndarray))
        assert all(tensor.flags.aligned for tensor in store.shards.opened[0].tensors.values())


def test_a_missing_id_names_itself_the_store_and_some_ids(small):
    with pytest.raises(KeyError) as error:
        small["photo_1.jpg"]
    for word in ("'photo_1.jpg'", str(small.path), "'photo_0'", "40"):
        assert word in str(error.value)
    with pytest.raises(KeyError, match="photo_1\\.jpg"):
        small.get_many(["photo_0", "photo_1.jpg"])
    with pytest.raises(KeyError):
        small[3]
    assert "photo_0" in small
    assert "photo_1.jpg" not in small
    assert 3 not in small
    assert small.get("nothing") is None


def test_ids_with_equal_hashes_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "hash_id", lambda image_id: len(image_id) % 2)
    store = write_store(map(make, range(18)), tmp_path / "store", shard_size=300)
    with RegionStoreWriter(store.path, resume=True) as writer:
        assert "photo_99" not in writer.resumed and "photo_99" not in writer
        for number in (18, 19):
            writer.write(make(number))
            assert make(number).image_id in writer and make(number).image_id not in writer.resumed
        for number in range(20):
            with pytest.raises(ValueError, match="already"):
                writer.write(make(number))
    store = RegionStore(store.path)
    for number in range(20):
        assert_same(store[make(number).image_id], make(number))
    assert "photo_99" not in store


def test_provenance(tmp_path):
    facts = {
        "detector": "vg",
        "detector_revision": "abc",
        "detector_declared": True,
        "box_type": "regressed",
        "thresholds": {"score": 0.2},
        "class_names": [f"class {k}" for k in range(9)],
        "source_format": "milvlg-npz",
    }
    store = write_store([make(1)], tmp_path / "store", dtype="float32", **facts)
    found = store.provenance
    version = found.pop("package_version")
    assert found == {**facts, "detector_options": None, "num_classes": 9, "feature_dim": 8, "dtype": "float32"}
    assert isinstance(version, str)
    assert json.loads(json.dumps(store.provenance)) == store.provenance
    store.provenance["detector"] = "changed"
    store.provenance["thresholds"]["score"] = 1
    assert store.provenance["detector"] == "vg"
    assert store.provenance["thresholds"] == {"score": 0.2}


@pytest.mark.parametrize(("source", "stored"), [(np.float32, "float32"), (np.float16, "float32")])
def test_float32_stores_are_exact(source, stored, tmp_path):
    features = np.random.default_rng(0).standard_normal((3, 5)).astype(source)
    store = write_store([RegionRecord("a", features=features)], tmp_path / "store", dtype=stored)
    assert store["a"].features.dtype == np.float32
    assert np.array_equal(store["a"].features, features)


@pytest.mark.parametrize("many_zeros", [False, True])
def test_float16_is_rounded_as_numpy_does(many_zeros):
    # All signs and exponents, with mantissas around the ties: odd and even, one bit below and above, and the carry.
    mantissas = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FEFFF, 0x7FF000, 0x7FFFFF], np.uint32)
    exponents = np.arange(2**9, dtype=np.uint32)[:, None] << 23
    mantissas = np.concatenate([mantissas, np.random.default_rng(0).integers(0, 2**23, 53, np.uint32)])
    features = (exponents | mantissas).view(np.float32)
    features[np.isnan(features)] = 1
    if many_zeros:
        features[:, ::3] = 0
    features = np.repeat(features, 40, axis=1)  # more than are converted at a time
    with np.errstate(over="ignore"):
        expected = features.astype(np.float16)
    found = shards_module.to_float16(features)
    assert found.dtype == np.float16 and found.tobytes() == expected.tobytes()
    columns = features[:, 5:50]  # a view
    assert (shards_module.to_float16(columns) == expected[:, 5:50]).all()


def test_bfloat16_stores_round_once_and_give_float32(tmp_path):
    """As torch rounds, ties to even; other tools see BF16."""
    values = np.random.default_rng(0).standard_normal(1000) * 10.0 ** np.arange(1000) ** 0.5
    features = np.concatenate([values, [1 + 2**-8, 1 + 3 * 2**-8, -0.0, 3.38e38, 1e-40]]).astype(np.float32)[:, None]
    store = write_store([RegionRecord("a", features=features)], tmp_path / "store", dtype="bfloat16")
    found = store["a"].features
    expected = torch.from_numpy(features).to(torch.bfloat16)
    assert found.dtype == np.float32
    assert np.array_equal(found.view(np.uint32), expected.float().numpy().view(np.uint32))
    assert store.provenance["dtype"] == "bfloat16"
    stored = safetensors.torch.load_file(store.path / "regions-00000.safetensors")["features"]
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored, expected)
    again = write_store(store.values(), tmp_path / "again", dtype="bfloat16")
    assert files_of(again.path) == files_of(store.path)
    with (
        pytest.raises(ValueError, match=r"'b': features hold a magnitude of 3\.39999.*float32"),
        RegionStoreWriter(tmp_path / "large", dtype="bfloat16") as writer,
    ):
        writer.write(RegionRecord("b", features=np.float32([[3.4e38]])))


def test_float32_sources_are_rounded_to_float16(tmp_path):
    features = np.float32([[1 / 3, 65504]])
    store = write_store([RegionRecord("a", features=features)], tmp_path / "store")
    assert np.array_equal(store["a"].features, features.astype(np.float16))


@pytest.mark.parametrize("value", [65505, -70000])
def test_what_float16_cannot_hold_is_refused(value, tmp_path):
    with RegionStoreWriter(tmp_path / "store") as writer:
        writer.write(make(1, width=2))
        with pytest.raises(ValueError, match=f"'big': features hold a magnitude of {abs(value)}.*float32"):
            writer.write(RegionRecord("big", features=np.float32([[1, value]])))
        assert "big" not in writer
    assert list(RegionStore(tmp_path / "store")) == [make(1).image_id]


def test_refused_records_leave_the_store_as_it_was(tmp_path):
    with RegionStoreWriter(tmp_path / "store", num_classes=9) as writer:
        writer.write(make(1))
        with pytest.raises(ValueError, match=r"'photo_1ü' is in .* already"):
            writer.write(make(1))
        with pytest.raises(ValueError, match=r"'photo_2üü': features have width 4, expected 8"):
            writer.write(make(2, width=4))
        with pytest.raises(ValueError, match="'other': class_probabilities have width 3, expected 9"):
            writer.write(RegionRecord("other", features=np.ones((1, 8)), class_probabilities=np.ones((1, 3))))
        with pytest.raises(ValueError, match="'high': object_ids hold 9, expected ids below"):
            writer.write(RegionRecord("high", features=np.ones((1, 8)), object_ids=[9]))
        with pytest.raises(ValueError, match=r"'caf.udce9': the id is no text"):
            writer.write(RegionRecord("caf\udce9", features=np.ones((1, 8))))
        with pytest.raises(ValueError, match="got a dict"):
            writer.write({"image_id": "x"})
        writer.write(make(3))
        assert len(writer) == 2
    with pytest.raises(ValueError, match="closed"):
        writer.write(make(4))
    assert_same(RegionStore(tmp_path / "store")[make(3).image_id], make(3))


def test_a_full_disk_is_named_and_holds_nothing_of_what_failed(tmp_path, monkeypatch):
    """Its files, buffers included, fail from the fourth record on."""
    written = []

    class Full(store_module.ShardWriter):
        def add(self, record, features):
            super().add(record, features)
            written.append(record)
            if len(written) == 4:
                for (
                    tensor
                ) in self._tensors.values():  # what waits in a buffer meets a full disk when the file is closed
                    tensor.file.flush()
                    os.dup2(full, tensor.file.fileno())
                    tensor.file.write(b"more")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(store_module, "ShardWriter", Full)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="No space left") as error, RegionStoreWriter(tmp_path / "store") as writer:
        for number in range(9):
            writer.write(make(number))
    assert error.value.filename == str(tmp_path / "store") and not (tmp_path / "store").exists()
    os.close(full)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float64"}, "dtype"),
        ({"shard_size": 0}, "shard_size"),
        ({"class_names": ["a"], "num_classes": 2}, "num_classes"),
    ],
)
def test_writer_options_are_checked(options, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        RegionStoreWriter(tmp_path / "store", **options)


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="No record was written"), RegionStoreWriter(tmp_path / "store"):
        pass


def test_the_writer_copies_what_the_caller_may_reuse(tmp_path):
    given, kept = make(1), make(1)
    with RegionStoreWriter(tmp_path / "store") as writer:
        writer.write(given)
        for value in given.to_dict().values():
            if isinstance(value, np.ndarray):
                value[:] = 0
    assert_same(RegionStore(tmp_path / "store")[kept.image_id], kept)


def test_opening_what_is_no_finished_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="is empty: no store was finished there"):
        RegionStore(tmp_path)
    (tmp_path / "note.txt").touch()
    with pytest.raises(FileNotFoundError, match="no region store"):
        RegionStore(tmp_path)
    with RegionStoreWriter(tmp_path / "store") as writer:
        writer.write(make(1))
        with pytest.raises(ValueError, match="unfinished"):
            RegionStore(tmp_path / "store")
    manifest = tmp_path / "store" / "manifest.json"
    facts = json.loads(manifest.read_text())
    for damaged in ([], {name: value for name, value in facts.items() if name != "shards"}):
        manifest.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
            RegionStore(tmp_path / "store")
    manifest.write_text(json.dumps({**facts, "format_version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        RegionStore(tmp_path / "store")
    manifest.write_text(manifest.read_text()[:40])
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        RegionStore(tmp_path / "store")


@pytest.mark.parametrize("length", [0, 5, 100, 4096, -1])
def test_a_shard_cut_short_is_named(length, small):
    path = small.path / "regions-00002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:length])
    with pytest.raises(ValueError, match=r"regions-00002\.safetensors"):
        list(RegionStore(small.path).values())


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"more"])
def test_resuming_on_a_damaged_shard_is_refused(change, small):
    path = small.path / "regions-00002.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"regions-00002\.safetensors is cut short"):
        RegionStoreWriter(small.path, resume=True, detector="d")


def test_a_whole_shard_of_another_size_is_named(small):
    sizes = [shard["bytes"] for shard in json.loads((small.path / "manifest.json").read_text())["shards"]]
    other = next(number for number, size in enumerate(sizes) if size != sizes[2])
    path = small.path / "regions-00002.safetensors"
    path.write_bytes((small.path / f"regions-{other:05d}.safetensors").read_bytes())
    with pytest.raises(ValueError, match=rf"regions-00002\.safetensors has {sizes[other]} bytes, expected {sizes[2]}"):
        list(RegionStore(small.path).values())


@pytest.mark.parametrize("stop", [0, 1, 13, 25, 39])
def test_a_resumed_store_equals_an_undisturbed_one(stop, small, tmp_path):
    folder = tmp_path / "resumed"
    options = {"shard_size": 1000, "detector": "d"}

    def interrupted():
        for number in range(40):
            if number == stop:
                raise KeyboardInterrupt
            yield make(number)

    with pytest.raises(KeyboardInterrupt):
        write_store(interrupted(), folder, **options)
    assert not list(folder.glob("*.partial"))
    if stop < 2:
        assert not folder.exists()  # no shard, so that nothing is begun
        folder.mkdir()
    else:
        with pytest.raises(ValueError, match=r"an unfinished store: .* goes on when it is run again \(in Python"):
            RegionStore(folder)
        with pytest.raises(ValueError, match=r"an unfinished store: go on with resume=True, or"):
            RegionStoreWriter(folder, **options)
    (folder / "regions-00077.safetensors.partial").write_bytes(b"what a kill leaves")
    write_store(map(make, range(40)), folder, resume=True, **options)
    assert files_of(folder) == files_of(small.path)


def test_before_the_first_shard_no_setting_is_fixed(tmp_path):
    folder = tmp_path / "store"
    RegionStoreWriter(folder, detector="a")  # killed
    assert (folder / "unfinished.json").exists()
    with pytest.raises(RuntimeError), RegionStoreWriter(folder, detector="b") as writer:
        writer.write(make(0))
        raise RuntimeError
    assert not any(folder.iterdir())
    with RegionStoreWriter(folder, resume=True, detector="c") as writer:
        writer.write(make(0))
    assert RegionStore(folder).provenance["detector"] == "c"


def test_one_writer_a_folder(tmp_path):
    folder = tmp_path / "store"
    with RegionStoreWriter(folder) as writer:
        writer.write(make(0))
        with pytest.raises(ValueError, match=r"store is being written by another process: wait until it ends"):
            RegionStoreWriter(folder, resume=True)
        writer.write(make(1))
    with RegionStoreWriter(folder, resume=True) as writer:  # the lock ended with the block
        assert len(writer) == 2


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file, expected the folder of a region store"):
        RegionStore(tmp_path / "file")
    for path in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(ValueError, match="is, or is below, a file: take another folder"):
            RegionStoreWriter(path)


KILLED = {"shard_size": 1000, "detector": "d", "resume": True}


def killed(folder, line: int | None = None, call: int | None = None, after: bool = False) -> int:
    """
    Writes 40 records in a process that is killed by SIGKILL: before so many lines of Python, or before or after so many
    calls of os.replace, which is what makes a file appear. Returns how many lines ran: 0 of one that was killed.

    Lines, not seconds: how a write is spread over seconds is another thing on each machine.
    """
    lines, told = os.pipe()
    if (child := os.fork()) == 0:
        replace, calls = os.replace, []
        count = 0

        def die():
            os.kill(os.getpid(), signal.SIGKILL)

        def replace_and_die(*arguments):
            calls.append(arguments)
            if len(calls) - 1 == call and not after:
                die()
            replace(*arguments)
            if len(calls) - 1 == call:
                die()

        def trace(frame, event, argument):
            nonlocal count
            if event == "line":
                if count == line:
                    die()
                count += 1
            return trace

        os.replace = replace_and_die
        try:
            sys.settrace(trace)
            write_store(map(make, range(40)), folder, **KILLED)
            sys.settrace(None)
            os.write(told, str(count).encode())
        finally:
            die()
    os.close(told)
    os.waitpid(child, 0)
    with os.fdopen(lines) as file:
        return int(file.read() or 0)


def test_a_writer_killed_at_any_moment_resumes(small, tmp_path):
    """kill -9 at fifty moments spread over a whole write, each on a store of its own: equal files in the end."""
    lines = killed(tmp_path / "whole")
    assert files_of(tmp_path / "whole") == files_of(small.path)
    rng = np.random.default_rng(0)
    states = set()
    for number in range(50):
        folder = tmp_path / str(number)
        assert not killed(folder, line=int(lines * (number + rng.random()) / 50))
        states.add(len(list(folder.glob("regions-*.safetensors"))))
        write_store(map(make, range(40)), folder, **KILLED)
        assert files_of(folder) == files_of(small.path)
    assert states == set(range(len(small.shards) + 1))


@pytest.mark.parametrize("after", [False, True])
def test_a_writer_killed_between_any_two_files_resumes(after, small, tmp_path):
    number_of_calls = 1 + 2 * len(small.shards) + 2  # progress; each shard and progress; index and manifest
    for call in range(number_of_calls):
        folder = tmp_path / str(call)
        killed(folder, call=call, after=after)
        if call < number_of_calls - 1 or not after:
            assert not (folder / "manifest.json").exists()
        write_store(map(make, range(40)), folder, **KILLED)
        assert files_of(folder) == files_of(small.path)


def test_a_writer_killed_again_and_again_resumes(small, tmp_path):
    lines, folder, rng = killed(tmp_path / "whole"), tmp_path / "killed", np.random.default_rng(0)
    states = []
    for _ in range(20):
        assert not killed(folder, line=int(lines * rng.random() * 0.4))
        states.append(len(list(folder.glob("regions-*.safetensors"))))
    assert states == sorted(states) and len(set(states)) > 3, states
    write_store(map(make, range(40)), folder, **KILLED)
    assert files_of(folder) == files_of(small.path)


def test_a_resumed_writer_disturbs_no_reader(small):
    """Whoever opens the store meanwhile sees what it was or what it becomes."""
    if (child := os.fork()) == 0:
        try:
            for end in range(41, 61):
                write_store(map(make, range(end)), small.path, **KILLED)
        finally:
            os._exit(0)
    sizes = set()
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        store = RegionStore(small.path)
        sizes.add(len(store))
        assert list(store) == [make(number).image_id for number in range(len(store))]
        for number in (0, 39, len(store) - 1):
            assert_same(store[make(number).image_id], make(number))
        assert make(len(store)).image_id not in store
    assert len(RegionStore(small.path)) == 60
    assert len(sizes) > 2
    assert_same(small[make(39).image_id], make(39))


def test_a_finished_store_is_extended_only_when_asked(small):
    before = files_of(small.path)
    with pytest.raises(ValueError, match="a finished store"):
        RegionStoreWriter(small.path, detector="d")
    write_store(map(make, range(40)), small.path, resume=True, detector="d")
    assert files_of(small.path) == before
    old = RegionStore(small.path)
    grown = write_store(map(make, range(45)), small.path, resume=True, detector="d")
    assert list(grown) == [make(number).image_id for number in range(45)]
    assert_same(grown[make(44).image_id], make(44))
    # A reader of the old manifest sees the old store, even with the new index.
    assert make(44).image_id not in old
    assert_same(old[make(3).image_id], make(3))


@pytest.mark.parametrize("changes", [{"detector": "other"}, {"dtype": "float32"}, {"thresholds": {"score": 0.1}}])
def test_resuming_with_other_settings_is_refused(changes, small):
    with pytest.raises(ValueError, match=next(iter(changes))):
        RegionStoreWriter(small.path, resume=True, **{"detector": "d", **changes})


def test_resuming_checks_widths_and_ids(small):
    with RegionStoreWriter(small.path, resume=True, detector="d") as writer:
        assert len(writer.resumed) == 40
        with pytest.raises(ValueError, match="already"):
            writer.write(make(0))
        with pytest.raises(ValueError, match="expected 8"):
            writer.write(make(50, width=3))


def test_shards_without_a_manifest_are_not_adopted(small):
    (small.path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="another folder"):
        RegionStoreWriter(small.path, resume=True, detector="d")


def test_copies_and_pickles_hold_no_maps(small):
    small[make(1).image_id]
    for other in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
        assert not other.shards.opened
        assert_same(other[make(1).image_id], make(1))
    assert len(pickle.dumps(small)) < 300


def test_many_shards_keep_few_files_open(small, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_OPEN_SHARDS", 2)
    for number in range(40):
        assert_same(small[make(number).image_id], make(number))
        assert len(small.shards.opened) <= 2


class Rows(Dataset):
    """What a collator does: one look-up a row, in whichever process."""

    def __init__(self, store: RegionStore):
        self.store, self.ids = store, list(store)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return torch.tensor(self.store[self.ids[row]].features), os.getpid()


# The one true spawn of the suite: conftest makes forkservers of all that ask for it by name.
@pytest.mark.parametrize("context", ["fork", SpawnContext()], ids=["fork", "spawn"])
def test_workers(context, small):
    rows = Rows(small)
    assert rows[0][1] == os.getpid()  # a shard is open already, which a fork inherits
    assert small.shards.opened
    seen = list(DataLoader(rows, num_workers=2, multiprocessing_context=context, batch_size=None))
    assert len({pid for _, pid in seen} - {os.getpid()}) == 2
    for number, (features, _) in enumerate(seen):
        assert np.array_equal(features.numpy(), make(number).features)


def in_child(function):
    """What `function` returns in a forked child."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(writer, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer)


def test_a_fork_opens_its_own_files(small):
    small[make(1).image_id]
    inherited = list(small.shards.opened.values())

    def own_files() -> bool:
        assert_same(small[make(1).image_id], make(1))
        return not any(shard in inherited for shard in small.shards.opened.values())

    assert in_child(own_files) is True


def peak_memory() -> int:
    """In bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_million_ids_open_at_once(tmp_path):
    """The index is mapped, not parsed: under a second of the processor and 200 MB for a million ids."""
    folder, count = tmp_path / "store", 1_000_000
    RegionStoreWriter(folder)  # killed
    # A shard of a million images of one region, as the writer would have left it.
    names = [f"COCO_train2014_{number:012d}" for number in range(count)]
    offsets = np.arange(count + 1)
    shard = TensorFileWriter(folder / "regions-00000.safetensors")
    shard.append("image_id_offsets", offsets * len(names[0]))
    shard.append("region_offsets", offsets)
    shard.append("image_sizes", np.zeros((count, 2), np.int32))
    shard.append("features", (np.arange(count) % 1000).astype(np.float16)[:, None])
    shard.append("present", np.zeros(count, np.uint8))
    shard.append("checksums", np.zeros(count, np.uint32))
    shard.append("image_ids", np.frombuffer("".join(names).encode(), np.uint8))
    shard.commit()
    with RegionStoreWriter(folder, resume=True) as writer:
        assert len(writer) == count

    def cost() -> tuple[float, float]:
        memory, begin = peak_memory(), time.process_time()
        store = RegionStore(folder)
        assert len(store) == count
        assert store["COCO_train2014_000000777777"].features.tolist() == [[777]]
        assert "nothing" not in store
        return time.process_time() - begin, peak_memory() - memory

    seconds, growth = in_child(cost)
    assert seconds < 1
    assert growth < 200e6


def test_writing_takes_little_memory(tmp_path):
    """Features go to disk as they come: a shard larger than the memory allowed is no matter."""
    features = np.ones((100, 2048), np.float16)

    def growth() -> int:
        with RegionStoreWriter(tmp_path / "store") as writer:
            writer.write(RegionRecord("first", features=features))
            before = peak_memory()
            for number in range(300):
                writer.write(RegionRecord(str(number), features=features))
        return peak_memory() - before

    assert in_child(growth) < 20e6
    assert (tmp_path / "store" / "regions-00000.safetensors").stat().st_size > 120e6


@pytest.mark.parametrize("existed", [False, True])
def test_a_writer_whose_first_record_is_refused_leaves_no_folder_of_its_own(existed, tmp_path):
    folder = tmp_path / "store"
    if existed:
        folder.mkdir()
    with pytest.raises(ValueError, match="below the store's 2 classes"), RegionStoreWriter(folder, num_classes=2) as to:
        to.write(RegionRecord("x", features=[[1.0]], object_ids=[2]))
    assert folder.exists() == existed


def test_a_shard_of_another_store_is_not_taken_for_its_own(tmp_path):
    """Of one name and one size, as after a copy that mixed two folders: no image is given for another."""
    records = [make(number) for number in range(4)]
    others = [dataclasses.replace(each, image_id=each.image_id.replace("photo", "other")) for each in records]
    store, other = write_store(records, tmp_path / "store"), write_store(others, tmp_path / "other")
    (file,) = other.path.glob("regions-*")
    shutil.copy(file, store.path)
    store = RegionStore(store.path)
    says = "holds image 'other_1ü' where its index has 'photo_1ü': its files are not all of one store"
    for read in (store.__getitem__, lambda image_id: store.get_many([image_id])):
        with pytest.raises(ValueError, match=says):
            read("photo_1ü")
