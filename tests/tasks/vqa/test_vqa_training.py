"""A run on scenes and one on VQA's files; what scripts leave; asking; submissions; what a run is left without."""

import functools
import json
import re

import numpy as np
import places
import pytest
import tiny
import torch
from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor
from two_processes import run

from unicoder_vl_hf import RegionStore, UnicoderVLForPreTraining
from unicoder_vl_hf.cli import main
from unicoder_vl_hf.runs.labelled import elsewhere
from unicoder_vl_hf.scenes import answers as scenes_vqa
from unicoder_vl_hf.tasks.vqa import QuestionAnswerer, VQAArguments, check_submission, prepare_vqa, read_questions
from unicoder_vl_hf.tasks.vqa.training import load_for_vqa

SMALL = functools.partial(scenes_vqa.build_vqa_scenes, num_train=24, num_val=8, num_test=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the script on scenes, of 6 steps."""
    options = {"max_steps": 6, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 3, "save_steps": 3}
    options |= {"per_device_train_batch_size": 8, "bf16": False, "disable_tqdm": "true", "min_occurrences": 1}
    options |= {"output_dir": tmp_path_factory.mktemp("vqa") / "run"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes_vqa, "build_vqa_scenes", SMALL)
        run("run_vqa", [word for name, value in options.items() for word in (f"--{name}", str(value))])
    return options["output_dir"]


@pytest.fixture(scope="module")
def world(trained):
    return trained / "_data" / "vqa_scenes"


def own(world, **changes):
    """Arguments of a run on these questions as files of one's own."""
    arguments = {
        "questions": [str(world / "train_questions.json")],
        "annotations": [str(world / "train_annotations.json")],
        "validation_questions": str(world / "val_questions.json"),
        "validation_annotations": str(world / "val_annotations.json"),
        "regions": str(world / "regions"),
        "min_occurrences": 1,
    }
    return VQAArguments(**arguments | changes)


def test_what_a_run_leaves(trained, world):
    model, processor = (auto.from_pretrained(trained) for auto in (AutoModelForVisualQuestionAnswering, AutoProcessor))
    assert type(model).__name__ == "UnicoderVLForQuestionAnswering" and model.config.initializer_range == 0.08
    assert set(model.config.id2label.values()) <= {*scenes_vqa.COLOURS, *"0123", "yes", "no"}
    assert processor.feature_extractor.region_provenance == RegionStore(world / "regions").provenance
    state = json.loads((trained / "trainer_state.json").read_text())
    evaluations = [entry for entry in state["log_history"] if "eval_accuracy" in entry]
    assert [entry["step"] for entry in evaluations] == [3, 6]
    assert state["best_metric"] == max(entry["eval_accuracy"] for entry in evaluations)
    assert {"eval_number_accuracy", "eval_other_accuracy", "eval_yes/no_accuracy"} <= evaluations[0].keys()
    card = (trained / "README.md").read_text()
    assert "visual-question-answering" in card and "questions about 8 images |" in card


def test_the_snippet_of_the_card_runs_as_written(trained):
    (snippet,) = re.findall(r"```python\n(.*?)```", (trained / "README.md").read_text(), re.DOTALL)
    variables: dict = {}
    exec(snippet, variables)
    assert variables["answer"] in variables["model"].config.id2label.values()


def evaluate(trained, world, split, **options):
    inputs = {"model": trained, "questions": world / f"{split}_questions.json", "regions": world / "regions", **options}
    places.script("evaluate_vqa").main([word for name in inputs for word in (f"--{name}", str(inputs[name]))])


def test_the_evaluation_of_a_run_is_what_the_run_says(trained, world, tmp_path, capsys):
    evaluate(
        trained, world, "val", annotations=world / "val_annotations.json", output=tmp_path / "val.json",
        pictures=tmp_path / "pictures", photos=world / "images", num_pictures=2,
    )  # fmt: skip
    found, said = (json.loads(path.read_text()) for path in (tmp_path / "val.json", trained / "eval_results.json"))
    assert {f"eval_{name}": value for name, value in found.items() if f"eval_{name}" in said} == said
    assert set(found["question_types"]) == {f"{form}_accuracy" for form in scenes_vqa.CHANCE}
    assert len(list((tmp_path / "pictures").iterdir())) == 2
    assert f"count_accuracy{'':18}{100 * found['question_types']['count_accuracy']:6.2f} %" in capsys.readouterr().out


def test_a_submission_passes_the_check(trained, world, tmp_path, capsys):
    path = tmp_path / "submission.json"
    evaluate(trained, world, "test", submission=path)
    questions = str(world / "test_questions.json")
    assert main(["vqa-check", str(path), "--questions", questions]) == 0
    entries = json.loads(path.read_text())
    rows = read_questions(questions)
    assert [entry["question_id"] for entry in entries] == [int(name) for name in rows["question_id"]]
    broken = [
        *entries[2:],
        {**entries[2]},
        {**entries[3], "question_id": 99},
        {"question_id": str(entries[0]["question_id"]), "answer": "yes"},
        {"question_id": entries[1]["question_id"], "answer": 2},
    ]
    path.write_text(json.dumps(broken))
    problems = list(check_submission(path, questions))
    count = len(entries) - 2
    assert problems == [
        f"entry {count}: question_id {entries[2]['question_id']} is answered before.",
        f"entry {count + 1}: question_id 99 is not among the {len(entries)} of {questions}.",
        f"entry {count + 2}: {{'question_id': '1', 'answer': 'yes'}}, expected question_id, int, and answer, str.",
        f"entry {count + 3}: {{'question_id': 2, 'answer': 2}}, expected question_id, int, and answer, str.",
        "question_id 1 is missing.",
        "question_id 2 is missing.",
    ]
    assert main(["vqa-check", str(path), "--questions", questions]) == 1
    path.write_text("{}")
    assert list(check_submission(path, questions)) == ["a dict at the top, expected a list of {question_id, answer}."]


def test_what_has_no_answers_is_not_evaluated(trained, world):
    with pytest.raises(ValueError, match="has no answers: give --annotations, or --submission"):
        evaluate(trained, world, "test")


def test_asking_about_an_image_gives_what_the_model_gives(trained, world, capsys, tmp_path):
    store = RegionStore(world / "regions")
    image_id, question = next(iter(store)), "what colour is the star ?"
    model, processor = load_for_vqa(trained, store)
    with torch.no_grad():
        inputs = processor(text=question, regions=image_id, return_tensors="pt")
        probabilities = model(**inputs).logits[0].sigmoid().numpy()
    ((first, second), _) = QuestionAnswerer.from_pretrained(trained, store)(image_id, [question, "how many ?"], top_k=2)
    best = np.argsort(-probabilities)
    assert [first[0], second[0]] == [model.config.id2label[int(label)] for label in best[:2]]
    assert [first[1], second[1]] == pytest.approx(probabilities[best[:2]].tolist(), abs=1e-5)
    words = ["ask", image_id, question, "--model", str(trained), "--regions", str(world / "regions"), "--top", "2"]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{question}\n" + "".join(f"{p:8.1%}  {name}\n" for name, p in (first, second))
    assert main([*words, "--picture", str(tmp_path / "x.png")]) == 1
    assert "is no file of one" in capsys.readouterr().err


def test_asking_about_a_photo_draws_the_answers(trained, world, tmp_path, capsys):
    record = RegionStore(world / "regions")["2000000"]
    record.save(tmp_path / "photo.npz")
    assert main(["ask", str(tmp_path / "photo.npz"), "how many ?", "--model", str(trained), "--top", "1"]) == 0
    assert capsys.readouterr().out.startswith("how many ?\n")


def test_a_checkpoint_without_a_head_for_answers_is_refused(tmp_path):
    tiny.model(UnicoderVLForPreTraining).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no \['answer_head\.LayerNorm\.bias'"):
        load_for_vqa(tmp_path)


# Setup


def test_a_run_on_ones_own_files_has_the_answers_in_the_order_of_their_file(trained, world, tmp_path, caplog):
    tiny.model(UnicoderVLForPreTraining, region_feature_dim=256).save_pretrained(tmp_path / "pretrained")
    tiny.processor().save_pretrained(tmp_path / "pretrained")
    (tmp_path / "answers.json").write_text(json.dumps(["yes", "no", "2", "red"]))
    start = {"answers": str(tmp_path / "answers.json"), "model_name_or_path": str(tmp_path / "pretrained")}
    setup = prepare_vqa(own(world, **start), tmp_path / "run")
    assert setup.model.config.id2label == dict(enumerate(["yes", "no", "2", "red"]))
    rows = read_questions(world / "train_questions.json", world / "train_annotations.json")
    unknown = sum(answer not in ("yes", "no", "2", "red") for answer in rows["answer"])
    assert f"Of {len(rows)} training questions {unknown} have none of the 4 answers, such as" in caplog.text
    assert setup.data_name == "train_questions" and len(setup.train) == len(rows)
    row = setup.train[3]
    assert (row["row_index"], row["epoch"], row["question"]) == (3, 0, rows[3]["question"])
    (tmp_path / "answers.json").write_text(json.dumps(["oui", "non"]))
    with pytest.raises(ValueError, match="none of the training questions has one of the 2 answers, oui, non"):
        prepare_vqa(own(world, **start), tmp_path / "run")


def test_a_model_that_answers_goes_on_with_its_own_answers(trained, world, tmp_path):
    known = AutoModelForVisualQuestionAnswering.from_pretrained(trained).config.id2label
    setup = prepare_vqa(own(world, model_name_or_path=str(trained), min_occurrences=9), tmp_path / "run")
    assert setup.model.config.id2label == known
    (tmp_path / "answers.json").write_text(json.dumps([*known.values()][::-1]))
    arguments = own(world, answers=str(tmp_path / "answers.json"), model_name_or_path=str(trained))
    with pytest.raises(ValueError, match="chooses among answers of its own, which stay: leave out --answers"):
        prepare_vqa(arguments, tmp_path / "run")


def test_questions_without_answers_are_refused_before_anything_is_trained(trained, world, tmp_path):
    arguments = own(world, validation_questions=str(world / "test_questions.json"), validation_annotations=None)
    arguments.model_name_or_path = str(trained)
    with pytest.raises(ValueError, match=r"question_id 1 has no answer.*Is it a test split\?"):
        prepare_vqa(arguments, tmp_path)


def test_questions_without_photos_are_an_error_or_a_counted_skip(trained, world, tmp_path, caplog):
    content = json.loads((world / "train_questions.json").read_text())
    answers = json.loads((world / "train_annotations.json").read_text())
    for item in (content["questions"][0], answers["annotations"][0]):
        item["image_id"] = 7
    (tmp_path / "questions.json").write_text(json.dumps(content))
    (tmp_path / "annotations.json").write_text(json.dumps(answers))
    files = {"questions": [str(tmp_path / "questions.json")], "annotations": [str(tmp_path / "annotations.json")]}
    arguments = own(world, **files, model_name_or_path=str(trained))
    with pytest.raises(ValueError, match=r"1 of 25 images with questions \(1 questions\) have no regions") as refused:
        prepare_vqa(arguments, tmp_path / "run")
    assert "--image_ids" in str(refused.value) and "--skip_missing" in str(refused.value)
    arguments.skip_missing = True
    assert len(prepare_vqa(arguments, tmp_path / "run").train) == len(content["questions"]) - 1
    assert "Leaving questions out: 1 of 25 images" in caplog.text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"regions": None}, "Give --questions, --validation_questions and --regions together"),
        ({"questions": []}, "together, or none of them"),
        ({"annotations": ["a", "b"]}, "1 files of --questions, but 2 of --annotations"),
    ],
)
def test_options_that_belong_together(changes, message, world):
    with pytest.raises(ValueError, match=message):
        own(world, **changes)


@pytest.mark.parametrize("without", ["nothing", "regions", "photo"])
def test_what_a_run_is_left_without(without, trained, world, tmp_path):
    setup = prepare_vqa(own(world, without=without, model_name_or_path=str(trained)), tmp_path)
    rows = read_questions(world / "train_questions.json")
    moved = [setup.train[number]["image_id"] != rows[number]["image_id"] for number in range(len(rows))]
    assert all(moved) if without == "photo" else not any(moved)
    batch = setup.collator([setup.train[0], setup.train[5]])
    assert ("region_features" in batch, "image_index" in batch) == ((without != "regions"),) * 2
    with torch.no_grad():
        assert setup.model(**batch).logits.shape == (2, setup.model.config.num_labels)


def test_elsewhere_is_another_image_for_every_row_and_the_same_for_rows_that_share_one(world):
    rows = read_questions(world / "val_questions.json")
    moved = elsewhere(rows)
    pairs = set(zip(rows["image_id"], moved["image_id"], strict=True))
    assert len(pairs) == 8 and all(one != other for one, other in pairs) and len({other for _, other in pairs}) == 8
