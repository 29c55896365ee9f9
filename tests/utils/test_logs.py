"""Format one log line for each event, also if it holds line breaks."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from neurosurgeon.utils.logs import JsonLine, TextLine, internal_error, is_entry, is_warning

FORMATTERS = [TextLine("%(levelname)s %(message)s"), JsonLine()]


def record(message: str, level: int = logging.WARNING, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("neurosurgeon.cloud.server", level, __file__, 1, message, (), None)
    made.__dict__.update(fields)
    return made


@pytest.mark.parametrize("formatter", FORMATTERS)
def test_line_breaks_of_a_peer_are_escaped(formatter: logging.Formatter) -> None:
    line = formatter.format(record("no model 'x\nERROR all is lost\r\u2028'"))
    assert len(line.splitlines()) == 1 or isinstance(formatter, TextLine)
    assert "\n" not in line and "\r" not in line


@pytest.mark.parametrize("formatter", FORMATTERS)
def test_control_characters_of_a_peer_are_not_written(formatter: logging.Formatter) -> None:
    line = formatter.format(record("\x1b]0;owned\x07\x1b[2J\x9b1m\u202e网络"))
    assert line.isprintable()
    assert isinstance(formatter, JsonLine) or "网络" in line


@pytest.mark.parametrize("formatter", FORMATTERS)
def test_a_long_message_of_a_peer_is_shortened(formatter: logging.Formatter) -> None:
    assert "A" * 1400 in formatter.format(record("A" * 1400))
    line = formatter.format(record("A" * 60_000))
    assert len(line) < 2000 and "more characters)" in line


@pytest.mark.parametrize("formatter", FORMATTERS)
def test_is_warning_recognises_warnings_and_errors(formatter: logging.Formatter) -> None:
    assert is_warning(formatter.format(record("careful")))
    assert is_warning(formatter.format(record("broken", logging.ERROR)))
    assert not is_warning(formatter.format(record("listening", logging.INFO)))


@pytest.mark.parametrize("formatter", FORMATTERS)
def test_a_traceback_begins_no_entry(formatter: logging.Formatter) -> None:
    failed = record("it failed", logging.ERROR)
    failed.exc_info = (ValueError, ValueError("broken"), None)
    first, *others = formatter.format(failed).splitlines()
    assert is_entry(first)
    assert not any(map(is_entry, others))


def test_an_internal_error_is_logged_once_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("a test")
    try:
        raise KeyError("shape")
    except KeyError as exc:
        error = internal_error(log, exc, "task 4 (le_net) could not be sent", task="4")
    assert str(error) == "internal error: KeyError: 'shape'"
    assert internal_error(log, error, "it was logged before") is error
    (logged,) = caplog.records
    assert logged.levelname == "ERROR"
    assert logged.getMessage() == "task 4 (le_net) could not be sent: internal error: KeyError: 'shape'"
    assert logged.__dict__["task"] == "4"
    assert "Traceback" in caplog.text


def test_a_json_line_has_the_fields_of_its_event_and_no_others() -> None:
    line = json.loads(JsonLine().format(record("answered", peer="127.0.0.1:1", task="ab", payload=b"secret")))
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "WARNING",
        "logger": "neurosurgeon.cloud.server",
        "message": "answered",
        "peer": "127.0.0.1:1",
        "task": "ab",
    }


def test_a_traceback_stays_inside_the_object() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        failed = record("it failed")
        failed.exc_info = sys.exc_info()
    line = JsonLine().format(failed)
    assert "\n" not in line
    assert "ValueError: broken" in json.loads(line)["traceback"]
