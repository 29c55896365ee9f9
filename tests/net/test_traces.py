"""Traces: a written one is read again, the shipped ones are as generated, and a wrong line is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from neurosurgeon.cli.process import ROOT
from neurosurgeon.cli.relay import traces
from neurosurgeon.net.traces import SHAPES, Condition, Trace, made_up, read_trace, write_trace
from neurosurgeon.utils.errors import UsageError


def trace_of(tmp_path: Path, text: str) -> Trace:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return read_trace(path)


def test_each_line_holds_until_the_next(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, "# recorded on a train\nseconds,mbit_per_s,rtt_ms\n\n1,20,10\n5.5,5,30\n")
    assert [trace.at(time_s).rate_mbit for time_s in (0, 1, 5.49, 5.5, 1e9)] == [20, 20, 20, 5, 5]
    assert trace.at(6) == Condition(5.5, 5.0, 30.0)


def test_a_trace_needs_no_names(tmp_path: Path) -> None:
    assert trace_of(tmp_path, "0,20,10").conditions == [Condition(0.0, 20.0, 10.0)]


MISTAKES = {
    "": "no line of seconds, mbit_per_s, rtt_ms",
    "seconds,mbit_per_s,rtt_ms\n": "no line of",
    "0,20,10\n0,5,10": "line 2: time 0 s does not come after 0 s: sort the lines",
    "0,20,10\n5,20,10\n4,20,10": "line 3: time 4 s does not come after 5 s",
    "-1,20,10": "line 1: time -1 s is negative",
    "0,0,10": "rate 0 Mbit/s: nothing would ever arrive; write an outage as 0.01",
    "0,-5,10": "rate -5 Mbit/s",
    "0,20,-1": "round trip -1 ms is not between 0 and 3000",
    "0,20,60000": "round trip 60000 ms is not between",
    "0,20": "'0,20' is not three numbers",
    "0,20,10,5": "is not three numbers",
    "0,20,fast": "line 1: '0,20,fast' is not three numbers",
    "0,nan,10": "is not three numbers",
    "0,20,10\nseconds,mbit_per_s,rtt_ms": "line 2: 'seconds,mbit_per_s,rtt_ms' is not three numbers",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_wrong_line_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError) as raised:
        trace_of(tmp_path, text)
    assert MISTAKES[text] in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_trace(tmp_path / "nowhere.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        read_trace(tmp_path / "binary.csv")


@pytest.mark.parametrize("name", SHAPES)
def test_a_written_trace_is_read_again(tmp_path: Path, name: str) -> None:
    trace = made_up(name)
    write_trace(tmp_path / "trace.csv", trace, "made up")
    again = read_trace(tmp_path / "trace.csv")
    assert all(again.at(time_s)[1:] == trace.at(time_s)[1:] for time_s in range(40))


def test_the_shipped_traces_are_as_generated(tmp_path: Path) -> None:
    assert traces([str(tmp_path)]) == 0
    made, shipped = ({path.name: path.read_text() for path in folder.glob("*.csv")} for folder in (tmp_path, TRACES))
    assert made == shipped


TRACES = ROOT / "traces"


@pytest.mark.parametrize(
    ("start_s", "size_bytes", "transfer_s"),
    [(0.0, 500_000, 0.5), (0.5, 1_000_000, 1.0), (1.5, 750_000, 1.0), (9.0, 500_000, 1.0), (-1.0, 1_000_000, 1.0)],
)
def test_a_transfer_meets_the_rates_of_its_time(start_s: float, size_bytes: float, transfer_s: float) -> None:
    """Two seconds at 1 MB/s, then half of it."""
    trace = Trace([Condition(0.0, 8.0, 0.0), Condition(1.0, 8.0, 0.0), Condition(2.0, 4.0, 0.0)])
    assert trace.transfer_s(start_s, size_bytes) == pytest.approx(transfer_s)
