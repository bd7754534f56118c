"""The number of CPUs for this process: containers and batch systems often give fewer than the machine has."""

import os
from pathlib import Path


def available(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the number of CPUs that this process may use, within the limit of its control group; at least 1.

    `groups` is the folder of Linux's control groups, of either version.
    """
    # Python 3.13 has os.process_cpu_count
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, int(_share(groups))))


def _share(groups: Path) -> float:
    """Return the limit in CPUs, or a huge number where there is none."""
    try:
        if (both := groups / "cpu.max").exists():
            quota, period = both.read_text().split()
        else:
            quota, period = ((groups / "cpu" / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period"))
        share = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # not Linux, or "max"
        return 1e9
    return share if share > 0 else 1e9
