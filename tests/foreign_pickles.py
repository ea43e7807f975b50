"""
Small files in the formats of UNITER, Volta, ViLBERT-MT, MMF, MILVLG and VL-BERT, and of bottom-up attention, made by
the calls of the tools themselves: csv, pickle, msgpack_numpy, np.savez, np.save, json, lmdb. Nothing of ours is
imported, so that a mistake of ours is not repeated here. The images are those of `foreign_arrays`.
"""

import collections
import csv
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import lmdb
import msgpack
import msgpack_numpy
import numpy as np
from foreign_arrays import CLASSES, IMAGES, Image, class_probabilities, encode


def probabilities(image: Image) -> np.ndarray:
    """(n, 1 + classes) float16, background first; the greatest of the others at `object_ids`, where it is the score."""
    result = np.full((len(image.boxes), 1 + len(CLASSES)), 1 / 64, np.float16)
    result[np.arange(len(result)), 1 + image.object_ids] = image.object_scores
    result[:, 0] = 0
    result[:, 0] = 1 - result.sum(axis=1)
    return result


def write_lmdb(path: Path, values: dict[str, bytes], keys: bytes, content: bytes, **options) -> Path:
    with lmdb.open(str(path), map_size=2**30, **options) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key=key.encode("utf-8"), value=value)
        transaction.put(key=keys, value=content)
    return path


def uniter_arrays(image: Image) -> dict[str, np.ndarray]:
    """As its generate_npz.py makes them."""
    boxes = image.fractions
    return {
        "norm_bb": np.concatenate([boxes, boxes[:, 2:] - boxes[:, :2]], axis=1).astype(np.float16),
        "features": image.features.astype(np.float16),
        "conf": image.object_scores.astype(np.float16)[:, None],
        "soft_labels": probabilities(image),
    }


def uniter_npz(folder: Path) -> Path:
    for image in IMAGES:
        np.savez_compressed(folder / f"{image.name}.npz", **uniter_arrays(image))
    return folder


def uniter_lmdb(folder: Path, name: str = "feat_th0.2_max100_min10", images: list[Image] = IMAGES, **stray) -> Path:
    """As its convert_imgdir.py does; `stray` members are what `np.savez(..., allow_pickle=True)` once wrote."""
    values = {}
    for image in images:
        if name.endswith("_compressed"):
            writer = io.BytesIO()
            np.savez_compressed(writer, **uniter_arrays(image), **stray)
            values[f"{image.name}.npz"] = writer.getvalue()
        else:
            values[f"{image.name}.npz"] = msgpack.dumps(
                {**uniter_arrays(image), **stray}, use_bin_type=True, default=msgpack_numpy.encode
            )
    path = write_lmdb(folder / name, values, b"__keys__", json.dumps(list(values)).encode("utf-8"))
    if name.startswith("feat_th"):
        sidecar = name.removesuffix("_compressed").replace("feat", "nbb")
        counts = {f"{image.name}.npz": len(image.boxes) for image in images}
        (folder / f"{sidecar}.json").write_text(json.dumps(counts))
    return path


def volta_row(image: Image) -> dict:
    """A row of its TSV, as csv.DictReader gave it back: all text."""
    return {
        "img_id": image.name,
        "img_h": str(image.height),
        "img_w": str(image.width),
        "objects_id": encode(image.object_ids),
        "objects_conf": encode(image.object_scores),
        "attrs_id": encode(image.attribute_ids.astype(np.int64)),
        "attrs_conf": encode(image.attribute_scores),
        "num_boxes": str(len(image.boxes)),
        "boxes": encode(image.boxes),
        "features": encode(image.features),
        "cls_prob": encode(probabilities(image).astype(np.float32)),
    }


def volta_arrays(image: Image) -> dict:
    """As its h5_to_lmdb.py gives them, of HDF5 by detectron2."""
    return {
        "attr_conf": image.attribute_scores,
        "attr_id": image.attribute_ids,
        "boxes": image.boxes,
        "features": image.features,
        "img_h": np.int64(image.height),
        "img_w": np.int64(image.width),
        "obj_conf": image.object_scores,
        "obj_id": image.object_ids,
        "img_id": image.name,
    }


def volta_row_with_none(image: Image) -> dict:
    """As its convert_*_lmdb.py leave a row of a TSV of fewer columns."""
    return volta_row(image) | {"attrs_id": None, "attrs_conf": None, "cls_prob": None, "attrs": None, "classes": None}


def vilbert_arrays(image: Image) -> dict:
    """As ViLBERT-MT's convert_to_lmdb.py does."""
    return {
        "image_id": image.name,
        "image_h": image.height,
        "image_w": image.width,
        "num_boxes": len(image.boxes),
        "boxes": image.boxes,
        "features": image.features,
    }


def pickled_lmdb(path: Path, fields: dict[str, dict], protocol: int | None = None, **options) -> Path:
    values = {key: pickle.dumps(value, protocol) for key, value in fields.items()}
    return write_lmdb(path, values, b"keys", pickle.dumps([key.encode() for key in fields]), **options)


def volta_lmdb(folder: Path, row: Callable[[Image], dict] = volta_row, **options) -> Path:
    # What csv.DictReader gave until Python 3.8.
    fields = {image.name: collections.OrderedDict(row(image)) for image in IMAGES}
    return pickled_lmdb(folder / "flickr30k_feat.lmdb", fields, **options)


def mmf_info(image: Image, background: bool = False) -> dict:
    """As its extract_features_vmb.py makes it."""
    start = 0 if background else 1
    return {
        "bbox": image.boxes,
        "num_boxes": len(image.boxes),
        "objects": image.object_ids + (1 - start),
        "cls_prob": probabilities(image)[:, start:].astype(np.float32),
        "image_width": image.width,
        "image_height": image.height,
    }


def mmf_npy(folder: Path, background: bool = False) -> Path:
    for image in IMAGES:
        np.save(folder / f"{image.name}.npy", image.features)
        np.save(folder / f"{image.name}_info.npy", mmf_info(image, background))
    return folder


def pythia_npy(folder: Path) -> Path:
    """Pythia's downloads: the features alone."""
    for image in IMAGES:
        np.save(folder / f"{image.name}.npy", image.features)
    return folder


def mmf_lmdb(folder: Path, background: bool = False) -> Path:
    """As its lmdb_conversion.py does, of features in a folder for each split."""
    fields = {
        f"val/{image.name}": {
            "feature_path": f"val/{image.name}",
            "features": image.features,
            **mmf_info(image, background),
        }
        for image in IMAGES
    }
    return pickled_lmdb(folder / "detectron.lmdb", fields)


def milvlg_arrays(image: Image, background: bool = False) -> dict:
    """As its save_roi_features makes them, `background` as in the first versions."""
    sizes = {"image_h": image.height, "image_w": image.width}
    info = {
        "image_id": image.name,
        **sizes,
        "num_boxes": len(image.boxes),
        "objects_id": image.object_ids + background,
        "objects_conf": image.object_scores,
        "attrs_id": image.attribute_ids + background,
        "attrs_conf": image.attribute_scores,
    }
    features = image.features.astype(np.float16)
    return {"x": features, "bbox": image.boxes, "num_bbox": len(image.boxes), **sizes, "info": info}


def milvlg_npz(folder: Path, background: bool = False) -> Path:
    for image in IMAGES:
        np.savez_compressed(folder / f"{image.name}.npz", **milvlg_arrays(image, background))
    return folder


def milvlg_npz_boxes(folder: Path) -> Path:
    """As copies of it do that call the boxes so."""
    for image in IMAGES:
        arrays = milvlg_arrays(image)
        np.savez_compressed(folder / f"{image.name}.npz", boxes=arrays.pop("bbox"), **arrays)
    return folder


def vlbert_fields(image: Image) -> dict:
    """As its generate_tsv_v2.py makes them."""
    attributes = np.full((len(image.boxes), 401), 1e-5, np.float32)
    attributes[:, 0] = 0.5
    attributes[np.arange(len(attributes)), 1 + image.attribute_ids] = 0.25
    return {
        "image_id": image.number,
        "image_w": image.width,
        "image_h": image.height,
        "num_boxes": len(image.boxes),
        "boxes": encode(image.boxes),
        "features": encode(image.features),
        "classes": encode(class_probabilities(image)),
        "attrs": encode(attributes),
    }


def vlbert_json(folder: Path) -> Path:
    folder = folder / "trainval_frcnn"
    folder.mkdir()
    for image in IMAGES:
        (folder / f"{image.name}.json").write_text(json.dumps(vlbert_fields(image)))
    return folder


def vlbert_zip(folder: Path) -> Path:
    """As it lies on people's disks, `train_frcnn.zip@/<name>.json`."""
    with zipfile.ZipFile(folder / "train_frcnn.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for image in IMAGES:
            archive.writestr(f"{image.name}.json", json.dumps(vlbert_fields(image)))
    return folder / "train_frcnn.zip"


def bottom_up_tsv(folder: Path) -> Path:
    """As its generate_tsv.py does."""
    path = folder / "trainval.tsv"
    fields = ["image_id", "image_w", "image_h", "num_boxes", "boxes", "features"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, delimiter="\t", fieldnames=fields)
        for image in IMAGES:
            values = (image.number, image.width, image.height, len(image.boxes), encode(image.boxes))
            writer.writerow(dict(zip(fields, (*values, encode(image.features)), strict=True)))
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "bottom-up-tsv": bottom_up_tsv,
    "milvlg-npz": milvlg_npz,
    "uniter-npz": uniter_npz,
    "uniter-lmdb": uniter_lmdb,
    "volta-lmdb": volta_lmdb,
    "mmf-npy": mmf_npy,
    "mmf-lmdb": mmf_lmdb,
    "vlbert-json": vlbert_json,
}
