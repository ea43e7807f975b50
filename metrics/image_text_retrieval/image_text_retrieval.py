"""Image-text retrieval from a matrix of scores, as a module of `evaluate`; it loads from its folder, offline.

Thin over `unicoder_vl_hf.tasks.retrieval.metrics`, which does the same without `evaluate` and takes memory maps.
"""

import datasets
import evaluate
import numpy as np

try:
    from unicoder_vl_hf.tasks.retrieval.metrics import confidence_intervals, rank_queries, summarize
except ImportError as error:
    raise ImportError("This metric needs unicoder_vl_hf: pip install . in a checkout of unicoder-vl-hf") from error

_DESCRIPTION = """\
Recall@K, median and mean rank, mean average precision and tied ranks, from captions to images and back. Images may have
any number of captions; ties count against the system.
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions: for each caption the scores of all images, higher = better match; ranked in float32.
    references: for each caption the index of its image; every image has at least one caption.
    ks: where to cut the ranking; 1, 5, 10 by default.
    confidence: if given, such as 0.95, also `..._low` and `..._high` of the recalls, mean ranks and mAPs: bootstrap
        intervals that draw images, each with its captions, which are not independent.

Returns:
    `image_retrieval_...` (a caption finds its image) and `text_retrieval_...` (an image finds one of its captions):
    `recall@K` and `map` as fractions, `median_rank` and `mean_rank` from 1, and `tied_ranks`, the number of queries
    with a wrong item that scores exactly as their best right one.

Examples:
    >>> metric = evaluate.load("metrics/image_text_retrieval")
    >>> metric.compute(predictions=[[0.9, 0.1], [0.8, 0.2]], references=[0, 1], ks=[1])["image_retrieval_recall@1"]
    0.5
"""

_CITATION = """\
@inproceedings{li2020unicodervl,
  title     = {Unicoder-VL: A Universal Encoder for Vision and Language by Cross-modal Pre-training},
  author    = {Li, Gen and Duan, Nan and Fang, Yuejian and Gong, Ming and Jiang, Daxin and Zhou, Ming},
  booktitle = {AAAI},
  year      = {2020}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class ImageTextRetrieval(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions, references, ks=(1, 5, 10), confidence=None) -> dict[str, float]:
        lengths = sorted({len(row) for row in predictions})
        if len(lengths) > 1:
            raise ValueError(
                f"predictions have rows of {lengths[:5]} scores; expected one score for each image in all."
            )
        folds = [rank_queries(np.array(predictions, dtype=np.float32), np.array(references))]
        metrics = summarize(folds, ks)
        if confidence is not None:
            for name, (low, high) in confidence_intervals(folds, ks, level=confidence).items():
                metrics |= {f"{name}_low": low, f"{name}_high": high}
        return metrics
