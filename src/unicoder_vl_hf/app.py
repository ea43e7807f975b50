"""
The app: search photos by a sentence and captions by a photo, see why a pair has its score, and browse a store with its
boxes. `unicoder-vl app` runs it, and examples/app is a Space of it.

`PhotoApp` answers, one question at a time, and knows no page; `build_page` makes the page by Gradio. Left out:
accounts, uploads that last, and serving many at once.
"""

import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, cast

from markupsafe import Markup
from PIL import Image

from . import logging
from .modeling_unicoder_vl import UnicoderVLForImageTextRetrieval
from .pictures import blank_page, draw_regions
from .regions.store import RegionStore
from .scoring.scorer import ImageTextScorer
from .search.encoders import Photos, UnicoderVLDualEncoder
from .search.explaining import explain_on_photo
from .search.index import SearchIndex, build_index
from .search.two_stage import Hit, SimilarityWeight, search

try:
    import gradio as gr
except ImportError as error:
    raise ImportError("The app needs Gradio: pip install '.[app]' in a checkout of unicoder-vl-hf.") from error

logger = logging.get_logger(__name__)

FOUND = 12  # photos, or captions, that a search shows
ON_A_PAGE = 24  # photos of a store
THUMBNAIL = 480  # pixels of the longer side of a photo among others
CSS = """
.gradio-container { width: 100%; max-width: 1100px !important; margin: 0 auto !important; }
.captions { margin: 0; padding-left: 2rem; line-height: 1.9; }
.grid-wrap { max-height: none !important; }
.explanation { --body-text-color: #1d2330; }
.dark .explanation { padding: .5rem .8rem; border-radius: 8px; }
@media (max-width: 600px) {
    .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
    .thumbnail-item .caption-label { max-width: 100%; white-space: normal; }
}
"""


class PhotoApp:
    """
    Answers what the page asks, by a checkpoint and a store of regions.

    Args:
        model (`str` or `os.PathLike`): A checkpoint with a first stage that was trained.
        regions (`str` or `os.PathLike`): The store.
        photos (`str` or `os.PathLike`, *optional*): Its photos, as `unicoder-vl extract` takes them; without them pages
            are blank but for boxes.
        photo_ids (`str`, *optional*, defaults to `"stem"`): Source of the photos' ids.
        index (`str` or `os.PathLike`, *optional*): Index of the images to search; by default one of all images of the
            store is made, in a temporary folder.
        captions_index (`str` or `os.PathLike`, *optional*): Index of captions, to be found by a photo.
        detector (`str`, *optional*), detector_options (`dict`, *optional*): The detector of uploaded photos; defaults
            to that of the regions that the model was trained on.

    Raises:
        `ValueError`: the first stage was not trained, or an index is of another checkpoint or of other items.
        `FileNotFoundError`: there is no such store, or nothing at `photos`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        regions: str | os.PathLike[str],
        photos: str | os.PathLike[str] | None = None,
        *,
        photo_ids: str = "stem",
        index: str | os.PathLike[str] | None = None,
        captions_index: str | os.PathLike[str] | None = None,
        detector: str | None = None,
        detector_options: Mapping[str, Any] | None = None,
    ):
        self.store = RegionStore(regions)
        self.photos = None if photos is None else Photos(photos, photo_ids)
        self.scorer = ImageTextScorer.from_pretrained(
            model, self.store, detector=detector, detector_options=detector_options, verbose=False
        )
        loaded = cast(UnicoderVLForImageTextRetrieval, self.scorer.model)
        self.encoder = UnicoderVLDualEncoder(loaded, self.scorer.processor, self.store, model)
        if index is None:
            with tempfile.TemporaryDirectory() as folder:  # embeddings stay in memory
                self.index = build_index(self.encoder, self.store, Path(folder) / "index")
        else:
            self.index = SearchIndex(index)
        self.captions_index = None if captions_index is None else SearchIndex(captions_index)
        for opened, items in ((self.index, "images"), (self.captions_index, "captions")):
            if opened is not None:
                opened.check(self.encoder, self.store)
                if opened.items != items:
                    raise ValueError(f"{opened.path} holds {opened.items}, but what is sought are {items}.")
        self.weight = SimilarityWeight.of(None, self.encoder, self.scorer)
        self.names = self.index.names
        self._lock = threading.Lock()  # one model, which an explanation sets to another attention

    def find(self, sentence: str) -> list[Hit]:
        """Finds the images that match a sentence best."""
        if not sentence.strip():
            raise ValueError("The sentence is empty: say what the photos should show.")
        with self._lock:
            return search([sentence], self.index, self.encoder, self.scorer, top_k=FOUND)[0]

    def find_captions(self, image: str | Image.Image) -> list[Hit]:
        """Finds the captions that match an image best, which is the id of a stored one or a photo."""
        assert self.captions_index is not None
        with self._lock:
            return search([image], self.captions_index, self.encoder, self.scorer, top_k=FOUND)[0]

    def explain(self, image: str | Image.Image, sentence: str) -> str:
        """Explains the score of an image with a sentence, as HTML."""
        with self._lock:
            return explain_on_photo(self.scorer, image, sentence, self.photos)[1]

    def photo(self, image_id: str) -> Image.Image:
        """Opens the photo of a stored image, or draws its boxes where there is none."""
        return self._photo(image_id) or self.boxes(image_id)

    def boxes(self, image_id: str) -> Image.Image:
        """Draws the regions of a stored image on its photo, or on a blank page where there is none."""
        record = self.store[image_id]
        page = self._photo(image_id) or blank_page(record)
        return draw_regions(page, record, class_names=self.store.provenance.get("class_names") or None)

    def _photo(self, image_id: str) -> Image.Image | None:
        try:
            return None if self.photos is None else self.photos.of(self.store[image_id])
        except (KeyError, ValueError) as error:
            logging.warn_once(logger, error.args[0])
            return None

    def thumbnails(self, image_ids: Sequence[str]) -> list[Image.Image]:
        """Opens photos of stored images, small."""
        found = [self.photo(image_id).copy() for image_id in image_ids]
        for photo in found:
            photo.thumbnail((THUMBNAIL, THUMBNAIL))
        return found


def build_page(app: PhotoApp) -> gr.Blocks:
    """Builds the page of an app."""
    with gr.Blocks(title="Unicoder-VL", analytics_enabled=False) as page:
        gr.Markdown(f"# Search {len(app.names):,} photos")
        with gr.Tab("Search"):
            _search_tab(app)
        if app.captions_index is not None:
            with gr.Tab("Search by photo"):
                _captions_tab(app)
        with gr.Tab("Score a pair"):
            _pair_tab(app)
        with gr.Tab("Browse"):
            _browse_tab(app)
    return page


def launch(page: gr.Blocks, host: str | None = None, port: int | None = None) -> str:
    """
    Serves a page while the process goes on, and returns its address; `page.block_thread()` waits until it is stopped.
    Nothing is sent elsewhere.

    Args:
        page (`gradio.Blocks`): The page.
        host (`str`, *optional*): The address to listen at; this machine alone by default.
        port (`int`, *optional*): The port; the first free one from 7860 by default.
    """
    theme = gr.themes.Base(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    _, address, _ = page.queue(default_concurrency_limit=2).launch(
        server_name=host, server_port=port, share=False, theme=theme, css=CSS, max_file_size="20mb",
        footer_links=[], ssr_mode=False, quiet=True, prevent_thread_lock=True,
    )  # fmt: skip
    return address.rstrip("/")


def _search_tab(app: PhotoApp) -> None:
    with gr.Row():
        sentence = gr.Textbox(
            label="What should the photos show?",
            placeholder="two dogs in the snow",
            scale=5,
            min_width=240,
            max_lines=1,
        )
        button = gr.Button("Search", variant="primary", scale=1, min_width=120)
    order = gr.Markdown()
    found = _photo_gallery("Found, the best first")
    hits = gr.State([])
    why = gr.HTML(elem_id="why-found")

    def searched(text: str) -> tuple[list, str, list, str]:
        best = app.find(text)
        shown = [f"{rank}. {hit.score:+.2f} {hit.name}" for rank, hit in enumerate(best, start=1)]
        names = [hit.name for hit in best]
        note = f"Ordered by {app.weight}. Click a photo to see why."
        return list(zip(app.thumbnails(names), shown, strict=True)), note, [(name, text) for name in names], ""

    def explained(event: gr.SelectData, pairs: list[tuple[str, str]]) -> str:
        return app.explain(*pairs[event.index])

    for start in (sentence.submit, button.click):
        start(_mendable(searched), sentence, [found, order, hits, why])
    _scroll(found.select(_mendable(explained), hits, why), why)


def _captions_tab(app: PhotoApp) -> None:
    photo, image_id = _image_inputs()
    button = gr.Button("Find captions", variant="primary")
    found = gr.HTML(elem_id="captions-found")

    def searched(photo: Image.Image | None, image_id: str) -> str:
        lines = [
            Markup("<li><b>{:+.2f}</b> {}</li>").format(hit.score, hit.name)
            for hit in app.find_captions(_image(photo, image_id))
        ]
        return Markup("<ol class='captions'>{}</ol>").format(Markup("").join(lines))

    for start in (image_id.submit, button.click):
        _scroll(start(_mendable(searched), [photo, image_id], found), found)


def _pair_tab(app: PhotoApp) -> None:
    photo, image_id = _image_inputs()
    sentence = gr.Textbox(label="Sentence", placeholder="a red dog")
    button = gr.Button("Score", variant="primary")
    why = gr.HTML(elem_id="why-pair")

    def explained(photo: Image.Image | None, image_id: str, text: str) -> str:
        return app.explain(_image(photo, image_id), text)

    for start in (sentence.submit, button.click):
        _scroll(start(_mendable(explained), [photo, image_id, sentence], why), why)


def _browse_tab(app: PhotoApp) -> None:
    pages = -(-len(app.names) // ON_A_PAGE)
    number = gr.Slider(1, max(2, pages), value=1, step=1, label="Page", visible=pages > 1)
    shown = _photo_gallery("Photos of the store", value=_named(app, 1))
    boxes = gr.Image(label="Regions", interactive=False, visible=False, buttons=[], elem_id="boxes")

    def chosen(event: gr.SelectData, number: int) -> Any:
        image_id = app.names[(number - 1) * ON_A_PAGE + event.index]
        return gr.Image(app.boxes(image_id), label=f"Regions of {image_id}", visible=True)

    number.release(_mendable(lambda number: _named(app, number)), number, shown)
    _scroll(shown.select(_mendable(chosen), number, boxes), boxes)


def _named(app: PhotoApp, number: int) -> list[tuple[Image.Image, str]]:
    """Gives the photos of a page of the store, numbered from 1, with their ids."""
    names = app.names[(number - 1) * ON_A_PAGE : number * ON_A_PAGE]
    return list(zip(app.thumbnails(names), names, strict=True))


def _photo_gallery(label: str, **options: Any) -> gr.Gallery:
    return gr.Gallery(
        label=label, columns=4, height="auto", object_fit="contain", allow_preview=False, buttons=[],
        interactive=False, **options,
    )  # fmt: skip


def _scroll(event: Any, answer: gr.HTML | gr.Image) -> None:
    """Brings an answer into view, which may lie below what was clicked, once more when its picture is there."""
    show = """() => setTimeout(() => {
        const answer = document.getElementById('ANSWER'), show = () => answer.scrollIntoView();
        answer.addEventListener('load', show, {capture: true, once: true});
        show();
    }, 300)"""
    event.success(None, js=show.replace("ANSWER", answer.elem_id))


def _image_inputs() -> tuple[gr.Image, gr.Textbox]:
    with gr.Row():
        photo = gr.Image(type="pil", label="A photo of yours", sources=["upload", "clipboard"], height=260)
        image_id = gr.Textbox(label="or the id of a stored one")
    return photo, image_id


def _image(photo: Image.Image | None, image_id: str) -> str | Image.Image:
    if (photo is None) == (not image_id):
        raise ValueError("Give either a photo or the id of a stored one.")
    return image_id if photo is None else photo


def _mendable(answer: Callable) -> Callable:
    """Shows errors that the user can mend on the page, in their own words."""

    @wraps(answer)
    def answered(*given: Any) -> Any:
        try:
            return answer(*given)
        except (ValueError, KeyError, OSError) as error:
            message = str(error.args[0] if isinstance(error, KeyError) else error)
            raise gr.Error(message, print_exception=False) from error

    return answered
