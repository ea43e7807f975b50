"""
Explains a matching score by gradient x attention, after Chefer, Gur and Wolf, "Generic Attention-model Explainability
for Interpreting Bi-Modal and Encoder-Decoder Transformers" (ICCV 2021), by their rule for an encoder of one stream.

Each position begins relevant to itself alone, R = I. A layer with attention weights A of its heads h mixes positions, R
+= E_h[(dS/dA * A)+] R, where S is the score. In the end the row of a word tells which positions reached it, and the row
of `[CLS]`, which the matching head reads, which reached the score. Left out, as there: what lowered the score, and what
a layer does beside attention. The paper of Unicoder-VL has no such thing.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..modeling_unicoder_vl import UnicoderVLFirstStage
from ..processing_unicoder_vl import RegionInput, UnicoderVLProcessor
from ..records_unicoder_vl import RegionRecord
from .checkpoints import PairModel, scoring_first_stage

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, eq=False)
class Explanation:
    """
    The relevance of a caption's words and an image's regions for their matching score. Relevances are at least 0, and
    can be compared within one array, never between two explanations.

    Attributes:
        score (`float`): The matching score; higher = better match.
        caption (`str`): The caption.
        words (`tuple[str, ...]`): The W words that the model read, as the caption spells them; a punctuation mark is
            one, too.
        record ([`RegionRecord`]): The R regions of the image.
        word_relevance (`np.ndarray` of shape `(W,)`): Relevance of each word for the score, the sum over its pieces.
        region_relevance (`np.ndarray` of shape `(R,)`): Relevance of each region for the score; 0 for one that the
            model did not see.
        relevance_to_words (`np.ndarray` of shape `(W, R)`): Relevance of each region for each word, the mean over its
            pieces, as far as the word then raised the score. A model of one layer has none.
    """

    score: float
    caption: str
    words: tuple[str, ...]
    record: RegionRecord
    word_relevance: np.ndarray
    region_relevance: np.ndarray
    relevance_to_words: np.ndarray

    def html(
        self,
        photo: "Image.Image | None" = None,
        class_names: Sequence[str] | None = None,
        *,
        title: str | None = None,
        probability: float | None = None,
    ) -> str:
        """
        Shows the explanation as HTML that needs no other file.

        Args:
            photo (`PIL.Image.Image`, *optional*): The photo; defaults to a blank page of its shape.
            class_names (sequence of `str`, *optional*): Name of each object id of the record.
            title (`str`, *optional*): Heading. With it the HTML is a page, else a fragment for a page.
            probability (`float`, *optional*): Probability of a match, if the checkpoint is calibrated.

        Raises:
            `ValueError`: the regions have no boxes.
        """
        from ..pictures import blank_page, explanation_html

        certain = "" if probability is None else f", a match with a probability of {probability:.1%}"
        return explanation_html(
            photo or blank_page(self.record), self.record, self.caption, self.words, self.word_relevance,
            self.region_relevance, self.relevance_to_words,
            score=f"score {self.score:+.2f}{certain}", class_names=class_names, title=title,
        )  # fmt: skip


def explain(
    model: PairModel,
    processor: UnicoderVLProcessor,
    image: RegionInput,
    caption: str,
    max_length: int = 44,
) -> Explanation:
    """
    Explains the matching score of a caption with an image, in a forward and a backward pass. Meanwhile the model is in
    evaluation mode and attends in plain PyTorch; its parameters get no gradient.

    Args:
        model ([`UnicoderVLForImageTextRetrieval`] or [`UnicoderVLForPreTraining`]): The model.
        processor ([`UnicoderVLProcessor`]): Its processor, with a fast tokenizer, which knows the place of each piece.
        image (`RegionRecord`, `str`, `os.PathLike` or `PIL.Image.Image`): The image, as the processor takes it.
        caption (`str`): The caption.
        max_length (`int`, *optional*, defaults to 44): Most tokens of the caption; a longer one is cut.

    Raises:
        `ValueError`: the tokenizer is a slow one, or the processor refuses the caption or the image.
    """
    (record,) = processor.load_records(image)
    inputs = processor(text=caption, regions=record, max_length=max_length, return_tensors="pt").to(model.device)
    # Gradients reach the attention of a model all of whose parameters are frozen.
    inputs["region_features"] = inputs["region_features"].to(model.dtype).requires_grad_()
    with _attending_eagerly(model), torch.enable_grad():
        outputs = model(**inputs, output_attentions=True, output_hidden_states=True)
        gradients = torch.autograd.grad(outputs.scores.sum(), outputs.attentions)
    reached = relevance_of_positions(outputs.attentions, gradients)[0].float()
    to_score = reached[0]  # that of `[CLS]`
    if (first_stage := scoring_first_stage(model)) is not None:
        num_tokens = inputs["input_ids"].shape[1]
        states = _states_of_similarity(model, outputs.hidden_states, inputs)
        to_score = to_score + parts_of_similarity(first_stage, states, num_tokens).clamp(min=0) @ reached
    relevance = torch.cat((to_score[None], reached[1:])).cpu().numpy()

    pieces = processor.tokenizer(caption, truncation=True, max_length=max_length)
    words = [word for word in dict.fromkeys(pieces.word_ids()) if word is not None]
    piece_of = np.array([[word == of for of in pieces.word_ids()] for word in words], dtype=np.float32)  # (W, T)
    num_tokens = piece_of.shape[1]
    seen = processor.feature_extractor.select(record)
    to_regions = np.zeros((1 + len(words), len(record)), dtype=np.float32)
    to_regions[:, seen] = np.concatenate(
        (relevance[:1, num_tokens:], piece_of @ relevance[:num_tokens, num_tokens:] / piece_of.sum(1, keepdims=True))
    )
    spans = [pieces.word_to_chars(word) for word in words]
    return Explanation(
        score=outputs.scores.item(),
        caption=caption,
        words=tuple(caption[span.start : span.end] for span in spans),
        record=record,
        word_relevance=piece_of @ relevance[0, :num_tokens],
        region_relevance=to_regions[0],
        relevance_to_words=to_regions[1:],
    )


def parts_of_similarity(first_stage: UnicoderVLFirstStage, states: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """
    Shares out what `matching_head="similarity"` adds to the score of a pair among its positions, `(length,)`, given the
    states of these that it averages, `(length, hidden_size)`: gradient x state, whose sum over a side is about 0, as a
    cosine has no length; above 0 is what the other side resembles.
    """
    words, regions = states.split((num_tokens, len(states) - num_tokens))
    weights = (
        torch.full((num_tokens,), 1 / num_tokens, device=states.device),
        first_stage.weights_of_regions(regions[None], None)[0].detach(),
    )
    means = torch.stack([weight @ side for weight, side in zip(weights, (words, regions), strict=True)])[None]
    means.requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(first_stage.logits_of_means(means).sum(), means)
    parts = zip(weights, (words, regions), gradient[0], strict=True)
    return torch.cat([weight * (side @ of) for weight, side, of in parts])


def relevance_of_positions(attentions: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    Computes the relevance of each position for each, `(batch_size, length, length)`, a row for what was reached, from
    the attention weights of the layers and the gradients of a score for them, `(batch_size, num_heads, length,
    length)`.
    """
    relevance = torch.eye(attentions[-1].shape[-1], dtype=attentions[0].dtype, device=attentions[0].device)[None]
    for weights, gradient in zip(attentions, gradients, strict=True):
        missing = relevance.shape[-1] - weights.shape[-1]  # regions, which no text layer reads
        weights, gradient = (nn.functional.pad(each, (0, missing, 0, missing)) for each in (weights, gradient))
        relevance = relevance + (gradient * weights).clamp(min=0).mean(dim=1) @ relevance
    return relevance.detach()


def _states_of_similarity(
    model: PairModel, hidden_states: Sequence[torch.Tensor], inputs: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Picks the states of a pair that its similarity reads, `(length, hidden_size)`, float32."""
    if (last := model.config.num_text_layers) == 0:
        return torch.stack([layer.detach()[0].float() for layer in hidden_states[:-1]]).mean(0)
    embed = model.bert.embeddings
    regions = embed.add_image_token(embed.embed_regions(inputs["region_features"], inputs["region_locations"]))
    return torch.cat((hidden_states[last][0], regions[0])).detach().float()


@contextmanager
def _attending_eagerly(model: PairModel) -> Iterator[None]:
    """Runs a `with` block in evaluation mode and by the one attention that gives its weights with their graph."""
    was_training, implementation = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        model.train(was_training)
