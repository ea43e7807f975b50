"""Expressions that refer to a region: files and their faults, metrics, the model, a run on scenes, its evaluation."""

import functools
import json
import pickle
import re
from dataclasses import replace

import numpy as np
import places
import pytest
import tiny
import torch
from two_processes import run

from unicoder_vl_hf import RegionStore, UnicoderVLForGrounding
from unicoder_vl_hf.runs import evaluation
from unicoder_vl_hf.runs.batches import compute_logits
from unicoder_vl_hf.scenes import expressions as scenes_grounding
from unicoder_vl_hf.tasks.grounding import (
    DataCollatorForUnicoderVLGrounding,
    GroundingArguments,
    grounding_metrics,
    load_for_grounding,
    prepare_grounding,
    read_entities,
    read_references,
    target_ious,
)
from unicoder_vl_hf.tasks.grounding.run_evaluation import GroundingEvaluationArguments

# As RefCOCO has them: two expressions of one object, splits of its own, a photo's number, and fields that nobody needs.
REFS = [
    {
        "ref_id": 7, "ann_id": 1719310, "category_id": 1, "image_id": 581857, "split": "train",
        "file_name": "COCO_train2014_000000581857_16.jpg", "sent_ids": [0, 1],
        "sentences": [
            {"sent_id": 0, "sent": "the lady with the blue shirt", "raw": "THE LADY", "tokens": ["the", "lady"]},
            {"sent_id": 1, "sent": "lady in back", "raw": "lady in back", "tokens": ["lady", "in", "back"]},
        ],
    },
    {
        "ref_id": 8, "ann_id": 5, "category_id": 2, "image_id": 9, "split": "testA", "file_name": "x", "sent_ids": [2],
        "sentences": [{"sent_id": 2, "sent": "left cup", "raw": "Left cup", "tokens": ["left", "cup"]}],
    },
]  # fmt: skip
INSTANCES = {
    "info": {},
    "images": [
        {"id": 581857, "width": 640, "height": 427, "file_name": "COCO_train2014_000000581857.jpg"},
        {"id": 9, "width": 100, "height": 50, "file_name": "y.jpg"},
    ],
    "annotations": [
        {"id": 1719310, "image_id": 581857, "bbox": [103.93, 299.99, 134.22, 127.01], "category_id": 1, "area": 3.0},
        {"id": 5, "image_id": 9, "bbox": [10, 20, 30, 20], "category_id": 2, "segmentation": [[1, 2]]},
    ],
    "categories": [{"id": 1, "name": "person"}],
}


def write(folder, refs=None, instances=None, protocol=2):
    (folder / "refs(unc).p").write_bytes(pickle.dumps(REFS if refs is None else refs, protocol))
    (folder / "instances.json").write_text(json.dumps(INSTANCES if instances is None else instances))
    return folder / "refs(unc).p", folder / "instances.json"


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_refcoco(protocol, tmp_path):
    files = write(tmp_path, protocol=protocol)
    rows = read_references(*files)
    assert rows["expression"] == ["the lady with the blue shirt", "lady in back", "left cup"]
    assert rows["expression_id"] == ["0", "1", "2"] and rows["image_id"] == ["581857", "581857", "9"]
    assert rows["split"] == ["train", "train", "testA"] and rows["image_width"] == [640, 640, 100]
    np.testing.assert_allclose(rows["box"][0], [103.93, 299.99, 238.15, 427.0], rtol=1e-6)
    assert rows["box"][2] == [10, 20, 40, 40]
    assert read_references(*files, split="testA").to_dict() == rows.select([2]).to_dict()
    (tmp_path / "refs.json").write_text(json.dumps(REFS))
    assert read_references(tmp_path / "refs.json", files[1]).to_dict() == rows.to_dict()


def changed(content, *path, to):
    content = json.loads(json.dumps(content))
    *path, last = path
    at = functools.reduce(lambda at, step: at[step], path, content)
    at[last] = to
    return content


@pytest.mark.parametrize(
    "refs, instances, message",
    [
        ({"refs": []}, None, r"refs\(unc\).p holds a dict, expected a list of references"),
        ([{"ann_id": 1}], None, r"reference 0: no field 'image_id'; it is a dict"),
        (changed(REFS, 0, "sentences", 1, "sent", to=" "), None, "reference 0: sent is ' ', expected a text"),
        (
            changed(REFS, 1, "ann_id", to=6),
            None,
            r"1 references have no box or photo in .*, such as reference 1 \(ann_id 6",
        ),
        (changed(REFS, 1, "image_id", to=6), None, r"1 references have no box or photo"),
        (changed(REFS, 0, "sentences", to=None), None, "reference 0: split is .* sentences is a NoneType; expected"),
        (changed(REFS, 0, "split", to=3), None, "reference 0: split is 3 .*expected a name"),
        (None, changed(INSTANCES, "images", 0, "width", to=0), r"image \d+: it is 0 x \d+; expected pixels"),
        (None, {"images": []}, "instances.json has no list of annotations at its top"),
        (None, changed(INSTANCES, "annotations", 1, "bbox", to=[1, 2, 0, 4]), "annotation 5: bbox is .*above 0"),
        (None, changed(INSTANCES, "annotations", 1, "bbox", to=[1, 2]), "annotation 5: bbox is .*expected x, y, width"),
    ],
)
def test_faults_of_refcoco(refs, instances, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_references(*write(tmp_path, refs, instances))


def test_references_without_a_box_may_be_left_out_and_are_counted(tmp_path, caplog):
    files = write(tmp_path, changed(REFS, 1, "ann_id", to=6))
    assert len(read_references(*files, skip_missing=True)) == 2
    assert "left out 1 references without a box or photo, such as reference 1" in caplog.text
    with pytest.raises(ValueError, match=r"no expression of split 'dev', only of \['testA', 'train'\]"):
        read_references(*files, split="dev")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    files = write(tmp_path, [len])
    with pytest.raises(ValueError, match=re.escape("names __builtin__.len")):
        read_references(*files)


XML = """<annotation><filename>36979.jpg</filename><size><width>500</width><height>375</height><depth>3</depth></size>
<object><name>12</name><name>15</name><bndbox><xmin>10</xmin><ymin>20</ymin><xmax>110</xmax><ymax>220</ymax></bndbox></object>
<object><name>12</name><bndbox><xmin>200</xmin><ymin>30</ymin><xmax>300</xmax><ymax>120</ymax></bndbox></object>
<object><name>13</name><nobndbox>1</nobndbox><scene>1</scene></object>
</annotation>"""


def test_flickr30k_entities(tmp_path):
    (tmp_path / "Sentences").mkdir()
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Sentences" / "36979.txt").write_text(
        "[/EN#12/people Two men] in [/EN#14/clothing hats] near [/EN#13/scene a lake] .\n"
        "[/EN#15/people/other A man] waves .\n"
    )
    (tmp_path / "Annotations" / "36979.xml").write_text(XML)
    (tmp_path / "test.txt").write_text("36979\n")
    rows = read_entities(tmp_path / "Sentences", tmp_path / "Annotations", tmp_path / "test.txt")
    assert rows["expression"] == ["Two men", "A man"] and rows["expression_id"] == ["36979#1#0", "36979#2#0"]
    assert rows["box"] == [[10, 20, 300, 220], [10, 20, 110, 220]]  # two boxes become the one around them
    assert rows["image_width"] == [500, 500] and rows["split"] == [None, None]
    (tmp_path / "Annotations" / "36979.xml").write_text("<annotation><size/>")
    with pytest.raises(ValueError, match=r"36979\.xml: expected the xml of Flickr30k Entities"):
        read_entities(tmp_path / "Sentences", tmp_path / "Annotations", ["36979"])
    with pytest.raises(FileNotFoundError):
        read_entities(tmp_path / "Sentences", tmp_path / "Annotations", ["7"])


# Metrics


def test_metrics_by_a_loop():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 15, 60)
    scores = [rng.standard_normal(count) for count in counts]
    ious = [np.round(rng.random(count) ** 2, 2) for count in counts]
    expected = {1: 0, 5: 0, 10: 0}
    for of_row, overlaps in zip(scores, ious, strict=True):
        best_first = sorted(range(len(of_row)), key=lambda region, of_row=of_row: -of_row[region])
        for count in expected:
            expected[count] += any(overlaps[region] >= 0.5 for region in best_first[:count])
    found = grounding_metrics(scores, ious)
    reachable = sum(max(overlaps) >= 0.5 for overlaps in ious)
    assert list(found.values()) == pytest.approx([*(value / 60 for value in expected.values()), reachable / 60])
    assert list(found) == ["accuracy", "recall@5", "recall@10", "reachable"]
    assert found["accuracy"] < found["recall@5"] < found["recall@10"] < 1


@pytest.mark.parametrize(
    "scores, ious, message",
    [
        ([], [], "expected as many, not 0"),
        ([[1.0]], [], "expected as many"),
        ([[1.0]], [[0.5, 0.5]], r"scores\[0\]"),
        ([[np.nan]], [[0.5]], "NaN"),
    ],
)
def test_what_cannot_be_measured_is_refused(scores, ious, message):
    with pytest.raises(ValueError, match=message):
        grounding_metrics(scores, ious)


def test_overlaps_by_hand():
    boxes = np.array([[0, 0, 0.5, 0.5], [0.25, 0.25, 0.75, 0.75], [0.9, 0.9, 1, 1]])
    np.testing.assert_allclose(target_ious(boxes, [0, 0, 50, 100], 100, 200), [1, 1 / 7, 0])


# Model and tensors


@pytest.mark.parametrize("grounding_layers", [1, 2])
def test_scores_are_of_regions_and_padding_has_none(grounding_layers):
    model, batch = tiny.model(UnicoderVLForGrounding, grounding_layers=grounding_layers), tiny.padded_batch()
    labels = torch.tensor([3, 0, -100, 1])
    found = model(**batch, labels=labels)
    states = model.bert(**batch).last_hidden_state[:, 7:]
    by_hand = model.grounding_head(states)[..., 0]
    real = batch["region_attention_mask"] == 1
    torch.testing.assert_close(found.logits[real], by_hand[real], rtol=0, atol=1e-5)
    assert (found.logits[~real] == -10_000).all() and found.logits.dtype == torch.float32
    rows = [-found.logits[row].log_softmax(-1)[label] for row, label in ((0, 3), (1, 0), (3, 1))]
    torch.testing.assert_close(found.loss, sum(rows) / 3)
    found.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.config.padding_free = True
    torch.testing.assert_close(model(**batch).logits, found.logits, rtol=0, atol=1e-5)
    index = torch.tensor([1, 0, 0, 3])
    own = batch | {name: value[index] for name, value in batch.items() if name.startswith("region")}
    torch.testing.assert_close(model(**batch, image_index=index).logits, model(**own).logits, rtol=0, atol=1e-5)


def test_without_regions_there_is_nothing_to_choose():
    model, batch = tiny.model(UnicoderVLForGrounding), tiny.padded_batch()
    with pytest.raises(ValueError, match="Grounding needs region_features"):
        model(batch["input_ids"])


def test_labels_are_the_regions_that_the_model_is_shown(tmp_path):
    """The feature extractor keeps two of three regions; the boxes of the record are of a photo of another size."""
    boxes = np.array([[0, 0, 64, 48], [320, 0, 640, 480], [0, 240, 320, 480]], dtype=np.float32)
    record = replace(tiny.record("9"), boxes=boxes, object_scores=np.array([0.1, 0.9, 0.8], dtype=np.float32))
    rows = [
        {"expression": "a dog", "image_id": "9", "box": box, "image_width": 64, "image_height": 48}
        for box in ([1, 24, 32, 48], [32, 0, 64, 47], [0, 0, 6.4, 4.8])
    ]
    collator = DataCollatorForUnicoderVLGrounding(tiny.processor(max_regions=2), {"9": record})
    batch = collator(rows)
    assert batch["labels"].tolist() == [1, 0, -100]  # the third is not shown
    assert batch["image_index"].tolist() == [0, 0, 0] and batch["region_features"].shape[:2] == (1, 2)
    blind = replace(collator, without_text=True)(rows)
    assert blind["input_ids"].tolist() == [[2, 1, 3]] * 3


# Scenes


def test_each_expression_names_one_object():
    chosen = []
    for index in range(400):
        scene, named = scenes_grounding.sample_referred_scene(index)
        assert len({thing.box for thing in scene.objects}) == 5
        assert scenes_grounding.HELD_OUT.isdisjoint((thing.colour, thing.shape) for thing in scene.objects)
        for form, (text, target) in named.items():
            alike = [thing for thing in scene.objects if thing.shape == target.shape]
            words = text.split()
            if form == "colour":
                fits = [thing for thing in alike if thing.colour == words[1]]
                assert sum(thing.colour == words[1] for thing in scene.objects) == 2  # the shape has to be read, too
            elif form == "size":
                fits = [thing for thing in alike if thing.size == words[1]]
                assert sum(thing.size == words[1] for thing in scene.objects) >= 2
            elif form == "place":
                sides = {"left": (0, 1), "right": (2, -1), "top": (1, 1), "bottom": (3, -1)}
                edge, sign = sides[words[-1]]
                fits = [min(alike, key=lambda thing, edge=edge, sign=sign: sign * thing.box[edge])]
                assert len(alike) == 2
            elif form == "relation":
                (of,) = [thing for thing in scene.objects if thing.shape == words[-1]]
                said = scenes_grounding.RELATION_WORDS
                relations = [said[scenes_grounding._separation(thing.box, of.box)[0]][0] for thing in alike]
                fits = [thing for thing, relation in zip(alike, relations, strict=True) if relation in text]
            else:
                fits = alike
            assert fits == [target], text
            if form != "alone":
                chosen.append(scene.objects.index(target))
    counts = np.bincount(chosen, minlength=5)
    assert counts.max() - counts.min() < 5 * (len(chosen) / 5) ** 0.5  # the order tells nothing


# A run

SMALL = functools.partial(scenes_grounding.build_grounding_scenes, num_train=12, num_val=6, num_test=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the script on scenes, of 4 steps."""
    output = tmp_path_factory.mktemp("grounding") / "run"
    options = {"max_steps": 4, "per_device_train_batch_size": 8, "bf16": False, "disable_tqdm": "true"}
    options |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes_grounding, "build_grounding_scenes", SMALL)
        run("run_grounding", ["--output_dir", str(output), *words])
    return output


@pytest.fixture(scope="module")
def world(trained):
    return trained / "_data" / "grounding_scenes"


def evaluate(trained, world, **options):
    inputs = {"model": trained, "regions": world / "regions", **options}
    places.script("evaluate_grounding").main([word for name in inputs for word in (f"--{name}", str(inputs[name]))])


def test_what_a_run_leaves_and_its_evaluation(trained, world, tmp_path, capsys):
    model, _ = load_for_grounding(trained, RegionStore(world / "regions"))
    assert type(model) is UnicoderVLForGrounding and model.config.location_initializer_range == 1
    said = json.loads((trained / "eval_results.json").read_text())
    evaluate(
        trained, world, refs=world / "refs.json", instances=world / "instances.json", output=tmp_path / "val.json",
        pictures=tmp_path / "pictures", photos=world / "images", num_pictures=2,
    )  # fmt: skip
    found = json.loads((tmp_path / "val.json").read_text())["splits_measured"]["val"]
    assert {f"eval_{name}": value for name, value in found.items() if name != "expressions"} == pytest.approx(said)
    assert said["eval_reachable"] == 1 and len(list((tmp_path / "pictures").iterdir())) == 2
    assert f"val       accuracy    {100 * found['accuracy']:8.2f} %" in capsys.readouterr().out
    card = (trained / "README.md").read_text()
    assert "visual-grounding" in card and "expressions about 6 images |" in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(snippet, {})


def test_the_evaluation_computes_in_the_precision_that_is_asked_for(trained, world, monkeypatch):
    dtypes = []

    def computed(*arguments, **options):
        dtypes.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return compute_logits(*arguments, **options)

    monkeypatch.setattr(evaluation, "compute_logits", computed)
    files = {"refs": world / "refs.json", "instances": world / "instances.json"}
    evaluate(trained, world, **files)
    evaluate(trained, world, **files, mixed_precision="bf16")
    assert dtypes == [torch.float32, torch.bfloat16]


def own(world, **changes):
    files = {"refs": str(world / "refs.json"), "instances": str(world / "instances.json")}
    return GroundingArguments(**files | {"regions": str(world / "regions")} | changes)


@pytest.mark.parametrize("without", ["nothing", "expression", "photo"])
def test_what_a_run_is_left_without(without, trained, world, tmp_path, caplog):
    setup = prepare_grounding(own(world, without=without, model_name_or_path=str(trained)), tmp_path)
    rows = read_references(world / "refs.json", world / "instances.json", split="train")
    same = [setup.train[number]["expression"] == rows[number]["expression"] for number in range(len(rows))]
    assert all(same) if without != "photo" else sum(same) < len(rows) / 2
    assert f"Of {len(rows)} training expressions 0 are met by no region" in caplog.text
    batch = setup.collator([setup.train[0], setup.train[1]])
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1]) == (without == "expression")


def test_regions_of_other_photos_are_refused(trained, world, tmp_path):
    content = json.loads((world / "instances.json").read_text())
    for image in content["images"]:
        image["width"], image["height"] = 10_000, 10_000
    (tmp_path / "instances.json").write_text(json.dumps(content))
    arguments = own(world, instances=str(tmp_path / "instances.json"), model_name_or_path=str(trained))
    with pytest.raises(ValueError, match="No region meets any expression"):
        prepare_grounding(arguments, tmp_path / "run")
    with pytest.raises(ValueError, match="Give --refs, --instances and --regions together"):
        GroundingArguments(refs="refs.p")


@pytest.mark.parametrize("options, message", [({}, "Give either --refs"), ({"refs": "a"}, "--refs needs --instances")])
def test_options_of_the_evaluation_that_belong_together(options, message):
    with pytest.raises(ValueError, match=message):
        GroundingEvaluationArguments(model="m", regions="r", **options)
