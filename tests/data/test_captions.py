import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from places import SHARED

from unicoder_vl_hf.data.caption_files import FORMATS, caption_format, encode_column
from unicoder_vl_hf.data.captions import JoinReport, check_tokens, join, read_captions
from unicoder_vl_hf.name_lists import read_names

SHARED = SHARED / "data"

KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filename": "COCO_val2014_000000391895.jpg",
            "filepath": "val2014",
            "imgid": 0,
            "cocoid": 391895,
            "split": "restval",
            "sentences": [{"raw": "A man on a bike.", "sentid": 770337}, {"raw": "A man rides.", "sentid": 771687}],
        },
        {"filename": "b.c.jpg", "imgid": 1, "split": "test", "sentences": [{"raw": "A  dog\u2028runs", "sentid": 5}]},
    ],
}
COCO = {
    "info": {},
    "images": [{"id": 42, "file_name": "COCO_val2014_000000000042.jpg"}, {"id": 7, "file_name": "seven.jpg"}],
    "annotations": [
        {"image_id": 7, "id": 100, "caption": "Seven"},
        {"image_id": 42, "id": 3, "caption": "Forty-two"},
        {"image_id": 7, "id": 101, "caption": "Seven"},
    ],
}


def write(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_karpathy(tmp_path):
    rows = read_captions(write(tmp_path / "dataset_coco.json", KARPATHY))
    man = {
        "image_id": "COCO_val2014_000000391895",
        "split": "train",  # restval counts as train
        "file_name": "COCO_val2014_000000391895.jpg",
        "imgid": 0,
        "cocoid": 391895,
        "filepath": "val2014",
    }
    dog = {"image_id": "b.c", "split": "test", "file_name": "b.c.jpg", "imgid": 1, "cocoid": None, "filepath": None}
    assert list(rows) == [
        man | {"caption": "A man on a bike.", "caption_id": 770337},
        man | {"caption": "A man rides.", "caption_id": 771687},
        dog | {"caption": "A  dog\u2028runs", "caption_id": 5},
    ]


def test_karpathy_split(tmp_path):
    path = write(tmp_path / "dataset_coco.json", KARPATHY)
    assert read_captions(path, split="train")["caption"][:] == ["A man on a bike.", "A man rides."]
    assert read_captions(path, split="test")["image_id"][:] == ["b.c"]
    with pytest.raises(ValueError, match=r"dataset_coco.json has no split 'val'; its splits are train, test"):
        read_captions(path, split="val")


def test_coco(tmp_path):
    rows = read_captions(write(tmp_path / "captions_val2014.json", COCO))
    assert list(rows) == [
        {"image_id": "7", "caption": "Seven", "caption_id": 100, "file_name": "seven.jpg"},
        {"image_id": "42", "caption": "Forty-two", "caption_id": 3, "file_name": "COCO_val2014_000000000042.jpg"},
        {"image_id": "7", "caption": "Seven", "caption_id": 101, "file_name": "seven.jpg"},
    ]


def test_coco_without_images(tmp_path):
    rows = read_captions(write(tmp_path / "captions.json", {"annotations": [{"image_id": 7, "caption": "Seven"}]}))
    assert rows.column_names[:2] == ["image_id", "caption"] and "file_name" not in rows.column_names


def test_flickr_token(tmp_path):
    lines = "1000092795.jpg#0\tTwo men , outside .\r\n1000092795.jpg#1\t\ttab\tinside\n\nb#2.jpg.1#0\tA dog\n"
    rows = read_captions(write(tmp_path / "results_20130124.token", lines))
    assert list(rows) == [
        {"image_id": "1000092795", "caption": "Two men , outside .", "file_name": "1000092795.jpg", "caption_id": 0},
        {"image_id": "1000092795", "caption": "\ttab\tinside", "file_name": "1000092795.jpg", "caption_id": 1},
        {"image_id": "b#2.jpg.1", "caption": "A dog", "file_name": "b#2.jpg.1", "caption_id": 0},  # .1 is no suffix
    ]


TABLES = {
    "jsonl": '{"image_id": 391895, "caption": "a, b", "n": 1}\n\n{"caption": "c", "image_id": "007", "n": 2}\n',
    "json": '[{"image_id": 391895, "caption": "a, b", "n": 1}, {"caption": "c", "image_id": "007", "n": 2}]',
    "csv": 'n,image_id,caption\n1,391895,"a, b"\n2,007,c\n',
    "tsv": "n\timage_id\tcaption\n1\t391895\ta, b\n2\t007\tc\n",
}


@pytest.mark.parametrize("suffix", TABLES)
def test_tables(tmp_path, suffix):
    rows = read_captions(write(tmp_path / f"captions.{suffix}", TABLES[suffix]))
    assert rows["image_id"][:] == ["391895", "007"]  # numbers become text, and text keeps its zeros
    assert rows["caption"][:] == ["a, b", "c"]
    assert list(map(int, rows["n"])) == [1, 2]
    assert rows.features["image_id"] == rows.features["caption"] == datasets.Value("string")


@pytest.mark.parametrize(
    "ids", [[391895, 7], pa.array(["391895", "7"]).dictionary_encode(), pa.array(["391895", "7"], pa.large_string())]
)
def test_parquet(tmp_path, ids):
    pq.write_table(
        pa.table({"image_id": ids, "caption": ["a", "b"], "n": [1, 2], "split": ["train", "val"]}),
        tmp_path / "x.parquet",
    )
    rows = read_captions(tmp_path / "x.parquet")
    assert list(rows) == [
        {"image_id": "391895", "caption": "a", "n": 1, "split": "train"},
        {"image_id": "7", "caption": "b", "n": 2, "split": "val"},
    ]
    assert rows.features["image_id"] == datasets.Value("string")
    assert read_captions(tmp_path / "x.parquet", split="val")["image_id"][:] == ["7"]
    with pytest.raises(ValueError, match="no split 'test'; its splits are train, val"):
        read_captions(tmp_path / "x.parquet", split="test")


def test_mapping(tmp_path):
    rows = read_captions(write(tmp_path / "captions.json", {"285": ["A bear.", "A big bear."], "632": ["A room."]}))
    assert list(rows) == [
        {"image_id": "285", "caption": "A bear."},
        {"image_id": "285", "caption": "A big bear."},
        {"image_id": "632", "caption": "A room."},
    ]


def test_saved_datasets(tmp_path):
    train = datasets.Dataset.from_dict({"image_id": [1, 2], "caption": ["a", "b"]})
    train.save_to_disk(tmp_path / "one")
    assert list(read_captions(tmp_path / "one")) == [
        {"image_id": "1", "caption": "a"},
        {"image_id": "2", "caption": "b"},
    ]
    datasets.DatasetDict({"train": train, "test": train.select([1])}).save_to_disk(tmp_path / "two")
    rows = read_captions(tmp_path / "two")
    assert (rows["image_id"][:], rows["split"][:]) == (["1", "2", "2"], ["train", "train", "test"])
    assert read_captions(tmp_path / "two", split="test")["caption"][:] == ["b"]
    with pytest.raises(ValueError, match="no split 'val'; its splits are train, test"):
        read_captions(tmp_path / "two", split="val")


def test_folder_that_datasets_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "repository"
    folder.mkdir()
    write(folder / "train.jsonl", '{"image_id": "x", "caption": "a"}\n')
    write(folder / "test.jsonl", '{"image_id": "y", "caption": "b"}\n')
    rows = read_captions(folder)
    assert sorted(zip(rows["image_id"], rows["split"], strict=True)) == [("x", "train"), ("y", "test")]


def test_order_and_duplicates_are_kept_over_many_chunks(tmp_path):
    ids = [str(i % 97) for i in range(25_000)]
    lines = "".join(
        json.dumps({"image_id": i, "caption": "same"} | ({"late": k} if k > 20_000 else {})) + "\n"
        for k, i in enumerate(ids)
    )
    rows = read_captions(write(tmp_path / "many.jsonl", lines))
    assert rows["image_id"][:] == ids
    assert (rows[0]["late"], rows[24_999]["late"]) == (None, 24_999)


def test_extra_columns_after_the_first_row(tmp_path):
    rows = read_captions(
        write(
            tmp_path / "a.jsonl", '{"image_id": "1", "caption": "a"}\n{"image_id": "2", "caption": "b", "url": "u"}\n'
        )
    )
    assert rows["url"][:] == [None, "u"]


@pytest.mark.parametrize(
    "name, content, format",
    [
        ("a.txt", "x.jpg#0\tA dog\n", "token"),  # Flickr8k.token.txt
        ("a.csv", "x.jpg#0\tA dog\n", "token"),
        ("a.txt", "\ufeffimage_id,caption\n1,a\n", "csv"),
        ("a.txt", '{"image_id": "1", "caption": "a"}\n', "jsonl"),
        ("a.json", '{"image_id": "1", "caption": "a"}\n{"image_id": "2", "caption": "b"}\n', "jsonl"),
        ("a.json", "\n" + json.dumps(COCO, indent=1), "json"),
        ("a", json.dumps(KARPATHY), "json"),
    ],
)
def test_format_is_found_from_content(tmp_path, name, content, format):
    path = write(tmp_path / name, content)
    assert caption_format(path) == format
    assert len(read_captions(path)) >= 1


def test_format_can_be_named(tmp_path):
    path = write(tmp_path / "a.json", COCO)
    assert len(read_captions(path, format="coco")) == 3
    with pytest.raises(
        ValueError, match=r"a.json holds keys \['info', 'images', 'annotations'\] at its top; expected karpathy"
    ):
        read_captions(path, format="karpathy")
    with pytest.raises(ValueError, match="format='xml' is unknown; expected one of json"):
        read_captions(path, format="xml")
    assert {"karpathy", "coco", "token", "jsonl", "csv", "parquet", "datasets"} <= set(FORMATS)


def karpathy(**changes):
    image = {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "a", "sentid": 0}]} | changes
    return {"images": [KARPATHY["images"][0], {k: v for k, v in image.items() if v is not None}]}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", '{"images": [', r"a\.json, line 1, column 13: malformed json"),
        ("a.json", {"annotations": 3}, r"a\.json holds keys \['annotations'\] at its top; expected one of the layouts"),
        ("a.json", karpathy(filename=None), r"images\[1\]: no field 'filename'; the entry has keys"),
        ("a.json", karpathy(split=None), r"images\[1\]: no field 'split'"),
        ("a.json", karpathy(sentences=[{"tokens": []}]), r"images\[1\]\.sentences\[0\]: no field 'raw'"),
        (
            "a.json",
            karpathy(sentences=[{"raw": "b"}, {"raw": " "}]),
            r"images\[1\]\.sentences\[1\]: caption of image 'a' is ' '",
        ),
        ("a.json", {"annotations": [{"caption": "a"}]}, r"annotations\[0\]: no field 'image_id'"),
        (
            "a.json",
            COCO | {"annotations": [{"image_id": 8, "caption": "a"}]},
            r"annotations\[0\]: image_id 8 is not among the file's 2",
        ),
        ("a.json", {"285": ["A bear.", 3]}, r"'285'\[1\]: caption of image '285' is 3; expected a text"),
        ("a.json", '{"1": ["a"], "2": ["b"], "1": ["c"]}', r"a\.json: an object has the key '1' twice"),
        ("a.jsonl", f'{{"image_id": "1", "caption": "a", "n": {10**30}}}', r"a\.jsonl: a number has more than 64 bits"),
        ("a.json", ["a"], r"entry 0: 'a' is not an object"),
        ("a.token", "x.jpg#0\ta\nx.jpg\tb\n", r"a\.token, line 2: 'x\.jpg\\tb' is malformed; expected 'name\.jpg#k'"),
        (
            "a.token",
            "x.jpg#0\ta\n\nx.jpg#1\t\n",
            r"a\.token, line 3: caption of image 'x' is ''; expected .* skip_empty=True",
        ),
        ("a.jsonl", '{"image_id": "1", "caption": "a"}\n{"image_id"\n', r"a\.jsonl, line 2, column 12: malformed json"),
        (
            "a.jsonl",
            '{"image_id": "1", "caption": "a"}\n{"image_id": "1"}\n',
            r"line 2: no column 'caption'; the columns are \['image_id'\]",
        ),
        ("a.jsonl", '{"image_id": "1", "caption": null}\n', r"line 1: caption of image '1' is None"),
        ("a.jsonl", '{"image_id": "1", "caption": "a \\ud83d"}\n', r"a\.jsonl: 'a \\ud83d' holds half a character"),
        ("a.jsonl", '{"image_id": "1", "caption": ["a", ["b"]]}\n', r"line 1\[1\]: caption of image '1' is \['b'\]"),
        ("a.jsonl", '{"image_id": "1", "caption": []}\n', r"line 1: caption of image '1' is \[\]; expected a text"),
        ("a.json", {"1": ["a"], "2": []}, r"'2': caption of image '2' is \[\]; expected a text"),
        ("a.json", {"1": "a", "2": {"caption": "b"}}, r"a\.json holds keys \['1', '2'\] at its top"),
        ("a.jsonl", '{"image_id": 1.5, "caption": "a"}\n', r"line 1: image_id is 1\.5; expected"),
        ("a.jsonl", '{"image_id": true, "caption": "a"}\n', r"line 1: image_id is True; expected"),
        ("a.jsonl", '{"image_id": " ", "caption": "a"}\n', r"line 1: image_id is ' '; expected"),
        (
            "a.jsonl",
            '{"image_id": "1", "caption": "a", "n": 1}\n{"image_id": "1", "caption": "a", "n": "x"}\n',
            r"mixes types",
        ),
        (
            "a.csv",
            "picture,caption\n1,a\n",
            r"a\.csv, line 2: no column 'image_id'; the columns are \['picture', 'caption'\]",
        ),
        ("a.csv", "picture; words\n1; a\n", r"a\.csv, line 2: no column 'image_id'; .* \['picture', 'words'\]"),
        (
            "a.csv",
            "image_id,caption,caption\n1,a,b\n",
            r"line 1: the columns, between commas, are .*; expected each name once",
        ),
        ("a.csv", "image_id;caption\n1;a\n2;b;c\n", r"line 3: expected 2 cells between semicolons, .*, got 3"),
        ("a.tsv", "image_id\tcaption\n1\ta\n2\n", r"a\.tsv, line 3: expected 2 cells between tabs, .*, got 1"),
        ("a.csv", "image_id,caption\n1,a\n2,b, c\n", r"a\.csv, line 3: expected 2 cells"),
        ("a.csv", "image_id,caption\n1,a\n2\n", r"a\.csv, line 3: expected 2 cells"),
        ("a.csv", 'image_id,caption\n1,"a" b\n', r"a\.csv, line 2: malformed csv"),
        ("a.csv", "image_id,caption\n1,a\n2,\n", r"a\.csv, line 3: caption of image '2' is ''"),
        ("a.csv", "image_id,caption\n", r"a\.csv holds no captions"),
        ("a.txt", "hello\n", r"a\.txt has no known layout: its first line is 'hello'"),
        ("a.txt", "\n \n", r"a\.txt is empty"),
        (
            "a.jsonl",
            '{"image_id": "p", "caption": "\\u200b\\u200e"}\n',
            r"line 1: caption of image 'p' is '.u200b.u200e'",
        ),
        ("a.parquet", "PAR1, or so it says", r"a\.parquet: malformed parquet"),
    ],
)
def test_errors_name_the_place(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_captions(write(tmp_path / name, content))


@pytest.mark.parametrize(
    "columns, message",
    [
        (
            {"picture": ["1"], "caption": ["a"]},
            r"x\.parquet: no column 'image_id'; the columns are \['picture', 'caption'\]",
        ),
        ({"image_id": ["1", "2"], "caption": [["a"], []]}, r"x\.parquet: row 1 has no caption in its list"),
        ({"image_id": ["1", "2"], "caption": ["a", "\u200b"]}, r"row 1: caption of image '2' is '.u200b'"),
        ({"image_id": [1.5], "caption": ["a"]}, r"column 'image_id' holds double; expected text or integers"),
        ({"image_id": ["1", "2"], "caption": ["a", "\t\n"]}, r"row 1: caption of image '2' is '\\t\\n'"),
        ({"image_id": ["1", "2"], "caption": [None, "a"]}, r"row 0: caption of image '1' is None"),
        ({"image_id": [1, None], "caption": ["a", "b"]}, r"row 1: image_id is None"),
        ({"image_id": ["1", ""], "caption": ["a", "b"]}, r"row 1: image_id is ''"),
    ],
)
def test_parquet_errors_name_the_place(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / "x.parquet")


def test_not_utf8(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"image_id,caption\n1,caf\xe9\n")
    with pytest.raises(ValueError, match=r"a\.csv: not UTF-8 text \(.*byte 0xe9\); convert"):
        read_captions(tmp_path / "a.csv")


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No caption file at .*nowhere\.json"):
        read_captions(tmp_path / "nowhere.json")


def test_split_of_a_file_without_splits(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"image_id": "1", "caption": "a"}\n')
    with pytest.raises(ValueError, match=r"line 1: no column 'split'; the columns are \['image_id', 'caption'\]"):
        read_captions(path, split="train")


def test_skip_empty(tmp_path, caplog):
    path = write(tmp_path / "a.token", "x.jpg#0\ta\nx.jpg#1\t \ny.jpg#0\tb\n")
    rows = read_captions(path, skip_empty=True)
    assert rows["caption"][:] == ["a", "b"]
    assert "left out 1 captions that are empty" in caplog.text
    pq.write_table(pa.table({"image_id": [1, 2], "caption": [" ", "b"]}), tmp_path / "x.parquet")
    assert list(read_captions(tmp_path / "x.parquet", skip_empty=True)) == [{"image_id": "2", "caption": "b"}]
    caplog.clear()
    pq.write_table(pa.table({"image_id": [1, 2, 3], "caption": [[], ["a", "b"], None]}), tmp_path / "x.parquet")
    assert pairs(read_captions(tmp_path / "x.parquet", skip_empty=True)) == [("2", "a"), ("2", "b")]
    assert "left out 2 captions that are empty" in caplog.text


def test_a_split_that_is_no_name(tmp_path):
    with pytest.raises(ValueError, match=r"images\[1\].sentences\[0\]: split is \['val'\]; expected a name"):
        read_captions(write(tmp_path / "a.json", karpathy(split=["val"])), split="val")


def test_nulls_where_lists_are_expected(tmp_path):
    assert len(read_captions(write(tmp_path / "a.json", {"images": [*KARPATHY["images"], without_sentences()]}))) == 3
    assert len(read_captions(write(tmp_path / "a.json", COCO | {"images": None}))) == 3


def without_sentences() -> dict:
    return KARPATHY["images"][1] | {"sentences": None}


class Store(Mapping):
    """A store that refuses to give a record, as a join must never ask for one."""

    def __init__(self, *ids):
        self.ids = dict.fromkeys(ids)

    def __getitem__(self, image_id):
        raise AssertionError("a join reads no record")

    def __contains__(self, image_id):
        return image_id in self.ids

    def __iter__(self):
        return iter(self.ids)

    def __len__(self):
        return len(self.ids)


ROWS = datasets.Dataset.from_dict({"image_id": ["b", "a", "b", "c", "a"], "caption": list("12345")})


def test_join_where_all_match():
    rows, report = join(ROWS, Store("c", "b", "a", "z", "y"))
    assert rows is ROWS
    assert report == JoinReport(3, 0, 2, 0, ("b", "a", "c"), (), ("z", "y"))


def test_join_stops_on_a_missing_image():
    with pytest.raises(ValueError) as error:
        join(ROWS, Store("a", "COCO_val2014_000000391895"))
    message = str(error.value)
    assert message.startswith("2 of 3 images with captions (3 captions) have no regions in the store.")
    for part in (
        "b, c",
        "COCO_val2014_000000391895",
        "one spelling",
        "leave them out: skip_missing=True (--skip-missing)",
    ):
        assert part in message


def test_join_skips_missing_images(caplog):
    rows, report = join(ROWS, Store("a", "c", "x"), skip_missing=True)
    assert list(rows) == [
        {"image_id": "a", "caption": "2"},
        {"image_id": "c", "caption": "4"},
        {"image_id": "a", "caption": "5"},
    ]
    assert report == JoinReport(2, 1, 1, 2, ("a", "c"), ("b",), ("x",))
    assert "1 of 3 images with captions (2 captions) have no regions" in caplog.text


def test_join_of_strangers_stops_even_when_skipping():
    with pytest.raises(ValueError, match="Nothing would be left"):
        join(ROWS, Store("x"), skip_missing=True)


def test_join_refuses_ids_that_are_no_text():
    with pytest.raises(ValueError, match="'image_id' holds int64; expected text"):
        join(datasets.Dataset.from_dict({"image_id": [1]}), Store("1"))
    with pytest.raises(ValueError, match="no column 'image_id'"):
        join(datasets.Dataset.from_dict({"id": ["1"]}), Store("1"))


def test_join_shows_ids_that_are_no_text():
    with pytest.raises(ValueError, match=r"unused \(regions, no captions\) +2  1 \(no text\), 2 \(no text\)"):
        join(datasets.Dataset.from_dict({"image_id": ["1", "2"]}), {1: None, 2: None})


@pytest.mark.parametrize("seed", range(20))
def test_join_equals_sets(seed):
    rng = np.random.default_rng(seed)
    ids = [str(i) for i in rng.integers(12, size=rng.integers(1, 60))]
    stored = {str(i) for i in rng.choice(16, size=rng.integers(1, 17), replace=False)}
    rows = datasets.Dataset.from_dict({"image_id": ids, "caption": [f"{i}" for i in range(len(ids))]})
    if seed % 2:  # an indices mapping over the table
        order = rng.permutation(len(ids))[: max(1, len(ids) // 2)]
        rows, ids = rows.select(order), [ids[i] for i in order]
    if not stored & set(ids):
        with pytest.raises(ValueError, match="Nothing would be left"):
            join(rows, Store(*stored), skip_missing=True)
        return
    kept, report = join(rows, Store(*stored), skip_missing=True)
    assert list(kept) == [row for row in rows if row["image_id"] in stored]
    counts = [len(stored & set(ids)), len(set(ids) - stored), len(stored - set(ids)), len(ids) - len(kept)]
    assert [report.matched, report.missing, report.unused, report.missing_captions] == counts
    assert set(report.matched_examples) <= stored & set(ids) and set(report.unused_examples) <= stored - set(ids)


def test_join_report_is_a_table():
    report = JoinReport(6000, 1, 7, 5, ("a", "b"), ("c",), ("d", "e"))
    assert str(report).splitlines() == [
        "images                               count  examples",
        "matched (captions and regions)       6,000  a, b, …",
        "missing (captions, no regions)           1  c",
        "unused (regions, no captions)            7  d, e, …",
    ]


# The shapes of ../shared/cases, whose README says what is right.

# One caption opens with a quote, another, lines below, ends with one.
QUOTE_OPENS_A_CELL = (
    ("a", "A sign says stop."),
    ("b", '"Stop, says a sign on the corner.'),
    ("c", "A red car."),
    ("d", 'A man, and a sign that says go"'),
    ("e", "A dog."),
)


def pairs(rows) -> list[tuple[str, str]]:
    return list(zip(rows["image_id"], rows["caption"], strict=True))


@pytest.mark.parametrize("separator", ["\t", "|"])
def test_between_tabs_and_bars_no_cell_spans_lines_and_quotes_are_text(tmp_path, separator):
    lines = [separator.join(("image_id", "caption")), *map(separator.join, QUOTE_OPENS_A_CELL)]
    path = write(tmp_path / "captions.tsv", "".join(f"{line}\r\n" for line in lines))
    assert pairs(read_captions(path)) == list(QUOTE_OPENS_A_CELL)


def test_a_quoted_word_of_a_tsv_is_text(tmp_path):
    path = write(
        tmp_path / "captions.tsv",
        'image_id\tcaption\tsplit\na\tA sign.\ttrain\n\nb\t"Stop" says a sign.\ttrain\nc\tA red car.\ttrain\n',
    )
    assert pairs(read_captions(path, split="train")) == [
        ("a", "A sign."),
        ("b", '"Stop" says a sign.'),
        ("c", "A red car."),
    ]


def test_what_a_spreadsheet_quoted_is_said_and_may_be_undone(tmp_path, caplog):
    text = 'image_id\tcaption\n1\t"A sign ""Stop"" says."\n2\t"Go"\n'
    assert read_captions(write(tmp_path / "a.tsv", text))["caption"][:] == ['"A sign ""Stop"" says."', '"Go"']
    assert "1 lines hold cells in quotes with doubled quotes within" in caplog.text
    assert read_captions(write(tmp_path / "a.csv", text))["caption"][:] == ['A sign "Stop" says.', "Go"]


@pytest.mark.parametrize("separator", [",", ";"])
def test_a_stray_quote_of_a_csv_swallows_no_row(tmp_path, separator):
    lines = [separator.join(("image_id", "caption")), *(separator.join((a, b)) for a, b in QUOTE_OPENS_A_CELL)]
    path = write(tmp_path / "captions.csv", "\n".join(lines).replace("Stop,", "Stop").replace("man,", "man"))
    with pytest.raises(ValueError, match=r"line 3: a cell that begins with a quote spans 3 lines, and 'c.A red car\.'"):
        read_captions(path)
    path = write(tmp_path / "two.csv", f'image_id{separator}caption\n1{separator}"A man\nruns."\n')
    assert read_captions(path)["caption"][:] == ["A man\nruns."]  # a row that is written so on purpose


def test_bars_and_columns_by_other_names(tmp_path, caplog):
    text = "image_name| comment_number| comment\n1.jpg| 0| Two men in green .\n1.jpg| 1| A dog runs .\n"
    rows = read_captions(write(tmp_path / "bars.csv", text))
    assert pairs(rows) == [("1", "Two men in green ."), ("1", "A dog runs .")]
    assert rows["image_name"][:] == ["1.jpg", "1.jpg"] and rows["comment_number"][:] == ["0", "1"]
    assert "has no column 'image_id': 'image_name' names the images" in caplog.text
    assert "has no column 'caption': 'comment' holds the captions" in caplog.text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.txt", "image,caption\ntrain/1.a.JPG,A dog.\n2.png,A cat.\n"),
        ("a.csv", '\ufefffile_name; caption\ntrain/1.a.JPG; "A dog."\n2.png; A cat.\n\n'),
        ("a.csv", '"image_id","caption"\n"1.a","A dog."\n2,A cat.\n'),
        ("a.jsonl", '{"image": "train\\\\1.a.jpg", "caption": "A dog."}\n{"image": "2", "caption": "A cat."}\n'),
        ("a.json", '[{"file_name": "1.a.jpg", "text": "A dog."}, {"file_name": "2.jpg", "text": "A cat."}]'),
    ],
)
def test_tables_as_people_bring_them(tmp_path, name, text):
    assert pairs(read_captions(write(tmp_path / name, text))) == [("1.a", "A dog."), ("2", "A cat.")]


def test_ids_win_over_names_of_files(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"image": "a.jpg", "image_id": "7", "captions": ["b"], "caption": "c"}\n')
    assert pairs(read_captions(path)) == [("7", "c")]


def test_one_caption_or_several_of_an_id(tmp_path):
    path = write(tmp_path / "caption_of_id.json", {"1": "A dog runs.", "2": ["A cat.", "It sits."]})
    assert pairs(read_captions(path)) == [("1", "A dog runs."), ("2", "A cat."), ("2", "It sits.")]
    assert read_captions(path, format="mapping").column_names == ["image_id", "caption"]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_a_row_with_a_list_of_captions(tmp_path, suffix):
    rows = [
        {"image": "val/a.jpg", "caption": ["A dog.", "It runs."], "split": "val"},
        {"image": "val/b.jpg", "caption": ["A cat."], "split": "test"},
    ]
    path = tmp_path / f"captions.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write(path, json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    assert list(read_captions(path).select_columns(["image_id", "caption", "split", "image"])) == [
        {"image_id": "a", "caption": "A dog.", "split": "val", "image": "val/a.jpg"},
        {"image_id": "a", "caption": "It runs.", "split": "val", "image": "val/a.jpg"},
        {"image_id": "b", "caption": "A cat.", "split": "test", "image": "val/b.jpg"},
    ]
    assert pairs(read_captions(path, split="test")) == [("b", "A cat.")]


def test_lists_with_offsets_of_64_bits(tmp_path):
    kind = pa.large_list(pa.large_string())
    table = pa.table({"image_id": ["a", "b"], "captions": pa.array([["x", "y"], ["z"]], kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert pairs(read_captions(tmp_path / "a.parquet")) == [("a", "x"), ("a", "y"), ("b", "z")]


def test_a_dataset_of_pictures_with_lists_of_captions(tmp_path):
    """As Flickr30k is on the Hub: `image` is the picture, `filename` names it."""
    image = pytest.importorskip("PIL.Image").new("RGB", (2, 2))
    features = datasets.Features(
        image=datasets.Image(), caption=datasets.List(datasets.Value("string")), filename=datasets.Value("string")
    )
    rows = {"image": [image, image], "caption": [["a", "b"], ["c"]], "filename": ["1.jpg", "2.jpg"]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "folder")
    assert pairs(read_captions(tmp_path / "folder")) == [("1", "a"), ("1", "b"), ("2", "c")]


def test_ids_of_captions_by_a_rule(tmp_path):
    names = ["COCO_val2014_000000000042.jpg", "000000000007.jpg", "train2014/COCO_train2014_000000000009"]
    lines = [json.dumps({"image_id": name, "caption": "a", "negative_image_ids": names[:1]}) for name in names]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    rows = read_captions(path, ids="coco")
    assert rows["image_id"][:] == ["42", "7", "9"] and rows["negative_image_ids"][:] == [["42"]] * 3
    some = [{"image_id": 1, "caption": "a", "negative_image_ids": [2]}, {"image_id": 2, "caption": "b"}]
    few = write(tmp_path / "few.jsonl", "\n".join(map(json.dumps, some)))
    assert read_captions(few, ids="coco")["negative_image_ids"][:] == [["2"], None]
    stems = ["COCO_val2014_000000000042", "000000000007", "COCO_train2014_000000000009"]
    assert read_captions(path, ids="stem")["image_id"][:] == stems
    write(tmp_path / "ids.csv", "source_id,image_id\n" + "".join(f"{name},{k % 2}\n" for k, name in enumerate(names)))
    assert read_captions(path, ids=str(tmp_path / "ids.csv"))["image_id"][:] == ["0", "1", "0"]  # as it says


@pytest.mark.parametrize(
    ("names", "rule", "message"),
    [
        (["a.jpg", "dog"], "coco", r"a\.jsonl, with the ids of coco: Image 'a\.jpg' ends in no number"),
        (["train/1.jpg", "val/1.jpg"], "stem", r"rule stem the images 'train/1\.jpg' and 'val/1\.jpg' both become '1'"),
        (["x_7", "y_7"], "coco", r"rule coco the images 'x_7' and 'y_7' both become '7'"),
    ],
)
def test_ids_that_a_rule_cannot_give(tmp_path, names, rule, message):
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"image_id": name, "caption": "a"}) for name in names))
    with pytest.raises(ValueError, match=message):
        read_captions(path, ids=rule)


def test_captions_without_a_token_are_said_with_image_and_line(tmp_path):
    """Accents alone are visible, but BERT's tokenizer takes them away."""
    import tiny

    texts = ["A dog runs.", "\u0301\u0302", "a cat"]
    lines = "".join(json.dumps({"image_id": f"p{k}", "caption": text}) + "\n" for k, text in enumerate(texts))
    path = write(tmp_path / "a.jsonl", "\n" + lines)
    rows = read_captions(path)
    message = r"a\.jsonl: the tokenizer makes no token of 1 captions\. .*:\nimage 'p1': '.*', line 3$"
    tokenizer = tiny.processor().tokenizer
    with pytest.raises(ValueError, match=message):
        check_tokens(rows, tokenizer, path)
    check_tokens(rows.select([0, 2]), tokenizer, path)
    pq.write_table(pa.table({"image_id": ["p1"], "caption": texts[1:2]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"image 'p1': '.*'$"):
        check_tokens(read_captions(tmp_path / "x.parquet"), tokenizer, tmp_path / "x.parquet")


def test_training_says_captions_without_a_token_before_it_begins_and_takes_other_ids(tmp_path):
    import small_world

    from unicoder_vl_hf.runs.arguments import DataArguments
    from unicoder_vl_hf.runs.setup import load_processor, open_data

    world = small_world.build(tmp_path)
    lines = (world / "captions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["image_id"] = f"scenes/{row['image_id']}.png"
    rows[2]["caption"] = "\u0301"
    path = write(tmp_path / "mine.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    arguments = DataArguments(captions=str(path), regions=str(world / "regions"))
    with pytest.raises(ValueError, match=r"Nothing would be left: bring the ids .* --caption_ids does it"):
        open_data(arguments, tmp_path)
    arguments.caption_ids = "stem"
    image_id = json.loads(lines[2])["image_id"]
    data = open_data(arguments, tmp_path)
    arguments.model_name_or_path = str(small_world.save_bert(tmp_path / "bert", dropout=0.0))
    with pytest.raises(ValueError, match=f"no token of 1 captions.*\n?image '{image_id}': .*, line 3$"):
        load_processor(arguments, data)


def test_what_shows_nothing_may_be_left_out(tmp_path):
    lines = [
        json.dumps({"image_id": f"p{k}", "caption": text}) for k, text in enumerate(["\u200b", "A dog.", "A cat."])
    ]
    path = write(tmp_path / "zero_width_space.jsonl", "\n".join(lines))
    with pytest.raises(ValueError, match=r"space\.jsonl, line 1: caption of image 'p0' is '.u200b'"):
        read_captions(path)
    assert pairs(read_captions(path, skip_empty=True)) == [("p1", "A dog."), ("p2", "A cat.")]


def test_lists_of_names(tmp_path, caplog):
    text = "\ufefftraffic light \r\ndog\t\r\n\r\n"
    assert read_names(write(tmp_path / "names.txt", text)) == ["traffic light", "dog"]
    assert not caplog.text
    assert read_names(write(tmp_path / "names.txt", "\ndog\n \n\ncat")) == ["dog", "cat"]
    assert "2 empty line(s) between names are left out and not counted" in caplog.text
    (tmp_path / "names.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"names\.txt: not UTF-8 text .*byte 0xe9"):
        read_names(tmp_path / "names.txt")


def test_encode_column():
    ids, codes = encode_column(ROWS.select([3, 1, 0, 4]), "image_id", str.upper)
    assert (ids.to_pylist(), codes.tolist(), codes.dtype) == (["C", "A", "B"], [0, 1, 2, 1], np.int32)
    many = datasets.Dataset.from_dict({"x": [str(i % 15_000) for i in range(40_000)]})  # over several chunks
    ids, codes = encode_column(many, "x")
    assert ids.to_pylist() == [str(i) for i in range(15_000)]
    assert codes.tolist() == [i % 15_000 for i in range(40_000)]


@pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is absent")
def test_flickr8k_and_coco_free():
    path = SHARED / "flickr8k/dataset_flickr8k.json"
    rows = read_captions(path)
    assert Counter(rows["split"]) == {"train": 30_000, "val": 5_000, "test": 5_000}
    test = read_captions(path, split="test")
    assert set(Counter(test["image_id"]).values()) == {5} and len(set(test["image_id"])) == 1_000
    store = Store(*(file.stem for file in (SHARED / "flickr8k/regions").glob("*.npz")))
    _, report = join(rows, store)
    assert (report.matched, report.missing, report.unused) == (8_000, 0, 0)
    assert len(read_captions(SHARED / "coco_free/captions.json")) == 905
