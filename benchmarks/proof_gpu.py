"""
The proof in minutes of a GPU: pre-training, fine-tuning, first stage, exhaustive scoring and foils, on Flickr8k.

    python benchmarks/proof_gpu.py prepare CAPTIONS REGIONS BERT FOILS proof-inputs   # where they are, into two parts
    make proof-gpu ARGS='--inputs proof-inputs/1'                                     # on the GPU; then the other part
    make proof-gpu ARGS='--inputs proof-inputs/2'

It runs from the checkout with whatever `python3` holds, and needs neither network nor `.venv`, `datasets` or
`evaluate`. Either part is at most 57 MB, and is kept in `--output` with all else: with both the work begins. When the
minutes are over it leaves a checkpoint, and the same command goes on. Captions and regions lie on the GPU, and batches
are made there, by the rules of the package's collators but from a generator of their own.

Three models follow one another, as far as the minutes go: `words`, in which the BERT reads words alone, with two layers
behind it, not pre-trained (docs/results.md); `bert`, whose layers read words and regions, pre-trained; and `base`,
random weights of the size of BERT-base.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizer
from work import SIZES, SPECIAL, machine, synchronize, without_plans_for_shapes

from unicoder_vl_hf import (
    ImageTextScorer,
    RegionRecord,
    UnicoderVLConfig,
    UnicoderVLFeatureExtractor,
    UnicoderVLForImageTextRetrieval,
    UnicoderVLForPreTraining,
    UnicoderVLProcessor,
)
from unicoder_vl_hf.data.foils import read_foils
from unicoder_vl_hf.data.masking import IGNORED, Masking
from unicoder_vl_hf.files import write_json
from unicoder_vl_hf.logging import without_warnings_of_transformers
from unicoder_vl_hf.pictures import training_curves
from unicoder_vl_hf.regions.shuffled import ShuffledStore
from unicoder_vl_hf.tasks.foil.margins import by_matching_head, by_similarity, foil_margins
from unicoder_vl_hf.tasks.foil.metrics import FoilAccuracy, FoilGain, foil_results
from unicoder_vl_hf.tasks.retrieval.losses import GroupSoftmaxLoss, HardNegativeLoss
from unicoder_vl_hf.tasks.retrieval.metrics import confidence_intervals, rank_queries, retrieval_metrics

PARTS = {"1": ["regions.safetensors"], "2": ["captions.json", "bert", "foils.jsonl", "aligned.safetensors"]}
MOST_BYTES = 57_000_000  # of a part: with the checkout less than the 64 MiB that a lent machine may take at once
MAX_LENGTH = 44
# Shares of the planned minutes: what is left is for the evaluation.
SHARES = {"pre-training": 0.4, "fine-tuning": 0.35}
LOG_EVERY = 20
# The strong recipe, see docs/matching_head.md: new weights of a model narrower than BERT-base are drawn wider, and a
# third of fine-tuning has negatives at random, the rest hard ones. There a part of words and regions is hidden, too.
NARROW_INITIALIZER = 0.08
RANDOM_NEGATIVES = 1 / 3
HIDDEN = 0.15
# What is tried on a CPU in half an hour, see docs/results.md: a BERT that reads words alone.
WORDS = {"num_joint_layers": 2, "joint_dropout_prob": 0.2, "num_hard_negatives": 2, "epochs": 4, "batch_size": 128}
WORDS_RANDOM_NEGATIVES = 1 / 4  # an epoch
WORDS_RATES = {"bert": 3e-5, "new": 5e-4}
WEIGHTS = (0, 5, 10, 20, 30, 50, 100, 300)  # of the similarity
# Seconds of a GPU that a stage may take which looks at no clock: with less than that left it is for the next call.
UNDIVIDED = {"folding": 60, "exhaustive": 120}
Batch = dict[str, torch.Tensor]


# Inputs


def prepare(captions: str, regions: str, bert: str, foils: str, output: str) -> None:
    """
    Packs the inputs into the folders `1` and `2` of a new one: regions in float16, captions, foils, and a BERT in
    float16 of whose vocabulary the pieces stay that captions and foils have. They are tokenized as before.

    Raises:
        `ValueError`: the folder exists, a split is missing, or a part is above 57 MB.
    """
    from transformers import AutoTokenizer

    from unicoder_vl_hf import RegionStore
    from unicoder_vl_hf.data import join, read_captions
    from unicoder_vl_hf.data.caption_files import select_split
    from unicoder_vl_hf.files import new_folder
    from unicoder_vl_hf.runs import align_regions

    store = RegionStore(regions)
    rows, _ = join(read_captions(captions), store, skip_option=None)
    train, *_ = (select_split(rows, Path(captions), split) for split in ("train", "val", "test"))
    columns = {name: rows[name][:] for name in ("image_id", "caption", "split")}
    image_ids = list(dict.fromkeys(columns["image_id"]))
    records = store.get_many(image_ids)
    if any(record.object_ids is None or record.image_width is None for record in records):
        raise ValueError(f"{regions}: a record has no object_ids or no size of its image, which pre-training needs.")
    with new_folder(output) as folder:
        first, second = folder / "1", folder / "2"
        first.mkdir()
        second.mkdir()
        arrays = {
            "features": np.concatenate([record.features for record in records]).astype(np.float16),
            "boxes": np.concatenate([record.boxes for record in records]).astype(np.float32),
            "object_ids": np.concatenate([record.object_ids for record in records]).astype(np.int16),
            "counts": np.array([len(record) for record in records]),
            "sizes": np.array([(record.image_width, record.image_height) for record in records]),
        }
        save_file(arrays, first / "regions.safetensors")
        write_json(second / "captions.json", {"image_ids": image_ids, **columns})
        shutil.copy(foils, second / "foils.jsonl")
        texts = columns["caption"] + [foil.foil for foil in read_foils(foils)]
        tokenizer = AutoTokenizer.from_pretrained(bert)
        _pack_bert(bert, tokenizer, texts, second / "bert")
        by_id = dict(zip(image_ids, records, strict=True))
        extractor = _scaled([by_id[image_id] for image_id in train.unique("image_id")])
        model = UnicoderVLForImageTextRetrieval.from_bert(bert, region_feature_dim=extractor.feature_dim)
        align_regions(model, UnicoderVLProcessor(extractor, tokenizer), by_id, train)
        projection = model.bert.embeddings.region_embeddings.feature_projection
        save_file({name: of.numpy() for name, of in projection.state_dict().items()}, second / "aligned.safetensors")
        for part in (first, second):
            size = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
            if size > MOST_BYTES:
                raise ValueError(f"Part {part.name} has {size:,} bytes, expected at most {MOST_BYTES:,}: give less.")
            print(f"{output}/{part.name}: {size / 1e6:.1f} MB")


def _pack_bert(name: str, tokenizer: Any, texts: Sequence[str], folder: Path) -> None:
    used = {token for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"] for token in ids}
    used -= set(tokenizer.convert_tokens_to_ids(SPECIAL))
    kept = [*tokenizer.convert_tokens_to_ids(SPECIAL), *sorted(used)]
    model = BertModel.from_pretrained(name, dtype=torch.float16)
    words = model.embeddings.word_embeddings
    words.weight = torch.nn.Parameter(words.weight[kept].clone(), requires_grad=False)
    words.num_embeddings = model.config.vocab_size = len(kept)
    words.padding_idx = model.config.pad_token_id = 0
    model.save_pretrained(folder)
    vocabulary = {token: number for number, token in enumerate(tokenizer.convert_ids_to_tokens(kept))}
    BertTokenizer(vocab=vocabulary, do_lower_case=tokenizer("A") == tokenizer("a")).save_pretrained(folder)


def _scaled(records: Sequence[RegionRecord]) -> UnicoderVLFeatureExtractor:
    """An extractor that scales features by those of these records."""
    features = np.concatenate([record.features for record in records]).astype(np.float32)
    mean = features.mean(axis=0)
    return UnicoderVLFeatureExtractor(
        feature_dim=features.shape[1], feature_mean=mean, feature_std=float((features - mean).std())
    )


class Inputs:
    """Both parts in memory: the captions of each split as tokens, and the regions of all images, on the device."""

    def __init__(self, folder: Path, device: str):
        told = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
        self.image_ids: list[str] = told["image_ids"]
        self.captions: list[str] = told["caption"]
        self.foils = read_foils(folder / "foils.jsonl")
        arrays = load_file(folder / "regions.safetensors")
        ends = arrays["counts"].cumsum()
        self.records: dict[str, RegionRecord] = {}
        for image_id, end, count, size in zip(self.image_ids, ends, arrays["counts"], arrays["sizes"], strict=True):
            rows = slice(end - count, end)
            self.records[image_id] = RegionRecord(
                image_id, image_width=int(size[0]), image_height=int(size[1]), boxes=arrays["boxes"][rows],
                features=arrays["features"][rows], object_ids=arrays["object_ids"][rows].astype(np.int64),
            )  # fmt: skip
        splits = np.array(told["split"])
        trained = np.unique(np.array(told["image_id"])[splits == "train"]).tolist()
        extractor = _scaled([self.records[image_id] for image_id in trained])
        tokenizer = BertTokenizer.from_pretrained(folder / "bert")
        self.processor = UnicoderVLProcessor(extractor, tokenizer)
        self.num_classes = int(arrays["object_ids"].max()) + 1
        self.aligned = {name: torch.from_numpy(of) for name, of in load_file(folder / "aligned.safetensors").items()}

        regions = extractor(list(self.records.values()), return_tensors="pt", return_kept_indices=True)
        kept = regions.pop("kept_indices")
        classes = [torch.from_numpy(record.object_ids) for record in self.records.values()]
        padded = torch.nn.utils.rnn.pad_sequence(classes, batch_first=True, padding_value=-1)
        self.object_ids = padded.gather(1, kept.clamp(min=0)).masked_fill(kept < 0, -1).to(device)
        self.regions = {name: tensor.to(device) for name, tensor in regions.items()}
        text = tokenizer(
            self.captions, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt",
            return_special_tokens_mask=True,
        )  # fmt: skip
        self.is_word = (text.pop("special_tokens_mask") == 0).to(device)
        self.text = {name: text[name].to(device) for name in ("input_ids", "attention_mask")}
        number = {image_id: index for index, image_id in enumerate(self.image_ids)}
        self.image_of_caption = torch.tensor([number[image_id] for image_id in told["image_id"]], device=device)
        self.rows = {split: torch.from_numpy(np.flatnonzero(splits == split)).to(device) for split in np.unique(splits)}

    def test(self, split: str = "test") -> tuple[list[str], list[str], np.ndarray]:
        """The captions and images of the test, and the number of each caption's image among these."""
        rows = self.rows[split].cpu().numpy()
        images, of_caption = np.unique(self.image_of_caption.cpu().numpy()[rows], return_inverse=True)
        return [self.captions[row] for row in rows], [self.image_ids[image] for image in images], of_caption

    def pairs(self, captions: torch.Tensor, images: torch.Tensor) -> Batch:
        """The model's inputs of these captions and images."""
        return {name: tensor[captions] for name, tensor in self.text.items()} | {
            name: tensor[images] for name, tensor in self.regions.items()
        }


# Training


def pretraining_batch(inputs: Inputs, rows: torch.Tensor, generator: torch.Generator, masking: Masking) -> Batch:
    """Matches, and as many mismatches by images of others of the batch; both with words and regions hidden."""
    images = inputs.image_of_caption[rows]
    others = images.roll(1)
    batch = inputs.pairs(rows.repeat(2), torch.cat((images, others)))

    def chance(like: torch.Tensor, share: float) -> torch.Tensor:
        return torch.rand(like.shape, device=like.device, generator=generator) < share

    words = inputs.is_word[rows.repeat(2)]
    hidden = words & chance(words, masking.mlm_probability)
    classes = inputs.object_ids[torch.cat((images, others))]
    chosen = (classes >= 0) & chance(classes, masking.moc_probability)
    ids, features = batch["input_ids"], batch["region_features"]
    batch["labels"] = ids.masked_fill(~hidden, IGNORED)
    batch["input_ids"] = ids.masked_fill(hidden, inputs.processor.tokenizer.mask_token_id)
    batch["region_labels"] = classes.masked_fill(~chosen, IGNORED)
    batch["region_features"] = features.masked_fill(
        (chosen & chance(classes, masking.region_zero_prob))[..., None], 0.0
    )
    labels = torch.cat((torch.ones_like(images), torch.zeros_like(images)))
    labels[len(images) :].masked_fill_(images == others, IGNORED)
    return batch | {"matching_labels": labels}


def retrieval_batch(inputs: Inputs, rows: torch.Tensor, generator: torch.Generator, share: float) -> Batch:
    """Matches alone, of which the loss makes its negatives; this share of words and regions is hidden."""
    images, numbers = inputs.image_of_caption[rows], torch.arange(len(rows), device=rows.device)
    batch = inputs.pairs(rows, images)

    def hides(places: torch.Tensor) -> torch.Tensor:
        return places & (torch.rand(places.shape, device=places.device, generator=generator) < share)

    mask = inputs.processor.tokenizer.mask_token_id
    batch["input_ids"] = batch["input_ids"].masked_fill(hides(inputs.is_word[rows]), mask)
    batch["region_features"] = batch["region_features"].masked_fill(
        hides(batch["region_attention_mask"] == 1)[..., None], 0.0
    )
    places = dict.fromkeys(("caption_index", "image_index", "group_ids"), numbers)
    return batch | places | {"labels": torch.ones_like(numbers), "mismatches": images[:, None] != images}


@dataclass
class Plan:
    """Where and how long is trained: `minutes` for one model, `deadline` of this call, `steps` instead of minutes."""

    device: str
    minutes: float
    deadline: float
    batch_size: int
    steps: int | None

    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def has_time_for(self, stage: str, minutes: float) -> bool:
        """Whether a stage may begin in a call of so many minutes; half of them will always do, or it never would."""
        wanted = UNDIVIDED.get(stage, 0) if self.device == "cuda" else 0
        return self.left() >= min(wanted, 60 * minutes / 2)


class OutOfTime(Exception):
    """The minutes of this call are over."""


def train(
    plan: Plan,
    folder: Path,
    name: str,
    model: torch.nn.Module,
    inputs: Inputs,
    loss_of: Callable[
        [torch.nn.Module, torch.Tensor, torch.Generator], tuple[torch.Tensor, Mapping[str, torch.Tensor]]
    ],
    learning_rate: float | dict[float, list[torch.nn.Parameter]],
    epochs: int | None = None,
) -> dict[str, Any]:
    """
    Trains on the captions of the training split for so many epochs, or a share of the minutes, from the checkpoint in
    the folder if there is one. How many steps fit is counted after a few; their log is `<name>.jsonl`. The learning
    rate is of all parameters, or each of several of its own.
    """
    torch.manual_seed(0)
    rates = learning_rate if isinstance(learning_rate, dict) else {learning_rate: list(model.parameters())}
    groups = [{"params": parameters, "lr": rate} for rate, parameters in rates.items()]
    optimizer = torch.optim.AdamW(groups, fused=plan.device == "cuda")
    path, log = folder / f"{name}.pt", folder / f"{name}.jsonl"
    steps = plan.steps
    if steps is None and epochs is not None:
        steps = epochs * len(inputs.rows["train"]) // plan.batch_size
    state: dict[str, Any] = {"step": 0, "steps": steps, "seconds": 0.0}
    if path.exists():
        saved = torch.load(path, map_location=plan.device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    else:
        log.write_text("")
    train_rows = inputs.rows["train"]
    batches = len(train_rows) // plan.batch_size
    generator = torch.Generator(plan.device)
    seconds = SHARES[name] * plan.minutes * 60
    model.train()
    warm, started = state["seconds"], time.perf_counter() - state["seconds"]
    while state["steps"] is None or state["step"] < state["steps"]:
        step = state["step"]
        epoch, place = divmod(step, batches)
        order = train_rows[torch.randperm(len(train_rows), generator=generator.manual_seed(epoch), device=plan.device)]
        now = min(1, (step + 1) / 100) * (1 - step / (state["steps"] or 1_000_000))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * now
        generator.manual_seed(1_000_003 * (step + 1))
        torch.manual_seed(step)
        rows = order[place * plan.batch_size : (place + 1) * plan.batch_size]
        with torch.autocast(plan.device, torch.bfloat16, enabled=plan.device == "cuda"):
            loss, parts = loss_of(model, rows, generator, step / (state["steps"] or 1_000_000))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state["step"] += 1
        if state["step"] % LOG_EVERY == 0 or state["step"] == state["steps"]:
            synchronize(plan.device)
            state["seconds"] = time.perf_counter() - started
            values = {key: round(value.item(), 5) for key, value in {"loss": loss, **parts}.items()}
            with log.open("a") as file:
                file.write(json.dumps({"step": state["step"], **values, "seconds": round(state["seconds"], 2)}) + "\n")
            if state["steps"] is None and state["step"] > LOG_EVERY:  # the first steps warm up
                pace = (state["seconds"] - warm) / LOG_EVERY
                state["steps"] = max(state["step"], state["step"] + int((seconds - state["seconds"]) / pace))
            warm = state["seconds"]
            if plan.left() < 0 and state["step"] != state["steps"]:
                saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}
                torch.save(saved, path.with_suffix(".partial"))
                path.with_suffix(".partial").replace(path)
                raise OutOfTime
    path.unlink(missing_ok=True)
    model.eval()
    try:
        training_curves(log, log.with_suffix(".png"), title=name)
    except ImportError as error:  # a picture less
        print(error)
    pairs = state["step"] * plan.batch_size
    return {**state, "pairs": pairs, "pairs_per_second": pairs / state["seconds"]}


# Stages of one model


class Proof:
    """The stages of one model, each of which gives its figures; models lie in the folder between stages."""

    def __init__(self, size: str, folder: Path, inputs: Inputs, plan: Plan, bert: Path):
        self.size, self.folder, self.inputs, self.plan, self.bert = size, folder, inputs, plan, bert

    def pretraining(self) -> dict[str, Any]:
        """Pre-trains on words, regions and matching."""
        inputs, masking = self.inputs, Masking()
        fields: dict[str, Any] = {
            "region_feature_dim": inputs.regions["region_features"].shape[-1],
            "num_region_classes": inputs.num_classes,
        }
        torch.manual_seed(0)
        if self.size != "base":
            fields["initializer_range"] = NARROW_INITIALIZER
        if self.size == "bert":
            model = UnicoderVLForPreTraining.from_bert(str(self.bert), dtype=torch.float32, **fields)
        else:
            vocabulary = len(inputs.processor.tokenizer)
            model = UnicoderVLForPreTraining(UnicoderVLConfig(vocab_size=vocabulary, **SIZES[self.size], **fields))

        def loss_of(model, rows, generator, done):
            outputs = model(**pretraining_batch(inputs, rows, generator, masking))
            return outputs.loss, {name: outputs[name] for name in ("mlm_loss", "moc_loss", "matching_loss")}

        found = train(self.plan, self.folder, "pre-training", model.to(self.plan.device), inputs, loss_of, 1e-4)
        model.save_pretrained(self.folder / "pretrained")
        return found

    def fine_tuning(self) -> dict[str, Any]:
        """Fine-tunes both stages of a search, on the mistakes of the first."""
        torch.manual_seed(0)
        if self.size == "words":
            return self._fine_tuning_of_words()
        with without_warnings_of_transformers():  # the first stage is new
            model = UnicoderVLForImageTextRetrieval.from_pretrained(
                self.folder / "pretrained", projection_dim=256, dtype=torch.float32
            )
        loss_of = self._retrieval_loss(HardNegativeLoss(GroupSoftmaxLoss()), HIDDEN, RANDOM_NEGATIVES)
        rate = 5e-5 if self.size == "base" else 2e-4
        found = train(self.plan, self.folder, "fine-tuning", model.to(self.plan.device), self.inputs, loss_of, rate)
        model.config.first_stage_trained = True
        model.save_pretrained(self.folder / "fine-tuned")
        return found

    def _fine_tuning_of_words(self) -> dict[str, Any]:
        depth = BertConfig.from_pretrained(self.bert).num_hidden_layers
        model = UnicoderVLForImageTextRetrieval.from_bert(
            str(self.bert), dtype=torch.float32, num_hidden_layers=depth + WORDS["num_joint_layers"],
            num_text_layers=depth, matching_head="similarity", projection_dim=256,
            joint_dropout_prob=WORDS["joint_dropout_prob"], initializer_range=NARROW_INITIALIZER,
            similarity_in_training=False,
            region_feature_dim=self.inputs.regions["region_features"].shape[-1],
        )  # fmt: skip
        embed = model.bert.embeddings
        embed.region_embeddings.feature_projection.load_state_dict(self.inputs.aligned)
        parts = (embed.word_embeddings, embed.position_embeddings, embed.token_type_embeddings, embed.LayerNorm)
        known = [of for part in (*parts, *model.bert.encoder.layer[:depth]) for of in part.parameters()]
        others = {id(of) for of in known}
        new = [of for of in model.parameters() if id(of) not in others]
        loss = HardNegativeLoss(GroupSoftmaxLoss(), num_hard_negatives=WORDS["num_hard_negatives"])
        loss_of = self._retrieval_loss(loss, hidden=0.0, random=WORDS_RANDOM_NEGATIVES)
        plan = replace(self.plan, batch_size=min(self.plan.batch_size, WORDS["batch_size"]))
        rates = {WORDS_RATES["bert"]: known, WORDS_RATES["new"]: new}
        model.to(plan.device)
        found = train(plan, self.folder, "fine-tuning", model, self.inputs, loss_of, rates, WORDS["epochs"])
        model.config.first_stage_trained = True
        model.save_pretrained(self.folder / "trained")
        return found

    def _retrieval_loss(self, loss: HardNegativeLoss, hidden: float, random: float) -> Callable[..., Any]:
        """Makes the loss of fine-tuning, in whose first steps, of this share, hard negatives are drawn at random."""

        def loss_of(model, rows, generator, done):
            batch = retrieval_batch(self.inputs, rows, generator, hidden)
            if done < random:
                shape, device = batch["mismatches"].shape, rows.device
                batch["hardness"] = torch.rand(shape, device=device, generator=generator)
            return loss(model, batch), {}

        return loss_of

    def folding(self) -> dict[str, Any]:
        """
        Keeps the training split as the bank of queries, and chooses, by the validation split, how much the pair's own
        state may add to the first stage's logit.
        """
        model = self.load("trained")
        if model.config.query_bank_size is None:  # else a call before had no time for the rest
            captions, image_ids, _ = self.inputs.test("train")
            model.set_query_bank(*map(torch.from_numpy, self._embedded(model, captions, image_ids)))
            model.save_pretrained(self.folder / "trained")
        captions, image_ids, right = self.inputs.test("val")
        scores = self.scorer(name="trained").score(captions, image_ids, output_dir=self.folder / "val-scores")
        texts, images = self._embedded(model, captions, image_ids)
        alone = texts @ images.T
        with torch.inference_mode():
            given = (torch.from_numpy(of).to(self.plan.device) for of in (texts, images))
            similarities = model.first_stage.similarities_in_scores(*given).cpu().numpy()
        sums = {w: recall_sum(measured(scores + w * similarities, right, intervals=False)) for w in WEIGHTS}
        weight = max(sums, key=sums.__getitem__)
        model.fold_similarity_weight(weight)
        model.save_pretrained(self.folder / "fine-tuned")
        without = {"first stage": alone, "first stage and query bank": similarities}
        without = {name: recall_sum(measured(of, right, intervals=False)) for name, of in without.items()}
        return {"weight": weight, "recall_sums": sums, **without}

    def _embedded(self, model, captions: Sequence[str], image_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self.embed_captions(model, captions), self.embed_images(model, image_ids)

    def load(self, name: str = "fine-tuned") -> UnicoderVLForImageTextRetrieval:
        model = UnicoderVLForImageTextRetrieval.from_pretrained(self.folder / name, dtype=torch.float32)
        return model.eval().to(self.plan.device)

    def scorer(self, store: Mapping[str, RegionRecord] | None = None, name: str = "fine-tuned") -> ImageTextScorer:
        dtype, block = (torch.bfloat16, 2**16) if self.plan.device == "cuda" else (None, 1024)
        store = self.inputs.records if store is None else store
        return ImageTextScorer(self.load(name), self.inputs.processor, store, dtype=dtype, block_pairs=block)

    @torch.inference_mode()
    def embed_captions(self, model: UnicoderVLForImageTextRetrieval, captions: Sequence[str]) -> np.ndarray:
        parts = []
        for start in range(0, len(captions), 256):
            text = self.inputs.processor(text=list(captions[start : start + 256]), return_tensors="pt")
            parts.append(model.encode_text(**text.to(self.plan.device)).float().cpu().numpy())
        return np.concatenate(parts)

    @torch.inference_mode()
    def embed_images(self, model: UnicoderVLForImageTextRetrieval, image_ids: Sequence[str]) -> np.ndarray:
        numbers = {image_id: number for number, image_id in enumerate(self.inputs.image_ids)}
        rows = torch.tensor([numbers[image_id] for image_id in image_ids], device=self.plan.device)
        parts = [{name: tensor[some] for name, tensor in self.inputs.regions.items()} for some in rows.split(256)]
        return np.concatenate([model.encode_image(**part).float().cpu().numpy() for part in parts])

    def first_stage(self) -> dict[str, Any]:
        """Ranks the test by the first stage."""
        captions, image_ids, right = self.inputs.test()
        model = self.load()
        return measured(self.embed_captions(model, captions) @ self.embed_images(model, image_ids).T, right)

    def exhaustive(self) -> dict[str, Any]:
        """Ranks the test by the matching head, every caption with every image."""
        captions, image_ids, right = self.inputs.test()
        started = time.perf_counter()
        scores = self.scorer().score(captions, image_ids, output_dir=self.folder / "scores")
        seconds = time.perf_counter() - started
        return measured(scores, right) | {"pairs": scores.size, "seconds": round(seconds, 1)}

    def foils(self) -> dict[str, Any]:
        """Measures foils by the matching head, the first stage, shuffled regions and scorers without images."""
        foils, records = self.inputs.foils, self.inputs.records
        ids, kinds = [foil.image_id for foil in foils], [foil.kind for foil in foils]
        model = self.load()
        scorer, *shuffled = map(self.scorer, (records, *(ShuffledStore(records, ids, seed) for seed in range(3))))
        for each in (scorer, *shuffled):
            each.model.remove_query_bank()
        first = by_similarity(
            lambda captions: self.embed_captions(model, captions), lambda images: self.embed_images(model, images)
        )
        margins = {
            "cross-encoder": foil_margins(foils, by_matching_head(scorer)),
            "first stage": foil_margins(foils, first),
            "shuffled regions": np.stack([foil_margins(foils, by_matching_head(each)) for each in shuffled], axis=1),
            "text only": np.array([foil.text_only for foil in foils]),
        }
        return {
            name: {kind: vars(measured) for kind, measured in of_scorer.items()}
            for name, of_scorer in foil_results(margins, kinds, ids).items()
        }


STAGES: dict[str, Callable[[Proof], dict[str, Any]]] = {
    "pre-training": Proof.pretraining,
    "fine-tuning": Proof.fine_tuning,
    "folding": Proof.folding,
    "first stage": Proof.first_stage,
    "exhaustive": Proof.exhaustive,
    "foils": Proof.foils,
}


def stages_of(size: str) -> list[str]:
    """The stages of a model: `words` is not pre-trained, and alone has a weight to be folded."""
    return [name for name in STAGES if name != ("pre-training" if size == "words" else "folding")]


RECALLS = [f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)]


def measured(scores: np.ndarray, right: np.ndarray, intervals: bool = True) -> dict[str, Any]:
    """The metrics of a test, with intervals of the recalls."""
    metrics = retrieval_metrics(scores, right)
    return metrics | {"intervals": confidence_intervals([rank_queries(scores, right)])} if intervals else metrics


def recall_sum(metrics: Mapping[str, Any]) -> float:
    """The sum of the six recalls."""
    return sum(metrics[name] for name in RECALLS)


def report(result: Mapping[str, Any]) -> str:
    """Writes the figures of all models that have any, as Markdown."""
    names = RECALLS
    lines = ["| model | ranked by | " + " | ".join(f"{n[0].upper()}R@{n.split('@')[1]}" for n in names) + " |"]
    lines.append("|---|---|" + "---:|" * len(names))
    for size, stages in result["models"].items():
        for stage in ("first stage", "exhaustive"):
            if stage in stages:
                lines.append(f"| {size} | {stage} | {' | '.join(f'{100 * stages[stage][n]:.1f}' for n in names)} |")
    lines += ["", "| model | foils told by | pairs | accuracy | interval |", "|---|---|---:|---:|---:|"]
    for size, stages in result["models"].items():
        for scorer, kinds in stages.get("foils", {}).items():
            told = kinds["all"]
            measured = FoilGain(**told) if "gain" in told else FoilAccuracy(**told)
            accuracy = str(measured).replace("(", "| ").removesuffix(")")
            lines.append(f"| {size} | {scorer} | {told['num_foils']:,} | {accuracy} |")
    lines += ["", f"{json.dumps(result['machine'])}; seconds: {json.dumps(result['took'])}"]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Packs inputs, or goes on with the proof; 1 if something is missing or the minutes are over."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["prepare"]:
        parser = argparse.ArgumentParser(prog="proof_gpu.py prepare", description=prepare.__doc__)
        for name in ("captions", "regions", "bert", "foils", "output"):
            parser.add_argument(name)
        prepare(**vars(parser.parse_args(argv[1:])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, help="a part that `prepare` packed")
    parser.add_argument("--output", type=Path, default=Path("proof"), help="folder of everything (default: proof)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=6.5, help="minutes of this call (default: 6.5)")
    parser.add_argument("--plan", type=float, default=5.0, help="minutes that one model is planned for (default: 5)")
    parser.add_argument(
        "--sizes", nargs="+", default=["words", "bert", "base"], help="models (default: words bert base)"
    )
    parser.add_argument("--batch-size", type=int, default=256, help="matches of a step (default: 256)")
    parser.add_argument("--steps", type=int, help="steps of either training, whatever the minutes")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here. A miniature: --device cpu --steps 2", file=sys.stderr)
        return 1
    deadline = time.perf_counter() + 60 * args.minutes
    kept = args.output / "inputs"
    if args.inputs is not None:
        shutil.copytree(args.inputs, kept, dirs_exist_ok=True)
    missing = {part: [name for name in names if not (kept / name).exists()] for part, names in PARTS.items()}
    if any(missing.values()):
        for part, names in missing.items():
            if names == PARTS[part]:
                print(f"Part {part} of the inputs is not here yet: give it with --inputs.")
            elif names:
                print(f"Part {part} of the inputs lacks {', '.join(names)}: pack it anew, by `prepare`.")
        return 1
    path = args.output / "proof.json"
    told = machine(args.device) | {"batch_size": args.batch_size, "steps": args.steps, "plan": args.plan}
    result = json.loads(path.read_text()) if path.exists() else {"machine": told, "models": {}, "took": {}}
    if result["machine"] != told:
        print(f"{path} is of another machine, version or plan: give another --output.", file=sys.stderr)
        return 1
    without_plans_for_shapes(args.device)
    inputs = Inputs(kept, args.device)
    plan = Plan(args.device, args.plan, deadline, args.batch_size, args.steps)
    for size in args.sizes:
        folder = args.output / size
        folder.mkdir(exist_ok=True)
        proof, found = Proof(size, folder, inputs, plan, kept / "bert"), result["models"].setdefault(size, {})
        for name in stages_of(size):
            stage = STAGES[name]
            if name in found:
                continue
            print(f"{size}, {name}: {(stage.__doc__ or '').strip()}", flush=True)
            began = time.perf_counter()
            try:
                if not plan.has_time_for(name, args.minutes):
                    raise OutOfTime
                found[name] = stage(proof)
            except OutOfTime:
                print(f"{args.minutes:g} minutes are over in {size}, {name}: run again, it goes on.")
                return 1
            result["took"][f"{size}, {name}"] = round(time.perf_counter() - began, 1)
            write_json(path, result)
            (args.output / "proof.md").write_text(report(result), encoding="utf-8")
    print(report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
