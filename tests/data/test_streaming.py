"""Pairs of a stream: each row once a pass, the same after any stop, and no more files opened than are read."""

import json
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest

from unicoder_vl_hf.data.streaming import CaptionStream, StreamedPairs

SHARDS, ROWS = 6, 7


def write_shards(folder: Path, rows: list[dict], shards: int, kind: str = "parquet", split: str = "train") -> Path:
    """Rows in shards of equal size; of parquet in row groups of three."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(shards):
        part = datasets.Dataset.from_list(rows[number * len(rows) // shards : (number + 1) * len(rows) // shards])
        path = folder / f"{split}-{number:05}-of-{shards:05}.{kind}"
        if kind == "parquet":
            part.to_parquet(path, batch_size=3)
        else:
            part.to_json(path)
    return folder


@contextmanager
def opened(folder: Path):
    """Names of the files in a folder that this process opens, anything that Python opens for others included."""
    names: set[str] = set()
    watching = True

    def hook(event, arguments):
        if watching and event == "open" and isinstance(arguments[0], str | Path):
            path = Path(arguments[0])
            if folder in path.parents:
                names.add(path.name)

    sys.addaudithook(hook)  # which cannot be taken away again
    yield names
    watching = False


def captions(count: int, per_image: int = 1) -> list[dict]:
    return [{"image_id": f"image{n // per_image}", "caption": f"caption {n}"} for n in range(count)]


@pytest.fixture(params=["parquet", "jsonl"])
def folder(request, tmp_path):
    return write_shards(tmp_path / "shards", captions(SHARDS * ROWS), SHARDS, request.param)


class AllImages:
    """Knows every image."""

    def __contains__(self, image_id):
        return True


def streamed(folder: Path, images=None, split: str = "train", **options) -> StreamedPairs:
    source = {name: options.pop(name) for name in ("skip_missing", "rename") if name in options}
    stream = CaptionStream(folder, split, images or AllImages(), **source)
    return StreamedPairs(stream, **{"seed": 3, "window": 10} | options)


def numbers(rows: Iterable) -> list[int]:
    """Numbers of captions, by which rows are told apart."""
    return [int(row["caption"].split()[1]) for row in rows]


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_each_row_once_a_pass_over_all_processes(folder, num_processes):
    """Also where the shards do not divide among the processes."""
    of_pass: list[list[int]] = [[], []]
    for index in range(num_processes):
        made = streamed(folder, window=ROWS, process_index=index, num_processes=num_processes)
        shards = len(range(index, SHARDS, num_processes))
        for number in range(2):
            of_pass[number] += numbers(made.make_rows(range(number * shards * ROWS, (number + 1) * shards * ROWS)))
    for found in of_pass:
        assert sorted(found) == list(range(SHARDS * ROWS))
    assert of_pass[0] != of_pass[1]


def test_shards_and_rows_are_shuffled(folder):
    found = numbers(streamed(folder, window=ROWS).make_rows(range(2 * SHARDS * ROWS)))
    shards = [[number // ROWS for number in found[start : start + ROWS]] for start in range(0, len(found), ROWS)]
    assert all(len(set(shard)) == 1 for shard in shards)  # a window is a shard here
    order = [shard[0] for shard in shards]
    assert order[:SHARDS] != list(range(SHARDS)) and order[:SHARDS] != order[SHARDS:]
    assert all(found[start : start + ROWS] != sorted(found[start : start + ROWS]) for start in range(0, 42, ROWS))
    assert found != numbers(streamed(folder, window=ROWS, seed=4).make_rows(range(2 * SHARDS * ROWS)))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_stream_goes_on_exactly_from_any_row(tmp_path, kind):
    """Over the ends of shards, row groups, windows and passes, and in the middle of the captions of an image."""
    rows = [{"image_id": f"image{n}", "caption": [f"caption {2 * n}", f"caption {2 * n + 1}"]} for n in range(21)]
    folder = write_shards(tmp_path / "listed", rows, 4, kind)
    whole = streamed(folder, num_processes=2, window=9).make_rows(range(60))
    states, made = {}, streamed(folder, num_processes=2, window=9)
    for row in range(50):
        states[row] = json.dumps(made.state_dict(row))
        made.make_rows([row])
    made = streamed(folder, num_processes=2, window=9)
    for row in range(0, 50, 4):
        made.load_state_dict(json.loads(states[row]))
        again = made.make_rows(range(row, row + 10))
        assert list(map(dict, again)) == list(map(dict, whole[row : row + 10])), row
        assert made.state_dict(row + 9)["window"] == row // 9 + 1
    assert len({(row["epoch"], row["row_index"]) for row in whole}) == 60  # masks of their own


def test_mismatches_are_of_the_window(tmp_path):
    folder = write_shards(tmp_path / "shards", captions(120, per_image=3), SHARDS)
    rows = streamed(folder, window=20).make_rows(range(240))
    for start in range(0, 240, 20):
        window = rows[start : start + 20]
        images, texts = ({row[name] for row in window} for name in ("image_id", "caption"))
        image_of = {row["caption"]: row["image_id"] for row in window}
        for row in window:
            assert row["mismatch_image_id"] in images and row["mismatch_caption"] in texts
            assert image_of[row["mismatch_caption"]] != row["mismatch_image_id"]
            replaced = [row["mismatch_image_id"] != row["image_id"], row["mismatch_caption"] != row["caption"]]
            assert sorted(replaced) == [False, True]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_shard_is_opened_when_it_is_read(tmp_path, kind):
    folder = write_shards(tmp_path / "shards", captions(24 * ROWS), 24, kind)
    with opened(folder) as names:
        made = streamed(folder, process_index=1, num_processes=5)
        assert len(names) == 1  # for the columns
        made.make_rows(range(10))
        assert len(names) <= 1 + 2  # a window of 10 in shards of 7
        made.make_rows(range(10, 40))
        assert 5 <= len(names) <= 1 + 5 + 1  # its own, and the first of another pass


def test_images_without_regions(tmp_path):
    folder = write_shards(tmp_path / "shards", captions(SHARDS * ROWS), SHARDS)
    images = {f"image{n}" for n in range(42) if n != 17}
    with pytest.raises(ValueError, match=r"shards: image 'image17' has no regions in .*--skip_missing"):
        streamed(folder, images).make_rows(range(42))
    found = numbers(streamed(folder, images, window=41, skip_missing=True).make_rows(range(41)))
    assert sorted(found) == [n for n in range(42) if n != 17]
    with pytest.raises(ValueError, match=r"shards has no caption of the split 'train' with regions"):
        streamed(folder, {"another"}, skip_missing=True).make_rows([0])


def test_other_names_of_columns_and_images(tmp_path):
    rows = [{"file_name": f"photos/{n}.jpg", "comment": f"caption {n}", "size": n, "split": "train"} for n in range(20)]
    folder = write_shards(tmp_path / "shards", rows, 2)
    found = streamed(folder, {f"photo {n}" for n in range(20)}, rename="photo {}".format).make_rows(range(20))
    assert sorted(row["image_id"] for row in found) == sorted(f"photo {n}" for n in range(20))
    assert sorted(numbers(found)) == list(range(20))


def test_the_first_pairs_of_a_split(tmp_path):
    write_shards(tmp_path, captions(20), 2)
    write_shards(tmp_path, captions(20), 4, split="val")
    stream = CaptionStream(tmp_path, "val", AllImages())  # which datasets calls validation
    with opened(tmp_path) as names:
        assert stream.first(7).to_list() == captions(20)[:7]
    assert names == {"val-00000-of-00004.parquet", "val-00001-of-00004.parquet"}
    assert stream.first(99).to_list() == captions(20)


def test_what_is_no_stream_says_what_to_do(tmp_path):
    folder = write_shards(tmp_path / "shards", captions(12), 3)
    with pytest.raises(ValueError, match=r"has no split 'dev'; its splits are train\."):
        streamed(folder, split="dev")
    with pytest.raises(ValueError, match=r"has 3 shards of the split 'train' for 4 processes; expected one each"):
        streamed(folder, process_index=0, num_processes=4)
    with pytest.raises(ValueError, match=r"shuffle_buffer_size=1, expected at least 2 captions"):
        streamed(folder, window=1)
    for path in (next(folder.iterdir()), tmp_path / "saved"):
        datasets.Dataset.from_list(captions(3)).save_to_disk(tmp_path / "saved")
        with pytest.raises(ValueError, match=r"is no folder of shards, expected parquet or JSON lines: read it"):
            streamed(path)
    rows = [{"image_id": str(n), "words": "a dog"} for n in range(4)]
    with pytest.raises(ValueError, match=r"no column 'caption'; the columns are \['image_id', 'words'\]"):
        streamed(write_shards(tmp_path / "columns", rows, 1))
    rows = [row | {"split": "test"} for row in captions(4)]
    with pytest.raises(ValueError, match=r"image 'image0' among those of the split 'train' has 'test' in its column"):
        streamed(write_shards(tmp_path / "splits", rows, 1)).make_rows([0])
    rows = [{"image_id": "one", "caption": f"caption {n}"} for n in range(20)]
    with pytest.raises(ValueError, match=r"10 captions in a row: No mismatch exists for .*--shuffle_buffer_size"):
        streamed(write_shards(tmp_path / "one", rows, 1)).make_rows([0])
    rows = [{"image_id": "one", "caption": " "}]
    with pytest.raises(ValueError, match=r"caption of image 'one' is ' '"):
        streamed(write_shards(tmp_path / "blank", rows, 1)).make_rows([0])
