"""docs/training_loops.md runs as it stands, and what goes wrong without its wrappers is said."""

import datasets
import numpy as np
import pytest
import small_world
import tiny
import torch
from test_docs import ROOT, blocks
from transformers import AutoModelForPreTraining, AutoProcessor, Trainer, TrainingArguments

from unicoder_vl_hf import (
    DataCollatorForUnicoderVLMultipleChoice,
    DataCollatorForUnicoderVLPreTraining,
    DataCollatorForUnicoderVLRetrieval,
    RegionRecord,
    UnicoderVLForImageTextRetrieval,
    UnicoderVLForPreTraining,
    logging,
)
from unicoder_vl_hf.data import rows
from unicoder_vl_hf.data.negatives import PairsWithMismatches, PairsWithNegatives
from unicoder_vl_hf.runs.trainer import EpochOfData
from unicoder_vl_hf.tasks.pretraining import collator as collators

PAGE = ROOT / "docs" / "training_loops.md"


def test_the_page_runs(tmp_path, monkeypatch, warned):
    world = small_world.build(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("captions.jsonl", "regions"):
        (tmp_path / name).symlink_to(world / name)
    small_world.save_bert(tmp_path / "google-bert" / "bert-base-uncased", dropout=0.1)
    drawn, draw = [], PairsWithMismatches.mismatch
    monkeypatch.setattr(PairsWithMismatches, "mismatch", lambda *args: drawn.append(args[1:]) or draw(*args))
    names = {}
    for block in blocks(PAGE, "python"):
        exec(compile(block, str(PAGE), "exec"), names)
    # Each pair once an epoch, in the loop and in Trainer; then the validation pairs, masked and unmasked.
    train = [(row, epoch) for epoch in range(2) for row in range(80)]
    assert sorted(drawn[:160]) == sorted(drawn[160:320]) == sorted(train)
    assert drawn[320:] == [(row, 0) for row in range(20)] * 2
    assert 0 <= names["metrics"]["matching_accuracy"] <= 1
    for folder in ("runs/loop", "runs/trainer"):
        assert type(AutoModelForPreTraining.from_pretrained(folder)).__name__ == "UnicoderVLForPreTraining"
        assert AutoProcessor.from_pretrained(folder)(text="a red circle")["input_ids"]
    assert warned == []


# A tiny world, and the ways of a newcomer


def record(image_id):
    return RegionRecord(**tiny.region_arrays(image_id), object_ids=np.arange(3))


STORE = {name: record(name) for name in "abcd"}
PAIRS = datasets.Dataset.from_dict(
    {"image_id": list("abcd"), "caption": ["a dog runs .", "a cat sleeps .", "on the grass .", "the dog sleeps"]}
)


@pytest.fixture
def warned(monkeypatch):
    found = []
    for module in (collators, rows):
        monkeypatch.setattr(module.logger, "warning", found.append)
    logging.warn_once.cache_clear()
    return found


def trainer(tmp_path, train, collator=DataCollatorForUnicoderVLPreTraining, **options):
    head = (
        UnicoderVLForPreTraining
        if collator is DataCollatorForUnicoderVLPreTraining
        else UnicoderVLForImageTextRetrieval
    )
    settings = {"per_device_train_batch_size": 2, "num_train_epochs": 3, "disable_tqdm": True, "report_to": "none"}
    settings |= {"use_cpu": True, "save_strategy": "no"} | options.pop("arguments", {})
    return Trainer(
        model=tiny.model(head).train(),
        args=TrainingArguments(str(tmp_path), **settings),
        train_dataset=train,
        data_collator=collator(tiny.processor(), STORE),
        **options,
    )


@pytest.mark.parametrize(
    "collator, wrapper",
    [
        (DataCollatorForUnicoderVLPreTraining, PairsWithMismatches),
        (DataCollatorForUnicoderVLRetrieval, PairsWithNegatives),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_trainer_with_its_defaults_trains_as_with_its_setting(tmp_path, collator, wrapper, num_workers):
    """`remove_unused_columns` is on by default, and would leave nothing of rows that are dicts."""
    weights = []
    for options in ({}, {"remove_unused_columns": False}):
        arguments = options | {"dataloader_num_workers": num_workers}
        made = trainer(tmp_path, wrapper(PAIRS, seed=0), collator, arguments=arguments, callbacks=[EpochOfData()])
        made.train()
        weights.append(made.model.state_dict())
        assert made.train_dataset.epoch == 2
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_dataset_without_its_wrapper_is_refused_by_trainer_with_the_setting(tmp_path):
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        trainer(tmp_path, PAIRS).train()


@pytest.mark.parametrize("columns", [["image_id", "caption"], ["image_id", "caption", "epoch"], ["labels"], []])
@pytest.mark.parametrize(
    "collator, wrapper",
    [
        (DataCollatorForUnicoderVLPreTraining, r"PairsWithMismatches\(pairs, seed=0\)"),
        (DataCollatorForUnicoderVLRetrieval, r"PairsWithNegatives\(pairs, seed=0\)"),
        (DataCollatorForUnicoderVLMultipleChoice, r"VCRExamples\(rows, task\)"),
    ],
)
def test_rows_that_lack_something_name_what_makes_them(columns, collator, wrapper):
    """Also what Trainer leaves of a row whose other columns no forward names."""
    row = dict.fromkeys(columns, 0)
    with pytest.raises(ValueError, match=rf"A row holds .*, but no .*{wrapper}.*remove_unused_columns=False"):
        collator(tiny.processor(), STORE)([row, row])


def test_one_row_without_its_mismatch_is_refused():
    train = PairsWithMismatches(PAIRS, seed=0)
    without = {name: value for name, value in train[1].items() if not name.startswith("mismatch")}
    collator = DataCollatorForUnicoderVLPreTraining(tiny.processor(), STORE)
    for batch in ([train[0], without], [without, train[0]]):
        with pytest.raises(ValueError, match="but no mismatch_image_id, mismatch_caption"):
            collator(batch)


def test_training_without_matching_is_said(warned):
    """As whoever adds columns `row_index` and `epoch` of their own would do it."""
    collator = DataCollatorForUnicoderVLPreTraining(tiny.processor(), STORE)
    plain = [{**PAIRS[0], "row_index": 0, "epoch": 0}]
    assert collator(plain)["matching_labels"].tolist() == [-100] and len(warned) == 1
    assert "matching is unknown, and not learned. PairsWithMismatches(pairs, seed=0)" in warned[0]
    collator(PairsWithMismatches(PAIRS, seed=0).make_rows([0]))
    collator.collate_matches(plain)  # an evaluation, which means it
    assert len(warned) == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_that_never_changes_is_said_once(warned, num_workers, monkeypatch):
    train = PairsWithMismatches(PAIRS, seed=0)
    loader = torch.utils.data.DataLoader(train, batch_size=2, num_workers=num_workers, collate_fn=len)
    if num_workers:  # the warning is one of a worker, so look at what is counted
        list(loader), list(loader)
        assert int(train._given) == 8
        train.set_epoch(1)
        assert int(train._given) == 0
        return
    list(loader)
    assert warned == []
    for _ in range(3):
        train.set_epoch(0)  # which changes nothing
        list(loader)
    assert len(warned) == 1 and "Of 4 rows 8 were asked for in epoch 0, which has not changed" in warned[0]
    for epoch in range(1, 5):
        train.set_epoch(epoch)
        list(loader)
    fixed = PairsWithMismatches(PAIRS, seed=0, fixed_epoch=0)
    for _ in range(5):
        fixed.__getitems__(range(4))
    assert len(warned) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")  # each process sees a half
    train.set_epoch(9)
    for _ in range(2):
        train.__getitems__([0, 1])
    assert len(warned) == 2
