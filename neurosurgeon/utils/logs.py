"""Format log lines as text or JSON: one short line for each event, also if its text is that of a hostile peer."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from neurosurgeon.utils.errors import InternalError

LEVELS = ("debug", "info", "warning", "error")
FIELDS = ("peer", "task", "model", "error", "size_bytes", "duration_ms")  # that an event may have besides its message
MAX_MESSAGE_CHARS = 1_500  # of one line; a refusal may quote a peer, whose header may have 64 KB
NOISY_LIBRARIES = ("matplotlib", "PIL")


def start_logging(level: str, *, as_json: bool) -> None:
    """Write log lines of at least this level to stderr from now on, as text or JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLine() if as_json else TextLine("%(levelname)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for library in NOISY_LIBRARIES:
        logging.getLogger(library).setLevel(logging.WARNING)


def is_warning(line: str) -> bool:
    """Return whether a line of either formatter is a warning or an error."""
    return line.startswith(("WARNING", "ERROR", '{"level": "WARNING"', '{"level": "ERROR"'))


def is_entry(line: str) -> bool:
    """Return whether a line is the first of an event; others continue it (a traceback)."""
    return line.startswith(('{"level": ', *(level.upper() for level in LEVELS)))


def internal_error(log: logging.Logger, exc: Exception, failure: str, **fields: str) -> InternalError:
    """Log an unexpected exception with its traceback; return the InternalError to raise in its place.

    An InternalError was logged before, and is returned as it is.

    Args: failure: the operation that failed, with its task, network and peer. fields: of `FIELDS`, for the line.
    """
    if isinstance(exc, InternalError):
        return exc
    error = InternalError(f"internal error: {type(exc).__name__}: {exc}")
    log.error("%s: %s", failure, error, exc_info=exc, extra={**fields, "error": type(exc).__name__})
    return error


class TextLine(logging.Formatter):
    """Format level and message on one line; only the traceback of an internal error has further lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the library's name
        """Return the line, with escaped line breaks and no other control characters."""
        line = super().formatMessage(record).replace("\n", "\\n").replace("\r", "\\r")
        return printable(shortened(line))


class JsonLine(logging.Formatter):
    """Format an object on one line: level, time, logger, message, and the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "level": record.levelname,
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "logger": record.name,
            "message": shortened(record.getMessage()),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def shortened(text: str) -> str:
    """Return the text, or its first `MAX_MESSAGE_CHARS` with the number of those that are left out."""
    beyond = len(text) - MAX_MESSAGE_CHARS
    return f"{text[:MAX_MESSAGE_CHARS]}... ({beyond} more characters)" if beyond > 0 else text


def printable(text: str) -> str:
    """Return the text on one line, without characters that a terminal would obey or Excel refuse."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
