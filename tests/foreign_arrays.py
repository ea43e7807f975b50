"""
Small files in the formats of LXMERT, VinVL, BAN, SCAN and Hugging Face's FRCNN, made by the calls of the tools
themselves. Nothing of ours is imported, so that a mistake of ours is not repeated here.

Three images, none of them square, of two to four regions that no swap of axes or rows leaves as they are.
"""

import base64
import csv
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DIM = 16  # 2048 in the real files
SLOTS = 5  # 36
CLASSES = ["cat", "traffic light", "dog", "tree", "zebra"]  # 1,600, or VinVL's 1,594


@dataclass
class Image:
    """What a tool knows of an image after detection; ids are 0-based, without background."""

    number: int
    width: int
    height: int
    boxes: np.ndarray
    features: np.ndarray
    object_ids: np.ndarray
    object_scores: np.ndarray
    attribute_ids: np.ndarray
    attribute_scores: np.ndarray

    @property
    def name(self) -> str:
        return f"COCO_val2014_{self.number:012d}"

    @property
    def fractions(self) -> np.ndarray:
        return self.boxes / np.array([self.width, self.height] * 2, np.float32)


def _image(number: int, width: int, height: int, boxes: list, ids: list) -> Image:
    n = len(boxes)
    rng = np.random.default_rng(number)
    return Image(
        number,
        width,
        height,
        np.array(boxes, np.float32),
        rng.standard_normal((n, DIM)).astype(np.float32),
        np.array(ids, np.int64),
        (np.arange(n, 0, -1) / 8).astype(np.float32),
        np.arange(n)[::-1] + 7,
        (np.arange(n) / 16).astype(np.float32),
    )


IMAGES = [
    _image(391895, 640, 360, [[10, 20, 630, 40], [5, 300, 25, 355], [0, 0, 640, 360]], [4, 0, 2]),
    _image(522418, 320, 480, [[8, 16, 300, 460], [40, 400, 72, 440]], [1, 3]),
    _image(184613, 500, 336, [[1, 2, 499, 7], [250, 20, 300, 330], [10, 20, 30, 330], [5, 6, 490, 300]], [0, 4, 4, 1]),
]


def encode(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array)).decode()


LXMERT_FIELDS = "img_id img_h img_w objects_id objects_conf attrs_id attrs_conf num_boxes boxes features".split()


def lxmert_row(image: Image) -> dict:
    """As get_detections_from_im of LXMERT's extract_coco_image.py returns it."""
    return {
        "img_id": image.name,
        "img_h": image.height,
        "img_w": image.width,
        "objects_id": encode(image.object_ids),
        "objects_conf": encode(image.object_scores),
        "attrs_id": encode(image.attribute_ids),
        "attrs_conf": encode(image.attribute_scores),
        "num_boxes": len(image.boxes),
        "boxes": encode(image.boxes),
        "features": encode(image.features),
    }


def class_probabilities(image: Image) -> np.ndarray:
    """As the network gives them: column 0 is background, and often the greatest."""
    probabilities = np.full((len(image.boxes), 1601), 1e-5, np.float32)
    probabilities[:, 0] = 0.5
    probabilities[np.arange(len(image.boxes)), image.object_ids + 1] = image.object_scores
    return probabilities


def lxmert_variant_row(image: Image) -> dict:
    """As the variant does that keeps all probabilities."""
    probabilities = class_probabilities(image)
    attributes = np.zeros((len(image.boxes), 401), np.float32)
    attributes[np.arange(len(image.boxes)), image.attribute_ids + 1] = image.attribute_scores
    return {
        **lxmert_row(image),
        "cls_prob": encode(probabilities),
        "attrs": encode(attributes),
        "classes": encode(probabilities),
    }


def lxmert_row_without_attributes(image: Image) -> dict:
    """As people write it whose detector knows no attributes."""
    return {key: value for key, value in lxmert_row(image).items() if not key.startswith("attrs_")}


def write_rows(path: Path, rows: list[dict]) -> Path:
    with path.open("a", newline="") as file:
        csv.DictWriter(file, delimiter="\t", fieldnames=list(rows[0])).writerows(rows)
    return path


def write_lxmert(folder: Path, row: Callable[[Image], dict] = lxmert_row) -> Path:
    return write_rows(folder / "val2014_obj36.tsv", [row(image) for image in IMAGES])


def load_obj_tsv(fname: Path) -> list[dict]:
    """How LXMERT itself reads: utils.load_obj_tsv, with which its tasks begin."""
    data = []
    with open(fname) as file:
        csv.field_size_limit(2**30)
        for item in csv.DictReader(file, LXMERT_FIELDS, delimiter="\t"):
            for key in ["img_h", "img_w", "num_boxes"]:
                item[key] = int(item[key])
            boxes = item["num_boxes"]
            for key, shape, dtype in [
                ("objects_id", (boxes,), np.int64),
                ("objects_conf", (boxes,), np.float32),
                ("attrs_id", (boxes,), np.int64),
                ("attrs_conf", (boxes,), np.float32),
                ("boxes", (boxes, 4), np.float32),
                ("features", (boxes, -1), np.float32),
            ]:
                item[key] = np.frombuffer(base64.b64decode(item[key]), dtype=dtype).reshape(shape)
            data.append(item)
    return data


def tsv_writer(path: Path, rows: list[list[str]]) -> Path:
    """Oscar's tsv_file_ops.tsv_writer: the lines, and the offset of each."""
    offset = 0
    with path.open("wb") as file, path.with_suffix(".lineidx").open("w") as offsets:
        for row in rows:
            line = ("\t".join(row) + "\n").encode()
            file.write(line)
            offsets.write(f"{offset}\n")
            offset += len(line)
    return path


def vinvl_features(image: Image) -> np.ndarray:
    """The 2,054 columns: features, box and extent, as fractions clipped to the image."""
    rect = np.clip(image.fractions, 0, 1)
    extent = rect[:, 2:] - rect[:, :2]
    return np.hstack((image.features, rect, extent)).astype(np.float32)


def vinvl_objects(image: Image) -> list[dict]:
    return [
        {"class": CLASSES[object_id], "rect": box.tolist(), "conf": float(score), "attributes": ["red", "big"]}
        for object_id, box, score in zip(image.object_ids, image.boxes, image.object_scores, strict=True)
    ]


def vinvl_label(image: Image) -> dict:
    return {"image_h": image.height, "image_w": image.width, "objects": vinvl_objects(image)}


def write_vinvl(folder: Path, label: Callable[[Image], object] = vinvl_label) -> Path:
    """The layout of Oscar+ (features.tsv, oscar_tsv.py)."""
    rows = [[str(im.number), str(len(im.boxes)), encode(vinvl_features(im))] for im in IMAGES]
    tsv_writer(folder / "features.tsv", rows)
    tsv_writer(folder / "predictions.tsv", [[str(image.number), json.dumps(label(image))] for image in IMAGES])
    (folder / "imageid2idx.json").write_text(json.dumps({str(im.number): row for row, im in enumerate(IMAGES)}))
    return folder


def write_vinvl_captioning(folder: Path) -> Path:
    """The layout of Oscar's captioning data (train.feature.tsv, run_captioning.py)."""
    rows = [
        [str(im.number), json.dumps({"num_boxes": len(im.boxes), "features": encode(vinvl_features(im))})]
        for im in IMAGES
    ]
    tsv_writer(folder / "train.feature.tsv", rows)
    tsv_writer(folder / "train.label.tsv", [[str(im.number), json.dumps(vinvl_objects(im))] for im in IMAGES])
    return folder


def write_vinvl_own(folder: Path, label: Callable[[Image], object] = vinvl_label) -> Path:
    """What VinVL's own extraction leaves (scene_graph_benchmark's test_sg_net.py): the boxes are in predictions.tsv."""
    rows = [
        [str(image.number), json.dumps({"num_boxes": len(image.boxes), "features": encode(image.features)})]
        for image in IMAGES
    ]
    tsv_writer(folder / "features.tsv", rows)
    tsv_writer(folder / "predictions.tsv", [[str(image.number), json.dumps(label(image))] for image in IMAGES])
    return folder


def spatial_features(image: Image) -> np.ndarray:
    scaled = image.fractions
    return np.concatenate((scaled[:, :2], scaled[:, 2:], scaled[:, 2:] - scaled[:, :2]), axis=1)


def write_hdf5(folder: Path, dump: Callable[[Path, dict], None] | None = None) -> Path:
    """BAN's adaptive_detection_features_converter.py."""
    import h5py

    num_boxes = sum(len(image.boxes) for image in IMAGES)
    indices = {}
    with h5py.File(folder / "val.hdf5", "w") as file:
        features = file.create_dataset("image_features", (num_boxes, DIM), "f")
        boxes = file.create_dataset("image_bb", (num_boxes, 4), "f")
        spatial = file.create_dataset("spatial_features", (num_boxes, 6), "f")
        positions = file.create_dataset("pos_boxes", (len(IMAGES), 2), dtype="int32")
        first = 0
        for row, image in enumerate(IMAGES):
            last = first + len(image.boxes)
            indices[image.number] = row
            positions[row, :] = np.array([first, last])
            boxes[first:last, :] = image.boxes
            features[first:last, :] = image.features
            spatial[first:last, :] = spatial_features(image)
            first = last
    with (folder / "val_imgid2idx.pkl").open("wb") as file:
        pickle.dump(indices, file)
    return folder / "val.hdf5"


def write_hdf5_fixed(folder: Path, num_boxes: int = 2) -> Path:
    """bottom-up-attention-vqa's detection_features_converter.py, whose protocol was Python 2's; rows by counter."""
    import h5py

    with h5py.File(folder / "val36.hdf5", "w") as file:
        features = file.create_dataset("image_features", (len(IMAGES), num_boxes, DIM), "f")
        boxes = file.create_dataset("image_bb", (len(IMAGES), num_boxes, 4), "f")
        spatial = file.create_dataset("spatial_features", (len(IMAGES), num_boxes, 6), "f")
        for row, image in enumerate(reversed(IMAGES)):
            features[row, :, :] = image.features[:num_boxes]
            boxes[row, :, :] = image.boxes[:num_boxes]
            spatial[row, :, :] = spatial_features(image)[:num_boxes]
    with (folder / "val36_imgid2idx.pkl").open("wb") as file:
        pickle.dump({image.number: row for row, image in enumerate(reversed(IMAGES))}, file, protocol=0)
    return folder / "val36.hdf5"


def write_volta_hdf5(folder: Path, names: Callable[[Image], str] = lambda image: image.name) -> Path:
    """Volta's extraction by detectron2: a group an image."""
    import h5py

    with h5py.File(folder / "boxes36.h5", "w") as file:
        for image in IMAGES:
            group = file.create_group(names(image))
            for key, value in (
                ("img_h", image.height),
                ("img_w", image.width),
                ("boxes", image.boxes),
                ("features", image.features),
                ("obj_id", image.object_ids),
                ("obj_conf", image.object_scores),
                ("attr_id", image.attribute_ids),
                ("attr_conf", image.attribute_scores),
            ):
                group.create_dataset(key, data=value)
    return folder / "boxes36.h5"


def write_scan(folder: Path, repeat: int = 1, num_boxes: int = 2) -> Path:
    """SCAN's convert_data.py; `repeat=5` as in older files, which its data.py reads too."""
    data_out = np.stack([image.features[:num_boxes] for image in IMAGES], axis=0)
    np.save(folder / "dev_ims.npy", np.repeat(data_out, repeat, axis=0))
    (folder / "dev_caps.txt").write_text("".join(f"caption {k} .\n" for k in range(5 * len(IMAGES))))
    (folder / "dev_ids.txt").write_text("".join(f"{image.number}\n" for image in IMAGES))
    return folder / "dev_ims.npy"


def frcnn_schema():
    """DEFAULT_SCHEMA of extracting_data.py."""
    import datasets

    def floats():
        return datasets.Sequence(length=SLOTS, feature=datasets.Value("float32"))

    return datasets.Features(
        {
            "attr_ids": floats(),
            "attr_probs": floats(),
            "boxes": datasets.Array2D((SLOTS, 4), dtype="float32"),
            "img_id": datasets.Value("int32"),
            "obj_ids": floats(),
            "obj_probs": floats(),
            "roi_features": datasets.Array2D((SLOTS, DIM), dtype="float32"),
            "sizes": datasets.Sequence(length=2, feature=datasets.Value("float32")),
            "preds_per_image": datasets.Value(dtype="int32"),
        }
    )


def frcnn_output(image: Image, **changes) -> dict[str, np.ndarray]:
    """A batch of one image, as the model returns it with `padding="max_detections"`."""

    def pad(array: np.ndarray) -> np.ndarray:
        padding = [(0, SLOTS - len(array)), *[(0, 0)] * (array.ndim - 1)]
        return np.pad(array, padding)[None]

    scale = 800 / min(image.width, image.height)
    return {
        "obj_ids": pad(image.object_ids),
        "obj_probs": pad(image.object_scores),
        "attr_ids": pad(image.attribute_ids),
        "attr_probs": pad(image.attribute_scores),
        "boxes": pad(image.fractions),
        "sizes": np.array([[int(image.height * scale + 0.5), int(image.width * scale + 0.5)]]),
        "preds_per_image": np.array([len(image.boxes)]),
        "roi_features": pad(image.features),
        "img_id": np.array([image.number]),
        **changes,
    }


def write_frcnn(folder: Path, *outputs: dict[str, np.ndarray]) -> Path:
    """extracting_data.py."""
    from datasets.arrow_writer import ArrowWriter

    schema = frcnn_schema()
    path = folder / "val.datasets"
    writer = ArrowWriter(features=schema, path=str(path))
    for output in outputs or map(frcnn_output, IMAGES):
        writer.write_batch(schema.encode_batch(output))
    writer.finalize()
    writer.close()
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "lxmert-tsv": write_lxmert,
    "vinvl-tsv": write_vinvl,
    "hdf5": write_hdf5,
    "volta-hdf5": write_volta_hdf5,
    "scan-npy": write_scan,
    "frcnn-arrow": write_frcnn,
}
