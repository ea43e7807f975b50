# Copyright 2026 The unicoder-vl-hf contributors. SPDX-License-Identifier: Apache-2.0
"""The configuration of Unicoder-VL models: BERT's fields, and further ones for regions, heads and search."""

import json
import os
from typing import TYPE_CHECKING, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import auto_docstring

if TYPE_CHECKING:  # transformers saves with a Hub file those that it names
    from .pipeline_unicoder_vl import UnicoderVLPipeline  # noqa: F401


# Files by which sentence-transformers loads a checkpoint.
SENTENCE_TRANSFORMERS = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "unicoder_vl_hf.scoring.cross_encoder.UnicoderVLModule"}
    ],
    "config_sentence_transformers.json": {
        "model_type": "CrossEncoder",
        "activation_fn": "torch.nn.modules.linear.Identity",
    },
}


@auto_docstring(checkpoint="google-bert/bert-base-uncased")
@strict
class UnicoderVLConfig(PreTrainedConfig):
    r"""
    region_feature_dim (`int`, *optional*, defaults to 2048):
        Width of a region's feature, as the detector pools it. Any width works.
    region_location_dim (`int`, *optional*, defaults to 5):
        Width of the location vector `(x1/W, y1/H, x2/W, y2/H, area/(W*H))`, each entry in `[0, 1]` (paper, Image
        Embeddings).
    region_embedding (`str`, *optional*, defaults to `"unicoder_vl"`):
        How regions are embedded: `"unicoder_vl"` as in the paper; `"uniter"` with a LayerNorm each for feature,
        location and sum, and a learned vector for a hidden feature; or `"visual_bert"` without locations. The last two
        are for imported weights.
    region_head (`str`, *optional*, defaults to `"unicoder_vl"`):
        Head of masked object classification: `"unicoder_vl"`, a linear layer, or `"uniter"`, two layers with a logit
        for background before those of the classes.
    answer_head (`str`, *optional*, defaults to `"uniter"`):
        Head of questions about images: `"uniter"`, two layers on the pooler's output, or `"visual_bert"`, a linear
        layer on the state of the last token but one, for imported weights.
    reasoning_head (`str`, *optional*, defaults to `"paired"`):
        Head of sentences about two photos: `"paired"`, two passes and a linear layer on both outputs of the pooler;
        `"paired_attention"`, in which the two passes ask each other; or `"single"`, one pass with both photos.
    matching_head (`str`, *optional*, defaults to `"unicoder_vl"`):
        Head that scores a caption with an image: `"unicoder_vl"`, a linear layer on the pooler's output, as in the
        paper; or `"similarity"`, which adds to its score the first stage's logit of the states that the words and the
        regions of the pair have within the encoder. It needs `projection_dim`, and is of retrieval alone.
    num_text_layers (`int`, *optional*, defaults to 0):
        Number of the first layers, below `num_hidden_layers`, that read words alone; regions, which a detector has
        described, join in the layer after them. A caption passes them once, however many pairs it is in, and the first
        stage of a search reads what they make of it. With 0, as in the paper, all layers read words and regions.
    joint_dropout_prob (`float`, *optional*, defaults to 0.0):
        Probability, below 1, with which a word or a region is left out of what the layers that read both see, in
        training and for a head that reads `[CLS]`, which stays. A caption and an image lack others in each pair, so
        that pairs are not learned by heart. Text layers, the first stage of a search and pre-training see all.
    similarity_in_training (`bool`, *optional*, defaults to `True`):
        Whether the scores hold the similarity of `matching_head="similarity"` in training, too. Where they do, `[CLS]`
        learns what the similarity leaves over, which is little; where not, it learns to score by itself, and the sum is
        weighed afterwards, see [`~UnicoderVLForImageTextRetrieval.fold_similarity_weight`]. With `False` it needs text
        layers.
    location_initializer_range (`float`, *optional*):
        Standard deviation of new weights of the location's projection; by default `initializer_range`. Five numbers
        from 0 to 1 beside hundreds of features make little of a region's embedding with that, so that where things
        lie is learned late.
    grounding_layers (`int`, *optional*, defaults to 1):
        Layers, 1 or 2, of the head that scores the regions that a text may refer to.
    num_region_types (`int`, *optional*, defaults to 0):
        Number of types that regions may have, each a learned vector beside their feature, such as 2 for the two photos
        of a pair; 0 for none, as in the paper. With `region_embedding="uniter"` they are token types instead.
    num_region_classes (`int`, *optional*, defaults to 1600):
        Foreground object classes of the detector, without background: the vocabulary of masked object classification.
    use_image_token_embedding (`bool`, *optional*, defaults to `True`):
        Whether the paper's `[IMG]` token, one learned vector, is added to every region embedding after its LayerNorm.
        The paper assigns the token and is silent on how; with `False` its formula for the region embedding holds to
        the letter.
    triplet_margin (`float`, *optional*, defaults to 0.2):
        Margin of the hardest-negative triplet loss, on `sigmoid(score)` in `(0, 1)` (paper, Image-Text Retrieval).
    padding_free (`bool`, *optional*):
        Whether the layers leave padding out, on CPUs and with FlashAttention, the only places where that pays. By
        default (`None`) they do so in training mode, where nobody reads what is computed of padding; with `True` in
        evaluation mode, too; with `False` never. Padding is always computed in a compiled, traced or exported graph,
        and where hidden states or attentions are asked for.
    sparse_prediction (`bool`, *optional*, defaults to `False`):
        Whether pre-training computes `prediction_logits` for the counted tokens alone, in training mode and where there
        are labels: the same loss and gradients in less time, but another shape. In evaluation mode, and by default,
        the shape is `(batch_size, sequence_length, vocab_size)`.
    projection_dim (`int`, *optional*):
        Width of the embeddings of `encode_text` and `encode_image`, the first stage of a search. By default the model
        has none, as the paper's.
    first_stage_trained (`bool`, *optional*, defaults to `False`):
        Whether the weights of the first stage were trained; if not, its embeddings mean nothing.
    similarity_weight (`float`, *optional*):
        Weight, at least 0, of the first stage's similarity in the sum by which a search orders its candidates, score +
        weight x similarity, as it was measured on validation captions. `None` if it never was.
    query_bank_size (`list[int]`, *optional*):
        Numbers of training captions and of images whose embeddings the first stage keeps, by which the scores of
        `matching_head="similarity"` after text layers tell what is near to everything, see
        [`~UnicoderVLForImageTextRetrieval.set_query_bank`]. `None` for no bank.
    calibration (`dict`, *optional*):
        Meaning of the scores as it was measured on validation pairs, see `Calibration` of `unicoder_vl_hf.scoring`:
        `temperature`, `threshold` and more. `None` if it never was.

    Example:

    ```python
    >>> from unicoder_vl_hf import UnicoderVLConfig, UnicoderVLForPreTraining

    >>> config = UnicoderVLConfig(region_feature_dim=256, num_region_classes=80)
    >>> model = UnicoderVLForPreTraining(config)
    ```"""

    model_type = "unicoder_vl"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "mlm_loss",
        "moc_loss",
        "matching_loss",
        "hidden_states",
        "attentions",
    ]
    _auto_class = "AutoConfig"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    region_feature_dim: int = 2048
    region_location_dim: int = 5
    region_embedding: str = "unicoder_vl"
    region_head: str = "unicoder_vl"
    answer_head: str = "uniter"
    reasoning_head: str = "paired"
    matching_head: str = "unicoder_vl"
    num_text_layers: int = 0
    joint_dropout_prob: float | int = 0.0
    similarity_in_training: bool = True
    location_initializer_range: float | int | None = None
    grounding_layers: int = 1
    num_region_types: int = 0
    num_region_classes: int = 1600
    use_image_token_embedding: bool = True
    triplet_margin: float | int = 0.2
    padding_free: bool | None = None
    sparse_prediction: bool = False
    projection_dim: int | None = None
    first_stage_trained: bool = False
    similarity_weight: float | int | None = None
    query_bank_size: list[int] | None = None
    calibration: dict | None = None

    def __post_init__(self, **kwargs):
        if not __name__.startswith("transformers_modules."):
            # With the package the pipeline comes from transformers' registry, over which this would win.
            kwargs.pop("custom_pipelines", None)
        # The two labels of the matching head; another `num_labels` replaces them.
        if self.id2label is None:
            self.id2label, self.label2id = {0: "mismatch", 1: "match"}, {"mismatch": 0, "match": 1}
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """
        Checks fields by their values and against each other; `@strict` calls it on construction and on save.

        Raises:
            `ValueError`: a field is out of its range, or `hidden_size` is no multiple of `num_attention_heads`.
        """
        for name in (
            "num_hidden_layers",
            "num_attention_heads",
            "region_feature_dim",
            "region_location_dim",
            "num_region_classes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 <= self.num_text_layers < self.num_hidden_layers:
            raise ValueError(
                f"num_text_layers={self.num_text_layers} must be at least 0 and below num_hidden_layers="
                f"{self.num_hidden_layers}: words and regions meet in the layers after them."
            )
        if not 0 <= self.joint_dropout_prob < 1:
            raise ValueError(f"joint_dropout_prob={self.joint_dropout_prob} must be at least 0 and below 1.")
        if not self.similarity_in_training and (self.matching_head != "similarity" or self.num_text_layers == 0):
            raise ValueError(
                "similarity_in_training=False needs matching_head='similarity' and num_text_layers of at least 1, got "
                f"{self.matching_head!r} and {self.num_text_layers}: with these the sum can be weighed afterwards."
            )
        if (sizes := self.query_bank_size) is not None:
            if len(sizes) != 2 or min(sizes) < 1:
                raise ValueError(f"query_bank_size={sizes} must be two numbers of at least 1, of captions and images.")
            if self.matching_head != "similarity" or self.num_text_layers == 0:
                raise ValueError(
                    f"query_bank_size={sizes} needs matching_head='similarity' and num_text_layers of at least 1, got "
                    f"{self.matching_head!r} and {self.num_text_layers}: of these the scores hold the first stage's "
                    "logit, from which it is subtracted. For another head load the model with query_bank_size=None."
                )
        kinds = {
            "region_embedding": ("unicoder_vl", "uniter", "visual_bert"),
            "region_head": ("unicoder_vl", "uniter"),
            "answer_head": ("uniter", "visual_bert"),
            "reasoning_head": ("paired", "paired_attention", "single"),
            "matching_head": ("unicoder_vl", "similarity"),
            "grounding_layers": (1, 2),
        }
        for name, known in kinds.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(str, known))}.")
        if self.region_embedding == "uniter" and (self.region_location_dim != 5 or self.type_vocab_size < 2):
            raise ValueError(
                "region_embedding='uniter' needs region_location_dim=5 and type_vocab_size=2 or more, as the second "
                f"token type is that of regions, got {self.region_location_dim} and {self.type_vocab_size}."
            )
        if self.num_region_types < 0 or (self.num_region_types and self.region_embedding == "uniter"):
            raise ValueError(
                f"num_region_types={self.num_region_types} must be at least 0, and 0 with region_embedding='uniter'."
            )
        if self.projection_dim is not None and self.projection_dim < 1:
            raise ValueError(f"projection_dim={self.projection_dim} must be at least 1, or None for no first stage.")
        if self.similarity_weight is not None and not 0 <= self.similarity_weight < float("inf"):
            raise ValueError(
                f"similarity_weight={self.similarity_weight} must be at least 0 and finite, or None where it was not "
                "measured."
            )
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}: "
                "choose a number of heads that divides it."
            )

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """
        Saves the configuration with the whole `auto_map` and the pipeline, for `trust_remote_code` by every Auto class,
        and with what sentence-transformers needs to load the checkpoint, by the package, as a `CrossEncoder`.
        """
        # transformers writes the saved class's own key only: a pre-training checkpoint would not load by AutoModel.
        modeling = "modeling_unicoder_vl"
        self.auto_map = {
            "AutoConfig": "configuration_unicoder_vl.UnicoderVLConfig",
            "AutoModel": f"{modeling}.UnicoderVLModel",
            "AutoModelForPreTraining": f"{modeling}.UnicoderVLForPreTraining",
            "AutoModelForSequenceClassification": f"{modeling}.UnicoderVLForImageTextRetrieval",
            "AutoModelForMultipleChoice": f"{modeling}.UnicoderVLForMultipleChoice",
            "AutoModelForVisualQuestionAnswering": f"{modeling}.UnicoderVLForQuestionAnswering",
        }
        self.custom_pipelines = {
            "image-text-matching": {
                "impl": "pipeline_unicoder_vl.UnicoderVLPipeline",
                "pt": ["AutoModelForSequenceClassification"],
            }
        }
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        for name, content in SENTENCE_TRANSFORMERS.items():
            path = os.path.join(save_directory, name)
            if not os.path.exists(path):
                with open(path, "w", encoding="utf-8") as file:
                    json.dump(content, file, indent=2)
        if not __name__.startswith("transformers_modules."):
            del self.custom_pipelines


__all__ = ["UnicoderVLConfig"]
