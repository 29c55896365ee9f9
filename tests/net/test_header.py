"""Headers: all that passes the opcode check is plain, and no attack runs. Arrays: bit for bit, without copies."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from neurosurgeon.engine.torch_engine import as_array, as_tensor
from neurosurgeon.graph.spec import ITEM_BYTES, Array, channels_last
from neurosurgeon.net.header import (
    ALLOWED_OPCODES,
    MAX_DIMENSIONS,
    MAX_SIZE,
    check_opcodes,
    check_tensor_specs,
    pack_array,
    pack_header,
    unpack_array,
    unpack_header,
)
from neurosurgeon.utils.errors import ProtocolError

PLAIN_TYPES = (dict, list, tuple, str, bytes, int, float, bool, type(None))

keys = st.none() | st.booleans() | st.integers() | st.text() | st.binary()
scalars = keys | st.floats(allow_nan=False)  # NaN is not equal to itself
plain_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.lists(inner).map(tuple),
    max_leaves=10,
)


def is_plain(value: Any) -> bool:
    """Return whether a value is made of plain types only, and exactly of these."""
    if type(value) is dict:
        return all(is_plain(key) and is_plain(held) for key, held in value.items())
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    return type(value) in PLAIN_TYPES


def header_of(body: bytes) -> bytes:
    """Return a pickle whose opcodes, but for the first and the last, are given."""
    return pickle.PROTO + b"\x05" + body + pickle.STOP


# ---------------------------------------------------------------- plain values


@given(st.lists(plain_values).map(tuple))
def test_plain_values_round_trip(values: tuple[Any, ...]) -> None:
    assert unpack_header(pack_header(*values)) == values


@given(st.lists(plain_values).map(tuple))
def test_types_survive_the_round_trip(values: tuple[Any, ...]) -> None:
    assert repr(unpack_header(pack_header(*values))) == repr(values)  # True is no 1, and 1.0 neither


def test_nan_and_infinities_survive() -> None:
    nan, up, down = unpack_header(pack_header(float("nan"), float("inf"), float("-inf")))
    assert nan != nan and (up, down) == (float("inf"), float("-inf"))


def test_a_shared_value_is_written_twice() -> None:
    shared = ["once"]
    first, second = unpack_header(pack_header(shared, shared))
    assert first == second and first is not second


@pytest.mark.parametrize("length", [255, 256, 65_535, 65_536])
@pytest.mark.parametrize("unit", ["x", b"x"])
def test_strings_of_every_length_prefix_round_trip(unit: str | bytes, length: int) -> None:
    assert unpack_header(pack_header(unit * length)) == (unit * length,)


@pytest.mark.parametrize(
    "body", [b"\x8c\x04text", b"K\x07", b"]", b"}", b"N"], ids=["str", "int", "list", "dict", "None"]
)
def test_a_header_that_is_no_tuple_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="no tuple"):
        unpack_header(header_of(body))


# ---------------------------------------------------------------- the opcode check, against pickletools as the oracle


def genops_allows(data: bytes) -> bool:
    """Return whether `pickletools` finds allowed opcodes only, and the end at the last byte.

    It also decodes arguments: a str that is no UTF-8 is for the unpickler to refuse, and no example here.
    """
    stream = io.BytesIO(data)
    try:
        found = {opcode.code.encode("latin-1")[0] for opcode, _, _ in pickletools.genops(stream)}
    except UnicodeDecodeError:
        reject()
    except ValueError:
        return False
    return found <= ALLOWED_OPCODES and stream.tell() == len(data)


def check_allows(data: bytes) -> bool:
    """Return whether our own check lets a pickle through."""
    try:
        check_opcodes(data)
    except ProtocolError:
        return False
    return True


whole_opcodes = [  # every allowed one but STOP, each with an argument of the right length
    *(b"\x80\x05", b"\x95\x02\0\0\0\0\0\0\0", b"(", b"N", b"\x88", b"\x89"),
    *(b"J\1\2\3\4", b"K\1", b"M\1\2", b"G?\xf0\0\0\0\0\0\0", b"\x8a\x021\0"),
    *(b"}", b"s", b"u", b"]", b"a", b"e", b")", b"t", b"\x85", b"\x86", b"\x87"),
    *(b"\x8c\x01a", b"X\x01\0\0\0a", b"C\x01a", b"B\x01\0\0\0a", b"\x8c\x01\xff"),
]
allowed_soup = st.lists(st.sampled_from(whole_opcodes), max_size=15).map(b"".join).map(header_of)
any_opcode = st.sampled_from([opcode.code.encode("latin-1") for opcode in pickletools.opcodes])
opcode_soup = st.lists(st.sampled_from(whole_opcodes) | any_opcode | st.binary(max_size=6), max_size=12).map(b"".join)
hostile_bytes = allowed_soup | opcode_soup | opcode_soup.map(header_of)


def test_the_allow_list_is_complete() -> None:
    assert {opcode[0] for opcode in whole_opcodes} | {pickle.STOP[0]} == ALLOWED_OPCODES


@given(st.lists(plain_values).map(tuple))
def test_every_header_of_ours_passes_the_check_and_the_oracle(values: tuple[Any, ...]) -> None:
    data = pack_header(*values)
    assert check_allows(data) and genops_allows(data)


@settings(max_examples=500)
@given(hostile_bytes)
def test_the_check_agrees_with_the_oracle(data: bytes) -> None:
    assert check_allows(data) == genops_allows(data)


@settings(max_examples=500)
@given(hostile_bytes)
def test_checked_bytes_load_plain_values_or_are_refused(data: bytes) -> None:
    try:
        values = unpack_header(data)
    except ProtocolError:
        return
    assert is_plain(values)


@given(st.lists(plain_values).map(tuple), st.data())
def test_one_changed_byte_loads_plain_values_or_is_refused(values: tuple[Any, ...], data: Any) -> None:
    header = bytearray(pack_header(*values))
    header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    try:
        changed = unpack_header(bytes(header))
    except ProtocolError:
        return
    assert is_plain(changed)


def test_a_header_cut_off_anywhere_is_refused() -> None:
    header = pack_header("model", 3, 2.5, [True, None, b"bytes"], {"key": ("a", 1 << 40)})
    for length in range(len(header)):
        with pytest.raises(ProtocolError):
            unpack_header(header[:length])


@pytest.mark.parametrize("tail", [b"\0", pickle.STOP, pack_header(1)])
def test_bytes_after_the_end_are_refused(tail: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack_header(pack_header(1) + tail)


# ---------------------------------------------------------------- attacks


class Touch:
    """Creates a file when it is unpickled, the way exploits run commands."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def text(value: str) -> bytes:
    """Return the opcode that pushes a str."""
    return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()


ATTACKS: dict[str, Callable[[str], bytes]] = {
    "GLOBAL, REDUCE": lambda command: b"cos\nsystem\n" + text(command) + b"\x85R",
    "STACK_GLOBAL, REDUCE": lambda command: text("os") + text("system") + b"\x93" + text(command) + b"\x85R",
    "INST": lambda command: b"(" + text(command) + b"ios\nsystem\n",
    "OBJ": lambda command: b"(cos\nsystem\n" + text(command) + b"o",
    "NEWOBJ": lambda command: b"cos\nsystem\n" + text(command) + b"\x85\x81",
    "NEWOBJ_EX": lambda command: b"cos\nsystem\n" + text(command) + b"\x85}\x92",
    "BUILD": lambda command: b"}" + text(command) + b"b",
    "EXT1": lambda command: b"\x82\x01" + text(command) + b"\x85R",
    "EXT2": lambda command: b"\x83\x01\0" + text(command) + b"\x85R",
    "EXT4": lambda command: b"\x84\x01\0\0\0" + text(command) + b"\x85R",
    "PERSID": lambda command: b"P" + command.encode() + b"\n",
    "BINPERSID": lambda command: text(command) + b"Q",
    "REDUCE of a str": lambda command: text("os.system") + text(command) + b"\x85R",
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_an_attack_is_refused_and_runs_nothing(attack: Callable[[str], bytes], tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    for body in (attack(f"touch {flag}"), attack(f"touch {flag}") + b"\x85"):
        with pytest.raises(ProtocolError, match="not allowed"):
            unpack_header(header_of(body))
    assert not flag.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_exploit_of_any_pickle_protocol_runs_nothing(protocol: int, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    exploit = pickle.dumps((Touch(flag),), protocol)
    with pytest.raises(ProtocolError, match="not allowed"):
        unpack_header(exploit)
    assert not flag.exists()
    pickle.loads(exploit)
    assert flag.exists(), "the attack itself does not work, so that it was refused proves nothing"


def test_an_attack_after_the_end_of_a_header_runs_nothing(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    with pytest.raises(ProtocolError):
        unpack_header(pack_header(1) + pickle.dumps(Touch(flag)))
    assert not flag.exists()


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"]r" + struct.pack("<I", 2**31 - 1), id="LONG_BINPUT: a memo of 16 GB"),
        pytest.param(b"]q\x00", id="BINPUT"),
        pytest.param(b"]\x94h\x00\x86", id="MEMOIZE, BINGET"),
        pytest.param(b"]p0\ng0\n", id="PUT, GET"),
        pytest.param(b"]2\x86", id="DUP: a value that holds itself twice"),
        pytest.param(b"\x8b" + struct.pack("<i", 2**31 - 1), id="LONG4"),
        pytest.param(b"\x8d" + struct.pack("<Q", 2**62), id="BINUNICODE8"),
        pytest.param(b"\x8e" + struct.pack("<Q", 2**62), id="BINBYTES8"),
        pytest.param(b"\x96" + struct.pack("<Q", 2**62), id="BYTEARRAY8: allocated before it is read"),
        pytest.param(b"\x97", id="NEXT_BUFFER"),
        pytest.param(b"\x8f", id="EMPTY_SET"),
        pytest.param(b"I" + b"9" * 5000 + b"\n", id="INT of quadratic cost"),
    ],
)
def test_an_opcode_that_costs_memory_or_time_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="not allowed"):
        unpack_header(header_of(body))


@pytest.mark.parametrize("opcode", [pickle.BINUNICODE, pickle.BINBYTES])
def test_an_argument_longer_than_the_header_is_refused(opcode: bytes) -> None:
    with pytest.raises(ProtocolError, match="cut off"):
        check_opcodes(header_of(opcode + struct.pack("<I", 2**32 - 1)))


@pytest.mark.parametrize(
    "body",
    [b"", b"\x85", b"a", b"u", b"N(", b"}]Ns\x85", b"Nt", b"\x8c\x01\xff\x85", b"\x95" + b"\xff" * 8 + b"N\x85"],
    ids=[
        "nothing on the stack",
        "tuple of nothing",
        "append to nothing",
        "items without mark",
        "a mark left",
        "a list as key",
        "tuple without mark",
        "no UTF-8",
        "a frame of 2^64 bytes",
    ],
)
def test_allowed_opcodes_in_a_senseless_order_are_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack_header(header_of(body))


# ---------------------------------------------------------------- arrays


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return numpy's type for a type of the wire; see `graph.spec`."""
    return np.dtype("uint16" if name == "bfloat16" else name)


def some_bits(name: str, shape: tuple[int, ...]) -> Array:
    """Return an array of random bits, so that NaNs with payloads and negative zeros are among its values."""
    generator = np.random.default_rng(0)
    if name == "bool":
        return generator.integers(0, 2, shape).astype(bool)
    raw = generator.integers(0, 256, (*shape, ITEM_BYTES[name]), dtype=np.uint8)
    return raw.view(numpy_dtype(name)).reshape(shape)


def through_the_wire(array: Array) -> Array:
    """Return the array that a receiver makes of another."""
    spec, view = pack_array(array)
    check_tensor_specs([spec], [len(view)])
    return unpack_array(spec, memoryview(bytearray(view)))


def assert_same(received: Array, sent: Array) -> None:
    """Compare two arrays bit for bit."""
    assert (received.dtype, received.shape) == (sent.dtype, sent.shape)
    assert received.tobytes() == sent.tobytes()


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (1, 3, 4, 5), (2, 3, 4, 5), (1,) * MAX_DIMENSIONS])
@pytest.mark.parametrize("name", ITEM_BYTES)
def test_every_dtype_and_shape_round_trips_bit_for_bit(name: str, shape: tuple[int, ...]) -> None:
    sent = some_bits(name, shape)
    assert pack_array(sent)[0][0] == name
    assert_same(through_the_wire(sent), sent)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), (1, 0, 4, 4)])
@pytest.mark.parametrize("name", ITEM_BYTES)
def test_an_empty_array_keeps_dtype_and_shape(name: str, shape: tuple[int, ...]) -> None:
    sent = np.empty(shape, numpy_dtype(name))
    assert_same(through_the_wire(sent), sent)


@pytest.mark.parametrize("name", ITEM_BYTES)
def test_channels_last_stays_channels_last(name: str) -> None:
    sent = channels_last(some_bits(name, (2, 3, 4, 5)))
    received = through_the_wire(sent)
    assert_same(received, sent)
    assert received.strides == sent.strides


@pytest.mark.parametrize(
    "gaps",
    [
        lambda array: array[:, 1:],
        lambda array: array[..., ::2],
        lambda array: array[..., ::-1],
        lambda array: array.transpose(3, 1, 2, 0),
        lambda array: np.broadcast_to(array[:1], (4, 3, 4, 5)),
        lambda array: channels_last(array)[:, 1:],
    ],
    ids=["slice", "stride", "reversed", "transpose", "broadcast", "slice of channels-last"],
)
def test_an_array_with_gaps_round_trips(gaps: Callable[[Array], Array]) -> None:
    sent = gaps(some_bits("float32", (2, 3, 4, 5)))
    assert not sent.flags.c_contiguous
    assert_same(through_the_wire(sent), sent)


def test_a_tensor_of_training_is_sent_without_its_graph() -> None:
    sent = torch.ones(3, requires_grad=True) * 2
    received = as_tensor(through_the_wire(as_array(sent)))
    assert torch.equal(received, sent)
    assert not received.requires_grad


@given(
    st.sampled_from(sorted(ITEM_BYTES)),
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
    st.sampled_from(["as it is", "reversed", "channels-last"]),
)
def test_any_small_array_round_trips(name: str, shape: tuple[int, ...], layout: str) -> None:
    sent = some_bits(name, shape) if 0 not in shape else np.empty(shape, numpy_dtype(name))
    if layout == "reversed":
        sent = sent.transpose()
    elif layout == "channels-last":
        sent = channels_last(sent)
    assert_same(through_the_wire(sent), sent)


@pytest.mark.parametrize("dtype", ["uint32", "object", "<U1", "datetime64[s]"])
def test_a_dtype_outside_the_list_cannot_be_sent(dtype: str) -> None:
    with pytest.raises(
        ProtocolError, match=re.escape(f"tensors of {dtype} cannot be sent: expected one of bool, uint8")
    ):
        pack_array(np.zeros(2, dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "bool"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_tensor_stays_the_same_as_an_array_on_the_wire(dtype: str, memory_format: torch.memory_format) -> None:
    sent = torch.rand(2, 3, 4, 5).round(decimals=1).to(getattr(torch, dtype)).contiguous(memory_format=memory_format)
    received = as_tensor(through_the_wire(as_array(sent)))
    assert received.dtype == sent.dtype and torch.equal(received, sent)
    assert received.stride() == sent.stride()


# ---------------------------------------------------------------- no copies


def address_of(view: memoryview) -> int:
    """Return the address of the bytes of a view."""
    return np.frombuffer(view, np.uint8).ctypes.data


@pytest.mark.parametrize("name", ITEM_BYTES)
@pytest.mark.parametrize("layout", [np.asarray, channels_last])
def test_a_dense_array_is_sent_from_its_own_memory(name: str, layout: Callable[[Array], Array]) -> None:
    array = layout(some_bits(name, (2, 3, 4, 5)))
    _, view = pack_array(array)
    assert address_of(view) == array.ctypes.data
    assert len(view) == array.nbytes


def test_a_parameter_is_sent_from_its_own_memory() -> None:
    tensor = torch.ones(3, requires_grad=True)
    assert address_of(pack_array(as_array(tensor))[1]) == tensor.data_ptr()


@pytest.mark.parametrize("is_channels_last", [False, True])
def test_a_received_array_lives_in_the_buffer(is_channels_last: bool) -> None:
    buffer = memoryview(bytearray(2 * 3 * 4 * 5))
    array = unpack_array(("uint8", (2, 3, 4, 5), is_channels_last), buffer)
    buffer[0] = 7
    assert array[0, 0, 0, 0] == 7
    assert array.ctypes.data == address_of(buffer)
    assert as_tensor(array).data_ptr() == address_of(buffer)


# ---------------------------------------------------------------- descriptions that lie


@pytest.mark.parametrize("length", [0, 23, 25, 28, 2**63])
def test_a_size_that_is_not_the_buffers_is_refused(length: int) -> None:
    check_tensor_specs([("float32", (2, 3), False)], [24])
    with pytest.raises(ProtocolError, match="does not fill its buffer"):
        check_tensor_specs([("float32", (2, 3), False)], [length])


@pytest.mark.parametrize("dtype", ["", "complex32", "qint8", "float8_e4m3fn", "__class__", "load", "x" * 5000])
def test_an_unknown_dtype_is_refused_in_a_short_line(dtype: str) -> None:
    with pytest.raises(ProtocolError, match="unknown dtype") as caught:
        check_tensor_specs([(dtype, (1,), False)], [1])
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize("size", [-1, MAX_SIZE, 2**63, True, 1.0, "1", None])
def test_a_size_that_is_none_is_refused(size: object) -> None:
    with pytest.raises(ProtocolError, match="malformed shape"):
        check_tensor_specs([("uint8", (size,), False)], [1])


def test_two_negative_sizes_do_not_make_a_positive_one() -> None:
    with pytest.raises(ProtocolError, match="malformed shape"):
        check_tensor_specs([("uint8", (-2, -3), False)], [6])


def test_too_many_dimensions_are_refused() -> None:
    check_tensor_specs([("uint8", (1,) * MAX_DIMENSIONS, False)], [1])
    with pytest.raises(ProtocolError, match=f"{MAX_DIMENSIONS + 1} dimensions"):
        check_tensor_specs([("uint8", (1,) * (MAX_DIMENSIONS + 1), False)], [1])


@pytest.mark.parametrize("dimensions", [0, 3, 5])
def test_channels_last_needs_four_dimensions(dimensions: int) -> None:
    with pytest.raises(ProtocolError, match=f"{dimensions} dimensions"):
        check_tensor_specs([("uint8", (1,) * dimensions, True)], [1])


@pytest.mark.parametrize(
    "spec",
    [
        None,
        [],
        ("uint8", (1,)),
        ("uint8", [1], False),
        ("uint8", (1,), 0),
        (b"uint8", (1,), False),
        ["uint8", (1,), False],
        ("uint8", (1,), False, None),
        (["uint8"], (1,), False),
    ],
)
def test_a_malformed_description_is_refused(spec: object) -> None:
    with pytest.raises(ProtocolError, match="malformed description"):
        check_tensor_specs([spec], [1])


@pytest.mark.parametrize("specs", [None, {}, (), [], [("uint8", (1,), False)] * 2])
def test_there_is_one_description_a_buffer(specs: object) -> None:
    with pytest.raises(ProtocolError, match="one description each"):
        check_tensor_specs(specs, [1])


@given(plain_values, st.lists(st.integers(0, 100), max_size=3))
def test_any_value_as_descriptions_is_accepted_or_refused(specs: object, lengths: list[int]) -> None:
    try:
        check_tensor_specs(specs, lengths)
    except ProtocolError:
        return
    assert isinstance(specs, list)
    assert len(specs) == len(lengths)
