"""
Arrays out of pickles, .npy and .npz of unknown origin, of which nothing is executed.

`pickle` runs whatever a file says. Here a machine of our own reads the opcodes and can make numbers, text, lists,
tuples, dicts and arrays; it never imports a name, so there is nothing to escape to. Memory stays in proportion to the
data: no array is allocated that is not there, and what is nested is only stored, neither walked nor hashed nor printed:
lists that hold each other have no end, or one of 10**20 words.
NumPy's .npy reader is replaced for the same reasons: a lying header costs it memory, and it raises whatever it likes.
"""

import ast
import functools
import math
import pickletools
import re
import zipfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any

import numpy as np

MAX_MEMBER_BYTES = 2**28  # of an .npz, unpacked: 300 times what 100 regions of 2048 float32 take
MAX_OPCODES = 5_000_000  # of a pickle, some 20 s; a side file of a million ids has fewer
_CORE = ("numpy.core", "numpy._core")  # before NumPy 2, and since
_GLOBALS = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    # How Python 3 writes bytes for Python 2: as encoded text, and empty ones as a call without arguments.
    ("_codecs", "encode"): "encode",
    ("__builtin__", "bytes"): "bytes",
    ("collections", "OrderedDict"): "OrderedDict",  # what csv.DictReader yielded until Python 3.8, hence Volta's values
    **{(f"{core}.multiarray", name): name for core in _CORE for name in ("_reconstruct", "scalar")},
    **{(f"{core}.numeric", "_frombuffer"): "_frombuffer" for core in _CORE},
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8".split()
)
_NPY_HEADER = re.compile(
    rb"\{'descr': '([^']+)', 'fortran_order': (True|False), 'shape': (\((?:\d{1,18}L?(?:, ?|(?=\))))*\)),? ?\}\s*"
)


def load(data: bytes, source: str) -> Any:
    """
    The value of a pickle of any protocol: numbers, text, lists, tuples, dicts, and NumPy's arrays and scalars.

    Args:
        data (`bytes`): The pickle. Arrays may be read-only views of it.
        source (`str`): What errors call it: the file, and the place in it.

    Raises:
        ValueError: The pickle is damaged, or names anything else; the message names `source` and the name.
    """
    try:
        return _run(bytes(data))
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{source}: the pickle cannot be read: {error}.") from error


def load_npy(data: bytes, source: str) -> np.ndarray:
    """
    The array of an .npy file (or member of an .npz); an array of one object is unpickled with `load`.

    Raises:
        ValueError: The file is damaged, or see `load`; the message names `source`.
    """
    length_bytes = 2 if data[6:7] == b"\x01" else 4
    start = 8 + length_bytes
    stop = start + int.from_bytes(data[8:start], "little")
    header = _NPY_HEADER.fullmatch(data[start:stop])
    if data[:6] != b"\x93NUMPY" or header is None:
        raise ValueError(f"{source} is no .npy file: it begins with {data[:80]!r}.")
    descr, fortran, shape = header[1].decode("latin-1"), header[2] == b"True", header[3].decode().replace("L", "")
    if descr in ("|O", "O"):
        array = load(data[stop:], source)
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{source} holds a pickled {type(array).__name__}, expected an array.")
        return array
    try:
        return array_of(dtype_of(descr), ast.literal_eval(shape), memoryview(data)[stop:], fortran)
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(f"{source}: {error}.") from error


def load_npz(file: Path | IO[bytes], source: str, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """
    The members of an .npz, or those of `names` that are there. Pickled ones are read with `load`.

    Raises:
        ValueError: The file is damaged, a member unpacks to more than `MAX_MEMBER_BYTES`, or see `load`; the message
            names `source` and the member.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if names is not None and name not in names:
                    continue
                if member.file_size > MAX_MEMBER_BYTES:
                    raise ValueError(f"{name} unpacks to {member.file_size} bytes, expected {MAX_MEMBER_BYTES} at most")
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError(f"{name} is packed by method {member.compress_type}, which np.savez never does")
                arrays[name] = load_npy(archive.read(member), f"{source}, member {name!r}")
    # zipfile says RuntimeError of encrypted members, and NotImplementedError of versions that it does not know.
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        detail = str(error)
        raise ValueError(detail if detail.startswith(source) else f"{source}: {detail}.") from error
    return arrays


def brief(value: Any) -> str:
    """What errors show of a value that was read."""
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and type {value.dtype}"
    if value is None or isinstance(value, (str, bytes, int, float, np.generic)):
        return repr(value)[:80]
    return f"a {type(value).__name__}"


class _Unbuilt:
    """What REDUCE made and BUILD will complete. None is left at the end of a pickle that pickle itself wrote."""

    def __init__(self, build: Callable[[tuple], Any]):
        self.build = build
        self.value: Any = None


class _Global(str):
    """One of `_GLOBALS`: its last name, which no string of the pickle can pass for."""


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    marks: list[list[Any]] = []  # the stacks below each MARK
    memo: dict[int, Any] = {}
    unbuilt = 0
    # A cache, lest one text that is encoded a million times becomes a million byte strings.
    encode = functools.cache(lambda text: text.encode("latin-1"))
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if count == MAX_OPCODES:
            raise ValueError(f"it has more than {MAX_OPCODES} opcodes, expected few and large arrays")
        match opcode.name:
            case name if name in _VALUES:  # cases are tried in turn: the usual ones first
                stack.append(argument)
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(_CONSTANTS[opcode.name])
            case "MARK":
                marks.append(stack)
                stack = []
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                if len(stack) < count:
                    raise ValueError("it takes a tuple from an empty stack")
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                items, stack = stack, marks.pop()
                stack.append(tuple(items))
            case "LIST":
                items, stack = stack, marks.pop()
                stack.append(items)
            case "DICT":
                items, stack = stack, marks.pop()
                stack.append(_update({}, items))
            case "APPEND":
                item = stack.pop()
                _extend(stack[-1], [item])
            case "APPENDS":
                items, stack = stack, marks.pop()
                _extend(stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _update(stack[-1], [key, value])
            case "SETITEMS":
                items, stack = stack, marks.pop()
                _update(stack[-1], items)
            case "GET" | "BINGET" | "LONG_BINGET":
                item = memo[argument]
                if isinstance(item, _Unbuilt):
                    if item.value is None:
                        raise ValueError("an array holds itself")
                    item = item.value
                stack.append(item)
            case "GLOBAL":
                stack.append(_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_global(module, name))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                made = _call(function, arguments, encode)
                unbuilt += isinstance(made, _Unbuilt)
                stack.append(made)
            case "BUILD":
                state, pending = stack.pop(), stack.pop()
                pending.value = pending.build(state)
                unbuilt -= 1
                stack.append(pending.value)
            case "STOP":
                (result,) = stack
            case name:
                raise ValueError(f"it uses {name} {argument!r:.80}, expected the opcodes of plain data")
    if unbuilt:
        raise ValueError("an array is never filled")
    if marks:
        raise ValueError("it ends within a container")
    return result


def _global(module: Any, name: Any) -> _Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError(f"it names something by {brief(module)} and {brief(name)}, expected text")
    if (module, name) not in _GLOBALS:
        raise ValueError(
            f"it names {module}.{name}, and only arrays, numbers, text, lists, tuples and dicts are read, lest the "
            "file run code"
        )
    return _Global(_GLOBALS[module, name])


def _call(function: Any, arguments: tuple, encode: Callable[[str], bytes]) -> Any:
    match function, arguments:
        case _Global("encode"), (str(text), "latin1" | "latin-1"):
            return encode(text)
        case _Global("bytes"), ():
            return b""
        case _Global("OrderedDict"), ():
            return {}
        case _Global("dtype"), (str(code), *_):
            return _Unbuilt(functools.partial(_dtype_of_state, code))
        case _Global("_reconstruct"), (_Global("ndarray"), *_):
            return _Unbuilt(functools.partial(_array_of_state, encode))
        case _Global("scalar"), (np.dtype() as dtype, data):
            return array_of(dtype, (1,), encode(data) if isinstance(data, str) else data)[0]
        case _Global("_frombuffer"), (data, np.dtype() as dtype, shape, "C" | "F" as order):
            return array_of(dtype, shape, data, order == "F")
        case _Global("_frombuffer"), (data, np.dtype() as dtype, shape, "K", axes):
            return array_of(dtype, shape, data).transpose(axes)
    raise ValueError(f"it calls {brief(function)} in an unknown way")


def _dtype_of_state(code: str, state: tuple) -> np.dtype:
    """State: version, byte order, and what only structured types, or those with metadata, have."""
    _, order, *structure = state
    if order not in ("<", ">", "|", "=") or any(part is not None for part in structure[:3]) or len(structure) > 6:
        raise ValueError(f"dtype {code!r:.80} has a structure, expected plain numbers or text")
    return dtype_of(code if order == "|" else f"{order}{code}")


def dtype_of(code: Any) -> np.dtype:
    """The dtype of a code such as `<f4`: numbers, text, or one object. Raises ValueError on anything else."""
    if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?([biufSU]\d{1,9}|O8?)", code):
        raise ValueError(f"dtype {brief(code)} is not read, expected plain numbers or text")
    return np.dtype(code)


def _array_of_state(encode: Callable[[str], bytes], state: tuple) -> np.ndarray:
    *_, shape, dtype, fortran, data = state  # after the version, which old ones lack
    return array_of(dtype, shape, encode(data) if isinstance(data, str) else data, bool(fortran))


def array_of(dtype: np.dtype, shape: Any, data: Any, fortran: bool = False) -> np.ndarray:
    """A view of `data`, which must be just what the shape takes; or of one object, in a list."""
    if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape) or len(shape) > 32:
        raise ValueError(f"an array has as shape {brief(shape)}, expected a tuple of sizes")
    count = math.prod(shape)
    if dtype.kind == "O":
        # One is what np.save makes of a dict. More could refer to each other over and over.
        if not isinstance(data, list) or len(data) != 1 or count != 1:
            raise ValueError(f"an array of objects has shape {shape}, expected a single object")
        array = np.empty(1, object)
        array[0] = data[0]
        return array.reshape(shape)
    if not isinstance(data, (bytes, bytearray, memoryview)) or len(data) != count * dtype.itemsize:
        found = f"{len(data)} bytes" if isinstance(data, (bytes, bytearray, memoryview)) else type(data).__name__
        raise ValueError(f"an array of shape {shape} and type {dtype} has {found} of data: the file may be cut short")
    if not count:
        return np.empty(shape, dtype)
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _extend(target: Any, items: list) -> None:
    if type(target) is not list:
        raise ValueError(f"it appends to a {type(target).__name__}")
    target += items


def _update(target: Any, items: list) -> dict:
    if type(target) is not dict:
        raise ValueError(f"it sets items of a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Nothing nested, which hashing would descend into.
        if not isinstance(key, (str, bytes, int, np.number)):
            raise ValueError(f"a dict has a key of type {type(key).__name__}, expected text or a number")
        target[key] = value
    return target
