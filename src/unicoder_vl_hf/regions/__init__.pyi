from .comparison import StoreComparison as StoreComparison, compare_stores as compare_stores
from .conversion import convert as convert, export as export, write_store as write_store
from .detectors import Detector as Detector, load_detector as load_detector
from .editing import (
    merge_stores as merge_stores,
    remove_images as remove_images,
    split_store as split_store,
    subset_store as subset_store,
)
from .extraction import extract as extract
from .finding import RegionFinder as RegionFinder
from .formats import FORMATS as FORMATS, detect_format as detect_format, read_records as read_records
from .inspection import Inspection as Inspection, inspect_records as inspect_records
from .labelling import label as label, load_classifier as load_classifier
from .parquet import export_parquet as export_parquet
from .photos import PhotoSource as PhotoSource, list_photos as list_photos
from .store import RegionStore as RegionStore, RegionStoreWriter as RegionStoreWriter
from .validation import Problem as Problem, validate as validate
