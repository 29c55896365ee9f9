"""Properties of this machine that a measured latency depends on."""

from __future__ import annotations

import logging
import os
import platform
import time
from pathlib import Path
from typing import NamedTuple

from neurosurgeon.utils.files import cache_directory

log = logging.getLogger(__name__)

SPIN_COUNT = "3000"  # iterations of a loop, about 30 us
SPARE_CORE = 0.4  # of the core of the last thread, which other programs may use
_WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def set_waiting_policy() -> None:
    """Set how long the threads of a computation spin while they wait for each other, before they sleep.

    OpenMP reads the environment when torch is imported; its default is 3 ms. A thread that spins for a thread without
    a core wastes its own share of the processor. A setting of the user is kept.

    Two threads, medians of `tests.benchmark.busy`, ms, with the default, 10000, 3000 and 1000 iterations, and sleeping
    at once. MobileNetV2: 9.0, 9.4, 9.3, 12.3, 18.2 on a quiet machine of two cores; beside two busy loops 1115, 88, 36,
    22, 15 in one run and 21, 22, 24, 30, 15 in another. ResNet-18 on a quiet machine: 23.3, 23.3, 23.8, 24.3, 27.1.
    """
    if not any(name in os.environ for name in _WAITING_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


class CpuUse(NamedTuple):
    """The idle time of all cores since the machine started, and the CPU time of this process, s."""

    at_s: float  # on a monotonic clock
    idle_s: float  # of all cores together
    own_s: float

    @classmethod
    def now(cls) -> CpuUse | None:
        """Return the use until now; None on a system without /proc/stat."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
            idle_s = (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")  # idle, and waiting for a disk
        except (OSError, ValueError, IndexError):
            return None
        return cls(time.monotonic(), idle_s, time.process_time())

    def free_cores_until(self, later: CpuUse) -> float:
        """Return the mean number of cores that other programs left to this one between two moments."""
        return (later.idle_s - self.idle_s + later.own_s - self.own_s) / max(later.at_s - self.at_s, 1e-3)


_AT_START = CpuUse.now()  # of this process, before it imports torch


def free_cores() -> float:
    """Return the mean number of cores that other programs have left to this one since it started; all if unknown."""
    now = CpuUse.now()
    return _AT_START.free_cores_until(now) if _AT_START and now else float(os.cpu_count() or 1)


def cpu_name() -> str:
    """Return the processor's name, or its architecture if the system does not name it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """Return the name of a processor; a CPU's with the instruction set that torch's kernels use.

    Generations of processors may share a name: virtual machines report "AMD EPYC" with AVX2 and with AVX512, and the
    second computes convolutions up to four times as fast.
    """
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"


def speeds_directory() -> Path:
    """Return the directory of the kept speeds of this machine (`predictor.machine_speed`).

    Raises: OSError: there is no cache directory.
    """
    return cache_directory() / "speeds"


def forget_speeds() -> None:
    """Remove the kept speeds of this machine, so that the next use measures them again."""
    try:
        for path in speeds_directory().glob("*.json"):
            path.unlink(missing_ok=True)
    except OSError as exc:
        log.warning("the kept speeds of this machine cannot be removed: %s", exc)


def frequency_governor() -> str | None:
    """Return the frequency governor of the first core; None if the system does not report it."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        return None


def memory_bytes() -> float:
    """Return the size of this machine's memory, bytes."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
