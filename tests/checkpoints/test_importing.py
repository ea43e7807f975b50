"""
Imports of sisters' checkpoints, against what their own code computes (../shared/data/sisters), and against VisualBERT
of the installed transformers.
"""

from pathlib import Path

import pytest
import torch
from places import SHARED
from safetensors.torch import load_file

from unicoder_vl_hf import UnicoderVLForPreTraining
from unicoder_vl_hf.checkpoints import import_checkpoint

SISTERS = SHARED / "data" / "sisters"
TOLERANCE = 1e-5
with_sisters = pytest.mark.skipif(not SISTERS.exists(), reason="needs ../shared/data/sisters")


def weights_of(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.name in ("pytorch_model.bin", "checkpoint.safetensors"))


@pytest.fixture(scope="session")
def words(tmp_path_factory) -> str:
    """A folder with a vocabulary of 120 words."""
    folder = tmp_path_factory.mktemp("words")
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *(f"w{number}" for number in range(115))]))
    return str(folder)


# Outputs that ours has no head for.
WITHOUT_PLACE = {"region_regression", "vqa_logits", "ve_logits", "nlvr2_logits", "re_scores", "vcr_logits"}
WITHOUT_PLACE_VOLTA = {"pooler_output", "pooled_text", "pooled_regions", "seq_relationship_logits"}


def import_golden(name: str, path: Path, words: str, **options) -> tuple[UnicoderVLForPreTraining, dict]:
    """Imports a golden checkpoint. New heads are random, and not looked at."""
    done = import_checkpoint(weights_of(SISTERS / name), path, tokenizer=words, **options)
    return UnicoderVLForPreTraining.from_pretrained(path).eval(), done.report


@torch.no_grad()
def differences(model: UnicoderVLForPreTraining, name: str, region_type: int) -> dict[str, float]:
    """
    How far what the model computes is from what the sister's own code computed, by `batch.mode.output`. Rows with
    regions of another token type than `region_type` are left out.
    """
    inputs, outputs = (load_file(SISTERS / name / f"{kind}.safetensors") for kind in ("inputs", "outputs"))
    found = {}
    for batch, mode in sorted({tuple(key.split(".")[:2]) for key in outputs}):
        given = {key.partition(".")[2]: value for key, value in inputs.items() if key.startswith(f"{batch}.")}
        arguments = {key: given.get(key) for key in ("input_ids", "attention_mask", "token_type_ids", "masked_regions")}
        rows = torch.ones(len(given["input_ids"]), dtype=torch.bool)
        if mode != "text_only":
            corners = given["boxes"]
            sizes = corners[..., 2:] - corners[..., :2]
            arguments |= {
                "region_features": given["region_features"],
                "region_locations": torch.cat((corners, sizes.prod(-1, keepdim=True)), dim=-1),
                "region_attention_mask": given["region_mask"],
            }
            if "region_token_type_ids" in given:
                rows = ((given["region_token_type_ids"] == region_type) | (given["region_mask"] == 0)).all(1)
        states, outcome = model.bert(**arguments), model(**arguments, output_hidden_states=True)
        text_size = given["input_ids"].shape[1]
        embeddings = outcome.hidden_states[0].tensor_split((text_size,), dim=1)
        texts, regions = states.last_hidden_state.tensor_split((text_size,), dim=1)
        computed = {
            "text_embeddings": embeddings[0],
            "region_embeddings": embeddings[1],
            "text_states": texts,
            "region_states": regions,
            "pooler_output": states.pooler_output,
            "mlm_logits": outcome.prediction_logits,
            "region_logits": outcome.region_logits,
            "itm_logits": outcome.matching_logits,
            "rank_scores": outcome.scores[:, None],
            "seq_relationship_logits": outcome.matching_logits.flip(1)
            if name.startswith("oscar")
            else outcome.matching_logits,
        }
        masks = {"text": given["attention_mask"], "mlm": given["attention_mask"], "region": given["region_mask"]}
        for key, expected in outputs.items():
            output = key.removeprefix(f"{batch}.{mode}.")
            if output == key or output.endswith("_mask") or output in WITHOUT_PLACE:
                continue
            if name.startswith("volta") and output in WITHOUT_PLACE_VOLTA:
                continue
            difference = (computed[output] - expected).abs()[rows]
            mask = masks.get(output.partition("_")[0])
            if mask is not None:
                difference = difference[mask[rows] == 1]
            found[key] = max(difference.flatten().tolist(), default=0.0)
    return found


GOLDEN = {
    "uniter_pretraining": {},
    "uniter_vqa": {},
    "uniter_ve": {},
    "uniter_nlvr2_paired": {},
    "uniter_nlvr2_paired_attn": {},
    "uniter_nlvr2_triplet": {},
    "uniter_re": {},
    "uniter_re_mlp2": {},
    "uniter_vcr": {},
    "villa_pretraining": {},
    "visualbert_pretraining": {"region_type": 0},
    "visualbert_vqa": {"region_type": 0},
    "visualbert_nlvr2": {"region_type": 0},
    "visualbert_pretraining/1": {"region_type": 1},
    "visualbert_vqa/1": {"region_type": 1},
    "visualbert_nlvr2/1": {"region_type": 1},
    "oscar_img_layernorm": {},
    "volta_uniter": {},
    "volta_visualbert": {},
}


@with_sisters
@pytest.mark.parametrize("case", GOLDEN)
def test_imported_weights_compute_what_their_own_code_computes(case, tmp_path, words):
    name, options = case.partition("/")[0], GOLDEN[case]
    model, _ = import_golden(name, tmp_path / "model", words, **options)
    for padding_free in (False, True):
        model.config.padding_free = padding_free
        found = differences(model, name, options.get("region_type", 1))
        print(case, len(found), max(found.values()))
        assert {key: value for key, value in found.items() if value > TOLERANCE} == {}
