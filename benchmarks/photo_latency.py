"""
CPU time from a photo to its regions, and to its scores, for each family of detectors with random weights.
`OMP_NUM_THREADS=1 python benchmarks/photo_latency.py`
"""

import tempfile
import time
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
    ResNetConfig,
    ResNetForImageClassification,
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

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a dog runs on the grass".split()
SIZE = (640, 480)


def detectors(folder: Path):
    """Yields each detector by name with its options, weights in the folder."""
    ResNetForImageClassification(ResNetConfig()).save_pretrained(folder / "resnet")
    ViTImageProcessor().save_pretrained(folder / "resnet")
    yield "grid, ResNet-50, 448", f"grid:{folder}/resnet", {"image_size": 448}
    model = get_model("fasterrcnn_resnet50_fpn_v2", weights=None, weights_backbone=None)
    torch.save(model.state_dict(), folder / "faster.pth")
    yield "torchvision, v2", "torchvision:fasterrcnn_resnet50_fpn_v2", {"weights": str(folder / "faster.pth")}
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=ResNetConfig(out_features=["stage4"]),
    )
    DetrForObjectDetection(config).save_pretrained(folder / "detr")
    DetrImageProcessor().save_pretrained(folder / "detr")
    yield "transformers, DETR", f"transformers:{folder}/detr", {}


def main():
    torch.manual_seed(0)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as name:
        photo = Path(name, "photo.jpg")
        Image.fromarray(pixels).resize(SIZE).save(photo)
        for title, detector, options in detectors(Path(name)):
            finder = RegionFinder(detector, device="cpu", **options)
            (record,) = finder([photo])  # loads it
            config = UnicoderVLConfig(vocab_size=len(WORDS), region_feature_dim=record.features.shape[1])
            tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
            processor = UnicoderVLProcessor(UnicoderVLFeatureExtractor(), tokenizer)
            processor.set_detector(finder)
            scorer = ImageTextScorer(UnicoderVLForImageTextRetrieval(config).eval(), processor, verbose=False)
            started = time.process_time()
            finder([photo])
            found = time.process_time()
            scorer.score(["a dog runs on the grass", "a dog"], [photo])
            ended = time.process_time()
            print(f"{title:24} {found - started:5.1f} s to {len(record)} regions, {ended - found:5.1f} s to two scores")


if __name__ == "__main__":
    main()
