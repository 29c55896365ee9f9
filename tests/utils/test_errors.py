"""Check the tree of errors: one root, an exit code for each branch, and a drawing of all classes."""

from __future__ import annotations

import inspect
import re

import pytest

from neurosurgeon.utils import errors
from neurosurgeon.utils.errors import (
    AccessError,
    BusyError,
    ConnectError,
    DeadlineError,
    InternalError,
    NetworkError,
    NeurosurgeonError,
    PeerGoneError,
    PlanningError,
    ProtocolError,
    RemoteError,
    UsageError,
    is_connection_loss,
)

TREE = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]


def test_every_error_is_in_one_tree() -> None:
    assert all(issubclass(kind, NeurosurgeonError) for kind in TREE)


@pytest.mark.parametrize(
    ("branch", "code"),
    [(NeurosurgeonError, 1), (UsageError, 2), (PlanningError, 1), (NetworkError, 3), (AccessError, 4)],
)
def test_a_branch_has_the_exit_code_of_the_contract(branch: type[NeurosurgeonError], code: int) -> None:
    assert branch.exit_code == code


@pytest.mark.parametrize("kind", TREE)
def test_an_error_has_the_exit_code_of_its_branch(kind: type[NeurosurgeonError]) -> None:
    branch = next(
        (top for top in (AccessError, UsageError, PlanningError, NetworkError) if issubclass(kind, top)),
        NeurosurgeonError,
    )
    assert kind.exit_code == branch.exit_code


def test_the_drawing_shows_every_error_and_nothing_else() -> None:
    drawn = set(re.findall(r"\w+Error", errors.__doc__ or ""))
    assert drawn == {kind.__name__ for kind in TREE}


@pytest.mark.parametrize("kind", [NetworkError, ConnectError, PeerGoneError, DeadlineError, ProtocolError, AccessError])
def test_a_failed_peer_or_network_is_a_connection_loss(kind: type[Exception]) -> None:
    assert is_connection_loss(kind("lost"))


@pytest.mark.parametrize("kind", [RemoteError, BusyError, UsageError, InternalError, AttributeError, KeyError, OSError])
def test_no_other_error_is_a_connection_loss(kind: type[Exception]) -> None:
    assert not is_connection_loss(kind("not lost"))


@pytest.mark.parametrize("kind", TREE)
def test_every_error_has_a_docstring(kind: type[NeurosurgeonError]) -> None:
    assert kind.__doc__
