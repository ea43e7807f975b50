"""First stages of a search: encoders of captions and images alone, so that any number of images can be compared.

Ours is the same model with a projection (`encode_text`, `encode_image`); any dual encoder of transformers, such as
CLIP or SigLIP 2, will do as well. Left out: searching among the embeddings, see `index` and `two_stage`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from .. import logging
from ..modeling_unicoder_vl import UnicoderVLForImageTextRetrieval
from ..processes import start_processes
from ..processing_unicoder_vl import RegionInput, UnicoderVLProcessor
from ..records_unicoder_vl import RegionRecord, check_several
from ..regions.photos import read_photo
from ..regions.store import RegionStore
from ..runs.setup import is_unicoder_vl
from ..scoring.checkpoints import load_config, load_for_store, weights_digest
from ..scoring.scorer import ImageTextScorer, evaluating

if TYPE_CHECKING:
    from PIL import Image

logger = logging.get_logger(__name__)

BATCH_SIZE = 64
# Images whose records are read at once and sorted by their number of regions.
READ_AT_ONCE = 1024


class DualEncoder(Protocol):
    """An encoder of captions and images into one space, as `(n, dim)` float32 of unit length."""

    name: str
    dim: int

    def embed_captions(self, captions: Sequence[str]) -> np.ndarray:
        """Embeds captions, `(n, dim)`, in their order."""
        ...

    def embed_images(self, images: Sequence[Any]) -> np.ndarray:
        """Embeds images by their ids, or in another form that the encoder takes, `(n, dim)`, in their order."""
        ...

    def identity(self) -> dict[str, str]:
        """
        Collects the facts that tell the encoder from others: its `name`, and all that comparable embeddings share.
        """
        ...


class UntrainedFirstStage(ValueError):
    """The error of a checkpoint that can score pairs, but not embed a caption or an image alone."""


class UnicoderVLDualEncoder:
    """
    The first stage of a Unicoder-VL, on the regions of a store.

    Args:
        model ([`UnicoderVLForImageTextRetrieval`]): A model with a first stage that was trained.
        processor ([`UnicoderVLProcessor`]): The processor of the model.
        store (`Mapping[str, RegionRecord]`): The records in which image ids are looked up.
        name (`str`): The checkpoint's name.
        max_length (`int`, *optional*, defaults to 44): Most tokens of a caption.

    Raises:
        [`UntrainedFirstStage`] (a `ValueError`): the first stage was not trained; the message says what to do, and how
        long exhaustive scoring would take.
    """

    def __init__(
        self,
        model: UnicoderVLForImageTextRetrieval,
        processor: UnicoderVLProcessor,
        store: Mapping[str, RegionRecord],
        name: str | os.PathLike[str],
        max_length: int = 44,
    ):
        if model.first_stage is None or not model.config.first_stage_trained:
            raise UntrainedFirstStage(
                f"The first stage of {name} was not trained: it can score a caption with an image, but embed neither "
                f"alone. Train it, in minutes: `unicoder-vl train-first-stage {name} CAPTIONS REGIONS OUTPUT`."
                " Or do without: `unicoder-vl mine` without --candidates, examples/evaluate_retrieval.py, or "
                f"`unicoder-vl search … --exhaustive`: {_exhaustive(model, processor, store)}."
            )
        self.model, self.processor, self.store = model, processor, store
        self.name, self.max_length = str(name), max_length
        self.first_stage = model.first_stage
        self.dim = self.first_stage.text_projection.out_features

    def embed_captions(self, captions: Sequence[str]) -> np.ndarray:
        """Embeds captions, see [`DualEncoder`]."""
        states = text_states(self.model, self.processor, captions, self.max_length)
        return self._embed(self.first_stage.embed_text, states)

    def embed_images(self, images: Sequence[RegionInput]) -> np.ndarray:
        """Embeds images by their ids, or in another form that the processor takes, see [`DualEncoder`]."""
        states = image_states(self.model, self.processor, images, self.store)
        return self._embed(self.first_stage.embed_image, states)

    @torch.inference_mode()
    def similarities_in_scores(self, texts: np.ndarray, images: np.ndarray) -> np.ndarray:
        """
        Computes the similarities that scores hold after text layers, `(num_texts, num_images)`, float32, given what was
        embedded: the embeddings' product, less what a query bank takes from it.
        """
        given = (torch.from_numpy(of).to(self.model.device) for of in (texts, images))
        return self.first_stage.similarities_in_scores(*given).cpu().numpy()

    def identity(self) -> dict[str, str]:
        """The name of the checkpoint, and the digest of the weights that embed."""
        weights = {**self.model.bert.state_dict(), **self.first_stage.state_dict()}
        others: tuple[str, ...] = ("query_bank.",)
        if first := self.model.config.num_text_layers:  # behind which nothing embeds
            joint = range(first, self.model.config.num_hidden_layers)
            others += ("pooler.", *(f"encoder.layer.{number}." for number in joint))
        weights = {name: weight for name, weight in weights.items() if not name.startswith(others)}
        return {"family": "unicoder-vl", "name": self.name, "weights_sha256": weights_digest(weights)}

    @torch.inference_mode()
    def _embed(self, embed: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> np.ndarray:
        return embed(states.to(self.model.device)).cpu().numpy()


class TransformersDualEncoder:
    """
    Embeds captions and photos by a model of transformers with `get_text_features` and `get_image_features`.

    Args:
        name (`str`): The checkpoint, with its processor.
        photo (callable, *optional*): Opens the photo of an image id, such as [`Photos`]; without it captions alone can
            be embedded.
        device (`torch.device`, *optional*, defaults to the CPU): The device on which it runs.

    Raises:
        `ValueError`: the model lacks one of the two methods.
    """

    def __init__(
        self,
        name: str | os.PathLike[str],
        photo: "Callable[[str], Image.Image] | None",
        device: torch.device | str = "cpu",
    ):
        from transformers import AutoModel, AutoProcessor

        model: Any = AutoModel.from_pretrained(name, config=load_config(name))
        missing = [method for method in ("get_text_features", "get_image_features") if not hasattr(model, method)]
        if missing:
            raise ValueError(
                f"{name} ({model.config.model_type}) has no {' and no '.join(missing)}: expected a dual encoder, such "
                "as CLIP or SigLIP 2."
            )
        self.model, self.processor = model.eval().to(device), AutoProcessor.from_pretrained(name)
        self.name, self.photo = str(name), photo
        # SigLIP was trained with captions of full length only; for CLIP it makes no difference.
        self.max_length = model.config.text_config.max_position_embeddings
        self.dim = self.embed_captions(["a photo"]).shape[1]

    def embed_captions(self, captions: Sequence[str]) -> np.ndarray:
        """Embeds captions, see [`DualEncoder`]."""
        check_several("captions", captions)
        lengths = {"padding": "max_length", "truncation": True, "max_length": self.max_length}
        return self._embed(captions, lambda some: {"text": list(some), **lengths}, self.model.get_text_features)

    def embed_images(self, images: "Sequence[str | os.PathLike[str] | Image.Image]") -> np.ndarray:
        """
        Embeds photos by their ids, as files (`os.PathLike`) or opened, see [`DualEncoder`]. Raises ValueError for an id
        where no photos were given, and for regions.
        """
        check_several("images", images)
        return self._embed(images, lambda some: {"images": list(map(self._open, some))}, self.model.get_image_features)

    def identity(self) -> dict[str, str]:
        """The name of the checkpoint, and the digest of the weights that embed."""
        digest = weights_digest(self.model.state_dict())
        return {"family": self.model.config.model_type, "name": self.name, "weights_sha256": digest}

    def _open(self, image: "str | os.PathLike[str] | Image.Image") -> "Image.Image":
        if isinstance(image, str):
            if self.photo is None:
                raise ValueError(f"{self.name} embeds photos, and none were given.")
            return self.photo(image)
        if isinstance(image, RegionRecord):
            raise ValueError(
                f"{self.name} embeds photos, and the regions of {image.image_id!r} are none: give the photo."
            )
        name = os.fspath(image) if isinstance(image, os.PathLike) else "the photo"
        return read_photo(image, name)[0]

    @torch.inference_mode()
    def _embed(self, items: Sequence[Any], inputs: Callable[[Sequence[str]], dict], features: Callable) -> np.ndarray:
        batches = []
        for start in range(0, len(items), BATCH_SIZE):
            batch = self.processor(**inputs(items[start : start + BATCH_SIZE]), return_tensors="pt")
            states = features(**batch.to(self.model.device)).pooler_output
            batches.append(torch.nn.functional.normalize(states.float(), dim=-1).cpu())
        return torch.cat(batches).numpy()


class Photos:
    """
    The photos of a folder, a .tar or a dataset, by image id; called with an id, it opens one. Needs Pillow.

    Args:
        path (`str` or `os.PathLike`): The photos, as `unicoder-vl extract` takes them.
        ids (`str`, *optional*, defaults to `"stem"`): The source of photos' ids that the store was made with; see
            [`photo_ids`].

    Raises:
        `FileNotFoundError`: there is nothing at `path`.
        `ValueError`: there is no photo, or two have one id.
    """

    def __init__(self, path: str | os.PathLike[str], ids: str = "stem"):
        from ..data.image_ids import photo_ids
        from ..regions.photos import in_words, list_photos

        self.path = path
        self.source = list_photos(path, **photo_ids(ids), skip_unmapped=True)
        self._number = {image_id: number for number, image_id in enumerate(self.source.ids)}
        if self.source.left_out:
            some = ", ".join(left.file for left in self.source.left_out[:3])
            logger.warning(f"{path}: {in_words(self.source)} Such as {some}.")

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._number

    def __call__(self, image_id: str) -> "Image.Image":
        return self._open(image_id)[0]

    def of(self, record: RegionRecord) -> "Image.Image":
        """
        Opens the photo of a record, at any scale.

        Raises:
            `KeyError`: there is no photo of that id.
            `ValueError`: the photo cannot be read, or has other proportions than the image that the regions were found
                in, and so is another photo of that name.
        """
        image, (width, height) = self._open(record.image_id)
        if record.image_width is None or record.image_height is None:
            return image
        # In a scaled copy each side is rounded, by less than a pixel.
        if abs(width * record.image_height - height * record.image_width) > record.image_width + record.image_height:
            raise ValueError(
                f"{self.file(record.image_id)} has {width} x {height} pixels, but the regions of {record.image_id!r} "
                f"were found in a photo of {record.image_width} x {record.image_height}: it is another photo of that "
                "name."
            )
        return image

    def read(self, image_id: str) -> bytes:
        """Reads the bytes of a photo's file. Raises KeyError if there is no photo of that id."""
        return self.source.read(self._place(image_id))

    def file(self, image_id: str) -> str:
        """Names the file of a photo, so that a user finds it. Raises KeyError if there is no photo of that id."""
        return self.source.name(self._place(image_id))

    def _place(self, image_id: str) -> int:
        if image_id not in self:
            raise KeyError(
                f"{self.path} has no photo {image_id!r}; its ids are like {self.source.ids[:3]}. Give all photos of "
                "the store, and say what it was made with: with ids='path' (--photo-ids path) a photo's id is its path."
            )
        return self._number[image_id]

    def _open(self, image_id: str) -> "tuple[Image.Image, tuple[int, int]]":
        """Decodes a photo, see [`decode_photo`]; errors name the file."""
        from ..regions.photos import decode_photo

        place = self._place(image_id)
        try:
            return decode_photo(self.source.read(place))
        except Exception as error:  # of any kind, where a file is damaged
            raise ValueError(f"{self.source.name(place)} cannot be read: {error}.") from error


def open_transformers_encoder(
    name: str,
    store: Mapping[str, RegionRecord],
    photos: str | None,
    *,
    photo_ids: str = "stem",
    needs_photos: bool = True,
) -> TransformersDualEncoder:
    """
    Opens a dual encoder of transformers on the device of this process, for photos of the images of a store.

    Raises:
        `ValueError`: it needs `photos`, and there are none; while it embeds, a photo is not that of the stored image.
    """
    if photos is None:
        if needs_photos:
            raise ValueError(f"{name} looks at photos: give --photos.")
        return TransformersDualEncoder(name, None, start_processes().device)
    opened = Photos(photos, photo_ids)
    return TransformersDualEncoder(name, lambda image_id: opened.of(store[image_id]), start_processes().device)


def open_dual_encoder(name: str, store: RegionStore, photos: str | None = None, photo_ids: str = "stem") -> DualEncoder:
    """
    Opens a first stage that is not the scoring model's own: another Unicoder-VL, or a dual encoder of transformers for
    photos.

    Raises:
        `ValueError`: there is no such model, its first stage was not trained, or it needs `photos`.
    """
    if is_unicoder_vl(name):
        return UnicoderVLDualEncoder(*load_for_store(name, store), store, name)
    return open_transformers_encoder(name, store, photos, photo_ids=photo_ids)


def text_states(
    model: UnicoderVLForImageTextRetrieval,
    processor: UnicoderVLProcessor,
    captions: Sequence[str],
    max_length: int = 44,
) -> torch.Tensor:
    """Encodes each caption alone, before the projection: `(n, hidden_size)`, float32, on the CPU."""
    check_several("captions", captions)
    states = torch.empty(len(captions), model.config.hidden_size)
    batches = _alike([len(caption) for caption in captions])
    with evaluating(model):
        for rows in logging.tqdm(
            batches, desc="Encoding captions", unit="batch", leave=False, disable=len(batches) == 1
        ):
            inputs = processor(text=[captions[row] for row in rows], max_length=max_length, return_tensors="pt")
            states[rows] = model.text_states(**inputs.to(model.device)).cpu()
    return states


def image_states(
    model: UnicoderVLForImageTextRetrieval,
    processor: UnicoderVLProcessor,
    images: Sequence[RegionInput],
    store: Mapping[str, RegionRecord] | None = None,
) -> torch.Tensor:
    """Encodes each image alone, before the projection: `(n, hidden_size)`, float32, on the CPU."""
    check_several("images", images)
    states = torch.empty(len(images), model.config.hidden_size)
    starts = range(0, len(images), READ_AT_ONCE)
    with evaluating(model):
        for start in logging.tqdm(starts, desc="Encoding images", unit="read", leave=False, disable=len(starts) == 1):
            some = images[start : start + READ_AT_ONCE]
            if isinstance(store, RegionStore) and all(isinstance(image, str) for image in some):
                some = store.get_many(image for image in some if isinstance(image, str))
            records = processor.load_records(some, store)
            for rows in _alike([len(record.features) for record in records]):
                inputs = processor.feature_extractor([records[row] for row in rows], return_tensors="pt")
                states[[start + row for row in rows]] = model.image_states(**inputs.to(model.device)).cpu()
    return states


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Sorts items into batches of about the same length."""
    order = np.argsort(lengths, kind="stable").tolist()
    return [order[start : start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE)]


def _exhaustive(
    model: UnicoderVLForImageTextRetrieval, processor: UnicoderVLProcessor, store: Mapping[str, RegionRecord]
) -> str:
    """Says how long it takes to score one caption with every image, measured on a few."""
    some = [image_id for image_id, _ in zip(store, range(200), strict=False)]
    plan = ImageTextScorer(model, processor, store).plan(["a dog runs on the grass in front of a house"], some)
    seconds = plan.seconds * len(store) / len(some)
    return f"about {seconds:.0f} s for a caption with {len(store):,} images, {plan.where}"
