"""
Speed of a `CrossEncoder` of sentence-transformers beside `ImageTextScorer.score_pairs`: random weights, records and
pairs, in CPU time, which a busy machine does not lengthen. `OMP_NUM_THREADS=1 python benchmarks/cross_encoder.py`
"""

import time

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from transformers import BertTokenizer

from unicoder_vl_hf import (
    ImageTextScorer,
    RegionRecord,
    UnicoderVLConfig,
    UnicoderVLFeatureExtractor,
    UnicoderVLForImageTextRetrieval,
    UnicoderVLProcessor,
)
from unicoder_vl_hf.scoring.cross_encoder import UnicoderVLModule

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK]".split() + [f"word{number}" for number in range(200)]
CAPTIONS, IMAGES, PAIRS, ROUNDS = 64, 64, 512, 2


def main():
    rng = np.random.default_rng(0)
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    torch.manual_seed(0)
    model = UnicoderVLForImageTextRetrieval(UnicoderVLConfig(vocab_size=len(WORDS), **sizes)).eval()
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
    processor = UnicoderVLProcessor(UnicoderVLFeatureExtractor(), tokenizer)
    captions = [" ".join(rng.choice(WORDS[5:], rng.integers(6, 20))) for _ in range(CAPTIONS)]
    store = {
        str(image): RegionRecord(str(image), features=rng.standard_normal((rng.integers(10, 37), 2048)).astype("f4"))
        for image in range(IMAGES)
    }
    processor.set_store(store)
    ids = list(store)
    caption_index, image_index = rng.integers(CAPTIONS, size=PAIRS), rng.integers(IMAGES, size=PAIRS)
    pairs = [(captions[c], ids[i]) for c, i in zip(caption_index, image_index, strict=True)]
    scorer = ImageTextScorer(model, processor, store, verbose=False)
    encoder = CrossEncoder(modules=[UnicoderVLModule(model, processor)], activation_fn=torch.nn.Identity())
    ways = {
        "score_pairs": lambda: scorer.score_pairs(captions, ids, caption_index, image_index),
        "CrossEncoder, 512": lambda: encoder.predict(pairs, batch_size=512),
        "CrossEncoder, 32": lambda: encoder.predict(pairs, batch_size=32),
    }
    expected = ways["score_pairs"]()
    seconds = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started = time.process_time()
            np.testing.assert_allclose(way(), expected, rtol=0, atol=1e-5)
            seconds[name].append(time.process_time() - started)
    best = {name: min(times) for name, times in seconds.items()}
    for name, time_of in best.items():
        print(
            f"{name:20} {PAIRS / time_of:7.1f} pairs a CPU second  {best['score_pairs'] / time_of:4.0%} of score_pairs"
        )


if __name__ == "__main__":
    main()
