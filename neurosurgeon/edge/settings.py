"""How a task is to be run. Nothing here imports torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from neurosurgeon.engine.base import WeightsSource
from neurosurgeon.net.session import OnCloudLoss
from neurosurgeon.planner.strategies import Strategy


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """What to run, and how."""

    model: str
    weights: WeightsSource
    device: str = "cpu"
    threads: int | None = None  # None: as many as the edge's predictors were measured with
    pixels: NDArray[np.uint8] | None = None  # (224, 224, 3); None: the fixed image of noise
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
