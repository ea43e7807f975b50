"""
Key maps: what the tensors of each sister of Unicoder-VL become in a model of ours, as data.

UNITER (Chen et al., ECCV 2020), VILLA (Gan et al., NeurIPS 2020), VisualBERT (Li et al., 2019), Oscar (Li et al., ECCV
2020) with a LayerNorm of its regions, the controlled UNITER and VisualBERT of Volta (Bugliarello et al., TACL 2021),
and BERT. What an architecture has beyond ours is left over where it is a head, and refused elsewhere.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Make = Callable[[torch.Tensor], torch.Tensor]

REGIONS = "bert.embeddings.region_embeddings."
WEIGHT = r"(weight|bias)"


@dataclass(frozen=True)
class Rule:
    r"""
    A rule for tensors of a checkpoint. A key that no rule fits is unknown.

    Args:
        key (`str`): Regular expression that fits whole keys; `base.` stands for the prefix of the encoder.
        target (`str` or callable, *optional*): The parameter of ours, in which `\1` is the first group of `key`, or a
            function of the match; None leaves the tensor over. What several rules give one parameter is added.
        make (callable, *optional*): Makes the parameter of the tensor; by default it is the tensor.
        note (`str`, *optional*): A word on what becomes of the tensor, for the report; by default it is copied.
        same_as (`str`, *optional*): Key of the tensor whose values this one repeats, which is checked.
        unless (`str`, *optional*): Key whose presence makes the rule leave the tensor over.
        rows (`int`, *optional*): Number of rows that the tensor must have for the rule to fit.
        approximate (`bool`, *optional*, defaults to `False`): Whether the outcome is not exact, and needs to be asked
            for.
    """

    key: str
    target: str | Callable[[re.Match], str] | None = None
    make: Make | None = None
    note: str = ""
    same_as: str | None = None
    unless: str | None = None
    rows: int | None = None
    approximate: bool = False


def _row(number: int) -> Make:
    return lambda table: table[number]


def _below_zeros(row: torch.Tensor) -> torch.Tensor:
    return torch.cat((torch.zeros_like(row), row))


def _of_corners(weight: torch.Tensor) -> torch.Tensor:
    """Makes columns for (x1, y1, x2, y2, area) of those for (x1, y1, x2, y2, w, h), as w = x2 - x1 and h = y2 - y1."""
    x1, y1, x2, y2, width, height = weight[:, -6:].unbind(1)
    return torch.stack((x1 - width, y1 - height, x2 + width, y2 + height, torch.zeros_like(x1)), dim=1)


def _without_sizes(weight: torch.Tensor) -> torch.Tensor:
    """Makes columns for (x1, y1, x2, y2, w, h, area) of columns for (x1, y1, x2, y2, area)."""
    return torch.cat((weight[:, :4], torch.zeros_like(weight[:, :2]), weight[:, 4:]), dim=1)


def _half(match: re.Match) -> str:
    """Names a parameter of one of our layers, of which Volta makes two: attention, and what follows it."""
    number, part, rest = match.groups()
    part = {"attention_self": "attention.self", "attention_output": "attention.output"}.get(part, part)
    return f"bert.encoder.layer.{int(number) // 2}.{part}.{rest}"


TEXT = (
    Rule(r"base\.embeddings\.(word|position|token_type)_embeddings\.weight", r"bert.embeddings.\1_embeddings.weight"),
    Rule(rf"base\.embeddings\.LayerNorm\.{WEIGHT}", r"bert.embeddings.LayerNorm.\1"),
    Rule(r"base\.embeddings\.position_ids", note="the integers from 0 on"),
    Rule(r"cls\.predictions\.(bias|transform\.(?:dense|LayerNorm)\.(?:weight|bias))", r"cls.predictions.\1"),
    Rule(r"cls\.predictions\.decoder\.weight", same_as="base.embeddings.word_embeddings.weight"),
    Rule(r"cls\.predictions\.decoder\.bias", same_as="cls.predictions.bias"),
)

BERT = (
    *TEXT,
    Rule(
        r"base\.(encoder\.layer\.\d+\.(?:attention\.(?:self\.(?:query|key|value)|output\.(?:dense|LayerNorm))"
        r"|intermediate\.dense|output\.(?:dense|LayerNorm))\.(?:weight|bias))",
        r"bert.\1",
    ),
    Rule(rf"base\.pooler\.dense\.{WEIGHT}", r"bert.pooler.dense.\1"),
)

NEXT_SENTENCE = Rule(rf"cls\.seq_relationship\.{WEIGHT}", note="next sentence prediction, which knows no images")

UNITER = (
    *BERT,
    Rule(rf"base\.img_embeddings\.img_linear\.{WEIGHT}", rf"{REGIONS}feature_projection.\1"),
    Rule(rf"base\.img_embeddings\.img_layer_norm\.{WEIGHT}", rf"{REGIONS}feature_LayerNorm.\1"),
    Rule(rf"base\.img_embeddings\.pos_linear\.{WEIGHT}", rf"{REGIONS}location_projection.\1"),
    Rule(rf"base\.img_embeddings\.pos_layer_norm\.{WEIGHT}", rf"{REGIONS}location_LayerNorm.\1"),
    Rule(rf"base\.img_embeddings\.LayerNorm\.{WEIGHT}", rf"{REGIONS}LayerNorm.\1"),
    Rule(r"base\.img_embeddings\.mask_embedding\.weight", f"{REGIONS}hidden_feature", _row(1), "row 1; 0 is unused"),
    Rule(rf"itm_output\.{WEIGHT}", r"matching_head.\1", unless="rank_output.weight", note="as it is: 1 = match"),
    Rule(rf"rank_output\.{WEIGHT}", r"matching_head.\1", _below_zeros, "row 1, below a row 0 of zeros: the same score"),
    Rule(rf"region_classifier\.net\.0\.{WEIGHT}", r"region_head.0.dense.\1"),
    Rule(rf"region_classifier\.net\.2\.{WEIGHT}", r"region_head.0.LayerNorm.\1"),
    Rule(rf"region_classifier\.net\.3\.{WEIGHT}", r"region_head.1.\1"),
    Rule(r"feat_regress\..+", note="the head that predicts features, which ours has not"),
    Rule(r"(vqa_output|nlvr2_output|attn1|attn2|fc|attn_pool|re_output|vcr_output)\..+", note="the head of a task"),
)

OSCAR = (
    *BERT,
    Rule(r"base\.img_embedding\.weight", f"{REGIONS}feature_projection.weight", lambda weight: weight[:, :-6]),
    Rule(
        r"base\.img_embedding\.weight",
        f"{REGIONS}location_projection.weight",
        _of_corners,
        "split; columns of w and h folded into those of x and y",
    ),
    Rule(r"base\.img_embedding\.bias", f"{REGIONS}feature_projection.bias"),
    Rule(
        r"base\.img_embedding\.bias",
        f"{REGIONS}location_projection.bias",
        torch.zeros_like,
        "copied, beside zeros for locations",
    ),
    Rule(rf"base\.LayerNorm\.{WEIGHT}", rf"{REGIONS}LayerNorm.\1"),
    Rule(
        rf"cls\.seq_relationship\.{WEIGHT}",
        r"matching_head.\1",
        lambda rows: rows.flip(0),
        "flipped: 0 = match in Oscar",
        rows=2,
    ),
    Rule(
        rf"cls\.seq_relationship\.{WEIGHT}",
        r"matching_head.\1",
        lambda rows: rows[[2, 0]],
        "rows 2 (wrong caption) and 0 (match) of VinVL's; row 1 (wrong tags) is left over",
        rows=3,
        approximate=True,
    ),
    Rule(rf"classifier\.{WEIGHT}", r"matching_head.\1", note="as it is: 1 = match in retrieval", rows=2),
)

_LAYER = r"base\.encoder\.layer\.(\d+)\.(attention_self|attention_output|intermediate|output)\."
VOLTA = (
    *TEXT,
    Rule(rf"{_LAYER}((?:query|key|value|dense|LayerNorm)\.(?:weight|bias))", _half),
    Rule(rf"{_LAYER}v_(\w+\.(?:weight|bias))", same_as=r"base.encoder.layer.\1.\2.\3"),
    Rule(rf"cls\.imagePredictions\.transform\.(dense|LayerNorm)\.{WEIGHT}", r"region_head.0.\1.\2"),
    Rule(rf"cls\.imagePredictions\.decoder_dict\.0\.{WEIGHT}", r"region_head.1.\1"),
    Rule(
        r"(base\.t_pooler|base\.v_pooler|cls\.bi_seq_relationship)\..+",
        note="matching by a product of two poolers, which ours has not",
    ),
)

VOLTA_UNITER = (
    *VOLTA,
    Rule(rf"base\.embeddings\.image_embeddings\.{WEIGHT}", rf"{REGIONS}feature_projection.\1"),
    Rule(
        r"base\.embeddings\.image_embeddings\.weight",
        f"{REGIONS}hidden_feature",
        lambda weight: weight.new_zeros(weight.shape[1]),
        "copied, beside zeros for a hidden feature",
    ),
    Rule(
        r"base\.embeddings\.image_location_embeddings\.weight",
        f"{REGIONS}location_projection.weight",
        _without_sizes,
        "copied, with columns of zeros for w and h",
    ),
    Rule(r"base\.embeddings\.image_location_embeddings\.bias", f"{REGIONS}location_projection.bias"),
    Rule(rf"base\.embeddings\.image_layer_norm\.{WEIGHT}", rf"{REGIONS}feature_LayerNorm.\1"),
    Rule(rf"base\.embeddings\.image_location_layer_norm\.{WEIGHT}", rf"{REGIONS}location_LayerNorm.\1"),
    Rule(rf"base\.embeddings\.v_LayerNorm\.{WEIGHT}", rf"{REGIONS}LayerNorm.\1"),
    Rule(
        r"base\.embeddings\.image_token_type_embeddings\.weight",
        same_as="base.embeddings.token_type_embeddings.weight",
    ),
)


def _folded(projection: str, positions: str, types: str, row: int) -> tuple[Rule, ...]:
    """Makes the rules of VisualBERT's regions: one position and one type, whose rows join the bias."""
    bias = f"{REGIONS}feature_projection.bias"
    return (
        Rule(rf"base\.embeddings\.{projection}\.{WEIGHT}", rf"{REGIONS}feature_projection.\1"),
        Rule(rf"base\.embeddings\.{positions}\.weight", bias, _row(0), "folded: row 0 into the bias; no other is used"),
        Rule(rf"base\.embeddings\.{types}\.weight", bias, _row(row), f"folded: row {row} into the bias"),
    )


def visualbert(region_type: int) -> tuple[Rule, ...]:
    """Gives the rules of VisualBERT, whose regions are of the token type `region_type`."""
    return (
        *BERT,
        *_folded("visual_projection", "visual_position_embeddings", "visual_token_type_embeddings", region_type),
        Rule(rf"cls\.seq_relationship\.{WEIGHT}", r"matching_head.\1", note="as it is: 1 = match in published weights"),
        Rule(rf"cls\.{WEIGHT}", note="the head of a task"),
    )


def volta_visualbert(region_type: int) -> tuple[Rule, ...]:
    """Gives the rules of Volta's VisualBERT, whose regions are of the token type `region_type`."""
    return (
        *VOLTA,
        *_folded("projection", "position_embeddings_visual", "token_type_embeddings_visual", region_type),
    )


@dataclass(frozen=True)
class Sister:
    """
    An architecture that can be imported.

    Args:
        family (`str`): Its family, as [`import_checkpoint`] takes it.
        name (`str`): Its name in words.
        marks (tuple of `str`): Keys that it has, and no other sister.
        region_embedding (`str`): See [`UnicoderVLConfig`].
        rules (callable): Gives its rules for a token type of the regions.
        region_type (`int`, *optional*): Token type of the regions where it may be chosen, by default.
        box_type (`str`, *optional*): The kind of its boxes, where its authors tell, as in the provenance of a store.
        advice (`str`, *optional*): A sentence on what it expects beyond that.
    """

    family: str
    name: str
    marks: tuple[str, ...]
    region_embedding: str
    rules: Callable[[int], Sequence[Rule]]
    region_type: int | None = None
    box_type: str | None = None
    advice: str = ""


GLOBAL_REGION = (
    "It was trained with a global region before the others, the mean of their features in the box of the whole image, "
    "which the processor does not make: add it to the records."
)
SISTERS = (
    Sister(
        "uniter", "UNITER", ("base.img_embeddings.img_linear.weight",), "uniter", lambda _: UNITER, box_type="proposal"
    ),
    Sister("visualbert", "VisualBERT", ("base.embeddings.visual_projection.weight",), "visual_bert", visualbert, 0),
    Sister(
        "oscar",
        "Oscar with a LayerNorm of its regions",
        ("base.img_embedding.weight", "base.LayerNorm.weight"),
        "unicoder_vl",
        lambda _: OSCAR,
        advice="It was trained with the names of a photo's objects behind the caption, of token type 1, which the "
        "processor does not add.",
    ),
    Sister(
        "volta",
        "Volta's controlled UNITER",
        ("base.embeddings.image_location_layer_norm.weight",),
        "uniter",
        lambda _: VOLTA_UNITER,
        advice=GLOBAL_REGION,
    ),
    Sister(
        "volta",
        "Volta's controlled VisualBERT",
        ("base.embeddings.projection.weight",),
        "visual_bert",
        volta_visualbert,
        region_type=1,
        advice=GLOBAL_REGION,
    ),
)

PLAIN_BERT = Sister(
    "bert",
    "BERT",
    ("base.encoder.layer.0.attention.self.query.weight",),
    "unicoder_vl",
    lambda _: (*BERT, NEXT_SENTENCE),
)


@dataclass(frozen=True)
class TaskHead:
    """
    A head that a sister was fine-tuned with for a task.

    Args:
        task (`str`): The task, as [`import_checkpoint`] takes it.
        family (`str`): The family of the sister.
        told_by (`str`, *optional*): What tells of it where no task is asked for: a key, or the class that
            `config.json` names.
        model_class (`str`): The class of ours that has this head.
        outputs (`str`, *optional*): The parameter of ours with a number for each label, if the task has labels.
        rules (tuple of [`Rule`]): The rules of its tensors, which come before the sister's.
        fields (`dict`): Fields of the configuration that the head needs.
        labels (tuple of `str`): The names of its outputs, where the task has the same always.
        columns (`(str, int)`, *optional*): A key, and how many times the hidden size its tensor must be wide.
    """

    task: str
    family: str
    told_by: str | None
    model_class: str
    outputs: str | None
    rules: tuple[Rule, ...]
    fields: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    columns: tuple[str, int] | None = None


def _layers(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Makes the rules of a head of two layers, with a LayerNorm between them."""
    names = {0: "dense", 2: "LayerNorm", 3: "decoder"}
    return tuple(Rule(rf"{theirs}\.{number}\.{WEIGHT}", rf"{ours}.{name}.\1") for number, name in names.items())


def _reasoning(
    family: str, told_by: str, rules: tuple[Rule, ...], columns: int | None = None, **fields: Any
) -> TaskHead:
    """Makes a head that judges sentences about two photos, told by the width of UNITER's tensor where it has one."""
    wide = None if columns is None else ("nlvr2_output.weight", columns)
    model_class = "UnicoderVLForVisualReasoning"
    return TaskHead(
        "nlvr2", family, told_by, model_class, "reasoning_head.bias", rules, fields, ("false", "true"), wide
    )


_UNITER_ANSWERS = _layers("vqa_output", "answer_head")
_ANSWERS, _GROUNDING = "UnicoderVLForQuestionAnswering", "UnicoderVLForGrounding"
_GROUND, _GROUND_DEEP = Rule(rf"re_output\.{WEIGHT}", r"grounding_head.\1"), _layers("re_output", "grounding_head")
_JUDGE = Rule(rf"nlvr2_output\.{WEIGHT}", r"reasoning_head.\1")
TASK_HEADS = (
    TaskHead("vqa", "uniter", "vqa_output.3.bias", _ANSWERS, "answer_head.decoder.bias", _UNITER_ANSWERS),
    TaskHead(
        "entailment",
        "uniter",
        None,  # the same keys as those of questions: it has to be asked for
        "UnicoderVLForVisualEntailment",
        "answer_head.decoder.bias",
        _UNITER_ANSWERS,
        labels=("contradiction", "entailment", "neutral"),
    ),
    _reasoning(
        "uniter",
        "attn_pool.fc.0.bias",
        (
            _JUDGE,
            Rule(r"attn1\.(.+)", r"pair_attention.first_asks.\1"),
            Rule(r"attn2\.(.+)", r"pair_attention.second_asks.\1"),
            Rule(rf"fc\.0\.{WEIGHT}", r"pair_attention.join.\1"),
            Rule(rf"attn_pool\.fc\.0\.{WEIGHT}", r"pair_attention.weigh.\1"),
        ),
        reasoning_head="paired_attention",
    ),
    _reasoning("uniter", "nlvr2_output.bias", (_JUDGE,), columns=2),
    _reasoning("uniter", "nlvr2_output.bias", (_JUDGE,), columns=1, reasoning_head="single"),
    _reasoning(
        "visualbert",
        "VisualBertForVisualReasoning",
        (
            Rule(rf"cls\.{WEIGHT}", r"reasoning_head.\1"),
            # The two photos are of two types, which then are no part of the bias.
            Rule(
                r"base\.embeddings\.visual_token_type_embeddings\.weight",
                "bert.embeddings.region_type_embeddings.weight",
            ),
        ),
        reasoning_head="single",
        num_region_types=2,
    ),
    TaskHead("grounding", "uniter", "re_output.bias", _GROUNDING, None, (_GROUND,)),
    TaskHead("grounding", "uniter", "re_output.3.bias", _GROUNDING, None, _GROUND_DEEP, {"grounding_layers": 2}),
    TaskHead(
        "vqa",
        "visualbert",
        "VisualBertForQuestionAnswering",
        _ANSWERS,
        "answer_head.bias",
        (Rule(rf"cls\.{WEIGHT}", r"answer_head.\1"),),
        {"answer_head": "visual_bert"},
    ),
)

# Architectures that have no place in ours, by the end of a key that they have and those above do not.
REFUSED = {
    "img_embedding.weight": "Oscar without a LayerNorm of its regions (use_img_layernorm), which ours always has",
    "v_embeddings.image_embeddings.weight": "ViLBERT, two encoders beside each other",
    "object_linguistic_embeddings.weight": "VL-BERT, whose every word gets the feature of the whole image",
    "obj_downsample.1.weight": "VL-BERT, whose every word gets the feature of the whole image",
    "visn_fc.visn_fc.weight": "LXMERT, three encoders",
}
