"""What several formats read alike: fields of text, base64 matrices, and libraries that not every user has."""

import base64
import binascii
import importlib
from types import ModuleType

import numpy as np


def optional_import(module: str, extra: str) -> ModuleType:
    """A library of one of our extras. Raises ImportError, which names the extra, where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"This needs {module}: pip install 'unicoder-vl-hf[{extra}]'.") from error


def integer(image_id: str, name: str, text: bytes | str) -> int:
    """A whole number from text. Raises ValueError naming the image and the field."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"Image {image_id!r}: {name} is {text[:40]!r}, expected a whole number.") from None


def matrix(image_id: str, name: str, text: bytes | str, n: int, dtype: str = "<f4") -> np.ndarray:
    """`(n, columns)` from base64 of C-order numbers. Raises ValueError naming the image and the field."""
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"Image {image_id!r}: {name} is no base64 ({error}): the line may be cut short.") from None
    size = np.dtype(dtype).itemsize
    if not data or len(data) % (size * n):
        raise ValueError(
            f"Image {image_id!r}: {name} has {len(data)} bytes, expected {n} equal rows of {np.dtype(dtype).name}."
        )
    return np.frombuffer(data, dtype).reshape(n, -1)
