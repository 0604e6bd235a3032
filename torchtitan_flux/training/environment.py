"""What a run ran on, one JSON line for each start: written by training, read for the report."""

import json
import os
import platform
import socket
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

NAME = "environment.jsonl"

PACKAGES = ("torchtitan-flux", "torchtitan", "torch", "torchao", "transformers", "datasets")


def environment(ranks: int, mesh: dict[str, int], device: torch.device) -> dict[str, Any]:
    """Versions, machine and devices, as rank 0 sees them.

    Args:
        ranks: of the job.
        mesh: degrees by name, such as {"dp_shard": 4, "tp": 2}.
        device: of this rank.
    """
    cuda = device.type == "cuda"
    facts = torch.cuda.get_device_properties(device) if cuda else None
    return {
        "started": time.time(),
        "host": socket.gethostname(),
        "ranks": ranks,
        "mesh": {name: degree for name, degree in mesh.items() if degree > 1},
        "device": facts.name if facts else f"CPU ({_processor()})",
        "device_memory": facts.total_memory if facts else None,
        "cuda": torch.version.cuda if cuda else None,
        "cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def append_environment(folder: Path, facts: dict[str, Any]) -> None:
    """Add a line to the dump folder's list of starts."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file with one on each line; lines cut short by a crash are passed over."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            found.append(content)
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The CPU's name; platform.processor() is empty on most Linux systems."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
