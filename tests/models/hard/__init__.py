"""Small hard modules, each with the verdict that a user wants, and pairs of modules for the digests."""

from tests.models.hard.chance import CONTEXTS, RANDOM
from tests.models.hard.constants import CONSTANTS, STATES
from tests.models.hard.decisions import DECISIONS
from tests.models.hard.functions import FUNCTIONS
from tests.models.hard.hooks import HOOKS, PATCHED
from tests.models.hard.in_place import IN_PLACE
from tests.models.hard.kinds import KINDS
from tests.models.hard.memory_order import MEMORY_ORDER
from tests.models.hard.norms import NORMS, PARAMETERS
from tests.models.hard.numbers import NUMBERS
from tests.models.hard.outputs import INPUTS, OUTPUTS
from tests.models.hard.table import Hard, Table

TABLES = (
    *(IN_PLACE, CONSTANTS, STATES, MEMORY_ORDER, NORMS, PARAMETERS, HOOKS, PATCHED, RANDOM, CONTEXTS),
    *(DECISIONS, OUTPUTS, INPUTS, NUMBERS, KINDS, FUNCTIONS),
)
HARD: tuple[Hard, ...] = tuple(row for table in TABLES for row in table)

__all__ = ["HARD", "TABLES", "Hard", "Table"]
