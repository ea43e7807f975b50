"""A few rendered scenes and a tiny BERT on disk, for the tests of pre-training."""

from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM

from unicoder_vl_hf import UnicoderVLForImageTextRetrieval
from unicoder_vl_hf.runs.arguments import DataArguments
from unicoder_vl_hf.runs.setup import load_model, load_processor, open_data
from unicoder_vl_hf.scenes.world import build_scenes, scene_tokenizer

# 40 training images of 2 captions: 20 steps of 4 pairs an epoch.
NUM_TRAIN_PAIRS, NUM_VALIDATION_PAIRS = 80, 20


def build(folder: Path) -> Path:
    return build_scenes(folder / "world", num_train=40, num_val=10, num_test=5, captions_per_image=2)


def save_bert(folder: Path, *, dropout: float, vocab_size: int | None = None) -> Path:
    """A BERT of 2 layers and the scenes' vocabulary, filled up to `vocab_size`."""
    tokenizer = scene_tokenizer()
    if vocab_size is not None:
        tokenizer.add_tokens([f"[unused{index}]" for index in range(vocab_size - len(tokenizer))])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_retrieval(folder: Path, world: Path, spread: float | None = None, **fields) -> tuple[str, str, str]:
    """A retrieval checkpoint for the world, of new weights, or all of them of this spread; with its data."""
    arguments = DataArguments(
        captions=str(world / "captions.jsonl"),
        regions=str(world / "regions"),
        model_name_or_path=str(save_bert(folder.with_name("bert"), dropout=0.0)),
    )
    data = open_data(arguments, folder.parent)
    torch.manual_seed(0)
    model = load_model(arguments, data.store, UnicoderVLForImageTextRetrieval, **fields)
    if spread is not None:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=spread)
    model.save_pretrained(folder)
    load_processor(arguments, data).save_pretrained(folder)
    return str(folder), str(arguments.captions), str(arguments.regions)


def save_lively_bert(folder: Path) -> Path:
    """One with larger weights: from those of `save_bert` small models learn nothing for hundreds of steps."""
    save_bert(folder, dropout=0.0)
    model = BertForMaskedLM.from_pretrained(folder)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


def arguments(world: Path, bert: Path, output_dir: Path, **options) -> list[str]:
    """The command line of either script: `options` by name, True for a bare flag."""
    values = {"captions": world / "captions.jsonl", "regions": world / "regions", "model_name_or_path": bert}
    values |= {"output_dir": output_dir} | options
    pairs = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in values.items()]
    return [word for pair in pairs for word in pair]
