"""The fine-tuning script: however a run is cut (steps, processes, Ctrl-C), it is the same run; and what it leaves."""

import functools
import json
import os
import re
import shutil
import signal
from types import SimpleNamespace

import places
import pytest
import safetensors.torch
import small_world
import torch
from test_run_pretraining import (
    assert_same_weights,
    assert_trained,
    examples_of,
    launch,
    output_of,
    stopped,
)
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoProcessor,
    Trainer,
    TrainerControl,
    TrainingArguments,
)
from two_processes import examples_recorded, plain_descent, run

from unicoder_vl_hf import ImageTextScorer, RegionStore
from unicoder_vl_hf.data.captions import read_captions
from unicoder_vl_hf.data.foils import Foil, write_foils
from unicoder_vl_hf.errors import FinishedRun
from unicoder_vl_hf.processes import StopSignal
from unicoder_vl_hf.runs.trainer import _StopWithCheckpoint, train
from unicoder_vl_hf.scenes import world as scenes
from unicoder_vl_hf.search.encoders import UnicoderVLDualEncoder
from unicoder_vl_hf.tasks.retrieval.metrics import retrieval_metrics
from unicoder_vl_hf.tasks.retrieval.training import RetrievalSetup
from unicoder_vl_hf.tasks.retrieval.two_stage_report import describe_weight, measure_similarity_weight

SCRIPT = "run_retrieval"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world.build(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def berts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("berts")
    return {
        0.0: small_world.save_lively_bert(folder / "dry"),
        0.1: small_world.save_bert(folder / "wet", dropout=0.1),
    }


@pytest.fixture(scope="module")
def command(world, berts):
    """The arguments of a run: 4 pairs a step, 20 steps an epoch; `pairs` of them a micro-batch."""

    def arguments(output_dir, *, dropout=0.0, pairs=4, accumulation=1, plain=False, **options):
        shared = {"learning_rate": 1e-3, "num_train_epochs": 2, "max_validation_images": 4, "seed": 5}
        shared |= {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": pairs}
        shared |= {"bf16": False, "disable_tqdm": "true", "save_total_limit": 9}
        shared |= dict.fromkeys(("eval_strategy", "save_strategy"), "steps")
        if plain:  # see plain_descent
            shared |= {
                "learning_rate": 1.0,
                "max_grad_norm": 0,
                "optim": "sgd",
                "max_validation_images": 0,
                "loss": "sum",
            }
            shared |= dict.fromkeys(("eval_strategy", "save_strategy"), "no")
        else:
            shared |= {"eval_steps": 8, "save_steps": 8}
        return small_world.arguments(world, berts[dropout], output_dir, **(shared | options))

    return arguments


@pytest.fixture(scope="module")
def straight(command, tmp_path_factory):
    """A run that was never stopped, with dropout, and all of its checkpoints."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    with examples_recorded(folder.parent / "examples"):
        run(SCRIPT, command(folder, dropout=0.1))
    return folder


def test_what_a_run_leaves(straight, berts, world):
    state = json.loads((straight / "trainer_state.json").read_text())
    evaluations = [entry for entry in state["log_history"] if "eval_recall_sum" in entry]
    assert [entry["step"] for entry in evaluations] == [8, 16, 24, 32, 40]
    best = max(evaluations, key=lambda entry: entry["eval_recall_sum"])  # the first of equal ones
    assert state["best_global_step"] == best["step"]
    assert_trained(straight, berts[0.1])
    assert_same_weights(straight, straight / f"checkpoint-{best['step']}")

    # Whoever loads it measures what the run, its card and its last file say.
    model = AutoModelForSequenceClassification.from_pretrained(straight)
    processor = AutoProcessor.from_pretrained(straight)
    assert type(model).__name__ == "UnicoderVLForImageTextRetrieval" and model.config.triplet_margin == 0.2
    captions = read_captions(world / "captions.jsonl", split="val")
    image_ids = captions.unique("image_id")[::3]  # 4 of 10
    rows = [row for row in captions if row["image_id"] in image_ids]
    store = RegionStore(world / "regions")
    scores = ImageTextScorer(model, processor, store).score([row["caption"] for row in rows], image_ids)
    metrics = retrieval_metrics(scores, [image_ids.index(row["image_id"]) for row in rows])
    kept = json.loads((straight / "eval_results.json").read_text())
    card = (straight / "README.md").read_text()
    for name, value in metrics.items():
        if "recall" in name:
            assert best[f"eval_{name}"] == kept[f"eval_{name}"] == pytest.approx(value)
            assert f"| eval_{name} | {value:.4f} |" in card
    assert "on groups of a match and mismatches drawn at random" in card
    assert "| metric | validation: 8 captions of 4 images |" in card
    assert "drawing boxes" in card and "- fine-tuning\n" in card
    assert processor.feature_extractor.region_provenance == store.provenance


def test_every_pair_once_an_epoch_and_the_data_know_the_epoch(straight):
    examples = examples_of(straight.parent / "examples-0")
    for epoch in range(2):
        of_epoch = examples[epoch * 80 : (epoch + 1) * 80]
        assert {number for number, _ in of_epoch} == {epoch}
        assert sorted(row for _, row in of_epoch) == list(range(80))


def test_resume_equals_never_stopped(command, straight, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(straight / "checkpoint-24", folder / "checkpoint-24")
    with examples_recorded(tmp_path / "examples"):
        run(SCRIPT, [*command(folder, dropout=0.1), "--resume_from_checkpoint", "latest"])
    assert f"Going on from {folder / 'checkpoint-24'}, whose weights" in capsys.readouterr().out
    for step in (32, 40):
        assert_same_weights(folder / f"checkpoint-{step}", straight / f"checkpoint-{step}")
    assert examples_of(tmp_path / "examples-0") == examples_of(straight.parent / "examples-0")[4 * 24 :]
    assert_same_weights(folder, straight)
    assert (folder / "eval_results.json").read_text() == (straight / "eval_results.json").read_text()


def test_a_run_goes_on_with_its_head_dropout_and_foils_alone(command, straight, world, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight / "checkpoint-24", folder / "checkpoint-24")
    other = command(folder, dropout=0.1, contrastive_weight=1, projection_dim=8, matching_head="similarity")
    with pytest.raises(ValueError, match="checkpoint-24 is of a run with matching_head=unicoder_vl, not similarity"):
        run(SCRIPT, [*other, "--resume_from_checkpoint", "latest"])
    other = command(folder, dropout=0.1, joint_dropout=0.3)
    with pytest.raises(ValueError, match=r"checkpoint-24 is of a run with joint_dropout=0\.0, not 0\.3"):
        run(SCRIPT, [*other, "--resume_from_checkpoint", "latest"])
    match = json.loads((world / "captions.jsonl").read_text().splitlines()[0])
    foil = Foil(match["image_id"], "train", match["caption"], "none of it", "it", "none", "kind")
    write_foils(tmp_path / "foils.jsonl", [foil])
    other = command(folder, dropout=0.1, foils=tmp_path / "foils.jsonl")
    with pytest.raises(ValueError, match=r"checkpoint-24 is of a run with foils=None, not [0-9a-f]{16}: give that"):
        run(SCRIPT, [*other, "--resume_from_checkpoint", "latest"])
    assert [path.name for path in folder.iterdir()] == ["checkpoint-24"]


def test_ctrl_c_leaves_a_checkpoint_that_resumes(command, straight, tmp_path):
    folder = tmp_path / "run"
    arguments = [*command(folder, dropout=0.1), "--eval_steps", "1000", "--save_steps", "1000"]
    stopped(launch(tmp_path, (SCRIPT, arguments)), tmp_path, folder)
    run(SCRIPT, [*arguments, "--resume_from_checkpoint", "latest"])
    assert_same_weights(folder / "checkpoint-40", straight / "checkpoint-40")


def test_a_stop_within_an_epoch_evaluates_nothing(monkeypatch):
    """A long validation between Ctrl-C and the end; and of a model that no straight run would have looked at."""
    stop = StopSignal()
    monkeypatch.setattr(stop, "agreed", lambda accelerator: True)
    callback = _StopWithCheckpoint(stop, SimpleNamespace(accelerator=None))
    control = TrainerControl()
    callback.on_epoch_end(None, None, control)
    assert not callback.stopped
    callback.on_step_end(None, SimpleNamespace(global_step=3, max_steps=9), control)
    assert control.should_save and control.should_training_stop
    control.should_evaluate = True  # as the epoch's end asks, with eval_strategy="epoch"
    callback.on_epoch_end(None, None, control)
    assert not control.should_evaluate and not control.should_save


def test_a_run_with_facts_of_its_data_goes_on_again_and_again(command, straight, world, tmp_path, monkeypatch):
    """Each checkpoint keeps them, whichever run wrote it."""
    match = json.loads((world / "captions.jsonl").read_text().splitlines()[0])
    write_foils(
        tmp_path / "foils.jsonl", [Foil(match["image_id"], "train", match["caption"], "none", "it", "none", "a")]
    )
    words = command(tmp_path / "run", foils=tmp_path / "foils.jsonl", max_steps=8)
    trainer = places.script(SCRIPT).RetrievalTrainer
    step = trainer.training_step

    def told(self, *arguments, **options):
        if self.state.global_step in (2, 5):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments, **options)

    monkeypatch.setattr(trainer, "training_step", told)
    run(SCRIPT, words)
    for _ in range(2):
        run(SCRIPT, [*words, "--resume_from_checkpoint", "latest"])
    steps = [json.loads(path.read_text())["global_step"] for path in (tmp_path / "run").glob("*/trainer_state.json")]
    assert sorted(steps) == [3, 6, 8] and (tmp_path / "run" / "README.md").exists()


def test_it_is_pushed_once_at_the_end_with_its_card(command, tmp_path, monkeypatch):
    """A card is the last that a run writes, and tells that it is finished."""
    pushed = []
    trainer = places.script(SCRIPT).RetrievalTrainer
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: None)
    monkeypatch.setattr(trainer, "push_to_hub", lambda self, **_: pushed.append((tmp_path / "README.md").exists()))
    evaluate, without_card = trainer.evaluate_task, []
    monkeypatch.setattr(trainer, "evaluate_task", lambda *both: without_card.append(not pushed) or evaluate(*both))
    run(SCRIPT, [*command(tmp_path, max_steps=8), "--push_to_hub", "True", "--hub_token", "x"])
    assert pushed == [True] and without_card and all(without_card)


@pytest.mark.parametrize(
    ("options", "best", "kept"),
    [
        ({"metric_for_best_model": "eval_recall_sum"}, 3.0, 16),
        ({"metric_for_best_model": "recall_sum", "save_steps": 24}, 1.0, 40),  # step 16 is the best, and is not saved
    ],
)
def test_what_is_said_is_of_the_model_that_is_kept(options, best, kept, command, tmp_path, monkeypatch):
    sums = iter([1.5, 3.0, 2.0, 2.5, 1.0])
    trainer = places.script(SCRIPT).RetrievalTrainer
    monkeypatch.setattr(trainer, "evaluate_task", lambda self, rows: {"recall_sum": next(sums)})
    run(SCRIPT, command(tmp_path, **options))
    assert json.loads((tmp_path / "eval_results.json").read_text()) == {"eval_recall_sum": best}
    assert_same_weights(tmp_path, tmp_path / f"checkpoint-{kept}")
    card = (tmp_path / "README.md").read_text()
    assert f"| eval_recall_sum | {best:.4f} |" in card and ("the model is that of step 16" in card) == (kept == 16)


def test_what_lies_behind_the_checkpoint_that_a_run_goes_on_from_is_set_aside(command, straight, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    words = command(folder, dropout=0.1, learning_rate=5e-4, num_train_epochs=3, max_steps=50)
    run(SCRIPT, [*words, "--resume_from_checkpoint", str(folder / "checkpoint-24")])
    assert sorted(int(path.name[11:]) for path in folder.glob("checkpoint-*")) == [8, 16, 24, 32, 40, 48, 50]
    for step in (32, 40):
        assert_same_weights(folder / f"abandoned-1-checkpoint-{step}", straight / f"checkpoint-{step}")
        with pytest.raises(AssertionError):  # of another schedule
            assert_same_weights(folder / f"checkpoint-{step}", straight / f"checkpoint-{step}")
    assert "is kept as" in caplog.text and "--learning_rate 0.001, which it goes on with, and not" in caplog.text
    assert "Learning rate: 0.001 at its peak" in (folder / "README.md").read_text()


def test_a_checkpoint_without_an_optimizer_is_gone_on_from_by_none(command, straight, tmp_path):
    shutil.copytree(straight / "checkpoint-24", tmp_path / "run" / "checkpoint-24")
    (tmp_path / "run" / "checkpoint-24" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-24 has no state of the optimizer \(--save_only_model\)"):
        run(SCRIPT, [*command(tmp_path / "run", dropout=0.1), "--resume_from_checkpoint", "latest"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"early_stopping_patience": 2, "eval_strategy": "no", "save_strategy": "no"}, "--eval_strategy no leaves out"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor 0.1: no loss of pairs has one"),
    ],
)
def test_options_that_nothing_heeds(options, message, command, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(SCRIPT, [*command(tmp_path, **options), "--load_best_model_at_end", "False"])


def test_one_process_takes_one_gpu(tmp_path, caplog):
    """Trainer would split a batch over all, and the captions of its pairs from their images."""
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    args._n_gpu = 4
    setup, arguments = SimpleNamespace(validation=[0]), SimpleNamespace(output_dir=str(tmp_path), base_model=None)
    seen = train(lambda *_, **__: SimpleNamespace(run=lambda: args.n_gpu), lambda *_: setup, arguments, args)
    assert seen == 1 and "One process uses one of the 4 GPUs: `accelerate launch` uses them all" in caplog.text


def test_a_run_is_never_overwritten(command, straight):
    with pytest.raises(ValueError, match="holds a finished run, with its model: there is nothing left to train"):
        run(SCRIPT, command(straight, dropout=0.1))


def test_a_finished_run_goes_on_and_keeps_the_best_of_all_its_steps(command, straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    more = [*command(folder, dropout=0.1, num_train_epochs=3), "--resume_from_checkpoint", "latest"]
    run(SCRIPT, more)
    state = json.loads((folder / "trainer_state.json").read_text())
    sums = {entry["step"]: entry["eval_recall_sum"] for entry in state["log_history"] if "eval_recall_sum" in entry}
    assert list(sums) == [8, 16, 24, 32, 40, 48, 56, 60] and state["global_step"] == 60
    assert sums[state["best_global_step"]] == max(sums.values())
    assert_same_weights(folder, folder / f"checkpoint-{state['best_global_step']}")
    assert "\n- Steps: 60 of 4 pairs" in (folder / "README.md").read_text()
    with pytest.raises(FinishedRun):
        run(SCRIPT, more)


def test_early_stopping_keeps_the_best_and_is_no_interruption(command, tmp_path, monkeypatch, capsys):
    sums = iter([1.0, 3.0, 2.0, 2.5, 4.0])
    trainer = places.script(SCRIPT).RetrievalTrainer
    monkeypatch.setattr(trainer, "evaluate_task", lambda self, rows: {"recall_sum": next(sums)})
    run(SCRIPT, [*command(tmp_path), "--early_stopping_patience", "2"])
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 32 and state["best_global_step"] == 16
    assert_same_weights(tmp_path, tmp_path / "checkpoint-16")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path, tmp_path / "checkpoint-32")
    assert json.loads((tmp_path / "eval_results.json").read_text()) == {"eval_recall_sum": 3.0}
    card = (tmp_path / "README.md").read_text()
    assert "| eval_recall_sum | 3.0000 |" in card and "- Steps: 32 of" in card
    assert "; the model is that of step 16, the best on validation\n" in card
    assert "Stopped after" not in capsys.readouterr().out
    with pytest.raises(FinishedRun):  # although it took 32 of 40 steps
        run(SCRIPT, [*command(tmp_path), "--early_stopping_patience", "2", "--resume_from_checkpoint", "latest"])


def test_the_weight_of_the_similarity_is_that_of_the_model_that_was_kept(command, world, tmp_path, monkeypatch, capsys):
    """Measured when fine-tuning with a first stage ends, saved along, and named in the card."""
    module = places.script(SCRIPT)
    sums, measured = iter([1.0, 3.0, 2.0, 2.5, 2.0]), []
    monkeypatch.setattr(module.RetrievalTrainer, "evaluate_task", lambda self, rows: {"recall_sum": next(sums)})
    measure = RetrievalSetup.measure_similarity_weight

    def recorded(setup):
        measured.append({name: value.clone() for name, value in setup.model.state_dict().items()})
        measure(setup)

    monkeypatch.setattr(RetrievalSetup, "measure_similarity_weight", recorded)
    run(SCRIPT, command(tmp_path, contrastive_weight=1, projection_dim=8, loss="sum"))
    (weights,) = measured
    kept = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-16")
    assert kept.config.similarity_weight is None
    for name, value in kept.state_dict().items():
        assert torch.equal(weights[name], value), name
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    weight, model.config.similarity_weight = model.config.similarity_weight, None
    processor, store = AutoProcessor.from_pretrained(tmp_path), RegionStore(world / "regions")
    encoder = UnicoderVLDualEncoder(model, processor, store, tmp_path)
    captions = read_captions(world / "captions.jsonl", split="val")
    report = measure_similarity_weight(encoder, ImageTextScorer(model, processor, store), captions)
    assert weight == report.best.similarity_weight and report.num_images == 10
    assert (
        describe_weight(report) in (tmp_path / "README.md").read_text()
        and describe_weight(report) in capsys.readouterr().out
    )


@pytest.fixture(scope="module")
def plain(command, berts, tmp_path_factory):
    """A run without dropout, by plain gradient descent, whose weights all the others must reach."""
    folder = tmp_path_factory.mktemp("plain")
    with plain_descent():
        run(SCRIPT, command(folder, plain=True))
    assert_trained(folder, berts[0.0])
    assert not (folder / "eval_results.json").exists()  # nothing was measured
    return folder


def test_four_micro_batches_equal_one_batch(command, plain, tmp_path):
    with plain_descent():
        run(SCRIPT, command(tmp_path, pairs=1, accumulation=4, plain=True))
    assert_same_weights(tmp_path, plain, tolerance=2e-5)


def test_two_processes_equal_one(command, plain, world, berts, tmp_path):
    """
    At the same global batch; and mining by two processes finds what one finds. With hard negatives of the micro-batch,
    which then has to be the same, too.
    """
    along = {"contrastive_weight": 1, "num_hard_negatives": 1, "projection_dim": 8, "loss": "softmax"}
    along |= {"random_negative_epochs": 1}
    along |= {"learning_rate": 0.05, "max_steps": 6, "pairs": 2, "plain": True}
    half = along | {"scored_ratio": 0.5, "num_negative_captions": 0, "num_negative_images": 0}
    words = half | {"num_text_layers": 1, "bert_learning_rate": 0.02, "matching_head": "similarity"}
    with plain_descent():
        run(SCRIPT, command(tmp_path / "along_one", accumulation=2, **along))
        run(SCRIPT, command(tmp_path / "half_one", accumulation=2, **half))
        run(SCRIPT, command(tmp_path / "words_one", accumulation=2, **words))
    mining = {"images_per_set": 10, "num_negatives": 2}
    inputs = [plain, world / "captions.jsonl", world / "regions"]
    shared, alone = (json.dumps([*map(str, inputs), str(tmp_path / name)]) for name in ("shared", "alone"))
    process = launch(
        tmp_path,
        (SCRIPT, command(tmp_path / "two", pairs=2, plain=True), True),
        (SCRIPT, command(tmp_path / "along_two", **along), True),
        (SCRIPT, command(tmp_path / "half_two", **half), True),
        (SCRIPT, command(tmp_path / "words_two", **words), True),
        ("mining_client", [shared, json.dumps(mining)]),
        processes=2,
    )
    output = output_of(process, tmp_path)
    assert process.returncode == 0, output
    assert output.count(f"{SCRIPT}: world size 2") == 8 and output.count("mining_client: world size 2") == 2, output
    assert_same_weights(tmp_path / "two", plain, tolerance=2e-5)
    assert_same_weights(tmp_path / "along_two", tmp_path / "along_one", tolerance=2e-5)
    assert_same_weights(tmp_path / "half_two", tmp_path / "half_one", tolerance=2e-5)
    assert_same_weights(tmp_path / "words_two", tmp_path / "words_one", tolerance=2e-5)
    assert "The score holds that sum now" in (tmp_path / "words_one" / "README.md").read_text()
    assert AutoConfig.from_pretrained(tmp_path / "words_one").similarity_weight == 0
    assert_trained(tmp_path / "along_two", berts[0.0])
    run("mining_client", [alone, json.dumps(mining)])
    mined = [read_captions(tmp_path / name) for name in ("shared", "alone")]
    for name in ("negative_captions", "negative_image_ids"):
        assert mined[0][name][:] == mined[1][name][:]


def test_on_mined_captions(command, plain, world, tmp_path):
    inputs = [str(plain), str(world / "captions.jsonl"), str(world / "regions"), str(tmp_path / "mined")]
    run("mining_client", [json.dumps(inputs), json.dumps({"images_per_set": 10})])
    options = {"captions": tmp_path / "mined", "max_steps": 2, "loss": "softmax", "in_batch_negatives": True}
    run(SCRIPT, command(tmp_path / "run", **options))
    assert_trained(tmp_path / "run", plain)
    assert "on groups of a match and mined hard negatives" in (tmp_path / "run" / "README.md").read_text()


def test_two_recipes_in_a_row(world, berts, tmp_path):
    """As the results page has it: a first stage, then what stands behind it, for which the first stage stays."""
    first, both, few = tmp_path / "first", tmp_path / "both", {"max_validation_images": 4}
    few |= {"per_device_train_batch_size": 8, "bf16": False, "disable_tqdm": "true"}
    run(SCRIPT, small_world.arguments(world, berts[0.0], first, recipe="first-stage", projection_dim=8, **few))
    run(SCRIPT, small_world.arguments(world, first, both, recipe="second-stage", **few))
    config = AutoConfig.from_pretrained(both)
    words = AutoConfig.from_pretrained(berts[0.0]).num_hidden_layers
    assert (config.num_hidden_layers, config.num_text_layers) == (words + 2, words)
    assert config.query_bank_size == [80, 40] and config.similarity_weight == 0
    before, after = (safetensors.torch.load_file(each / "model.safetensors") for each in (first, both))
    kept = [name for name in before if name.startswith(("first_stage.", "bert.embeddings."))]
    kept += [name for name in before if re.match(rf"bert\.encoder\.layer\.[0-{words - 1}]\.", name)]
    assert len(kept) > 40 and all(torch.equal(before[name], after[name]) for name in kept)
    joint = f"bert.encoder.layer.{words}.attention.self.query.weight"
    assert not torch.equal(before[joint], after[joint])


def test_without_data_it_draws_scenes(tmp_path, monkeypatch):
    few = functools.partial(scenes.build_scenes, num_train=8, num_val=4, num_test=1, captions_per_image=2)
    monkeypatch.setattr(scenes, "build_scenes", few)
    options = ["--max_steps", "1", "--bf16", "False", "--per_device_train_batch_size", "4", "--disable_tqdm", "true"]
    run(SCRIPT, ["--output_dir", str(tmp_path), *options])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.hidden_size == 128
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).learning_rate == 5e-4
