"""Flags: mistakes are one line and exit code 2, numbers have ranges, a cloud has one thread on a busy machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest

from neurosurgeon.cli import parser as flags
from neurosurgeon.cli.cloud import default_threads
from neurosurgeon.cli.parser import (
    Parser,
    add_device,
    address_parser,
    free_threads,
    non_negative_float,
    non_negative_int,
    port_number,
    positive_float,
    positive_int,
    worker_count,
)


@pytest.mark.parametrize("arguments", [["--nonsense"], ["-p", "x"], ["-p", "70000"], ["-d", "tpu"], ["--threads", "0"]])
def test_a_wrong_command_line_is_one_line_and_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parser = address_parser("edge_api.py", None)
    add_device(parser)
    with pytest.raises(SystemExit) as exit_:
        parser.parse_args(arguments)
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("edge_api.py: error: ")
    assert captured.err.count("\n") == 1


def test_the_defaults_are_those_of_the_contract() -> None:
    parser = address_parser("edge_api.py", None, monitor_port=True)
    add_device(parser)
    args = parser.parse_args([])
    assert (args.ip, args.port, args.monitor_port, args.device) == ("127.0.0.1", 9999, 9922, "cpu")


def test_short_and_long_flags_mean_the_same() -> None:
    parser = address_parser("edge_api.py", None)
    add_device(parser)
    short = parser.parse_args(["-i", "::1", "-p", "1", "-d", "cuda"])
    assert short == parser.parse_args(["--ip", "::1", "--port", "1", "--device", "cuda"])


@pytest.mark.parametrize(
    ("convert", "text", "value"),
    [
        (port_number, "0", 0),
        (port_number, "65535", 65535),
        (positive_int, "1", 1),
        (worker_count, "64", 64),
        (non_negative_int, "0", 0),
        (positive_float, "1.25", 1.25),
        (non_negative_float, "0", 0.0),
    ],
)
def test_a_number_in_range_is_converted(convert: Callable[[str], Any], text: str, value: float) -> None:
    assert convert(text) == value
    assert type(convert(text)) is type(value)


@pytest.mark.parametrize(
    ("convert", "texts"),
    [
        (port_number, ["-1", "65536", "80.5", "http", ""]),
        (positive_int, ["0", "-3", "1.5", "nan", "9" * 30]),
        (non_negative_int, ["-1", "one"]),
        (worker_count, ["0", "65", "1.5", "all"]),
        (positive_float, ["0", "-1", "nan", "inf", "1e12", "fast"]),
        (non_negative_float, ["-0.1", "nan", "inf", ""]),
    ],
)
def test_a_number_out_of_range_is_refused(convert: Callable[[str], Any], texts: list[str]) -> None:
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a"):
            convert(text)


def test_the_help_of_a_flag_ends_with_its_default() -> None:
    parser = Parser(prog="tool")
    parser.add_number("-n", "--number", type=positive_float, default=1.5, meaning="time, s")
    parser.add_switch("--fast", "no breaks")
    assert vars(parser.parse_args(["--fast"])) == {"number": 1.5, "fast": True}
    text = parser.format_help()
    assert "time, s (default: 1.5)" in text
    assert "no breaks (default: off)" in text


@pytest.mark.parametrize(("free", "threads"), [(2.0, 2), (1.7, 2), (1.3, 1), (0.1, 1)])
def test_a_cloud_has_one_thread_if_cores_are_busy(
    free: float, threads: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flags, "free_cores", lambda: free)
    assert free_threads(2) == threads
    assert free_threads(1) == 1
    monkeypatch.setattr("neurosurgeon.predictor.store.dataset_threads", lambda side, device: 2)
    assert default_threads("cpu") == threads
    assert ("--threads 2 insists" in caplog.text) == (threads < 2)
