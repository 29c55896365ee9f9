"""The tree of errors: one root, an exit code for each branch, and the drawing at the top of its file."""

from __future__ import annotations

import inspect
import re

import pytest

from utils import errors
from utils.errors import AccessError, NetworkError, NeurosurgeonError, PlanningError, UsageError

TREE = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]


def test_every_error_hangs_on_one_tree() -> None:
    assert all(issubclass(kind, NeurosurgeonError) for kind in TREE)


@pytest.mark.parametrize(
    ("branch", "code"),
    [(NeurosurgeonError, 1), (UsageError, 2), (PlanningError, 1), (NetworkError, 3), (AccessError, 4)],
)
def test_a_branch_has_the_exit_code_of_the_contract(branch: type[NeurosurgeonError], code: int) -> None:
    assert branch.exit_code == code


@pytest.mark.parametrize("kind", TREE)
def test_an_error_exits_as_its_branch_does(kind: type[NeurosurgeonError]) -> None:
    branch = next(
        (top for top in (AccessError, UsageError, PlanningError, NetworkError) if issubclass(kind, top)),
        NeurosurgeonError,
    )
    assert kind.exit_code == branch.exit_code


def test_the_drawing_shows_every_error_and_nothing_else() -> None:
    drawn = set(re.findall(r"\w+Error", errors.__doc__ or ""))
    assert drawn == {kind.__name__ for kind in TREE}


@pytest.mark.parametrize("kind", TREE)
def test_every_error_says_what_it_is_for(kind: type[NeurosurgeonError]) -> None:
    assert kind.__doc__
