"""Second-stage pre-training on VCR: what is read, what is masked, and that the script's model goes on to choices."""

import functools

import numpy as np
import pytest
import torch
from transformers import AutoModelForPreTraining
from two_processes import run

from unicoder_vl_hf import UnicoderVLForMultipleChoice
from unicoder_vl_hf.scenes import questions as scenes_vcr
from unicoder_vl_hf.scenes.world import CLASS_NAMES
from unicoder_vl_hf.tasks.vcr.data import read_vcr
from unicoder_vl_hf.tasks.vcr.pretraining import RightTexts, VCRPretrainingArguments, prepare_vcr_pretraining

SMALL = functools.partial(scenes_vcr.build_vcr_scenes, num_train=6, num_val=2, num_test=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vcr") / "run"


@pytest.fixture(scope="module")
def setup(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes_vcr, "build_vcr_scenes", SMALL)
        return prepare_vcr_pretraining(VCRPretrainingArguments(max_length=64), folder, seed=3)


def batch_of(setup, epoch=0, rows=range(12)):
    setup.train.set_epoch(epoch)
    return setup.collator([setup.train[index] for index in rows])


def test_the_text_is_the_right_one_and_points_at_its_regions(setup):
    batch, tokenizer = batch_of(setup), setup.processor.tokenizer
    for number, row in enumerate(setup.train.rows):
        right = [row["question"], *(row[f"{n}_choices"][row[f"{n}_label"]] for n in ("answer", "rationale"))]
        words, pointing = ["[CLS]"], [-1]
        for part in right:
            for token in part:
                names = [token] if isinstance(token, str) else [
                    name for index in token for name in ("and", row["objects"][index])
                ][1:]  # fmt: skip
                words += names
                pointing += [-1] if isinstance(token, str) else [i for index in token for i in (-1, index)][1:]
            words.append(";")
            pointing.append(-1)
        words[-1] = "[SEP]"
        unmasked = torch.where(batch["labels"][number] == -100, batch["input_ids"][number], batch["labels"][number])
        count = int(batch["attention_mask"][number].sum())
        assert tokenizer.convert_ids_to_tokens(unmasked[:count]) == words
        assert batch["token_region_ids"][number, :count].tolist() == pointing


def test_what_is_masked_is_predicted_and_matching_is_unknown(setup):
    batch, tokenizer = batch_of(setup), setup.processor.tokenizer
    masked = batch["labels"] != -100
    assert masked.any(dim=1).all()
    torch.testing.assert_close(batch["input_ids"] == tokenizer.mask_token_id, masked)
    assert not np.isin(batch["labels"][masked], tokenizer.all_special_ids).any()
    assert batch["matching_labels"].tolist() == [-100] * 12
    chosen = batch["region_labels"] != -100
    zeroed = (batch["region_features"] == 0).all(dim=-1) & batch["region_attention_mask"].bool()
    torch.testing.assert_close(batch["masked_regions"] == 1, zeroed)
    assert zeroed.any() and (chosen | ~zeroed).all() and chosen.any(dim=1).all()
    for number, region in chosen.nonzero().tolist():
        objects = setup.train.rows[number]["objects"]
        if region < len(objects):  # ground truth comes first
            assert CLASS_NAMES[batch["region_labels"][number, region]] == objects[region]


def test_masks_follow_the_epoch_and_the_row_alone(setup):
    whole, alone = batch_of(setup, epoch=1), batch_of(setup, epoch=1, rows=[5])
    length = alone["labels"].shape[1]
    torch.testing.assert_close(whole["labels"][5:6, :length], alone["labels"])
    torch.testing.assert_close(whole["region_features"][5:6], alone["region_features"])
    assert not torch.equal(whole["labels"], batch_of(setup, epoch=2)["labels"])
    setup.validation.set_epoch(7)
    assert setup.validation[0]["epoch"] == 0


def test_a_split_without_labels_is_refused(setup, folder):
    world = folder / "_data" / "vcr_scenes"
    with pytest.raises(ValueError, match="annot_id 'test-0' has no answer_label"):
        RightTexts(read_vcr(world / "test.jsonl", metadata_dir=world / "images"))


def test_the_model_goes_on_to_choices(setup, folder, monkeypatch):
    monkeypatch.setattr(scenes_vcr, "build_vcr_scenes", SMALL)
    options = ["--max_steps", "2", "--bf16", "False", "--per_device_train_batch_size", "4", "--disable_tqdm", "true"]
    run("run_vcr_pretraining", ["--output_dir", str(folder), *options])
    assert type(AutoModelForPreTraining.from_pretrained(folder)).__name__ == "UnicoderVLForPreTraining"
    card = (folder / "README.md").read_text()
    assert "- pre-training\n" in card and "| eval_mlm_accuracy |" in card and "| eval_moc_accuracy |" in card
    UnicoderVLForMultipleChoice.from_pretrained(folder)
