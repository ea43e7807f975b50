"""What the pre-training scripts share, and what they need around their loop."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import datasets
import numpy as np
import places
import pytest
import small_world
import tiny
import torch
from accelerate import Accelerator

from unicoder_vl_hf import (
    ImageTextScorer,
    RegionStore,
    RegionStoreWriter,
    UnicoderVLForImageTextRetrieval,
    UnicoderVLForPreTraining,
    errors,
    processes,
)
from unicoder_vl_hf.data import samplers
from unicoder_vl_hf.data.captions import read_captions
from unicoder_vl_hf.data.negatives import PairsWithMismatches
from unicoder_vl_hf.data.samplers import StepBatchSampler
from unicoder_vl_hf.errors import FinishedRun, run_script
from unicoder_vl_hf.processes import Computing, StopSignal
from unicoder_vl_hf.regions.conversion import export
from unicoder_vl_hf.regions.shuffled import ShuffledStore
from unicoder_vl_hf.runs import checkpoints as checkpoints_module, setup as runs_setup
from unicoder_vl_hf.runs.arguments import parse_arguments
from unicoder_vl_hf.runs.checkpoints import CheckpointFolder
from unicoder_vl_hf.runs.log import JsonLog, LossMeter, beside_the_bar
from unicoder_vl_hf.tasks.pretraining import setup as pretraining_setup
from unicoder_vl_hf.tasks.pretraining.evaluation import (
    evaluate_pretraining,
    metrics_table,
    pretraining_chance,
)
from unicoder_vl_hf.tasks.pretraining.loop import PAPER, SCENES, LoopArguments
from unicoder_vl_hf.tasks.pretraining.setup import PretrainingArguments, prepare_pretraining
from unicoder_vl_hf.tasks.retrieval.metrics import chance_recalls, retrieval_metrics
from unicoder_vl_hf.tasks.retrieval.zero_shot import zero_shot_retrieval


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world.build(tmp_path_factory.mktemp("pretraining"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return small_world.save_bert(tmp_path_factory.mktemp("bert"), dropout=0.1)


@pytest.fixture
def warnings(monkeypatch):
    """What is warned of, as text."""
    found = []
    for module in (errors, processes, checkpoints_module, runs_setup, pretraining_setup):
        monkeypatch.setattr(module.logger, "warning", found.append)
    return found


def on_world(world, bert, **options):
    return PretrainingArguments(
        captions=str(world / "captions.jsonl"),
        regions=str(world / "regions"),
        model_name_or_path=str(bert),
        **options,
    )


@pytest.fixture(scope="module")
def setup(world, bert, tmp_path_factory):
    torch.manual_seed(0)
    made = prepare_pretraining(on_world(world, bert), tmp_path_factory.mktemp("output"), seed=3)
    # Weights that tell classes and matches apart, unlike BERT's small ones.
    for parameter in made.model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def test_gradients_of_an_epoch_in_steps_of_equal_tokens_are_those_of_equal_pairs(world, bert, tmp_path):
    """At the same number of steps; each step in two micro-batches for each of two processes."""
    torch.manual_seed(0)
    made = prepare_pretraining(on_world(world, bert, tokens_per_batch=160), tmp_path, seed=3)
    samplers_of = [
        made.token_batches(seed=3, micro_batches=2, num_processes=2, process_index=process) for process in (0, 1)
    ]
    steps = samplers_of[0].steps_per_epoch
    assert 80 % steps == 0 and steps < 80
    by_pairs = [StepBatchSampler(80, rows_per_step=80 // steps, seed=3)]

    def gradients(of_processes):
        made.model.zero_grad()
        total = 0.0
        for of_process in of_processes:
            of_process.set_epoch(2)
            for batch, weight in made.train_batches(of_process, torch.device("cpu")):
                (made.model(**batch).loss * weight).backward()
                total += weight
        assert total == pytest.approx(steps)
        return {name: weights.grad.clone() for name, weights in made.model.named_parameters()}

    found, wanted = gradients(samplers_of), gradients(by_pairs)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("cut", [{}, {"max_length": 9, "max_regions": 3}])
def test_the_lengths_of_a_budget_are_those_of_the_batches(world, bert, tmp_path, monkeypatch, cut):
    """Of pairs and mismatches, as the collator cuts them, and no record is read to know them."""
    monkeypatch.setattr(RegionStore, "get_many", lambda *_: pytest.fail("records are read"))
    monkeypatch.setattr(RegionStore, "record_at", lambda *_: pytest.fail("records are read"))
    arguments = on_world(world, bert, tokens_per_batch=400, max_validation_pairs=0, **cut)
    made = prepare_pretraining(arguments, tmp_path, seed=3)
    found = made.token_batches(seed=3).lengths(np.arange(80), 4)
    monkeypatch.undo()
    made.train.set_epoch(4)
    batch = made.collator(made.train.make_rows(range(80)))
    tokens = (batch["attention_mask"].sum(1) + batch["region_attention_mask"].sum(1)).view(2, 80).T
    assert found.tolist() == tokens.tolist()
    assert not cut or (batch["input_ids"].shape[1], batch["region_features"].shape[1]) == (9, 3)


def test_the_images_of_a_micro_batch_are_asked_for_while_the_one_before_is_here(setup, monkeypatch):
    asked = []
    monkeypatch.setattr(RegionStore, "will_need", lambda _, image_ids: asked.append(set(image_ids)))
    sampler = StepBatchSampler(len(setup.train), rows_per_step=4, micro_batches=2, seed=0)
    setup.train.set_epoch(0)  # whatever other tests left
    batches = setup.train_batches(sampler, torch.device("cpu"))
    expected = []
    for rows in list(sampler)[1:]:
        pairs = [setup.train[row] for row in rows]
        expected.append({pair[name] for pair in pairs for name in ("image_id", "mismatch_image_id")})
        next(batches)
        assert asked == expected
    assert max(map(len, expected)) > 2  # images that stand in for those of their pairs


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_is_permuted_drawn_and_read_once(setup, monkeypatch, tmp_path, num_workers):
    calls = tmp_path / "calls"  # of all processes

    def counting(owner, name, of):
        function = getattr(owner, name)

        def counted(*arguments, **options):
            with calls.open("a") as file:
                file.writelines(f"{name} {what}\n" for what in of(*arguments, **options))
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    sampler = StepBatchSampler(len(setup.train), rows_per_step=5, micro_batches=2, seed=0)
    sampler.set_epoch(3)
    setup.train.set_epoch(3)
    expected = [setup.collator(setup.train.make_rows(rows)) for rows in sampler]
    weights = list(sampler.weights())
    counting(samplers, "epoch_order", lambda num_rows, **options: ["all"])
    counting(PairsWithMismatches, "mismatch", lambda _, row, epoch: [row])
    counting(PairsWithMismatches, "_texts", lambda _, rows: [f"{len(rows)} rows"])
    found = list(setup.train_batches(sampler, torch.device("cpu"), num_workers=num_workers))
    assert [weight for _, weight in found] == weights
    for (batch, _), wanted in zip(found, expected, strict=True):
        assert batch.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(batch[name], tensor), name
    lines = calls.read_text().splitlines()
    assert lines.count("epoch_order all") == 1
    drawn = [int(line.split()[1]) for line in lines if line.startswith("mismatch")]
    assert sorted(drawn) == list(range(len(setup.train)))
    assert sum(line.startswith("_texts") for line in lines) == len(expected)


# Evaluation


def slow_evaluation(model, pairs, collator):
    """Pair by pair, in Python floats, with nothing of what evaluate_pretraining uses but collator and model."""
    model.eval()
    losses, right, targets = {"mlm": [], "moc": []}, {"mlm": [], "moc": []}, {"mlm": [], "moc": []}
    matching = []
    unmasked = dataclasses.replace(collator, mlm_probability=0.0, moc_probability=0.0)
    for index in range(len(pairs)):
        with torch.no_grad():
            batch = collator([pairs[index]])
            # The match alone, and no labels: all logits come back.
            inputs = {name: value[:1] for name, value in batch.items() if "labels" not in name}
            outputs = model(**inputs)
            for name, labels, logits in (
                ("mlm", batch["labels"][0], outputs.prediction_logits[0]),
                ("moc", batch["region_labels"][0], outputs.region_logits[0]),
            ):
                for label, row in zip(labels.tolist(), logits.double(), strict=True):
                    if label != -100:
                        losses[name].append((torch.logsumexp(row, 0) - row[label]).item())
                        right[name].append(int(row.argmax()) == label)
                        targets[name].append(label)
            inputs = {name: value for name, value in unmasked([pairs[index]]).items() if "labels" not in name}
            matching.append(model(**inputs).scores.tolist())
    metrics = {}
    for name in ("mlm", "moc"):
        metrics[f"{name}_loss"] = sum(losses[name]) / len(losses[name])
        metrics[f"{name}_accuracy"] = sum(right[name]) / len(right[name])
        commonest = max(targets[name].count(label) for label in set(targets[name]))
        metrics[f"{name}_majority_accuracy"] = commonest / len(targets[name])
    metrics["mlm_perplexity"] = math.exp(metrics["mlm_loss"])
    matches, mismatches = zip(*matching, strict=True)
    log_losses = [math.log1p(math.exp(-s)) for s in matches] + [math.log1p(math.exp(s)) for s in mismatches]
    metrics["matching_loss"] = sum(log_losses) / len(log_losses)
    metrics["matching_accuracy"] = sum([s > 0 for s in matches] + [s < 0 for s in mismatches]) / len(log_losses)
    wins = [(a > b) + (a == b) / 2 for a in matches for b in mismatches]
    metrics["matching_auc"] = sum(wins) / len(wins)
    return metrics


@pytest.mark.parametrize("batch_size", [3, 64])
def test_evaluation_equals_a_slow_loop(setup, batch_size):
    found = evaluate_pretraining(setup.model, setup.validation, setup.collator, Accelerator(cpu=True), batch_size)
    expected = slow_evaluation(setup.model, setup.validation, setup.collator)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert 0.2 < expected["matching_accuracy"] < 0.8  # both signs of scores, or the comparison says little


def test_evaluation_leaves_all_as_it_was(setup):
    setup.model.train()
    state = torch.get_rng_state()
    first = evaluate_pretraining(setup.model, setup.validation, setup.collator, Accelerator(cpu=True))
    assert setup.model.training
    assert torch.equal(state, torch.get_rng_state())  # else evaluating would change the dropout of the next step
    setup.validation.set_epoch(5)
    assert evaluate_pretraining(setup.model, setup.validation, setup.collator, Accelerator(cpu=True)) == first
    setup.model.eval()


def test_evaluation_of_a_task_that_is_off(setup):
    collator = dataclasses.replace(setup.collator, moc_probability=0.0)
    found = evaluate_pretraining(setup.model, setup.validation, collator, Accelerator(cpu=True))
    assert not [name for name in found if name.startswith("moc")]
    assert pretraining_chance(found).keys() == {"mlm_accuracy", "matching_accuracy", "matching_auc"}


def test_table():
    metrics = {
        "mlm_accuracy": 0.5,
        "mlm_majority_accuracy": 0.125,
        "matching_accuracy": 0.75,
        "matching_auc": 0.9,
        "loss": 1.0,
    }
    chance = pretraining_chance(metrics)
    assert chance == {"mlm_accuracy": 0.125, "matching_accuracy": 0.5, "matching_auc": 0.5}
    rows = [line.split() for line in metrics_table(metrics, chance).splitlines()[1:]]
    assert rows == [
        ["mlm_accuracy", "50.0", "12.5"],
        ["matching_accuracy", "75.0", "50.0"],
        ["matching_auc", "90.0", "50.0"],
    ]


# Shuffled regions, scores and retrieval


@pytest.mark.parametrize("seed", range(20))
def test_no_image_keeps_its_regions(seed):
    ids = [f"image {index}" for index in range(5)]
    store = {image_id: tiny.record(image_id) for image_id in ids}
    shuffled = ShuffledStore(store, ids * 2, seed)
    given = {image_id: shuffled[image_id] for image_id in shuffled}
    assert len(shuffled) == len(given) == 5
    for image_id, record in given.items():
        assert record.image_id == image_id
        assert not np.array_equal(record.features, store[image_id].features)
    assert sorted(record.features.sum() for record in given.values()) == sorted(
        record.features.sum() for record in store.values()
    )  # each is used once


def test_shuffling_needs_two_images():
    with pytest.raises(ValueError, match=r"\['a'\], expected at least two images"):
        ShuffledStore({"a": tiny.record("a")}, ["a", "a"])


CAPTIONS = ["a dog runs", "a cat", "the dog sleeps on the grass .", "the cat runs on", "a"]
IMAGES = [f"image {index}" for index in range(4)]
STORE = {image_id: tiny.record(image_id, num_regions=1 + 2 * index) for index, image_id in enumerate(IMAGES)}


def scores_pair_by_pair(model, processor):
    scores = np.empty((len(CAPTIONS), len(IMAGES)))
    for row, caption in enumerate(CAPTIONS):
        for column, image_id in enumerate(IMAGES):
            inputs = processor(text=caption, regions=STORE[image_id], return_tensors="pt")
            with torch.no_grad():
                scores[row, column] = model(**inputs).scores.item()
    return scores


@pytest.mark.parametrize("max_tokens", [1, 30, 100, 3072])
@pytest.mark.parametrize("model_class", [UnicoderVLForPreTraining, UnicoderVLForImageTextRetrieval])
def test_scores_equal_those_of_each_pair_alone(model_class, max_tokens):
    model, processor = tiny.model(model_class).train(), tiny.processor()
    scores = ImageTextScorer(model, processor, STORE, max_tokens=max_tokens).score(CAPTIONS, IMAGES)
    assert model.training
    assert scores.dtype == np.float32
    expected = scores_pair_by_pair(model.eval(), processor)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    assert np.ptp(expected) > 0.01  # the scores differ, so that a transposed or shuffled table would show


def test_scorer_cuts_captions_and_regions_as_the_processor_does():
    model, processor = tiny.model(UnicoderVLForPreTraining), tiny.processor(max_regions=2)
    images = [tiny.record("one", num_regions=5), tiny.record("two", num_regions=1)]
    scores = ImageTextScorer(model, processor).score(CAPTIONS, images, max_length=4)
    inputs = processor(text=CAPTIONS[2], regions=images[0], return_tensors="pt", max_length=4)
    assert inputs["input_ids"].shape[1] == 4 and inputs["region_features"].shape[1] == 2
    with torch.no_grad():
        assert scores[2, 0] == pytest.approx(model(**inputs).scores.item(), abs=1e-5)


def test_zero_shot_retrieval():
    model, processor = tiny.model(UnicoderVLForPreTraining), tiny.processor()
    of = [1, 0, 1, 2, 3]
    rows = datasets.Dataset.from_dict({"image_id": [IMAGES[image] for image in of], "caption": CAPTIONS})
    found = zero_shot_retrieval(model, processor, STORE, rows)
    assert found.image_ids == [IMAGES[1], IMAGES[0], IMAGES[2], IMAGES[3]]  # in the order of the captions
    assert found.image_of_caption.tolist() == [0, 1, 0, 2, 3]
    expected = scores_pair_by_pair(model, processor)[:, [1, 0, 2, 3]]
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5, atol=1e-5)
    assert found.metrics == retrieval_metrics(found.scores, [0, 1, 0, 2, 3])
    assert found.chance == chance_recalls([0, 1, 0, 2, 3])

    first = zero_shot_retrieval(model, processor, STORE, rows, num_images=2)
    assert first.captions == CAPTIONS[:3]
    np.testing.assert_allclose(first.scores, expected[:3, :2], rtol=1e-5, atol=1e-5)


def test_chance_by_hand():
    # Captions 0, 1 of image 0 and caption 2 of image 1: image 0 finds one of its two among three with 2 / 3.
    chance = chance_recalls([0, 0, 1], ks=[1, 2, 3])
    assert chance == pytest.approx(
        {
            "image_retrieval_recall@1": 1 / 2,
            "image_retrieval_recall@2": 1.0,
            "image_retrieval_recall@3": 1.0,
            "text_retrieval_recall@1": (2 / 3 + 1 / 3) / 2,
            "text_retrieval_recall@2": (1.0 + 2 / 3) / 2,
            "text_retrieval_recall@3": 1.0,
        }
    )


def test_chance_equals_random_scores():
    image_of_caption = np.array([0, 0, 0, 1, 1, 2, 3, 3, 3, 3])
    rng = np.random.default_rng(0)
    draws = [retrieval_metrics(rng.random((10, 4)), image_of_caption, ks=[1, 3]) for _ in range(4000)]
    for name, value in chance_recalls(image_of_caption, ks=[1, 3]).items():
        assert np.mean([draw[name] for draw in draws]) == pytest.approx(value, abs=0.02), name


# Arguments, data and model


@pytest.mark.parametrize("given, recipe", [([], SCENES), (["--captions=x.json", "--regions", "y"], PAPER)])
def test_the_defaults_are_those_of_the_data(given, recipe):
    _, args = parse_arguments(
        (PretrainingArguments, LoopArguments), ["--output_dir", "x", *given], paper=PAPER, scenes=SCENES
    )
    assert {name: getattr(args, name) for name in recipe} == recipe


def test_help_shows_the_defaults_of_the_paper_and_names_those_of_the_scenes(capsys):
    with pytest.raises(SystemExit):
        parse_arguments((PretrainingArguments, LoopArguments), ["--help"], paper=PAPER, scenes=SCENES)
    shown = " ".join(capsys.readouterr().out.split())
    assert "Without --captions, on the rendered scenes: num_train_epochs 3, learning_rate 0.001, train_batch" in shown
    assert "Passes over the training pairs. (default: 10)" in shown
    assert "--no_moc, --no-moc Turn --moc off. --moc_probability" in shown
    assert "--no_image_token, --no-image-token Turn --image_token off. --max_length" in shown


def test_help_of_an_evaluation(capsys):
    with pytest.raises(SystemExit):
        places.script("evaluate_pretraining").main(["--help"])
    assert "--no_moc, --no-moc Turn --moc off. --" in " ".join(capsys.readouterr().out.split())


def test_turned_off():
    given = ["--output_dir", "x", "--no_moc"]
    data_args, _ = parse_arguments((PretrainingArguments, LoopArguments), given, paper=PAPER, scenes=SCENES)
    assert (data_args.moc, data_args.image_token) == (False, True)


@pytest.mark.parametrize("given", [{"captions": "a.json"}, {"regions": "r"}])
def test_captions_and_regions_go_together(given):
    with pytest.raises(ValueError, match="both --captions and --regions"):
        PretrainingArguments(**given)


def test_setup(setup, world):
    assert len(setup.train) == small_world.NUM_TRAIN_PAIRS
    assert len(setup.validation) == small_world.NUM_VALIDATION_PAIRS
    store = RegionStore(world / "regions")
    assert setup.model.config.region_feature_dim == store.feature_dim
    assert setup.model.config.num_region_classes == setup.collator.num_region_classes == 12  # the store's class names
    assert setup.processor.feature_extractor.region_provenance == store.provenance
    train = {row["image_id"] for row in (setup.train[index] for index in range(len(setup.train)))}
    assert {image_id.split("-")[0] for image_id in train} == {"train"}
    setup.train.set_epoch(1)
    assert setup.train[0]["epoch"] == 1 and setup.validation[0]["epoch"] == 0
    setup.train.set_epoch(0)


def test_validation_pairs_are_drawn_evenly(world, bert, tmp_path):
    made = prepare_pretraining(on_world(world, bert, max_validation_pairs=7), tmp_path, seed=0)
    captions = read_captions(world / "captions.jsonl", split="val")["caption"]
    assert [made.validation[index]["caption"] for index in range(len(made.validation))] == list(captions)[::3]
    assert prepare_pretraining(on_world(world, bert, max_validation_pairs=0), tmp_path, seed=0).validation is None


def test_unknown_split(world, bert, tmp_path):
    ways = r"--validation_split, or do without: --max_validation_pairs 0"
    with pytest.raises(ValueError, match=rf"no split 'dev'; its splits are train, val, test\. .*{ways}\.$"):
        prepare_pretraining(on_world(world, bert, validation_split="dev"), tmp_path, seed=0)


def test_captions_without_splits(world, bert, tmp_path):
    captions = tmp_path / "captions.jsonl"
    captions.write_text(json.dumps({"image_id": "train-00000", "caption": "a red circle"}) + "\n")
    with pytest.raises(ValueError, match=r"captions.jsonl: no column 'split'.*`unicoder-vl prepare`"):
        prepare_pretraining(dataclasses.replace(on_world(world, bert), captions=str(captions)), tmp_path, seed=0)


def with_object_ids(world, folder, image_id, change, **options):
    """A copy of the world's regions, without class names, that has other `object_ids` for one image."""
    with RegionStoreWriter(folder, **options) as writer:
        for record in RegionStore(world / "regions").values():
            changed = change(record.object_ids.copy()) if record.image_id == image_id else record.object_ids
            writer.write(dataclasses.replace(record, object_ids=changed))
    return str(folder)


def last_is(value):
    def change(object_ids):
        object_ids[-1] = value
        return object_ids

    return change


@pytest.mark.parametrize("image_id", ["train-00039", "val-00009"])
def test_an_object_id_out_of_range_stops_the_run_before_it_trains(world, bert, tmp_path, image_id):
    regions = with_object_ids(world, tmp_path / "regions", image_id, last_is(12))
    arguments = dataclasses.replace(on_world(world, bert, num_region_classes=12), regions=regions)
    says = rf"regions, image '{image_id}': object_ids hold 12, expected 0 to 11.*--num_region_classes"
    with pytest.raises(ValueError, match=says):
        prepare_pretraining(arguments, tmp_path, seed=0)
    prepare_pretraining(dataclasses.replace(arguments, moc=False), tmp_path, seed=0)
    prepare_pretraining(dataclasses.replace(arguments, num_region_classes=13), tmp_path, seed=0)


def test_images_that_are_not_used_may_hold_any_class(world, bert, tmp_path):
    regions = with_object_ids(world, tmp_path / "regions", "test-00000", last_is(12))
    arguments = dataclasses.replace(on_world(world, bert, num_region_classes=12), regions=regions)
    prepare_pretraining(arguments, tmp_path, seed=0)


def test_one_image_without_object_ids(world, bert, tmp_path):
    regions = with_object_ids(world, tmp_path / "regions", "train-00039", lambda ids: None, num_classes=12)
    arguments = dataclasses.replace(on_world(world, bert), regions=regions)
    says = r"image 'train-00039': the record has no object_ids.*--no_moc"
    with pytest.raises(ValueError, match=says):
        prepare_pretraining(arguments, tmp_path, seed=0)


def test_a_number_of_classes_that_is_assumed_is_said(world, bert, tmp_path, warnings):
    regions = with_object_ids(world, tmp_path / "regions", "train-00000", last_is(37))
    arguments = dataclasses.replace(on_world(world, bert), regions=regions)
    made = prepare_pretraining(arguments, tmp_path, seed=0)
    assert made.model.config.num_region_classes == 1600
    (said,) = (text for text in warnings if "--num_region_classes" in text)
    assert "The model predicts 1,600; the highest id of these images is 37." in said
    assert f"`unicoder-vl merge {regions} --output NEW --num-classes NUMBER`" in said
    warnings.clear()
    prepare_pretraining(dataclasses.replace(arguments, num_region_classes=40), tmp_path, seed=0)
    prepare_pretraining(on_world(world, bert), tmp_path, seed=0)  # a store that knows
    assert not any("--num_region_classes" in text for text in warnings)


def test_missing_regions_stop_the_run_unless_skipped(world, bert, tmp_path):
    captions = tmp_path / "captions.jsonl"
    lost = {"image_id": "lost", "caption": "a red circle", "split": "train"}
    captions.write_text((world / "captions.jsonl").read_text() + json.dumps(lost) + "\n")
    arguments = dataclasses.replace(on_world(world, bert), captions=str(captions))
    with pytest.raises(ValueError, match=r"lost(.|\n)*leave them out: --skip_missing\.$"):
        prepare_pretraining(arguments, tmp_path, seed=0)
    skipping = dataclasses.replace(arguments, skip_missing=True)
    assert len(prepare_pretraining(skipping, tmp_path, seed=0).train) == small_world.NUM_TRAIN_PAIRS


def test_foreign_regions_are_converted_once(world, bert, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    store = RegionStore(world / "regions")
    for image_id, record in store.items():
        # The layout of MILVLG's bottom-up attention.
        np.savez(
            foreign / f"{image_id}.npz",
            x=record.features,
            bbox=record.boxes,
            num_bbox=record.num_regions,
            image_w=record.image_width,
            image_h=record.image_height,
            info={"objects_id": record.object_ids, "objects_conf": record.object_scores},
        )
    arguments = dataclasses.replace(on_world(world, bert, num_region_classes=12), regions=str(foreign))
    made = prepare_pretraining(arguments, tmp_path / "output", seed=0)
    converted = tmp_path / "output" / "_data" / "regions"
    assert made.collator.store.path == converted
    np.testing.assert_array_equal(made.collator.store["train-00003"].features, store["train-00003"].features)
    assert made.model.config.num_region_classes == 12
    written = {path: path.stat().st_mtime_ns for path in converted.rglob("*")}
    shutil.rmtree(foreign)
    foreign.mkdir()  # whoever read it again would find nothing
    again = prepare_pretraining(arguments, tmp_path / "output", seed=0)
    assert len(again.collator.store) == len(store)
    assert {path: path.stat().st_mtime_ns for path in converted.rglob("*")} == written

    other = dataclasses.replace(arguments, regions=str(tmp_path))
    with pytest.raises(ValueError, match=f"{re.escape(str(converted))} was converted from {re.escape(str(foreign))}"):
        prepare_pretraining(other, tmp_path / "output", seed=0)


def test_a_failed_conversion_leaves_the_folder_to_others(world, bert, tmp_path):
    """Unless it left records, with which others would mix."""
    broken = tmp_path / "broken.tsv"
    broken.write_text("a photo\tof nothing\n")  # of no format
    malformed = tmp_path / "malformed.tsv"
    arguments = on_world(world, bert, num_region_classes=12)
    export(RegionStore(world / "regions"), tmp_path / "whole.tsv", "lxmert-tsv")
    fields = (tmp_path / "whole.tsv").read_text().splitlines()[0].split("\t")
    malformed.write_text("\t".join([*fields[:-1], fields[-1][:-8]]) + "\n")  # of one, but cut short
    for regions in (broken, malformed):
        with pytest.raises(ValueError, match=regions.name):
            prepare_pretraining(dataclasses.replace(arguments, regions=str(regions)), tmp_path / "output", seed=0)
        assert not (tmp_path / "output").exists()
    made = prepare_pretraining(
        dataclasses.replace(arguments, regions=str(tmp_path / "whole.tsv")), tmp_path / "output", seed=0
    )
    assert len(made.collator.store) == len(RegionStore(world / "regions"))


def test_a_misspelt_model(world, tmp_path):
    with pytest.raises(ValueError, match=r"There is no /no/such/bert: / holds no 'no'\.$"):
        prepare_pretraining(on_world(world, "/no/such/bert"), tmp_path, seed=0)


def test_checkpoint_of_another_feature_width(world, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    tiny.model(UnicoderVLForPreTraining).save_pretrained(checkpoint)
    tiny.processor().save_pretrained(checkpoint)
    says = f"{checkpoint} takes features of width {tiny.FEATURE_DIM}, but those of {world / 'regions'} have width "
    says += f"{RegionStore(world / 'regions').feature_dim}. Give --regions of the detector"
    with pytest.raises(ValueError, match=re.escape(says)):
        prepare_pretraining(on_world(world, checkpoint), tmp_path, seed=0)


def test_going_on_with_a_checkpoint(world, setup, tmp_path):
    setup.model.save_pretrained(tmp_path / "checkpoint")
    setup.processor.save_pretrained(tmp_path / "checkpoint")
    made = prepare_pretraining(on_world(world, tmp_path / "checkpoint"), tmp_path, seed=0)
    for name, value in setup.model.state_dict().items():
        assert torch.equal(made.model.state_dict()[name], value), name


def test_features_are_scaled_by_the_training_regions(world, bert, tmp_path):
    made = prepare_pretraining(on_world(world, bert, scale_features=True), tmp_path, seed=0)
    ids = {row["image_id"] for row in map(json.loads, (world / "captions.jsonl").open()) if row["split"] == "train"}
    features = np.concatenate([made.collator.store[name].features for name in sorted(ids)]).astype(np.float64)
    mean = features.mean(0)
    extractor = made.processor.feature_extractor
    np.testing.assert_allclose(extractor.feature_mean, mean, rtol=1e-5, atol=1e-7)
    assert extractor.feature_std == pytest.approx(np.sqrt(((features - mean) ** 2).mean()), rel=1e-5)

    made.model.save_pretrained(tmp_path / "scaled")
    made.processor.save_pretrained(tmp_path / "scaled")
    again = prepare_pretraining(on_world(world, tmp_path / "scaled"), tmp_path, seed=0)
    assert again.processor.feature_extractor.feature_mean == extractor.feature_mean
    assert again.processor.feature_extractor.feature_std == extractor.feature_std


@pytest.mark.parametrize("start", ["bert", "checkpoint"])
def test_dropout_of_what_the_model_starts_from(start, world, bert, setup, tmp_path):
    if start == "checkpoint":
        setup.model.save_pretrained(tmp_path / "checkpoint")
        setup.processor.save_pretrained(tmp_path / "checkpoint")
        bert = tmp_path / "checkpoint"
    config = prepare_pretraining(on_world(world, bert, dropout=0.25), tmp_path, seed=0).model.config
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.25, 0.25)


def test_a_checkpoint_keeps_its_scale(world, setup, tmp_path):
    setup.model.save_pretrained(tmp_path / "plain")
    setup.processor.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="plain was trained on unscaled features: leave out --scale_features"):
        prepare_pretraining(on_world(world, tmp_path / "plain", scale_features=True), tmp_path, seed=0)


def test_more_tokens_than_positions(world, bert, tmp_path):
    with pytest.raises(ValueError, match="max_length=65, but the model has 64 positions"):
        prepare_pretraining(on_world(world, bert, max_length=65), tmp_path, seed=0)


def test_cut_captions_are_counted(world, bert, tmp_path, warnings):
    prepare_pretraining(on_world(world, bert, max_length=5), tmp_path, seed=0)
    assert any("80 of 80 training captions exceed 5 tokens" in text for text in warnings)


# The end, checkpoints and the log


def test_a_script_that_was_stopped_ends_with_130(warnings):
    run_script(lambda: True)
    assert not warnings
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: False)
    assert ended.value.code == 130
    assert warnings == ["Go on with the same command and --resume_from_checkpoint latest."]


@pytest.mark.parametrize("go_on, says", [("", "stopped."), ("The same goes on.", "stopped. The same goes on.")])
def test_a_script_that_ctrl_c_ends_at_once_says_what_goes_on(go_on, says, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["examples/run_x.py", "--y"])
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: fail(KeyboardInterrupt()), go_on)
    assert ended.value.code == 130
    assert capsys.readouterr().err == f"run_x.py: {says}\n"


def test_a_script_that_was_finished_says_so_and_ends_well(tmp_path, warnings):
    for name in ("model.safetensors", "README.md"):
        (tmp_path / name).touch()
    run_script(lambda: CheckpointFolder(tmp_path).resolve("latest"))
    assert len(warnings) == 1 and "nothing left to train" in warnings[0]
    with pytest.raises(SystemExit) as ended:  # it was to begin
        run_script(lambda: CheckpointFolder(tmp_path).resolve(None))
    assert ended.value.code == 1


def fail(error):
    raise error


@pytest.mark.parametrize("rank, process", [(None, ""), ("1", " (process 1)")])
@pytest.mark.parametrize("error", [ValueError, OSError, ImportError, KeyError])
def test_what_a_user_can_mend_is_one_line(error, rank, process, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["examples/run_x.py", "--y"])
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: fail(error("There is no 'z'.")))
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"run_x.py{process}: There is no 'z'.\n"
    monkeypatch.setenv("UNICODER_VL_TRACEBACK", "1")
    with pytest.raises(error, match="There is no 'z'"):
        run_script(lambda: fail(error("There is no 'z'.")))


@pytest.mark.parametrize("error", [KeyError("z"), KeyError(), RuntimeError("not of a user"), TypeError("neither")])
def test_what_is_a_defect_keeps_its_traceback(error, capsys):
    with pytest.raises(type(error)):
        run_script(lambda: fail(error))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "given, says",
    [
        (["--captions", "x.json"], "Give both --captions and --regions, or neither for the rendered scenes"),
        (["--bogus"], "there is no option --bogus"),
        (["stray"], "unknown argument stray"),
        (["--learning_rat=1"], "there is no option --learning_rat. Did you mean '--learning_rate'?"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
    ],
)
def test_a_wrong_argument_is_one_line(given, says, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["examples/run_x.py"])
    with pytest.raises(SystemExit) as ended:
        parse_arguments(
            (PretrainingArguments, LoopArguments), ["--output_dir", "o", *given], paper=PAPER, scenes=SCENES
        )
    assert ended.value.code == 2
    says += "" if says.endswith("?") else "."
    assert capsys.readouterr().err == f"run_x.py: {says} --help lists the options.\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_sets_second_ends(number, warnings):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.is_set() and len(warnings) == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            signal.sigtimedwait([], 1)  # not reached but for a slow delivery
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


class Saver:
    """What CheckpointFolder needs of an accelerator and of a processor; writes two files, or stops in between."""

    is_main_process = True

    def __init__(self, fails=None):
        self.fails = fails
        self.logged = []

    def log(self, values, step):
        self.logged.append((step, values))

    def wait_for_everyone(self):
        pass

    def save_state(self, folder):
        Path(folder, "weights").touch()
        if self.fails == "save_state":
            raise KeyboardInterrupt

    def save_pretrained(self, folder):
        (folder / "processor").touch()
        if self.fails == "save_pretrained":
            raise KeyboardInterrupt


def save(folder, step, fails=None, **identity):
    saver = Saver(fails)
    folder.save({"step": step}, {"seed": 1} | identity, saver, saver, Computing("no"))


WHOLE = {"weights", "processor", "training_state.json", Computing.FILE}


@pytest.mark.parametrize("fails", ["save_state", "save_pretrained", "replace", "rmtree"])
def test_a_crash_leaves_whole_checkpoints_only(tmp_path, monkeypatch, fails):
    folder = CheckpointFolder(tmp_path, keep=1)
    save(folder, 9)
    save(folder, 10)  # newer by number, not by name
    assert [path.name for path in folder.list()] == ["checkpoint-10"]

    def crash(path, *args, **kwargs):
        if fails == "rmtree" and os.path.isdir(path):
            os.remove(os.path.join(path, "weights"))  # half removed
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        if fails in ("replace", "rmtree"):
            context.setattr(os if fails == "replace" else shutil, fails, crash)
        with pytest.raises(KeyboardInterrupt):
            save(folder, 20, fails)
    for path in tmp_path.glob("checkpoint-*"):
        assert {file.name for file in path.iterdir()} == WHOLE
    newest = "checkpoint-20" if fails == "rmtree" else "checkpoint-10"
    assert folder.resolve("latest").name == newest

    save(folder, 20)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-20"}  # nothing is left over


def test_checkpoints_are_numbered_and_limited(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (5, 50, 100):
        save(folder, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-999").mkdir()  # not whole
    (tmp_path / "checkpoint-998").mkdir()
    (tmp_path / "checkpoint-998" / folder.state_file).touch()  # nor this one: a kill came while it was written
    assert [path.name for path in folder.list()] == ["checkpoint-50", "checkpoint-100"]
    folder.remove_leftovers()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-50", "checkpoint-100", "checkpoint-best"}
    with pytest.raises(ValueError, match="save_total_limit=0"):
        CheckpointFolder(tmp_path, keep=0)


def test_which_checkpoint_to_resume(tmp_path):
    folder = CheckpointFolder(tmp_path / "run", keep=2)
    assert folder.resolve(None) is None
    with pytest.raises(ValueError, match=r"run has no checkpoint yet: start the run without --resume_from_checkpoint"):
        folder.resolve("latest")
    save(folder, 5)
    save(folder, 7)
    assert folder.resolve("latest").name == "checkpoint-7"
    assert folder.resolve(str(tmp_path / "run" / "checkpoint-5")).name == "checkpoint-5"
    with pytest.raises(ValueError, match=r"nowhere is no checkpoint of a run: it has no training_state.json"):
        folder.resolve(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"holds a run, up to checkpoint-7.*--resume_from_checkpoint latest"):
        folder.resolve(None)


def test_a_finished_run_has_nothing_to_resume(tmp_path):
    folder = CheckpointFolder(tmp_path)
    save(folder, 5)
    (tmp_path / "model.safetensors").touch()
    assert folder.resolve("latest").name == "checkpoint-5"  # the last evaluation failed, or is yet to come
    assert not folder.check_steps("latest", tmp_path / "checkpoint-5", 5, 5)
    (tmp_path / "README.md").touch()
    with pytest.raises(ValueError, match=r"finished run, with its model: there is nothing left to train"):
        folder.resolve(None)
    checkpoint = folder.resolve("latest")
    with pytest.raises(FinishedRun, match=r"nothing left to train.*a larger --num_train_epochs or --max_steps"):
        folder.check_steps("latest", checkpoint, 5, 5)
    with pytest.raises(FinishedRun, match=r"nothing left to train. It was a run of 5 steps; 3 are fewer. Take another"):
        folder.check_steps("latest", checkpoint, 3, 5)
    assert folder.resolve(str(tmp_path / "checkpoint-5")).name == "checkpoint-5"
    assert not folder.check_steps(str(checkpoint), checkpoint, 5, 5)  # who names it means it
    shutil.rmtree(checkpoint)
    with pytest.raises(FinishedRun, match=r"nothing left to train. It has no checkpoint from which more steps could"):
        folder.resolve("latest")


def test_a_run_can_become_longer_and_not_shorter(tmp_path, warnings):
    folder = CheckpointFolder(tmp_path)
    save(folder, 5)
    for name in ("model.safetensors", "README.md"):
        (tmp_path / name).touch()
    checkpoint = folder.resolve("latest")
    assert folder.check_steps("latest", checkpoint, 8, 5)
    assert "a run of 5 steps. From here on the learning rate is that of a run of 8" in "".join(warnings)
    folder.reopen()
    assert not folder.is_finished() and (tmp_path / "model.safetensors").exists()
    assert not folder.check_steps("latest", checkpoint, 8, 8)  # stopped on its way
    with pytest.raises(ValueError, match="of a run of 8 steps, which cannot become one of 5"):
        folder.check_steps("latest", checkpoint, 5, 8)


def test_another_run_is_refused_by_name(tmp_path):
    folder = CheckpointFolder(tmp_path)
    save(folder, 5, learning_rate=0.1)
    assert folder.read(folder.list()[0], {"learning_rate": 0.1, "seed": 1}) == {"step": 5, "total_steps": 5}
    with pytest.raises(ValueError, match=r"another run: \(then, now\) differ in \{'learning_rate': \(0.1, 0.2\)\}"):
        folder.read(folder.list()[0], {"learning_rate": 0.2, "seed": 1})


# What the log and the bar say of the losses


def outputs_of(loss, **parts):
    return {name: torch.tensor(value) for name, value in {"loss": loss, **parts}.items()}


def test_means_of_the_losses_by_hand():
    """Two steps, the first of two micro-batches; half of the rows are matches, over which mlm and moc are means."""
    meter = LossMeter(Accelerator(cpu=True), ("mlm_loss", "moc_loss", "matching_loss"))
    labels = torch.tensor([1, 0])
    meter.add(outputs_of(6.0, mlm_loss=3.0, moc_loss=2.0, matching_loss=1.0), labels, 0.25)
    meter.add(outputs_of(2.0, mlm_loss=1.0, moc_loss=0.0, matching_loss=1.0), labels, 0.75)
    meter.gather()
    meter.add(outputs_of(5.0, mlm_loss=2.5, moc_loss=1.5, matching_loss=1.0), labels, 1.0)
    meter.gather()
    state = meter.state()
    means = meter.mean()
    assert means.pop("rows_per_second") > 0
    assert means == pytest.approx({"loss": 4.0, "mlm_loss": 4.0, "moc_loss": 2.0, "matching_loss": 1.0})
    meter.load(state)
    losses = {"loss": 8, "mlm_loss": 4, "moc_loss": 2, "matching_loss": 2}
    assert meter.state() == state == losses | {"counted": 1, "weights": 2}
    meter.load([8.0, 4.0, 2.0, 2.0, 1.0])  # as checkpoints had it that gave no names
    assert meter.state() == state


def test_rows_of_unknown_matching_all_count():
    meter = LossMeter(Accelerator(cpu=True), ("mlm_loss",))
    meter.add(outputs_of(3.0, mlm_loss=3.0, moc_loss=0.0, matching_loss=0.0), torch.tensor([-100, -100]), 1.0)
    meter.gather()
    assert {name: value for name, value in meter.mean().items() if "loss" in name} == {"loss": 3.0, "mlm_loss": 3.0}


def test_a_loss_that_is_off_is_absent_also_in_a_checkpoint_that_knew_it():
    meter = LossMeter(Accelerator(cpu=True), ("mlm_loss", "matching_loss"))
    meter.load([8.0, 4.0, 0.0, 2.0, 1.0])
    assert meter.state() == {"loss": 8, "mlm_loss": 4, "matching_loss": 2, "counted": 1, "weights": 2}
    assert "moc_loss" not in meter.mean()


def test_what_stands_beside_the_bar():
    line = {"loss": 3.14159, "mlm_loss": 12.3456, "learning_rate": 0.0005, "epoch": 0.5, "rows_per_second": 99.0}
    assert beside_the_bar(line) == {"loss": "3.142", "mlm": "12.346", "lr": "5.0e-04"}


def test_log_drops_what_a_resumed_run_writes_again(tmp_path):
    path = tmp_path / "run" / "log.jsonl"
    log = JsonLog(path, Saver())
    for step in (2, 4, 6):
        log.write(step, {"loss": 1 / 3})
    assert path.read_text().splitlines()[0] == '{"step": 2, "loss": 0.333333}'
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # a crash
    JsonLog(path, Saver(), resume_step=4).write(5, {"loss": 2.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 5]
    other = Saver()
    other.is_main_process = False
    JsonLog(path, other, resume_step=5).write(9, {"loss": 2.0})
    assert other.logged == [(9, {"loss": 2.0})]  # accelerate sees to its trackers itself
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 5]
    JsonLog(path, Saver())
    assert path.read_text() == ""


def test_log_has_what_a_resumed_run_measures_again_once(tmp_path):
    """A run that was killed behind its last evaluation evaluates again."""
    path = tmp_path / "log.jsonl"
    log = JsonLog(path, Saver())
    log.write(4, {"loss": 2.0})
    log.write(4, {"eval_loss": 3.0})
    before = path.read_text()
    again = JsonLog(path, Saver(), resume_step=4)
    again.write(4, {"eval_loss": 3.0})
    assert path.read_text() == before
    again.write(6, {"eval_loss": 3.0})
    again.write(6, {"eval_loss": 3.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [4, 4, 6, 6]
