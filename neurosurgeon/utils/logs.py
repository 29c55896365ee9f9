"""Log lines: one for each event, as text or as JSON; whatever a peer sends, it stays on its line."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from neurosurgeon.utils.errors import InternalError

LEVELS = ("debug", "info", "warning", "error")
FIELDS = ("peer", "task", "model", "error", "size_bytes", "duration_ms")  # what events may tell besides their message
NOISY_LIBRARIES = ("matplotlib", "PIL")


def start_logging(level: str, *, as_json: bool) -> None:
    """Write log lines to stderr from now on, as the command line says."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLine() if as_json else TextLine("%(levelname)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for library in NOISY_LIBRARIES:
        logging.getLogger(library).setLevel(logging.WARNING)


def is_warning(line: str) -> bool:
    """Return whether a line that either formatter made tells of a warning or an error."""
    return line.startswith(("WARNING", "ERROR", '{"level": "WARNING"', '{"level": "ERROR"'))


def is_entry(line: str) -> bool:
    """Return whether a line begins what a formatter made; the others go on with it (a traceback)."""
    return line.startswith(('{"level": ', *(level.upper() for level in LEVELS)))


def internal_error(log: logging.Logger, exc: Exception, what: str, **fields: str) -> InternalError:
    """Log an unexpected exception with its traceback, and return the error that stands for it from then on.

    One that stands for another already was logged with that one.

    Args: what: what failed, and of which task, network and peer. fields: of `FIELDS`, for the line.
    """
    if isinstance(exc, InternalError):
        return exc
    error = InternalError(f"internal error: {type(exc).__name__}: {exc}")
    log.error("%s: %s", what, error, exc_info=exc, extra={**fields, "error": type(exc).__name__})
    return error


class TextLine(logging.Formatter):
    """Level and message; only tracebacks, which are asked for, take lines of their own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the library's name
        """Return the line without what would break it."""
        return super().formatMessage(record).replace("\n", "\\n").replace("\r", "\\r")


class JsonLine(logging.Formatter):
    """An object on one line: level, time, logger, message, and the fields that the event has."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "level": record.levelname,
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def printable(text: str) -> str:
    """Return the text on one line, without characters that a terminal would obey or Excel refuse."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
