"""Images a second of our loader beside torchtitan's own for FLUX, on the same tar shards:

    python benchmarks/loader.py --images 2000 --rounds 3

Writes shards of photograph-like JPEGs (512 to 1024 pixels on the long side, quality 90, a caption
each) to a temporary folder, then reads them with both loaders by turns, 256 x 256 pixels, batches
of 16, captions as 256 T5 and 77 CLIP tokens of the tokenizers in assets/tiny. Prints images a
second for every number of worker processes, and ratios of neighbouring turns, which also hold on
a machine that others use. Wants `pip install -e .` and no network.
"""

import argparse
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torchtitan_flux.torchtitan_shim  # isort: skip  # noqa: F401  before torchtitan

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.models.flux.tokenizer import FluxTokenizer

from torchtitan.models.flux import flux_datasets
from torchtitan_flux.data.loader import FluxDataLoader
from torchtitan_flux.data.samples import TrainingSamples
from torchtitan_flux.data.sources.registry import build_source
from torchtitan_flux.data.sources.source import SourceOptions
from torchtitan_flux.encoders.tokenizer import CaptionTokenizer
from torchtitan_flux.flow_matching import TimeDensity
from torchtitan_flux.latents import Geometry, ImageSize
from torchtitan_flux.paths import PACKAGE

SIZE = 256
BATCH = 16
T5_TOKENS = 256
DROPOUT = 0.1
SHARDS = 4
WORDS = ("a", "the", "red", "small", "dog", "house", "tree", "on", "near", "under", "bright")


def main() -> None:
    parser = argparse.ArgumentParser(description="Images a second, ours and torchtitan's")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=20, help="measured in each turn")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
    print(f"{SIZE} x {SIZE} pixels, batches of {BATCH}, {T5_TOKENS} T5 and 77 CLIP tokens, both")
    print("ours: random access over the whole set, JPEGs decoded near the size wanted, antialiased")
    print("      bicubic, time and latent noise (16 x 32 x 32, twice) made here, too")
    print("torchtitan: streams the shards in order, full decode, bicubic; no times, no noise")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder)
        write_shards(shards, arguments.images)
        for workers in arguments.workers:
            compare(shards, workers, arguments.rounds, arguments.batches)


def compare(shards: Path, workers: int, rounds: int, batches: int) -> None:
    """Both loaders by turns; prints medians."""
    speeds: dict[str, list[float]] = {"ours": [], "torchtitan": []}
    costs: dict[str, list[float]] = {"ours": [], "torchtitan": []}
    for turn in range(rounds):
        for name in sorted(speeds, reverse=bool(turn % 2)):
            build = ours if name == "ours" else torchtitans
            speed, cost = measured(build(shards, workers), batches)
            speeds[name].append(speed)
            costs[name].append(cost)
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["torchtitan"], strict=True)]
    cheaper = [b / a for a, b in zip(costs["ours"], costs["torchtitan"], strict=True)]
    speed = {name: statistics.median(values) for name, values in speeds.items()}
    cost = {name: statistics.median(values) for name, values in costs.items()}
    print(
        f"{workers} workers: ours {speed['ours']:6.1f} images/s, "
        f"torchtitan {speed['torchtitan']:6.1f}, "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); "
        f"CPU time {cost['ours']:.2f} and {cost['torchtitan']:.2f} ms an image, "
        f"ratio {statistics.median(cheaper):.2f}; "
        f"ours kept {speed['ours'] * cost['ours'] / 1e3:.1f} cores busy",
        flush=True,
    )


def measured(batches: Iterator[Any], count: int) -> tuple[float, float]:
    """(images/s, ms of CPU time an image) after a start that is not counted."""
    for _ in range(8):  # workers, first shards, what was prefetched
        next(batches)
    start, busy = time.perf_counter(), cpu_seconds()
    for _ in range(count):
        next(batches)
    seconds, busy = time.perf_counter() - start, cpu_seconds() - busy
    if isinstance(batches, FluxDataLoader):
        batches.close()
    return count * BATCH / seconds, 1e3 * busy / (count * BATCH)


def cpu_seconds() -> float:
    """CPU time of this process, its threads and its workers so far."""
    ticks = 0
    for process in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user, system
    return ticks / os.sysconf("SC_CLK_TCK")


def ours(shards: Path, workers: int) -> Iterator[Any]:
    tiny = PACKAGE / "assets" / "tiny"
    source = build_source("webdataset", "train", SourceOptions(path=str(shards)))
    samples = TrainingSamples(
        source=source,
        seed=1,
        size=ImageSize(SIZE, SIZE),
        geometry=Geometry(channels=16, downscale=8, patch=2),
        channels=3,
        tokenize=CaptionTokenizer(tiny / "t5", tiny / "clip", T5_TOKENS),
        time_density=TimeDensity("logit_normal"),
        dropout_prob=DROPOUT,
        dropout_mode="independent",
        stochastic=True,
    )
    return FluxDataLoader(samples, BATCH, BATCH, num_workers=workers)


def torchtitans(shards: Path, workers: int) -> Iterator[Any]:
    # As its build_flux_dataloader does, but with tokenizers that need no download: it tells T5 and
    # CLIP apart by the path.
    tiny = PACKAGE / "assets" / "tiny"
    config = SimpleNamespace(
        training=SimpleNamespace(img_size=SIZE, classifier_free_guidance_prob=DROPOUT)
    )
    dataset = flux_datasets.FluxDataset(
        "cc12m-test",
        str(shards),
        FluxTokenizer(str(tiny / "t5"), max_length=T5_TOKENS),
        FluxTokenizer(str(tiny / "clip"), max_length=77),
        config,  # pyright: ignore[reportArgumentType]
        infinite=True,
    )
    loader = ParallelAwareDataloader(
        dataset, dp_rank=0, dp_world_size=1, batch_size=BATCH, num_workers=workers
    )
    return iter(loader)


def write_shards(folder: Path, images: int) -> None:
    """JPEGs and captions in WebDataset's form; a few dozen pictures, cropped anew each time."""
    rng = np.random.default_rng(0)
    scenes = [_scene(rng, 1400, 1400) for _ in range(12)]
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for key in range(shard, images, SHARDS):
                longer = int(rng.integers(512, 1025))
                shorter = int(longer * rng.choice([9 / 16, 2 / 3, 3 / 4, 1]))
                width, height = (longer, shorter) if rng.random() < 0.7 else (shorter, longer)
                left, top = (int(rng.integers(1400 - n)) for n in (width, height))
                image = scenes[rng.integers(len(scenes))]
                image = image.crop((left, top, left + width, top + height))
                file = BytesIO()
                image.save(file, "JPEG", quality=90)
                caption = f"{key} " + " ".join(rng.choice(WORDS, int(rng.integers(5, 25))))
                for suffix, data in ("jpg", file.getvalue()), ("txt", caption.encode()):
                    info = tarfile.TarInfo(f"{key:08d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, BytesIO(data))


def _scene(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise whose amplitudes fall with frequency as those of photographs, and hard edges."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    spectrum = (
        np.fft.rfft2(rng.normal(size=(4, height, width))) / np.maximum(frequency, 1e-3) ** 1.2
    )
    noise = np.fft.irfft2(spectrum, s=(height, width))
    noise /= noise.std(axis=(1, 2), keepdims=True)
    colours = 128 + 40 * noise[0, :, :, None] + 15 * noise[1:].transpose(1, 2, 0)
    image = Image.fromarray(colours.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(30):
        x, y, radius = rng.integers(width), rng.integers(height), rng.integers(8, 120)
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return image


if __name__ == "__main__":
    main()
