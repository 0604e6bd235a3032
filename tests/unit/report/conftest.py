"""A run's dump folder, made by hand: continued once, with everything that a run may leave."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
from PIL import Image, PngImagePlugin
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from torchtitan_flux.checkpoint.manifest import FileFacts, Manifest, RunFacts
from torchtitan_flux.training.environment import append_environment, environment

HOSTILE = "</script><script>alert(1)</script> \" onerror='x' <b>&amp;"
TIMES = (0.0625, 0.4375, 0.9375)

CONFIG = """
[job]
description = "three & four"
dump_folder = "somewhere"

[model]
flavor = "flux-tiny"

[training]
dataset = "shapes"
img_size = 16
steps = 30

[sampling]
prompts = ["a | b", "c"]

[gone]
key = 3
"""


class Written(NamedTuple):
    """A folder, and every scalar that a reader must find in it: tag -> step -> value."""

    folder: Path
    scalars: dict[str, dict[int, float]]


def write_events(folder: Path, begin: float, scalars: list[tuple[str, int, float]]) -> None:
    """An event file in which each value comes a second after the one before."""
    writer = EventFileWriter(str(folder))
    for i, (tag, step, value) in enumerate(scalars):
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        writer.add_event(Event(wall_time=begin + i, step=step, summary=summary))
    writer.close()


def write_grid(path: Path, prompts: list[str], size: tuple[int, int] = (12, 8)) -> None:
    """A PNG with prompts in its metadata."""
    metadata = PngImagePlugin.PngInfo()
    facts = {"prompts": json.dumps(prompts), "step": "9", "cfg": "2.0", "guidance": "None"}
    for name, value in facts.items():
        metadata.add_text(name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 30)).save(path, pnginfo=metadata)


def logged(step: int, generation: int) -> list[tuple[str, int, float]]:
    """All that is logged at a step; no two values of a run are equal."""
    base = 1 + 1 / step + generation / 128
    values = [
        ("loss_metrics/global_avg_loss", base),
        ("loss_metrics/global_max_loss", base * 1.5),
        ("grad_norm", math.nan if step == 9 else base * 3),
        ("lr", step * 1e-5),
        ("throughput/images_per_second", 1234.0 * base),
        ("throughput/tokens_per_second", 123456.0 * base),
        ("throughput/tflops_per_device", base / 100),
        ("time_metrics/seconds_per_step", base / 7),
        ("time_metrics/data_wait(%)", base * 5),
        ("memory/max_reserved(GiB)", base * 11),
    ]
    if step % 6 == 0:
        values.append(("validation_metrics/loss", base * 0.9))
        values += [(f"validation_metrics/loss_t={t:.4f}", base * (2 - t)) for t in TIMES]
    return [(tag, step, value) for tag, value in values]


def float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


@pytest.fixture(scope="session")
def event_writer():
    """`write_events`, for tests that need other values."""
    return write_events


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> Written:
    """Killed after step 21 and continued from 12, stopped at 24 of 30."""
    folder = tmp_path_factory.mktemp("runs") / "my <run>"
    first = [value for step in range(3, 22, 3) for value in logged(step, 0)]
    second = [value for step in range(15, 25, 3) for value in logged(step, 1)]
    write_events(folder / "tb" / "20260101-1000", 1_770_000_000, first)
    write_events(folder / "tb" / "20260101-1100", 1_770_003_600, second)
    expected: dict[str, dict[int, float]] = {}
    # validation was measured at 6, 12 and 18 and then at 18 and 24: the later 18 counts
    for tag, step, value in first + second:
        expected.setdefault(tag, {})[step] = float32(value)

    (folder / "config.toml").write_text(CONFIG)
    write_grid(folder / "samples" / "step-9.png", ["a | b", "c"])
    write_grid(folder / "samples" / "step-18.png", [HOSTILE, "c"], (1200, 1600))
    checkpoint = folder / "checkpoint" / "step-12"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(b"x" * 3072)
    facts = RunFacts(seed=77, global_batch_size=40, context_in_dim=5, vec_in_dim=6, in_channels=7)
    Manifest(12, "full", facts, 1_770_000_500.0, {"weights": FileFacts(3072, "")}).write(checkpoint)
    (folder / "checkpoint" / "step-21").mkdir()
    bad = {"item": f"x/{HOSTILE}.png", "reason": "cut short", "used_for": "training", "position": 8}
    (folder / "quarantine.jsonl").write_text(json.dumps(bad) + '\n{"item": "half')
    append_environment(
        folder, environment(6, {"dp_shard": 3, "tp": 2, "pp": 1}, torch.device("cpu"))
    )
    return Written(folder, expected)
