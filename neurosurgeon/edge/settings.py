"""How a task, or a queue of tasks, is to be run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from neurosurgeon.engine.base import WeightsSource
from neurosurgeon.graph.spec import Array
from neurosurgeon.net.session import OnCloudLoss
from neurosurgeon.planner.chain_search import Objective
from neurosurgeon.planner.flow_shop import Schedule
from neurosurgeon.planner.strategies import Strategy


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """What to run, and how."""

    model: str
    weights: WeightsSource
    device: str = "cpu"
    threads: int | None = None  # None: as many as the edge's predictors were measured with
    array: Array | None = None  # the input, an image as pixels (1, 3, H, W) uint8; None: a fixed image of noise
    point: int | None = None  # None: the best one
    predictor: str = "forest"
    edge_config: Path | None = None
    cloud_config: Path | None = None  # None: what the cloud itself says
    learns: bool = True  # from what each inference takes
    repeat: int = 1
    verify: bool = False
    on_cloud_loss: OnCloudLoss = OnCloudLoss.LOCAL
    strategy: Strategy = Strategy.DADS
    max_edge_bytes: float = math.inf


@dataclass(frozen=True, slots=True)
class QueueSettings:
    """How a queue is worked through."""

    weights: Mapping[str, WeightsSource]
    device: str = "cpu"
    threads: int | None = None  # None: as many as the edge's predictors were measured with
    predictor: str = "forest"
    edge_config: Path | None = None
    cloud_config: Path | None = None
    learns: bool = True
    objective: Objective = Objective.LATENCY
    schedule: Schedule = Schedule.FIFO
    in_flight: int = 4
    uses_load: bool = True  # of the cloud; False: plan as if it were idle
    on_cloud_loss: OnCloudLoss = OnCloudLoss.LOCAL
    hedges: bool = True  # False: wait for the cloud, however long a task is stalled
    deadline_ms: float | None = None  # of each task
    shares_cores: bool = False  # edge and cloud compute on the same cores: see `share_cores`

    @property
    def hedges_tasks(self) -> bool:
        """Whether a task in flight may change sides: from the cloud to the edge, or back."""
        return self.hedges and self.on_cloud_loss is OnCloudLoss.LOCAL

    @property
    def side_by_side(self) -> int:
        """How many tasks edge and cloud work on at once: where they share their cores, one waits for the other."""
        return 1 if self.shares_cores else self.in_flight

    def task(self, model: str) -> TaskSettings:
        """Return these settings as those of a single task."""
        return TaskSettings(
            model=model,
            weights=self.weights.get(model, WeightsSource()),
            device=self.device,
            threads=self.threads,
            predictor=self.predictor,
            edge_config=self.edge_config,
            cloud_config=self.cloud_config,
        )
