"""
Imports of sisters' checkpoints, against what their own code computes (../shared/data/sisters), and against VisualBERT
of the installed transformers.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from places import SHARED
from safetensors.torch import load_file, save_file
from transformers import VisualBertConfig, VisualBertForPreTraining

from unicoder_vl_hf import UnicoderVLForPreTraining
from unicoder_vl_hf.checkpoints import import_checkpoint
from unicoder_vl_hf.checkpoints.importing import account_for
from unicoder_vl_hf.checkpoints.reading import Source, find_source

SISTERS = SHARED / "data" / "sisters"
TOLERANCE = 1e-5
KEYS = SHARED / "data" / "checkpoint_keys"
with_keys = pytest.mark.skipif(not KEYS.exists(), reason="needs ../shared/data/checkpoint_keys")
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
            "seq_relationship_logits": outcome.matching_logits.flip(1 if name.startswith("oscar") else ()),
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


GOLDEN = [
    ("uniter_pretraining", None),
    ("uniter_vqa", None),
    ("uniter_ve", None),
    ("uniter_nlvr2_paired", None),
    ("uniter_nlvr2_paired_attn", None),
    ("uniter_nlvr2_triplet", None),
    ("uniter_re", None),
    ("uniter_re_mlp2", None),
    ("uniter_vcr", None),
    ("villa_pretraining", None),
    ("visualbert_pretraining", None),
    ("visualbert_pretraining", 1),
    ("visualbert_vqa", 0),
    ("visualbert_vqa", 1),
    ("visualbert_nlvr2", None),
    ("oscar_img_layernorm", None),
    ("volta_uniter", None),
    ("volta_visualbert", None),
]


@with_sisters
@pytest.mark.parametrize("name, region_type", GOLDEN)
def test_imported_weights_compute_what_their_own_code_computes(name, region_type, tmp_path, words):
    model, _ = import_golden(name, tmp_path / "model", words, region_type=region_type)
    for padding_free in (False, True):
        model.config.padding_free = padding_free
        # By default the type that VisualBERT's authors trained; the others' regions are of type 1.
        expected = int(not name.startswith("visualbert")) if region_type is None else region_type
        found = differences(model, name, expected)
        assert len(found) >= 16
        assert {output: value for output, value in found.items() if value > TOLERANCE} == {}


@with_sisters
def test_the_head_that_uniter_fine_tunes_for_retrieval_scores(tmp_path, words):
    model, report = import_golden("uniter_itm", tmp_path / "model", words)
    found = differences(model, "uniter_itm", 1)
    assert max(value for output, value in found.items() if not output.endswith("itm_logits")) <= TOLERANCE
    assert report["tensors"]["itm_output.weight"] == "left over: rank_output.weight takes its place"


@with_sisters
def test_without_that_head_the_one_of_pretraining_scores(tmp_path, words):
    tensors = load_file(weights_of(SISTERS / "uniter_itm"))
    (tmp_path / "source").mkdir()
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith("rank_output")}
    save_file(kept, tmp_path / "source" / "model.safetensors")
    shutil.copy(SISTERS / "uniter_itm" / "config.json", tmp_path / "source")
    import_checkpoint(tmp_path / "source", tmp_path / "model", tokenizer=words)
    found = differences(UnicoderVLForPreTraining.from_pretrained(tmp_path / "model").eval(), "uniter_itm", 1)
    assert max(value for output, value in found.items() if not output.endswith("rank_scores")) <= TOLERANCE


@torch.no_grad()
def test_visual_bert_of_the_installed_transformers(tmp_path, words):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    theirs = VisualBertForPreTraining(VisualBertConfig(vocab_size=120, visual_embedding_dim=24, **sizes)).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours", tokenizer=words, region_type=1)
    ours = UnicoderVLForPreTraining.from_pretrained(tmp_path / "ours").eval()
    text = {"input_ids": torch.randint(5, 120, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    text["attention_mask"][1, 4:] = 0
    features, mask = torch.randn(3, 5, 24), torch.ones(3, 5, dtype=torch.long)
    mask[2, 3:] = 0
    expected = theirs(**text, visual_embeds=features, visual_attention_mask=mask)
    found = ours(**text, region_features=features, region_locations=torch.rand(3, 5, 5), region_attention_mask=mask)
    real = text["attention_mask"] == 1
    words_of_theirs = expected.prediction_logits[:, :7]
    torch.testing.assert_close(found.prediction_logits[real], words_of_theirs[real], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found.matching_logits, expected.seq_relationship_logits, rtol=0, atol=TOLERANCE)


# Every tensor is accounted for

SMALL = {768: 8, 1024: 10, 1536: 16, 2048: 12, 2054: 18, 3072: 20, 512: 6, 1601: 4}
IMPORTABLE = [
    "oscar-base-img-layernorm",
    "oscar-base-retrieval",
    *(f"{family}-base{task}" for family in ("uniter", "villa") for task in ("", "-itm", "-vcr")),
    "visualbert-hf",
    "visualbert-hf-vcr",
    "volta-uniter",
    "volta-visualbert",
]


def shrunk(name: str, folder: Path) -> Source:
    """A published checkpoint with all its keys, and dimensions of a few numbers."""
    shapes = json.loads((KEYS / f"{name}.json").read_text())
    tensors = {key: torch.zeros([SMALL.get(size, min(size, 30)) for size in shape]) for key, shape in shapes.items()}
    return save_source(tensors, folder)


def save_source(tensors: dict[str, torch.Tensor], folder: Path) -> Source:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"num_attention_heads": 2}')
    return find_source(folder)


@with_keys
@pytest.mark.parametrize("name", IMPORTABLE)
def test_every_tensor_of_a_published_checkpoint_is_accounted_for(name, tmp_path):
    source = shrunk(name, tmp_path)
    account = account_for(source)
    assert account.said.keys() == source.tensors().keys()
    used = {key for keys in account.origins.values() for key in keys}
    assert used == {key for key, said in account.said.items() if not said.startswith(("left over", "copy of"))}


@with_keys
@pytest.mark.parametrize(
    "name, message",
    [
        ("oscar-base", "Oscar without a LayerNorm of its regions (use_img_layernorm), which ours always has (bert.img"),
        ("vl-bert", "VL-BERT, whose every word"),
        ("volta-vl-bert", "VL-BERT, whose every word"),
        ("volta-vl-bert-original", "VL-BERT, whose every word"),
        ("volta-vilbert", "ViLBERT, two encoders"),
        ("volta-vilbert-original", "ViLBERT, two encoders"),
        (
            "vinvl-base",
            "cls.seq_relationship.bias (3,) has no exact place here; --approximate would take rows 2",
        ),
    ],
)
def test_what_has_no_place_is_refused_by_name(name, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        account_for(shrunk(name, tmp_path))


@with_keys
def test_vinvls_matching_is_taken_where_nearly_right_is_asked_for(tmp_path):
    source = shrunk("vinvl-base", tmp_path)
    tensors = source.tensors() | {"cls.seq_relationship.bias": torch.tensor([0.5, 1.5, 2.5])}
    account = account_for(save_source(tensors, tmp_path), approximate=True)
    assert account.weights["matching_head.bias"].tolist() == [2.5, 0.5]
    assert "rows 2 (wrong caption) and 0 (match)" in account.said["cls.seq_relationship.bias"]
