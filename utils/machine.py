"""What this machine is: the things that a measured latency depends on."""

from __future__ import annotations

import logging
import os
import platform
from pathlib import Path

from utils.files import cache_directory

log = logging.getLogger(__name__)

SPIN_COUNT = "1000"  # turns of a loop: about 10 us
_WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def set_waiting_policy() -> None:
    """Choose how long the threads of a computation spin for each other before they sleep.

    OpenMP reads this from the environment when torch is imported; its default is 3 ms. A thread that spins for one
    that another program keeps from running wastes its own share of the processor: beside other programs a network with
    two threads then takes up to 50 times as long (`tests.benchmark.busy`). What the user has set is kept.
    """
    if not any(name in os.environ for name in _WAITING_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def cpu_name() -> str:
    """Return the processor's name, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """Return the name of the processor that computes, a CPU's with the instruction set that torch's kernels use.

    Generations of processors may share a name: virtual machines tell "AMD EPYC" with AVX2 and with AVX512, and the
    second computes convolutions up to four times as fast.
    """
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"


def speeds_directory() -> Path:
    """Return where the measured speeds of this machine are kept (`predictor.machine_speed`).

    Raises: OSError: there is no cache directory.
    """
    return cache_directory() / "speeds"


def forget_speeds() -> None:
    """Have the speed of this machine measured again at its next use."""
    try:
        for path in speeds_directory().glob("*.json"):
            path.unlink(missing_ok=True)
    except OSError as exc:
        log.warning("the kept speeds of this machine cannot be removed: %s", exc)


def frequency_governor() -> str | None:
    """Return how the first core's clock is governed; None where the system does not tell."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        return None


def memory_bytes() -> float:
    """Return this machine's memory."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
