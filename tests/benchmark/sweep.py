"""Whole families of networks, and small hard ones: each cut at six places, and compared with the user's own module.

    python -m tests.benchmark.sweep [FAMILY ...] [--only TEXT] [--limit N] [--every N] [--jobs N] [--timeout S]

Families: hard, "by name" (networks that the engine knows), torchvision, timm, transformers, ultralytics, segmentation,
torchaudio (default: hard); all but the second are given as modules of the user. Each network runs in a process of its
own. Rows are JSON lines in results/sweep.jsonl; a network whose row was made by the same code is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from neurosurgeon.cli.process import ROOT
from tests.benchmark.common import RESULTS

CODE = ("neurosurgeon/graph", "neurosurgeon/models", "neurosurgeon/engine", "tests/models/hard")
VERDICTS = ("right", "wrong", "refused", "crash", "over time", "unusable")
PRELOADED = ["tests.benchmark.sweep_warm"]  # in the process that forks all others
ENDS_WITHIN_S = 5.0  # a process whose row is here
SHOWN = 240  # characters of a message

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    families = options.families or ["hard"]
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sweep_cache_")  # each network is traced and checked again
    code, route = code_digest(), "module" if options.as_module else "file"
    known = {} if options.again else {key_of(row): row for row in kept_rows() if row["code"] == code}
    todo = [(family, name) for family in families for name in chosen(family, options)]
    run = partial(_run_unless_known, known, code, route, options.timeout)
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(run, todo))
    print()
    for line in table(rows):
        print(line)
    return 0 if all(row["as_wanted"] for row in rows if row["verdict"] != "unusable") else 1


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arguments = argparse.ArgumentParser(prog="python -m tests.benchmark.sweep", description=__doc__.partition("\n")[0])
    arguments.add_argument("families", nargs="*", metavar="FAMILY", help="families (default: hard)")
    arguments.add_argument("--only", default="", help="only names that contain this text (default: all)")
    arguments.add_argument("--limit", type=int, help="at most so many networks of a family (default: all)")
    arguments.add_argument("--every", type=int, default=1, help="every n-th network of a family (default: 1)")
    arguments.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    arguments.add_argument("--timeout", type=float, default=300.0, help="seconds for each network (default: 300)")
    arguments.add_argument("--again", action="store_true", help="run known networks again (default: skip them)")
    arguments.add_argument("--as-module", action="store_true", help="give the module itself (default: a model file)")
    return arguments


def chosen(family: str, options: argparse.Namespace) -> list[str]:
    """Return the names of the networks to run."""
    from tests.benchmark.sweep_families import FAMILIES

    names = [name for name in FAMILIES[family].names() if options.only in name]
    return names[:: options.every][: options.limit]


# ---------------------------------------------------------------- one network, one process


def _run_unless_known(
    known: dict[tuple[str, ...], Row], code: str, route: str, timeout_s: float, network: tuple[str, str]
) -> Row:
    kept = known.get((*network, route))
    if kept is not None:
        return kept
    row = {**in_own_process(*network, route == "file", timeout_s), "code": code, "route": route}
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "sweep.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(line_of(row), flush=True)
    return row


def in_own_process(family: str, name: str, as_file: bool, timeout_s: float) -> Row:
    """Return the row of a network, judged in a new process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_judge_and_send, args=(sender, family, name, as_file))
    start_s = time.monotonic()
    process.start()
    sender.close()
    row: Row = {"family": family, "name": name, "as_wanted": False, "verdict": "over time", "message": ""}
    try:
        if receiver.poll(timeout_s):
            row |= receiver.recv()
    except EOFError:
        process.join()
        row |= {"verdict": "crash", "message": f"the process ended with code {process.exitcode}"}
    process.join(0 if row["verdict"] == "over time" else ENDS_WITHIN_S)
    process.kill()
    process.join()
    return row | {"seconds": round(time.monotonic() - start_s, 1)}


def _judge_and_send(sender: Connection, family: str, name: str, as_file: bool) -> None:
    """Judge a network, and send its row. Called in a process of its own."""
    from tests.benchmark.sweep_families import find
    from tests.benchmark.sweep_judge import judge

    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    torch.set_num_threads(1)
    try:
        row = judge(family, find(family, name), as_file=as_file)
    except Exception as exc:  # of the network's own package
        where = traceback.extract_tb(exc.__traceback__)[-1]
        message = f"{type(exc).__name__}: {exc}"[:300] + f" ({where.filename}, line {where.lineno})"
        row = {"verdict": "unusable", "message": message}
    sender.send(row)


# ---------------------------------------------------------------- rows


def key_of(row: Row) -> tuple[str, ...]:
    """Return what names the network of a row, and how it was given."""
    return row["family"], row["name"], row["route"]


def kept_rows() -> list[Row]:
    """Return the rows of earlier runs."""
    path = RESULTS / "sweep.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def code_digest() -> str:
    """Return a digest of the code on which the rows depend."""
    total = hashlib.sha256(torch.__version__.encode())
    files = [file for directory in CODE for file in (ROOT / directory).glob("*.py")]
    for file in sorted([*files, *(ROOT / "tests" / "benchmark").glob("sweep*.py")]):
        total.update(file.read_bytes())
    return total.hexdigest()[:16]


def line_of(row: Row) -> str:
    """Return one line about a network."""
    figures = f"{row['difference']:.1e}" if "difference" in row else ""
    nodes = f"{row['tracer']} {row['nodes']} nodes {row['trace_s']:.1f} s" if "tracer" in row else ""
    mark = " " if row["as_wanted"] else "?" if row["verdict"] == "unusable" else "!"
    verdict = f"{row['verdict']}{' (sensitive)' if row.get('sensitive') else ''}"
    text = f"{mark} {row['family']} {row['name']}: {verdict} {figures} {nodes} {row.get('message', '')}"
    return text.replace("\n", " ")[:SHOWN] + (f" [names no {', no '.join(row['lacks'])}]" if row.get("lacks") else "")


def table(rows: Iterable[Row]) -> Iterable[str]:
    """Yield the lines of the table: the verdicts of each family, and the networks that are not as wanted."""
    rows = list(rows)
    yield f"{'family':<14}{'tried':>7}{'as wanted':>11}" + "".join(f"{verdict:>11}" for verdict in VERDICTS)
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        counts = Counter(row["verdict"] for row in own)
        wanted = sum(row["as_wanted"] for row in own)
        yield f"{family:<14}{len(own):>7}{wanted:>11}" + "".join(f"{counts[verdict]:>11}" for verdict in VERDICTS)
    for verdict in VERDICTS:
        others = [row for row in rows if row["verdict"] == verdict and not row["as_wanted"]]
        if others:
            yield f"\n{verdict}, and not as wanted: {len(others)}"
            yield from map(line_of, others)
    unclear = [row for row in rows if len(row.get("lacks", ())) > 1]
    yield f"\nrefusals that name neither a line nor a cure: {len(unclear)} of {sum('lacks' in row for row in rows)}"


if __name__ == "__main__":
    sys.exit(main())
