"""Random checkpoints under UNITER's own keys, of any size, for tests that need no golden data."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

TINY = {"vocab": 14, "hidden": 16, "layers": 2, "intermediate": 24, "positions": 64, "feature_dim": 6, "classes": 5}
BASE = {
    "vocab": 28996, "hidden": 768, "layers": 12, "intermediate": 3072, "positions": 512, "feature_dim": 2048,
    "classes": 1600,
}  # fmt: skip


def uniter(
    *, vocab: int, hidden: int, layers: int, intermediate: int, positions: int, feature_dim: int, classes: int,
    spread: float = 0.3,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The tensors of a UNITER with the heads of pre-training, in the order of its files."""
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}

    def linear(name, outputs, inputs):
        tensors[f"{name}.weight"] = spread * torch.randn(outputs, inputs)
        tensors[f"{name}.bias"] = spread * torch.randn(outputs)

    def norm(name):
        tensors[f"{name}.weight"] = 1 + spread * torch.randn(hidden)
        tensors[f"{name}.bias"] = spread * torch.randn(hidden)

    for table, rows in (("word", vocab), ("position", positions), ("token_type", 2)):
        tensors[f"uniter.embeddings.{table}_embeddings.weight"] = spread * torch.randn(rows, hidden)
    norm("uniter.embeddings.LayerNorm")
    linear("uniter.img_embeddings.img_linear", hidden, feature_dim)
    linear("uniter.img_embeddings.pos_linear", hidden, 7)
    for name in ("img_layer_norm", "pos_layer_norm", "LayerNorm"):
        norm(f"uniter.img_embeddings.{name}")
    tensors["uniter.img_embeddings.mask_embedding.weight"] = spread * torch.randn(2, feature_dim)
    for number in range(layers):
        layer = f"uniter.encoder.layer.{number}"
        for name in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{name}", hidden, hidden)
        linear(f"{layer}.attention.output.dense", hidden, hidden)
        linear(f"{layer}.intermediate.dense", intermediate, hidden)
        linear(f"{layer}.output.dense", hidden, intermediate)
        norm(f"{layer}.attention.output.LayerNorm")
        norm(f"{layer}.output.LayerNorm")
    linear("uniter.pooler.dense", hidden, hidden)
    tensors["cls.predictions.bias"] = spread * torch.randn(vocab)
    linear("cls.predictions.transform.dense", hidden, hidden)
    norm("cls.predictions.transform.LayerNorm")
    tensors["cls.predictions.decoder.weight"] = tensors["uniter.embeddings.word_embeddings.weight"].clone()
    tensors["feat_regress.weight"] = tensors["uniter.img_embeddings.img_linear.weight"].clone()
    linear("region_classifier.net.0", hidden, hidden)
    norm("region_classifier.net.2")
    linear("region_classifier.net.3", classes + 1, hidden)
    linear("itm_output", 2, hidden)
    return tensors


def save(tensors: dict[str, torch.Tensor], folder: Path, heads: int = 2) -> Path:
    """Saves tensors with the settings that they do not tell."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "uniter", "num_attention_heads": heads}))
    return folder


def save_words(folder: Path, words: list[str]) -> Path:
    """Saves a vocabulary as BERT's first files had it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder
