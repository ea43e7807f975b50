"""Visual entailment: SNLI-VE's file and its faults, a run on scenes, what it leaves, and its evaluation."""

import functools
import json
import re

import numpy as np
import places
import pytest
import tiny
import torch
from transformers import AutoProcessor
from two_processes import run

from unicoder_vl_hf import RegionStore, UnicoderVLForQuestionAnswering, UnicoderVLForVisualEntailment
from unicoder_vl_hf.runs.labelled import class_metrics
from unicoder_vl_hf.scenes import hypotheses as scenes_entailment
from unicoder_vl_hf.tasks.entailment import (
    LABELS,
    DataCollatorForUnicoderVLVisualEntailment,
    EntailmentArguments,
    load_for_entailment,
    prepare_entailment,
    read_entailment,
)

LINE = {
    "annotator_labels": ["neutral", "entailment", "neutral", "neutral", "neutral"],
    "captionID": "4705552913.jpg#2",
    "gold_label": "neutral",
    "pairID": "4705552913.jpg#2r1n",
    "sentence1": "Two women are embracing while holding to go packages.",
    "sentence2": "The sisters are hugging goodbye.",
    "Flickr30K_ID": "4705552913",
}


def write(path, *changes):
    """A file in which line n is SNLI-VE's with these changes; None takes a field out."""
    lines = []
    for number, of_line in enumerate(changes):
        item = LINE | {"pairID": f"pair {number}"} | of_line
        lines.append(json.dumps({name: value for name, value in item.items() if value is not None}) + "\n")
    path.write_text("".join(lines))
    return path


def test_a_file(tmp_path, caplog):
    path = write(tmp_path / "dev.jsonl", {}, {"gold_label": "-"}, {"gold_label": "entailment", "Flickr30K_ID": 36979})
    rows = read_entailment(path)
    assert rows.to_dict() == {
        "pair_id": ["pair 0", "pair 2"],
        "image_id": ["4705552913", "36979"],
        "hypothesis": [LINE["sentence2"]] * 2,
        "label": [2, 1],
    }
    assert "1 of 3 lines have no gold label and are left out" in caplog.text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sentence2": " "}, "line 2: sentence2 is ' ', expected a text"),
        ({"Flickr30K_ID": None}, "line 2: Flickr30K_ID is None"),
        ({"gold_label": "maybe"}, "line 2: gold_label is 'maybe', expected one of contradiction, entailment, neutral"),
        ({"pairID": "pair 0"}, "line 2: pairID 'pair 0' is that of line 1 too"),
    ],
)
def test_faults_name_line_and_field(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_entailment(write(tmp_path / "dev.jsonl", {}, change))


@pytest.mark.parametrize("lines", [[], [{"gold_label": "-"}]])
def test_a_file_without_labels_is_refused(lines, tmp_path):
    with pytest.raises(ValueError, match="holds no hypothesis with a gold label"):
        read_entailment(write(tmp_path / "dev.jsonl", *lines))


def test_a_batch(tmp_path):
    store = {name: tiny.record(name) for name in ("4705552913", "7")}
    rows = read_entailment(write(tmp_path / "dev.jsonl", {}, {"Flickr30K_ID": "7"}, {"gold_label": "contradiction"}))
    batch = DataCollatorForUnicoderVLVisualEntailment(tiny.processor(), store)([rows[0], rows[1], rows[2]])
    assert batch["image_index"].tolist() == [0, 1, 0] and len(batch["region_features"]) == 2
    assert batch["labels"].tolist() == [2, 2, 0]


def test_the_loss_is_the_mean_cross_entropy_of_labels_that_count():
    model = tiny.model(UnicoderVLForVisualEntailment, num_labels=3)
    batch = tiny.padded_batch()
    found = model(**batch, labels=torch.tensor([2, -100, 0, 1]))
    by_hand = [-found.logits[row].log_softmax(-1)[label] for row, label in ((0, 2), (2, 0), (3, 1))]
    torch.testing.assert_close(found.loss, sum(by_hand) / 3)
    with pytest.raises(ValueError, match=r"labels has shape \(4, 3\), expected \(4,\)"):
        model(**batch, labels=torch.zeros(4, 3))


def test_class_metrics_by_a_loop():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((40, 3)), rng.integers(0, 2, 40)  # none of the last class
    found = class_metrics(logits, labels.tolist(), LABELS)
    right = [row.tolist().index(max(row)) == label for row, label in zip(logits, labels, strict=True)]
    of_class = [np.mean([hit for hit, label in zip(right, labels, strict=True) if label == name]) for name in range(2)]
    expected = [np.mean(right), *of_class]
    assert list(found) == ["accuracy", "contradiction_accuracy", "entailment_accuracy"]
    assert list(found.values()) == pytest.approx(expected)


# Scenes


def test_hypotheses_are_what_they_are_said_to_be_and_no_text_tells():
    texts = {label: [] for label in LABELS}
    for index in range(800):
        scene, said = scenes_entailment.sample_hypotheses(index)
        for label, text in said.items():
            shape, colour = re.fullmatch(r"the (\w+) is (\w+)", text).groups()
            of_shape = [thing.colour for thing in scene.objects if thing.shape == shape]
            truth = "neutral" if not of_shape else "entailment" if of_shape == [colour] else "contradiction"
            colours = {thing.colour for thing in scene.objects}
            assert label == truth and len(of_shape) < 2 and (colour in colours or len(colours) == 1)
            texts[label].append(text)
    for label in LABELS:  # 64 texts, each 12.5 times
        found, counts = np.unique(texts[label], return_counts=True)
        assert len(found) == 64 and counts.max() < 12.5 + 5 * 12.5**0.5 and counts.min() > 0


# A run

SMALL = functools.partial(scenes_entailment.build_entailment_scenes, num_train=12, num_val=6, num_test=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the script on scenes, of 4 steps."""
    output = tmp_path_factory.mktemp("entailment") / "run"
    options = {"max_steps": 4, "per_device_train_batch_size": 8, "bf16": False, "disable_tqdm": "true"}
    options |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes_entailment, "build_entailment_scenes", SMALL)
        run("run_entailment", ["--output_dir", str(output), *words])
    return output


@pytest.fixture(scope="module")
def world(trained):
    return trained / "_data" / "entailment_scenes"


def test_what_a_run_leaves(trained, world):
    model, processor = load_for_entailment(trained, RegionStore(world / "regions"))
    assert type(model) is UnicoderVLForVisualEntailment and model.config.id2label == dict(enumerate(LABELS))
    assert processor.feature_extractor.region_provenance == RegionStore(world / "regions").provenance
    said = json.loads((trained / "eval_results.json").read_text())
    assert said.keys() == {"eval_accuracy", *(f"eval_{label}_accuracy" for label in LABELS)}
    card = (trained / "README.md").read_text()
    assert "visual-entailment" in card and "18 hypotheses about 6 images |" in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    variables: dict = {}
    exec(snippet, variables)
    assert variables["judgement"] in LABELS
    assert type(variables["model"]) is UnicoderVLForQuestionAnswering  # the Auto class's, of the same logits


def test_the_evaluation_of_a_run_is_what_the_run_says(trained, world, tmp_path, capsys):
    inputs = {"model": trained, "annotations": world / "val.jsonl", "regions": world / "regions"}
    inputs |= {"output": tmp_path / "val.json"}
    places.script("evaluate_entailment").main([word for name in inputs for word in (f"--{name}", str(inputs[name]))])
    found, said = (json.loads(path.read_text()) for path in (tmp_path / "val.json", trained / "eval_results.json"))
    assert {f"eval_{name}": found[name] for name in found if name.endswith("accuracy")} == said
    assert f"accuracy{'':16}{100 * found['accuracy']:6.2f} %" in capsys.readouterr().out


def test_a_run_on_ones_own_file_needs_all_of_it(trained, world, tmp_path):
    with pytest.raises(ValueError, match="Give --annotations, --validation_annotations and --regions together"):
        EntailmentArguments(annotations="train.jsonl")
    files = {"annotations": str(world / "train.jsonl"), "validation_annotations": str(world / "val.jsonl")}
    arguments = EntailmentArguments(**files, regions=str(world / "regions"), model_name_or_path=str(trained))
    setup = prepare_entailment(arguments, tmp_path)
    assert (len(setup.train), len(setup.validation), setup.data_name) == (36, 18, "train")
    write(tmp_path / "own.jsonl", {})
    arguments.validation_annotations = str(tmp_path / "own.jsonl")
    with pytest.raises(ValueError, match=r"1 of 1 images with hypotheses \(1 hypotheses\) have no regions"):
        prepare_entailment(arguments, tmp_path)


def test_a_model_of_questions_goes_on_with_a_new_output_for_each_class(trained, world, tmp_path, caplog):
    tiny.model(UnicoderVLForQuestionAnswering, region_feature_dim=256, num_labels=7, vocab_size=200).save_pretrained(
        tmp_path / "vqa"
    )
    AutoProcessor.from_pretrained(trained).save_pretrained(tmp_path / "vqa")
    files = {"annotations": str(world / "train.jsonl"), "validation_annotations": str(world / "val.jsonl")}
    regions = str(world / "regions")
    setup = prepare_entailment(
        EntailmentArguments(**files, regions=regions, model_name_or_path=str(tmp_path / "vqa")), tmp_path
    )
    before = UnicoderVLForQuestionAnswering.from_pretrained(tmp_path / "vqa")
    assert setup.model.answer_head.decoder.weight.shape == (3, 32)
    assert torch.equal(setup.model.answer_head.dense.weight, before.answer_head.dense.weight)
    assert "new parameters ['answer_head.decoder.bias', 'answer_head.decoder.weight']" in caplog.text


def test_a_checkpoint_of_other_classes_is_refused(tmp_path):
    tiny.model(UnicoderVLForVisualEntailment, num_labels=3).save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has the classes .*LABEL_0.*, expected .*contradiction"):
        load_for_entailment(tmp_path)
