"""
Object classes for features that came without, by the classifier of the detector that made them.

Bottom-up TSV, HDF5 and SCAN files hold no classes, and masked object classification needs them. A classifier can
find them from the stored features, provided that it has the weights that made these: with any others its answers look
plausible and mean nothing. So the provenance of the store must name that detector.
"""

import dataclasses
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from .. import logging
from ..files import begun_anew, say_finished
from .detectors import load_detector
from .shards import CLASS_FIELDS, STORE_OF_STORES
from .store import RegionStore, RegionStoreWriter

Classes = tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]


class Classifier(Protocol):
    """A detector that can classify stored features, such as that of `detectors.visual_genome`."""

    provenance: dict[str, Any]

    def classify(self, features: np.ndarray) -> Classes:
        """
        Classifies features `(n, D)`: gives object ids and scores, and attribute ids and scores or None, `(n,)` each.
        """
        ...


def load_classifier(store: RegionStore, name: str, **options: Any) -> Classifier:
    """
    Loads the classifier of a store's features by the name of their detector. All that can be checked without its
    weights is checked before they are fetched.

    Raises:
        ValueError: The detector cannot classify or is not that of the store; also for the reasons of `label`.
    """
    family, _, model = name.partition(":")
    if family != "visual-genome":
        raise ValueError(f"{name} cannot classify stored features, only visual-genome detectors can.")
    _check_unlabelled(store)
    detector = store.provenance["detector"]
    if not Path(model).is_dir() and name != detector:  # a folder is recorded by its name alone
        raise ValueError(f"{store.path} holds the features of {detector}, not of {name}: name that detector.")
    return cast(Classifier, load_detector(name, **options))


def _check_unlabelled(store: RegionStore) -> None:
    if None in (store.provenance["detector"], store.provenance["detector_revision"]):
        raise ValueError(
            f"{store.path} does not tell what found its regions, and a classifier of other weights would label them "
            "with nonsense. If you know, convert the source again with --source-detector NAME@REVISION."
        )
    first = next(iter(store.values()))
    if first.object_ids is not None:
        raise ValueError(f"{store.path} has object classes already, as image {first.image_id!r} shows.")


def label(
    store: RegionStore,
    destination: str | PathLike,
    classifier: Classifier,
    *,
    resume: bool = True,
    restart: bool = False,
    **options: Any,
) -> RegionStore:
    """
    Writes a store with the object classes (and attributes) that the classifier gives the features of another store.

    Called again after an interruption, it goes on. A complete store stays as it is, but for images that are new.

    Args:
        store (`RegionStore`): The store, whose provenance names the detector and revision of the classifier.
        destination (`str` or `os.PathLike`): Folder of the new store.
        classifier (`Classifier`): The detector, see `detectors.load_detector`.
        resume (`bool`, defaults to `True`): Whether to go on in a folder in which a store was begun; False refuses it.
        restart (`bool`, defaults to `False`): Whether to begin anew in such a folder.
        options: Further arguments of `RegionStoreWriter`, such as `dtype`.

    Raises:
        ValueError: The store does not name its detector, names another, or has object classes already; or the
            destination was begun with other settings, or holds images that the store does not.
    """
    folder = Path(destination).resolve()
    if folder == store.path.resolve():
        raise ValueError(f"{store.path} is the store to be labelled: take another folder for the labelled one.")
    _check_unlabelled(store)
    provenance, expected = store.provenance, classifier.provenance
    name, revision = provenance["detector"], provenance["detector_revision"]
    if (name, revision) != (expected["detector"], expected["detector_revision"]):
        raise ValueError(
            f"{store.path} holds the features of {name}@{revision}, but this classifier is of {expected['detector']}@"
            f"{expected['detector_revision']}: load that one."
        )
    kept = {key: value for key, value in provenance.items() if key not in ("feature_dim", "package_version", "dtype")}
    kept |= {key: expected.get(key) for key in ("class_names", "num_classes")} | {"dtype": provenance["dtype"]}

    with begun_anew(folder, restart, STORE_OF_STORES):
        was_complete = STORE_OF_STORES.is_complete(folder)
        with RegionStoreWriter(folder, resume=resume, **kept | options) as writer:
            left = [image_id for image_id in store if image_id not in writer.resumed]
            if len(writer.resumed) > len(store) - len(left):
                raise ValueError(
                    f"{destination} holds images that {store.path} does not: begin anew with restart=True (--restart), "
                    "or take another folder."
                )
            for image_id in logging.tqdm(
                left, desc=f"Labelling {writer.path.name}", unit="image", total=len(store), initial=len(writer.resumed)
            ):
                record = store[image_id]
                found: dict[str, Any] = dict(zip(CLASS_FIELDS, classifier.classify(record.features), strict=True))
                writer.write(dataclasses.replace(record, **found))
        if was_complete and not left:
            say_finished(destination)
    return RegionStore(destination)
