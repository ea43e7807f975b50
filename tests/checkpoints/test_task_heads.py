"""The heads that sisters were fine-tuned with, against what their own code computes (../shared/data/sisters)."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from test_importing import SISTERS, TOLERANCE, weights_of, with_sisters, words  # noqa: F401
from transformers import AutoModelForVisualQuestionAnswering

from unicoder_vl_hf import UnicoderVLForGrounding, UnicoderVLForVisualEntailment, UnicoderVLForVisualReasoning
from unicoder_vl_hf.checkpoints import import_checkpoint, read_answers

ANSWERS = ["yes", "no", "2", "red", "blue", "left", "dog"]


def golden(name, region_type):
    """The inputs and outputs of each batch, in our words; rows with regions of another token type are left out."""
    inputs, outputs = (load_file(SISTERS / name / f"{kind}.safetensors") for kind in ("inputs", "outputs"))
    for batch, mode in sorted({tuple(key.split(".")[:2]) for key in outputs}):
        given = {key.partition(".")[2]: value for key, value in inputs.items() if key.startswith(f"{batch}.")}
        arguments = {key: given[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in given}
        rows = torch.ones(len(given["input_ids"]), dtype=torch.bool)
        if mode != "text_only":
            corners = given["boxes"]
            area = (corners[..., 2:] - corners[..., :2]).prod(-1, keepdim=True)
            arguments |= {
                "region_features": given["region_features"],
                "region_locations": torch.cat((corners, area), dim=-1),
                "region_attention_mask": given["region_mask"],
            }
            if "region_token_type_ids" in given:
                rows = ((given["region_token_type_ids"] == region_type) | (given["region_mask"] == 0)).all(1)
        prefix = f"{batch}.{mode}."
        yield arguments, rows, {key.removeprefix(prefix): value for key, value in outputs.items() if prefix in key}


@with_sisters
@pytest.mark.parametrize("name, region_type", [("uniter_vqa", 1), ("visualbert_vqa", 0), ("visualbert_vqa", 1)])
def test_answers_are_those_of_their_own_code(name, region_type, tmp_path, words):  # noqa: F811
    (tmp_path / "answers.json").write_text(json.dumps(ANSWERS))
    options = {"region_type": region_type} if name.startswith("visualbert") else {}
    done = import_checkpoint(
        weights_of(SISTERS / name), tmp_path / "model", tokenizer=words, answers=tmp_path / "answers.json", **options
    )
    assert done.report["class"] == "UnicoderVLForQuestionAnswering" and "answer_head" not in str(done.report["new"])
    assert "no head that tells" not in str(done)
    model = AutoModelForVisualQuestionAnswering.from_pretrained(tmp_path / "model").eval()
    assert [model.config.id2label[label] for label in range(7)] == ANSWERS
    compared = 0
    for padding_free in (False, True):
        model.config.padding_free = padding_free
        for arguments, rows, outputs in golden(name, region_type):
            with torch.no_grad():
                logits = model(**arguments).logits
            difference = (logits - outputs["vqa_logits"]).abs()[rows]
            assert max(difference.flatten().tolist(), default=0.0) <= TOLERANCE
            compared += len(difference)
    assert compared >= 12


@with_sisters
def test_entailment_is_that_of_uniters_own_code_where_it_is_asked_for(tmp_path, words):  # noqa: F811
    done = import_checkpoint(weights_of(SISTERS / "uniter_ve"), tmp_path / "model", tokenizer=words, task="entailment")
    assert done.report["class"] == "UnicoderVLForVisualEntailment"
    model = UnicoderVLForVisualEntailment.from_pretrained(tmp_path / "model").eval()
    assert model.config.id2label == {0: "contradiction", 1: "entailment", 2: "neutral"}
    for arguments, rows, outputs in golden("uniter_ve", 1):
        with torch.no_grad():
            difference = (model(**arguments).logits - outputs["ve_logits"]).abs()[rows]
        assert len(difference) >= 2 and difference.max() <= TOLERANCE
    with pytest.raises(ValueError, match="its head has 7 answers, but 3 are named"):
        import_checkpoint(weights_of(SISTERS / "uniter_vqa"), tmp_path / "x", tokenizer=words, task="entailment")


NLVR2 = {
    "uniter_nlvr2_paired": "paired",
    "uniter_nlvr2_paired_attn": "paired_attention",
    "uniter_nlvr2_triplet": "single",
    "visualbert_nlvr2": "single",
}


@with_sisters
@pytest.mark.parametrize("name", NLVR2)
def test_sentences_about_two_photos_are_judged_as_by_their_own_code(name, tmp_path, words):  # noqa: F811
    done = import_checkpoint(weights_of(SISTERS / name), tmp_path / "model", tokenizer=words)
    assert done.report["class"] == "UnicoderVLForVisualReasoning"
    model = UnicoderVLForVisualReasoning.from_pretrained(tmp_path / "model").eval()
    assert (model.config.reasoning_head, model.config.id2label) == (NLVR2[name], {0: "false", 1: "true"})
    inputs, outputs = (load_file(SISTERS / name / f"{kind}.safetensors") for kind in ("inputs", "outputs"))
    compared = 0
    for batch in sorted({key.split(".")[0] for key in outputs}):
        given = {key.partition(".")[2]: value for key, value in inputs.items() if key.startswith(f"{batch}.")}
        types, mask = given.get("region_token_type_ids"), given["region_mask"]
        text = {key: given[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in given}
        area = (given["boxes"][..., 2:] - given["boxes"][..., :2]).prod(-1, keepdim=True)
        regions = {"region_features": given["region_features"]}
        regions["region_locations"] = torch.cat((given["boxes"], area), dim=-1)
        first = int(name.startswith("uniter"))  # the type of the first photo's regions
        if NLVR2[name] == "single":
            if types is None or not (types == first + 1)[mask == 1].any():
                continue  # all regions of one type, as of one photo
            photos = [mask * (types == first), mask * (types == first + 1)]
            regions = {key: torch.cat((value, value)) for key, value in regions.items()}
            rows = len(mask)
            regions |= {"region_attention_mask": torch.cat(photos), "image_index": torch.arange(2 * rows).view(2, -1).T}
        else:
            assert torch.equal(types[mask == 1], (torch.arange(len(mask)) % 2 + 1)[:, None].expand_as(mask)[mask == 1])
            text = {key: value[::2] for key, value in text.items()}
            regions["region_attention_mask"] = mask
        for padding_free in (False, True):
            model.config.padding_free = padding_free
            with torch.no_grad():
                found = model(**text, **regions).logits
            torch.testing.assert_close(found, outputs[f"{batch}.joint.nlvr2_logits"], rtol=0, atol=TOLERANCE)
            compared += len(found)
    assert compared >= 2
    if name == "visualbert_nlvr2":
        with pytest.raises(ValueError, match=r"region_type is 1: the two photos of .* are of both types"):
            import_checkpoint(weights_of(SISTERS / name), tmp_path / "x", tokenizer=words, region_type=1)


@with_sisters
@pytest.mark.parametrize("name, layers", [("uniter_re", 1), ("uniter_re_mlp2", 2)])
def test_regions_are_scored_as_by_uniters_own_code(name, layers, tmp_path, words):  # noqa: F811
    done = import_checkpoint(weights_of(SISTERS / name), tmp_path / "model", tokenizer=words)
    assert done.report["class"] == "UnicoderVLForGrounding"
    model = UnicoderVLForGrounding.from_pretrained(tmp_path / "model").eval()
    assert model.config.grounding_layers == layers
    for padding_free in (False, True):
        model.config.padding_free = padding_free
        for arguments, rows, outputs in golden(name, 1):
            if "region_features" in arguments:
                with torch.no_grad():
                    found = model(**arguments).logits
                assert rows.all() and (outputs["re_scores"] == -10_000).any()
                torch.testing.assert_close(found, outputs["re_scores"], rtol=0, atol=TOLERANCE)


@with_sisters
@pytest.mark.parametrize("side", ["left", "right"])
def test_visualberts_head_reads_the_last_token_but_one_on_either_side(side, tmp_path, words):  # noqa: F811
    import_checkpoint(weights_of(SISTERS / "visualbert_vqa"), tmp_path / "model", tokenizer=words, region_type=1)
    model = AutoModelForVisualQuestionAnswering.from_pretrained(tmp_path / "model").eval()
    ids = torch.tensor([[1, 7, 9, 3, 2]])
    pad = (2, 0) if side == "left" else (0, 2)
    mask = torch.nn.functional.pad(torch.ones_like(ids), pad)
    with torch.no_grad():
        found = model(torch.nn.functional.pad(ids, pad), attention_mask=mask).logits
        torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=TOLERANCE)


@with_sisters
def test_a_head_of_another_task_or_other_answers_are_refused(tmp_path, words):  # noqa: F811
    source = weights_of(SISTERS / "uniter_pretraining")
    with pytest.raises(ValueError, match="has no head of the task 'vqa' that UNITER has: leave out --task"):
        import_checkpoint(source, tmp_path / "model", tokenizer=words, task="vqa")
    (tmp_path / "answers.txt").write_text("yes\nno\n")
    with pytest.raises(ValueError, match="its head has 7 answers, but 2 are named"):
        import_checkpoint(
            weights_of(SISTERS / "uniter_vqa"),
            tmp_path / "model",
            tokenizer=words,
            answers=tmp_path / "answers.txt",
        )


@pytest.mark.parametrize(
    "name, content",
    [
        ("trainval_ans2label.pkl", {answer: label for label, answer in reversed(list(enumerate(ANSWERS)))}),
        ("trainval_label2ans.pkl", ANSWERS),
        ("ans2label.json", {answer: label for label, answer in enumerate(ANSWERS)}),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_files_of_answers(name, content, protocol, tmp_path):
    data = pickle.dumps(content, protocol) if name.endswith("pkl") else json.dumps(content).encode()
    (tmp_path / name).write_bytes(data)
    assert read_answers(tmp_path / name) == ANSWERS


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.json", b'{"yes": 0, "no": 2}', r"labels \[0, 2\] …; expected 0 to 1, each once"),
        ("a.json", b'{"yes": 0, "no": 0}', "expected 0 to 1, each once"),
        ("a.json", b'["yes", 3]', "holds a list; expected {answer: label} or a list of answers"),
        ("a.json", b'["yes"', r"a.json, line 1, column 7: malformed json"),
        ("a.pkl", pickle.dumps(print), "names builtins.print"),
    ],
)
def test_files_of_something_else_are_refused(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_answers(tmp_path / name)
