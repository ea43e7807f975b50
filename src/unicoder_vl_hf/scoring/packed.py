"""Scores chosen pairs without padding, as every block of a scoring job needs it.

Each caption and each image is embedded once, a caption passes the text layers once where the model has them, and both
are projected once for the first layer of the pairs, where these share them. The pairs of a forward pass lie one behind
the other, those of equal length side by side; the last layer computes `[CLS]` alone, without keys and values; pooler
and matching head run in float32. All of it is exact but for rounding.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import cast

import numpy as np
import torch
from torch import nn

from ..configuration_unicoder_vl import UnicoderVLConfig
from ..feature_extraction_unicoder_vl import UnicoderVLFeatureExtractor
from ..modeling_unicoder_vl import UnicoderVLLayer, UnicoderVLModel, UnicoderVLSelfAttention
from ..records_unicoder_vl import RegionRecord
from .checkpoints import PairModel, scoring_first_stage

# Records that are padded and projected at once.
RECORDS_AT_ONCE = 32


def fingerprint(model: PairModel) -> tuple | None:
    """
    Gives what a [`PairEncoder`] of this model follows from: a change of a weight changes it, however it was made, but
    for an exchange of columns. It costs a quarter of the encoder, which copies the weights. None for a model whose
    encoder must be made anew each time: on another device than the CPU, with modules of other libraries, whose state
    may be in no weight, or with hooks.
    """
    ours = (type(model).__module__, "torch.nn.", "transformers.")
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or not type(module).__module__.startswith(ours):
            return None
    if model.device.type != "cpu":
        return None
    names, weights = zip(*model.named_parameters(), *model.named_buffers(), strict=True)
    rows = [_sums_of_bits(weight.detach()).view(torch.int64).reshape(-1) for weight in weights]
    config = model.config
    return names, config.to_json_string(), config._attn_implementation, model.dtype, torch.cat(rows).numpy().tobytes()


def _sums_of_bits(weight: torch.Tensor) -> torch.Tensor:
    """Sums each row's bits as 64-bit numbers, ten times as fast as a hash; hashes rows that hold no whole number."""
    row_bytes = 0 if weight.ndim == 0 else weight.shape[-1] * weight.element_size()
    if not row_bytes or row_bytes % 8 or weight.storage_offset() % 8:
        return torch.hash_tensor(weight, dim=-1)
    return weight.contiguous().flatten().view(torch.int64).view(-1, row_bytes // 8).sum(-1)


@dataclass
class Rows:
    """
    The states of several items, one behind the other: item i is `states[starts[i] : starts[i] + lengths[i]]`, and
    `embeddings[i]` in the first stage, where a model with text layers scores by it.
    """

    states: torch.Tensor
    starts: np.ndarray
    lengths: np.ndarray
    embeddings: torch.Tensor | None = None

    @classmethod
    def of(cls, states: torch.Tensor, lengths: Sequence[int] | np.ndarray) -> "Rows":
        """Makes the rows of items of these lengths, which follow each other in `states`."""
        lengths = np.asarray(lengths)
        return cls(states, np.cumsum(lengths) - lengths, lengths)


class PairEncoder:
    """
    Embeds captions and images and scores pairs for one job, with copies of the weights that it needs in another form.

    Args:
        model ([`UnicoderVLForImageTextRetrieval`] or [`UnicoderVLForPreTraining`]):
            The model, in evaluation mode.
        dtype (`torch.dtype`, *optional*):
            Dtype of embeddings and encoder. Defaults to the model's own.
        max_tokens (`int`):
            Most text tokens and regions of one forward pass.
    """

    def __init__(self, model: PairModel, dtype: torch.dtype | None, max_tokens: int):
        self.config: UnicoderVLConfig = model.config
        self.device = model.device
        self.bert: UnicoderVLModel = model.bert
        if dtype not in (None, model.dtype):
            cast_weights = {id(weight): nn.Parameter(weight.to(dtype), False) for weight in model.bert.parameters()}
            self.bert = copy.deepcopy(model.bert, memo=cast_weights)
        self.pooler = copy.deepcopy(model.bert.pooler).float()
        self.matching_head = model.matching_head
        self.similarity = scoring_first_stage(model)
        self.max_tokens = max_tokens
        onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
        # oneDNN refuses bfloat16 where the CPU lacks AVX-512; PyTorch emulates it, slowly.
        if self.bert.dtype == torch.bfloat16:
            onednn = onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if onednn and self.device.type == "cpu" and self.bert.dtype in (torch.float32, torch.bfloat16):
            self.bert = with_onednn(self.bert)

    def embed_captions(self, token_ids: Sequence[Sequence[int]]) -> Rows:
        """
        Embeds captions, given as token ids with `[CLS]` and `[SEP]`. Raises ValueError for more than the positions.
        """
        lengths = [len(ids) for ids in token_ids]
        if max(lengths) > self.config.max_position_embeddings:
            raise ValueError(
                f"A caption has {max(lengths)} tokens, the model {self.config.max_position_embeddings} positions "
                "(max_position_embeddings): lower max_length."
            )
        input_ids = torch.tensor(np.concatenate(token_ids), dtype=torch.long, device=self.device)
        positions = torch.tensor(np.concatenate([np.arange(length) for length in lengths]), device=self.device)
        states = self.bert.embeddings.embed_text(
            cast(torch.LongTensor, input_ids[None]),
            attention_mask=None,
            token_type_ids=None,
            position_ids=cast(torch.LongTensor, positions[None]),
            inputs_embeds=None,
        )
        rows = Rows.of(states[0], lengths)
        return self._encode_words(rows) if self.config.num_text_layers else rows

    def embed_images(self, records: Iterable[RegionRecord], extractor: UnicoderVLFeatureExtractor) -> Rows:
        """Embeds images, given as records. Raises ValueError if features have another width than the model's."""
        states, lengths = [], []
        records = iter(records)
        while some := list(islice(records, RECORDS_AT_ONCE)):
            inputs = extractor(some, return_tensors="pt").to(self.device)
            if (width := inputs["region_features"].shape[-1]) != self.config.region_feature_dim:
                raise ValueError(
                    f"Image {some[0].image_id!r}: features have width {width}, expected the model's "
                    f"region_feature_dim={self.config.region_feature_dim}: give features of the detector that it was "
                    "trained with."
                )
            real = inputs["region_attention_mask"].bool()
            lengths.append(real.sum(dim=1).cpu().numpy())
            regions = self.bert.embeddings.embed_regions(
                inputs["region_features"][real], inputs["region_locations"][real]
            )
            states.append(self.bert.embeddings.add_image_token(regions))
        rows = Rows.of(torch.cat(states), np.concatenate(lengths))
        if self.similarity is not None and self.config.num_text_layers:
            embeddings = self.similarity.embed_image(self.similarity.mean_of_regions(*self._padded(rows)))
            rows.embeddings = self.similarity.images_of_pairs(embeddings)
        return rows

    def _encode_words(self, rows: Rows) -> Rows:
        """Passes captions through the text layers, and their means to the first stage, where that scores, too."""
        states = torch.empty_like(rows.states)
        means = states.new_empty(len(rows.lengths), states.shape[1], dtype=torch.float32)
        order = np.argsort(rows.lengths, kind="stable")
        for batch in split_by_tokens(order, rows.lengths[order], self.max_tokens):
            lengths = rows.lengths[batch]
            found = places_within(lengths) + np.repeat(rows.starts[batch], lengths)
            index = torch.from_numpy(found).to(self.device)
            groups = groups_of(lengths)
            states[index] = encoded = self.bert.encode_every_token(rows.states[index], groups, self.bert.text_layers)
            of_batch = torch.from_numpy(lengths).to(self.device)
            means[torch.from_numpy(batch)] = torch.segment_reduce(encoded.float(), "mean", lengths=of_batch)
        embeddings = None
        if self.similarity is not None:
            embeddings = self.similarity.texts_of_pairs(self.similarity.embed_text(means))
        return Rows(states, rows.starts, rows.lengths, embeddings)

    def _padded(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Pads items, `(num_items, longest, hidden_size)`, and tells what is theirs, `(num_items, longest)`."""
        place = np.arange(rows.lengths.max(initial=0))
        real = place < rows.lengths[:, None]
        index = np.where(real, rows.starts[:, None] + place, 0)
        return rows.states[torch.from_numpy(index).to(self.device)], torch.from_numpy(real).to(self.device)

    def score(self, captions: Rows, images: Rows, caption_index: np.ndarray, image_index: np.ndarray) -> np.ndarray:
        """Scores caption `caption_index[p]` with image `image_index[p]`: `(P,)`, float32, higher = better match."""
        lengths = captions.lengths[caption_index] + images.lengths[image_index]
        order = np.argsort(lengths, kind="stable")
        table = torch.cat((captions.states, images.states))
        tables = [table]
        layers = cast(Sequence[UnicoderVLLayer], self.bert.encoder.layer[self.bert.joint_layers])
        if len(layers) > 1 and 2 * len(table) <= lengths.sum():
            attention = layers[0].attention.self
            tables += [project(table) for project in (attention.query, attention.key, attention.value)]
        scores = np.empty(len(order), dtype=np.float32)
        for batch in split_by_tokens(order, lengths[order], self.max_tokens):
            found = rows_of_pairs(captions, images, caption_index[batch], image_index[batch])
            rows = torch.from_numpy(found).to(self.device)
            states, *projected = (table[rows] for table in tables)
            asks = self.similarity is not None and captions.embeddings is None
            is_region = rows >= len(captions.states) if asks else None
            first, means = self.bert.encode_packed(states, groups_of(lengths[batch]), projected or None, is_region)
            similarity = None
            if self.similarity is not None and means is not None:
                similarity = self.similarity.logits_of_means(means)
            elif self.similarity is not None and captions.embeddings is not None and images.embeddings is not None:
                texts, seen = captions.embeddings[caption_index[batch]], images.embeddings[image_index[batch]]
                similarity = self.similarity.pair_logits(texts, seen)
            logits = self.matching_head(self.pooler(first.float()[:, None]), similarity)
            scores[batch] = (logits[:, 1] - logits[:, 0]).cpu().numpy()
        return scores


def groups_of(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Counts the sequences of each length, given in ascending order: the groups of packed sequences."""
    of_length, count = np.unique(lengths, return_counts=True)
    return list(zip(count.tolist(), of_length.tolist(), strict=True))


def places_within(lengths: np.ndarray) -> np.ndarray:
    """Counts the places of sequences of these lengths, one behind the other, each from 0."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def rows_of_pairs(captions: Rows, images: Rows, caption_index: np.ndarray, image_index: np.ndarray) -> np.ndarray:
    """
    Finds the rows of `(captions.states, images.states)`, one below the other, that make up the pairs, one behind the
    other: the tokens of each caption, and then the regions of its image, wherever the caption ends.
    """
    num_tokens = captions.lengths[caption_index]
    lengths = num_tokens + images.lengths[image_index]
    place = places_within(lengths)
    is_token = place < np.repeat(num_tokens, lengths)
    token = np.repeat(captions.starts[caption_index], lengths)
    region = np.repeat(len(captions.states) + images.starts[image_index] - num_tokens, lengths)
    return place + np.where(is_token, token, region)


def split_by_tokens(order: np.ndarray, lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Cuts `order` into parts of about `max_tokens`, given the length of each item."""
    ends = np.cumsum(lengths)
    parts = (ends - lengths) // max_tokens  # where each begins
    yield from np.split(order, np.flatnonzero(np.diff(parts)) + 1)


def pair_flops(config: UnicoderVLConfig, lengths: np.ndarray) -> np.ndarray:
    """
    Counts the operations of pairs of these lengths, tokens and regions, if the last layer computes `[CLS]` alone. Those
    of text layers, which are of captions, do not count; those that sharing the first layer's projections and
    [`FirstTokenAttention`] save, 3 % at BERT-base's size, count as done.
    """
    length = np.asarray(lengths, dtype=np.float64)
    hidden, layers = config.hidden_size, config.num_hidden_layers - config.num_text_layers
    feed_forward = 2 * hidden * config.intermediate_size
    layer = 2 * length * (4 * hidden**2 + feed_forward) + 4 * length**2 * hidden
    last = 2 * length * 2 * hidden**2 + 2 * (2 * hidden**2 + feed_forward) + 4 * length * hidden
    return (layers - 1) * layer + last


class OneDNNLinear(nn.Module):
    """
    A linear layer, and the exact GELU behind it, by oneDNN with the weight in oneDNN's own layout, for inference only.

    PyTorch takes MKL for float32, which on AMD reaches half of oneDNN's rate (measured: 49 against 97 GFLOP/s on a core
    of an EPYC 9005 that others used as well).
    """

    def __init__(self, linear: nn.Linear, activation: str = "none"):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = linear.bias.detach()
        self.activation = activation

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        algorithm = "none" if self.activation == "gelu" else ""  # not GELU by tanh
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, self.activation, [], algorithm)


class FirstTokenAttention(nn.Module):
    """
    The attention of the first token of each sequence to all of its tokens, without their keys and values, in a fortieth
    of the operations: a query times `W_k x` is the query times `W_k`, times `x`; and the sum of weighted values is
    `W_v` times the weighted sum of the states. A bias of the keys adds the same to each logit of a query, and so
    nothing.
    """

    def __init__(self, attention: UnicoderVLSelfAttention):
        super().__init__()
        self.scaling, head_dim = attention.scaling, attention.head_dim
        self.query = attention.query
        self.of_key, self.of_value = (
            layer.weight.detach().view(-1, head_dim, layer.in_features) for layer in (attention.key, attention.value)
        )
        self.value_bias = attention.value.bias.detach()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: None,
        query_states: torch.Tensor,
        groups: list[tuple[int, int]],
    ) -> tuple[torch.Tensor, None]:
        """Takes and gives what [`UnicoderVLSelfAttention`] does in the last layer of packed sequences."""
        num_heads, head_dim, _ = self.of_key.shape
        query = self.query(query_states[0]).view(-1, num_heads, head_dim).transpose(0, 1)
        logits_of = torch.bmm(query * self.scaling, self.of_key).transpose(0, 1)  # (sequences, heads, hidden size)
        states = hidden_states[0].split([count * length for count, length in groups])
        mixed = []
        for (count, length), some, queries in zip(
            groups, states, logits_of.split([count for count, _ in groups]), strict=True
        ):
            some = some.view(count, length, -1)
            mixed.append(torch.bmm(torch.bmm(queries, some.transpose(1, 2)).softmax(-1), some))
        output = torch.bmm(torch.cat(mixed).transpose(0, 1), self.of_value.transpose(1, 2)).transpose(0, 1)
        return output.flatten(1)[None] + self.value_bias, None


def with_onednn(bert: UnicoderVLModel) -> UnicoderVLModel:
    """Copies a model so that the layers of its encoder compute by oneDNN; other weights are shared."""
    bert = copy.deepcopy(bert, memo={id(weight): weight for weight in bert.parameters()})
    if bert.dtype == torch.float32 and bert.config._attn_implementation in ("sdpa", "eager"):
        last = cast(UnicoderVLLayer, bert.encoder.layer[-1]).attention
        last.self = FirstTokenAttention(last.self)  # type: ignore[assignment]
    for layer in cast(Iterable[UnicoderVLLayer], bert.encoder.layer):
        if bert.config.hidden_act == "gelu":
            layer.intermediate = OneDNNLinear(layer.intermediate.dense, "gelu")  # type: ignore[assignment]
        for module in list(layer.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, OneDNNLinear(child))
    return bert
