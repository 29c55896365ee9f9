"""Messages to frames, and the heads of frames to messages; no sockets.

All that makes the head of one request of a stream of tasks another than the next is its number, and of their replies
the figures: the rest is packed, and read and checked, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from neurosurgeon.net.framing import (
    FIXED_START,
    RAW_KINDS,
    Buffer,
    Kind,
    Limits,
    frame_pieces,
    pack_head,
    unpack_head,
    unpack_prefix,
)
from neurosurgeon.net.messages import Message, Reply, Request, figures_of, header_values, kind_of, message_of
from neurosurgeon.net.pickling import TensorSpec, check_tensor_specs, pack_header, pack_tensor, unpack_header
from neurosurgeon.utils.errors import ProtocolError

if TYPE_CHECKING:  # the bandwidth monitor sends no tensors and starts without torch
    from torch import Tensor

KEPT_HEADS = 64  # known ones; a cloud serves a few models and points at a time
STREAMED = (Request, Reply)  # one much like the other


# ---------------------------------------------------------------- to frames


def pack_message(message: Message, tensors: Sequence[Tensor] = (), task: int = 0) -> list[Buffer]:
    """Return the pieces of the frame that carries a message, its tensors in their own memory."""
    specs, buffers = zip(*map(pack_tensor, tensors), strict=True) if tensors else ((), ())
    make = _known_head if type(message) in STREAMED else _head
    head = make(kind_of(message), header_values(message), specs, tuple(map(len, buffers)))
    return frame_pieces(head, buffers, task, figures_of(message))


def _head(kind: Kind, values: tuple[Any, ...], specs: tuple[TensorSpec, ...], lengths: tuple[int, ...]) -> bytes:
    return pack_head(kind, pack_header(values, list(specs)), lengths)


_known_head = lru_cache(KEPT_HEADS)(_head)


# ---------------------------------------------------------------- from heads


class Outline(NamedTuple):
    """All that a head says but for task and figures, checked."""

    message: Message | None  # None: a reply, whose fields are the figures
    specs: tuple[TensorSpec, ...]
    lengths: tuple[int, ...]  # of the buffers
    body_length: int


class LongHeadError(Exception):
    """A head has more than one unit."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.length = length


class RawHeadError(Exception):
    """A head holds no pickle."""

    def __init__(self, kind: Kind, header: bytes) -> None:
        super().__init__(kind)
        self.kind, self.header = kind, header


def outline_of(data: Buffer, limits: Limits) -> Outline:
    """Return what a head says but for its task and figures.

    Raises: ProtocolError. LongHeadError: ``data`` ends before it does. RawHeadError.
    """
    prefix = unpack_prefix(data, limits)
    if prefix.head_length > len(data):
        raise LongHeadError(prefix.head_length)
    head = unpack_head(prefix, data, limits)
    if head.kind in RAW_KINDS:
        raise RawHeadError(head.kind, head.header)
    parts = unpack_header(head.header)
    if len(parts) != 2:
        raise ProtocolError(f"header of {len(parts)} parts")
    values, specs = parts
    message = message_of(head.kind, values)
    check_tensor_specs(specs, head.lengths)
    return Outline(message, tuple(specs), head.lengths, head.body_length)


@lru_cache(KEPT_HEADS)
def known_outline(start: bytes, rest: bytes, limits: Limits) -> Outline:
    """Return what the parts of a head before and behind its task and figures say; nobody may change it.

    The messages of a stream of tasks differ in nothing else: one look finds them. Raises: as `outline_of`.
    """
    return outline_of(start.ljust(FIXED_START, b"\0") + rest, limits)
