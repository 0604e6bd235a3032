"""Memory and speed of a conversion, beside plain copying of the same bytes.

python benchmarks/convert.py --size 4 --folder /scratch

Synthetic bf16 weights of FLUX.1's width are written as a BFL file and converted, each time in a
process of its own. Exit status 1 where the peak of anonymous memory passes 3 times the largest
tensor plus --slack over what the process held before.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from peak_memory import PeakMemory

from torchtitan_flux.model import FLAVORS, FluxModelArgs
from torchtitan_flux.tensor_files.safetensors_file import total_bytes, write_tensors
from torchtitan_flux.weights.architecture import to_metadata
from torchtitan_flux.weights.convert import TargetFormat, convert
from torchtitan_flux.weights.key_maps import foreign_shapes, layout_entries
from torchtitan_flux.weights.open import open_weights

NAMES: dict[str, str] = {"bfl": "flux1-b.safetensors", "comfyui": "c.safetensors"}


def main() -> int:
    """Make the weights, convert them to each format, print the figures."""
    parser = argparse.ArgumentParser(
        description="Memory and speed of a conversion, beside plain copying of the same bytes."
    )
    parser.add_argument("--size", type=float, default=4.0, help="of the weights, GB, at least (4)")
    parser.add_argument("--folder", type=Path, required=True, help="scratch; tidied up afterwards")
    parser.add_argument(
        "--slack", type=float, default=1.0, help="GB allowed beside 3 largest tensors (1)"
    )
    parser.add_argument("--to", nargs="+", default=["diffusers", "dcp"], help="formats")
    options = parser.parse_args()
    folder = options.folder / "convert-benchmark"
    folder.mkdir(parents=True)
    try:
        return 1 if _measure(folder, options) else 0
    finally:
        shutil.rmtree(folder)


def _measure(folder: Path, options: argparse.Namespace) -> int:
    """How many formats were out of the bound."""
    path = folder / "flux1-a.safetensors"
    args, size, largest = _synthetic(path, int(options.size * 1e9))
    blocks = f"{args.depth} + {args.depth_single_blocks} blocks of width {args.hidden_size}"
    print(f"{size / 1e9:.2f} GB, {blocks}; the largest tensor has {largest / 1e6:.0f} MB")
    copying = _copy_seconds(path, folder / "copy")
    print(f"copying: {size / copying / 1e6:.0f} MB/s")
    bound, failed = 3 * largest + int(options.slack * 1e9), 0
    for format in map(str, options.to):
        results = multiprocessing.get_context("spawn").Queue()
        target = folder / NAMES.get(format, format)
        process = multiprocessing.get_context("spawn").Process(
            target=_convert, args=(path, target, format, results)
        )
        process.start()
        seconds, anonymous, high_water = results.get()
        process.join()
        good = anonymous <= bound
        failed += not good
        verdict = "within the bound" if good else "TOO MUCH"
        print(
            f"{format:10} {size / seconds / 1e6:5.0f} MB/s, {copying / seconds:.0%} of copying; "
            f"RssAnon +{anonymous / 1e6:.0f} MB of {bound / 1e6:.0f} ({verdict}), "
            f"VmHWM {high_water / 1e6:.0f} MB"
        )
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    return failed


def _synthetic(path: Path, at_least: int) -> tuple[FluxModelArgs, int, int]:
    """Weights of random bits; the architecture, all bytes, and those of the largest of ours."""
    full = FLAVORS["flux-schnell"]
    if at_least < 2 * 10**9:  # narrower, so that no tensor is a large part of the whole
        full = replace(full, hidden_size=768, num_heads=6, context_in_dim=768)
    blocks = 1
    while True:
        args = replace(full, depth=blocks, depth_single_blocks=2 * blocks)
        shapes = foreign_shapes(args, layout_entries("bfl", args))
        specs = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
        if total_bytes(specs) >= at_least:
            break
        blocks += 1
    pool = torch.randint(0, 0x3F80, (2**24,), dtype=torch.int16).view(torch.bfloat16)

    def values(i: int, shape: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return pool.roll(i * 4099).repeat(-(-count // len(pool)))[:count].view(shape)

    tensors = ((name, values(i, shape)) for i, (name, shape) in enumerate(shapes.items()))
    write_tensors(path.parent, {path.name: specs}, to_metadata(args), tensors)
    largest = max(total_bytes({name: spec}) for name, spec in specs.items())
    return args, total_bytes(specs), largest


def _copy_seconds(path: Path, target: Path) -> float:
    """A copy of the same bytes that is as durable: read, written, synced."""
    begin = time.perf_counter()
    with path.open("rb") as source, target.open("wb") as out:
        while block := source.read(16 * 2**20):
            out.write(block)
        out.flush()
        os.fsync(out.fileno())
    seconds = time.perf_counter() - begin
    target.unlink()
    return seconds


def _convert(
    path: Path, target: Path, format: TargetFormat, results: "multiprocessing.Queue"
) -> None:
    """In a process of its own: convert, and watch this process's memory."""
    weights = open_weights(path)
    begin = time.perf_counter()
    with PeakMemory(torch.device("cpu")) as memory:
        convert(weights, target, format)
        seconds, peak = time.perf_counter() - begin, memory.peak
    results.put((seconds, peak, _status("VmHWM")))


def _status(name: str) -> int:
    """Bytes of an entry of this process's status."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
