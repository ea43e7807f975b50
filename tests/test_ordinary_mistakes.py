"""Mistakes that people make with models, processors and pipelines: each is said with its name, none gives a number."""

import json

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from transformers import pipeline

from unicoder_vl_hf import (
    RegionRecord,
    UnicoderVLFeatureExtractor,
    UnicoderVLForGrounding,
    UnicoderVLForImageTextRetrieval,
    UnicoderVLForMultipleChoice,
    UnicoderVLForPreTraining,
    UnicoderVLForQuestionAnswering,
    UnicoderVLForVisualReasoning,
)
from unicoder_vl_hf.checkpoints import read_answers
from unicoder_vl_hf.checkpoints.reading import find_source
from unicoder_vl_hf.tasks.vqa.asking import QuestionAnswerer
from unicoder_vl_hf.tasks.vqa.collator import DataCollatorForUnicoderVLQuestionAnswering
from unicoder_vl_hf.tasks.vqa.data import AnswerVocabulary, read_questions
from unicoder_vl_hf.tasks.vqa.submission import check_submission, write_submission


@pytest.mark.parametrize("model_class", [UnicoderVLForGrounding, UnicoderVLForVisualReasoning])
def test_a_checkpoint_of_any_task_carries_its_code(model_class, tmp_path):
    tiny.model(model_class).save_pretrained(tmp_path / "task")
    tiny.model(UnicoderVLForPreTraining).save_pretrained(tmp_path / "other")
    assert (tmp_path / "task" / "modeling_unicoder_vl.py").exists()
    maps = [json.loads((tmp_path / name / "config.json").read_text())["auto_map"] for name in ("task", "other")]
    assert maps[0] == maps[1]


def test_facts_of_other_scores_are_not_kept_where_the_scores_change_at_loading(tmp_path):
    facts = {"first_stage_trained": True, "similarity_weight": 2.0}
    tiny.model(UnicoderVLForImageTextRetrieval, projection_dim=8, **facts).save_pretrained(tmp_path / "narrow")
    loaded = UnicoderVLForImageTextRetrieval.from_pretrained(
        tmp_path / "narrow", projection_dim=4, ignore_mismatched_sizes=True
    )
    assert not loaded.config.first_stage_trained and loaded.config.similarity_weight is None
    options = {"projection_dim": 8, "num_text_layers": 1, "matching_head": "similarity", **facts}
    model = tiny.model(UnicoderVLForImageTextRetrieval, **options)
    model.set_query_bank(*(nn.functional.normalize(torch.randn(number, 8)) for number in (5, 3)))
    model.config.similarity_weight, model.config.calibration = 1.5, {"temperature": 1.0, "threshold": 0.0}
    model.save_pretrained(tmp_path / "bank")
    kept = UnicoderVLForImageTextRetrieval.from_pretrained(tmp_path / "bank").config
    assert kept.similarity_weight == 1.5 and kept.calibration is not None
    without = UnicoderVLForImageTextRetrieval.from_pretrained(tmp_path / "bank", query_bank_size=None).config
    assert without.similarity_weight is None and without.calibration is None and without.first_stage_trained


def test_a_pipeline_scores_with_no_head_that_was_never_trained(tmp_path):
    tiny.model(UnicoderVLForMultipleChoice).save_pretrained(tmp_path / "vcr")
    tiny.model(UnicoderVLForPreTraining).save_pretrained(tmp_path / "trained")
    for name in ("vcr", "trained"):
        tiny.processor().save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=r"vcr is a UnicoderVLForMultipleChoice, whose matching head was never"):
        pipeline("image-text-matching", model=str(tmp_path / "vcr"))
    matcher = pipeline("image-text-matching", model=str(tmp_path / "trained"))
    assert len(matcher([tiny.record("a"), tiny.record("b")], text=["a dog", "a cat"])) == 2
    with pytest.raises(ValueError, match="leave batch_size out"):
        matcher([tiny.record("a"), tiny.record("b")], text=["a dog"], batch_size=2)


CLASSES = [
    UnicoderVLForPreTraining,
    UnicoderVLForImageTextRetrieval,
    UnicoderVLForQuestionAnswering,
    UnicoderVLForGrounding,
]


@pytest.mark.parametrize("model_class", CLASSES)
def test_a_config_may_ask_for_tuples(model_class):
    model = tiny.model(model_class)
    expected = model(**tiny.padded_batch()).to_tuple()
    model.config.return_dict = False
    for found, wanted in zip(model(**tiny.padded_batch()), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_adapters_of_the_first_stage_are_heard():
    """As LoRA's are: layers are called, and not read."""
    model = tiny.model(UnicoderVLForImageTextRetrieval, projection_dim=8, num_text_layers=1)
    called = []
    for name in ("text_projection", "image_projection", "region_attention"):
        layer = getattr(model.first_stage, name)
        layer.register_forward_hook(lambda *_, name=name: called.append(name))
    batch = tiny.padded_batch()
    model.encode_text(**{name: value for name, value in batch.items() if not name.startswith("region")})
    model.encode_image(**{name: value for name, value in batch.items() if name.startswith("region")})
    assert called == ["text_projection", "region_attention", "image_projection"]


# What a processor takes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (7, "text is 7, a int: give a caption"),
        (["a dog", 7], r"text\[1\] is 7, a int: expected a caption"),
        (["a dog", float("nan")], r"text\[1\] is nan, a float: expected a caption"),
        (["a dog", np.float64(1)], r"text\[1\] is np.float64\(1.0\), a float64: expected a caption"),
    ],
)
def test_captions_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        tiny.processor()(text=text, regions=tiny.record(), return_tensors="pt")


def test_an_id_that_a_dict_lacks():
    with pytest.raises(KeyError, match=r"The store has no image 'zzz'\. Nor is it the file of a photo"):
        tiny.processor()(text="a dog", regions="zzz", store={"a": tiny.record("a")}, return_tensors="pt")


@pytest.mark.parametrize("features", [torch.ones(2, 6, requires_grad=True), torch.ones(2, 6, dtype=torch.bfloat16)])
def test_features_that_numpy_does_not_take(features):
    with pytest.raises(ValueError, match=r"'a': features are no array .*give rows of numbers"):
        RegionRecord("a", features=features)


def test_counts_of_regions_that_are_none():
    for name in ("max_regions", "min_regions"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got None"):
            UnicoderVLFeatureExtractor(**{name: None})


# Questions


def test_questions_and_their_image():
    ask = QuestionAnswerer(tiny.model(UnicoderVLForQuestionAnswering, num_labels=5), tiny.processor())
    with pytest.raises(ValueError, match="questions is 'cat', expected several"):
        ask(tiny.record(), "cat")
    with pytest.raises(ValueError, match="There are 2 images; expected one"):
        ask([tiny.record("a"), tiny.record("b")], ["a cat"])


def test_ids_that_are_no_numbers_are_submitted_as_they_are(tmp_path):
    items = [{"question_id": name, "image_id": 1, "question": "a cat ?"} for name in ("q1", "007", 7)]
    (tmp_path / "questions.json").write_text(json.dumps({"questions": items}))
    rows = read_questions(tmp_path / "questions.json")
    write_submission(tmp_path / "answers.json", rows, ["cat"] * 3)
    entries = json.loads((tmp_path / "answers.json").read_text())
    assert [entry["question_id"] for entry in entries] == ["q1", "007", 7]
    assert not list(check_submission(tmp_path / "answers.json", tmp_path / "questions.json"))


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_question_that_is_cut_keeps_the_mask_that_a_head_reads(side):
    processor = tiny.processor()
    processor.tokenizer.padding_side = side
    options = {"max_length": 8, "with_mask_token": True}
    collator = DataCollatorForUnicoderVLQuestionAnswering(
        processor, {"photo": tiny.record()}, AnswerVocabulary(["yes", "no"]), **options
    )
    questions = ["a dog runs on the grass . a cat", "a dog"]
    batch = collator([{"question": text, "image_id": "photo", "answers": []} for text in questions])
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        assert ids[mask].tolist()[-2:] == [processor.tokenizer.mask_token_id, processor.tokenizer.sep_token_id]
    short = batch["input_ids"][1][batch["attention_mask"][1].bool()].tolist()
    assert short[:-2] == processor.tokenizer("a dog")["input_ids"][:-1]


# Other people's files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{bad", r"config\.json, line 1, column 2: malformed json"),
        ("config.json", "[]", r"config\.json holds a list, expected an object"),
    ],
)
def test_side_files_that_are_damaged(name, content, message, tmp_path):
    torch.save({"bert.pooler.dense.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        find_source(tmp_path)


def test_a_card_that_yaml_does_not_read_has_no_licence(tmp_path):
    torch.save({"bert.pooler.dense.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert find_source(tmp_path).licence is None


def test_labels_that_are_no_numbers(tmp_path):
    (tmp_path / "answers.json").write_text('{"yes": [0]}')
    with pytest.raises(ValueError, match=r"answers\.json: .*expected answers with labels, numbers"):
        read_answers(tmp_path / "answers.json")


def test_choices_may_be_tuples_too():
    model = tiny.model(UnicoderVLForMultipleChoice)
    batch = {
        name: value[:, None] if not name.startswith("region") else value for name, value in tiny.padded_batch().items()
    }
    expected = model(**batch).logits
    model.config.return_dict = False
    torch.testing.assert_close(model(**batch)[0], expected)
