"""The restricted pickle of a frame's header, and tensors beside it, out of band.

A header is a protocol-5 pickle of plain values: dict, list, tuple, str, bytes, int, float, bool, None. It is
written without memo, so it is a tree; before it is loaded, every opcode must be on an allow-list that can make
nothing else. No global is ever resolved, and memory stays proportional to the header's length.

A tensor is described in the header (dtype, shape, memory format) and its bytes travel as a buffer of the frame:
sent from the tensor's own memory, received into memory that becomes the tensor.
"""

from __future__ import annotations

import io
import math
import pickle  # noqa: S403  # only behind the opcode allow-list below
import pickletools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from utils.errors import ProtocolError

if TYPE_CHECKING:  # the bandwidth monitor uses headers without tensors, and must start without torch
    from torch import Tensor

ALLOWED_OPCODES = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES "
    "EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3".split()
)
MAX_DIMENSIONS = 8
ITEM_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float64": 8,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "bool": 1,
}


def pack_header(value: Mapping[str, Any]) -> bytes:
    """Return a mapping of plain values as a restricted pickle."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, protocol=5)
    pickler.fast = True  # no memo: a tree of values, and no opcode that refers back
    pickler.dump(dict(value))
    return stream.getvalue()


class _PlainUnpickler(pickle.Unpickler):
    """A second line of defence: even an opcode that slipped through finds no global."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise ProtocolError(f"header asks for the global {module}.{name}")

    def persistent_load(self, pid: object) -> NoReturn:
        raise ProtocolError("header asks for a persistent object")


def unpack_header(data: bytes) -> dict[str, Any]:
    """Return the mapping in a restricted pickle.

    Raises: ProtocolError: an opcode outside the allow-list, a malformed pickle, bytes behind its end, or no
            mapping with string keys.
    """
    try:
        for opcode, _, position in pickletools.genops(data):
            if opcode.name not in ALLOWED_OPCODES:
                raise ProtocolError(f"header holds the pickle opcode {opcode.name}, which is not allowed")
        if position != len(data) - 1:
            raise ProtocolError("header has bytes behind its end")
        value = _PlainUnpickler(io.BytesIO(data)).load()  # noqa: S301  # every opcode was checked
    except ProtocolError:
        raise
    except Exception as exc:  # the two readers of pickles fail with many types; all mean a malformed header
        raise ProtocolError(f"malformed header: {exc}") from exc
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ProtocolError("header is not a mapping of names to values")
    return value


# ---------------------------------------------------------------- tensors


def pack_tensor(tensor: Tensor) -> tuple[dict[str, Any], memoryview]:
    """Return a tensor's description and a view of its bytes, without copying a dense tensor.

    A channels-last tensor (N, C, H, W) is sent in its own order and marked as such. A tensor on another device or
    with gaps is copied once.
    """
    import torch

    tensor = tensor.detach().cpu()
    channels_last = (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    spec = {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "channels_last": channels_last,
    }
    if spec["dtype"] not in ITEM_BYTES:
        raise ProtocolError(f"tensors of {spec['dtype']} cannot be sent")
    dense = tensor.permute(0, 2, 3, 1) if channels_last else tensor.contiguous()
    flat = dense.reshape(-1).view(torch.uint8)
    return spec, memoryview(flat.numpy())


def check_tensor_specs(specs: object, lengths: Sequence[int]) -> None:
    """Compare the descriptions in a header with the lengths of the frame's buffers, before these are allocated.

    Raises: ProtocolError: a malformed description, an unknown dtype, or a size that is not the buffer's.
    """
    if not isinstance(specs, list) or len(specs) != len(lengths):
        raise ProtocolError(f"frame of {len(lengths)} buffers without one description each")
    for spec, length in zip(specs, lengths, strict=True):
        if not isinstance(spec, dict) or set(spec) != {"dtype", "shape", "channels_last"}:
            raise ProtocolError("malformed description of a tensor")
        dtype, shape = spec["dtype"], spec["shape"]
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise ProtocolError(f"tensor of unknown dtype {str(dtype)[:32]!r}")
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
            raise ProtocolError("tensor of malformed shape")
        if not all(type(size) is int and 0 <= size < 2**40 for size in shape):
            raise ProtocolError("tensor of malformed shape")
        if type(spec["channels_last"]) is not bool or (spec["channels_last"] and len(shape) != 4):
            raise ProtocolError("tensor of malformed memory format")
        if math.prod(shape) * ITEM_BYTES[dtype] != length:
            raise ProtocolError(f"tensor {dtype}{shape} does not fill its buffer of {length} bytes")


def unpack_tensor(spec: Mapping[str, Any], buffer: memoryview) -> Tensor:
    """Return the tensor that lives in ``buffer``, which must be writable and outlive it; nothing is copied."""
    import torch

    dtype, shape = getattr(torch, spec["dtype"]), spec["shape"]
    if not len(buffer):
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(buffer, dtype=dtype)
    if spec["channels_last"]:
        n, c, h, w = shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(shape)
