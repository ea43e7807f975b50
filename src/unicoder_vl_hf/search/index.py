"""An index of embedded images or captions: a folder, made once, searched by the nearest neighbours of a query.

    index.json                  the kind of items, the checkpoint and the store that it was made from; written last
    names.json                  the image ids, or the captions
    embeddings.safetensors      (N, dim) float32, of unit length
    faiss.index                 the structure of FAISS, if one was asked for

The search is exact, by one matrix product, unless the index was made with a FAISS structure. A folder is made beside
its place and renamed when it is whole; items that were embedded before a kill are not embedded again. Left out:
encoders, see `encoders`, and the order of the candidates, see `two_stage`.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from .. import logging
from ..extras import optional_import
from ..files import full_disk_named, json_digest, put_back, remove_folder, replace_folder, write_json
from ..name_lists import read_json
from ..processes import start_processes
from ..records_unicoder_vl import check_several
from ..regions.store import RegionStore, manifest_checksum
from ..regions.tensor_files import TensorFile
from ..scoring.blocks import BlockFolder, job_of
from ..shares import Share, check_restart
from .encoders import DualEncoder

logger = logging.get_logger(__name__)

FORMAT_VERSION = 1
INDEX, NAMES, EMBEDDINGS, FAISS = "index.json", "names.json", "embeddings.safetensors", "faiss.index"

GROWN = " If it is that one and has grown, `unicoder-vl index … --add` adds what is new."
# Items that are embedded at once; a kill loses as many.
BLOCK_ITEMS = 1024
# Similarities that are held at once.
MAX_SIMILARITIES = 1 << 25

Items = Literal["images", "captions"]


class SearchIndex:
    """
    An index that [`build_index`] wrote: its `items` are `"images"` or `"captions"`, with their `names` and their
    `embeddings`, `(N, dim)` float32 of unit length.

    Args:
        path (`str` or `os.PathLike`): The folder of the index.

    Raises:
        `ValueError`: the folder is no index, or one of another version, or its files do not fit.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not (self.path / INDEX).exists():
            raise ValueError(f"{self.path} is no index: it has no {INDEX}. Make one with `unicoder-vl index`.")
        self.facts: dict[str, Any] = read_json(self.path / INDEX)
        version = self.facts.get("format_version") if isinstance(self.facts, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(f"{self.path} has format_version {version}, expected {FORMAT_VERSION}: make it again.")
        self.items: Items = self.facts["items"]
        self.names: list[str] = read_json(self.path / NAMES)
        self.embeddings = TensorFile(self.path / EMBEDDINGS).tensors["embeddings"]
        if not len(self.names) == len(self.embeddings) == self.facts["count"]:
            raise ValueError(
                f"{self.path} names {len(self.names)} {self.items} and holds {len(self.embeddings)} embeddings, "
                f"expected {self.facts['count']} of each: make it again."
            )
        self._faiss: Any = None
        if self.facts["faiss"] is not None:
            self._faiss = optional_import("faiss", "faiss").read_index(str(self.path / FAISS))

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        encoder, store = (self.facts[made]["name"] for made in ("encoder", "store"))
        return (
            f"{type(self).__name__}({str(self.path)!r}, {self.items}={len(self)}, dim={self.facts['dim']}, "
            f"{encoder=}, {store=}, faiss={self.facts['faiss']!r})"
        )

    def check(self, encoder: DualEncoder | None = None, store: RegionStore | None = None) -> None:
        """
        Checks that a checkpoint and a store are those that the index was made with.

        Raises:
            `ValueError`: the index was made by another checkpoint, or from another store; the message names both. Or
                the store has changed since.
        """
        if encoder is not None:
            _compare(f"{self.path} was made by the checkpoint", self.facts["encoder"], encoder.identity())
        if store is not None:
            if outdated := self.outdated(store):
                raise ValueError(outdated)
            _compare(f"{self.path} was made from the store", self.facts["store"], store_identity(store), GROWN)

    def outdated(self, store: RegionStore) -> str | None:
        """Says that a store has changed since the index was made from it, and what to do; None where it has not."""
        made, now = self.facts["store"], store_identity(store)
        if made["name"] != now["name"] or made["manifest_sha256"] == now["manifest_sha256"]:
            return None
        return (
            f"{made['name']} has changed since {self.path} was made from it: `unicoder-vl index … --add` brings that "
            "up to date, and --restart makes it anew."
        )

    def search(self, queries: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """
        Finds the items nearest to each query, the nearest first; of equally near ones the earlier.

        Args:
            queries (`np.ndarray` of shape `(Q, dim)`): Embeddings of unit length, by the encoder that made the index.
            top_k (`int`): Number of items, at least 1; all if there are fewer.

        Returns:
            Positions `(Q, K)` (int64) in `names`, and similarities `(Q, K)` (float32) in `[-1, 1]`. An approximate
            FAISS structure may find fewer: position -1.
        """
        if top_k < 1:
            raise ValueError(f"top_k={top_k}; expected at least 1.")
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if self._faiss is not None:
            similarities, positions = self._faiss.search(queries, min(top_k, len(self)))
            return positions, similarities
        return nearest(queries, self.embeddings, top_k)


def nearest(queries: np.ndarray, embeddings: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Finds the `top_k` largest inner products of each query, or all if there are fewer; of equal ones the earlier.

    Args:
        queries, embeddings (`np.ndarray` of shape `(Q, dim)` and `(N, dim)`): Vectors in float32.
        top_k (`int`): Number of products, at least 1.

    Returns:
        Positions `(Q, K)` in `embeddings`, int64, and the products `(Q, K)`, float32, the largest first.
    """
    top_k = min(top_k, len(embeddings))
    positions = np.empty((len(queries), top_k), dtype=np.int64)
    similarities = np.empty((len(queries), top_k), dtype=np.float32)
    rows = max(1, MAX_SIMILARITIES // len(embeddings))
    for start in range(0, len(queries), rows):
        product = queries[start : start + rows] @ embeddings.T
        for query, row in enumerate(product, start=start):
            lowest = np.partition(row, len(row) - top_k)[len(row) - top_k]
            candidates = np.flatnonzero(row >= lowest)
            best = candidates[np.argsort(-row[candidates], kind="stable")[:top_k]]
            positions[query], similarities[query] = best, row[best]
    return positions, similarities


def build_index(
    encoder: DualEncoder,
    store: RegionStore,
    output: str | os.PathLike[str],
    *,
    image_ids: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    faiss: str | None = None,
    add: bool = False,
    restart: bool = False,
    share: Share | None = None,
) -> SearchIndex:
    """
    Embeds the images of a store, or captions, and writes the index. Under `accelerate launch` processes share the
    work; the same call goes on where a killed one stopped, and opens an index that is complete.

    Args:
        encoder ([`UnicoderVLDualEncoder`] or [`TransformersDualEncoder`]): Embeds the items.
        store ([`RegionStore`]): The store whose images are indexed, and whose regions re-ranking reads.
        image_ids (sequence of `str`, *optional*): Images to index, such as those of one split; by default all.
        output (`str` or `os.PathLike`): A new folder, or that of the same index.
        captions (sequence of `str`, *optional*): Captions to index instead, each text once, to be searched by an image.
        faiss (`str`, *optional*): A structure of FAISS in the words of its `index_factory`, such as `"HNSW32"`, for
            millions of images; the search is then approximate. Needs the extra `[faiss]`.
        add (`bool`, *optional*, defaults to `False`): Whether items that a complete index lacks are added to it, and
            images that the store has no more are left out. It stays until the new one is complete.
        restart (`bool`, *optional*, defaults to `False`): Whether to begin anew, whatever an earlier call left or
            completed. An index that is there stays until the new one is complete, and is then replaced.
        share ([`Share`], *optional*): The share of the items that is embedded here, or the one that gathers what
            shares embedded and writes the index. By default all that is left is embedded.

    Raises:
        `ValueError`: `output` holds something else, there is nothing to index, an earlier call began another job, or a
            share is to begin anew.
        `FinishedShare`, `MissingShares`: the share is embedded, or shares that are to be gathered are not.
    """
    check_restart(restart, share)
    check_several("image_ids", image_ids)
    check_several("captions", captions)
    output = Path(output).resolve()
    items: Items = "images" if captions is None else "captions"
    chosen = store if image_ids is None else image_ids
    names = list(dict.fromkeys(chosen if captions is None else captions))
    state = start_processes()
    work = output.with_name(f"{output.name}.partial")
    old = work / "old"  # an index, from when the new one is whole until it has its name
    if (add or restart) and state.is_main_process and old.exists() and not output.exists():  # a kill came between
        os.replace(old, output)
    state.wait_for_everyone()
    if output.exists() and not (output / INDEX).exists() and (add or restart):
        raise ValueError(
            f"{output} exists and is no index, which --restart could replace, or --add extend: name another folder."
        )
    before = SearchIndex(output) if add and output.exists() else None
    kept, new = [], names
    if before is not None:
        faiss = faiss or before.facts["faiss"]
        before.check(encoder)
        if (before.items, before.facts["faiss"]) != (items, faiss):
            raise ValueError(
                f"{output} holds {before.items}, with faiss={before.facts['faiss']!r}, and given are {items}, with "
                f"{faiss=}: name another folder for these."
            )
        kept = [place for place, name in enumerate(before.names) if captions is not None or name in store]
        new = list(dict.fromkeys([*before.names, *names]))[len(before) :]
        names = [before.names[place] for place in kept] + new
        if names == before.names and before.facts["store"] == store_identity(store):
            _clean_up(work, names)
            return before
    elif output.exists() and not restart:
        index = _open_complete(output, encoder, store, items, names, faiss)
        _clean_up(work, names)
        return index
    if not names:
        raise ValueError(f"There are no {items} to index.")
    if faiss is not None:
        _faiss_structure(faiss, encoder.dim)  # before all are embedded
    facts: dict[str, Any] = {"items": items, "count": len(names), "dim": encoder.dim, "faiss": faiss}
    identity = encoder.identity()
    if Path(identity["name"]).exists():  # a folder, not a name of the Hub
        identity["name"] = str(Path(identity["name"]).absolute())
    facts |= {"encoder": identity, "store": store_identity(store)}
    # What an interrupted `add` began before the store grew is finished first, and then what has come since is added.
    begun = job_of(work / "blocks") if add and not restart else {}
    count = begun.get("count", len(names))
    has_grown = count < len(names) and json_digest(names[:count]) == begun["names_sha256"]
    if has_grown:
        names, new = names[:count], new[: count - len(kept)]
        facts |= {"count": count, "store": begun["store"]}

    state.wait_for_everyone()  # until all of them have seen what output there is
    if restart and state.is_main_process:
        shutil.rmtree(work, ignore_errors=True)
    state.wait_for_everyone()
    blocks = [new[start : start + BLOCK_ITEMS] for start in range(0, len(new), BLOCK_ITEMS)]
    job = {**facts, "faiss": None, "names_sha256": json_digest(names), "block_items": BLOCK_ITEMS}
    if before is not None:  # the blocks are not of all names
        job["embedded_sha256"] = json_digest(new)
    try:
        folder = BlockFolder(work / "blocks", job, state.process_index, share)
    except ValueError as error:
        raise ValueError(f"{error} --add goes on where the store has grown, --restart begins anew.") from error
    if folder.done and state.is_main_process:
        logger.warning(f"{output} was begun before: {len(folder.done):,} of {len(blocks):,} blocks are embedded.")
    if not folder.is_complete:
        embed = encoder.embed_images if captions is None else encoder.embed_captions
        own = (share or Share(0, 1)).of_process(state.process_index, state.num_processes)
        for block in own.blocks(len(blocks)):
            if block not in folder.done:
                folder.write(block, embed(blocks[block]).ravel())
    size = BLOCK_ITEMS * encoder.dim
    rows = np.empty((0, encoder.dim), dtype=np.float32)
    if new or share is not None:
        end = len(new) * encoder.dim
        shape = len(new), encoder.dim
        rows = folder.result(len(blocks), shape, lambda block: np.arange(block * size, min((block + 1) * size, end)))
    if state.is_main_process:
        whole = work / "whole"
        shutil.rmtree(whole, ignore_errors=True)  # of a call that was killed while it wrote
        with full_disk_named(work):
            _write(whole, rows if before is None else np.concatenate([before.embeddings[kept], rows]), names, facts)
        if output.exists():
            os.replace(output, old)
        os.replace(whole, output)
    state.wait_for_everyone()
    if state.is_main_process:
        remove_folder(work)
    state.wait_for_everyone()
    if has_grown:
        return build_index(
            encoder, store, output, image_ids=image_ids, captions=captions, faiss=faiss, add=True, share=share
        )
    return SearchIndex(output)


def remove_items(path: str | os.PathLike[str], names: Sequence[str]) -> SearchIndex:
    """
    Takes items out of an index, images by their ids, or captions. It stays as it is until the new one is complete.

    Raises:
        `ValueError`: a name is not in the index, nothing would be left, or the folder is no index.
    """
    check_several("names", names)
    path = Path(path).resolve()
    put_back(path)
    index = SearchIndex(path)
    gone = set(names)
    if unknown := gone - set(index.names):
        raise ValueError(f"{path} has no {min(unknown)!r} among its {len(index):,} {index.items}.")
    kept = [place for place, name in enumerate(index.names) if name not in gone]
    if not kept:
        raise ValueError(f"{path} would be left without {index.items}: remove the folder instead.")
    new = path.with_name(f".{path.name}.without")
    shutil.rmtree(new, ignore_errors=True)  # of a call that was killed
    _write(new, index.embeddings[kept], [index.names[place] for place in kept], index.facts | {"count": len(kept)})
    replace_folder(path, new)
    return SearchIndex(path)


def _faiss_structure(description: str, dim: int) -> Any:
    """Makes an empty structure of FAISS. Raises ValueError where its words for one are not understood."""
    library = optional_import("faiss", "faiss")
    try:
        return library.index_factory(dim, description, library.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"faiss (--faiss) is {description!r}, which FAISS does not understand for {dim} numbers: expected its "
            "words for a structure, such as 'HNSW32'."
        ) from error


def _write(folder: Path, rows: np.ndarray, names: list[str], facts: dict[str, Any]) -> None:
    """Writes an index into a new folder."""
    folder.mkdir()
    save_file({"embeddings": np.array(rows)}, folder / EMBEDDINGS)
    write_json(folder / NAMES, names)
    if facts["faiss"] is not None:
        structure = _faiss_structure(facts["faiss"], rows.shape[1])
        try:
            structure.train(np.array(rows))
            structure.add(np.array(rows))
        except RuntimeError as error:
            raise ValueError(
                f"faiss (--faiss) {facts['faiss']!r} does not take these {len(rows):,} embeddings ({error}): "
                "give another structure, and the embeddings are taken as they are."
            ) from error
        optional_import("faiss", "faiss").write_index(structure, str(folder / FAISS))
    write_json(folder / INDEX, {"format_version": FORMAT_VERSION, **facts})


def _clean_up(work: Path, names: list[str]) -> None:
    """Removes the work of an index that is complete, where a kill left it."""
    begun = job_of(work / "blocks").get("names_sha256", json_digest(names))
    if start_processes().is_main_process and begun == json_digest(names):  # and not that of a larger one
        remove_folder(work)


def _open_complete(
    path: Path, encoder: DualEncoder, store: RegionStore, items: Items, names: list[str], faiss: str | None
) -> SearchIndex:
    """Opens the index that is there already, if it is the one that is asked for; else raises ValueError."""
    if (path / INDEX).exists():
        index = SearchIndex(path)
        index.check(encoder, store)
        if (index.items, index.names, index.facts["faiss"]) == (items, names, faiss):
            return index
    raise ValueError(
        f"{path} exists and holds something else: name another folder for the index"
        + (", or replace it by --restart." if (path / INDEX).exists() else ".")
    )


def store_identity(store: RegionStore) -> dict[str, str]:
    """Collects the facts that tell a store from others: its place, and the checksum of its manifest."""
    return {"name": str(store.path), "manifest_sha256": manifest_checksum(store.manifest)}


def _compare(what: str, before: dict[str, str], now: dict[str, str], more: str = "") -> None:
    if any(before.get(key) != value for key, value in now.items() if key != "name"):
        raise ValueError(
            f"{what} {_words(before)}, but given is {_words(now)}: give that one, or make an index of this one, in "
            f"another folder or by --restart.{more}"
        )


def _words(identity: dict[str, str]) -> str:
    rest = ", ".join(f"{key} {value[:12]}" for key, value in identity.items() if key != "name")
    return f"{identity['name']} ({rest})"
