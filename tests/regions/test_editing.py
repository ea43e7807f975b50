"""Stores merged, cut and split, against the records that went in; interrupted anywhere and called again."""

import os

import pytest
from region_stores import assert_same, files_of, make, write_store

from unicoder_vl_hf import RegionStore, RegionStoreWriter
from unicoder_vl_hf.regions import editing, shards, store as store_module, validation
from unicoder_vl_hf.regions.editing import merge_stores, split_store, subset_store
from unicoder_vl_hf.regions.validation import validate

OPTIONS = {"shard_size": 1000, "detector": "d", "thresholds": {"score": 0.2}, "class_names": [str(k) for k in range(9)]}


def name(number: int) -> str:
    return make(number).image_id


@pytest.fixture
def parts(tmp_path):
    """Images 0-9, 10-12 and 13-29."""
    ranges = (range(10), range(10, 13), range(13, 30))
    return [write_store(map(make, part), tmp_path / f"part-{k}", **OPTIONS) for k, part in enumerate(ranges)]


def assert_holds(store: RegionStore, numbers) -> None:
    assert list(store) == [name(number) for number in numbers]
    for number in numbers:
        assert_same(store[name(number)], make(number))
    assert store.num_regions == sum(make(number).num_regions for number in numbers)
    assert list(validate(store)) == []


def test_merged_shards_are_the_very_files(parts, tmp_path):
    merged = merge_stores(parts, tmp_path / "merged")
    assert_holds(merged, range(30))
    originals = [part.path / facts["file"] for part in parts for facts in part.manifest["shards"]]
    links = sorted(merged.path.glob("regions-*.safetensors"))
    assert [path.stat().st_ino for path in links] == [path.stat().st_ino for path in originals]
    assert merged.provenance == parts[0].provenance
    assert_holds(parts[2], range(13, 30))
    assert not (merged.path / "unfinished.json").exists()
    # It is a store like any other: it can grow.
    with RegionStoreWriter(merged.path, resume=True, **OPTIONS) as writer:
        assert name(29) in writer.resumed
        writer.write(make(30))
    assert_holds(RegionStore(merged.path), range(31))
    assert_holds(parts[2], range(13, 30))


def test_shards_are_copied_where_there_are_no_links(parts, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    merged = merge_stores(parts, tmp_path / "merged")
    assert_holds(merged, range(30))
    assert not list(merged.path.glob("*.partial"))
    assert (merged.path / "regions-00000.safetensors").stat().st_nlink == 1


def test_moving_leaves_nothing_but_what_is_no_store(parts, tmp_path):
    (parts[1].path / "notes.txt").write_text("mine")
    merged = merge_stores(parts, tmp_path / "merged", move=True)
    assert_holds(merged, range(30))
    assert not parts[0].path.exists() and not parts[2].path.exists()
    assert [path.name for path in parts[1].path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("target", ["_link_or_copy", "sync_folder", "finish_store", "_remove", "RegionStore"])
@pytest.mark.parametrize("call", [0, 1, 2, 5])
def test_an_interrupted_merge_goes_on(target, call, parts, tmp_path, monkeypatch):
    expected = merge_stores(parts, tmp_path / "undisturbed")
    folder = tmp_path / "merged"
    original, calls = getattr(editing, target), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(editing, target, interrupted)
        try:
            merge_stores(parts, folder, move=True)
        except KeyboardInterrupt:
            if (folder / "unfinished.json").exists() and not (folder / "manifest.json").exists():
                with pytest.raises(ValueError, match="unfinished"):
                    RegionStore(folder)
                with pytest.raises(ValueError, match="is being merged from"):
                    RegionStoreWriter(folder, resume=True, **OPTIONS)
                with pytest.raises(ValueError, match="no merge of"):
                    merge_stores(parts[:2], folder)
    if not (folder / "manifest.json").exists() or (folder / "unfinished.json").exists():
        merge_stores(parts, folder, move=True)
    assert files_of(folder) == files_of(expected.path)
    assert not any(part.path.exists() for part in parts)


def test_a_finished_merge_stays_as_it_is(parts, tmp_path, caplog):
    folder = merge_stores(parts, tmp_path / "merged").path
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert_holds(merge_stores(parts, folder), range(30))
    assert f"{folder} is finished, and stays as it is; --restart begins anew." in caplog.text
    assert {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    for others in (parts[:2], parts[::-1]):
        with pytest.raises(ValueError, match="holds a store already, and no merge of"):
            merge_stores(others, folder)
    silent = write_store(map(make, range(10)), tmp_path / "silent", shard_size=1000, detector="d")
    told = merge_stores([silent], tmp_path / "told", num_classes=1600)
    with pytest.raises(ValueError, match=r"told was merged with num_classes=1600, not 1700: begin anew"):
        merge_stores([silent], told.path, num_classes=1700)
    assert merge_stores([silent], told.path, num_classes=1700, restart=True).provenance["num_classes"] == 1700


def test_a_merge_begins_anew(parts, tmp_path):
    folder = merge_stores(parts, tmp_path / "merged").path
    assert_holds(merge_stores(parts[:2], folder, restart=True), range(13))
    assert not list(tmp_path.glob("*.before-restart"))
    for part in parts:
        assert list(validate(part)) == []  # whose shards were links
    with pytest.raises(ValueError, match=r"in .*part-1"):
        merge_stores([parts[1], parts[1]], folder, restart=True)
    (parts[2].path / "conversion.json").touch()  # as `convert` leaves it
    with pytest.raises(ValueError, match=r"holds 'conversion\.json', which is no part of a store made of other stores"):
        merge_stores(parts[:2], parts[2].path, restart=True)
    assert_holds(RegionStore(folder), range(13))  # as it was


def test_a_source_written_anew_since_a_merge_was_stopped_is_linked_anew(parts, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    folder = tmp_path / "merged"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(editing, "finish_store", stop)
        merge_stores(parts, folder)
    for file in parts[0].path.iterdir():
        file.unlink()
    write_store(map(make, range(50, 60)), parts[0].path, **OPTIONS)
    assert_holds(merge_stores(parts, folder), [*range(50, 60), *range(10, 30)])


def test_a_store_is_told_its_number_of_classes(tmp_path):
    silent = write_store(map(make, range(10)), tmp_path / "silent", shard_size=1000, detector="d")
    highest = int(silent.highest_object_ids(silent).max())
    image_id = next(each for each in silent if silent.highest_object_ids([each]) == highest)
    with pytest.raises(ValueError, match=rf"'{image_id}': object_ids hold {highest}, .*below num_classes={highest}, "):
        merge_stores([silent], tmp_path / "told", num_classes=highest)
    assert not (tmp_path / "told").exists()
    told = merge_stores([silent], tmp_path / "told", num_classes=highest + 1)
    assert_holds(told, range(10))
    assert told.provenance == silent.provenance | {"num_classes": highest + 1}
    both = write_store(map(make, range(10, 13)), tmp_path / "more", shard_size=1000, detector="d")
    with pytest.raises(ValueError, match=rf"told has num_classes={highest + 1}, .*more has None: a store holds"):
        merge_stores([told, both], tmp_path / "merged")
    merged = merge_stores([told, both], tmp_path / "merged", num_classes=highest + 1)
    assert_holds(merged, range(13))
    with pytest.raises(ValueError, match=rf"told has num_classes={highest + 1}, not 1600: leave it out"):
        merge_stores([told], tmp_path / "other", num_classes=1600)


def test_duplicates_name_the_image_and_both_stores(parts, tmp_path):
    other = write_store([make(40), make(11)], tmp_path / "other", **OPTIONS)
    with pytest.raises(ValueError, match=rf"'{name(11)}' is in {parts[1].path} and in {other.path}"):
        merge_stores([*parts, other], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ValueError, match=rf"is in {parts[1].path} and in {parts[1].path}"):
        merge_stores([parts[1], parts[1]], tmp_path / "merged")


def test_images_that_an_index_knows_too_early_are_left_out(parts, tmp_path, monkeypatch):
    """A source whose writer was stopped between the new index and the new manifest."""

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store_module, "manifest_checksum", stop)
        write_store([make(40)], parts[0].path, resume=True, **OPTIONS)
    assert len(RegionStore(parts[0].path).index.image_ids) == 11
    assert_holds(merge_stores(parts, tmp_path / "merged"), range(30))


def test_equal_hashes_are_no_duplicates(parts, tmp_path, monkeypatch):
    for module in (shards, validation):
        monkeypatch.setattr(module, "hash_id", lambda image_id: 7)
    same = [write_store(map(make, part), tmp_path / f"same-{part[0]}", **OPTIONS) for part in (range(4), range(4, 7))]
    assert_holds(merge_stores(same, tmp_path / "merged"), range(7))


@pytest.mark.parametrize(
    "change", [{"detector": "other"}, {"dtype": "float32"}, {"thresholds": {"score": 0.1}}, {"class_names": None}]
)
def test_other_provenance_is_refused_and_named(change, parts, tmp_path):
    other = write_store([make(40)], tmp_path / "other", **{**OPTIONS, **change})
    with pytest.raises(ValueError, match=rf"{parts[0].path} has {next(iter(change))}=.*{other.path} has "):
        merge_stores([*parts, other], tmp_path / "merged")
    wide = write_store([make(41, width=3)], tmp_path / "wide", **OPTIONS)
    with pytest.raises(ValueError, match=r"has feature_dim=8, .* has 3"):
        merge_stores([*parts, wide], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merging_into_a_store_or_from_nothing_is_refused(parts, tmp_path):
    before = files_of(parts[0].path)
    with pytest.raises(ValueError, match=r"holds a store already, and no merge of .*begin anew with .*--restart"):
        merge_stores(parts[1:], parts[0].path)
    for restart in (False, True):
        with pytest.raises(ValueError, match="is one of the stores to be merged"):
            merge_stores(parts, parts[0].path, restart=restart)
    assert files_of(parts[0].path) == before
    with pytest.raises(ValueError, match="sources is empty"):
        merge_stores([], tmp_path / "merged")
    with pytest.raises(FileNotFoundError, match="no region store"):
        merge_stores([tmp_path / "nothing"], tmp_path / "merged")


def test_a_subset_is_in_disk_order_and_equal(parts, tmp_path):
    subset = subset_store(parts[2], [name(number) for number in (20, 15, 28, 15)], tmp_path / "subset")
    assert_holds(subset, [15, 20, 28])
    assert subset.provenance == parts[2].provenance
    # Again is nothing; others are refused.
    before = files_of(subset.path)
    subset_store(parts[2], [name(number) for number in (20, 15, 28)], tmp_path / "subset")
    assert files_of(subset.path) == before
    for numbers in ((20, 15), (20, 16, 28)):
        with pytest.raises(ValueError, match="holds other images"):
            subset_store(parts[2], map(name, numbers), tmp_path / "subset")
    with pytest.raises(KeyError, match="nobody"):
        subset_store(parts[2], [name(15), "nobody"], tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_subset_keeps_other_dtypes_to_the_bit(dtype, tmp_path):
    store = write_store(map(make, range(5)), tmp_path / "store", dtype=dtype)
    subset = subset_store(store, list(store), tmp_path / "subset")
    assert files_of(subset.path) == files_of(store.path)


def test_a_subset_goes_on_after_an_interruption(parts, tmp_path, monkeypatch):
    wanted = [name(number) for number in range(13, 30)]
    monkeypatch.setattr(
        RegionStoreWriter.__init__, "__kwdefaults__", {**RegionStoreWriter.__init__.__kwdefaults__, "shard_size": 1000}
    )
    expected = subset_store(parts[2], wanted, tmp_path / "undisturbed")
    original, calls = RegionStoreWriter.write, []

    def interrupted(self, record):
        calls.append(record)
        if len(calls) == 12:
            raise KeyboardInterrupt
        original(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(RegionStoreWriter, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            subset_store(parts[2], wanted, tmp_path / "subset")
    assert (tmp_path / "subset" / "regions-00000.safetensors").exists()
    subset_store(parts[2], wanted, tmp_path / "subset")
    assert files_of(tmp_path / "subset") == files_of(expected.path)


def test_a_split_shares_no_image(parts, tmp_path):
    stores = split_store(parts[2], {"train": map(name, range(15, 30)), "val": [name(13)]}, tmp_path / "splits")
    assert_holds(stores["train"], range(15, 30))
    assert_holds(RegionStore(tmp_path / "splits" / "val"), [13])
    with pytest.raises(ValueError, match=rf"'{name(14)}' is in the splits 'train' and 'val'"):
        split_store(parts[2], {"train": [name(13), name(14)], "val": [name(14)]}, tmp_path / "again")
    assert not (tmp_path / "again").exists()
