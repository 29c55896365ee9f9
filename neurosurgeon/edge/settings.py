"""The settings of a task, or of a queue of tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from neurosurgeon.engine.base import WeightsSource
from neurosurgeon.graph.spec import Array
from neurosurgeon.net.session import OnCloudLoss
from neurosurgeon.planner.chain_search import Objective
from neurosurgeon.planner.flow_shop import Schedule
from neurosurgeon.planner.strategies import Strategy
from neurosurgeon.predictor.correction import Corrections


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeSettings:
    """The settings that a single task and a queue share."""

    device: str = "cpu"
    threads: int | None = None  # None: as many as the edge's predictors were measured with
    predictor: str = "forest"
    edge_config: Path | None = None
    cloud_config: Path | None = None  # None: the cloud predicts its own latencies
    learns: bool = True  # online correction: measured durations correct later predictions
    on_cloud_loss: OnCloudLoss = OnCloudLoss.LOCAL
    labels: tuple[str, ...] | None = None  # of the classes, by their index; None: those of the weights, if known

    def corrections(self) -> Corrections:
        """Return the kept corrections; none without online correction."""
        return Corrections.load() if self.learns else Corrections()


@dataclass(frozen=True, slots=True)
class TaskSettings(EdgeSettings):
    """The settings of a single task."""

    model: str
    weights: WeightsSource
    arrays: tuple[Array, ...] | None = None  # the inputs, an image as pixels (1, 3, H, W) uint8; None: the example
    point: int | None = None  # None: the best one
    repeat: int = 1  # inferences; the first one is not counted if there are several
    verify: bool = False  # compare the output with that of the unsplit network on the edge
    strategy: Strategy = Strategy.DADS
    max_edge_bytes: float = math.inf


@dataclass(frozen=True, slots=True)
class QueueSettings(EdgeSettings):
    """The settings of a queue."""

    weights: Mapping[str, WeightsSource]
    objective: Objective = Objective.LATENCY
    schedule: Schedule = Schedule.FIFO
    in_flight: int = 4  # tasks without a result at one time
    uses_load: bool = True  # of the cloud; False: plan as if it were idle
    hedges: bool = True  # False: wait for the cloud, however long a task is stalled
    deadline_ms: float | None = None  # of each task
    shares_cores: bool = False  # edge and cloud compute on the same cores: see `cuts.share_cores`

    @property
    def hedges_tasks(self) -> bool:
        """Whether a task in flight may change sides: from the cloud to the edge, or back."""
        return self.hedges and self.on_cloud_loss is OnCloudLoss.LOCAL

    @property
    def side_by_side(self) -> int:
        """The number of tasks that edge and cloud compute at one time: if they share their cores, one."""
        return 1 if self.shares_cores else self.in_flight

    def task(self, model: str) -> TaskSettings:
        """Return these settings as those of a single task."""
        shared = {field.name: getattr(self, field.name) for field in fields(EdgeSettings)}
        return TaskSettings(model, self.weights.get(model, WeightsSource()), **shared)
