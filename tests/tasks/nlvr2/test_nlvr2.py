"""Sentences about two photos: NLVR2's file and its faults, metrics, the model, a run on scenes, and its evaluation."""

import functools
import json
import random
import re

import numpy as np
import places
import pytest
import tiny
import torch
from huggingface_hub.errors import StrictDataclassError
from two_processes import run

from unicoder_vl_hf import RegionStore, UnicoderVLForVisualReasoning
from unicoder_vl_hf.scenes import pairs as scenes_nlvr2
from unicoder_vl_hf.scenes.world import plural
from unicoder_vl_hf.tasks.nlvr2 import (
    DataCollatorForUnicoderVLVisualReasoning,
    NLVR2Arguments,
    load_for_nlvr2,
    nlvr2_metrics,
    prepare_nlvr2,
    read_nlvr2,
    write_predictions,
)

LINE = {
    "validation": {"4": "True"},
    "sentence": "The right image shows a curving walkway of dark glass circling a ground-floor display.",
    "left_url": "https://example.org/a.jpg",
    "right_url": "https://example.org/b.jpg",
    "writer": "6",
    "label": "True",
    "synset": "dinner",
    "query": "convention_center2",
    "identifier": "dev-850-0-0",
    "directory": "41",
}


def write(path, *changes):
    """A file in which each line is NLVR2's with some changes; None takes a field out."""
    items = [{name: value for name, value in (LINE | of_line).items() if value is not None} for of_line in changes]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_a_file(tmp_path):
    changes = {}, {"identifier": "dev-850-1-0", "label": "False"}, {"identifier": "test1-0-1-1", "label": None}
    path = write(tmp_path / "dev.json", *changes)
    rows = read_nlvr2(path)
    assert rows["image_id"] == ["dev-850-0-img0", "dev-850-1-img0", "test1-0-1-img0"]
    assert rows["second_id"] == ["dev-850-0-img1", "dev-850-1-img1", "test1-0-1-img1"]
    assert rows["label"] == [1, 0, -100] and rows["sentence"] == [LINE["sentence"]] * 3
    names = [*rows["image_id"], *rows["second_id"]]
    pairs = "".join(f"{name},x{number}\n" for number, name in enumerate(names))
    (tmp_path / "ids.csv").write_text(f"source_id,image_id\n{pairs}")
    renamed = read_nlvr2(path, ids=str(tmp_path / "ids.csv"))
    assert renamed["image_id"] == ["x0", "x1", "x2"] and renamed["second_id"] == ["x3", "x4", "x5"]
    assert renamed.column_names == rows.column_names


@pytest.mark.parametrize(
    "change, message",
    [
        ({"identifier": "dev-850-0-0"}, "line 2: identifier 'dev-850-0-0' is that of line 1 too"),
        ({"identifier": "dev-850-0"}, "line 2: identifier is 'dev-850-0', expected split-set-pair-sentence"),
        ({"identifier": None}, "line 2: identifier is None"),
        ({"sentence": ""}, "line 2: sentence is '', expected a text"),
        ({"label": "maybe"}, "line 2: label is 'maybe', expected 'True' or 'False'"),
        ({"label": 1}, "line 2: label is 1, expected"),
    ],
)
def test_faults_name_line_and_field(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_nlvr2(write(tmp_path / "dev.json", {}, {"identifier": "dev-1-0-0"} | change))


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no sentence"):
        read_nlvr2(write(tmp_path / "dev.json"))


def test_metrics_by_a_loop_over_sentences():
    random.seed(0)
    of_each = [(of_set, pair, sentence) for of_set in range(6) for pair in range(3) for sentence in range(2)]
    identifiers = ["dev-{}-{}-{}".format(*numbers) for numbers in of_each]
    predictions, labels = ([random.random() < share for _ in identifiers] for share in (0.9, 0.9))
    found = nlvr2_metrics(np.array(predictions, dtype=int), np.array(labels, dtype=int), identifiers)
    sentences = {(of_set, sentence) for of_set in range(6) for sentence in range(2)}
    right = dict(zip(identifiers, (one == other for one, other in zip(predictions, labels, strict=True)), strict=True))
    consistent = [all(right[f"dev-{of_set}-{pair}-{sentence}"] for pair in range(3)) for of_set, sentence in sentences]
    assert found == pytest.approx({"accuracy": np.mean(list(right.values())), "consistency": np.mean(consistent)})
    assert 0 < found["consistency"] < found["accuracy"] < 1


@pytest.mark.parametrize(
    "predictions, labels, identifiers, message",
    [
        ([], [], [], "at least one"),
        ([1], [1, 0], ["dev-0-0-0"], "expected as many of each"),
        ([1], [-100], ["dev-0-0-0"], r"labels\[0\] is -100, expected 1 or 0: is it a test split"),
    ],
)
def test_what_cannot_be_measured_is_refused(predictions, labels, identifiers, message):
    with pytest.raises(ValueError, match=message):
        nlvr2_metrics(predictions, labels, identifiers)


def test_predictions_are_written_as_the_evaluation_reads_them(tmp_path):
    write_predictions(tmp_path / "dev.csv", ["dev-0-0-0", "dev-0-0-1"], [1, 0])
    assert (tmp_path / "dev.csv").read_text() == "dev-0-0-0,True\ndev-0-0-1,False\n"
    with pytest.raises(ValueError, match=r"\(1,\) predictions for 2 identifiers"):
        write_predictions(tmp_path / "dev.csv", ["dev-0-0-0", "dev-0-0-1"], [1])


# The model


def photos(index, batch):
    """The region arguments of these photos, each on its own."""
    return {name: batch[name][index] for name in batch if name.startswith("region")}


@pytest.mark.parametrize("kind", [{}, {"num_region_types": 2}, {"region_embedding": "uniter", "type_vocab_size": 3}])
@pytest.mark.parametrize("reasoning_head", ["paired", "paired_attention", "single"])
@pytest.mark.parametrize("padding_free", [False, True])
def test_pairs_that_share_photos_equal_pairs_of_their_own(reasoning_head, kind, padding_free):
    model = tiny.model(UnicoderVLForVisualReasoning, reasoning_head=reasoning_head, **kind)
    model.config.padding_free = padding_free
    batch = tiny.padded_batch()
    text = {name: batch[name][:3] for name in ("input_ids", "attention_mask")}
    index = torch.tensor([[0, 1], [1, 3], [2, 0]])
    shared = model(**text, **photos(slice(None), batch), image_index=index, labels=torch.tensor([1, 0, -100]))
    torch.testing.assert_close(model(**text, **photos(index.flatten(), batch)).logits, shared.logits, rtol=0, atol=1e-5)
    by_hand = [-shared.logits[row].log_softmax(-1)[label] for row, label in ((0, 1), (1, 0))]
    torch.testing.assert_close(shared.loss, sum(by_hand) / 2)
    swapped = model(**text, **photos(slice(None), batch), image_index=index.flip(1)).logits
    same = reasoning_head == "single" and not kind  # one pass over regions that nothing tells apart
    assert ((swapped - shared.logits).abs().max() < 1e-5) == same
    shared.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_paired_by_hand():
    model = tiny.model(UnicoderVLForVisualReasoning)
    batch = tiny.padded_batch()
    text = {name: batch[name][:2] for name in ("input_ids", "attention_mask")}
    sides = [model.bert(**text, **photos([side, 2 + side], batch)).pooler_output for side in (0, 1)]
    found = model(**text, **photos(slice(None), batch)).logits
    torch.testing.assert_close(found, model.reasoning_head(torch.cat(sides, dim=1)), rtol=0, atol=1e-5)
    assert found.dtype == torch.float32


def test_wrong_numbers_of_photos_are_refused():
    model, batch = tiny.model(UnicoderVLForVisualReasoning), tiny.padded_batch()
    with pytest.raises(ValueError, match="4 sentences need 8 photos or image_index, got 4"):
        model(**batch)
    with pytest.raises(ValueError, match=r"image_index has shape \(4,\), expected \(4, 2\)"):
        model(**batch, image_index=torch.arange(4))
    with pytest.raises(StrictDataclassError, match="num_region_types=2 must be at least 0, and 0 with"):
        tiny.config(region_embedding="uniter", num_region_types=2)
    base = tiny.model(UnicoderVLForVisualReasoning).bert
    with pytest.raises(ValueError, match="this model has no types of regions: set num_region_types"):
        base(**batch, region_token_type_ids=torch.zeros(4, 4, dtype=torch.long))


def test_a_batch(tmp_path):
    names = [f"dev-850-{pair}-img{side}" for pair in (0, 1) for side in (0, 1)]
    store = {name: tiny.record(name) for name in names}
    rows = read_nlvr2(write(tmp_path / "dev.json", {}, {"identifier": "dev-850-1-0"}, {"identifier": "dev-850-0-1"}))
    batch = DataCollatorForUnicoderVLVisualReasoning(tiny.processor(), store)([rows[0], rows[1], rows[2]])
    assert batch["image_index"].tolist() == [[0, 1], [2, 3], [0, 1]] and len(batch["region_features"]) == 4
    assert batch["labels"].tolist() == [1, 1, 1]


# Scenes


def test_sentences_are_true_as_said_and_as_often_as_not_for_every_text():
    texts = {}
    for index in range(600):
        (left, right), sentences = scenes_nlvr2.sample_pair(index)
        counts = [[thing.shape for thing in scene.objects].count for scene in (left, right)]
        for text, holds in sentences:
            shape = next(name for name in scenes_nlvr2.SHAPE_WORDS if re.search(rf"\b({name}|{plural(name)})\b", text))
            one, other = (count(shape) for count in counts)
            if "both" in text:
                truth = one > 0 and other > 0
            else:
                truth = one > other if "left than" in text else other > one
                assert one != other
            assert truth == holds
            texts.setdefault(text, []).append(holds)
    assert len(texts) == 8 + 16
    for holds in texts.values():
        assert abs(np.mean(holds) - 0.5) < 4 * 0.5 / len(holds) ** 0.5


# A run

SMALL = functools.partial(scenes_nlvr2.build_nlvr2_scenes, num_train=12, num_val=6, num_test=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the script on scenes, of 4 steps."""
    output = tmp_path_factory.mktemp("nlvr2") / "run"
    options = {"max_steps": 4, "per_device_train_batch_size": 8, "bf16": False, "disable_tqdm": "true"}
    options |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes_nlvr2, "build_nlvr2_scenes", SMALL)
        run("run_nlvr2", ["--output_dir", str(output), *words])
    return output


@pytest.fixture(scope="module")
def world(trained):
    return trained / "_data" / "nlvr2_scenes"


def evaluate(trained, world, split, **options):
    inputs = {"model": trained, "annotations": world / f"{split}.json", "regions": world / "regions", **options}
    places.script("evaluate_nlvr2").main([word for name in inputs for word in (f"--{name}", str(inputs[name]))])


def test_what_a_run_leaves_and_its_evaluation(trained, world, tmp_path, capsys):
    model, _ = load_for_nlvr2(trained, RegionStore(world / "regions"))
    assert type(model) is UnicoderVLForVisualReasoning and model.config.id2label == {0: "false", 1: "true"}
    said = json.loads((trained / "eval_results.json").read_text())
    evaluate(trained, world, "dev", output=tmp_path / "dev.json", predictions=tmp_path / "dev.csv")
    found = json.loads((tmp_path / "dev.json").read_text())
    assert {f"eval_{name}": found[name] for name in ("accuracy", "consistency")} == said
    judged = [line.split(",") for line in (tmp_path / "dev.csv").read_text().splitlines()]
    rows = read_nlvr2(world / "dev.json")
    right = [(label == 1) == (word == "True") for label, (_, word) in zip(rows["label"], judged, strict=True)]
    assert [name for name, _ in judged] == rows["identifier"] and np.mean(right) == pytest.approx(found["accuracy"])
    assert f"accuracy    {100 * found['accuracy']:6.2f} %" in capsys.readouterr().out
    card = (trained / "README.md").read_text()
    assert "visual-reasoning" in card and f"{len(rows)} sentences |" in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(snippet, {})


def own(world, **changes):
    files = {"annotations": str(world / "train.json"), "validation_annotations": str(world / "dev.json")}
    return NLVR2Arguments(**files | {"regions": str(world / "regions")} | changes)


@pytest.mark.parametrize("without", ["nothing", "regions", "photo"])
def test_what_a_run_is_left_without(without, trained, world, tmp_path):
    arguments = own(world, without=without, model_name_or_path=str(trained))
    setup, rows = prepare_nlvr2(arguments, tmp_path), read_nlvr2(world / "train.json")
    moved = [setup.train[number]["image_id"] != rows[number]["image_id"] for number in range(len(rows))]
    seconds = [setup.train[number]["second_id"].replace("img1", "img0") for number in range(len(rows))]
    assert all(moved) if without == "photo" else not any(moved)
    assert seconds == [setup.train[number]["image_id"] for number in range(len(rows))]  # pairs stay together
    batch = setup.collator([setup.train[0], setup.train[5]])
    assert ("region_features" in batch, "image_index" in batch) == ((without != "regions"),) * 2
    with torch.no_grad():
        assert setup.model(**batch).logits.shape == (2, 2)


def test_photos_that_do_not_both_exist_are_an_error_or_a_skip(trained, world, tmp_path):
    rows = (world / "train.json").read_text().replace("train-3-0-", "train-99-0-")
    (tmp_path / "train.json").write_text(rows)
    arguments = own(world, annotations=str(tmp_path / "train.json"), model_name_or_path=str(trained))
    with pytest.raises(ValueError, match=r"2 of 24 images with sentences \(\d sentences\) have no regions"):
        prepare_nlvr2(arguments, tmp_path / "run")
    arguments.skip_missing = True
    setup = prepare_nlvr2(arguments, tmp_path / "run")
    assert len(setup.train) == rows.count("\n") - rows.count("train-99")


def test_what_lacks_labels_or_files_is_refused(trained, world, tmp_path):
    with pytest.raises(ValueError, match="Give --annotations, --validation_annotations and --regions together"):
        NLVR2Arguments(annotations="train.json")
    (tmp_path / "test1.json").write_text(re.sub(r', "label": "\w+"', "", (world / "test1.json").read_text()))
    with pytest.raises(ValueError, match="test1-0-0-0 has no label, without which"):
        prepare_nlvr2(own(world, validation_annotations=str(tmp_path / "test1.json")), tmp_path / "run")
    with pytest.raises(ValueError, match="has no labels: give --predictions"):
        evaluate(trained, world, "test1", annotations=tmp_path / "test1.json")
