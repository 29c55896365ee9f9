"""The restricted pickle of a frame's header, and arrays beside it, out of band.

A header is a protocol-5 pickle of a tuple of plain values: dict, list, tuple, str, bytes, int, float, bool, None. It
is written without memo, so it is a tree; before it is loaded, every opcode must be on an allow-list that can make
nothing else. No global is ever resolved, and memory stays proportional to the header's length.

A tensor is described in the header (dtype, shape, memory format) and its bytes travel as a buffer of the frame:
sent from the array's own memory, received into memory that becomes the array (`graph.spec`).
"""

from __future__ import annotations

import io
import math
import pickle  # noqa: S403  # only after the opcode allow-list below
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from neurosurgeon.utils.errors import ProtocolError

if TYPE_CHECKING:  # the bandwidth monitor uses headers without arrays, and must start without numpy
    from neurosurgeon.graph.spec import Array

# Every allowed opcode, and the bytes of its argument.
_FIXED_ARGUMENTS = {
    pickle.PROTO: 1,
    pickle.FRAME: 8,
    pickle.MARK: 0,
    pickle.NONE: 0,
    pickle.NEWTRUE: 0,
    pickle.NEWFALSE: 0,
    pickle.BININT: 4,
    pickle.BININT1: 1,
    pickle.BININT2: 2,
    pickle.BINFLOAT: 8,
    pickle.EMPTY_DICT: 0,
    pickle.SETITEM: 0,
    pickle.SETITEMS: 0,
    pickle.EMPTY_LIST: 0,
    pickle.APPEND: 0,
    pickle.APPENDS: 0,
    pickle.EMPTY_TUPLE: 0,
}
# Those whose argument begins with its own length, and the bytes of that length (little-endian, unsigned).
_COUNTED_ARGUMENTS = {
    pickle.SHORT_BINUNICODE: 1,
    pickle.BINUNICODE: 4,
    pickle.SHORT_BINBYTES: 1,
    pickle.BINBYTES: 4,
    pickle.LONG1: 1,
}
_SKIP = {opcode[0]: 1 + size for opcode, size in _FIXED_ARGUMENTS.items()}
_COUNT = {opcode[0]: size for opcode, size in _COUNTED_ARGUMENTS.items()}
# Tuples that hold others; as a key they are hashed by recursion in C, so their number, and their depth, is bounded.
_TUPLES = {pickle.TUPLE[0], pickle.TUPLE1[0], pickle.TUPLE2[0], pickle.TUPLE3[0]}
_STOP = pickle.STOP[0]
ALLOWED_OPCODES = frozenset({*_SKIP, *_COUNT, *_TUPLES, _STOP})
MAX_TUPLES = 256  # a request has two, and two for each tensor
WireSpec = tuple[str, tuple[int, ...], bool]  # dtype, shape, channels-last
MAX_DIMENSIONS = 8
MAX_SIZE = 2**40  # of one dimension; the buffer's length bounds their product


def pack_header(*values: Any) -> bytes:
    """Return plain values as a restricted pickle."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, protocol=5)
    pickler.fast = True  # no memo: a tree of values, and no opcode that refers back
    pickler.dump(values)
    return stream.getvalue()


def check_opcodes(data: bytes) -> None:
    """Walk through a pickle without running it (as `pickletools.genops` does, three times as fast).

    Raises: ProtocolError: an opcode outside the allow-list, an argument beyond the data, no end, or bytes after it.
    """
    position, tuples, length = 0, 0, len(data)
    while position < length:
        opcode = data[position]
        if opcode in _SKIP:
            position += _SKIP[opcode]
        elif opcode in _COUNT:
            start = position + 1 + _COUNT[opcode]
            position = start + int.from_bytes(data[position + 1 : start], "little")
        elif opcode in _TUPLES and tuples < MAX_TUPLES:
            position, tuples = position + 1, tuples + 1
        elif opcode == _STOP:
            break
        else:
            raise ProtocolError(f"header holds the pickle opcode {bytes([opcode])!r}, which is not allowed")
    if position != length - 1:
        raise ProtocolError("header is cut off, or has bytes behind its end")


class _PlainUnpickler(pickle.Unpickler):
    """A second line of defence: even an opcode that passed the check resolves no global."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise ProtocolError(f"header asks for the global {module}.{name}")

    def persistent_load(self, pid: object) -> NoReturn:
        raise ProtocolError("header asks for a persistent object")


def unpack_header(data: bytes) -> tuple[Any, ...]:
    """Return the values in a restricted pickle.

    Raises: ProtocolError: an opcode outside the allow-list, a malformed pickle, bytes after its end, or no tuple.
    """
    check_opcodes(data)
    try:
        values = _PlainUnpickler(io.BytesIO(data)).load()  # noqa: S301  # every opcode was checked
    except ProtocolError:
        raise
    except Exception as exc:  # the unpickler fails with many types; all mean a malformed header
        raise ProtocolError(f"malformed header: {exc}") from exc
    if type(values) is not tuple:
        raise ProtocolError("header is no tuple of values")
    return values


# ---------------------------------------------------------------- tensors


def pack_array(array: Array) -> tuple[WireSpec, memoryview]:
    """Return an array's description and a view of its bytes; only an array with gaps is copied.

    A channels-last array (N, C, H, W) is sent in the order of its memory and marked as such.

    Raises: ProtocolError: arrays of this type cannot be sent.
    """
    from neurosurgeon.graph.spec import ITEM_BYTES, dtype_of

    dtype = dtype_of(array)
    if dtype not in ITEM_BYTES:
        raise ProtocolError(f"tensors of {dtype} cannot be sent: expected one of {', '.join(ITEM_BYTES)}")
    shape, is_channels_last = array.shape, False
    if array.size == 0:
        array = array.reshape(-1)  # else its view could not be cast
    view = array.data
    if not view.c_contiguous:
        other = array.transpose(0, 2, 3, 1) if len(shape) == 4 else array
        is_channels_last = other.flags.c_contiguous
        view = (other if is_channels_last else array.copy("C")).data
    return (dtype, shape, is_channels_last), view.cast("B")


def check_tensor_specs(specs: Any, lengths: Sequence[int]) -> None:
    """Compare the descriptions in a header with the lengths of the frame's buffers, before these are allocated.

    Raises: ProtocolError: a malformed description, an unknown dtype, or a size that is not the buffer's.
    """
    if type(specs) is not list or len(specs) != len(lengths):
        raise ProtocolError(f"{len(lengths)} buffers without one description each")
    if not specs:
        return
    from neurosurgeon.graph.spec import ITEM_BYTES

    for spec, length in zip(specs, lengths, strict=True):
        if type(spec) is not tuple or tuple(map(type, spec)) != (str, tuple, bool):
            raise ProtocolError("malformed description of a tensor")
        dtype, shape, channels_last = spec
        if dtype not in ITEM_BYTES:
            raise ProtocolError(f"tensor of unknown dtype {dtype[:32]!r}")
        if len(shape) > MAX_DIMENSIONS or (channels_last and len(shape) != 4):
            raise ProtocolError(f"tensor of {len(shape)} dimensions")
        if not all(type(size) is int and 0 <= size < MAX_SIZE for size in shape):
            raise ProtocolError("tensor of malformed shape")
        if length == 0 and math.prod(max(size, 1) for size in shape) >= MAX_SIZE:
            raise ProtocolError("empty tensor of huge sizes")
        if math.prod(shape) * ITEM_BYTES[dtype] != length:
            raise ProtocolError(f"tensor {dtype}{shape} does not fill its buffer of {length} bytes")


def unpack_array(spec: WireSpec, buffer: memoryview) -> Array:
    """Return the array that lives in ``buffer``, which must be writable and outlive it; nothing is copied."""
    import numpy as np

    dtype, shape, is_channels_last = spec
    values = np.frombuffer(buffer, "uint16" if dtype == "bfloat16" else dtype)
    if is_channels_last:
        n, c, h, w = shape
        return values.reshape(n, h, w, c).transpose(0, 3, 1, 2)
    return values.reshape(shape)
