"""
Stores as Parquet: one row an image, which `datasets` and others read without this package.

    image_id, image_width, image_height    null where unknown, as are the fields below
    boxes, features, class_probabilities   lists of rows of fixed width
    object_ids, object_scores, …           lists

NumPy and Parquet have no bfloat16: features stored so become float32, exactly.
"""

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from .. import logging
from ..files import complete, make_folder, partial_path
from ..records_unicoder_vl import RegionRecord
from .shards import OPTIONAL_FIELDS, Shard
from .store import RegionStore

# Bytes of features in a row group, which readers hold in memory as a whole.
GROUP_BYTES = 32 * 2**20


def export_parquet(store: RegionStore, folder: str | PathLike) -> list[Path]:
    """
    Writes a file for each shard of the store, in constant memory and with a progress bar. A second call goes on after
    an interruption.

        datasets.load_dataset("parquet", data_dir=folder, streaming=True)["train"]

    Args:
        store (`RegionStore`): The store to write.
        folder (`str` or `os.PathLike`): The folder of the files, made if need be.

    Returns:
        The files.

    Raises:
        ValueError: The folder holds a file of another store, or is a file.
    """
    folder = Path(folder)
    make_folder(folder)
    schema = _schema(store)
    paths = []
    for number, facts in enumerate(logging.tqdm(store.shards.facts, desc=f"Writing {folder.name}", unit="shard")):
        path = folder / Path(facts["file"]).with_suffix(".parquet")
        paths.append(path)
        own = schema.with_metadata({"provenance": json.dumps(store.provenance), "source_sha256": facts["sha256"]})
        if path.exists():
            if pyarrow.parquet.read_schema(path).metadata != own.metadata:
                raise ValueError(f"{path} is of another store: take another folder.")
            continue
        with partial_path(path).open("wb") as file:
            with pyarrow.parquet.ParquetWriter(file, own, compression="none", use_dictionary=["image_id"]) as writer:
                for records in _groups(store.shards[number]):
                    writer.write_table(_table(records, own))
            complete(file, path)
        store.shards.close()
    return paths


def _schema(store: RegionStore) -> pyarrow.Schema:
    feature = pyarrow.float16() if store.provenance["dtype"] == "float16" else pyarrow.float32()
    types = {
        "image_id": pyarrow.string(),
        "image_width": pyarrow.int32(),
        "image_height": pyarrow.int32(),
        "boxes": pyarrow.list_(pyarrow.list_(pyarrow.float32(), 4)),
        "features": pyarrow.list_(pyarrow.list_(feature, store.feature_dim)),
        "object_ids": pyarrow.list_(pyarrow.int64()),
        "object_scores": pyarrow.list_(pyarrow.float32()),
        "attribute_ids": pyarrow.list_(pyarrow.int64()),
        "attribute_scores": pyarrow.list_(pyarrow.float32()),
    }
    # Shards may have it, in one dtype or the other.
    found = [store.shards[number].tensors.get("class_probabilities") for number in range(len(store.shards))]
    probabilities = [tensor for tensor in found if tensor is not None]
    if probabilities:
        number = pyarrow.from_numpy_dtype(np.result_type(*(tensor.dtype for tensor in probabilities)))
        types["class_probabilities"] = pyarrow.list_(pyarrow.list_(number, probabilities[0].shape[1]))
    return pyarrow.schema(types)


def _groups(shard: Shard) -> Iterator[list[RegionRecord]]:
    records: list[RegionRecord] = []
    num_bytes = 0
    for row in range(len(shard)):
        records.append(shard.record(row))
        num_bytes += records[-1].features.nbytes
        if num_bytes >= GROUP_BYTES or row == len(shard) - 1:
            yield records
            records, num_bytes = [], 0


def _table(records: list[RegionRecord], schema: pyarrow.Schema) -> pyarrow.Table:
    columns = []
    for column in schema:
        values = [getattr(record, column.name) for record in records]
        is_array = column.name == "features" or column.name in OPTIONAL_FIELDS
        columns.append(_lists(values, column.type) if is_array else pyarrow.array(values, column.type))
    return pyarrow.Table.from_arrays(columns, schema=schema)


def _lists(values: list[np.ndarray | None], type_: pyarrow.ListType) -> pyarrow.Array:
    offsets = np.cumsum([0, *(0 if rows is None else len(rows) for rows in values)], dtype=np.int32)
    known = [rows for rows in values if rows is not None]
    is_wide = pyarrow.types.is_fixed_size_list(type_.value_type)
    number = type_.value_type.value_type if is_wide else type_.value_type
    flat = np.concatenate(known).reshape(-1) if known else np.empty(0)
    items = pyarrow.array(flat.astype(number.to_pandas_dtype(), copy=False))
    if is_wide:
        items = pyarrow.FixedSizeListArray.from_arrays(items, type_.value_type.list_size)
    mask = pyarrow.array([rows is None for rows in values])
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), items, type=type_, mask=mask)
