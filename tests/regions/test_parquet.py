"""A store as Parquet, read by `datasets` in a process that knows nothing of this package."""

import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
from region_stores import FIELDS, assert_same, files_of, make, write_store

from unicoder_vl_hf import RegionRecord
from unicoder_vl_hf.regions import parquet
from unicoder_vl_hf.regions.parquet import export_parquet

# Ends without the interpreter's farewell, at which threads of pyarrow's scanner, when still alive, abort the process
# ("terminate called without an active exception"), seen once in many runs after everything had been read and printed.
READER = """
import json, os, sys
import datasets
found = []
for folder in sys.argv[1:]:
    rows = datasets.load_dataset("parquet", data_dir=folder, streaming=True)["train"]
    types = {name: str(feature) for name, feature in rows.features.items()}
    found.append({"rows": list(rows), "types": types})
assert not any("unicoder" in name for name in sys.modules)
json.dump(found, sys.stdout)
sys.stdout.flush()
os._exit(0)
"""


def read_by_datasets(folders, home) -> list[dict]:
    environment = {"PATH": "", "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READER, *folders], env=environment, cwd=home, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


DTYPES = {"float16": "float16", "bfloat16": "float32"}  # in the store, in Parquet


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict:
    """Of each type of features a store, and what `datasets` reads of its export."""
    folder = tmp_path_factory.mktemp("parquet")
    stores = {}
    for dtype in DTYPES:
        store = write_store(map(make, range(30)), folder / dtype, shard_size=1000, dtype=dtype)
        files = export_parquet(store, folder / f"{dtype} parquet")
        assert len(files) == len(store.shards) > 4
        stores[dtype] = store
    found = read_by_datasets([folder / f"{dtype} parquet" for dtype in DTYPES], folder)
    return dict(zip(DTYPES, zip(stores.values(), found, strict=True), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_datasets_reads_what_was_written(dtype, written):
    store, found = written[dtype]
    assert len(found["rows"]) == 30
    for number, row in enumerate(found["rows"]):
        assert set(row) == set(FIELDS)
        expected = store[make(number).image_id]
        record = RegionRecord.from_dict({name: value for name, value in row.items() if value is not None})
        for name in ("features", "class_probabilities"):  # JSON has but one kind of number
            if row[name] is not None:
                setattr(record, name, getattr(record, name).astype(getattr(expected, name).dtype))
        assert_same(record, expected)
        assert {name for name in FIELDS if row[name] is None} == {
            name for name in FIELDS if getattr(expected, name) is None
        }
    assert found["types"]["features"] == f"List(List(Value('{DTYPES[dtype]}'), length=8))"
    assert found["types"]["boxes"] == "List(List(Value('float32'), length=4))"


def test_row_groups_are_small_and_files_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "GROUP_BYTES", 200)
    store = write_store(map(make, range(12)), tmp_path / "store")
    (path,) = export_parquet(store, tmp_path / "parquet")
    file = pyarrow.parquet.ParquetFile(path)
    assert file.num_row_groups > 2
    table = file.read()
    assert table["image_id"].to_pylist() == list(store)
    assert json.loads(table.schema.metadata[b"provenance"]) == store.provenance
    flat = table["features"].combine_chunks().flatten().flatten().to_numpy()
    assert np.array_equal(flat, np.concatenate([make(number).features for number in range(12)]).reshape(-1))
    assert "class_probabilities" in table.schema.names
    bare = write_store([make(0), make(2)], tmp_path / "bare")
    (path,) = export_parquet(bare, tmp_path / "bare parquet")
    assert "class_probabilities" not in pyarrow.parquet.read_schema(path).names


def test_a_second_call_goes_on_and_keeps_what_is_whole(tmp_path, monkeypatch):
    store = write_store(map(make, range(30)), tmp_path / "store", shard_size=1000)
    export_parquet(store, tmp_path / "undisturbed")
    original, calls = parquet._table, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parquet, "_table", interrupted)
        export_parquet(store, tmp_path / "parquet")
    whole = [path for path in (tmp_path / "parquet").iterdir() if path.suffix == ".parquet"]
    assert len(whole) == 2
    before = [path.stat().st_mtime_ns for path in whole]
    export_parquet(store, tmp_path / "parquet")
    assert [path.stat().st_mtime_ns for path in whole] == before
    assert files_of(tmp_path / "parquet") == files_of(tmp_path / "undisturbed")
    other = write_store(map(make, range(31)), tmp_path / "other", shard_size=1100)
    with pytest.raises(ValueError, match="of another store"):
        export_parquet(other, tmp_path / "parquet")
