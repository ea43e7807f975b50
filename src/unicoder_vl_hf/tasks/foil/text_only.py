"""Scorers that see no image: the same model without regions learns which word belongs where another one was put.

The word that differs is hidden, as in pre-training, and told from the words around it. A foil that such a scorer tells
apart is told by guessing, not by looking.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import BertTokenizer

from ... import logging
from ...configuration_unicoder_vl import UnicoderVLConfig
from ...data.foils import Foil
from ...modeling_unicoder_vl import UnicoderVLModel

SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
MIN_COUNT = 3  # occurrences of a word that gets an embedding of its own
WORDS_AROUND = 20  # on either side of the hidden one
BATCH_SIZE = 128  # captions
_WORD = r"\w+|[^\w\s]"
_SALT = 0x666F696C  # keeps these shuffles apart from other draws of the same seed


def hide_word(foil: Foil) -> str:
    """Writes the caption with `[MASK]` where its foil differs; an article that differs, too, becomes "a"."""
    caption, other = (re.findall(_WORD, text.lower()) for text in (foil.caption, foil.foil))
    begin = _common(caption, other)
    end = len(caption) - _common(caption[:begin:-1], other[:begin:-1])
    article = ["a"] if caption[begin] in ("a", "an") and other[begin] in ("a", "an") else []
    before, behind = caption[:begin] + article, caption[end:]
    return " ".join([*before[-WORDS_AROUND:], "[MASK]", *behind[:WORDS_AROUND]])


def _common(words: Sequence[str], others: Sequence[str]) -> int:
    """Counts the words in which two sequences begin alike."""
    for number, (word, other) in enumerate(zip(words, others, strict=False)):
        if word != other:
            return number
    return min(len(words), len(others))


class HiddenWords:
    """
    The distinct captions of foils with the word hidden that differs.

    Args:
        foils (sequence of [`Foil`]): The foils, whose words must all be known.
        numbers (`dict[str, int]`): The number of each word that is known.
        tokenizer (`BertTokenizer`): The tokenizer.
    """

    def __init__(self, foils: Sequence[Foil], numbers: dict[str, int], tokenizer: BertTokenizer):
        texts: dict[str, list[int]] = defaultdict(list)
        for number, foil in enumerate(foils):
            texts[hide_word(foil)].append(number)
        self.foils_of_text = [np.array(of_text) for of_text in texts.values()]
        self.token_ids = tokenizer(list(texts), truncation=True, max_length=512)["input_ids"]
        self.words = np.array([(numbers[foil.word.lower()], numbers[foil.foil_word.lower()]) for foil in foils])


class TextOnlyScorer(nn.Module):
    """
    A scorer of foils that sees no image; [`train_text_only`] trains it.

    Args:
        tokenizer (`BertTokenizer`): The tokenizer.
        words (sequence of `str`): The words that it tells from one another.
    """

    def __init__(self, tokenizer: BertTokenizer, words: Sequence[str]):
        super().__init__()
        self.tokenizer = tokenizer
        self.numbers = {word: number for number, word in enumerate(words)}
        self.bert = UnicoderVLModel(UnicoderVLConfig(**SIZES, vocab_size=len(tokenizer), region_feature_dim=1))
        self.head = nn.Linear(self.bert.config.hidden_size, len(words))

    def knows(self, foil: Foil) -> bool:
        """Tells whether both words of a foil were trained."""
        return {foil.word.lower(), foil.foil_word.lower()} <= self.numbers.keys()

    def forward(self, hidden: HiddenWords, texts: Sequence[int]) -> tuple[np.ndarray, torch.Tensor]:
        """
        Computes by how much the words around prefer the caption.

        Args:
            hidden ([`HiddenWords`]): The captions with a hidden word.
            texts (sequence of `int`): Numbers of some of them.

        Returns:
            The numbers of the foils of these captions, `(num_foils,)`, and a margin of each, of the same shape.
        """
        inputs = self.tokenizer.pad({"input_ids": [hidden.token_ids[text] for text in texts]}, return_tensors="pt")
        states = self.bert(**inputs).last_hidden_state
        logits = self.head(states[inputs["input_ids"] == self.tokenizer.mask_token_id])
        foils = [hidden.foils_of_text[text] for text in texts]
        rows = np.repeat(np.arange(len(texts)), [len(of_text) for of_text in foils])
        numbers = np.concatenate(foils)
        words, others = torch.from_numpy(hidden.words[numbers]).T
        return numbers, logits[rows, words] - logits[rows, others]

    @torch.inference_mode()
    def margins(self, foils: Sequence[Foil]) -> np.ndarray:
        """Scores foils, whose words must all be known: `(num_foils,)`, above 0 where the caption is preferred."""
        hidden = HiddenWords(foils, self.numbers, self.tokenizer)
        margins = np.empty(len(foils), dtype=np.float32)
        for start in range(0, len(hidden.token_ids), BATCH_SIZE):
            numbers, some = self(hidden, range(start, min(start + BATCH_SIZE, len(hidden.token_ids))))
            margins[numbers] = some.numpy()
        return margins


def train_text_only(foils: Sequence[Foil], seed: int, epochs: int = 2, learning_rate: float = 2e-3) -> TextOnlyScorer:
    """
    Trains a scorer to prefer captions to their foils by the words around the one that differs. Each foil counts so much
    that every pair of words is as often one way as the other, so that words alone teach nothing.

    Args:
        foils (sequence of [`Foil`]): The foils of a training split.
        seed (`int`): Seed of weights, dropout and shuffles.
        epochs (`int`, *optional*, defaults to 2): Passes over the captions, in which the learning rate falls to 0.
        learning_rate (`float`, *optional*, defaults to 2e-3): The learning rate of AdamW.

    Returns:
        [`TextOnlyScorer`]: the scorer, in evaluation mode.

    Raises:
        `ValueError`: no word is replaced by another one as well as in its place.
    """
    words = [(foil.word.lower(), foil.foil_word.lower()) for foil in foils]
    counts = Counter(words)
    weights = np.array([min(1.0, counts[other, word] / counts[word, other]) for word, other in words], np.float32)
    foils = [foil for foil, weight in zip(foils, weights, strict=True) if weight > 0]
    weights = weights[weights > 0]
    if not foils:
        raise ValueError("No word of the foils to train on stands in the place of one that stands in its own.")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        scorer = TextOnlyScorer(word_tokenizer(foils), sorted({word for word, other in words if counts[other, word]}))
        hidden = HiddenWords(foils, scorer.numbers, scorer.tokenizer)
        optimizer = torch.optim.AdamW(scorer.parameters(), lr=learning_rate)
        steps = epochs * math.ceil(len(hidden.token_ids) / BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, 10 * step / steps) * (1 - step / steps)
        )
        with logging.tqdm(total=steps, desc=f"Text-only scorer {seed}", unit="step") as progress:
            for epoch in range(epochs):
                order = np.random.default_rng([seed, epoch, _SALT]).permutation(len(hidden.token_ids))
                for start in range(0, len(order), BATCH_SIZE):
                    numbers, margins = scorer(hidden, order[start : start + BATCH_SIZE])
                    counted = torch.from_numpy(weights[numbers])
                    loss = (nn.functional.softplus(-margins) * counted).sum() * steps / (epochs * weights.sum())
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    progress.update()
                progress.set_postfix(loss=f"{loss.item():.3f}")
    return scorer.eval()


def word_tokenizer(foils: Sequence[Foil]) -> BertTokenizer:
    """Makes a tokenizer whose vocabulary is the words of captions that are not rare; it makes letters of others."""
    captions = {foil.caption for foil in foils}
    counts = Counter(word for caption in captions for word in re.findall(_WORD, caption.lower()))
    characters = sorted({character for word in counts for character in word})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word for word in counts if counts[word] >= MIN_COUNT)]
    pieces += [*characters, *(f"##{character}" for character in characters)]
    return BertTokenizer(vocab={piece: number for number, piece in enumerate(dict.fromkeys(pieces))})
