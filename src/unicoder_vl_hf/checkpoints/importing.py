"""
Imports the weights of a sister into a Unicoder-VL, so that it computes what the sister's own code computes.

Every tensor is accounted for: it goes somewhere, is the copy of another, or is left over by a rule of `maps`. A key or
a shape that no rule knows is an error, and so is a parameter that the checkpoint should have. What is new, such as a
head that the sister lacks, is not written, so that nothing random passes for trained.
"""

import re
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import StrictDataclassError

from .. import modeling_unicoder_vl as modeling
from ..configuration_unicoder_vl import UnicoderVLConfig
from ..feature_extraction_unicoder_vl import UnicoderVLFeatureExtractor
from ..files import new_folder, write_json
from ..processing_unicoder_vl import UnicoderVLProcessor
from .maps import PLAIN_BERT, REFUSED, REGIONS, SISTERS, TASK_HEADS, Rule, Sister, TaskHead
from .reading import Source, find_source, load_tokenizer, read_answers

REPORT = "import_report.json"
WORDS = "embeddings.word_embeddings.weight"
# Parameters that a sister may lack: its heads, and what reads [CLS] for them.
MAY_BE_NEW = ("cls.predictions.", "region_head.", "matching_head.", "bert.pooler.")
# Fields of a sister's configuration that tensors do not tell, and that mean the same in ours.
KEPT_FIELDS = (
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
)


class Account:
    """
    Accounts for the tensors of a checkpoint: our parameters that they make, and what became of each.

    Args:
        source ([`Source`]): The checkpoint.
        sister ([`Sister`]): Its architecture.
        tensors (`dict`): Its tensors, each with its original key, by the keys that the rules know.
        head ([`TaskHead`], *optional*): The head of a task that it was fine-tuned with.
        labels (list of `str`, *optional*): The names of the outputs of that head.
    """

    config: UnicoderVLConfig

    def __init__(
        self,
        source: Source,
        sister: Sister,
        tensors: dict[str, tuple[str, torch.Tensor]],
        head: TaskHead | None = None,
        labels: list[str] | None = None,
    ):
        self.source = source
        self.sister = sister
        self.tensors = tensors
        self.head = head
        self.labels = labels
        self.weights: dict[str, torch.Tensor] = {}  # our parameters, float32
        self.origins: dict[str, list[str]] = {}  # the keys that each is made of
        self.said: dict[str, str] = {}  # what became of each key
        self.new: list[str] = []  # our parameters that the checkpoint lacks

    def use(self, rule: Rule, match: re.Match, key: str, tensor: torch.Tensor) -> None:
        """Applies a rule that fits a key. Raises ValueError for a copy that is none, or a shape that is unknown."""
        if rule.same_as is not None:
            name = match.expand(rule.same_as)
            other, original = self.tensors.get(name, (name, None))
            if original is None or not torch.equal(original, tensor):
                raise ValueError(
                    f"{self.source.name}: {key} differs from {other}, of which it should be a copy: it has no place of "
                    "its own."
                )
            self.said[key] = f"copy of {other}"
        elif rule.target is None:
            self.said[key] = f"left over: {rule.note}"
        elif rule.unless in self.tensors:
            self.said[key] = f"left over: {rule.unless} takes its place"
        else:
            target = rule.target(match) if callable(rule.target) else match.expand(rule.target)
            try:
                made = tensor.float() if rule.make is None else rule.make(tensor.float())
            except (IndexError, ValueError, RuntimeError) as error:
                shape = tuple(tensor.shape)
                raise ValueError(
                    f"{self.source.name}: {key} has shape {shape}, which {self.sister.name} has not."
                ) from error
            self.weights[target] = self.weights[target] + made if target in self.weights else made.clone()
            self.origins.setdefault(target, []).append(key)
            before = f"{self.said[key]} + " if key in self.said else ""
            self.said[key] = f"{before}{target}: {rule.note or 'copied'}"

    def check(self, num_attention_heads: int | None) -> None:
        """
        Makes the configuration that our parameters fit, and checks that none lacks, and that all are of its shapes. The
        argument is that of [`import_checkpoint`].
        """
        source = self.source
        shapes = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        layers = [int(name.split(".")[3]) for name in shapes if name.startswith("bert.encoder.layer.")]
        try:
            vocab_size, hidden_size = shapes["bert.embeddings.word_embeddings.weight"]
            fields: dict[str, Any] = {
                "vocab_size": vocab_size,
                "hidden_size": hidden_size,
                "num_hidden_layers": max(layers, default=0) + 1,
                "num_attention_heads": num_attention_heads or source.config.get("num_attention_heads"),
                "intermediate_size": shapes["bert.encoder.layer.0.intermediate.dense.weight"][0],
                "max_position_embeddings": shapes["bert.embeddings.position_embeddings.weight"][0],
                "type_vocab_size": shapes["bert.embeddings.token_type_embeddings.weight"][0],
            }
        except KeyError as error:
            raise ValueError(f"{source.name} has nothing for {error}: is it a part of {self.sister.name}?") from error
        if fields["num_attention_heads"] is None:
            raise ValueError(
                f"{source.name} has no config.json, and tensors do not tell the heads of a layer: give their number, "
                "--heads 12 for a base size and 16 for a large one."
            )
        if (projection := f"{REGIONS}feature_projection.weight") in shapes:
            fields["region_feature_dim"] = shapes[projection][1]
        if "region_head.1.bias" in shapes:
            fields |= {"region_head": "uniter", "num_region_classes": shapes["region_head.1.bias"][0] - 1}
        fields |= {name: source.config[name] for name in KEPT_FIELDS if name in source.config}
        fields |= self._fields_of_head(shapes)
        fields |= {"region_embedding": self.sister.region_embedding, "use_image_token_embedding": False}
        try:
            self.config = UnicoderVLConfig(**fields)
        except StrictDataclassError as error:
            raise ValueError(f"{source.name}: its settings make no model. {error.__cause__ or error}") from error
        with torch.device("meta"):
            ours = modeling.UnicoderVLForPreTraining(self.config).state_dict()
            if self.head is not None:
                ours |= getattr(modeling, self.head.model_class)(self.config).state_dict()
        expected = {name: tuple(weight.shape) for name, weight in ours.items() if "predictions.decoder." not in name}
        for name, shape in shapes.items():
            if expected.get(name) != shape:
                keys = ", ".join(self.origins[name])
                raise ValueError(f"{source.name}: {keys} makes {name} {shape}, expected {expected.get(name)}.")
        self.new = sorted(expected.keys() - shapes.keys())
        may_be_new = (*MAY_BE_NEW, REGIONS) if self.sister is PLAIN_BERT else MAY_BE_NEW
        if lacking := [name for name in self.new if not name.startswith(may_be_new)]:
            raise ValueError(f"{source.name} has nothing for {', '.join(lacking[:5])}: is it whole?")

    def _fields_of_head(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        """Gives the fields of the configuration that the head of a task needs, the names of its outputs among them."""
        if self.head is None:
            return {}
        if self.head.outputs is None:
            return self.head.fields
        (count,) = shapes.get(self.head.outputs, (0,))
        told = list(self.source.config.get("id2label", {}).values())
        names = self.labels or list(self.head.labels) or told or [f"LABEL_{number}" for number in range(count)]
        if len(names) != count:
            raise ValueError(
                f"{self.source.name}: its head has {count} answers, but {len(names)} are named: give the answers that "
                "it was trained with."
            )
        names_of = dict(enumerate(names))
        return {**self.head.fields, "id2label": names_of, "label2id": {name: label for label, name in names_of.items()}}

    @property
    def model_class(self) -> str:
        """The name of our class that holds all that the checkpoint brought, or all of it that its task needs."""
        if self.head is not None:
            return self.head.model_class
        if "cls.predictions.bias" in self.weights or "region_head.1.bias" in self.weights:
            return "UnicoderVLForPreTraining"
        return "UnicoderVLForImageTextRetrieval" if "matching_head.bias" in self.weights else "UnicoderVLModel"


@dataclass
class Imported:
    """
    An import that is done.

    Args:
        path (`Path`): The new folder.
        report (`dict`): What `import_report.json` holds there.
    """

    path: Path
    report: dict[str, Any]

    def __str__(self) -> str:
        return f"{summary(self.report)}\n{self.path}: the model, its processor, {REPORT} and a card."


def import_checkpoint(
    source: str | PathLike[str],
    output: str | PathLike[str],
    *,
    family: str | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    region_type: int | None = None,
    num_attention_heads: int | None = None,
    approximate: bool = False,
    task: str | None = None,
    answers: str | PathLike[str] | None = None,
) -> Imported:
    """
    Makes a checkpoint of ours of a sister's, with its processor, a report of every tensor, and a model card.

    Args:
        source (`str` or `os.PathLike`): A folder, a file of weights, or a repository of the Hub.
        output (`str` or `os.PathLike`): The new folder.
        family (`str`, *optional*): `"uniter"`, `"villa"`, `"visualbert"`, `"oscar"`, `"volta"` or `"bert"`; by default
            the keys tell.
        tokenizer (`str`, *optional*): A folder or a repository with the vocabulary; by default that of the source, else
            BERT's of as many words.
        revision (`str`, *optional*): Branch, tag or commit of the repository.
        region_type (`int`, *optional*): The token type of the regions of a VisualBERT, 0 or 1. Defaults to 0, which its
            authors trained, and to 1 for Volta's.
        num_attention_heads (`int`, *optional*): Heads of each layer, where no `config.json` tells them.
        approximate (`bool`, *optional*, defaults to `False`): Whether what has no exact place may be approximated; the
            report says how.
        task (`str`, *optional*): The task that the checkpoint was fine-tuned for, whose head is taken along: `"vqa"`,
            `"entailment"`, `"nlvr2"` or `"grounding"`; by default its keys or its `config.json` tell, but for
            entailment, whose keys are those of questions.
        answers (`str` or `os.PathLike`, *optional*): A file of the names of that head's outputs, such as
            `trainval_label2ans.pkl`, see [`read_answers`].

    Raises:
        `ValueError`: the source is none, an unknown architecture, or holds a key or a shape that is unknown, or lacks
            something; or `output` exists.
        `OSError`: the repository does not exist, or cannot be reached.
    """
    if Path(output).exists():
        raise ValueError(f"{output} exists already: remove it, or choose another name.")
    found = find_source(source, revision)
    account = account_for(
        found,
        family=family,
        region_type=region_type,
        num_attention_heads=num_attention_heads,
        approximate=approximate,
        task=task,
        labels=None if answers is None else read_answers(answers),
    )
    words, origin = load_tokenizer(found, account.config.vocab_size, tokenizer)
    report = make_report(account) | {"tokenizer": origin}
    features = {name: value for name, value in report["regions"].items() if value is not None}
    extractor = UnicoderVLFeatureExtractor(feature_dim=features["feature_dim"], region_provenance=features)
    with new_folder(output) as folder:
        with torch.device("meta"):
            model = getattr(modeling, report["class"])(account.config)
        model.save_pretrained(folder, state_dict=account.weights)
        UnicoderVLProcessor(extractor, words).save_pretrained(folder)
        write_json(folder / REPORT, report)
        (folder / "README.md").write_text(_card(Path(output).name, report), encoding="utf-8")
    return Imported(Path(output), report)


def account_for(
    source: Source,
    *,
    family: str | None = None,
    region_type: int | None = None,
    num_attention_heads: int | None = None,
    approximate: bool = False,
    task: str | None = None,
    labels: list[str] | None = None,
) -> Account:
    """
    Finds out what becomes of each tensor of a checkpoint. The arguments are those of [`import_checkpoint`]; `labels` is
    what its file `answers` holds.

    Raises:
        `ValueError`: see [`import_checkpoint`].
    """
    tensors = _by_base_key(source)
    sister = _recognise(source.name, tensors, family)
    if region_type is not None and (sister.region_type is None or region_type not in (0, 1)):
        raise ValueError(f"region_type is {region_type}: only a VisualBERT has it, 0 or 1; this is {sister.name}.")
    rules = sister.rules((sister.region_type or 0) if region_type is None else region_type)
    head = _find_head(source, sister, tensors, task)
    if region_type is not None and head is not None and "num_region_types" in head.fields:
        raise ValueError(f"region_type is {region_type}: the two photos of {source.name} are of both types.")
    account = Account(source, sister, tensors, head, labels)
    unknown = []
    for name, (key, tensor) in tensors.items():
        of_head = [(rule, match) for rule in (head.rules if head else ()) if (match := _fit(rule, name, tensor))]
        fits = of_head or [(rule, match) for rule in rules if (match := _fit(rule, name, tensor))]
        for rule, match in fits:
            if rule.approximate and not approximate:
                raise ValueError(
                    f"{source.name}: {key} {tuple(tensor.shape)} has no exact place here; --approximate would take "
                    f"{rule.note}."
                )
            account.use(rule, match, key, tensor)
        if not fits:
            unknown.append(f"{key} {tuple(tensor.shape)}")
    if unknown:
        raise ValueError(
            f"{source.name} has tensors that {sister.name} has not, or not in this shape, {len(unknown)} in all: "
            f"{', '.join(unknown[:5])}. Is it another architecture, or a head of its own?"
        )
    account.check(num_attention_heads)
    return account


def make_report(account: Account) -> dict[str, Any]:
    """Makes the report of an import, ready for JSON: `tensors` holds what becomes of each key."""
    source, config, sister = account.source, account.config, account.sister
    told = {"vocab_size": config.vocab_size, "type_vocab_size": config.type_vocab_size}
    return {
        "source": source.name,
        "revision": source.revision,
        "licence": source.licence,
        "family": sister.family,
        "architecture": sister.name,
        "class": account.model_class,
        "task": None if account.head is None else account.head.task,
        "regions": {
            "feature_dim": config.region_feature_dim,
            "num_classes": config.num_region_classes if "region_head.1.bias" in account.weights else None,
            "box_type": sister.box_type,
        },
        "settings": {name: getattr(config, name) for name in ("num_attention_heads", *KEPT_FIELDS)},
        "contradictions": {  # the tensors win
            name: {"config.json": source.config[name], "tensors": value}
            for name, value in told.items()
            if source.config.get(name, value) != value
        },
        "advice": sister.advice,
        "tensors": account.said,
        "new": account.new,
    }


def summary(report: dict[str, Any]) -> str:
    """Writes a report in a few lines: how many tensors were copied, what became of the others, and what is new."""
    others: dict[str, list[str]] = {}
    for key, said in report["tensors"].items():
        became = re.sub(r"^[\w.]+: |(?<=^copy of ).+", "", said.rpartition(" + ")[2])
        others.setdefault(became.replace("copy of ", "copies of others"), []).append(key)
    lines = [f"{report['source']}: {report['architecture']}, {len(report['tensors']):,} tensors"]
    lines.append(f"  copied: {len(others.pop('copied', [])):,}")
    for became, keys in others.items():
        more = f" and {len(keys) - 3:,} more" if len(keys) > 3 else ""
        lines.append(f"  {became}: {', '.join(keys[:3])}{more}")
    if new := [part for part in (*MAY_BE_NEW, REGIONS) if any(name.startswith(part) for name in report["new"])]:
        lines.append(f"  new, and not written: {', '.join(f'{name}*' for name in new)}")
    if "matching_head." in new and report["task"] is None:
        lines.append("  It has no head that tells whether a caption fits an image: fine-tune it before you score.")
    for name, told in report["contradictions"].items():
        lines.append(
            f"  {name} is {told['config.json']} in config.json, but {told['tensors']} by the tensors, which win."
        )
    return "\n".join([*lines, f"  {report['advice']}"] if report["advice"] else lines)


def _by_base_key(source: Source) -> dict[str, tuple[str, torch.Tensor]]:
    """Reads the tensors by their keys without what stands before the encoder, `base.`, and before the heads."""
    tensors = source.tensors()
    of_words = sorted((key for key in tensors if key.endswith(WORDS)), key=len)
    base = of_words[0].removesuffix(WORDS) if of_words else ""
    outer = base[: base.rstrip(".").rfind(".") + 1]
    found: dict[str, tuple[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name = re.sub(r"(LayerNorm)\.gamma$", r"\1.weight", re.sub(r"(LayerNorm)\.beta$", r"\1.bias", key))
        bare = not base and re.match(r"(embeddings|encoder|pooler|img_embeddings?|LayerNorm)\.", name)
        name = (
            f"base.{name.removeprefix(base)}" if bare or (base and name.startswith(base)) else name.removeprefix(outer)
        )
        if name in found:
            raise ValueError(f"{source.name} has {found[name][0]} and {key}, which mean the same: which is right?")
        found[name] = key, tensor
    return found


def _recognise(source: str, tensors: dict[str, tuple[str, torch.Tensor]], family: str | None) -> Sister:
    """Finds the architecture that the keys are of."""
    keys = [key for key, _ in tensors.values()]
    fitting = [sister for sister in SISTERS if all(mark in tensors for mark in sister.marks)]
    refused = [f"It is {words} ({key})" for end, words in REFUSED.items() for key in keys if key.endswith(end)]
    if not fitting and not refused and PLAIN_BERT.marks[0] in tensors:
        fitting = [PLAIN_BERT]
    if not fitting:
        why = refused[0] if refused else f"Its keys begin with {', '.join(keys[:3])}"
        known = ", ".join(sister.name for sister in (*SISTERS, PLAIN_BERT))
        raise ValueError(f"{source} has no place in this architecture. {why}; what can be imported is {known}.")
    sister = fitting[0]
    if family == "villa" and sister.family == "uniter":  # the same keys, trained otherwise
        return replace(sister, family="villa", name="VILLA")
    if family not in (None, sister.family):
        mark = tensors[sister.marks[0]][0]
        raise ValueError(f"{source} is {sister.name} by its keys ({mark}), not {family}: leave out --from.")
    return sister


def _find_head(source: Source, sister: Sister, tensors: dict[str, Any], task: str | None) -> TaskHead | None:
    """Finds the head of a task: that of `task`, or the one that a key or the configuration tells of."""
    family = "uniter" if sister.family == "villa" else sister.family
    hidden_size = tensors["base.embeddings.word_embeddings.weight"][1].shape[1]
    told = {*tensors, *(source.config.get("architectures") or ())}
    heads = []
    for head in TASK_HEADS:
        key, times = head.columns or ("", 0)
        is_wide = head.columns is None or (key in tensors and tensors[key][1].shape[-1] == times * hidden_size)
        if head.family == family and task in (None, head.task) and is_wide:
            heads.append(head)
    found = next((head for head in heads if head.told_by in told), None)
    if found is not None or task is None:
        return found
    for head in heads:
        if any(_fit(rule, name, tensor) for rule in head.rules for name, (_, tensor) in tensors.items()):
            return head
    raise ValueError(f"{source.name} has no head of the task {task!r} that {sister.name} has: leave out --task.")


def _fit(rule: Rule, name: str, tensor: torch.Tensor) -> re.Match | None:
    return re.fullmatch(rule.key, name) if rule.rows in (None, *tensor.shape[:1]) else None


def _card(name: str, report: dict[str, Any]) -> str:
    """Writes the model card of an import."""
    regions = report["regions"]
    metadata = huggingface_hub.ModelCardData(
        library_name="transformers",
        license=report["licence"],
        base_model=report["source"] if report["revision"] else None,
        tags=["unicoder-vl", "unicoder-vl-hf", "vision-language", "image-text-retrieval"],
    )
    return CARD.format(
        metadata=metadata,
        name=name,
        summary=summary(report),
        report=REPORT,
        feature_dim=regions["feature_dim"],
        classes="not known from the weights" if regions["num_classes"] is None else f"{regions['num_classes']:,}",
        box_type=regions["box_type"] or "not known",
        licence=report["licence"] or "none stated: ask its authors before you pass it on",
        **{field: report[field] or "none" for field in ("architecture", "source", "revision", "tokenizer")},
    )


CARD = """---
{metadata}
---

# {name}

The weights of a {architecture} in the architecture of Unicoder-VL, imported by unicoder-vl-hf and trained no further.
It computes what its authors' code computes; `{report}` tells what became of each tensor.

- Source: {source}
- Revision: {revision}
- Licence: {licence}
- Tokenizer: {tokenizer}

## Regions

The model reads region features of one kind, and no other:

- Width of a feature: {feature_dim}
- Object classes, without background: {classes}
- Boxes: {box_type}

## Tensors

```text
{summary}
```
"""
