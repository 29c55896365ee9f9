"""Checks of the arguments of the Python API; the flags of commands are checked by their parsers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from enum import StrEnum
from typing import Any, TypeVar, cast

from neurosurgeon.utils.errors import UsageError

Settings = TypeVar("Settings")

PREDICTORS = ("forest", "linear", "measured")
POSITIVE = ("repeat", "in_flight", "threads", "deadline_ms")


def one_of(choices: Iterable[str], name: str, value: str) -> str:
    """Return an argument if it is one of the choices. Raises: UsageError: it is not; the message lists them."""
    if value not in tuple(choices):
        raise UsageError(f"{name}: expected {' or '.join(choices)}, got {value!r}")
    return value


def check_numbers(**given: float | None) -> None:
    """Check that each argument is positive, or None. A round trip may be zero.

    Raises: UsageError.
    """
    for name, value in given.items():
        may_be_zero = name == "rtt_ms"
        if value is not None and not (value > 0 or (value == 0 and may_be_zero)):
            raise UsageError(f"{name}: expected a number {'of at least' if may_be_zero else 'above'} 0, got {value}")


def settings_of(kind: type[Settings], given: Mapping[str, Any]) -> Settings:
    """Return settings, a dataclass, with members of enumerations in place of their names.

    Raises: UsageError: a value is wrong. TypeError: there is no such setting.
    """
    members: dict[str, StrEnum] = {}
    for field in fields(cast(Any, kind)):
        if field.name in given and isinstance(field.default, StrEnum):
            choices = type(field.default)
            members[field.name] = choices(one_of(choices, field.name, given[field.name]))
    one_of(PREDICTORS, "predictor", given.get("predictor", "forest"))
    check_numbers(**{name: given.get(name) for name in POSITIVE})
    return kind(**{**given, **members})
