"""Damage done to a sound store, byte by byte and value by value, and what `validate` says of it."""

import json
import re
import shutil

import numpy as np
import pytest
from region_stores import make, write_store

from unicoder_vl_hf import RegionStore
from unicoder_vl_hf.regions.shards import Shard
from unicoder_vl_hf.regions.tensor_files import TensorFile, TensorFileWriter
from unicoder_vl_hf.regions.validation import Problem, validate

SHARD = "regions-00001.safetensors"


@pytest.fixture
def store(tmp_path) -> RegionStore:
    """20 images in several shards."""
    store = write_store(map(make, range(20)), tmp_path / "store", shard_size=1000, num_classes=9)
    assert len(store.shards) > 2
    return store


def rewrite(path, change) -> None:
    """Writes a safetensors file again with its tensors changed: sound bytes, other content."""
    tensors = {name: tensor.copy() for name, tensor in TensorFile(path).tensors.items() if name != "padding"}
    change(tensors)
    writer = TensorFileWriter(path)
    for name, tensor in tensors.items():
        writer.append(name, tensor)
    writer.commit()


def test_a_sound_store_has_no_problems(store):
    assert list(validate(store)) == []


@pytest.mark.parametrize("name", ["manifest.json", "index.safetensors", SHARD])
def test_every_flipped_byte_is_found(name, store):
    """Each bit in turn, of a third of the bytes; never an exception."""
    path = store.path / name
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little") if name.endswith("safetensors") else 0
    used = len(content[:header].rstrip()) if header else 0
    for position in range(len(content)):
        if position % (500 if used < position < header else 3):
            continue  # between them are more of the same
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 1 << position // 3 % 8]) + content[position + 1 :]
        )
        problems = list(validate(store))
        assert problems, position
        assert name in {problem.file for problem in problems}, position
    path.write_bytes(content)
    assert list(validate(store)) == []


def test_a_flipped_byte_names_its_image_and_no_other(store):
    path = store.path / SHARD
    content = path.read_bytes()
    shard = Shard(path)
    ids = list(shard.image_ids)
    for name in ("features", "boxes", "object_ids", "class_probabilities", "image_ids", "image_sizes", "present"):
        header = json.loads(content[8:4096])
        begin, end = header[name]["data_offsets"]
        begin, end = begin + 4096, end + 4096
        if name in ("image_sizes", "present"):
            owner = np.arange(len(ids)).repeat((end - begin) // len(ids))
        elif name == "image_ids":
            owner = np.concatenate([[row] * len(image_id.encode()) for row, image_id in enumerate(ids)])
        else:
            rows = np.arange(len(ids)).repeat(np.diff(shard.region_offsets))
            owner = rows.repeat((end - begin) // len(rows))
        for position in range(begin, end, 11):
            path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
            hit = {image_id for problem in validate(store) for image_id in problem.image_ids}
            row = int(owner[position - begin])
            # Rows of a field that an image lacks are zeros that nobody reads: no image is named alone then.
            lacks = name not in ("image_ids", "image_sizes", "present") and getattr(store[ids[row]], name) is None
            assert hit == (set(ids) if lacks else {ids[row]}), (name, position)
    path.write_bytes(content)


@pytest.mark.parametrize("length", [0, 7, 4000, 4096, -1])
def test_truncation_names_all_images_of_the_shard(length, store):
    path = store.path / SHARD
    ids = tuple(Shard(path).image_ids)
    path.write_bytes(path.read_bytes()[:length])
    (problem,) = validate(store)
    assert (problem.file, problem.image_ids) == (SHARD, ids)
    assert "cut short" in problem.message
    path.unlink()
    (problem,) = validate(store)
    assert (problem.file, problem.image_ids) == (SHARD, ids)
    assert "not here" in problem.message


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("features", np.nan, "features .* nan"),
        ("features", np.inf, "features .* inf"),
        ("boxes", [5, 5, 4, 9], "inverted"),
        ("boxes", [0, 0, 999, 9], "outside"),
        ("object_ids", 9, "object_ids hold 9, expected"),
        ("object_scores", 1.5, "object_scores hold 1.5"),
    ],
)
def test_values_that_no_record_may_have(field, value, says, store):
    """Found as values, whatever the checksums say."""
    path = store.path / SHARD
    shard = Shard(path)
    row = next(row for row in range(len(shard)) if getattr(shard.record(row), field) is not None)
    image_id, first = shard.image_ids[row], int(shard.region_offsets[row])

    def change(tensors):
        tensors[field][first] = value

    rewrite(path, change)
    messages = [problem.message for problem in validate(store) if problem.image_ids == (image_id,)]
    assert any(re.search(f"^row {row}: .*{says}", message) for message in messages), messages
    assert any("CRC-32" in message for message in messages)


def test_entries_without_rows_and_rows_without_entries(store):
    """The index is rewritten in ways that its own checksum would tell; here it must say whose entry it is."""
    ids = list(store)

    def swap_numbers(tensors):
        tensors["numbers"][[2, 5]] = tensors["numbers"][[5, 2]]

    def point_nowhere(tensors):
        tensors["numbers"][3] = 20

    index = store.path / "index.safetensors"
    original = index.read_bytes()
    numbers = TensorFile(index).tensors["numbers"].tolist()
    rewrite(index, point_nowhere)
    problems = list(validate(store))
    assert Problem("index.safetensors", "has an entry for image number 20 where there is none of its id") in problems
    assert [problem.image_ids for problem in problems if "has no entry" in problem.message] == [(ids[numbers[3]],)]

    index.write_bytes(original)
    rewrite(index, swap_numbers)
    lost = {
        image_id for problem in validate(store) if "has no entry" in problem.message for image_id in problem.image_ids
    }
    assert lost == {ids[numbers[2]], ids[numbers[5]]}
    stray = {ids_ for problem in validate(store) if "none of its id" in problem.message for ids_ in problem.image_ids}
    assert stray == lost

    index.write_bytes(original[:-3])
    assert [problem.file for problem in validate(store)] == ["index.safetensors"]
    index.unlink()
    assert [problem.file for problem in validate(store)] == ["index.safetensors"]


def test_an_image_in_two_shards(store, tmp_path):
    """Two stores of one image in common, put together by hand."""
    other = write_store(map(make, range(18, 25)), tmp_path / "other", num_classes=9)
    number = len(store.shards)
    shutil.copy(other.path / "regions-00000.safetensors", store.path / f"regions-{number:05d}.safetensors")
    write_store([], store.path, resume=True, num_classes=9)
    problems = list(validate(store))
    assert {problem.image_ids for problem in problems} == {(make(18).image_id,), (make(19).image_id,)}
    assert all("holds, too" in problem.message for problem in problems)
    assert all(problem.file == f"regions-{number:05d}.safetensors" for problem in problems)


def test_what_is_no_finished_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="is empty: no store was finished there"):
        list(validate(tmp_path))
