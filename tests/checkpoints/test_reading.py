"""What people have as a checkpoint, read alike in every packaging; and each fault with its message."""

import pickle
import re

import pytest
import sister_files
import tiny
import torch
from safetensors.torch import save_file

from unicoder_vl_hf import UnicoderVLForPreTraining, UnicoderVLProcessor
from unicoder_vl_hf.checkpoints import import_checkpoint, inspect_checkpoint
from unicoder_vl_hf.checkpoints.importing import account_for
from unicoder_vl_hf.checkpoints.reading import find_source

WORD = "uniter.embeddings.word_embeddings.weight"


@pytest.fixture
def tensors():
    return sister_files.uniter(**sister_files.TINY)


@pytest.fixture
def words(tmp_path):
    return str(sister_files.save_words(tmp_path / "words", tiny.WORDS))


def assert_same_weights(found, expected):
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=0)


# Packagings


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"module.{key}",
        lambda key: key.replace("uniter.", "bert."),
        lambda key: key.replace("uniter.", ""),
        lambda key: f"model.vl.{key}",
        lambda key: key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
    ],
    ids=["module", "bert", "bare", "deep", "gamma"],
)
def test_keys_are_known_by_how_they_end(rename, tensors, tmp_path):
    expected = account_for(find_source(sister_files.save(tensors, tmp_path / "plain")))
    renamed = {rename(key): tensor for key, tensor in tensors.items()}
    found = account_for(find_source(sister_files.save(renamed, tmp_path / "renamed")))
    assert_same_weights(found, expected)
    assert found.said.keys() == renamed.keys()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "uniter-base.pt"])
@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
def test_files_of_pytorch(name, nested, tensors, tmp_path):
    expected = account_for(find_source(sister_files.save(tensors, tmp_path / "plain")))
    folder = sister_files.save({}, tmp_path / "other")
    (folder / "model.safetensors").unlink()
    torch.save(tensors if nested is None else {nested: tensors, "epoch": 3}, folder / name)
    torch.save({}, folder / "optimizer.pt")
    torch.save({}, folder / "training_args.bin")
    assert_same_weights(account_for(find_source(folder)), expected)
    assert_same_weights(account_for(find_source(folder / name)), expected)


def test_weights_in_several_files(tensors, tmp_path):
    expected = account_for(find_source(sister_files.save(tensors, tmp_path / "plain")))
    keys = sorted(tensors)
    folder = sister_files.save({key: tensors[key] for key in keys[::2]}, tmp_path / "parts")
    save_file({key: tensors[key] for key in keys[1::2]}, folder / "model-2.safetensors")
    with pytest.raises(
        ValueError, match=r"holds several checkpoints, model-2.safetensors, model.safetensors: give one"
    ):
        find_source(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert_same_weights(account_for(find_source(folder)), expected)


def test_half_precision_becomes_float32(tensors, tmp_path):
    half = {key: tensor.half() for key, tensor in tensors.items()}
    found = account_for(find_source(sister_files.save(half, tmp_path / "half")))
    assert {weight.dtype for weight in found.weights.values()} == {torch.float32}


# The vocabulary


@pytest.mark.parametrize("first, expected", [("Dog", ["Dog", "runs"]), ("dog", ["dog", "runs"])])
def test_words_with_capitals_make_a_cased_vocabulary(first, expected, tensors, tmp_path):
    changed = [first if word == "dog" else word for word in tiny.WORDS]
    source = sister_files.save_words(sister_files.save(tensors, tmp_path / "source"), changed)
    done = import_checkpoint(source, tmp_path / "out")
    assert done.report["tokenizer"] == "its own"
    tokenizer = UnicoderVLProcessor.from_pretrained(tmp_path / "out").tokenizer
    assert tokenizer.tokenize("Dog runs") == expected


def test_a_checkpoint_without_words_says_which_to_give(tensors, tmp_path, words, monkeypatch):
    source = sister_files.save(tensors, tmp_path / "source")
    with pytest.raises(ValueError, match=r"its 14 words are not those of a BERT, .* --tokenizer FOLDER or REPOSITORY"):
        import_checkpoint(source, tmp_path / "out")
    few = sister_files.save_words(tmp_path / "more", [*tiny.WORDS, "more"])
    with pytest.raises(ValueError, match=r"more has 15 tokens, but .*source 14 words"):
        import_checkpoint(source, tmp_path / "out", tokenizer=str(few))
    with pytest.raises(ValueError, match=r"There is no .*none: "):
        import_checkpoint(source, tmp_path / "out", tokenizer=str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for origin in (str(source), "someone/words"):
        with pytest.raises(ValueError, match=f"the words of {origin}, which cannot be loaded here .it gives no words"):
            import_checkpoint(source, tmp_path / "out", tokenizer=origin)
    assert not (tmp_path / "out").exists()
    assert import_checkpoint(source, tmp_path / "out", tokenizer=words).report["tokenizer"] == words


# What is written


def test_the_folder_has_model_processor_report_and_card(tensors, tmp_path, words):
    source = sister_files.save(tensors, tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: mit\n---\nA card.")
    import_checkpoint(source, tmp_path / "out", tokenizer=words)
    loaded, report = UnicoderVLForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    config = loaded.config
    assert (config.region_embedding, config.region_head, config.num_region_classes) == ("uniter", "uniter", 5)
    extractor = UnicoderVLProcessor.from_pretrained(tmp_path / "out").feature_extractor
    assert extractor.region_provenance == {"feature_dim": 6, "num_classes": 5, "box_type": "proposal"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card and "Width of a feature: 6" in card and "copied: " in card
    with pytest.raises(ValueError, match="out exists already"):
        import_checkpoint(source, tmp_path / "out", tokenizer=words)


def test_heads_that_are_new_are_not_written(tensors, tmp_path, words):
    kept = {key: tensor for key, tensor in tensors.items() if key.startswith(("uniter.", "cls."))}
    done = import_checkpoint(sister_files.save(kept, tmp_path / "source"), tmp_path / "out", tokenizer=words)
    assert done.report["class"] == "UnicoderVLForPreTraining"
    assert "fine-tune it before you score" in str(done)
    _, report = UnicoderVLForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {key.split(".")[0] for key in report["missing_keys"]} == {"region_head", "matching_head"}


def test_bert_brings_no_regions(tmp_path, words):
    from transformers import BertConfig, BertForPreTraining

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertForPreTraining(BertConfig(vocab_size=14, **sizes)).save_pretrained(tmp_path / "bert")
    done = import_checkpoint(tmp_path / "bert", tmp_path / "out", tokenizer=words)
    assert done.report["architecture"] == "BERT"
    assert done.report["tensors"]["cls.seq_relationship.bias"].startswith("left over: next sentence prediction")
    assert {name.split(".")[0] for name in done.report["new"]} == {"bert", "matching_head", "region_head"}


# Faults of a checkpoint


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"uniter.encoder.layer.0.crossattention.weight": (2,)},
            r"has tensors that UNITER has not, .* 1 in all: uniter.*layer.0.crossatt",
        ),
        ({"itm_output.weight": (3, 16)}, r"itm_output.weight makes matching_head.weight \(3, 16\), expected \(2, 16\)"),
        (
            {"uniter.img_embeddings.pos_linear.weight": (16, 5)},
            r"pos_linear.weight makes .* \(16, 5\), expected \(16, 7\)",
        ),
        (
            {"uniter.img_embeddings.mask_embedding.weight": (1, 6)},
            r"mask_embedding.weight has shape \(1, 6\), which UNITER",
        ),
        ({"uniter.encoder.layer.1.output.dense.bias": None}, r"nothing for bert.encoder.layer.1.output.dense.bias"),
        (
            {"uniter.embeddings.token_type_embeddings.weight": None},
            r"nothing for 'bert.embeddings.token_type_embeddings",
        ),
        (
            {"cls.predictions.decoder.weight": (14, 16)},
            r"decoder.weight differs from uniter.embeddings.word_embeddings",
        ),
        (
            {"module.itm_output.bias": (2,), "module.uniter.x": (2,)},
            "UNITER has not, or not in this shape, 2 in all: module.itm_output.bias",
        ),
        ({"uniter.embeddings.LayerNorm.gamma": (16,)}, r"LayerNorm.gamma and .*LayerNorm.weight, which mean the same"),
        ({"uniter.img_embeddings.img_linear.weight": None}, "tensors that BERT has not"),
    ],
)
def test_what_is_unknown_or_lacks_is_named(change, message, tensors, tmp_path, words):
    for key, shape in change.items():
        tensors.pop(key, None)
        if shape is not None:
            tensors[key] = torch.ones(shape)
    source = sister_files.save(tensors, tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        import_checkpoint(source, tmp_path / "out", tokenizer=words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"family": "oscar"}, r"is UNITER by its keys \(uniter.img_embeddings.img_linear.weight\), not oscar"),
        ({"region_type": 1}, "region_type is 1: only a VisualBERT has it, 0 or 1; this is UNITER"),
        ({"revision": "main"}, "is on this disk and has no revision 'main'"),
    ],
)
def test_options_that_do_not_fit(options, message, tensors, tmp_path, words):
    source = sister_files.save(tensors, tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        import_checkpoint(source, tmp_path / "out", tokenizer=words, **options)
    assert (
        import_checkpoint(source, tmp_path / "out", tokenizer=words, family="villa").report["architecture"] == "VILLA"
    )


def test_heads_of_a_layer_are_asked_for(tensors, tmp_path, words):
    source = sister_files.save(tensors, tmp_path / "source")
    (source / "config.json").unlink()
    with pytest.raises(ValueError, match=r"tensors do not tell the heads of a layer: give their number, --heads 12"):
        import_checkpoint(source, tmp_path / "out", tokenizer=words)
    with pytest.raises(ValueError, match=r"hidden_size=16 is not a multiple of num_attention_heads=5"):
        import_checkpoint(source, tmp_path / "out", tokenizer=words, num_attention_heads=5)
    import_checkpoint(source, tmp_path / "out", tokenizer=words, num_attention_heads=4)
    assert UnicoderVLForPreTraining.from_pretrained(tmp_path / "out").config.num_attention_heads == 4


class Stranger:
    def __reduce__(self):
        return print, ("this code ran",)


def test_files_that_are_no_weights(tmp_path, capsys):
    folder = tmp_path / "source"
    folder.mkdir()
    for content, message in (
        (pickle.dumps(Stranger(), protocol=2), "holds more than tensors, and is not opened"),
        (b"nothing", "is damaged, or no file of weights|holds more than tensors"),
        (b"", "is damaged, or no file of weights"),
    ):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match=f"pytorch_model.bin ({message})"):
            account_for(find_source(folder))
    assert "ran" not in capsys.readouterr().out
    torch.save({"lr": 0.1}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds 'lr', a float; expected a state dict"):
        account_for(find_source(folder))
    torch.save([1], folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds list; expected a state dict"):
        account_for(find_source(folder))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"source holds no weights of PyTorch"):
        find_source(folder)
    with pytest.raises(ValueError, match=r"There is no .*none: .* holds no 'none'"):
        find_source(tmp_path / "none")
    (folder / "model.safetensors").write_bytes(b"nothing here")
    with pytest.raises(ValueError, match=r"model.safetensors is damaged, or no file of weights"):
        account_for(find_source(folder))


# A look into any folder


def test_a_look_into_what_could_be_imported(tensors, tmp_path):
    told = inspect_checkpoint(sister_files.save(tensors, tmp_path / "source"))
    assert "source: UNITER, " in told and "unicoder-vl import-checkpoint" in told


def test_a_look_into_what_could_not(tensors, tmp_path):
    told = inspect_checkpoint(sister_files.save(tensors | {"x.y.z": torch.ones(3)}, tmp_path / "source"))
    assert "UNITER has not, or not in this shape, 1 in all: x.y.z (3,)" in told
    assert re.search(r"^  x\.y\.\*: 3$", told, re.MULTILINE)


def test_a_look_into_one_of_ours(tensors, tmp_path, words):
    import_checkpoint(sister_files.save(tensors, tmp_path / "source"), tmp_path / "out", tokenizer=words)
    told = inspect_checkpoint(tmp_path / "out")
    assert "Unicoder-VL, saved by UnicoderVLForPreTraining" in told
    assert "region_embedding: uniter" in told and "regions, box_type: proposal" in told and "imported, " in told
    tiny.model(UnicoderVLForPreTraining).save_pretrained(tmp_path / "ours")
    assert "region_head.*: 85" in (told := inspect_checkpoint(tmp_path / "ours")) and "imported" not in told
