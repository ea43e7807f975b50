# Copyright 2026 The unicoder-vl-hf contributors. SPDX-License-Identifier: Apache-2.0
"""Unicoder-VL in PyTorch: one BERT encoder over WordPiece tokens and detected image regions.

Follows Li et al., "Unicoder-VL: A Universal Encoder for Vision and Language by Cross-modal Pre-training" (AAAI 2020):
the embeddings (section Linguistic and Image Embedding), the three pre-training tasks, and the heads of its two
downstream tasks. Modules that BERT has keep BERT's names, and the text path equals BERT's. Left out: everything that
makes BERT a decoder.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MultipleChoiceModelOutput,
    SequenceClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.bert import BertConfig, BertForPreTraining
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, logging
from transformers.utils.generic import can_return_tuple, is_flash_attention_requested, maybe_autocast
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .configuration_unicoder_vl import UnicoderVLConfig

logger = logging.get_logger(__name__)

# Attention weights of a call from which bfloat16 is trained by products of matrices, see `attend_by_products`. Measured
# on AVX512-BF16, heads of size 32 and 64, forward and backward, against SDPA in float32: 1.5 times as slow at 19,000
# weights, 1.1 to 2.5 times as fast from 39,000 on.
BF16_PRODUCTS_FROM_WEIGHTS = 32_768
# In buckets, see `attend_in_buckets`, sequences are filled up to a multiple of this length, and a call that is saved is
# worth so many weights more. Measured on AMX, hidden size 384 and 768: a call 2 ms, a weight 15 ns.
BUCKET_LENGTHS = 16
WEIGHTS_OF_A_CALL = 131_072

# An optional argument stays optional, a tensor a tensor.
MaybeTensor = TypeVar("MaybeTensor", torch.Tensor, torch.Tensor | None)


INPUTS_DOCSTRING = r"""
    region_features (`torch.Tensor` of shape `(batch_size, num_regions, region_feature_dim)`, *optional*):
        Detector features of the regions, of any floating dtype (cast to the model's). Needs `region_locations`.
    region_locations (`torch.Tensor` of shape `(batch_size, num_regions, 5)`, *optional*):
        Location of each region, `(x1/W, y1/H, x2/W, y2/H, area/(W*H))`, each in `[0, 1]`; zeros where it is unknown.
    region_attention_mask (`torch.Tensor` of shape `(batch_size, num_regions)`, *optional*):
        1 for a region, 0 for padding. Defaults to ones.
    token_region_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
        The region of the row that a token refers to: its embedding is added to the token's (paper, Visual Commonsense
        Reasoning). An index in `[0, num_regions)`, or -1 for none. Defaults to -1.
"""

MASKED_REGIONS_DOCSTRING = r"""
    masked_regions (`torch.Tensor` of shape `(batch_size, num_regions)`, *optional*):
        1 for a region whose feature is hidden from the model, which still knows its location; 0 for others, the
        default. Zeros take its place (paper, Pre-training Tasks), or a vector that was learned, see
        `config.region_embedding`.
"""

REGION_TYPES_DOCSTRING = r"""
    region_token_type_ids (`torch.LongTensor` of shape `(batch_size, num_regions)`, *optional*):
        Type of each region, which tells the photos of a pair apart: of UNITER's token types, by default 1, or below
        `config.num_region_types`, by default 0.
"""

WORD_STATES_DOCSTRING = r"""
    word_states (`torch.Tensor` of shape `(num_captions, sequence_length, hidden_size)`, *optional*):
        What [`~UnicoderVLModel.encode_words`] made of the text, so that the text layers are not computed again.
"""

JOINT_MASK_DOCSTRING = r"""
    joint_attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length + num_regions)`, *optional*):
        1 for the words and regions that the layers which read both see, where the other masks have a 1, too; the text
        layers, if there are any, have read all words. Each row's first token, `[CLS]`, must be seen. Defaults to all.
"""

PAIRING_DOCSTRING = r"""
    caption_index (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
        Row b takes caption `caption_index[b]` of the `num_captions` rows of `input_ids`, so that a caption that several
        rows share is embedded once. Defaults to row b with caption b.
    image_index (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
        Row b takes image `image_index[b]` of the `num_images` rows of `region_features`. Defaults to row b with image
        b.
"""


@dataclass
class UnicoderVLForPreTrainingOutput(ModelOutput):
    r"""
    Output of [`UnicoderVLForPreTraining`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned with any label):
            Sum of those of the three parts below that labels were given for.
        prediction_logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`):
            Logits of masked language modelling; `(num_counted_tokens, vocab_size)` where they are sparse, see
            `config.sparse_prediction`.
        region_logits (`torch.Tensor` of shape `(batch_size, num_regions, num_region_classes)`, *optional*):
            Logits of masked object classification; `None` without regions. UNITER's head has one more, the first, of
            background.
        matching_logits (`torch.Tensor` of shape `(batch_size, 2)`):
            Logits of visual-linguistic matching, index 1 = match.
        scores (`torch.Tensor` of shape `(batch_size,)`):
            `matching_logits[:, 1] - matching_logits[:, 0]`, float32; higher = better match.
        mlm_loss, moc_loss, matching_loss (`torch.Tensor` of shape `()`, *optional*):
            The parts of the loss, each a mean over all rows of the batch.
        hidden_states (`tuple(torch.Tensor)`, *optional*):
            States `(batch_size, sequence_length + num_regions, hidden_size)` of the embeddings and of each layer.
        attentions (`tuple(torch.Tensor)`, *optional*):
            Weights `(batch_size, num_heads, sequence_length + num_regions, sequence_length + num_regions)` of each
            layer.
    """

    loss: torch.Tensor | None = None
    prediction_logits: torch.Tensor | None = None
    region_logits: torch.Tensor | None = None
    matching_logits: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    mlm_loss: torch.Tensor | None = None
    moc_loss: torch.Tensor | None = None
    matching_loss: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class UnicoderVLForImageTextRetrievalOutput(ModelOutput):
    r"""
    Output of [`UnicoderVLForImageTextRetrieval`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned with `labels`):
            The hardest-negative triplet loss with `group_ids`, cross-entropy without.
        matching_logits (`torch.Tensor` of shape `(batch_size, 2)`):
            Logits of matching, index 1 = match.
        scores (`torch.Tensor` of shape `(batch_size,)`):
            `matching_logits[:, 1] - matching_logits[:, 0]`, float32; higher = better match.
        first_stage_logits (`torch.Tensor` of shape `(len(first_stage_captions), len(first_stage_images))`, *optional*):
            Similarity of each of these captions with each of these images by the first stage of a search, over its
            learned temperature, float32.
        word_states (`torch.Tensor` of shape `(num_captions, sequence_length, hidden_size)`, *optional*):
            What the text layers, if there are any, made of the captions, returned with `first_stage_logits`.
        hidden_states, attentions (`tuple(torch.Tensor)`, *optional*):
            The states and weights of the layers, as in [`UnicoderVLForPreTrainingOutput`].
    """

    loss: torch.Tensor | None = None
    matching_logits: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    first_stage_logits: torch.Tensor | None = None
    word_states: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@cache
def onednn_beats_mkl() -> bool:
    """
    Tells whether oneDNN multiplies float32 matrices faster than MKL, which PyTorch takes for them. MKL is slow on CPUs
    of AMD: with AVX-512 it reaches half of oneDNN's rate, with AVX2 alone 0.9 of it. Others were not measured.
    """
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and str(torch.cpu.get_capabilities().get("cpu_name", "")).startswith("AMD")
    )


def onednn_linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Computes `nn.functional.linear` by oneDNN. Autograd does not know this operator."""
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


class OneDNNLinearFunction(torch.autograd.Function):
    """Computes `nn.functional.linear` and its gradients by oneDNN, and second derivatives by PyTorch."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        of_inputs, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(inputs if of_weight else None, weight if of_inputs else None)
        return onednn_linear(inputs, weight, bias)

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Computes the gradients of the inputs, the weight and the bias, where they are needed."""
        inputs, weight = ctx.saved_tensors
        of_inputs, of_weight, of_bias = ctx.needs_input_grad
        linear = nn.functional.linear if torch.is_grad_enabled() else onednn_linear
        rows = gradient.flatten(0, -2)
        return (
            linear(gradient, weight.t()) if of_inputs else None,
            linear(rows.t(), inputs.flatten(0, -2).contiguous().t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


class UnicoderVLLinear(nn.Linear):
    """A linear layer that computes in float32 by oneDNN where that is faster, see [`onednn_beats_mkl`]."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self._takes_onednn(inputs):
            return OneDNNLinearFunction.apply(inputs, self.weight, self.bias)
        return super().forward(inputs)

    def _takes_onednn(self, inputs: torch.Tensor) -> bool:
        tensors = (inputs, self.weight)
        return (
            not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and onednn_beats_mkl()
            and bool(torch.backends.mkldnn.enabled)
            # Another subclass of Tensor is fake, sharded or quantized.
            and all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors)
            and all((tensor.device.type, tensor.dtype) == ("cpu", torch.float32) for tensor in tensors)
            and inputs.ndim > 1
            and inputs.numel() > 0
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._are_functorch_transforms_active()
        )


class DropoutFunction(torch.autograd.Function):
    """
    Drops out bfloat16 on a CPU in a third of the time of PyTorch, which draws a number of 53 bits for each value: here
    each takes 16 of 64 random bits. The probability is rounded to them, and the values are scaled by what that leaves.
    """

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, probability: float) -> torch.Tensor:
        dropped = round(probability * 2**16)
        lowest = dropped - 2**15  # of the numbers that are kept
        words = torch.empty(-(-inputs.numel() // 4), dtype=torch.int64, device=inputs.device)
        bits = words.random_(-(2**63), None).view(torch.int16)[: inputs.numel()].view(inputs.shape)
        kept = bits.clamp_(lowest - 1, lowest).sub_(lowest - 1)  # 1, or 0
        ctx.save_for_backward(kept)
        ctx.scale = 2**16 / (2**16 - dropped)
        return DropoutFunction.apply_mask(inputs, kept, ctx.scale)

    @staticmethod
    def apply_mask(values: torch.Tensor, kept: torch.Tensor, scale: float) -> torch.Tensor:
        """Multiplies values by 1 or 0, and by the scale, which bfloat16 would round."""
        return (values * kept.to(values.dtype)).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Drops out the gradient of the same values."""
        (kept,) = ctx.saved_tensors
        return DropoutFunction.apply_mask(gradient, kept, ctx.scale), None


def drop_out(inputs: torch.Tensor, probability: float, training: bool = True) -> torch.Tensor:
    """Drops out as `nn.functional.dropout` does, in bfloat16 on CPUs by [`DropoutFunction`]."""
    plain = (
        not training
        or not 0.01 <= probability <= 0.99  # beyond, 16 bits round too much
        or inputs.device.type != "cpu"
        or type(inputs) is not torch.Tensor  # another subclass is fake, sharded or quantized
        or inputs.dtype != torch.bfloat16
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
    )
    if plain:
        return nn.functional.dropout(inputs, p=probability, training=training)
    return DropoutFunction.apply(inputs, probability)


class UnicoderVLDropout(nn.Dropout):
    """Dropout by [`drop_out`]."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return drop_out(inputs, self.p, self.training)


class UnicoderVLFloat32Linear(nn.Linear):
    """A linear layer that computes in float32, under autocast too: scores of bfloat16 are full of ties, boxes move."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            return nn.functional.linear(hidden_states.float(), self.weight.float(), self.bias.float())


class UnicoderVLLocationProjection(UnicoderVLFloat32Linear):
    """Projects locations in float32: bfloat16 has 8 bits, a box of a 1000-pixel photo would move by 4 pixels."""


class UnicoderVLRegionEmbeddings(nn.Module):
    """Embeds regions as LayerNorm(FC(feature) + FC(location)): one LayerNorm of the sum (paper, Image Embeddings)."""

    def __init__(self, config: UnicoderVLConfig):
        super().__init__()
        self.feature_projection = UnicoderVLLinear(config.region_feature_dim, config.hidden_size)
        self.location_projection = UnicoderVLLocationProjection(config.region_location_dim, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, region_features: torch.Tensor, region_locations: torch.Tensor, types: torch.Tensor | None = None
    ) -> torch.Tensor:
        features = self.feature_projection(region_features.to(self.feature_projection.weight.dtype))
        embeddings = features + self.location_projection(region_locations)
        embeddings = embeddings if types is None else embeddings + types
        return self.LayerNorm(embeddings.to(self.LayerNorm.weight.dtype))


class UnicoderVLUniterRegionEmbeddings(nn.Module):
    """
    Embeds regions as UNITER does, LayerNorm(LayerNorm(FC(feature)) + LayerNorm(FC(location)) + token type 1), with the
    location (x1, y1, x2, y2, w, h, area). A vector that was learned takes the place of a hidden region's feature.
    """

    def __init__(self, config: UnicoderVLConfig):
        super().__init__()
        self.feature_projection = UnicoderVLLinear(config.region_feature_dim, config.hidden_size)
        self.feature_LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.location_projection = UnicoderVLFloat32Linear(config.region_location_dim + 2, config.hidden_size)
        self.location_LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.hidden_feature = nn.Parameter(torch.zeros(config.region_feature_dim))

    def forward(
        self,
        region_features: torch.Tensor,
        region_locations: torch.Tensor,
        type_embedding: torch.Tensor,
        masked_regions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        dtype = self.LayerNorm.weight.dtype
        region_features = region_features.to(self.feature_projection.weight.dtype)
        if (
            masked_regions is None
        ):  # The vector stays in the graph: several processes want a gradient of all parameters.
            masked_regions = region_features.new_zeros(region_features.shape[:-1])
        region_features = torch.where(masked_regions[..., None] == 1, self.hidden_feature, region_features)
        features = self.feature_LayerNorm(self.feature_projection(region_features).to(dtype))
        corners, area = region_locations.split((4, 1), dim=-1)
        sizes = corners[..., 2:] - corners[..., :2]
        locations = self.location_projection(torch.cat((corners, sizes, area), dim=-1))
        return self.LayerNorm(features + self.location_LayerNorm(locations.to(dtype)) + type_embedding)


class UnicoderVLVisualBertRegionEmbeddings(nn.Module):
    """
    Embeds regions as VisualBERT does, LayerNorm(FC(feature)): it knows no locations, and the LayerNorm is the text's.
    """

    def __init__(self, config: UnicoderVLConfig):
        super().__init__()
        self.feature_projection = UnicoderVLLinear(config.region_feature_dim, config.hidden_size)

    def forward(
        self, region_features: torch.Tensor, text_LayerNorm: nn.LayerNorm, types: torch.Tensor | None = None
    ) -> torch.Tensor:
        features = self.feature_projection(region_features.to(self.feature_projection.weight.dtype))
        features = features if types is None else features + types
        return text_LayerNorm(features.to(text_LayerNorm.weight.dtype))


REGION_EMBEDDINGS = {
    "unicoder_vl": UnicoderVLRegionEmbeddings,
    "uniter": UnicoderVLUniterRegionEmbeddings,
    "visual_bert": UnicoderVLVisualBertRegionEmbeddings,
}


class UnicoderVLEmbeddings(nn.Module):
    """BERT's embeddings of the tokens and the embeddings of the regions, joined: text, then regions."""

    def __init__(self, config: UnicoderVLConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.region_embeddings = REGION_EMBEDDINGS[config.region_embedding](config)
        self.region_type_embeddings = (
            nn.Embedding(config.num_region_types, config.hidden_size) if config.num_region_types else None
        )
        self.image_token_embedding = (
            nn.Parameter(torch.zeros(config.hidden_size)) if config.use_image_token_embedding else None
        )
        self.dropout = UnicoderVLDropout(config.hidden_dropout_prob)

    def embed_text(
        self,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.LongTensor | None,
        position_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        """Embeds tokens as BERT does, `(num_captions, sequence_length, hidden_size)`; takes arguments of `forward`."""
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if position_ids is None:
            if attention_mask is None:
                position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
            else:  # Left padding gives what right padding gives.
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        if token_type_ids is None:
            token_type_ids = inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.long)
        # BERT's own order of the sum: the embeddings of text equal BERT's to the bit.
        embeddings = inputs_embeds + self.token_type_embeddings(token_type_ids)
        embeddings = embeddings + self.position_embeddings(position_ids)
        return self.LayerNorm(embeddings)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        region_features: torch.Tensor | None = None,
        region_locations: torch.Tensor | None = None,
        masked_regions: torch.Tensor | None = None,
        token_region_ids: torch.LongTensor | None = None,
        caption_index: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        region_token_type_ids: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        text = self.embed_text(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        text = _pick_rows(text, caption_index)
        if region_features is None:
            return self.dropout(text)

        regions = self.embed_regions(region_features, region_locations, masked_regions, region_token_type_ids)
        regions = _pick_rows(regions, image_index)
        if token_region_ids is not None:
            region_ids = _pick_rows(token_region_ids, caption_index)[..., None]  # (batch_size, sequence_length, 1)
            referenced = regions.gather(1, region_ids.clamp(min=0).expand(-1, -1, regions.shape[-1]))
            text = text + referenced.masked_fill(region_ids < 0, 0.0)
        return self.dropout(torch.cat((text, self.add_image_token(regions)), dim=1))

    def embed_regions(
        self,
        region_features: torch.Tensor,
        region_locations: torch.Tensor | None,
        masked_regions: torch.Tensor | None = None,
        region_token_type_ids: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """
        Embeds regions by `config.region_embedding`, without the image token: `(…, num_regions, hidden_size)`. The
        arguments are those of `forward`.
        """
        embed: Any = self.region_embeddings
        if isinstance(embed, UnicoderVLUniterRegionEmbeddings):
            types = self.token_type_embeddings.weight[1]
            if region_token_type_ids is not None:
                types = self.token_type_embeddings(region_token_type_ids)
            return embed(region_features, region_locations, types, masked_regions)
        types = None
        if self.region_type_embeddings is not None:
            types = self.region_type_embeddings.weight[0]
            if region_token_type_ids is not None:
                types = self.region_type_embeddings(region_token_type_ids)
        if masked_regions is not None:
            region_features = region_features.masked_fill(masked_regions[..., None] == 1, 0)
        if isinstance(embed, UnicoderVLVisualBertRegionEmbeddings):
            return embed(region_features, self.LayerNorm, types)
        return embed(region_features, region_locations, types)

    def add_image_token(self, regions: torch.Tensor) -> torch.Tensor:
        """Adds the vector of the paper's `[IMG]` token, if the model has it, to `(…, num_regions, hidden_size)`."""
        return regions if self.image_token_embedding is None else regions + self.image_token_embedding


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Computes attention in plain PyTorch, the implementation `"eager"`.

    Args:
        query, key, value (`torch.Tensor` of shape `(batch_size, num_heads, length, head_dim)`):
            The states; a query may be shorter than the keys.
        attention_mask (`torch.Tensor`, *optional*):
            Added to the logits, which it must broadcast to: 0 where a query reads a key, else the lowest value.
        scaling (`float`):
            Multiplies the logits, `1 / sqrt(head_dim)`.

    Returns:
        The output `(batch_size, length, num_heads, head_dim)` and the weights `(batch_size, num_heads, query length,
        key length)`.
    """
    attn_output, attn_weights = _attend(module, query, key, value, attention_mask, scaling, dropout)
    return attn_output.transpose(1, 2).contiguous(), attn_weights


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the output of [`eager_attention_forward`], `(batch_size, num_heads, length, head_dim)`, and weights."""
    attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    attn_weights = nn.functional.softmax(attn_weights, dim=-1)
    attn_weights = drop_out(attn_weights, dropout, module.training)
    return torch.matmul(attn_weights, value), attn_weights


@dataclass
class PackedSequences:
    """
    Describes sequences without padding, one behind the other in `(1, num_tokens, hidden_size)`, so that attention keeps
    them apart: SDPA and eager attention are called once for each group of equal length, FlashAttention takes the
    borders, and flex attention a block mask.

    Args:
        groups (`list[tuple[int, int]]`): Number and length of the sequences of each group, in their order.
        device (`torch.device`): The device of the tokens.
        implementation (`str`): The attention of the model, its `config._attn_implementation`.
    """

    groups: list[tuple[int, int]]
    device: torch.device
    implementation: str

    def __post_init__(self):
        lengths = [length for count, length in self.groups for _ in range(count)]
        self.longest = max(lengths)
        self.ends = torch.tensor([0, *lengths], device=self.device).cumsum(0)
        self.starts = self.ends[:-1]

    def fill_up(self, states: torch.Tensor) -> torch.Tensor:
        """
        Appends rows of zeros, which nothing attends to, to `(num_rows, hidden_size)`, where layers compute in bfloat16
        on a CPU and are called for each group. There every new number of rows costs each matrix product a kernel of its
        own, on AMX four times what the product takes for MiniLM. The number becomes a multiple of 16, or of a 32nd.
        """
        autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        if self.device.type != "cpu" or not (autocast or states.dtype == torch.bfloat16) or not self._calls_groups:
            return states
        unit = max(16, 2 ** (len(states).bit_length() - 6))
        behind = -len(states) % unit
        return torch.cat((states, states.new_zeros(behind, states.shape[1]))) if behind else states

    @property
    def _calls_groups(self) -> bool:
        flash = is_flash_attention_requested(requested_attention_implementation=self.implementation)
        return not flash and self.implementation != "flex_attention"

    def attention_kwargs(self, first_only: bool = False) -> dict[str, Any]:
        """Makes the arguments of a layer; with `first_only` its queries are the first token of each sequence."""
        if self._calls_groups:
            return {"groups": self.groups}
        if self.implementation == "flex_attention":
            return {"attention_mask": self._block_mask(first_only)}
        ends = self.ends.int()
        queries = torch.arange(len(ends), device=self.device, dtype=torch.int32) if first_only else ends
        return {
            "cu_seq_lens_q": queries,
            "cu_seq_lens_k": ends,
            "max_length_q": 1 if first_only else self.longest,
            "max_length_k": self.longest,
        }

    def sequence_of_tokens(self) -> torch.Tensor:
        """Gives the number, from 0, of the sequence that each token is of: `(num_tokens,)`."""
        num_tokens = sum(count * length for count, length in self.groups)
        return torch.searchsorted(self.ends[1:], torch.arange(num_tokens, device=self.device), right=True)

    def _block_mask(self, first_only: bool):
        from torch.nn.attention.flex_attention import create_block_mask

        sequence_of = self.sequence_of_tokens()
        num_tokens = len(sequence_of)
        queries = sequence_of[self.starts] if first_only else sequence_of

        def same_sequence(batch, head, query, key):
            return queries[query] == sequence_of[key]

        return create_block_mask(same_sequence, None, None, len(queries), num_tokens, device=str(self.device))


def attend_in_groups(
    attention_interface: Callable,
    groups: list[tuple[int, int]],
    first_only: bool,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Calls `attention_interface` for each group of [`PackedSequences`], with all of its queries or, `first_only`, one a
    sequence. Rows behind them, of [`~PackedSequences.fill_up`], give zeros.
    """
    sizes = [count * length for count, length in groups]
    query_sizes = [count for count, _ in groups] if first_only else sizes
    # (1, heads, tokens, head_dim) and back to how it lies in memory; split, for a backward that stays linear.
    *queries, behind = _split(query.transpose(1, 2), query_sizes)
    keys, values = (_split(states.transpose(1, 2), sizes) for states in (key, value))
    outputs = []
    for (count, _), *part in zip(groups, queries, keys, values, strict=False):
        shaped = [tensor.reshape(count, -1, *tensor.shape[2:]).transpose(1, 2) for tensor in part]
        output, _ = attention_interface(module, *shaped, attention_mask, **kwargs)
        outputs.append(output.flatten(0, 1))
    if behind.shape[1]:
        outputs.append(torch.zeros_like(behind[0]))
    return torch.cat(outputs)[None], None


def _split(states: torch.Tensor, sizes: list[int]) -> Sequence[torch.Tensor]:
    """Splits `(1, num_rows, …)` into parts of these sizes, and what is behind them."""
    return states.split([*sizes, states.shape[1] - sum(sizes)], dim=1)


@dataclass
class Buckets:
    """
    Says how the heads of the rows of [`PackedSequences`] are laid out in buckets of sequences of nearly the same
    length: head `h` of row `r` is number `r * num_heads + h`.

    Args:
        there (`torch.LongTensor` of shape `(num_places,)`): The head of a row that each place of the buckets holds.
        real (`torch.BoolTensor` of shape `(num_places,)`): Whether a place is that of a row, and does not fill up.
        back (`torch.LongTensor` of shape `(num_rows * num_heads,)`): The place of each head of each row.
        shapes (`list[tuple[int, int, int]]`): Number of sequences, heads, and length of each bucket.
    """

    there: torch.Tensor
    real: torch.Tensor
    back: torch.Tensor
    shapes: list[tuple[int, int, int]]

    @classmethod
    def of(
        cls, groups: Sequence[tuple[int, int]], lengths: torch.Tensor, num_heads: int, width: int | None = None
    ) -> "Buckets":
        """
        Lays out sequences, of these `lengths` or of one row each (`width` 1), in the buckets that their groups make.
        """
        starts, heads = lengths.cumsum(0) - lengths, torch.arange(num_heads, device="cpu")[:, None]
        there, real, shapes, sequence = [], [], [], 0
        for count, length in bucket_groups(groups):
            unit = max(1, 2 ** (count.bit_length() - 3))  # at most a quarter more sequences
            shape = (count + -count % unit, num_heads, width or length)
            own, first = (of[sequence : sequence + count, None, None] for of in (lengths, starts))
            place = torch.arange(shape[2], device="cpu")
            real.append(torch.zeros(shape, dtype=torch.bool, device="cpu"))
            real[-1][:count] = place < own
            there.append(torch.zeros(shape, dtype=torch.long, device="cpu"))
            there[-1][:count] = (first + torch.where(place < own, place, 0)) * num_heads + heads
            shapes.append(shape)
            sequence += count
        held, own_place = (torch.cat([each.flatten() for each in of]) for of in (there, real))
        places = own_place.nonzero()[:, 0]
        return cls(held, own_place, places[held[places].argsort()], shapes)

    def split(self, places: torch.Tensor) -> list[torch.Tensor]:
        """Splits `(num_places, …)` into buckets, `(number of sequences, num_heads, length, …)`."""
        parts = places.split([math.prod(shape) for shape in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]


def bucket_groups(groups: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Joins neighbouring groups whose lengths fill up to the same multiple: number of sequences, and that length."""
    joined: list[tuple[int, int]] = []
    for count, length in groups:
        filled = length + -length % BUCKET_LENGTHS
        if joined and joined[-1][1] == filled:
            joined[-1] = (joined[-1][0] + count, filled)
        else:
            joined.append((count, filled))
    return joined


@lru_cache(maxsize=8)  # of the layers of a pass, and its backward
def _lay_out(
    groups: tuple[tuple[int, int], ...], num_heads: int, first_only: bool
) -> tuple[Buckets, Buckets, list[torch.Tensor]]:
    """Lays out queries and keys in buckets, and makes each bucket's mask of keys, `(sequences, 1, 1, length)`."""
    lengths = torch.tensor([length for count, length in groups for _ in range(count)], device="cpu")
    keys = Buckets.of(groups, lengths, num_heads)
    queries = Buckets.of(groups, torch.ones_like(lengths), num_heads, 1) if first_only else keys
    lowest = torch.finfo(torch.bfloat16).min
    masks = [torch.where(real[:, :1, None], 0.0, lowest) for real in keys.split(keys.real)]
    return queries, keys, masks


class _IntoBuckets(torch.autograd.Function):
    """Copies rows, `(num_rows, head_dim)`, to their places; with `clear`, places that fill up are 0, else any row."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, buckets: Buckets, clear: bool) -> torch.Tensor:
        ctx.buckets, ctx.num_rows = buckets, len(rows)
        places = rows.index_select(0, buckets.there)
        return places.mul_(buckets.real[:, None]) if clear else places

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Copies the gradients of the places of rows; those that fill up have none, as masks have it."""
        return _OutOfBuckets.apply(gradient, ctx.buckets, ctx.num_rows), None, None


class _OutOfBuckets(torch.autograd.Function):
    """Copies places back to the rows, `(num_rows, head_dim)`; those behind the sequences are 0."""

    @staticmethod
    def forward(ctx: Any, places: torch.Tensor, buckets: Buckets, num_rows: int) -> torch.Tensor:
        ctx.buckets = buckets
        rows = places.new_empty(num_rows, *places.shape[1:])
        torch.index_select(places, 0, buckets.back, out=rows[: len(buckets.back)])
        rows[len(buckets.back) :] = 0
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Copies the gradients of rows to their places; those that fill up have none."""
        return _IntoBuckets.apply(gradient, ctx.buckets, True), None, None


def attend_in_buckets(
    groups: list[tuple[int, int]],
    first_only: bool,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Computes what [`attend_in_groups`] does with [`attend_by_products`], for groups of nearly the same length together:
    a call for each takes longer, since a product of a shape that is new takes ten times as long as one that is not.
    """
    _, num_heads, num_rows, head_dim = query.shape
    queries, keys, masks = _lay_out(tuple(map(tuple, groups)), num_heads, first_only)
    laid_out = []
    for states, buckets in ((query, queries), (key, keys), (value, keys)):
        rows = states.transpose(1, 2).reshape(-1, head_dim)  # as they lie in memory
        laid_out.append(buckets.split(_IntoBuckets.apply(rows, buckets, False)))
    with maybe_autocast(device_type=query.device.type, enabled=False):
        outputs = [
            _attend(module, some_query, some_key, some_value, mask.to(query.dtype), scaling, dropout)[0]
            for some_query, some_key, some_value, mask in zip(*laid_out, masks, strict=True)
        ]
    places = torch.cat([output.flatten(0, 2) for output in outputs])
    rows = _OutOfBuckets.apply(places, queries, num_rows * num_heads)
    return rows.view(1, num_rows, num_heads, head_dim), None


def attend_in_float32(
    attention_interface: Callable,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Calls `attention_interface` on float32 copies of bfloat16 states, and returns its output in bfloat16 again. On CPUs
    PyTorch's backward of SDPA takes 3 to 12 times as long in bfloat16: half of a small model's step, a quarter of
    MiniLM's.
    """
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with maybe_autocast(device_type=query.device.type, enabled=False):
        output, weights = attention_interface(
            module, query.float(), key.float(), value.float(), attention_mask, **kwargs
        )
    return output.to(query.dtype), weights


def attend_by_products(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Calls [`eager_attention_forward`] without autocast, which would compute the softmax in float32 copies. On CPUs, but
    for a few short sequences, no other attention trains as fast in bfloat16.
    """
    with maybe_autocast(device_type=query.device.type, enabled=False):
        return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)


class UnicoderVLSelfAttention(nn.Module):
    """BERT's self-attention, by the implementation that the model was loaded with."""

    def __init__(self, config: UnicoderVLConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False

        self.query = UnicoderVLLinear(config.hidden_size, config.hidden_size)
        self.key = UnicoderVLLinear(config.hidden_size, config.hidden_size)
        self.value = UnicoderVLLinear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        query_states: torch.Tensor | None = None,
        groups: list[tuple[int, int]] | None = None,
        projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The arguments after the second are for packed sequences, see [`UnicoderVLModel.encode_packed`]."""
        first_only = query_states is not None
        query_states = hidden_states if query_states is None else query_states
        input_shape = query_states.shape[:-1]
        if projected is None:
            projected = self.query(query_states), self.key(hidden_states), self.value(hidden_states)
        query, key, value = (states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2) for states in projected)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        # A checkpoint that is reentrant passes the layer without a graph first, and then draws the same numbers again.
        trains_in_bfloat16 = (query.requires_grad or hidden_states.requires_grad) and query.dtype == torch.bfloat16
        if trains_in_bfloat16 and query.device.type == "cpu" and self.config._attn_implementation == "sdpa":
            attention_interface = self._attention_of_bfloat16(attention_interface, groups, first_only)
        elif groups is not None:
            attention_interface = partial(attend_in_groups, attention_interface, groups, first_only)
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return attn_output.reshape(*input_shape, -1).contiguous(), attn_weights

    def _attention_of_bfloat16(
        self, attention_interface: Callable, groups: list[tuple[int, int]] | None, first_only: bool
    ) -> Callable:
        """Gives the attention that trains fastest in bfloat16 on a CPU, where SDPA is slow."""
        if groups is None:
            return partial(attend_in_float32, attention_interface)
        buckets = bucket_groups(groups)
        of_groups, of_buckets = (
            self.config.num_attention_heads * sum(count * length**2 for count, length in of) for of in (groups, buckets)
        )
        saved_calls = len(groups) - len(buckets)
        if of_buckets - of_groups < WEIGHTS_OF_A_CALL * saved_calls and not torch.compiler.is_compiling():
            return partial(attend_in_buckets, groups, first_only)
        if of_groups >= BF16_PRODUCTS_FROM_WEIGHTS * len(groups):
            return partial(attend_in_groups, attend_by_products, groups, first_only)
        return partial(attend_in_float32, partial(attend_in_groups, attention_interface, groups, first_only))


class UnicoderVLResidualOutput(nn.Module):
    """Closes each half of a layer: project, drop out, add the residual, normalise (after the sum, as in BERT)."""

    def __init__(self, config: UnicoderVLConfig, input_size: int):
        super().__init__()
        self.dense = UnicoderVLLinear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = UnicoderVLDropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


class UnicoderVLAttention(nn.Module):
    """The first half of a layer: self-attention, the residual and its LayerNorm."""

    def __init__(self, config: UnicoderVLConfig):
        super().__init__()
        self.self = UnicoderVLSelfAttention(config)
        self.output = UnicoderVLResidualOutput(config, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        query_states: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attn_output, _ = self.self(hidden_states, attention_mask, query_states=query_states, **kwargs)
        return self.output(attn_output, hidden_states if query_states is None else query_states)


class UnicoderVLIntermediate(nn.Module):
    """The widening part of a layer's feed-forward network: a linear layer and the activation."""

    def __init__(self, config: UnicoderVLConfig):
        super().__init__()
        self.dense = UnicoderVLLinear(config.hidden_size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.act_fn(self.dense(hidden_states))


class UnicoderVLLayer(GradientCheckpointingLayer):
    """A layer of BERT's encoder: attention, then the feed-forward network."""

    def __init__(self, config: UnicoderVLConfig):
        super().__init__()
        self.attention = UnicoderVLAttention(config)
        self.intermediate = UnicoderVLIntermediate(config)
        self.output = UnicoderVLResidualOutput(config, config.intermediate_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        query_states: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attn_output = self.attention(hidden_states, attention_mask, query_states=query_states, **kwargs)
        return self.output(self.intermediate(attn_output), attn_output)


class UnicoderVLEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: UnicoderVLConfig):
        super().__init__()
        self.layer = nn.ModuleList([UnicoderVLLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layers: slice = slice(None),
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Encodes by these of the layers."""
        for layer in self.layer[layers]:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return hidden_states


class UnicoderVLPooler(nn.Module):
    """BERT's pooler. It reads the first attended token, which is `[CLS]` on whichever side the padding is."""

    def __init__(self, config: UnicoderVLConfig):
        super().__init__()
        self.dense = UnicoderVLLinear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        if attention_mask is None:
            first = hidden_states[:, 0]
        else:
            index = attention_mask.long().argmax(-1)[:, None, None]
            first = hidden_states.gather(1, index.expand(-1, -1, hidden_states.shape[-1]))[:, 0]
        return self.activation(self.dense(first))


class UnicoderVLPredictionHeadTransform(nn.Module):
    """The transform before BERT's decoder of tokens: a linear layer, the activation and LayerNorm."""

    def __init__(self, config: UnicoderVLConfig):
        super().__init__()
        self.dense = UnicoderVLLinear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.act_fn(self.dense(hidden_states)))


class UnicoderVLLMPredictionHead(nn.Module):
    """Gives the logits of all tokens, `(…, vocab_size)`; its decoder is tied to the word embeddings by default."""

    def __init__(self, config: UnicoderVLConfig):
        super().__init__()
        self.transform = UnicoderVLPredictionHeadTransform(config)
        self.decoder = UnicoderVLLinear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))  # BERT's checkpoints hold it under this name.

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.transform(hidden_states))


class UnicoderVLOnlyMLMHead(nn.Module):
    """Holds the head of masked language modelling under the name that BERT's checkpoints give it."""

    def __init__(self, config: UnicoderVLConfig):
        super().__init__()
        self.predictions = UnicoderVLLMPredictionHead(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.predictions(hidden_states)


class UnicoderVLMatchingHead(UnicoderVLFloat32Linear):
    """
    Gives two logits from the output of BERT's pooler, 0 = mismatch, 1 = match, and adds the logit of a similarity to
    their difference, where there is one.
    """

    def __init__(self, config: UnicoderVLConfig):
        super().__init__(config.hidden_size, 2)

    def forward(self, pooled: torch.Tensor, similarity: torch.Tensor | None = None) -> torch.Tensor:
        logits = super().forward(pooled)
        return logits if similarity is None else logits + torch.stack((-similarity, similarity), dim=-1) / 2


class UnicoderVLTaskHead(nn.Module):
    """
    Gives the logits of a task as UNITER does, `(…, num_outputs)`: a layer, by default twice as wide as the encoder,
    GELU, LayerNorm and a linear layer. It computes in float32, since in bfloat16 many logits would be equal.
    """

    def __init__(self, config: UnicoderVLConfig, num_outputs: int, width: int | None = None):
        super().__init__()
        width = 2 * config.hidden_size if width is None else width
        self.dense = UnicoderVLFloat32Linear(config.hidden_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder = UnicoderVLFloat32Linear(width, num_outputs)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        norm = self.LayerNorm
        with maybe_autocast(device_type=states.device.type, enabled=False):
            widened = nn.functional.gelu(self.dense(states))
            normed = nn.functional.layer_norm(
                widened, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps
            )
            return self.decoder(normed)


class UnicoderVLQueryBank(nn.Module):
    """
    Holds embeddings of training captions and images, of the numbers `config.query_bank_size`, and says how near an
    embedding is to all of the other side: the log-sum-exp of 20 times its similarities, divided by 20 (the inverted
    softmax of QB-Norm, Bogolin et al., CVPR 2022), less what that is for those of the bank on average, so that scores
    keep their zero.
    """

    inverse_temperature = 20.0
    similarities_at_once = 2**25
    texts: torch.Tensor
    images: torch.Tensor
    text_mean: torch.Tensor
    image_mean: torch.Tensor

    def __init__(self, sizes: Sequence[int], projection_dim: int):
        super().__init__()
        self.register_buffer("texts", torch.zeros(sizes[0], projection_dim))
        self.register_buffer("images", torch.zeros(sizes[1], projection_dim))
        self.register_buffer("text_mean", torch.zeros(1))
        self.register_buffer("image_mean", torch.zeros(1))

    @torch.no_grad()
    def fill(self, texts: torch.Tensor, images: torch.Tensor) -> None:
        """Takes the embeddings of the bank, and measures how near its own are to the other side on average."""
        self.texts.copy_(texts)
        self.images.copy_(images)
        self.text_mean.copy_(self._nearness(self.texts, self.images).mean())
        self.image_mean.copy_(self._nearness(self.images, self.texts).mean())

    def nearness_to_images(self, texts: torch.Tensor) -> torch.Tensor:
        """Says how near texts, `(num_texts, projection_dim)`, are to the images of the bank: `(num_texts, 1)`."""
        return self._nearness(texts, self.images) - self.text_mean.float()

    def nearness_to_texts(self, images: torch.Tensor) -> torch.Tensor:
        """Says how near images, `(num_images, projection_dim)`, are to the texts of the bank: `(num_images, 1)`."""
        return self._nearness(images, self.texts) - self.image_mean.float()

    def _nearness(self, embeddings: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        with maybe_autocast(device_type=embeddings.device.type, enabled=False):
            scaled, bank = self.inverse_temperature * embeddings.float(), bank.float()
            rows = max(1, self.similarities_at_once // len(bank))
            parts = (scaled,) if is_tracing() else scaled.split(rows)
            return torch.cat([(part @ bank.T).logsumexp(-1, keepdim=True) for part in parts]) / self.inverse_temperature


class UnicoderVLFirstStage(nn.Module):
    """
    Projects the mean states of captions and of images into one space, in which a learned temperature makes logits of
    similarities, as in CLIP. It computes in float32, since in bfloat16 many similarities would be equal.
    """

    def __init__(self, config: UnicoderVLConfig, projection_dim: int):
        super().__init__()
        self.text_projection = UnicoderVLFloat32Linear(config.hidden_size, projection_dim)
        self.image_projection = UnicoderVLFloat32Linear(config.hidden_size, projection_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.region_attention = UnicoderVLFloat32Linear(config.hidden_size, 1) if config.num_text_layers else None
        sizes = config.query_bank_size
        self.query_bank = None if sizes is None else UnicoderVLQueryBank(sizes, projection_dim)

    def weights_of_regions(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """
        Weighs the regions of images, `(num_images, num_regions, hidden_size)`, for their mean: `(num_images,
        num_regions)`, float32, of sum 1, or 0 for an image without a region. By a learned attention where no layer has
        read the regions, else evenly.
        """
        weights = states.new_zeros(states.shape[:2], dtype=torch.float32)
        if self.region_attention is not None:
            weights = self.region_attention(states)[..., 0]
        if mask is None:
            return weights.softmax(-1)
        lowest = torch.finfo(weights.dtype).min
        return weights.masked_fill(mask == 0, lowest).softmax(-1) * mask

    def mean_of_regions(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """
        Averages the regions of images by `weights_of_regions`, whose arguments it takes: `(num_images, hidden_size)`.
        """
        return (self.weights_of_regions(states, mask)[..., None] * states.float()).sum(1)

    def embed_text(self, states: torch.Tensor) -> torch.Tensor:
        """
        Projects mean states of captions, `(num_texts, hidden_size)`, to `(num_texts, projection_dim)`, unit length.
        """
        return self._embed(self.text_projection, states)

    def embed_image(self, states: torch.Tensor) -> torch.Tensor:
        """
        Projects mean states of images, `(num_images, hidden_size)`, to `(num_images, projection_dim)`, unit length.
        """
        return self._embed(self.image_projection, states)

    def _embed(self, projection: nn.Linear, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(projection(states), dim=-1)

    def logits(self, text_embeddings: torch.Tensor, image_embeddings: torch.Tensor) -> torch.Tensor:
        """Divides similarities, `(num_texts, num_images)`, by the learned temperature, at least 1/100 as in CLIP."""
        with maybe_autocast(device_type=text_embeddings.device.type, enabled=False):
            return self._scale() * text_embeddings @ image_embeddings.T

    def texts_of_pairs(self, embeddings: torch.Tensor) -> torch.Tensor:
        """
        Prepares embeddings of texts, `(num_texts, projection_dim)`, for `pair_logits`: with a query bank they get two
        numbers more, so that a pair counts less if its text is near to all images, or its image to all texts.
        """
        if self.query_bank is None:
            return embeddings
        near = self.query_bank.nearness_to_images(embeddings)
        return torch.cat((embeddings, -near, torch.ones_like(near)), dim=-1)

    def images_of_pairs(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Prepares embeddings of images for `pair_logits`, as `texts_of_pairs` does those of texts."""
        if self.query_bank is None:
            return embeddings
        near = self.query_bank.nearness_to_texts(embeddings)
        return torch.cat((embeddings, torch.ones_like(near), -near), dim=-1)

    def similarities_in_scores(self, texts: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """
        Computes the similarities that scores hold after text layers, `(num_texts, num_images)`, given embeddings: their
        product, less what a query bank takes from it.
        """
        return self.texts_of_pairs(texts) @ self.images_of_pairs(images).T

    def pair_logits(self, texts: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """
        Divides the similarity of each text with its own image by the temperature: `(num_pairs,)`, given what
        `texts_of_pairs` and `images_of_pairs` made of each.
        """
        with maybe_autocast(device_type=texts.device.type, enabled=False):
            return self._scale() * (texts * images).sum(-1)

    def logits_of_means(self, means: torch.Tensor) -> torch.Tensor:
        """Computes `pair_logits` given the mean states of each text and its image, `(num_pairs, 2, hidden_size)`."""
        texts, images = self.embed_text(means[:, 0]), self.embed_image(means[:, 1])
        return self.pair_logits(self.texts_of_pairs(texts), self.images_of_pairs(images))

    def _scale(self) -> torch.Tensor:
        return self.logit_scale.float().clamp(max=math.log(100)).exp()


@dataclass
class UnicoderVLPooledOutput(BaseModelOutputWithPooling):
    r"""
    Output of [`UnicoderVLModel.pooled`].

    Args:
        means (`torch.Tensor` of shape `(batch_size, 2, hidden_size)`, *optional*):
            The mean of the states of each text, and of each image, as they are in the pair: over the attended
            positions, and over the embeddings and all layers but the last, float32.
    """

    means: torch.Tensor | None = None


class JointStates(NamedTuple):
    """
    Holds what the layers that read words and regions begin with.

    Args:
        states (`torch.Tensor` of shape `(batch_size, sequence_length + num_regions, hidden_size)`):
            Embeddings of words, or their states after the text layers, and embeddings of regions.
        mask, text_mask (`torch.Tensor`, *optional*):
            1 where there is a word or region, `(batch_size, sequence_length + num_regions)`, or a word; None for all.
    """

    states: torch.Tensor
    mask: torch.Tensor | None
    text_mask: torch.Tensor | None


@dataclass
class BertLoadingReport:
    """A report of [`~UnicoderVLPreTrainedModel.from_bert`]: parameters that BERT lacks, and parameters left unused.

    Args:
        new (`list[str]`): Parameters of the model that the checkpoint lacks, freshly initialised.
        unused (`list[str]`): Parameters of the checkpoint that the model lacks.
    """

    new: list[str]
    unused: list[str]


# Every other key that only one side has is an error: a renamed layer must not pass as "new".
_NEW_KEYS = re.compile(
    r"(bert\.)?(embeddings\.region_(type_)?embeddings|embeddings\.image_token_embedding|pooler)"
    r"|cls\.predictions|(region|matching|answer|reasoning|grounding)_head|classifier|pair_attention|first_stage"
)
_UNUSED_KEYS = re.compile(r"cls\.|classifier\.|qa_outputs\.|(bert\.)?embeddings\.position_ids$")
_LAYER_KEY = re.compile(r"(?:bert\.)?encoder\.layer\.(\d+)\.")


@auto_docstring
class UnicoderVLPreTrainedModel(PreTrainedModel):
    config: UnicoderVLConfig
    base_model_prefix = "bert"
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # The losses are means over rows: Trainer must divide by the accumulation steps itself.
    accepts_loss_kwargs = False
    _no_split_modules = ["UnicoderVLEmbeddings", "UnicoderVLLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": UnicoderVLLayer, "attentions": UnicoderVLSelfAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, UnicoderVLLMPredictionHead):
            init.zeros_(module.bias)
        elif isinstance(module, UnicoderVLEmbeddings) and module.image_token_embedding is not None:
            init.normal_(module.image_token_embedding, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, UnicoderVLUniterRegionEmbeddings):
            init.normal_(module.hidden_feature, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, UnicoderVLLocationProjection) and self.config.location_initializer_range is not None:
            init.normal_(module.weight, mean=0.0, std=self.config.location_initializer_range)
        elif isinstance(module, UnicoderVLQueryBank):
            for each in module.buffers():
                init.zeros_(each)
        elif isinstance(module, UnicoderVLFirstStage):
            init.constant_(module.logit_scale, math.log(1 / 0.07))

    @classmethod
    def from_bert(
        cls,
        pretrained_model_name_or_path: str,
        *,
        output_loading_info: bool = False,
        dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        revision: str = "main",
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        **config_overrides,
    ):
        r"""
        Builds the model from any BERT checkpoint, as the paper does from BERT-base.

        Args:
            pretrained_model_name_or_path (`str`):
                A folder, or a repository of the Hub, with a BERT of any kind (`BertModel`, with or without heads).
            output_loading_info (`bool`, *optional*, defaults to `False`):
                Returns `(model, BertLoadingReport)`: the parameters that are new, and those of the checkpoint that
                are left unused.
            dtype, attn_implementation, revision, token, cache_dir, local_files_only:
                The options of [`~PreTrainedModel.from_pretrained`]; `dtype` defaults to float32.
            config_overrides:
                Fields of [`UnicoderVLConfig`]. `num_hidden_layers` may be another than BERT's: the first layers are
                taken, and further ones begin as copies of its last. `num_text_layers=-1` takes all of BERT's for words
                alone, and puts two behind them unless `num_hidden_layers` says how many there are in all.

        Raises:
            `ValueError`: for a checkpoint that is not a BERT, a field that its weights fix, an unknown field, or a key
            missing or unexpected beside those that may be (see `BertLoadingReport`).
        """
        hub: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
        hub["local_files_only"] = local_files_only
        name = str(pretrained_model_name_or_path)
        model_type = PreTrainedConfig.get_config_dict(name, **hub)[0].get("model_type", "bert")
        if model_type != "bert":
            raise ValueError(f"{name}: model_type is {model_type!r}, but from_bert reads checkpoints of 'bert' only.")
        bert_config = BertConfig.from_pretrained(name, **hub)
        config = cls._config_from_bert(name, bert_config, config_overrides)

        depth = bert_config.num_hidden_layers
        bert_config.num_hidden_layers = min(depth, config.num_hidden_layers)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # Its report is about BertForPreTraining; ours follows.
        try:
            bert, info = BertForPreTraining.from_pretrained(
                name, config=bert_config, dtype=torch.float32, output_loading_info=True, **hub
            )
        finally:
            logging.set_verbosity(verbosity)
        source = {key: value for key, value in bert.state_dict().items() if key not in info["missing_keys"]}
        # Index 0 of next sentence prediction means match, and sentences are not images: never a start for matching.
        unused = sorted(
            set(info["unexpected_keys"]) | {key for key in source if key.startswith("cls.seq_relationship")}
        )
        source = {key: value for key, value in source.items() if key not in unused}
        of_last = {key: value for key, value in source.items() if f".layer.{depth - 1}." in key}
        for number in range(depth, config.num_hidden_layers):
            copies = {key.replace(f".{depth - 1}.", f".{number}.", 1): value for key, value in of_last.items()}
            source |= copies

        dtype = bert_config.dtype if dtype == "auto" else dtype
        model = cls._from_config(config, dtype=dtype or torch.float32, attn_implementation=attn_implementation)
        if cls.base_model_prefix not in model._modules:
            prefix = f"{cls.base_model_prefix}."
            source = {key.removeprefix(prefix): value for key, value in source.items()}
        target = set(model.state_dict())
        # A tied decoder is the word embeddings and the head's bias, whatever the checkpoint says.
        decoder = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
        tied = decoder if config.tie_word_embeddings else set()
        new = sorted(target - set(source) - tied)
        unused = sorted({*unused, *(set(source) - target)} - tied)

        wrong = [f"new: {key}" for key in new if not _NEW_KEYS.match(key)]
        for key in unused:
            layer = _LAYER_KEY.match(key)
            if not (_UNUSED_KEYS.match(key) or (layer and int(layer[1]) >= config.num_hidden_layers)):
                wrong.append(f"unused: {key}")
        if wrong:
            raise ValueError(
                f"{name} does not fit {cls.__name__}. Keys that neither side may lack: {wrong}. Is it a complete BERT "
                "checkpoint, saved by transformers?"
            )
        model.load_state_dict({key: value for key, value in source.items() if key in target - tied}, strict=False)
        model.tie_weights()
        model.eval()  # As from_pretrained leaves it.
        told = f"{cls.__name__} from BERT {name}: new are {_parts_of(new)}"
        if config.num_hidden_layers > depth:
            told += f"; {config.num_hidden_layers - depth} layers after the BERT's {depth} begin as copies of its last"
        logger.warning(f"{told}; unused in the checkpoint {_parts_of(unused)}." if unused else f"{told}.")
        return (model, BertLoadingReport(new=new, unused=unused)) if output_loading_info else model

    @classmethod
    def _config_from_bert(cls, name: str, bert_config: BertConfig, overrides: dict) -> UnicoderVLConfig:
        fields = set(UnicoderVLConfig.__dataclass_fields__)
        if unknown := sorted(set(overrides) - fields - {"num_labels"}):
            raise ValueError(f"from_bert got {unknown}, which are not fields of UnicoderVLConfig: {sorted(fields)}.")
        bert_fields = bert_config.to_dict()
        fixed = "vocab_size hidden_size num_attention_heads intermediate_size type_vocab_size max_position_embeddings"
        for field in fixed.split():
            if overrides.get(field, bert_fields[field]) != bert_fields[field]:
                raise ValueError(f"{field}={overrides[field]}, but the weights of {name} have {bert_fields[field]}.")
        if overrides.get("num_text_layers") == -1:
            depth = bert_config.num_hidden_layers
            overrides = {"num_hidden_layers": depth + 2} | overrides | {"num_text_layers": depth}
        inherited = {field: bert_fields[field] for field in UnicoderVLConfig.__annotations__ if field in bert_fields}
        return UnicoderVLConfig(**inherited | overrides)


@auto_docstring(
    custom_intro="""
    The bare Unicoder-VL encoder over the sequence of text, then regions. Without regions it is BERT, to the same
    values.

    On CPUs, and where FlashAttention is chosen, the layers compute no padding where `config.padding_free` says so: by
    default in training, and always if it is `True`. The values are the same where there is something, and zeros where
    there is padding, in less time. Shapes then depend on the data, so that padding is computed while a graph is
    compiled, traced or exported.
    """
)
class UnicoderVLModel(UnicoderVLPreTrainedModel):
    _auto_class = "AutoModel"

    def __init__(self, config: UnicoderVLConfig):
        super().__init__(config)
        self.embeddings = UnicoderVLEmbeddings(config)
        self.encoder = UnicoderVLEncoder(config)
        self.pooler = UnicoderVLPooler(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        """The embeddings of the tokens, `nn.Embedding`."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        """Replaces the embeddings of the tokens by another `nn.Embedding`."""
        self.embeddings.word_embeddings = value

    @capture_outputs
    @auto_docstring(
        custom_args=INPUTS_DOCSTRING
        + PAIRING_DOCSTRING
        + MASKED_REGIONS_DOCSTRING
        + REGION_TYPES_DOCSTRING
        + WORD_STATES_DOCSTRING
        + JOINT_MASK_DOCSTRING
    )
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        region_features: torch.Tensor | None = None,
        region_locations: torch.Tensor | None = None,
        region_attention_mask: torch.Tensor | None = None,
        token_region_ids: torch.LongTensor | None = None,
        caption_index: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        masked_regions: torch.Tensor | None = None,
        region_token_type_ids: torch.LongTensor | None = None,
        word_states: torch.Tensor | None = None,
        joint_attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        joint = self._embed(
            kwargs,
            word_states=word_states,
            joint_attention_mask=joint_attention_mask,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            region_features=region_features,
            region_locations=region_locations,
            region_attention_mask=region_attention_mask,
            token_region_ids=token_region_ids,
            caption_index=caption_index,
            image_index=image_index,
            masked_regions=masked_regions,
            region_token_type_ids=region_token_type_ids,
        )
        if joint.mask is not None and self.packs(**kwargs):
            hidden_states = self._encode_without_padding(joint.states, joint.mask, self.joint_layers)
        else:
            encoder_mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=joint.states, attention_mask=joint.mask
            )
            hidden_states = self.encoder(joint.states, encoder_mask, self.joint_layers, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self.pooler(hidden_states, joint.text_mask)
        )

    @property
    def text_layers(self) -> slice:
        """The first layers, which read words alone."""
        return slice(self.config.num_text_layers)

    @property
    def joint_layers(self) -> slice:
        """The layers that read words and regions: all but the text layers."""
        return slice(self.config.num_text_layers, None)

    def records(self, **kwargs) -> bool:
        """Whether the states or the attentions of layers are asked for."""
        return any(
            kwargs.get(name, getattr(self.config, name)) for name in ("output_hidden_states", "output_attentions")
        )

    def packs(self, **kwargs) -> bool:
        """Whether padding is left out: the config asks for it, it pays, and neither layers nor a graph are recorded."""
        asked = self.training if self.config.padding_free is None else self.config.padding_free
        flash = is_flash_attention_requested(requested_attention_implementation=self.config._attn_implementation)
        return asked and not self.records(**kwargs) and not is_tracing() and (flash or self.device.type == "cpu")

    def pooled(
        self,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        region_features: torch.Tensor | None = None,
        region_locations: torch.Tensor | None = None,
        region_attention_mask: torch.Tensor | None = None,
        token_region_ids: torch.Tensor | None = None,
        caption_index: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        region_token_type_ids: torch.Tensor | None = None,
        masked_regions: torch.Tensor | None = None,
        word_states: torch.Tensor | None = None,
        joint_attention_mask: torch.Tensor | None = None,
        with_means: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UnicoderVLPooledOutput:
        """
        Encodes as `forward` does, with its arguments, for a head that reads `pooler_output` alone, of shape
        `(batch_size, hidden_size)`, or the `means` of [`UnicoderVLPooledOutput`] as well, which a model with text
        layers has not. Where padding is left out, the last layer computes `[CLS]` alone, and where both indices are
        empty, nothing is computed; in either case `last_hidden_state` is None. Text layers are not computed again where
        `word_states`, what [`~UnicoderVLModel.encode_words`] made of the same text, are given. In training the layers
        that read words and regions see neither of some, by `config.joint_dropout_prob`.
        """
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "region_features": region_features,
            "region_locations": region_locations,
            "region_attention_mask": region_attention_mask,
            "token_region_ids": token_region_ids,
            "caption_index": caption_index,
            "image_index": image_index,
            "region_token_type_ids": region_token_type_ids,
            "masked_regions": masked_regions,
        }
        if self.training and self.config.joint_dropout_prob > 0:
            self._check_shapes(**inputs)
            drawn = self._joint_dropout(inputs)
            joint_attention_mask = drawn if joint_attention_mask is None else drawn & joint_attention_mask.bool()
        inputs |= {"word_states": word_states, "joint_attention_mask": joint_attention_mask}
        means = None
        if caption_index is not None and image_index is not None and not (len(caption_index) or len(image_index)):
            first = self.pooler.dense.weight.new_zeros(0, self.config.hidden_size)
            if with_means:
                means = first.new_zeros(0, 2, self.config.hidden_size)
        elif self.packs(**kwargs):
            joint = self._embed(kwargs, **inputs)
            packed, groups, index, rows = _pack(joint.states, joint.mask)
            is_region = None
            if with_means:
                num_regions = 0 if region_features is None else region_features.shape[1]
                is_region = index % joint.states.shape[1] >= joint.states.shape[1] - num_regions
            first, means = self.encode_packed(packed, groups, is_region=is_region)
            first, means = (
                None if of is None else of.new_zeros(len(joint.states), *of.shape[1:]).index_copy(0, rows, of)
                for of in (first, means)
            )
        elif not with_means:
            return UnicoderVLPooledOutput(**self(**inputs, **kwargs, return_dict=True))
        else:
            return self._pooled_with_means(inputs, **kwargs)
        return UnicoderVLPooledOutput(pooler_output=self.pooler(first[:, None]), means=means)

    def _joint_dropout(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Draws what the layers that read words and regions see of each row: all of it, or not, but for `[CLS]`."""
        text, mask, regions = (inputs[name] for name in ("input_ids", "attention_mask", "region_features"))
        text = inputs["inputs_embeds"] if text is None else text
        index = inputs["caption_index"]
        num_rows = len(text if index is None else index)
        length = text.shape[1] + (0 if regions is None else regions.shape[1])
        seen = torch.rand(num_rows, length, device=text.device) >= self.config.joint_dropout_prob
        text_mask = seen[:, :1] if mask is None else _pick_rows(mask, index)
        return seen.scatter(1, text_mask.long().argmax(-1, keepdim=True), True)

    def _pooled_with_means(self, inputs: dict[str, Any], **kwargs: Any) -> UnicoderVLPooledOutput:
        """Encodes padded sequences, and averages the states of the attended words and of the attended regions."""
        asked = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        kwargs |= {"output_hidden_states": True, "return_dict": True}
        outputs = UnicoderVLPooledOutput(**self(**inputs, **kwargs))
        layers: Any = outputs.hidden_states
        states = torch.stack([layer.float() for layer in layers[:-1]]).mean(0)
        num_regions = 0 if inputs["region_features"] is None else inputs["region_features"].shape[1]
        sizes = (states.shape[1] - num_regions, num_regions)
        masks = (
            _pick_rows(inputs["attention_mask"], inputs["caption_index"]),
            _pick_rows(inputs["region_attention_mask"], inputs["image_index"]),
        )
        if (seen := inputs["joint_attention_mask"]) is not None:
            each = zip(masks, seen.split(sizes, dim=1), strict=True)
            masks = tuple(of if mask is None else mask * of for mask, of in each)
        parts = states.split(sizes, dim=1)
        outputs.means = torch.stack([_masked_mean(*part) for part in zip(parts, masks, strict=True)], dim=1)
        if not asked:
            outputs.hidden_states = None
        return outputs

    def mean_states(
        self,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        region_features: torch.Tensor | None = None,
        region_locations: torch.Tensor | None = None,
        region_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Averages the hidden states over the attended positions, and over what the joint layers begin with, the
        embeddings where there are no text layers, and all of them. The arguments are those of `forward`.

        Returns:
            `torch.Tensor` of shape `(batch_size, hidden_size)`, float32; zeros for a row without an attended position.
        """
        # The last layer of a pre-trained encoder tells less of one modality alone: with it frozen, recall on Flickr8k
        # is a fifth lower than that of the mean over all.
        joint = self._embed(
            {},
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            region_features=region_features,
            region_locations=region_locations,
            region_attention_mask=region_attention_mask,
        )
        if len(joint.states) == 0:
            return joint.states.new_zeros(0, joint.states.shape[-1], dtype=torch.float32)
        packed, groups, index, _ = _pack(joint.states, joint.mask)
        sequences = PackedSequences(groups, packed.device, self.config._attn_implementation)
        states, total = sequences.fill_up(packed)[None], packed.float()
        layers, attention = self.encoder.layer[self.joint_layers], sequences.attention_kwargs()
        for layer in layers:
            states = layer(states, **attention)
            total = total + states[0, : len(total)].float()
        row = index // joint.states.shape[1]
        return _means_of(total, row, len(joint.states), len(layers) + 1)

    def encode_words(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Encodes words by the text layers, if there are any. The arguments are those of `forward`.

        Returns:
            `torch.Tensor` of shape `(num_captions, sequence_length, hidden_size)`, the states of the last text layer.
        """
        text: Any = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        states = self.embeddings.dropout(self.embeddings.embed_text(*text))
        if self.packs(**kwargs) and states.numel() > 0:
            return self._encode_without_padding(states, attention_mask, self.text_layers)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=states, attention_mask=attention_mask)
        return self.encoder(states, mask, self.text_layers, **kwargs)

    def encode_every_token(
        self, hidden_states: torch.Tensor, groups: list[tuple[int, int]], layers: slice
    ) -> torch.Tensor:
        """
        Encodes sequences without padding by these of the layers: `(num_tokens, hidden_size)`. The other arguments are
        those of [`~UnicoderVLModel.encode_packed`].
        """
        sequences = PackedSequences(groups, hidden_states.device, self.config._attn_implementation)
        filled = sequences.fill_up(hidden_states)
        return self.encoder(filled[None], layers=layers, **sequences.attention_kwargs())[0, : len(hidden_states)]

    def _encode_without_padding(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None, layers: slice
    ) -> torch.Tensor:
        packed, groups, index, _ = _pack(hidden_states, mask)
        encoded = self.encode_every_token(packed, groups, layers)
        padded = encoded.new_zeros(hidden_states.shape[:2].numel(), encoded.shape[-1])
        return padded.index_copy(0, index, encoded).view(hidden_states.shape)

    def _embed(
        self, options: dict[str, Any], *, word_states=None, input_ids=None, attention_mask=None, token_type_ids=None,
        position_ids=None, inputs_embeds=None, region_features=None, region_locations=None, region_attention_mask=None,
        token_region_ids=None, caption_index=None, image_index=None, masked_regions=None, region_token_type_ids=None,
        joint_attention_mask=None,
    ) -> JointStates:  # fmt: skip
        """Embeds text and regions, and encodes each caption by the text layers, if there are any, with `options`."""
        self._check_shapes(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, region_features, region_locations,
            region_attention_mask, token_region_ids, caption_index, image_index, masked_regions, region_token_type_ids,
        )  # fmt: skip
        text_mask, region_mask = (
            _pick_rows(attention_mask, caption_index),
            _pick_rows(region_attention_mask, image_index),
        )
        if self.config.num_text_layers:
            if word_states is None:
                text = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
                word_states = self.encode_words(*text, **options)
            hidden_states = _pick_rows(word_states, caption_index)
            if region_features is not None:
                embed = self.embeddings
                regions = embed.embed_regions(region_features, region_locations, masked_regions, region_token_type_ids)
                regions = _pick_rows(embed.dropout(embed.add_image_token(regions)), image_index)
                hidden_states = torch.cat((hidden_states, regions.to(hidden_states.dtype)), dim=1)
        else:
            hidden_states = self.embeddings(
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                region_features=region_features,
                region_locations=region_locations,
                masked_regions=masked_regions,
                token_region_ids=token_region_ids,
                caption_index=caption_index,
                image_index=image_index,
                region_token_type_ids=region_token_type_ids,
            )
        joint_mask = text_mask
        if region_features is not None and (text_mask is not None or region_mask is not None):
            batch_size, num_regions = hidden_states.shape[0], region_features.shape[1]
            ones = hidden_states.new_ones((), dtype=torch.bool)
            text_part = (
                ones.expand(batch_size, hidden_states.shape[1] - num_regions) if text_mask is None else text_mask
            )
            region_part = ones.expand(batch_size, num_regions) if region_mask is None else region_mask
            joint_mask = torch.cat((text_part.bool(), region_part.bool()), dim=1)
        if joint_attention_mask is not None:
            _check_shape("joint_attention_mask", joint_attention_mask, tuple(hidden_states.shape[:2]))
            seen = joint_attention_mask.bool()
            joint_mask = seen if joint_mask is None else joint_mask.bool() & seen
        return JointStates(hidden_states, joint_mask, text_mask)

    def encode_packed(
        self,
        hidden_states: torch.Tensor,
        groups: list[tuple[int, int]],
        projected: Sequence[torch.Tensor] | None = None,
        is_region: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        r"""
        Encodes sequences without padding for a head that reads `[CLS]` alone: there is no attention mask, and the last
        layer computes the first token of each sequence alone. The values are those of `forward`, but for rounding.
        The text layers, if there are any, have encoded the words already.

        Args:
            hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`):
                The embeddings of all sequences, one behind the other, those of equal length side by side.
            groups (`list[tuple[int, int]]`):
                Number and length of the sequences of each length, in the order in which they lie.
            projected (three `torch.Tensor` of shape `(num_tokens, hidden_size)`, *optional*):
                Queries, keys and values of these states in the first of several layers, where they are known.
            is_region (`torch.BoolTensor` of shape `(num_tokens,)`, *optional*):
                Whether a state is that of a region, where the means are asked for.

        Returns:
            `torch.Tensor` of shape `(num_sequences, hidden_size)`: the first row of each sequence's last hidden state;
            and the `means` of [`UnicoderVLPooledOutput`], None without `is_region`.
        """
        packed = PackedSequences(groups, hidden_states.device, self.config._attn_implementation)
        *layers, last_layer = self.encoder.layer[self.joint_layers]
        kwargs = packed.attention_kwargs()
        known = None if projected is None else tuple(packed.fill_up(states)[None] for states in projected)
        total = None if is_region is None else hidden_states.float()
        hidden_states = packed.fill_up(hidden_states)[None]
        for layer in layers:
            hidden_states, known = layer(hidden_states, projected=known, **kwargs), None
            total = None if total is None else total + hidden_states[0, : len(total)].float()
        first = packed.fill_up(hidden_states[0, packed.starts])[None]
        kwargs = packed.attention_kwargs(first_only=True)
        # By position: reentrant checkpoints cut the graph at positional arguments alone.
        first = last_layer(hidden_states, kwargs.pop("attention_mask", None), first, **kwargs)[0, : len(packed.starts)]
        if is_region is None or total is None:
            return first, None
        part = 2 * packed.sequence_of_tokens() + is_region  # words and regions of each sequence
        return first, _means_of(total, part, 2 * len(first), len(self.encoder.layer)).view(len(first), 2, -1)

    def _check_shapes(
        self, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, region_features, region_locations,
        region_attention_mask, token_region_ids, caption_index, image_index, masked_regions, region_token_type_ids,
    ):  # fmt: skip
        """Checks shapes only: a look at a value would wait for the GPU and break a compiled graph."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if input_ids is not None and input_ids.ndim != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected (batch_size, sequence_length).")
        if inputs_embeds is not None and (
            inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != self.config.hidden_size
        ):
            raise ValueError(
                f"inputs_embeds has shape {tuple(inputs_embeds.shape)}, expected (batch_size, sequence_length, "
                f"hidden_size={self.config.hidden_size})."
            )
        if token_region_ids is not None and self.config.num_text_layers:
            raise ValueError(
                "token_region_ids need num_text_layers=0: a word that refers to a region reads it from the start."
            )
        text_name, text = ("inputs_embeds", inputs_embeds) if input_ids is None else ("input_ids", input_ids)
        num_captions, length = text.shape[:2]
        if position_ids is None and length > self.config.max_position_embeddings:
            raise ValueError(
                f"{text_name} has {length} tokens, the model {self.config.max_position_embeddings} positions "
                "(max_position_embeddings): truncate it."
            )
        text_shape = (num_captions, length)
        _check_shape("attention_mask", attention_mask, text_shape)
        _check_shape("token_type_ids", token_type_ids, text_shape)
        _check_shape("token_region_ids", token_region_ids, text_shape)
        if position_ids is not None and tuple(position_ids.shape) != (1, length):
            _check_shape("position_ids", position_ids, text_shape)

        for name, index in (("caption_index", caption_index), ("image_index", image_index)):
            if index is not None and index.ndim != 1:
                raise ValueError(f"{name} has shape {tuple(index.shape)}, expected (batch_size,).")

        if region_features is None:
            for name, value in (
                ("region_locations", region_locations),
                ("region_attention_mask", region_attention_mask),
                ("token_region_ids", token_region_ids),
                ("image_index", image_index),
                ("masked_regions", masked_regions),
                ("region_token_type_ids", region_token_type_ids),
            ):
                if value is not None:
                    raise ValueError(f"{name} was given without region_features.")
            return
        if region_features.ndim != 3 or region_features.shape[-1] != self.config.region_feature_dim:
            raise ValueError(
                f"region_features has shape {tuple(region_features.shape)}, expected (batch_size, num_regions, "
                f"region_feature_dim={self.config.region_feature_dim}): give the features of the detector that the "
                "model was made for, or set region_feature_dim."
            )
        if region_locations is None:
            raise ValueError("region_features was given without region_locations: give zeros where boxes are unknown.")
        region_shape = tuple(region_features.shape[:2])
        _check_shape("region_locations", region_locations, (*region_shape, self.config.region_location_dim))
        _check_shape("region_attention_mask", region_attention_mask, region_shape)
        _check_shape("masked_regions", masked_regions, region_shape)
        _check_shape("region_token_type_ids", region_token_type_ids, region_shape)
        if region_token_type_ids is not None and not (
            self.config.num_region_types or self.config.region_embedding == "uniter"
        ):
            raise ValueError(
                "region_token_type_ids were given, but this model has no types of regions: set num_region_types."
            )
        rows = (
            num_captions if caption_index is None else caption_index.shape[0],
            region_shape[0] if image_index is None else image_index.shape[0],
        )
        if rows[0] != rows[1]:
            raise ValueError(
                f"{text_name} of shape {tuple(text.shape)} gives {rows[0]} rows, but region_features of shape "
                f"{tuple(region_features.shape)} gives {rows[1]}: give an image for each caption, or caption_index and "
                "image_index of equal length."
            )


PRETRAINING_LABELS_DOCSTRING = r"""
    labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
        The token to predict, in `[0, vocab_size)`, or -100 where none is.
    region_labels (`torch.LongTensor` of shape `(batch_size, num_regions)`, *optional*):
        The object class to predict, in `[0, num_region_classes)`, or -100 where none is.
    matching_labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
        1 = match, 0 = mismatch (its tokens and regions do not count), -100 = unknown (they count, matching does not).
        Defaults to unknown.
    sparse_prediction (`bool`, *optional*):
        Whether `prediction_logits` are computed for the counted tokens alone. Defaults to `config.sparse_prediction` in
        training, else to `False`; without `labels` it has no effect.
"""


@auto_docstring(
    custom_intro="""
    Unicoder-VL with the heads of its three pre-training tasks (paper, Pre-training Tasks): masked language modelling,
    tied to the word embeddings; masked object classification; and visual-linguistic matching.

    With `config.sparse_prediction` the language modelling head is computed, in training and where there are `labels`,
    on the counted tokens only, those whose label is not -100 in rows that are not mismatches: the same loss and
    gradients in less time, but `prediction_logits` is then `(num_counted_tokens, vocab_size)` in row-major order, and
    its shape depends on the data, which breaks a compiled graph.
    """
)
class UnicoderVLForPreTraining(UnicoderVLPreTrainedModel):
    _auto_class = "AutoModelForPreTraining"
    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: UnicoderVLConfig):
        super().__init__(config)
        if config.matching_head != "unicoder_vl":
            raise ValueError(
                f"matching_head={config.matching_head!r} reads a first stage of search, which pre-training has not: "
                "load the model with matching_head='unicoder_vl'."
            )
        self.bert = UnicoderVLModel(config)
        self.cls = UnicoderVLOnlyMLMHead(config)
        self.region_head = UnicoderVLLinear(config.hidden_size, config.num_region_classes)
        if config.region_head == "uniter":
            decoder = UnicoderVLLinear(config.hidden_size, 1 + config.num_region_classes)
            self.region_head = nn.Sequential(UnicoderVLPredictionHeadTransform(config), decoder)
        self.matching_head = UnicoderVLMatchingHead(config)
        self.post_init()

    def get_output_embeddings(self):
        """The decoder of masked language modelling, `nn.Linear`."""
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings):
        """Replaces the decoder of masked language modelling by another `nn.Linear`, whose bias becomes the head's."""
        self.cls.predictions.decoder = new_embeddings
        # One parameter under two names while tied; otherwise two, or a saved checkpoint would lack one of them.
        tied = self.config.tie_word_embeddings
        self.cls.predictions.bias = new_embeddings.bias if tied else nn.Parameter(new_embeddings.bias.detach().clone())

    @can_return_tuple
    @auto_docstring(custom_args=INPUTS_DOCSTRING + PRETRAINING_LABELS_DOCSTRING + MASKED_REGIONS_DOCSTRING)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        region_features: torch.Tensor | None = None,
        region_locations: torch.Tensor | None = None,
        region_attention_mask: torch.Tensor | None = None,
        token_region_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        region_labels: torch.LongTensor | None = None,
        matching_labels: torch.LongTensor | None = None,
        sparse_prediction: bool | None = None,
        masked_regions: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UnicoderVLForPreTrainingOutput:
        if sparse_prediction is None:
            sparse_prediction = self.training and self.config.sparse_prediction
        outputs = self.bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            region_features=region_features,
            region_locations=region_locations,
            region_attention_mask=region_attention_mask,
            token_region_ids=token_region_ids,
            masked_regions=masked_regions,
            **kwargs,
            return_dict=True,
        )
        num_regions = 0 if region_features is None else region_features.shape[1]
        text, regions = outputs.last_hidden_state.tensor_split(
            (outputs.last_hidden_state.shape[1] - num_regions,), dim=1
        )
        _check_shape("labels", labels, tuple(text.shape[:2]))
        _check_shape("region_labels", region_labels, tuple(regions.shape[:2]))
        _check_shape("matching_labels", matching_labels, (text.shape[0],))

        matching_logits = self.matching_head(outputs.pooler_output)
        region_logits = None if region_features is None else self.region_head(regions)
        counted = None if matching_labels is None else matching_labels != 0  # rows whose tokens and regions count
        mlm_loss = moc_loss = matching_loss = None
        if labels is None:
            prediction_logits = self.cls(text)
        elif sparse_prediction:
            weights = _target_weights(labels, counted)
            picked = weights > 0
            prediction_logits = self.cls(text[picked])
            token_losses = nn.functional.cross_entropy(prediction_logits.float(), labels[picked], reduction="none")
            mlm_loss = (token_losses * weights[picked]).sum()
        else:
            prediction_logits = self.cls(text)
            mlm_loss = _masked_prediction_loss(prediction_logits, labels, counted)
        if region_labels is not None and region_logits is not None:
            background = region_logits.shape[-1] - self.config.num_region_classes  # 1 if the first logit is of it
            targets: Any = region_labels.where(region_labels == -100, region_labels + background)
            moc_loss = _masked_prediction_loss(region_logits, targets, counted)
        if matching_labels is not None:
            row_losses = nn.functional.cross_entropy(matching_logits, matching_labels, reduction="none")
            matching_loss = row_losses.sum() / row_losses.shape[0]

        parts = [part for part in (mlm_loss, moc_loss, matching_loss) if part is not None]
        return UnicoderVLForPreTrainingOutput(
            loss=sum(parts[1:], parts[0]) if parts else None,
            prediction_logits=prediction_logits,
            region_logits=region_logits,
            matching_logits=matching_logits,
            scores=matching_logits[:, 1] - matching_logits[:, 0],
            mlm_loss=mlm_loss,
            moc_loss=moc_loss,
            matching_loss=matching_loss,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


RETRIEVAL_LABELS_DOCSTRING = r"""
    group_ids (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
        The group of each row, any number: one or more matches and their mismatches. The loss is then the
        hardest-negative triplet loss with `config.triplet_margin`, else cross-entropy. Needs `caption_index` and
        `image_index`, which tell a caption negative (it shares the match's image) from an image negative (it shares the
        match's caption).
    labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
        1 = match, 0 = mismatch, -100 = ignored.
    first_stage_captions (`torch.LongTensor` of shape `(num_first_stage_captions,)`, *optional*):
        Rows of `input_ids` that the first stage compares with each of `first_stage_images`, which gives
        `first_stage_logits` beside the scores. Needs a model with `config.projection_dim`.
    first_stage_images (`torch.LongTensor` of shape `(num_first_stage_images,)`, *optional*):
        Rows of `region_features` that the first stage compares with each of `first_stage_captions`.
"""


@auto_docstring(
    custom_intro="""
    Unicoder-VL for image-text retrieval: the matching head of pre-training, under the same parameter names, so that a
    pre-trained checkpoint scores pairs without fine-tuning (paper, Image-Text Retrieval, zero-shot).

    With `labels` and `group_ids` the loss is the paper's hardest-negative triplet loss, with `labels` alone the
    cross-entropy of the two logits. Any other loss is a function of the scores and of what the batch says about them;
    several, hard negatives of the batch among them, are in `unicoder_vl_hf.tasks.retrieval.losses`.

    With `config.projection_dim` the model has a first stage as well, `encode_text` and `encode_image`, for a search
    among more images than can be scored. It is trained by a contrastive loss of its logits, along with the loss of the
    groups or instead of it, or alone, by `unicoder-vl train-first-stage`.
    """
)
class UnicoderVLForImageTextRetrieval(UnicoderVLPreTrainedModel):
    _auto_class = "AutoModelForSequenceClassification"
    # The other heads of pre-training, which zero-shot does without.
    # And a bank of another training, where the config has none.
    _keys_to_ignore_on_load_unexpected = [r"^(cls|region_head)\.", r"^first_stage\.query_bank\."]

    def __init__(self, config: UnicoderVLConfig):
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(
                f"num_labels={config.num_labels}, but the matching head has two logits always (0 mismatch, 1 match)."
            )
        self.bert = UnicoderVLModel(config)
        self.matching_head = UnicoderVLMatchingHead(config)
        self.first_stage = (
            None if config.projection_dim is None else UnicoderVLFirstStage(config, config.projection_dim)
        )
        if config.matching_head == "similarity":
            self._first_stage()
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """
        Loads a model as [`~PreTrainedModel.from_pretrained`] does. Where the first stage is not loaded whole,
        `config.first_stage_trained` becomes `False` and `config.similarity_weight` None. Where another matching head or
        query bank is asked for, so does the weight, and `config.calibration`: they are of the scores that were.
        """
        model, report = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        new = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
        if model.first_stage is None or any(key.startswith("first_stage.") for key in new):
            model.config.first_stage_trained = False
            model.config.similarity_weight = None  # which was measured with it
        if {"matching_head", "query_bank_size"} & kwargs.keys():
            model.config.similarity_weight = model.config.calibration = None
        return (model, report) if output_loading_info else model

    def encode_text(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""
        Embeds captions alone, for a first stage of search.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds:
                The arguments of `forward`.

        Returns:
            `torch.Tensor` of shape `(batch_size, projection_dim)`, float32, of unit length: its product with what
            [`~UnicoderVLForImageTextRetrieval.encode_image`] returns is a similarity in `[-1, 1]`.

        Raises:
            `ValueError`: the model has no first stage.
        """
        first_stage = self._first_stage()
        return first_stage.embed_text(
            self.text_states(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )

    def encode_image(
        self,
        region_features: torch.Tensor,
        region_locations: torch.Tensor | None,
        region_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""
        Embeds images alone, for a first stage of search.

        Args:
            region_features, region_locations, region_attention_mask:
                The arguments of `forward`.

        Returns:
            `torch.Tensor` of shape `(batch_size, projection_dim)`, float32, of unit length, see
            [`~UnicoderVLForImageTextRetrieval.encode_text`].

        Raises:
            `ValueError`: the model has no first stage.
        """
        first_stage = self._first_stage()
        return first_stage.embed_image(self.image_states(region_features, region_locations, region_attention_mask))

    def text_states(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Averages over tokens, embeddings and layers, `(batch_size, hidden_size)`, float32; `encode_text` projects it.
        Where there are text layers, it is the states of their last that are averaged.
        """
        if self.config.num_text_layers:
            words = self.bert.encode_words(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
            return _masked_mean(words.float(), attention_mask)
        return self.bert.mean_states(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )

    def image_states(
        self,
        region_features: torch.Tensor,
        region_locations: torch.Tensor | None,
        region_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Averages over regions, embeddings and layers, `(batch_size, hidden_size)`, float32; `encode_image` projects it.
        Where there are text layers, it is the embeddings of the regions, weighed by a learned attention.
        """
        if self.config.num_text_layers:
            embed = self.bert.embeddings
            regions = embed.dropout(embed.add_image_token(embed.embed_regions(region_features, region_locations)))
            return self._first_stage().mean_of_regions(regions, region_attention_mask)
        # An image alone is a sequence with a text of no token.
        no_text = region_features.new_empty((len(region_features), 0, self.config.hidden_size), dtype=self.dtype)
        return self.bert.mean_states(
            inputs_embeds=no_text,
            region_features=region_features,
            region_locations=region_locations,
            region_attention_mask=region_attention_mask,
        )

    def set_query_bank(self, texts: torch.Tensor, images: torch.Tensor) -> None:
        """
        Keeps embeddings of training captions and images, by which scores tell what is near to everything: from the
        first stage's logit of a pair, which the score holds, is taken how near its caption is to these images, and its
        image to these captions. Without it a few images are among the best of many captions, whatever these say. In
        training mode it counts for nothing. A similarity weight and a calibration, of other scores, are dropped.

        Args:
            texts (`torch.Tensor` of shape `(num_texts, projection_dim)`): What `encode_text` gave for captions.
            images (`torch.Tensor` of shape `(num_images, projection_dim)`): What `encode_image` gave for images.

        Raises:
            `ValueError`: the score does not hold the first stage's own logit (`matching_head="similarity"` after text
            layers), or there is no caption or no image, or one of another width.
        """
        if self.config.matching_head != "similarity" or not self.config.num_text_layers:
            raise ValueError(
                f"matching_head={self.config.matching_head!r}, num_text_layers={self.config.num_text_layers}; expected "
                "a similarity after text layers, from which a query bank is subtracted."
            )
        first_stage = self._first_stage()
        width = first_stage.text_projection.out_features
        for name, given in (("texts", texts), ("images", images)):
            if given.ndim != 2 or given.shape[1] != width or len(given) == 0:
                raise ValueError(f"{name} has shape {tuple(given.shape)}, expected (at least 1, {width}).")
        self.config.query_bank_size = [len(texts), len(images)]
        bank = UnicoderVLQueryBank(self.config.query_bank_size, width)
        bank.to(device=self.device, dtype=self.dtype).fill(texts, images)
        first_stage.query_bank = bank
        self.config.calibration = self.config.similarity_weight = None  # of other scores

    def remove_query_bank(self) -> None:
        """
        Forgets the query bank, if there is one: for scores of captions of one image, of which what is near to all
        images says nothing. A similarity weight and a calibration, of other scores, are dropped with it; what
        `fold_similarity_weight` shrank stays so.
        """
        if self.config.query_bank_size is not None:
            self._first_stage().query_bank = self.config.query_bank_size = None
            self.config.calibration = self.config.similarity_weight = None

    def fold_similarity_weight(self, weight: float) -> None:
        """
        Shrinks what `[CLS]` adds to a score, so that the score alone orders as score + `weight` x similarity did, whose
        weight was measured on validation captions: photos that were learned by heart make it too sure. The weight
        becomes 0.

        Raises:
            `ValueError`: the score does not hold the first stage's own logit (`matching_head="similarity"` after text
            layers), or the weight is below 0.
        """
        if self.config.matching_head != "similarity" or not self.config.num_text_layers or weight < 0:
            raise ValueError(
                f"weight={weight}, matching_head={self.config.matching_head!r}, num_text_layers="
                f"{self.config.num_text_layers}; expected a weight of at least 0 and a similarity after text layers."
            )
        scale = self._first_stage().logits(*torch.eye(1, device=self.device).expand(2, 1, 1)).item()
        with torch.no_grad():
            for parameter in self.matching_head.parameters():
                parameter.mul_(scale / (scale + weight))
        self.config.similarity_weight, self.config.calibration = 0.0, None  # which is of the scores before

    def _first_stage(self) -> UnicoderVLFirstStage:
        if self.first_stage is None:
            raise ValueError(
                "This model has no first stage: its config.projection_dim is None. Load it with projection_dim=256, "
                "say, and train it with --contrastive_weight, or with `unicoder-vl train-first-stage`."
            )
        return self.first_stage

    @can_return_tuple
    @auto_docstring(
        custom_args=INPUTS_DOCSTRING + PAIRING_DOCSTRING + RETRIEVAL_LABELS_DOCSTRING + WORD_STATES_DOCSTRING
    )
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        region_features: torch.Tensor | None = None,
        region_locations: torch.Tensor | None = None,
        region_attention_mask: torch.Tensor | None = None,
        token_region_ids: torch.LongTensor | None = None,
        caption_index: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        group_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        first_stage_captions: torch.LongTensor | None = None,
        first_stage_images: torch.LongTensor | None = None,
        word_states: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UnicoderVLForImageTextRetrievalOutput:
        if region_features is None:
            raise ValueError("Image-text retrieval needs region_features: a caption is scored with an image.")
        if group_ids is not None and (caption_index is None or image_index is None):
            raise ValueError(
                "group_ids needs caption_index and image_index: give both, they tell the negatives that share a "
                "match's image from those that share its caption."
            )
        if "mismatches" in kwargs:
            raise ValueError(
                "mismatches are for a contrastive loss, which calls the model itself: TwoStageLoss(groups)(model, "
                "batch), see unicoder_vl_hf.tasks.retrieval.losses. Leave them out to score."
            )
        if (first_stage_captions is None) != (first_stage_images is None):
            raise ValueError("Give first_stage_captions and first_stage_images together: each meets each.")
        # `len` would fix the number of pairs in an exported graph.
        num_pairs = (region_features if image_index is None else image_index).shape[0]
        _check_shape("labels", labels, (num_pairs,))
        _check_shape("group_ids", group_ids, (num_pairs,))

        text: Any = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        regions: Any = (region_features, region_locations, region_attention_mask)
        by_similarity = self.config.matching_head == "similarity"
        first_stage_logits = similarity = None
        if self.config.num_text_layers:  # what they give serves the first stage and the pairs
            if word_states is None:
                word_states = self.bert.encode_words(*text, **kwargs)
            if first_stage_captions is not None or by_similarity:
                first_stage = self._first_stage()
                texts = first_stage.embed_text(_masked_mean(word_states.float(), attention_mask))
                images = self.encode_image(*regions)
                if first_stage_captions is not None:
                    first_stage_logits = first_stage.logits(texts[first_stage_captions], images[first_stage_images])
                if by_similarity and (self.config.similarity_in_training or not self.training):
                    if not self.training:  # by a bank of embeddings that the training changes
                        texts, images = first_stage.texts_of_pairs(texts), first_stage.images_of_pairs(images)
                    of_pairs = _pick_rows(texts, caption_index), _pick_rows(images, image_index)
                    similarity = first_stage.pair_logits(*of_pairs)
        elif first_stage_captions is not None:
            if position_ids is not None:  # of which one row may stand for all
                source: Any = input_ids if inputs_embeds is None else inputs_embeds
                text = (*text[:3], position_ids.expand(len(source), -1), inputs_embeds)
            first_stage_logits = self._first_stage().logits(
                self.encode_text(*(_pick_rows(tensor, first_stage_captions) for tensor in text)),
                self.encode_image(*(_pick_rows(tensor, first_stage_images) for tensor in regions)),
            )
        outputs = self.bert.pooled(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            region_features=region_features,
            region_locations=region_locations,
            region_attention_mask=region_attention_mask,
            token_region_ids=token_region_ids,
            caption_index=caption_index,
            image_index=image_index,
            word_states=None if self.bert.records(**kwargs) else word_states,
            with_means=by_similarity and not self.config.num_text_layers,
            **kwargs,
        )
        if outputs.means is not None:
            similarity = self._first_stage().logits_of_means(outputs.means)
        matching_logits = self.matching_head(outputs.pooler_output, similarity)
        scores = matching_logits[:, 1] - matching_logits[:, 0]

        loss = None
        if labels is not None and group_ids is not None and caption_index is not None and image_index is not None:
            loss = hardest_negative_triplet_loss(
                scores, labels, group_ids, caption_index, image_index, margin=self.config.triplet_margin
            )
        elif labels is not None:
            row_losses = nn.functional.cross_entropy(matching_logits, labels, reduction="none")
            loss = row_losses.sum() / (labels != -100).sum().clamp(min=1)
        return UnicoderVLForImageTextRetrievalOutput(
            loss=loss,
            matching_logits=matching_logits,
            scores=scores,
            first_stage_logits=first_stage_logits,
            word_states=None if first_stage_captions is None or not self.config.num_text_layers else word_states,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


MULTIPLE_CHOICE_DOCSTRING = r"""
    input_ids (`torch.LongTensor` of shape `(batch_size, num_choices, sequence_length)`):
        Indices of the tokens of each choice; every text argument has these two leading dimensions.
    region_features (`torch.Tensor` of shape `(batch_size, num_choices, num_regions, region_feature_dim)`, *optional*):
        Or, shared by the choices, `(batch_size, num_regions, region_feature_dim)`; likewise every region argument.
    labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
        The right choice, in `[0, num_choices)`, or -100 = ignored.
"""


@auto_docstring(
    custom_intro="""
    Unicoder-VL for visual commonsense reasoning (paper, Visual Commonsense Reasoning): each choice is passed with the
    image, a projection of `[CLS]` gives its score, softmax over the choices. An image that the choices share is
    embedded once.
    """
)
class UnicoderVLForMultipleChoice(UnicoderVLPreTrainedModel):
    _auto_class = "AutoModelForMultipleChoice"

    def __init__(self, config: UnicoderVLConfig):
        super().__init__(config)
        self.bert = UnicoderVLModel(config)
        self.dropout = UnicoderVLDropout(config.hidden_dropout_prob)
        self.classifier = UnicoderVLFloat32Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    @auto_docstring(custom_args=INPUTS_DOCSTRING + MULTIPLE_CHOICE_DOCSTRING)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        region_features: torch.Tensor | None = None,
        region_locations: torch.Tensor | None = None,
        region_attention_mask: torch.Tensor | None = None,
        token_region_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MultipleChoiceModelOutput:
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or given.ndim != (3 if inputs_embeds is None else 4):
            raise ValueError(
                "Multiple choice needs input_ids (batch_size, num_choices, sequence_length), or inputs_embeds likewise"
                f", got {None if given is None else tuple(given.shape)}."
            )
        choices = batch_size, num_choices = tuple(given.shape[:2])
        image_index = None
        if region_features is not None and region_features.ndim == 3:
            if region_features.shape[0] != batch_size:
                raise ValueError(
                    f"region_features has shape {tuple(region_features.shape)}, expected ({batch_size}, num_regions, "
                    "region_feature_dim), or one more dimension for the choices."
                )
            image_index = torch.arange(batch_size, device=region_features.device).repeat_interleave(num_choices)
        elif region_features is not None:
            region_features = _flatten_choices("region_features", region_features, choices)
            region_locations = _flatten_choices("region_locations", region_locations, choices)
            region_attention_mask = _flatten_choices("region_attention_mask", region_attention_mask, choices)
        outputs = self.bert.pooled(
            input_ids=_flatten_choices("input_ids", input_ids, choices),
            attention_mask=_flatten_choices("attention_mask", attention_mask, choices),
            token_type_ids=_flatten_choices("token_type_ids", token_type_ids, choices),
            position_ids=_flatten_choices("position_ids", position_ids, choices),
            inputs_embeds=_flatten_choices("inputs_embeds", inputs_embeds, choices),
            region_features=region_features,
            region_locations=region_locations,
            region_attention_mask=region_attention_mask,
            token_region_ids=_flatten_choices("token_region_ids", token_region_ids, choices),
            image_index=image_index,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(batch_size, num_choices)
        _check_shape("labels", labels, (batch_size,))

        loss = None
        if labels is not None:
            row_losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            loss = row_losses.sum() / (labels != -100).sum().clamp(min=1)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


IMAGE_INDEX_DOCSTRING = "".join(PAIRING_DOCSTRING.partition("    image_index")[1:])

ANSWER_LABELS_DOCSTRING = r"""
    labels (`torch.Tensor` of shape `(batch_size, num_labels)`, *optional*):
        How right each answer is to each question, in `[0, 1]`, such as its accuracy by the official evaluation of VQA.
        For entailment `(batch_size,)`: the right class, or -100 = ignored.
"""


@auto_docstring(
    custom_intro="""
    Unicoder-VL for questions about images, as UNITER does it: the answers are the classes of `config.id2label`, each
    with a logit of its own, learned by the binary cross-entropy of soft labels, summed over answers and averaged over
    questions. An image that several questions share is embedded once, see `image_index`.

    The head reads BERT's pooler output, or, for VisualBERT's weights (`config.answer_head`), the state of the last
    token but one.
    """
)
class UnicoderVLForQuestionAnswering(UnicoderVLPreTrainedModel):
    _auto_class = "AutoModelForVisualQuestionAnswering"

    def __init__(self, config: UnicoderVLConfig):
        super().__init__(config)
        self.bert = UnicoderVLModel(config)
        num_answers = len(config.id2label or ())
        self.answer_head: nn.Module = UnicoderVLTaskHead(config, num_answers)
        if config.answer_head == "visual_bert":
            self.answer_head = UnicoderVLFloat32Linear(config.hidden_size, num_answers)
        self.post_init()

    @can_return_tuple
    @auto_docstring(custom_args=INPUTS_DOCSTRING + IMAGE_INDEX_DOCSTRING + ANSWER_LABELS_DOCSTRING)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        region_features: torch.Tensor | None = None,
        region_locations: torch.Tensor | None = None,
        region_attention_mask: torch.Tensor | None = None,
        token_region_ids: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        reads_pooler = self.config.answer_head == "uniter"
        encode = self.bert.pooled if reads_pooler else self.bert
        outputs: Any = encode(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            region_features=region_features,
            region_locations=region_locations,
            region_attention_mask=region_attention_mask,
            token_region_ids=token_region_ids,
            image_index=image_index,
            **kwargs,
        )
        num_regions = 0 if region_features is None else region_features.shape[1]
        states = outputs.pooler_output
        if not reads_pooler:
            states = _last_but_one(outputs.last_hidden_state, attention_mask, num_regions)
        logits = self.answer_head(states)
        loss = None
        if labels is not None:
            # Several processes want a gradient of all parameters; not every head reads the pooler.
            loss = self.compute_loss(logits, labels) + 0 * outputs.pooler_output.sum()
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def compute_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes the loss of `forward`. Raises ValueError where `labels` are not of the shape of `logits`."""
        _check_shape("labels", labels, tuple(logits.shape))
        losses = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
        return losses.sum() / max(1, len(losses))


@auto_docstring(
    custom_intro="""
    Unicoder-VL for visual entailment, as UNITER does it: whether an image contradicts a text, entails it, or says
    nothing of it, the classes of `config.id2label`. It is [`UnicoderVLForQuestionAnswering`] with one right class,
    learned by cross-entropy.
    """
)
class UnicoderVLForVisualEntailment(UnicoderVLForQuestionAnswering):
    def compute_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        Computes the mean cross-entropy of `labels`, `(batch_size,)`: the right class, in `[0, num_labels)`, or -100 =
        ignored. Raises ValueError where they are of another shape.
        """
        _check_shape("labels", labels, tuple(logits.shape[:1]))
        row_losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return row_losses.sum() / (labels != -100).sum().clamp(min=1)


PAIR_DOCSTRING = r"""
    region_features (`torch.Tensor` of shape `(num_images, num_regions, region_feature_dim)`, *optional*):
        The photos; likewise every region argument.
    image_index (`torch.LongTensor` of shape `(batch_size, 2)`, *optional*):
        The first and the second photo of each row, of the `num_images` rows of `region_features`. Defaults to photos 2b
        and 2b + 1 for row b.
    labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
        1 = the sentence is true of the two photos, 0 = false, -100 = ignored.
"""


class UnicoderVLPairAttention(nn.Module):
    """
    Joins the states of a sentence with either of two photos as UNITER does: each side asks the other by attention, and
    is averaged by weights that it learns. Returns `(batch_size, 2 * hidden_size)`.
    """

    def __init__(self, config: UnicoderVLConfig):
        super().__init__()
        options = {"dropout": config.attention_probs_dropout_prob, "batch_first": True}
        self.first_asks = nn.MultiheadAttention(config.hidden_size, config.num_attention_heads, **options)
        self.second_asks = nn.MultiheadAttention(config.hidden_size, config.num_attention_heads, **options)
        self.join = UnicoderVLLinear(2 * config.hidden_size, config.hidden_size)
        self.weigh = UnicoderVLLinear(config.hidden_size, 1)
        self.dropout = UnicoderVLDropout(config.hidden_dropout_prob)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`states` and the mask of its attended positions have the two photos of a row one after the other."""
        sides, is_real = states.unflatten(0, (-1, 2)).unbind(1), mask.unflatten(0, (-1, 2)).unbind(1)
        pooled = []
        for own, other, ask in ((0, 1, self.first_asks), (1, 0, self.second_asks)):
            answer, _ = ask(
                sides[own], sides[other], sides[other], key_padding_mask=~is_real[other], need_weights=False
            )
            joined = self.dropout(self.join(torch.cat((answer, sides[own]), dim=-1)).relu())
            weights = self.weigh(joined).relu().masked_fill(~is_real[own][..., None], float("-inf")).softmax(dim=1)
            pooled.append((weights * joined).sum(1))
        return torch.cat(pooled, dim=-1)


@auto_docstring(
    custom_intro="""
    Unicoder-VL for sentences about two photos, as UNITER does it on NLVR2: the sentence is encoded with either photo,
    and a linear layer judges both outputs of BERT's pooler (`config.reasoning_head = "paired"`), or both sides after
    they asked each other (`"paired_attention"`); or it is encoded once with the regions of both (`"single"`). Photos
    that rows share are embedded once. Where the model has types of regions, they tell the first photo from the second.
    """
)
class UnicoderVLForVisualReasoning(UnicoderVLPreTrainedModel):
    _auto_class = "AutoModel"  # so that a checkpoint carries this file

    def __init__(self, config: UnicoderVLConfig):
        super().__init__(config)
        self.bert = UnicoderVLModel(config)
        self.pair_attention = UnicoderVLPairAttention(config) if config.reasoning_head == "paired_attention" else None
        width = config.hidden_size * (1 if config.reasoning_head == "single" else 2)
        self.reasoning_head = UnicoderVLFloat32Linear(width, len(config.id2label or ()))
        self.post_init()

    @can_return_tuple
    @auto_docstring(custom_args=INPUTS_DOCSTRING + PAIR_DOCSTRING)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        region_features: torch.Tensor | None = None,
        region_locations: torch.Tensor | None = None,
        region_attention_mask: torch.Tensor | None = None,
        image_index: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        source: Any = input_ids if inputs_embeds is None else inputs_embeds
        regions = {}
        if region_features is not None:
            regions = self._photos(len(source), region_features, region_locations, region_attention_mask, image_index)
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            **regions,
        }
        if self.config.reasoning_head != "single":
            inputs["caption_index"] = torch.arange(len(source), device=source.device).repeat_interleave(2)
        if self.pair_attention is None:
            outputs: Any = self.bert.pooled(**inputs, **kwargs)
            states = outputs.pooler_output
        else:
            outputs = self.bert(**inputs, **kwargs, return_dict=True)
            states = self.pair_attention(outputs.last_hidden_state, self._mask_of(outputs.last_hidden_state, inputs))
        logits = self.reasoning_head(states.reshape(len(source), -1))
        _check_shape("labels", labels, (len(source),))

        loss = None
        if labels is not None:
            row_losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            loss = row_losses.sum() / (labels != -100).sum().clamp(min=1)
            # Several processes want a gradient of all parameters; not every head reads the pooler.
            loss = loss + 0 * outputs.pooler_output.sum()
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _photos(
        self, num_rows: int, features: torch.Tensor, locations: Any, mask: Any, index: torch.Tensor | None
    ) -> dict[str, Any]:
        """Makes the region arguments of the encoder: the photos in either place, if their types differ there."""
        num_images = len(features)
        if index is None:
            if num_images != 2 * num_rows:
                raise ValueError(f"{num_rows} sentences need {2 * num_rows} photos or image_index, got {num_images}.")
            index = torch.arange(num_images, device=features.device).view(-1, 2)
        _check_shape("image_index", index, (num_rows, 2))
        if mask is None:
            mask = features.new_ones(features.shape[:2], dtype=torch.long)
        given: Any = {"region_features": features, "region_locations": locations, "region_attention_mask": mask}
        of_uniter = self.config.region_embedding == "uniter"
        if self.config.num_region_types or (of_uniter and self.config.type_vocab_size > 2):
            given = {name: torch.cat((tensor, tensor)) for name, tensor in given.items()}
            types = torch.full_like(given["region_attention_mask"], int(of_uniter), dtype=torch.long)
            types[num_images:] += 1
            given["region_token_type_ids"] = types
            index = index + torch.tensor([0, num_images], device=index.device)
        if self.config.reasoning_head == "single":
            return {name: tensor[index].flatten(1, 2) for name, tensor in given.items()}
        return {**given, "image_index": index.flatten()}

    def _mask_of(self, states: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """Gives the mask of the attended positions of text and regions, `(2 * batch_size, length)`."""
        num_regions = 0 if "image_index" not in inputs else inputs["region_features"].shape[1]
        text = states.new_ones((len(states), states.shape[1] - num_regions), dtype=torch.bool)
        if inputs["attention_mask"] is not None:
            text = inputs["attention_mask"].bool()[inputs["caption_index"]]
        if not num_regions:
            return text
        return torch.cat((text, inputs["region_attention_mask"].bool()[inputs["image_index"]]), dim=1)


GROUNDING_DOCSTRING = r"""
    labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
        The region that the text refers to, in `[0, num_regions)`, or -100 = ignored, such as where no region meets it.
"""


@auto_docstring(
    custom_intro="""
    Unicoder-VL for texts that refer to a region of an image, as UNITER does it on RefCOCO: the last state of each
    region gets a score, softmax over the regions. An image that several texts refer to is embedded once, see
    `image_index`. The score of padding is -10,000.
    """
)
class UnicoderVLForGrounding(UnicoderVLPreTrainedModel):
    _auto_class = "AutoModel"  # so that a checkpoint carries this file

    def __init__(self, config: UnicoderVLConfig):
        super().__init__(config)
        self.bert = UnicoderVLModel(config)
        self.grounding_head: nn.Module = UnicoderVLFloat32Linear(config.hidden_size, 1)
        if config.grounding_layers == 2:
            self.grounding_head = UnicoderVLTaskHead(config, 1, config.hidden_size)
        self.post_init()

    @can_return_tuple
    @auto_docstring(custom_args=INPUTS_DOCSTRING + IMAGE_INDEX_DOCSTRING + GROUNDING_DOCSTRING)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        region_features: torch.Tensor | None = None,
        region_locations: torch.Tensor | None = None,
        region_attention_mask: torch.Tensor | None = None,
        token_region_ids: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        if region_features is None:
            raise ValueError("Grounding needs region_features: it chooses among them.")
        outputs = self.bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            region_features=region_features,
            region_locations=region_locations,
            region_attention_mask=region_attention_mask,
            token_region_ids=token_region_ids,
            image_index=image_index,
            **kwargs,
            return_dict=True,
        )
        states = outputs.last_hidden_state
        logits = self.grounding_head(states[:, states.shape[1] - region_features.shape[1] :])[..., 0]
        mask = _pick_rows(region_attention_mask, image_index)
        if mask is not None:
            logits = logits.masked_fill(mask == 0, -10_000.0)
        _check_shape("labels", labels, tuple(logits.shape[:1]))

        loss = None
        if labels is not None:
            row_losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            loss = row_losses.sum() / (labels != -100).sum().clamp(min=1)
            # Several processes want a gradient of all parameters; this head does not read the pooler.
            loss = loss + 0 * outputs.pooler_output.sum()
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def hardest_negative_triplet_loss(
    scores: torch.Tensor,
    labels: torch.LongTensor,
    group_ids: torch.LongTensor,
    caption_index: torch.LongTensor,
    image_index: torch.LongTensor,
    *,
    margin: float = UnicoderVLConfig.triplet_margin,
    caption_weight: float = 1.0,
    image_weight: float = 1.0,
) -> torch.Tensor:
    r"""
    Computes the paper's triplet loss (Image-Text Retrieval, after VSE++): the mean over the matches of `max(0, margin -
    s + s_caption) + max(0, margin - s + s_image)`, all on `s = sigmoid(score)`. `s_caption` is the highest among the
    group's caption negatives (mismatches with the match's image), `s_image` the highest among its image negatives
    (mismatches with its caption). A direction without a negative adds 0.

    Args:
        scores, labels, group_ids, caption_index, image_index (`torch.Tensor` of shape `(batch_size,)`):
            The scores of the rows, and what the batch says of them, see [`UnicoderVLForImageTextRetrieval`].
        margin (`float`, *optional*, defaults to 0.2):
            Wanted difference of two values in `(0, 1)`.
        caption_weight, image_weight (`float`, *optional*, default to 1.0):
            Weights of the two terms.

    Returns:
        `torch.Tensor` of shape `()`; 0, with its graph, where there is no match.
    """
    captions, images = triplet_hinges(scores, labels, group_ids, caption_index, image_index, margin)
    loss = caption_weight * captions.amax(dim=1).sum() + image_weight * images.amax(dim=1).sum()
    return loss / (labels == 1).sum().clamp(min=1)


def negatives_of_matches(
    labels: torch.LongTensor,
    group_ids: torch.LongTensor,
    caption_index: torch.LongTensor,
    image_index: torch.LongTensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Finds the caption negatives and the image negatives of each match, each as a bool mask `(batch_size, batch_size)`:
    a row for a match (all `False` for a mismatch), a column for a mismatch. The arguments are those of
    [`hardest_negative_triplet_loss`].
    """
    candidate = (group_ids[:, None] == group_ids) & (labels == 1)[:, None] & (labels == 0)  # (match, mismatch)
    return candidate & (image_index[:, None] == image_index), candidate & (caption_index[:, None] == caption_index)


def triplet_hinges(
    scores: torch.Tensor,
    labels: torch.LongTensor,
    group_ids: torch.LongTensor,
    caption_index: torch.LongTensor,
    image_index: torch.LongTensor,
    margin: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Computes the hinges `max(0, margin - s + s_negative)` of each match with each of its caption negatives, and with
    each of its image negatives, on `s = sigmoid(score)`: each of shape `(batch_size, batch_size)`, 0 elsewhere.
    """
    captions, images = negatives_of_matches(labels, group_ids, caption_index, image_index)
    probabilities = scores.sigmoid()
    hinges = (margin - probabilities[:, None] + probabilities).clamp(min=0)
    return hinges * captions, hinges * images


def _parts_of(keys: list[str]) -> str:
    """Names the parts of a model that parameters belong to."""
    parts = [key.removesuffix(".weight").removesuffix(".bias").split(".")[:3] for key in keys]
    return ", ".join(dict.fromkeys(map(".".join, parts)))


def _target_weights(labels: torch.LongTensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Weighs each target, `(batch_size, length)`: 1 / (targets of its row * rows of the batch), 0 for what is none."""
    is_target = labels != -100
    if counted is not None:
        is_target = is_target & counted[:, None]
    per_row = is_target.sum(dim=1, keepdim=True).clamp(min=1)
    return is_target.float() / (per_row * labels.shape[0])


def _masked_prediction_loss(
    logits: torch.Tensor, labels: torch.LongTensor, counted: torch.Tensor | None
) -> torch.Tensor:
    """Averages over the targets of each row, then over ALL rows of the batch; rows without targets add 0."""
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return (losses.view_as(labels) * _target_weights(labels, counted)).sum()


def _pack(
    hidden_states: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, list[tuple[int, int]], torch.Tensor, torch.Tensor]:
    """
    Packs the attended positions of a batch (all without a mask) one behind the other, rows of equal length together.

    Returns:
        The states `(num_tokens, hidden_size)`, the groups of [`PackedSequences`], where in the flattened batch each
        state was `(num_tokens,)`, and which row each sequence was (rows without an attended position are none).
    """
    mask = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    lengths = mask.sum(-1)
    rows = lengths.argsort(stable=True)
    counts = lengths.bincount().tolist()
    groups = [(count, length) for length, count in enumerate(counts) if count and length]
    index = torch.arange(mask.numel(), device=mask.device).view_as(mask)[rows][mask[rows]]
    return hidden_states.flatten(0, 1).index_select(0, index), groups, index, rows[counts[0] :]


def _means_of(total: torch.Tensor, group: torch.Tensor, num_groups: int, num_layers: int) -> torch.Tensor:
    """
    Averages the sums of `num_layers` states of each token, `(num_tokens, hidden_size)`, over the tokens of each group:
    `(num_groups, hidden_size)`; zeros for a group without one.
    """
    sums = total.new_zeros(num_groups, total.shape[-1]).index_add(0, group, total)
    return sums / (group.bincount(minlength=num_groups).clamp(min=1)[:, None] * num_layers)


def _masked_mean(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Averages states, `(batch_size, length, hidden_size)`, over the attended positions; zeros where there is none."""
    weights = states.new_ones(states.shape[:2]) if mask is None else mask.to(states.dtype)
    return (states * weights[..., None]).sum(1) / weights.sum(1).clamp(min=1)[:, None]


def _pick_rows(tensor: MaybeTensor, index: torch.LongTensor | None) -> MaybeTensor:
    return tensor if tensor is None or index is None else tensor[index]


def _last_but_one(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, num_regions: int) -> torch.Tensor:
    """Picks the state of the last attended token but one of each text, `(batch_size, hidden_size)`."""
    text = hidden_states[:, : hidden_states.shape[1] - num_regions]
    if attention_mask is None:
        return text[:, -2]
    last = text.shape[1] - 1 - attention_mask.long().flip(1).argmax(1)
    return text[torch.arange(len(text), device=text.device), last - 1]


def _flatten_choices(name: str, tensor: MaybeTensor, choices: tuple[int, ...]) -> MaybeTensor:
    """Reshapes `(batch_size, num_choices, ...)` to `(batch_size * num_choices, ...)`."""
    if tensor is None:
        return tensor
    if tuple(tensor.shape[:2]) != choices:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {choices} first (batch_size, num_choices).")
    return tensor.flatten(0, 1)


def _check_shape(name: str, tensor: torch.Tensor | None, expected: tuple[int, ...]):
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}.")


__all__ = [
    "UnicoderVLForGrounding",
    "UnicoderVLForImageTextRetrieval",
    "UnicoderVLForMultipleChoice",
    "UnicoderVLForPreTraining",
    "UnicoderVLForQuestionAnswering",
    "UnicoderVLForVisualEntailment",
    "UnicoderVLForVisualReasoning",
    "UnicoderVLModel",
    "UnicoderVLPreTrainedModel",
]
