"""
A reader of arrays in pickles, .npy and .npz of unknown origin that executes nothing of them.

`pickle` runs whatever a file says. Here a machine of our own reads the opcodes and makes numbers, text, lists, tuples,
dicts and arrays, and nothing else; it never imports a name, so that no file can run code. Memory stays in proportion to
the data: an array is only a view of bytes that are there, and nested values are stored, but neither walked nor hashed
nor printed, since lists that hold each other have no end, or one of 10**20 words. NumPy's reader of .npy is replaced
for the same reasons: a false header costs it memory, and it raises errors of any kind.
"""

import ast
import functools
import io
import math
import pickletools
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

MAX_MEMBER_BYTES = 2**28  # limit of an unpacked member of an .npz: 300 times the size of 100 regions of 2048 float32
MAX_OPCODES = 5_000_000  # limit of a pickle, some 20 s; a side file of a million ids has fewer
_CORE = ("numpy.core", "numpy._core")  # before NumPy 2, and from NumPy 2 on
_GLOBALS = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    # How Python 3 writes bytes for Python 2: as encoded text, and empty ones as a call without arguments.
    ("_codecs", "encode"): "encode",
    ("__builtin__", "bytes"): "bytes",
    ("collections", "OrderedDict"): "OrderedDict",  # Volta's values: csv.DictReader yielded it before Python 3.8
    **{(f"{core}.multiarray", name): name for core in _CORE for name in ("_reconstruct", "scalar")},
    **{(f"{core}.numeric", "_frombuffer"): "_frombuffer" for core in _CORE},
}
# The name of each opcode, and the function that reads its argument.
_OPCODES: dict[bytes, tuple[str, Any]] = {
    op.code.encode("latin-1"): (op.name, op.arg and op.arg.reader) for op in pickletools.opcodes
}
_MADE: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
_VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8".split()
)
_NPY_HEADER = re.compile(
    rb"\{'descr': '([^']+)', 'fortran_order': (True|False), 'shape': (\((?:\d{1,18}L?(?:, ?|(?=\))))*\)),? ?\}\s*"
)


def load(data: bytes, source: str, max_opcodes: int = MAX_OPCODES) -> Any:
    """
    Reads the value of a pickle of any protocol: numbers, text, lists, tuples, dicts, and arrays and scalars of NumPy.

    Args:
        data (`bytes`): The pickle. Arrays may be read-only views of it.
        source (`str`): The file and the place in it, for errors.
        max_opcodes (`int`, *optional*): Limit of its opcodes.

    Raises:
        ValueError: The pickle is damaged, or names any other type or function; the message tells `source` and that
            name.
    """
    try:
        return _run(bytes(data), max_opcodes)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{source}: the pickle cannot be read: {error}.") from error


def load_npy(data: bytes, source: str) -> np.ndarray:
    """
    Reads the array of an .npy file (or member of an .npz); an array of one object is unpickled with `load`.

    Raises:
        ValueError: The file is damaged, or `load` raises it; the message names `source`.
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
    Reads the members of an .npz, or those of `names` that are there. Pickled ones are read with `load`.

    Raises:
        ValueError: The file is damaged, a member unpacks to more than `MAX_MEMBER_BYTES`, or `load` raises it; the
            message names `source` and the member.
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
    # zipfile raises RuntimeError on encrypted members, and NotImplementedError on versions that it does not know.
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        detail = str(error)
        raise ValueError(detail if detail.startswith(source) else f"{source}: {detail}.") from error
    return arrays


def brief(value: Any) -> str:
    """Describes a value that was read, briefly, for errors."""
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and type {value.dtype}"
    if value is None or isinstance(value, (str, bytes, int, float, np.generic)):
        return repr(value)[:80]
    return f"a {type(value).__name__}"


class _Unbuilt:
    """
    An object that REDUCE made and BUILD will complete. None is left at the end of a pickle that pickle itself wrote.
    """

    def __init__(self, build: Callable[[tuple], Any]):
        self.build = build
        self.value: Any = None


class _Global(str):
    """A name of `_GLOBALS`, as its last part; no string of the pickle can pass for one."""


def _opcodes(data: bytes, max_opcodes: int) -> Iterator[tuple[str, Any]]:
    """
    Yields the name and the argument of each opcode, as `pickletools.genops` does, which copies long texts once more.
    """
    file, view = io.BytesIO(data), memoryview(data)
    for _ in range(max_opcodes):
        code = file.read(1)
        if code not in _OPCODES:
            raise ValueError(f"it has the opcode {code!r}" if code else "it ends before its last opcode")
        name, read = _OPCODES[code]
        if name == "BINUNICODE":
            size = int.from_bytes(file.read(4), "little")
            text = view[file.tell() :][:size]
            if len(text) < size:
                raise ValueError(f"it ends within a text of {size} bytes")
            file.seek(size, io.SEEK_CUR)
            yield name, str(text, "utf-8", "surrogatepass")
        else:
            yield name, None if read is None else read(file)
        if name == "STOP":
            return
    raise ValueError(f"it has more than {max_opcodes} opcodes, expected few and large arrays")


def _run(data: bytes, max_opcodes: int) -> Any:
    stack: list[Any] = []
    marks: list[list[Any]] = []  # the stacks below each MARK
    memo: dict[int, Any] = {}
    unbuilt = 0
    # A cache, so that one text that is encoded a million times does not become a million byte strings.
    encode = functools.cache(lambda text: text.encode("latin-1"))
    argument: Any
    for name, argument in _opcodes(data, max_opcodes):
        match name:
            case _ if name in _VALUES:  # cases are tried in turn, so the usual ones come first
                stack.append(argument)
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(stack)
                stack = []
            case _ if name in _MADE:
                stack.append(_MADE[name]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
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
                last, module = stack.pop(), stack.pop()
                stack.append(_global(module, last))
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
            case _:
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
            f"it names {module}.{name}, and only arrays, numbers, text, lists, tuples and dicts are read: any "
            "other name could run code"
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
    """
    Gives the dtype of a state: version, byte order, and fields that only structured types, or those with metadata,
    have.
    """
    _, order, *structure = state
    if order not in ("<", ">", "|", "=") or any(part is not None for part in structure[:3]) or len(structure) > 6:
        raise ValueError(f"dtype {code!r:.80} has a structure, expected plain numbers or text")
    return dtype_of(code if order == "|" else f"{order}{code}")


def dtype_of(code: Any) -> np.dtype:
    """Gives the dtype of a code such as `<f4`: numbers, text, or one object. Raises ValueError on any other."""
    if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?([biufSU]\d{1,9}|O8?)", code):
        raise ValueError(f"dtype {brief(code)} is not read, expected plain numbers or text")
    return np.dtype(code)


def _array_of_state(encode: Callable[[str], bytes], state: tuple) -> np.ndarray:
    *_, shape, dtype, fortran, data = state  # after the version, which old ones lack
    return array_of(dtype, shape, encode(data) if isinstance(data, str) else data, bool(fortran))


def array_of(dtype: np.dtype, shape: Any, data: Any, fortran: bool = False) -> np.ndarray:
    """
    Gives a view of `data`, which must be exactly as long as the shape takes; or an array of one object, from a list.
    """
    if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape) or len(shape) > 32:
        raise ValueError(f"an array has as shape {brief(shape)}, expected a tuple of sizes")
    count = math.prod(shape)
    if dtype.kind == "O":
        # np.save makes an array of one object of a dict. More objects could refer to each other over and over.
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
        # A nested key would be hashed all the way down.
        if not isinstance(key, (str, bytes, int, np.number)):
            raise ValueError(f"a dict has a key of type {type(key).__name__}, expected text or a number")
        target[key] = value
    return target
