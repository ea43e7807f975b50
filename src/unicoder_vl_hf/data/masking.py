"""
Rules by which words and regions of a row are hidden and become labels (paper, section Pre-training).

Every training with masked tasks draws by these rules. Each row has a generator of its own, made of (seed, epoch, row
index): more workers, more processes, another size of micro-batch or a resume change no example.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..records_unicoder_vl import RegionRecord

SALT = 0x6D61736B  # keeps these draws apart from orders and mismatches that use the same seed
IGNORED = -100  # the label of tokens and regions that are not predicted


@dataclass(frozen=True)
class Masking:
    """
    Rules of masked language modelling and masked object classification.

    Args:
        seed (`int`): Seed of the draws, at least 0.
        mlm_probability (`float`): Share of the tokens that are predicted, in `[0, 1]`.
        mask_replace_prob, random_replace_prob (`float`): Shares of these tokens that become `[MASK]` and a random
            token.
        moc_probability (`float`): Share of the regions of known class that are predicted, in `[0, 1]`.
        region_zero_prob (`float`): Share of these regions whose feature becomes zeros.
        num_region_classes (`int`, *optional*): Number of object classes of the detector, below which ids must be.

    Raises:
        `ValueError`: a share out of range, or a seed below 0.
    """

    seed: int = 0
    mlm_probability: float = 0.15
    mask_replace_prob: float = 1.0
    random_replace_prob: float = 0.0
    moc_probability: float = 0.15
    region_zero_prob: float = 0.9
    num_region_classes: int | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if name.endswith(("_probability", "_prob")) and not 0 <= value <= 1:
                raise ValueError(f"{name}={value}, expected a share in 0..1.")
        if self.mask_replace_prob + self.random_replace_prob > 1:
            raise ValueError(
                f"mask_replace_prob={self.mask_replace_prob} and random_replace_prob={self.random_replace_prob} are "
                "shares of the chosen tokens: together at most 1."
            )
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}, expected at least 0.")

    @property
    def loss_parts(self) -> tuple[str, ...]:
        """The losses of the masked tasks that are on, as the model's output names them."""
        shares = {"mlm_loss": self.mlm_probability, "moc_loss": self.moc_probability}
        return tuple(name for name, share in shares.items() if share > 0)

    def generator(self, row: Mapping[str, Any], slot: int = 0) -> np.random.Generator:
        """
        Makes the generator of the draws of a row, from its `epoch` and `row_index`; `slot` 1 is that of its mismatch.
        """
        return np.random.default_rng([self.seed, row["epoch"], row["row_index"], slot, SALT])

    def hide_tokens(
        self,
        rng: np.random.Generator,
        input_ids: np.ndarray,
        labels: np.ndarray,
        is_word: np.ndarray,
        tokenizer: Any,
        word_ids: Any = None,
    ):
        """
        Chooses tokens of a row, at least one, and hides them in place.

        Args:
            rng (`np.random.Generator`): Generator of the row, see [`~Masking.generator`].
            input_ids, labels (`np.ndarray` of shape `(T,)`): Changed where tokens are chosen.
            is_word (`np.ndarray` of shape `(T,)`, bool): True for the tokens that may be chosen.
            tokenizer: The tokenizer, for its mask token and vocabulary.
            word_ids (sequence of `int` or `None`, *optional*): The word of each token, to choose whole words.
        """
        if self.mlm_probability == 0:
            return
        words = np.flatnonzero(is_word)
        if word_ids is None:
            chosen = words[_choose(rng, len(words), self.mlm_probability)]
        else:
            # Position of each token's word among the words that occur; word ids may have gaps.
            _, word = np.unique([word_ids[position] for position in words], return_inverse=True)
            chosen = words[_choose(rng, word.max() + 1, self.mlm_probability)[word]]
        labels[chosen] = input_ids[chosen]
        fate = rng.random(len(chosen))
        masked = fate < self.mask_replace_prob
        random = ~masked & (fate < self.mask_replace_prob + self.random_replace_prob)
        input_ids[chosen[masked]] = tokenizer.mask_token_id
        input_ids[chosen[random]] = rng.integers(len(tokenizer), size=random.sum())

    def hide_regions(
        self, rng: np.random.Generator, features: np.ndarray, labels: np.ndarray, object_ids: np.ndarray
    ) -> np.ndarray:
        """
        Chooses regions of known class of a row, at least one where there is one, and sets some of their features to
        zeros in place.

        Args:
            rng (`np.random.Generator`): The generator that [`~Masking.hide_tokens`] drew from before.
            features (`np.ndarray` of shape `(R, D)`), labels (`np.ndarray` of shape `(R,)`): Changed where regions are
                chosen.
            object_ids (`np.ndarray` of shape `(R,)`): Object classes, a row of [`~Masking.object_ids`].

        Returns:
            `np.ndarray`: The indices of the regions that are hidden.
        """
        known = np.flatnonzero(object_ids >= 0)
        if self.moc_probability == 0 or len(known) == 0:
            return known[:0]
        chosen = known[_choose(rng, len(known), self.moc_probability)]
        labels[chosen] = object_ids[chosen]
        hidden = chosen[rng.random(len(chosen)) < self.region_zero_prob]
        features[hidden] = 0
        return hidden

    def object_ids(self, records: Sequence[RegionRecord], kept: np.ndarray) -> np.ndarray:
        """
        Gives the object class of each region of a batch, `(B, R)`: -1 for regions without a class and for padding, and
        everywhere where classes are not predicted.

        Args:
            records (sequence of [`RegionRecord`]): The records of the B rows.
            kept (`np.ndarray` of shape `(B, R)`): The index of each region in its record; -1 for padding.

        Raises:
            `ValueError`: a record has no object ids, or one that is not below `num_region_classes`.
        """
        object_ids = np.full_like(kept, -1)
        if self.moc_probability == 0:
            return object_ids
        for record, ids, rows in zip(records, object_ids, kept, strict=True):
            if record.object_ids is None:
                raise ValueError(
                    f"Image {record.image_id!r}: object_ids is None, but masked object classification predicts them. "
                    "Add them to the store with `unicoder-vl label`, or train without (moc_probability=0, --no-moc)."
                )
            rows = rows[rows >= 0]
            ids[: len(rows)] = record.object_ids[rows]
            if self.num_region_classes is not None and ids.max() >= self.num_region_classes:
                raise ValueError(
                    f"Image {record.image_id!r}: object_ids holds {ids.max()}, expected at most "
                    f"{self.num_region_classes - 1} as num_region_classes={self.num_region_classes}. Ids count from 0, "
                    "without background: is the store of another detector?"
                )
        return object_ids


def _choose(rng: np.random.Generator, count: int, probability: float) -> np.ndarray:
    """Chooses each of `count` with `probability`, and one at random where none was chosen."""
    chosen = rng.random(count) < probability
    if not chosen.any():
        chosen[rng.integers(count)] = True
    return chosen
