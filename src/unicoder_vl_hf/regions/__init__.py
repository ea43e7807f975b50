"""
Regions of images: stores of records, the foreign formats that they are read from, and the detectors that find them.
"""

from typing import TYPE_CHECKING

from ..lazy import lazily

if TYPE_CHECKING:
    from .comparison import StoreComparison, compare_stores
    from .conversion import convert, export, write_store
    from .detectors import Detector, load_detector
    from .editing import merge_stores, split_store, subset_store
    from .extraction import extract
    from .finding import RegionFinder
    from .formats import FORMATS, detect_format, read_records
    from .inspection import Inspection, inspect_records
    from .labelling import label, load_classifier
    from .parquet import export_parquet
    from .photos import PhotoSource, list_photos
    from .store import RegionStore, RegionStoreWriter
    from .validation import Problem, validate

__getattr__, __dir__ = lazily(
    __name__,
    {
        "comparison": ["StoreComparison", "compare_stores"],
        "conversion": ["convert", "export", "write_store"],
        "detectors": ["Detector", "load_detector"],
        "editing": ["merge_stores", "split_store", "subset_store"],
        "extraction": ["extract"],
        "finding": ["RegionFinder"],
        "formats": ["FORMATS", "detect_format", "read_records"],
        "inspection": ["Inspection", "inspect_records"],
        "labelling": ["label", "load_classifier"],
        "parquet": ["export_parquet"],
        "photos": ["PhotoSource", "list_photos"],
        "store": ["RegionStore", "RegionStoreWriter"],
        "validation": ["Problem", "validate"],
    },
)

__all__ = [
    "FORMATS",
    "Detector",
    "Inspection",
    "PhotoSource",
    "Problem",
    "RegionFinder",
    "RegionStore",
    "RegionStoreWriter",
    "StoreComparison",
    "compare_stores",
    "convert",
    "detect_format",
    "export",
    "export_parquet",
    "extract",
    "inspect_records",
    "label",
    "list_photos",
    "load_classifier",
    "load_detector",
    "merge_stores",
    "read_records",
    "split_store",
    "subset_store",
    "validate",
    "write_store",
]
