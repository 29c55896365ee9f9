"""The console command: `neurosurgeon COMMAND ...`, or `python -m neurosurgeon COMMAND ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from neurosurgeon.cli.parser import Parser, add_version
from neurosurgeon.cli.process import script


class Command(NamedTuple):
    """The module and the function of a command's body, and its summary for --help."""

    module: str  # of neurosurgeon.cli
    summary: str
    function: str = "main"


COMMANDS = {
    "cloud": Command("cloud", "serve split inference to any number of edges"),
    "edge": Command("edge", "run one task, split where it is fastest"),
    "tasks": Command("tasks_edge", "run a queue of tasks"),
    "plan": Command("deployment", "choose a cut for a link, or compare strategies"),
    "layers": Command("layers", "measure every layer of a network here"),
    "collect": Command("collect", "measure this machine for the predictors"),
    "fit": Command("predictors", "fit the predictors again"),
    "evaluate": Command("evaluate", "measure the error of the predictors"),
    "doctor": Command("doctor", "find out why edge and cloud do not work together"),
    "certs": Command("certs", "make certificates for TLS"),
    "demo": Command("demo", "run the four classic networks, edge and cloud on this machine"),
    "monitor-server": Command("monitor", "serve bandwidth measurements", "server"),
    "monitor-client": Command("monitor", "measure the link to a cloud", "client"),
    "monitor-test": Command("monitor", "test the bandwidth monitor", "test"),
    "relay": Command("relay", "emulate a network between edge and cloud", "relay"),
    "traces": Command("relay", "write the synthetic network traces", "traces"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    command = COMMANDS.get(arguments[0]) if arguments else None
    if command:
        return script(command.module, f"neurosurgeon {arguments[0]}", command.function)(arguments[1:])
    parser = Parser(prog="neurosurgeon", description="Split a network between an edge device and a cloud.")
    add_version(parser)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, known in COMMANDS.items():
        commands.add_parser(name, help=known.summary, add_help=False)
    parser.parse_args(arguments)  # it ends the process: with the help, or with the error
    return 0
