"""
Numbers of foreign files that do not tell their type: bytes in base64, and arrays of bytes.

All tools that write features so write float32, but files of other makers may hold another type: float16 read as float32
is garbage of half the width, float64 garbage of double the width. So bytes are taken for float32 only where they look
like it: the magnitudes of features lie within a few powers of two of one another, those of misread bytes do not.
"""

import binascii
from collections.abc import Callable

import numpy as np

from ..shards import from_bfloat16

Decode = Callable[[np.ndarray], np.ndarray]  # of bytes

_PLAIN = {"float16": "<f2", "float32": "<f4", "float64": "<f8"}


def _view(code: str) -> Decode:
    return lambda data: data.view(code)


_TYPES: dict[str, tuple[int, Decode]] = {
    **{name: (int(code[2]), _view(code)) for name, code in _PLAIN.items()},
    "bfloat16": (2, lambda data: from_bfloat16(data.view("<u2"))),
    **{f"{name}-swapped": (int(code[2]), _view(f">{code[1:]}")) for name, code in _PLAIN.items()},
}
FEATURE_DTYPES = tuple(_TYPES)

_SAMPLE = 1024  # bytes looked at from either end of a matrix
_FEW = 16  # from fewer numbers other than zero nothing is concluded
# The spread of magnitudes: powers of two between their 10th and 90th percentile. Features have 3 to 8; float16 read as
# float32 has eight times as much, and bytes in the wrong order have 200.
_SMALLEST_SPREAD, _USUAL_SPREAD, _LARGEST_SPREAD, _ABSURD_SPREAD = 1, 7, 12, 20
_LARGEST_EXPONENT, _SMALLEST_EXPONENT = 26, -40
_SMALLEST_COORDINATE = 1e-30  # a smaller number is a whole number that was read as a fraction


class OtherType(ValueError):
    """
    An error that says that features are not of the type that was assumed or stated, which is not the fault of one
    image.
    """


def decode(image_id: str, name: str, text: bytes | str) -> bytes:
    """
    Decodes base64 to bytes, also where Python's `b'…'` is around it. Raises ValueError naming the image and the field.
    """
    if text[:2] in ("b'", 'b"', b"b'", b'b"'):
        text = text[2:-1]
    try:
        return binascii.a2b_base64(text, strict_mode=True)  # unlike base64, it copies no text first
    except ValueError as error:  # of binascii, or of text that is no ASCII
        raise ValueError(f"Image {image_id!r}: {name} is no base64 ({error}): the line may be cut short.") from None


def matrix(image_id: str, name: str, text: bytes | str, n: int, dtype: str = "<f4") -> np.ndarray:
    """
    Decodes `(n, columns)` numbers of a known type from base64, in C order. Raises ValueError naming the image and the
    field.
    """
    return _rows(image_id, name, decode(image_id, name, text), n, dtype)


def coordinates(image_id: str, name: str, text: bytes | str, n: int) -> np.ndarray:
    """
    Decodes boxes `(n, 4)` from base64 of float32, or of numbers whose size and magnitude show another type: four
    numbers a box leave no doubt about the size, and whole numbers read as floats are below 1e-30.

    Raises:
        ValueError: The bytes are not `n` rows; the message names the image and the field.
    """
    data = decode(image_id, name, text)
    size = 8 if len(data) == 32 * n else 4
    values = _rows(image_id, name, data, n, f"<f{size}")
    magnitudes = np.abs(values)
    if ((magnitudes > 0) & (magnitudes < _SMALLEST_COORDINATE)).any():
        return _rows(image_id, name, data, n, f"<i{size}")
    return values


def features(image_id: str, name: str, text: bytes | str, n: int, dtype: str | None) -> np.ndarray:
    """
    Decodes features `(n, D)` from base64.

    Args:
        image_id, name (`str`): The image and the field, for errors.
        text (`bytes` or `str`): The base64.
        n (`int`): Number of rows.
        dtype (`str`, *optional*): One of `FEATURE_DTYPES`; None takes float32 if the values look like it.

    Raises:
        OtherType: The bytes look like another type; the message names it.
        ValueError: The bytes are not `n` rows, or look like no type.
    """
    return _of_bytes(image_id, name, np.frombuffer(decode(image_id, name, text), np.uint8), n, dtype)


def typed_features(image_id: str, name: str, array: np.ndarray, dtype: str | None) -> np.ndarray:
    """
    Gives features from an array, which tells its type. An array of bytes or other whole numbers is refused, unless
    `dtype` states the type of these bytes.

    Raises:
        OtherType: The array holds whole numbers and `dtype` is None, or floats of another type than `dtype`.
        ValueError: The bytes are not rows of numbers of `dtype`.
    """
    if array.dtype.kind == "f":
        if dtype is not None and array.dtype != _PLAIN.get(dtype):
            raise OtherType(
                f"Image {image_id!r}: {name} are {array.dtype} as the file says, not {dtype}: leave out "
                "feature_dtype (--feature-dtype)."
            )
        return array
    if dtype is None:
        guess = "" if array.ndim != 2 else _advice(_look_alike(_sample(_flat(array)), len(array), array.nbytes))
        raise OtherType(
            f"Image {image_id!r}: {name} are whole numbers ({array.dtype}), expected floats: they may be the bytes of "
            f"another type{guess or ', which feature_dtype (--feature-dtype) states'}."
        )
    return _of_bytes(image_id, name, _flat(array), len(array), dtype)


def check_dtype(dtype: str | None) -> None:
    """Raises ValueError where `dtype` is none of `FEATURE_DTYPES`."""
    if dtype is not None and dtype not in _TYPES:
        raise ValueError(f"feature_dtype is {dtype!r}, expected one of {', '.join(FEATURE_DTYPES)}.")


def _rows(image_id: str, name: str, data: bytes, n: int, dtype: str) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    if not data or len(data) % (size * n):
        raise ValueError(
            f"Image {image_id!r}: {name} has {len(data)} bytes, expected {n} equal rows of {np.dtype(dtype).name}."
        )
    return np.frombuffer(data, dtype).reshape(n, -1)


def _of_bytes(image_id: str, name: str, data: np.ndarray, n: int, dtype: str | None) -> np.ndarray:
    size, view = _TYPES[dtype or "float32"]
    rows = f"{n} equal rows of {dtype or 'float32'}"
    fits = data.size and not data.size % (size * n)
    if dtype is None and not (fits and _looks_usual(data)):
        found = _look_alike(_sample(data), n, data.size)
        problem = _absurd(data, found) if fits else f"{data.size} bytes are not {rows}" if found else ""
        if problem and found:
            raise OtherType(f"Image {image_id!r}: {name} are no float32: {problem}{_advice(found)}.")
        if problem:
            raise ValueError(
                f"Image {image_id!r}: {name} are no float32: {problem}, and the bytes look like no other type; "
                "feature_dtype='float32' (--feature-dtype float32) takes them as they are."
            )
    if not fits:
        raise ValueError(f"Image {image_id!r}: {name} has {data.size} bytes, expected {rows}.")
    return view(data).reshape(n, -1)


def _advice(found: dict[str, tuple[float, int]]) -> str:
    if not found:
        return ""
    names = " or ".join(f"{name} ({columns} columns)" for name, (_, columns) in found.items())
    best = next(iter(found))
    return f"; the bytes look like {names}: feature_dtype={best!r} (--feature-dtype {best}) states it"


def _flat(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _sample(data: np.ndarray) -> np.ndarray:
    """Takes bytes from both ends of a matrix, at multiples of eight; from a small one all."""
    if data.size <= 2 * _SAMPLE:
        return data[: data.size // 8 * 8]
    start = (data.size - _SAMPLE) // 8 * 8
    return np.concatenate([data[:_SAMPLE], data[start : start + _SAMPLE]])


def _looks_usual(data: np.ndarray) -> bool:
    """
    Tells, after a quick look, whether bytes are float32 as features are, and no pairs of bfloat16. If not, more is
    computed.
    """
    bits = _sample(data).view("<u4")
    exponents = _exponents(bits >> 23)
    known = exponents[-1]
    if known < _FEW:
        return not bits.any()
    lower = _exponents(bits >> 7)  # exponents of the lower halves, which in float32 are noise or zero
    return bool(
        _spread(exponents) <= _USUAL_SPREAD
        and exponents[127 + _LARGEST_EXPONENT] == known
        and (lower[-1] < _FEW or _spread(lower) > _LARGEST_SPREAD)
        and bits[::2].any() == bits[1::2].any()
    )


def _exponents(bits: np.ndarray) -> np.ndarray:
    """
    Counts, for each exponent 0 to 255, the numbers that have it or a smaller one. The exponents are the lowest eight
    bits; zero and numbers close to it are left out.
    """
    counts = np.bincount(bits.astype(np.uint8), minlength=256)  # faster than sorting them
    counts[0] = 0
    return counts.cumsum()


def _spread(exponents: np.ndarray) -> int:
    known = int(exponents[-1])
    low, high = (exponents.searchsorted(known * tenths // 10, side="right") for tenths in (1, 9))
    return int(high) - int(low)


def _absurd(data: np.ndarray, found: dict[str, tuple[float, int]]) -> str:
    """
    Says why bytes are no features in float32, given the other types that they look like; empty where they may be
    features.
    """
    bits = _sample(data).view("<u4")
    with np.errstate(invalid="ignore"):
        values = np.abs(bits.view("<f4").astype(np.float64))
    finite = np.isfinite(values)
    known = values[finite & (values > 0)]
    if len(known) < _FEW:
        return ""
    low, high = np.quantile(known, (0.1, 0.9))
    spread = float(np.log2(high / low))
    if known.max() > 2.0**_LARGEST_EXPONENT:
        return f"as such their magnitudes reach {known.max():.3g}"
    if spread > _ABSURD_SPREAD or (found and spread > 3 * next(iter(found.values()))[0]):
        return f"as such their magnitudes would lie between {low:.0e} and {high:.0e}"
    if found and bits[::2].any() != bits[1::2].any():
        return "as such every second one would be zero"
    if found and not finite.all():
        return "as such not all would be finite"
    return "as such the lower half of each would be another number" if "bfloat16" in found else ""


def _look_alike(sample: np.ndarray, n: int, num_bytes: int) -> dict[str, tuple[float, int]]:
    """
    Finds the types other than float32 that bytes look like, the likeliest first: for each its spread in powers of two,
    and the number of columns.
    """
    found: dict[str, tuple[float, int]] = {}
    for name, (size, view) in _TYPES.items():
        if name != "float32" and not num_bytes % (size * n):
            with np.errstate(invalid="ignore", over="ignore"):
                values = np.abs(view(sample).astype(np.float64))
            # If the numbers have another size, every second one is noise or zero.
            spreads = [spread for phase in range(2) if (spread := _features_spread(values[phase::2])) is not None]
            if len(spreads) == 2:
                found[name] = (max(spreads), num_bytes // (size * n))
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _features_spread(magnitudes: np.ndarray) -> float | None:
    """Gives the spread of magnitudes, in powers of two, if they may be those of features; else None."""
    known = magnitudes[magnitudes > 0]
    if not np.isfinite(magnitudes).all() or len(np.unique(known)) < _FEW // 2:
        return None
    low, high = np.quantile(known, (0.1, 0.9))
    if known.max() > 2.0**_LARGEST_EXPONENT or low < 2.0**_SMALLEST_EXPONENT:
        return None
    spread = float(np.log2(high / low))
    return spread if _SMALLEST_SPREAD <= spread <= _LARGEST_SPREAD else None
