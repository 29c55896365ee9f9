"""A queue on a changing network: its cuts against those of a clairvoyant who knows the network's future.

    python -m tests.benchmark.following [-t MODEL ...] [--trace FILE.csv ...] [--unseen N] [--no-hedging] [--real]

Tasks come every quarter of a second, one at a time. Time is virtual. The time of a task follows from the trace, byte by
byte, and from the latencies of the shipped predictors; the edge's are multiplied by ten, as on a small board. Planner,
filter, hysteresis and hedging are the project's own. Probes have an error of 3 %, the rates of transfers one of 5 %,
and one in twenty is wrong by a factor of two. Compared are

    clairvoyant   the best cut of each task, for the network during the task
    following     tasks_edge_api.py; against the clairvoyant's cuts for the same tasks, and against the best cuts for
                  the network at each task's start, without knowledge of later changes
    once a task   a full measurement before each task, which then waits for it
    at the start  the plan of the first second, never changed

Hedged are tasks that were stalled on their way, and whose rest the edge computed; in vain, if the cloud was first. What
such a task sent still crosses, before what comes later. Begun again were tasks whose long edge partition was left for
another cut, because the link was back. The shipped traces were there when the project was tuned; --unseen replays
variations of the same shapes: other seeds, times, speeds, rates and round trips.

Reaction: the time from a change that makes another cut faster to the start of the first task with a cut within 5 % of
the best; ideally the rest of the running task, and a second. --real runs tasks_edge_api.py on this machine, through the
relay, and compares its totals with those of the same cuts in virtual time; a task that was moved to the other side
counts as measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from neurosurgeon.cli.process import ROOT, ServiceProcess
from neurosurgeon.edge.queue import LONG_PARTITION_MS, REPLAN_MS
from neurosurgeon.models.names import ZOO
from neurosurgeon.net import link_watch
from neurosurgeon.net.bandwidth import Echo
from neurosurgeon.net.link_watch import LinkWatch
from neurosurgeon.net.traces import SHAPES, Condition, Trace, made_up, read_trace
from neurosurgeon.planner.chain_search import Objective
from neurosurgeon.planner.flow_shop import Pipeline
from neurosurgeon.planner.hedge import Hedging, TransferProgress
from neurosurgeon.planner.plan import SplitPlan, plan_split
from neurosurgeon.planner.queue import Choice, Chooser, replan_whole_task
from neurosurgeon.planner.transfer import frame_bytes
from neurosurgeon.predictor.store import find_predictor
from neurosurgeon.utils.link import LinkEstimate
from neurosurgeon.utils.units import mbit_per_s_to_bytes_per_s
from tests.benchmark.common import save
from tests.networks import model_graph

LENGTH_S, PERIOD_S, POLL_S = 30.0, 0.25, 0.01
PROBE_BYTES, QUICK_BYTES, PROBE_RTTS = 150_000, 25_000, 14
PROBE_NOISE, TRANSFER_NOISE, OUTLIERS, OUTLIER_FACTOR = 0.03, 0.05, 0.05, 2.0
CLOSE = 1.05  # of the best total
STEP = 1.5  # a sudden change of the rate by this factor


@dataclass
class World:
    """A network over time, and the latencies of a model's cuts on both sides."""

    trace: Trace
    model: str
    slowdown: float = 1.0  # of the edge

    def __post_init__(self) -> None:
        self.graph = model_graph(self.model)
        self.edge, self.cloud = (find_predictor(side).predict(self.graph) for side in ("edge", "cloud"))
        self.edge = self.edge.scaled(self.slowdown)
        self.plans: dict[tuple[float, float], SplitPlan] = {}

    def plan(self, link: LinkEstimate) -> SplitPlan:
        """Return the plan for a link, to a few per mille and a tenth of a ms: about as long is one kept in a queue."""
        rate, exchange = float(f"{link.rate_bytes_per_s:.3g}"), round(link.exchange_ms, 1)
        if (rate, exchange) not in self.plans:
            self.plans[rate, exchange] = plan_split(self.graph, self.edge, self.cloud, rate, exchange)
        return self.plans[rate, exchange]

    def link(self, time_s: float) -> LinkEstimate:
        """Return the network at a time."""
        condition = self.trace.at(time_s)
        return LinkEstimate(mbit_per_s_to_bytes_per_s(condition.rate_mbit), condition.rtt_ms, error=0.01)

    def crossed_bytes(self, start_s: float, end_s: float) -> float:
        """Return the number of bytes that the link carries between two times."""
        crossed, time_s = 0.0, start_s
        for condition in self.trace.conditions:
            if start_s < condition.time_s < end_s:
                crossed += self.link(time_s).rate_bytes_per_s * (condition.time_s - time_s)
                time_s = condition.time_s
        return crossed + max(self.link(time_s).rate_bytes_per_s * (end_s - time_s), 0.0)

    def stages_s(self, start_s: float, point: int) -> tuple[float, float, float]:
        """Return the times of edge, transfer and cloud of a task that starts at a time."""
        candidate = self.plan(self.link(start_s)).candidates[point]
        edge_s, cloud_s = candidate.busy.edge_ms / 1e3, candidate.busy.cloud_ms / 1e3
        if not candidate.boundary_bytes:
            return edge_s, 0.0, 0.0
        return edge_s, sum(self.transfers_s(start_s + edge_s, candidate.boundary_bytes)), cloud_s

    def transfers_s(self, sent_s: float, crossing_bytes: int) -> tuple[float, float]:
        """Return the time of a tensor on the uplink, and of its reply, with the round trip."""
        up_s = self.trace.transfer_s(sent_s, frame_bytes(crossing_bytes))
        down_s = frame_bytes(self.graph.outputs_bytes) / self.link(sent_s + up_s).rate_bytes_per_s
        return up_s, down_s + self.link(sent_s).rtt_ms / 1e3

    def total_s(self, start_s: float, point: int) -> float:
        """Return the latency of a task that starts at a time."""
        return sum(self.stages_s(start_s, point))

    def best(self, start_s: float) -> tuple[float, int]:
        """Return the smallest latency of a task that starts at a time, and its cut."""
        return min((self.total_s(start_s, point), point) for point in range(len(self.graph.layers) + 1))


@dataclass
class Task:
    """A task that has run."""

    start_s: float
    point: int  # with which it began
    total_s: float


Strategy = Callable[[float], tuple[int, float]]  # from the time: the cut, and how long choosing it took, s


def run(world: World, choose: Strategy) -> list[Task]:
    """Run tasks through a trace."""
    tasks: list[Task] = []
    time_s = 0.0
    while time_s < LENGTH_S:
        point, choosing_s = choose(time_s)
        task = Task(time_s, point, choosing_s + world.total_s(time_s + choosing_s, point))
        tasks.append(task)
        time_s = max(time_s + task.total_s, (len(tasks)) * PERIOD_S)
    return tasks


@dataclass
class Sent:
    """A tensor that is being sent to the virtual cloud, and its reply."""

    chosen: Choice
    start_s: float  # of its transfer, after earlier ones
    sent_s: float
    received_s: float
    answer_s: float
    is_wanted: bool = True


class Follower:
    """tasks_edge_api.py in virtual time: its watch, its filter, its chooser, its hedging."""

    def __init__(self, world: World, *, hedges: bool = True) -> None:
        self.world = world
        self.hedges = hedges
        self.draw = random.Random(7)
        self.time_s = 0.0
        self.sent: list[Sent] = []
        self.sent_bytes = self.hedged = self.in_vain = self.begun_again = 0
        self.next_tick_s = link_watch.INTERVAL_S
        self.refresh_s: float | None = None  # when the measurement that runs will end
        self.was_sending_bytes = 0  # when it began
        self.chooser = Chooser(Objective.LATENCY, [world.model] * round(LENGTH_S / PERIOD_S + 2))
        self.hedging = Hedging()
        clock = mock.patch.object(link_watch, "now_ms", lambda: self.time_s * 1e3)
        measuring = mock.patch.object(link_watch, "measure_link", self.measure)
        pinging = mock.patch.object(link_watch, "ping_link", self.ping)
        self.patches = [clock, measuring, pinging]
        for patch in self.patches:
            patch.start()
        self.watch = LinkWatch("cloud", 1, world.link(0.0), sending_bytes=lambda: self.was_sending_bytes)

    def close(self) -> None:
        for patch in self.patches:
            patch.stop()

    def noisy(self, value: float, noise: float) -> float:
        return value * 2.718281828 ** self.draw.gauss(0.0, noise)

    def measure(self, *service: object, use_udp: bool, quick: bool, on_connect: object) -> LinkEstimate:
        link = self.world.link(self.time_s)
        return link._replace(rate_bytes_per_s=self.noisy(link.rate_bytes_per_s, PROBE_NOISE), error=0.05)

    def ping(self, *service: object, on_connect: object) -> Echo:
        return Echo(self.world.link(self.time_s).rtt_ms, 0.0)

    # ------------------------------------------------------------ tasks

    def run(self) -> list[Task]:
        """Run tasks through the trace."""
        tasks: list[Task] = []
        while self.time_s < LENGTH_S:
            tasks.append(self.run_task())
            self.advance(max(self.time_s, len(tasks) * PERIOD_S))
        return tasks

    def run_task(self) -> Task:
        start_s = self.time_s
        begun = self.chooser.choose(lambda model: self.plan(), self.under_way())
        chosen = self.compute(begun)
        end_s = self.wait_for(self.send(chosen)) if chosen.candidate.boundary_bytes else self.time_s
        return Task(start_s, begun.candidate.point, end_s - start_s)

    def plan(self) -> SplitPlan:
        return self.world.plan(self.watch.now().link)

    def under_way(self) -> Pipeline:
        waits_ms = [self.way(sent).left_ms for sent in self.sent] if self.hedges else []
        return Pipeline(link_ms=max(waits_ms, default=0.0))

    def compute(self, chosen: Choice) -> Choice:
        """Compute an edge partition, layer by layer; return what was chosen for good, as `edge.queue` does."""
        start_s, looked_s, edge_s = self.time_s, self.time_s, chosen.candidate.busy.edge_ms / 1e3
        ends_ms = list(itertools.accumulate(self.world.edge.latency_ms[: chosen.candidate.point]))
        for end_ms in ends_ms[:-1] if self.hedges and edge_s > LONG_PARTITION_MS / 1e3 else ():  # between two layers
            self.advance(start_s + end_ms / 1e3)
            if self.time_s - looked_s < REPLAN_MS / 1e3:
                continue
            looked_s = self.time_s
            better = replan_whole_task(chosen, (self.time_s - start_s) * 1e3, self.plan(), self.under_way())
            if better:
                self.begun_again += 1
                self.advance(self.time_s + better.candidate.busy.edge_ms / 1e3)
                return better
        self.advance(start_s + edge_s)
        return chosen

    def send(self, chosen: Choice) -> Sent:
        start_s = max([self.time_s, *(sent.received_s for sent in self.sent)])
        up_s, back_s = self.world.transfers_s(start_s, chosen.candidate.boundary_bytes)
        answer_s = start_s + up_s + back_s + chosen.candidate.busy.cloud_ms / 1e3
        self.sent.append(Sent(chosen, start_s, self.time_s, start_s + up_s, answer_s))
        return self.sent[-1]

    def wait_for(self, sent: Sent) -> float:
        """Return the time at which the task has its result, from the cloud or the edge."""
        while sent in self.sent:
            if self.hedges and self.hedging.should_hedge(self.way(sent), sent.chosen.rest_ms):
                sent.is_wanted = False
                here_s = self.time_s + sent.chosen.rest_ms / 1e3
                self.hedged += 1
                self.in_vain += here_s > sent.answer_s
                self.advance(min(here_s, sent.answer_s))
                self.hedging.record_outcome(was_first=here_s <= sent.answer_s)
                return self.time_s
            self.advance(min(self.time_s + POLL_S, sent.answer_s))
        return sent.answer_s

    # ------------------------------------------------------------ events beside the tasks

    def advance(self, time_s: float) -> None:
        """Advance the time: measurements begin and end, replies arrive, transfer progress is checked."""
        while True:
            self.tick()
            for sent in [sent for sent in self.sent if sent.answer_s <= self.time_s]:
                self.sent.remove(sent)
                self.hear(sent)
            self.look()
            if self.time_s >= time_s:
                return
            self.time_s = min([self.time_s + POLL_S, time_s, *(sent.answer_s for sent in self.sent)])

    def tick(self) -> None:
        """Run the link watch, as every second. Probes run beside tasks, and take time on the link."""
        if self.refresh_s is None and (self.time_s >= self.next_tick_s or (self.watch.wants_probe and not self.sent)):
            link = self.world.link(self.time_s)
            probe_s = PROBE_RTTS * link.rtt_ms / 1e3 + self.world.trace.transfer_s(self.time_s, QUICK_BYTES)
            self.was_sending_bytes = max((sent.chosen.candidate.boundary_bytes for sent in self.sent), default=0)
            self.refresh_s = self.time_s + (link.rtt_ms / 1e3 if self.sent else probe_s)
        if self.refresh_s is not None and self.time_s >= self.refresh_s:
            self.watch.refresh()
            self.refresh_s = None
            while self.next_tick_s <= self.time_s:
                self.next_tick_s += link_watch.INTERVAL_S

    def hear(self, sent: Sent) -> None:
        if sent.is_wanted:
            rtt_ms = self.world.link(sent.start_s).rtt_ms
            self.watch.record_exchange(rtt_ms + 4_512e3 / self.world.link(self.time_s).rate_bytes_per_s, 4_000)
        factor = OUTLIER_FACTOR ** self.draw.choice((-1, 1)) if self.draw.random() < OUTLIERS else 1.0
        receive_ms = (sent.received_s - sent.start_s) * 1e3 * factor
        self.watch.record_transfer(sent.chosen.candidate.boundary_bytes, self.noisy(receive_ms, TRANSFER_NOISE))
        self.sent_bytes += frame_bytes(sent.chosen.candidate.boundary_bytes)

    def look(self) -> None:
        """Look how far the tensors are, as `edge.queue` does."""
        left_bytes = self.left_bytes(self.sent[-1]) if self.sent else 0
        acked_bytes = self.sent_bytes + sum(map(self.size_bytes, self.sent)) - left_bytes
        self.hedging.record_progress(self.time_s * 1e3, acked_bytes, left_bytes, self.watch.now().link.rtt_ms)
        moved = self.hedging.recent_transfer()
        if self.hedges and moved:
            self.watch.record_progress(*moved, left_bytes)

    def size_bytes(self, sent: Sent) -> int:
        return frame_bytes(sent.chosen.candidate.boundary_bytes)

    def left_bytes(self, last: Sent) -> int:
        """Return how much is not acknowledged of a tensor and of those before it."""
        heard_s = self.time_s - self.world.link(self.time_s).rtt_ms / 1e3
        before = self.sent[: self.sent.index(last) + 1]
        crossed = [self.world.crossed_bytes(sent.start_s, heard_s) for sent in before]
        sizes = map(self.size_bytes, before)
        return round(sum(size - min(size, done) for size, done in zip(sizes, crossed, strict=True)))

    def way(self, sent: Sent) -> TransferProgress:
        predicted_ms = sent.chosen.predicted.transfer_ms + sent.chosen.predicted.cloud_ms
        return self.hedging.progress_of(self.time_s * 1e3, sent.sent_s * 1e3, predicted_ms, self.left_bytes(sent))


def once_a_task(world: World) -> Strategy:
    """Measure in full, then plan; the task waits."""
    draw = random.Random(7)

    def choose(time_s: float) -> tuple[int, float]:
        link = world.link(time_s)
        choosing_s = PROBE_RTTS * link.rtt_ms / 1e3 + world.trace.transfer_s(time_s, PROBE_BYTES)
        link = world.link(time_s + choosing_s)
        seen = link._replace(rate_bytes_per_s=link.rate_bytes_per_s * 2.718281828 ** draw.gauss(0.0, PROBE_NOISE))
        return world.plan(seen).best.point, choosing_s

    return choose


def reactions_s(world: World, tasks: Sequence[Task]) -> list[tuple[float, float]]:
    """Return the reaction and its limit, s, for each step of the trace after which another cut is faster."""
    found = []
    ends_s = [*(condition.time_s for condition in world.trace.conditions[2:]), LENGTH_S]
    for (before, after), end_s in zip(itertools.pairwise(world.trace.conditions), ends_s, strict=True):
        ratio = after.rate_mbit / before.rate_mbit
        step_s = after.time_s
        last = [task for task in tasks if task.start_s < step_s]
        following = [task for task in tasks if step_s <= task.start_s < end_s]
        if not (last and following) or 1 / STEP < ratio < STEP:
            continue
        if world.total_s(step_s, last[-1].point) <= CLOSE * world.best(step_s)[0]:
            continue
        running_s = max(last[-1].start_s + last[-1].total_s - step_s, 0.0)
        good = [task for task in following if task.total_s <= CLOSE * world.best(task.start_s)[0]]
        first = following[0]
        limit_s = 1.0 + max(running_s, 0.0) + max(first.total_s, PERIOD_S)
        found.append(((good[0].start_s if good else end_s) - step_s, limit_s))
    return found


def changes(tasks: Sequence[Task]) -> int:
    return sum(before.point != after.point for before, after in itertools.pairwise(tasks))


def compare(name: str, trace: Trace, model: str, slowdown: float, *, hedges: bool = True) -> dict[str, Any]:
    """Run all strategies on one trace; print and return the figures."""
    world = World(trace, model, slowdown)
    follower = Follower(world, hedges=hedges)
    runs = {"following": follower.run()}
    follower.close()
    first = world.plan(world.link(0.0)).best.point
    runs["clairvoyant"] = run(world, lambda time_s: (world.best(time_s)[1], 0.0))
    runs["once a task"] = run(world, once_a_task(world))
    runs["at the start"] = run(world, lambda time_s: (first, 0.0))
    means = {strategy: statistics.fmean(task.total_s for task in tasks) * 1e3 for strategy, tasks in runs.items()}
    # the same tasks at the same times, each with its best cut: the loss by cuts only
    own_best = statistics.fmean(world.best(task.start_s)[0] for task in runs["following"]) * 1e3
    present = [(task.start_s, world.plan(world.link(task.start_s)).best.point) for task in runs["following"]]
    own_present = statistics.fmean(itertools.starmap(world.total_s, present)) * 1e3
    reactions = reactions_s(world, runs["following"])
    row = {
        "trace": name,
        "model": model,
        "mean_ms": means,
        "to_clairvoyant": means["following"] / own_best,
        "to_present": means["following"] / own_present,
        "start_to_clairvoyant": means["at the start"] / means["clairvoyant"],
        "task_to_clairvoyant": means["once a task"] / means["clairvoyant"],
        "changes": changes(runs["following"]),
        "clairvoyant_changes": changes(runs["clairvoyant"]),
        "reactions_s": reactions,
        "hedged": follower.hedged,
        "hedged_in_vain": follower.in_vain,
        "begun_again": follower.begun_again,
    }
    slowest = max((reaction for reaction, _ in reactions), default=0.0)
    in_time = sum(reaction <= limit for reaction, limit in reactions)
    print(
        f"{name:<14}{model:<12}{means['clairvoyant']:>9.1f}{means['following']:>9.1f}{row['to_clairvoyant']:>8.3f}{row['to_present']:>8.3f}"
        f"{row['task_to_clairvoyant']:>9.2f}{row['start_to_clairvoyant']:>9.2f}{row['changes']:>9}"
        f"{row['clairvoyant_changes']:>6}{slowest:>9.2f}{in_time:>5} of {len(reactions)}"
        f"{follower.hedged:>6}{follower.in_vain:>9}{follower.begun_again:>6}",
        flush=True,
    )
    return row


def unseen(count: int) -> Iterator[tuple[str, Trace]]:
    """Yield ``count`` variations of each synthetic trace: other seeds, times, speeds, rates and round trips."""
    for name, seed in itertools.product(SHAPES, range(1, count + 1)):
        draw, trace = random.Random(f"{name} {seed}"), made_up(name, 1_000 + seed)
        shift_s, speed = draw.uniform(0.0, LENGTH_S), draw.uniform(0.7, 1.4)
        rate, rtt = draw.uniform(0.5, 2.0), draw.uniform(0.5, 2.0)
        steps_s = [index / 10 for index in range(round(10 * LENGTH_S))]
        found = [(time_s, trace.at((shift_s + speed * time_s) % LENGTH_S)) for time_s in steps_s]
        yield f"{name}-{seed}", Trace([Condition(time_s, rate * at.rate_mbit, rtt * at.rtt_ms) for time_s, at in found])


def run_for_real(path: Path, model: str, *, hedges: bool) -> None:
    """Run the queue through the shaper on this machine, and print the means of its tasks, and of the same cuts here."""
    with ServiceProcess(["tasks_cloud_api.py", "-p", "0", "--monitor-port", "0"], services=2) as cloud:
        flags = ["-p", str(cloud.ports[0]), "--monitor-port", str(cloud.ports[1]), "--in-flight", "1"]
        command = [sys.executable, "tasks_edge_api.py", *flags, "-t", model, "--tasks", "150", "--json"]
        command += [] if hedges else ["--no-hedging"]
        done = subprocess.run([*command, "--trace", str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    tasks = json.loads(done.stdout)["tasks"]
    world = World(read_trace(path), model)
    starts_s = [task["spans_ms"]["edge"][0] / 1e3 for task in tasks]
    changed = set(map(int, re.findall(r"task (\d+) (?:is stalled|starts again|is sent again)", done.stderr)))
    is_hedged = [task["id"] in changed for task in tasks]
    virtual = [
        task["measured"]["total_ms"] / 1e3 if hedged else world.total_s(start, task["partition_point"])
        for start, task, hedged in zip(starts_s, tasks, is_hedged, strict=True)
    ]
    best = [world.best(start)[0] for start in starts_s]
    measured_ms = statistics.fmean(task["measured"]["total_ms"] for task in tasks)
    virtual_ms, best_ms = 1e3 * statistics.fmean(virtual), 1e3 * statistics.fmean(best)
    print(
        f"{path.stem:<14}{model:<12} for real: {len(tasks)} tasks in {starts_s[-1]:.1f} s, mean {measured_ms:.1f} ms;"
        f" in virtual time {virtual_ms:.1f} ms, the best cuts {best_ms:.1f} ms: {virtual_ms / best_ms:.3f};"
        f" {sum(is_hedged)} went another way",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-t", "--type", nargs="+", default=["alex_net", "vgg_net", "mobile_net"], choices=list(ZOO))
    parser.add_argument("--trace", type=Path, nargs="+", help="replay these files (default: the shipped ones)")
    parser.add_argument("--unseen", type=int, metavar="N", help="replay N variations of each synthetic trace instead")
    parser.add_argument(
        "--no-hedging", action="store_true", help="wait for the cloud, however long a transfer is stalled"
    )
    parser.add_argument("--real", action="store_true", help="run tasks_edge_api.py through the shaper instead")
    parser.add_argument("--slowdown", type=float, default=10.0, help="of the edge (default: 10)")
    args = parser.parse_args()
    files = args.trace or [ROOT / "traces" / f"{name}.csv" for name in SHAPES]
    if args.real:
        for path, model in itertools.product(files, args.type):
            run_for_real(path, model, hedges=not args.no_hedging)
        return
    print(
        f"{'':<26}{'mean latency, ms':>18}{'to the clairvoyant (now)':>34}{'changes':>9}{'':>6}{'reaction, s':>20}\n"
        f"{'trace':<14}{'model':<12}{'clairv.':>9}{'follow':>9}{'follow':>8}{'(now)':>8}{'task':>9}{'start':>9}{'follow':>9}"
        f"{'clairv.':>8}{'slowest':>9}{'in time':>10}{'hedged':>8}{'in vain':>8}{'again':>6}"
    )
    traces = unseen(args.unseen) if args.unseen else ((path.stem, read_trace(path)) for path in files)
    rows = [
        compare(name, trace, model, args.slowdown, hedges=not args.no_hedging)
        for (name, trace), model in itertools.product(traces, args.type)
    ]
    ratios = [row["to_clairvoyant"] for row in rows]
    present = [row["to_present"] for row in rows]
    print(
        f"following: mean {statistics.fmean(ratios):.3f} of the clairvoyant's latency, worst {max(ratios):.3f}; of the "
        f"best cuts at each start: mean {statistics.fmean(present):.3f}, worst {max(present):.3f}"
    )
    save("following", {"rows": rows})


if __name__ == "__main__":
    main()
