"""Ids of features, renamed to those of captions."""

import json
import pickle

import pytest

from unicoder_vl_hf.data.image_ids import id_mapping


@pytest.fixture
def karpathy(tmp_path):
    images = [
        ("COCO_val2014_000000391895.jpg", "test", 7, 391895),
        ("COCO_train2014_000000000009.jpg", "restval", 8, 9),
        ("COCO_val2014_000000000042.jpg", "test", 9, 42),
    ]
    path = tmp_path / "dataset_coco.json"
    path.write_text(
        json.dumps(
            {
                "dataset": "coco",
                "images": [
                    {
                        "filename": name,
                        "split": split,
                        "imgid": imgid,
                        "cocoid": cocoid,
                        "sentids": [imgid * 2, imgid * 2 + 1],
                        "sentences": [{"raw": f"{word} dog", "sentid": imgid * 2, "imgid": imgid} for word in "ab"],
                    }
                    for name, split, imgid, cocoid in images
                ],
            }
        )
    )
    return path


@pytest.mark.parametrize(
    ("rule", "source_id", "image_id"),
    [
        ("stem", "train2014/COCO_train2014_000000000009.jpg", "COCO_train2014_000000000009"),
        ("stem", "plain", "plain"),
        ("stem", "lsmdc/1_A_00.23.57.935-00.24.00.783@0.JPG", "1_A_00.23.57.935-00.24.00.783@0"),
        ("stem", "lsmdc/1_A_00.23.57.935-00.24.00.783@0", "1_A_00.23.57.935-00.24.00.783@0"),
        ("stem", "train\\a.b.png", "a.b"),
        ("stem", "150367.npz", "150367"),
        ("coco", "val2014\\COCO_val2014_000000391895.jpg", "391895"),
        ("coco", "COCO_val2014_000000391895.jpg", "391895"),
        ("coco", "coco_train_000000000009", "9"),
        ("coco", "9", "9"),
        ("{captions}:cocoid", "391895", "COCO_val2014_000000391895"),
        ("{captions}:imgid", "8", "COCO_train2014_000000000009"),
        ("{captions}:row", "2", "COCO_val2014_000000000042"),
        ("{captions}:row:test", "1", "COCO_val2014_000000000042"),
        ("{captions}:row:train", "0", "COCO_train2014_000000000009"),
        ("{csv}", "flickr30k_000", "dog"),
    ],
)
def test_rules(karpathy, tmp_path, rule, source_id, image_id):
    text = '\ufeffimage_id,source_id\r\n\r\ndog,flickr30k_000\r\n"a, b",flickr30k_001 \r\n\r\n'
    (tmp_path / "ids.csv").write_text(text)
    rename = id_mapping(rule.format(captions=karpathy, csv=tmp_path / "ids.csv"))
    assert rename(source_id) == image_id
    assert pickle.loads(pickle.dumps(rename))(source_id) == image_id


def test_what_a_rule_does_not_cover(karpathy, tmp_path):
    with pytest.raises(ValueError, match=r"Image '77' is not in .*dataset_coco.json:imgid, whose 3 ids are like '7'"):
        id_mapping(f"{karpathy}:imgid")("77")
    with pytest.raises(ValueError, match=r"Image 'dog\.jpg' ends in no number"):
        id_mapping("coco")("dog.jpg")


def test_malformed_rules(karpathy, tmp_path):
    with pytest.raises(ValueError, match="'names' is no rule: expected stem"):
        id_mapping("names")
    with pytest.raises(ValueError, match="has no column 'nr'"):
        id_mapping(f"{karpathy}:nr")
    with pytest.raises(ValueError, match="has no split 'dev'"):
        id_mapping(f"{karpathy}:row:dev")
    (tmp_path / "ids.csv").write_text("from,to\na,b\n")
    with pytest.raises(ValueError, match=r"\['from', 'to'\], expected source_id and image_id"):
        id_mapping(str(tmp_path / "ids.csv"))
    (tmp_path / "ids.csv").write_text("source_id,image_id\na,b\nc\n")
    with pytest.raises(ValueError, match=r"ids\.csv pairs 'c' with None, expected a source_id and an image_id"):
        id_mapping(str(tmp_path / "ids.csv"))
    (tmp_path / "ids.csv").write_text("source_id,image_id\na,b\na,c\n")
    with pytest.raises(ValueError, match="'a' stands for both 'b' and 'c'"):
        id_mapping(str(tmp_path / "ids.csv"))
    with pytest.raises(FileNotFoundError):
        id_mapping(str(tmp_path / "missing.json:imgid"))
