"""
The work that benchmarks share: captions and images of real sizes, our models beside Hugging Face's VisualBERT, batches
of the same rows for both, the peak of the machine, and turns of the systems within a round.
"""

import contextlib
import io
import logging as python_logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import BertTokenizer, VisualBertConfig, VisualBertForPreTraining, VisualBertModel

from unicoder_vl_hf import (
    ImageTextScorer,
    RegionRecord,
    UnicoderVLConfig,
    UnicoderVLFeatureExtractor,
    UnicoderVLForImageTextRetrieval,
    UnicoderVLForPreTraining,
    UnicoderVLProcessor,
)
from unicoder_vl_hf.scoring.packed import OneDNNLinear

SIZES: dict[str, dict[str, int]] = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = SPECIAL + [f"w{index}" for index in range(1000)]
BERT_VOCABULARY, NUM_CLASSES, FEATURE_DIM = 30522, 1600, 2048

Batch = dict[str, torch.Tensor]


def counts_like(mean: float, low: int, high: int, number: int, rng: np.random.Generator) -> np.ndarray:
    """Whole numbers in [low, high] of this mean, skewed as real ones are, in random order."""
    share = (mean - low) / (high - low)
    # Evenly spaced quantiles of a distribution on [0, 1]: u ** a has the mean 1 / (a + 1).
    quantiles = ((np.arange(number) + 0.5) / number) ** (1 / share - 1)
    return rng.permutation(np.rint(low + quantiles * (high - low)).astype(int))


def record(name: str, number: int, rng: np.random.Generator) -> RegionRecord:
    return RegionRecord(
        name,
        image_width=640,
        image_height=480,
        boxes=np.tile(np.array([[0, 0, 320, 240]], dtype=np.float32), (number, 1)),
        features=rng.standard_normal((number, FEATURE_DIM), dtype=np.float32),
    )


class Job:
    """Captions of 6 to 24 tokens (mean 13, as Flickr8k's) and images of 10 to 100 regions (mean 44)."""

    def __init__(self, num_captions: int, num_images: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        words = counts_like(11, 4, 22, num_captions, rng)  # [CLS] and [SEP] come on top
        self.captions = [" ".join(rng.choice(VOCABULARY[len(SPECIAL) :], number)) for number in words]
        counts = counts_like(44, 10, 100, num_images, rng)
        self.records = [record(f"image {index}", number, rng) for index, number in enumerate(counts)]

    def pairs(self) -> list[tuple[int, int]]:
        """(caption, image), caption by caption."""
        return [(caption, image) for caption in range(len(self.captions)) for image in range(len(self.records))]


def tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={word: index for index, word in enumerate(VOCABULARY)})


def our_scorer(dtype: torch.dtype, size: str = "base", device: str = "cpu") -> ImageTextScorer:
    """New weights behave like trained ones: no operation depends on their values."""
    config = UnicoderVLConfig(vocab_size=len(VOCABULARY), region_feature_dim=FEATURE_DIM, **SIZES[size])
    model = UnicoderVLForImageTextRetrieval(config).eval().to(device)
    processor = UnicoderVLProcessor(UnicoderVLFeatureExtractor(), tokenizer())
    return ImageTextScorer(model, processor, dtype=dtype, verbose=False)


class VisualBert:
    """VisualBERT with a matching head; its inputs lie ready in memory, of the dtype and on the device."""

    def __init__(self, job: Job, dtype: torch.dtype, batch_size: int, size: str = "base", device: str = "cpu"):
        config = VisualBertConfig(vocab_size=len(VOCABULARY), visual_embedding_dim=FEATURE_DIM, **SIZES[size])
        self.model = VisualBertModel(config).eval().to(device, dtype)
        self.head = torch.nn.Linear(config.hidden_size, 2).to(device, dtype)
        self.tokens = [torch.tensor(ids, device=device) for ids in tokenizer()(job.captions)["input_ids"]]
        self.features = [torch.from_numpy(record.features).to(device, dtype) for record in job.records]
        self.batch_size, self.device = batch_size, device

    def length(self, pair: tuple[int, int]) -> int:
        return len(self.tokens[pair[0]]) + len(self.features[pair[1]])

    def batches(self, pairs: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        return [pairs[start : start + self.batch_size] for start in range(0, len(pairs), self.batch_size)]

    def padded_length(self, pairs: list[tuple[int, int]]) -> int:
        """Tokens and regions that go through the encoder, padding included."""
        return sum(
            len(batch) * (max(len(self.tokens[c]) for c, _ in batch) + max(len(self.features[i]) for _, i in batch))
            for batch in self.batches(pairs)
        )

    def sorted(self, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """By total length, or by regions and then tokens: whichever leaves the least padding."""
        tokens, regions = [len(ids) for ids in self.tokens], [len(rows) for rows in self.features]
        orders = [
            sorted(pairs, key=lambda pair: tokens[pair[0]] + regions[pair[1]]),
            sorted(pairs, key=lambda pair: (regions[pair[1]], tokens[pair[0]])),
        ]
        return min(orders, key=self.padded_length)

    def score(self, pairs: list[tuple[int, int]]) -> np.ndarray:
        """The scores of the pairs, in batches of consecutive ones, each padded to its longest."""
        return self.score_padded(map(self.inputs, self.batches(pairs)))

    def score_padded(self, batches: Iterable[Batch]) -> np.ndarray:
        """The scores of batches that `inputs` made."""
        scores = []
        for batch in batches:
            logits = self.head(self.pooled(batch))
            scores.append((logits[:, 1] - logits[:, 0]).float().cpu().numpy())
        return np.concatenate(scores)

    def inputs(self, batch: list[tuple[int, int]]) -> Batch:
        pad = torch.nn.utils.rnn.pad_sequence
        input_ids = pad([self.tokens[c] for c, _ in batch], batch_first=True)
        regions = [torch.ones(len(self.features[i]), device=self.device) for _, i in batch]
        return {
            "input_ids": input_ids,
            "attention_mask": (input_ids != 0).float(),
            "visual_embeds": pad([self.features[i] for _, i in batch], batch_first=True),
            "visual_attention_mask": pad(regions, batch_first=True),
        }

    def pooled(self, inputs: Batch) -> torch.Tensor:
        return self.model(**inputs).pooler_output


class OnnxVisualBert(VisualBert):
    """The same under ONNX Runtime, on one thread, exported by transformers; in float32."""

    def __init__(self, job: Job, batch_size: int, size: str, folder: str):
        import onnxruntime
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        super().__init__(job, torch.float32, batch_size, size)
        sample = self.inputs([(0, image) for image in range(3)])
        pairs, regions = torch.export.Dim("pairs", min=1), torch.export.Dim("regions", min=1)
        tokens = torch.export.Dim("tokens", min=2, max=self.model.config.max_position_embeddings)
        axes = {name: {0: pairs, 1: regions if name.startswith("visual") else tokens} for name in sample}
        python_logging.getLogger("torch.onnx").setLevel("ERROR")  # which warns of every operator that it has twice
        with contextlib.redirect_stdout(io.StringIO()):  # its steps
            OnnxExporter().export(self.model, sample, OnnxConfig(dynamic_shapes=axes)).save_pretrained(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])

    def pooled(self, inputs: Batch) -> torch.Tensor:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        return torch.from_numpy(self.session.run(["pooler_output"], arrays)[0])


class TrainingJob:
    """
    Rows of pre-training, 15 % of tokens and regions to be predicted, as batches of ours and of the rival's: of the same
    rows, with the same targets.
    """

    def __init__(self, num_rows: int, seed: int = 0, vocab_size: int = BERT_VOCABULARY):
        rng = np.random.default_rng(seed)
        self.vocab_size = vocab_size
        self.words = counts_like(13, 6, 24, num_rows, rng)
        self.regions = counts_like(44, 10, 100, num_rows, rng)
        self.seeds = rng.integers(2**31, size=num_rows)

    def lengths(self, rows: Sequence[int]) -> np.ndarray:
        return (self.words + self.regions)[list(rows)]

    def sorted_rows(self) -> list[int]:
        return np.lexsort((self.words, self.regions)).tolist()

    def batch(self, rows: Sequence[int], device: str = "cpu") -> Batch:
        """The arguments of [`UnicoderVLForPreTraining`]."""
        pad, columns = torch.nn.utils.rnn.pad_sequence, []
        for row in rows:
            draw = torch.Generator().manual_seed(int(self.seeds[row]))
            words, regions = int(self.words[row]), int(self.regions[row])
            ids = torch.randint(5, self.vocab_size, (words,), generator=draw)
            classes = torch.randint(NUM_CLASSES, (regions,), generator=draw)
            chosen = [torch.rand(count, generator=draw) < 0.15 for count in (words, regions)]
            columns.append(
                {
                    "input_ids": ids,
                    "attention_mask": torch.ones(words, dtype=torch.long),
                    "region_features": torch.randn(regions, FEATURE_DIM, generator=draw),
                    "region_locations": torch.rand(regions, 5, generator=draw),
                    "region_attention_mask": torch.ones(regions, dtype=torch.long),
                    "labels": torch.where(chosen[0], ids, -100),
                    "region_labels": torch.where(chosen[1], classes, -100),
                }
            )
        batch = {
            name: pad([column[name] for column in columns], True, -100 if "labels" in name else 0)
            for name in columns[0]
        }
        batch["matching_labels"] = torch.arange(len(rows)) % 2
        return {name: tensor.to(device) for name, tensor in batch.items()}

    @staticmethod
    def of_rival(batch: Batch) -> Batch:
        """The same batch for VisualBERT, which predicts tokens and the match; its labels reach over the regions."""
        regions = batch["region_labels"]
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "visual_embeds": batch["region_features"],
            "visual_attention_mask": batch["region_attention_mask"],
            "labels": torch.cat((batch["labels"], torch.full_like(regions, -100)), dim=1),
            "sentence_image_labels": batch["matching_labels"],
        }


class Training:
    """A model with AdamW, whose step is forward, backward, clipping and the optimiser, on a batch that is there."""

    def __init__(self, ours: bool, size: str, dtype: torch.dtype, device: str = "cpu", **fields: Any):
        options: dict[str, Any] = {"vocab_size": BERT_VOCABULARY, **SIZES[size], **fields}
        if ours:
            config = UnicoderVLConfig(
                region_feature_dim=FEATURE_DIM, num_region_classes=NUM_CLASSES, sparse_prediction=True, **options
            )
            self.model: torch.nn.Module = UnicoderVLForPreTraining(config)
        else:
            self.model = VisualBertForPreTraining(VisualBertConfig(visual_embedding_dim=FEATURE_DIM, **options))
        self.model.train().to(device)
        self.dtype, self.device = dtype, device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)

    def loss(self, batch: Batch) -> torch.Tensor:
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.model(**batch).loss

    def forward_backward(self, batch: Batch) -> float:
        loss = self.loss(batch)
        loss.backward()
        return float(loss.detach())

    def step(self, batch: Batch) -> None:
        loss = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def training_flops(size: str, words: np.ndarray, regions: np.ndarray, targets: int) -> float:
    """Operations of forward and backward over real tokens: linear layers, attention, and the heads at the targets."""
    hidden, layers, inner = (SIZES[size][name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    length = (words + regions).astype(float)
    encoder = layers * (2 * length * (4 * hidden**2 + 2 * hidden * inner) + 4 * length**2 * hidden).sum()
    head = 2 * targets * (hidden**2 + hidden * BERT_VOCABULARY)
    features = 2 * float(regions.sum()) * FEATURE_DIM * hidden  # which need no gradient themselves
    return 3 * (encoder + head) + 2 * features


def without_plans_for_shapes(device: str) -> None:
    """
    Leaves SDPA on a GPU to the kernels of PyTorch. On Hopper it may prefer cuDNN's, which make a plan for every new
    shape, tens to hundreds of milliseconds each: without padding nearly every batch is a new shape.
    """
    if device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_turn(systems: dict[str, Callable[[], object]], device: str = "cpu") -> dict[str, float]:
    """Seconds of each system, one after the other."""
    seconds = {}
    for name, run in systems.items():
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        seconds[name] = time.perf_counter() - started
    return seconds


def spread(values: Iterable[float]) -> dict[str, float]:
    """Minimum, median and maximum, to four digits."""
    values = list(values)
    found = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def gemm_peak(dtype: torch.dtype, device: str = "cpu", seconds: float = 1.0) -> float:
    """
    FLOP/s of the fastest linear layer of the sizes that a batch of BERT-base has: 2048 x 768 x 3072 on a CPU, by
    PyTorch's own library or by oneDNN with its own layout; on a GPU of 8192 x 8192 x 8192.
    """
    rows, width, out = (8192, 8192, 8192) if device == "cuda" else (2048, 768, 3072)
    inputs = torch.randn(rows, width, device=device, dtype=dtype)
    linear = torch.nn.Linear(width, out, device=device, dtype=dtype)
    ways: list[Callable[[torch.Tensor], torch.Tensor]] = [linear]
    if device == "cpu" and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        ways.append(OneDNNLinear(linear))
    best = 0.0
    with torch.inference_mode():
        for way in ways:
            way(inputs)
            ends, times = time.perf_counter() + seconds, []
            while time.perf_counter() < ends or len(times) < 3:
                times.append(in_turn({"": lambda way=way: way(inputs)}, device)[""])
            best = max(best, 2 * rows * width * out / statistics.median(times))
    return best


def machine(device: str = "cpu") -> dict[str, object]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    flags = next((line.split() for line in info.splitlines() if line.startswith("flags")), [])
    found: dict[str, object] = {
        "cpu": model or platform.processor(),
        "features": sorted({"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & set(flags)),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_memory": properties.total_memory, "cuda": torch.version.cuda}
    return found
