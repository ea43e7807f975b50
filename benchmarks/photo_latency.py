"""
Time from a photo to its regions, and to two scores by a BERT-base, for each family of detectors with random weights, in
CPU time, which a busy machine lengthens less than the clock's. `OMP_NUM_THREADS=1 python benchmarks/photo_latency.py`
prints the table of docs/detectors.md; names that follow choose rows, `onnx` among them, a graph of the BERT-base.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.models import get_model
from transformers import (
    BertTokenizer,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    ViTImageProcessor,
)

from unicoder_vl_hf import (
    ImageTextScorer,
    UnicoderVLConfig,
    UnicoderVLFeatureExtractor,
    UnicoderVLForImageTextRetrieval,
    UnicoderVLProcessor,
)
from unicoder_vl_hf.regions import RegionFinder

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from visual_genome_files import Reference, frcnn_weights, full_yaml, write_files

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a dog runs on the grass".split()
SIZE = (640, 480)
ROUNDS = 3
# The name of a detector, and its options.
Made = tuple[str, dict]


def visual_genome(folder: Path) -> Made:
    write_files(folder, full_yaml(), frcnn_weights(Reference(full_yaml())))
    return f"visual-genome:{folder}", {"preprocess": "caffe"}


def of_torchvision(name: str) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        torch.save(get_model(name, weights=None, weights_backbone=None).state_dict(), folder / "weights.pth")
        return f"torchvision:{name}", {"weights": str(folder / "weights.pth")}

    return make


def saved(family: str, model: Callable, processor: Callable, **options) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        model().save_pretrained(folder)
        processor().save_pretrained(folder)
        return f"{family}:{folder}", options

    return make


def detr() -> DetrForObjectDetection:
    backbone = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    return DetrForObjectDetection(DetrConfig(**backbone, backbone_config=ResNetConfig(out_features=["stage4"])))


DETECTORS: dict[str, Callable[[Path], Made]] = {
    "`visual-genome`, 600 pixels": visual_genome,
    "`torchvision:fasterrcnn_resnet50_fpn_v2`": of_torchvision("fasterrcnn_resnet50_fpn_v2"),
    "`torchvision:fasterrcnn_mobilenet_v3_large_fpn`": of_torchvision("fasterrcnn_mobilenet_v3_large_fpn"),
    "`transformers`, DETR of ResNet-50": saved("transformers", detr, DetrImageProcessor),
    "`transformers`, RT-DETR of ResNet-50": saved(
        "transformers", lambda: RTDetrForObjectDetection(RTDetrConfig()), RTDetrImageProcessor
    ),
    "`grid`, DINOv2 base, 224 pixels": saved(
        "grid", lambda: Dinov2Model(Dinov2Config(image_size=224)), ViTImageProcessor, image_size=224
    ),
    "`grid`, ResNet-50, 448 pixels": saved(
        "grid", lambda: ResNetForImageClassification(ResNetConfig()), ViTImageProcessor, image_size=448
    ),
}


def cpu_time(compute: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        started = time.process_time()
        compute()
        times.append(time.process_time() - started)
    return min(times)


def checkpoint(feature_dim: int) -> tuple[UnicoderVLForImageTextRetrieval, UnicoderVLProcessor]:
    """A BERT-base of random weights, with a tokenizer of few words."""
    model = UnicoderVLForImageTextRetrieval(UnicoderVLConfig(region_feature_dim=feature_dim)).eval()
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
    return model, UnicoderVLProcessor(UnicoderVLFeatureExtractor(), tokenizer)


def measure(title: str, folder: Path, photo: Path) -> None:
    name, options = DETECTORS[title](folder)
    finder = RegionFinder(name, device="cpu", **options)
    (record,) = finder([photo])  # loads it
    model, processor = checkpoint(record.features.shape[1])
    scorer = ImageTextScorer(model, processor, verbose=False)
    found = cpu_time(lambda: finder([photo]))
    scored = cpu_time(lambda: scorer.score(["a dog runs on the grass", "a dog"], finder([photo])))
    print(f"| {title} | {len(record)} | {found:.2f} | {1 / found:.2f} | {scored:.2f} |", flush=True)


def onnx(folder: Path) -> None:
    import onnxruntime

    from unicoder_vl_hf.scoring import onnx_export

    model, processor = checkpoint(2048)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    print(onnx_export.export_onnx(folder / "model", folder / "onnx"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", options)
    print("| pairs | words + regions | CPU seconds by ONNX Runtime | by PyTorch |")
    print("|---|---|---|---|")
    for pairs, tokens, regions in ((1, 20, 36), (16, 20, 36)):
        batch = onnx_export._batch(model, pairs, tokens, regions)
        arrays = {name: tensor.numpy() for name, tensor in batch.items()}
        with torch.inference_mode():
            times = [cpu_time(lambda arrays=arrays: session.run(None, arrays)), cpu_time(lambda b=batch: model(**b))]
        print(f"| {pairs} | {tokens} + {regions} | {times[0]:.3f} | {times[1]:.3f} |", flush=True)


def main(*chosen: str) -> None:
    torch.manual_seed(0)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    print("| detector | regions | CPU seconds a photo | photos a second | CPU seconds to two scores |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        photo = Path(name, "photo.jpg")
        Image.fromarray(pixels).resize(SIZE).save(photo)
        for place, title in enumerate(DETECTORS):
            if not chosen or any(word in title for word in chosen):
                folder = Path(name, str(place))
                folder.mkdir()
                measure(title, folder, photo)
        if not chosen or "onnx" in chosen:
            onnx(Path(name))


if __name__ == "__main__":
    main(*sys.argv[1:])
