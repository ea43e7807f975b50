"""Draws docs/scenes_matching_head.png of the curves in docs/runs, see docs/matching_head.md.

    python benchmarks/matching_head_curves.py

Left the matching loss in training, right how often 60 validation scenes come first for their captions by score alone,
both over the computing that was spent, in steps of the demo's pre-training.
"""

import json
from pathlib import Path

from unicoder_vl_hf.pictures import training_curves

DOCS = Path(__file__).parents[1] / "docs"
PRETRAINED = {"base": "pre-training, 0.02", "p_pre_ft": "pre-training, 0.08"}
FINE_TUNED = {
    "joint": "hard at once, 0.02",
    "j_nomlm": "hard at once, 0.08",
    "j_curr_init02": "random, then hard, 0.02",
    "j_curr": "random, then hard, 0.08",
}


def main():
    curves = {run["name"]: run["curve"] for run in json.loads((DOCS / "runs/scenes_matching_head.json").read_text())}
    rows = [{"step": 0, **{f"{words}: recall@1": 1 / 60 for words in (PRETRAINED | FINE_TUNED).values()}}]
    for name, words in (PRETRAINED | FINE_TUNED).items():
        for point in curves[name]:
            if point["spent"] <= (1000 if name == "p_pre_ft" else 1100):  # where its pre-training ends
                rows.append({"step": point["spent"] * 64 * 22.4 / 1294})  # of that many tokens and regions each
                if name in PRETRAINED:
                    rows[-1][f"{words}: matching loss"] = point["match"]
                if "zero" in point:
                    rows[-1][f"{words}: recall@1"] = point["zero"][0] / 100
    training_curves(
        sorted(rows, key=lambda row: row["step"]), DOCS / "scenes_matching_head.png", title="Scenes, seed 0"
    )


if __name__ == "__main__":
    main()
