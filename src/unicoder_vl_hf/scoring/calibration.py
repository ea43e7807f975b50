"""Makes probabilities of scores, and a yes or no: a temperature and a threshold, fitted on pairs of known truth."""

from dataclasses import dataclass
from typing import Self

import numpy as np

# The inverse of a temperature is sought in this range.
LOWEST, HIGHEST = 1e-4, 1e4
# Half of the pairs are matches, so that this precision is that of guessing, or nearly.
HARDLY_MORE_THAN_GUESSING = 0.55


@dataclass(frozen=True)
class Calibration:
    """
    The meaning of a model's scores, as it was measured on pairs of known truth.

    Attributes:
        temperature (`float`): The score divided by it is the log-odds of a match.
        threshold (`float`): The score from which a pair counts as a match, where F1 was highest.
        precision, recall (`float`): Shares in `[0, 1]`: of the pairs that count as a match, those that are one; of the
            matches, those that count as one.
        num_pairs (`int`): The number of pairs, matches and mismatches.
        weights_sha256 (`str`, *optional*): The digest of the weights that gave the scores.
    """

    temperature: float
    threshold: float
    precision: float
    recall: float
    num_pairs: int
    weights_sha256: str | None = None

    @classmethod
    def fit(cls, scores: np.ndarray, matches: np.ndarray, weights_sha256: str | None = None) -> Self:
        """
        Fits the temperature by likelihood and the threshold by F1.

        Args:
            scores (`np.ndarray` of shape `(P,)`): Scores, higher = better match.
            matches (`np.ndarray` of shape `(P,)`): Whether each pair is a match.
            weights_sha256 (`str`, *optional*): See the class.

        Raises:
            `ValueError`: there are only matches, or only mismatches, matches do not score higher, or a score is not
                finite.
        """
        scores, matches = np.asarray(scores, dtype=np.float64), np.asarray(matches, dtype=bool)
        if matches.all() or not matches.any():
            raise ValueError(f"Of {len(matches)} pairs {matches.sum()} are matches; expected some of each.")
        if not np.isfinite(scores).all():
            raise ValueError(
                f"{(~np.isfinite(scores)).sum()} of {len(scores)} scores are not finite: nothing is fitted."
            )
        signed = np.where(matches, scores, -scores)
        if signed.mean() <= 0:
            raise ValueError(
                "Matches do not score higher than mismatches, so their scores say nothing: train the model further."
            )
        low, high = np.log(LOWEST), np.log(HIGHEST)
        for _ in range(60):  # the slope of the likelihood falls as the inverse temperature grows
            middle = (low + high) / 2
            if (signed * _sigmoid(-signed * np.exp(middle))).mean() > 0:
                low = middle
            else:
                high = middle
        order = np.argsort(-scores, kind="stable")
        found, sorted_scores = matches[order].cumsum(), scores[order]
        ends = np.append(np.flatnonzero(np.diff(sorted_scores)), len(scores) - 1)  # equal scores are told alike
        precision, recall = found[ends] / (ends + 1), found[ends] / matches.sum()
        with np.errstate(invalid="ignore"):
            best = int(np.nanargmax(2 * precision * recall / (precision + recall)))
        edge = ends[best]
        below = sorted_scores[edge + 1] if edge + 1 < len(scores) else sorted_scores[edge]
        return cls(
            temperature=float(np.exp(-middle)),
            threshold=float((sorted_scores[edge] + below) / 2),
            precision=float(precision[best]),
            recall=float(recall[best]),
            num_pairs=len(scores),
            weights_sha256=weights_sha256,
        )

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """Gives the probability of a match, in `(0, 1)`, of each score, as matches and mismatches were as many."""
        return _sigmoid(np.asarray(scores) / self.temperature)

    def __str__(self) -> str:
        return (
            f"Temperature {self.temperature:.4g}; a match from score {self.threshold:+.3f}, with precision "
            f"{self.precision:.1%} and recall {self.recall:.1%} on {self.num_pairs:,} pairs."
            + (" That is hardly more than guessing." if self.precision < HARDLY_MORE_THAN_GUESSING else "")
        )


@dataclass(frozen=True)
class Matching:
    """
    The answer whether captions match images.

    Attributes:
        matches (`np.ndarray` of shape `(C, M)`): True for yes.
        probabilities, scores (`np.ndarray` of shape `(C, M)`): The probability of a match, and the score.
        calibration ([`Calibration`]): The measurement that the answer rests on, with its precision and recall.
    """

    matches: np.ndarray
    probabilities: np.ndarray
    scores: np.ndarray
    calibration: Calibration


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -values))
