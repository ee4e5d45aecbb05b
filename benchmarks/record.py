"""What every result file says about where it was measured."""

import platform
import sys
import time
from importlib.metadata import version
from typing import Any

import torch


def surroundings(started: float) -> dict[str, Any]:
    """Machine, versions, threads, the command, and the CPU time since `started` (of `time.process_time`)."""
    return {
        "command": " ".join(["python", "-m", f"benchmarks.{sys.argv[0].rsplit('/', 1)[-1].removesuffix('.py')}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": _processor(), "system": platform.system(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")},
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return f"{names[0]} ({len(names)} cores)"
    except (OSError, IndexError):
        return platform.processor()
