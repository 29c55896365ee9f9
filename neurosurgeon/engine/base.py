"""What edge, cloud and engines have in common. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class WeightsSource:
    """Where weights come from: a file, else torchvision's pretrained ones, else the fixed seed."""

    file: Path | None = None
    pretrained: bool = False

    @property
    def seeded(self) -> bool:
        """Whether the weights are those of the fixed seed, which have learnt nothing."""
        return self.file is None and not self.pretrained


SEEDED = WeightsSource()
