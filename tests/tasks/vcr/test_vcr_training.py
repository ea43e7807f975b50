"""Training and evaluation on VCR: scores in order, tasks, what a batch is left without, and what the scripts write."""

import functools
import json
import re
import shutil

import numpy as np
import places
import pytest
import torch
from transformers import AutoModelForMultipleChoice, AutoProcessor
from two_processes import run

from unicoder_vl_hf import RegionStore, UnicoderVLConfig, UnicoderVLForMultipleChoice, UnicoderVLForPreTraining
from unicoder_vl_hf.scenes import questions as scenes_vcr
from unicoder_vl_hf.scenes.world import scene_tokenizer
from unicoder_vl_hf.tasks.vcr.data import VCRExamples, read_vcr
from unicoder_vl_hf.tasks.vcr.metrics import check_submission
from unicoder_vl_hf.tasks.vcr.training import (
    LEFT_OUT,
    PAPER,
    VCRArguments,
    WithoutInputs,
    choice_probabilities,
    evaluate_vcr,
    load_for_vcr,
    open_vcr,
    prepare_vcr,
    score_choices,
)

SMALL = functools.partial(scenes_vcr.build_vcr_scenes, num_train=6, num_val=4, num_test=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return SMALL(tmp_path_factory.mktemp("vcr") / "run" / "_data" / "vcr_scenes")


@pytest.fixture(scope="module")
def setup(world):
    """A model of larger weights than new ones have, whose scores differ plainly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes_vcr, "build_vcr_scenes", SMALL)
        setup = prepare_vcr(VCRArguments(max_length=64), world.parents[1])
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = UnicoderVLConfig(
        vocab_size=len(scene_tokenizer()),
        region_feature_dim=setup.model.config.region_feature_dim,
        initializer_range=0.3,
        hidden_dropout_prob=0.5,
        **sizes,
    )
    setup.model = UnicoderVLForMultipleChoice(config).train()
    return setup


def test_the_recipes():
    assert (PAPER["num_train_epochs"], PAPER["learning_rate"], PAPER["train_batch_size"]) == (20, 3e-5, 48)
    assert VCRArguments().max_length == 156 and VCRArguments().tasks == ["qa", "qar"]


@pytest.mark.parametrize("tasks", [["qa", "q2ar"], []])
def test_unknown_tasks_are_refused(tasks):
    with pytest.raises(ValueError, match="expected qa, qar, or both"):
        VCRArguments(tasks=tasks)


def test_annotations_and_regions_come_together():
    with pytest.raises(ValueError, match="both --annotations and --regions"):
        VCRArguments(annotations="vcr1annots")


def test_a_split_without_labels_is_refused_before_anything_is_trained(world, tmp_path):
    shutil.copytree(world, tmp_path / "questions")
    shutil.copy(world / "test.jsonl", tmp_path / "questions" / "val.jsonl")
    arguments = VCRArguments(
        annotations=str(tmp_path / "questions"),
        metadata=str(world / "images"),
        regions=str(world / "regions"),
        tasks=["qa"],
    )
    with pytest.raises(ValueError, match=r"val\.jsonl: annot_id 'test-0' has no answer_label.*Is it the test split\?"):
        open_vcr(arguments, tmp_path / "run")


def test_a_run_trains_on_both_tasks_and_knows_the_epoch(setup):
    assert len(setup.train) == 24 and len(setup.validation) == 8
    setup.train.set_epoch(3)
    row = setup.train[13]  # the second question of QA->R
    assert (row["row_index"], row["epoch"], row["annot_id"]) == (13, 3, "train-1")
    assert [len(choice) for choice in row["choices"]] == [3] * 4
    assert [len(choice) for choice in setup.train[1]["choices"]] == [2] * 4
    setup.train.set_epoch(0)


def test_scores_are_those_of_each_example_in_order(setup):
    examples = VCRExamples(setup.validation, "qar")
    scores = score_choices(setup.model, setup.collator, examples, batch_size=4)
    assert scores.shape == (8, 4) and setup.model.training
    assert np.ptp(scores, axis=1).min() > 1e-3
    for index in range(8):
        batch = setup.collator([examples[index]])
        with torch.no_grad():
            alone = setup.model.eval()(**batch).logits[0]
        np.testing.assert_allclose(scores[index], alone, atol=1e-4)
    setup.model.train()


def test_accuracies_are_those_of_the_scores(setup):
    labels = [np.array(setup.validation[f"{name}_label"][:]) for name in ("answer", "rationale")]
    scores = [score_choices(setup.model, setup.collator, VCRExamples(setup.validation, task)) for task in ("qa", "qar")]
    right = [each.argmax(1) == label for each, label in zip(scores, labels, strict=True)]
    names = ("answer_accuracy", "rationale_accuracy", "joint_accuracy")
    expected = dict(zip(names, (right[0].mean(), right[1].mean(), (right[0] & right[1]).mean()), strict=True))
    assert 0 < expected["answer_accuracy"] < 1 and 0 < expected["rationale_accuracy"] < 1
    ties = {"answer_ties": 0, "rationale_ties": 0}
    assert evaluate_vcr(setup.model, setup.collator, setup.validation) == expected | ties
    for task, name in zip(("qa", "qar"), ("answer", "rationale"), strict=True):
        of_task = {f"{name}_accuracy": expected[f"{name}_accuracy"], f"{name}_ties": 0}
        assert evaluate_vcr(setup.model, setup.collator, setup.validation, [task]) == of_task


def test_bfloat16_ties_no_choices(setup):
    """The encoder rounds; a head that rounded too would give 153 questions of VCR a hundred ties."""
    examples = VCRExamples(setup.validation, "qa")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = torch.from_numpy(score_choices(setup.model, setup.collator, examples))
    assert not torch.equal(scores, scores.bfloat16().float())
    assert all(len(set(row)) == 4 for row in scores.tolist())


def test_rationales_after_every_answer(setup):
    options = {"batch_size": 5}
    every = choice_probabilities(
        setup.model, setup.collator, VCRExamples(setup.validation, "qar", every_answer=True), **options
    )
    right = choice_probabilities(setup.model, setup.collator, VCRExamples(setup.validation, "qar"), **options)
    assert every.shape == (8, 4, 4) and right.shape == (8, 4)
    np.testing.assert_allclose(every.sum(-1), 1)
    np.testing.assert_allclose(every[np.arange(8), setup.validation["answer_label"]], right, atol=1e-5)
    assert np.abs(every[:, 0] - every[:, 1]).max() > 1e-3


def refer_elsewhere(row):
    """The same words, which name another object of the kind."""
    kinds = row["objects"]
    other = {
        index: next(k % 8 for k in range(index + 1, index + 9) if kinds[k % 8] == kinds[index]) for index in range(8)
    }
    moved = [
        [[token if isinstance(token, str) else [other[i] for i in token] for token in part] for part in choice]
        for choice in row["choices"]
    ]
    return row | {"choices": moved}


def look_elsewhere(row):
    """Another image, in which the objects lie as in this one."""
    return row | {"image_id": "vcr-val-00001" if row["image_id"] == "vcr-val-00000" else "vcr-val-00000"}


@pytest.mark.parametrize(
    ("without", "change", "blind"),
    [
        ("nothing", refer_elsewhere, False),
        ("nothing", look_elsewhere, False),
        ("references", refer_elsewhere, True),
        ("references", look_elsewhere, False),
        ("regions", refer_elsewhere, True),
        ("regions", look_elsewhere, True),
    ],
)
def test_what_is_left_out_does_not_count(setup, without, change, blind):
    collator = WithoutInputs(setup.collator.collator, LEFT_OUT[without])
    examples = VCRExamples(setup.validation, "qa")
    rows = [examples[index] for index in range(8)]
    scores = score_choices(setup.model, collator, rows)
    others = score_choices(setup.model, collator, [change(row) for row in rows])
    if blind:
        np.testing.assert_array_equal(others, scores)
    else:
        assert (np.abs(others - scores).max(axis=1) > 1e-4).all()


def test_a_checkpoint_without_a_head_for_choices_is_refused(setup, world, tmp_path):
    torch.manual_seed(0)
    UnicoderVLForPreTraining(setup.model.config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no \['classifier\.bias', 'classifier\.weight'\]"):
        load_for_vcr(tmp_path, RegionStore(world / "regions"))


@pytest.fixture(scope="module")
def trained(world):
    """A run of the script on scenes, of 6 steps, and its options."""
    options = {"max_steps": 6, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 3, "save_steps": 3}
    options |= {"per_device_train_batch_size": 4, "bf16": False, "disable_tqdm": "true", "save_total_limit": 3}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes_vcr, "build_vcr_scenes", SMALL)
        run("run_vcr", ["--output_dir", str(world.parents[1]), *arguments])
    return world.parents[1]


def test_what_a_run_leaves(trained, world):
    model, processor = AutoModelForMultipleChoice.from_pretrained(trained), AutoProcessor.from_pretrained(trained)
    assert type(model).__name__ == "UnicoderVLForMultipleChoice" and (
        model.config.hidden_size,
        model.config.num_hidden_layers,
    ) == (64, 2)
    assert processor.feature_extractor.region_provenance == RegionStore(world / "regions").provenance
    state = json.loads((trained / "trainer_state.json").read_text())
    evaluations = [entry for entry in state["log_history"] if "eval_joint_accuracy" in entry]
    assert [entry["step"] for entry in evaluations] == [3, 6]
    assert state["best_metric"] == max(entry["eval_joint_accuracy"] for entry in evaluations)
    card = (trained / "README.md").read_text()
    assert "visual-commonsense-reasoning" in card and "| metric | validation: 8 questions |" in card
    assert "image-text-retrieval" not in card


def test_the_snippet_of_the_card_runs_as_written(trained):
    (snippet,) = re.findall(r"```python\n(.*?)```", (trained / "README.md").read_text(), re.DOTALL)
    variables: dict = {}
    exec(snippet, variables)
    assert variables["probabilities"].shape == (1, 2)
    tokens = variables["processor"].tokenizer.convert_ids_to_tokens(variables["inputs"]["input_ids"][0])
    assert len(tokens) > 4  # the scenes spell "dog"; with BERT's vocabulary it is the fifth


def evaluate(trained, world, split, **options):
    inputs = {"model": trained, "annotations": world / f"{split}.jsonl", "regions": world / "regions"}
    inputs |= {"metadata": world / "images"} | options
    places.script("evaluate_vcr").main([word for name in inputs for word in (f"--{name}", str(inputs[name]))])


def test_the_evaluation_of_a_run_is_what_the_run_says(trained, world, tmp_path, capsys):
    evaluate(
        trained, world, "val", output=tmp_path / "val.json", pictures=tmp_path / "pictures", photos=world / "images",
        num_pictures=2,
    )  # fmt: skip
    found = json.loads((tmp_path / "val.json").read_text())
    said = json.loads((trained / "eval_results.json").read_text())
    assert {f"eval_{name}": found[name] for name in found if name.endswith(("_accuracy", "_ties"))} == said
    assert found["questions"] == 8
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["val-0.png", "val-4.png"]
    assert f"answer_accuracy     {100 * found['answer_accuracy']:6.1f} %\n" in (out := capsys.readouterr().out)
    assert "answer_ties              0\n" in out


def test_a_submission_passes_the_check_and_holds_the_probabilities(trained, world, tmp_path):
    path = tmp_path / "submission.csv"
    evaluate(trained, world, "test", submission=path)
    assert list(check_submission(path, world / "test.jsonl")) == []
    store = RegionStore(world / "regions")
    model, processor = load_for_vcr(trained, store)
    rows = read_vcr(world / "test.jsonl", metadata_dir=world / "images", store=store)
    from unicoder_vl_hf import DataCollatorForUnicoderVLMultipleChoice

    collator = DataCollatorForUnicoderVLMultipleChoice(processor, store, max_length=64)
    examples = VCRExamples(rows, "qar", every_answer=True)
    line = path.read_text().splitlines()[2].split(",")  # the second question
    with torch.no_grad():
        after_third = model(**{**collator([examples[4 + 2]]), "labels": None}).logits[0].softmax(-1)
    assert line[0] == "test-1"
    np.testing.assert_allclose([float(cell) for cell in line[13:17]], after_third, atol=1e-5)


def test_what_has_no_labels_is_not_evaluated(trained, world):
    with pytest.raises(ValueError, match="no labels: give --submission"):
        evaluate(trained, world, "test")
