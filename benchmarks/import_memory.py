"""What importing weights costs each rank: the peak of its memory, and the time.

    python -m torch.distributed.run --nproc-per-node 4 benchmarks/import_memory.py --gigabytes 2.2

Writes a synthetic model of FLUX.1's proportions as a diffusers folder in float32, and reads it into
a sharded model as a run does that begins with it. Prints by how much RssAnon of each rank grew at
its peak, from before the model is built (file-backed pages come and go, these do not). It may grow
by 2 x the rank's own shards + the largest tensor + --allowance; where it grows by more, the exit
status is 1.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)
from torchtitan_flux.torchtitan_shim import give_back_freed_memory

import torch
import torch.distributed as dist
from peak_memory import PeakMemory

from torchtitan_flux.model import FLAVORS, FluxModel, FluxModelArgs
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.parallel.parallelize import shard_model
from torchtitan_flux.shards import local
from torchtitan_flux.tensor_files.safetensors_file import write_tensors
from torchtitan_flux.weights.architecture import to_diffusers_config
from torchtitan_flux.weights.key_maps import foreign_shapes, layout_entries, our_shapes
from torchtitan_flux.weights.locations import WEIGHTS_NAME
from torchtitan_flux.weights.open import import_weights, open_weights

MB = 10**6


def main() -> None:
    """Entry point of every rank."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.2, help="of the model, at least")
    parser.add_argument("--hidden", type=int, default=1536, help="width; a multiple of 128")
    parser.add_argument("--allowance", type=int, default=300, help="MB")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    args = synthetic(options.hidden, options.gigabytes)
    with tempfile.TemporaryDirectory() as own:
        box = [own]
        dist.broadcast_object_list(box, src=0)
        folder = Path(box[0])
        if dist.get_rank() == 0:
            write(folder, args)
        dist.barrier()
        fits = measured(folder, args, options.allowance * MB)
        dist.barrier()
    dist.destroy_process_group()
    sys.exit(not fits)


def synthetic(hidden: int, gigabytes: float) -> FluxModelArgs:
    """FLUX.1-schnell, narrower, with as many blocks as make up the size in float32."""
    base = replace(FLAVORS["flux-schnell"], hidden_size=hidden, num_heads=hidden // 128)
    depth = 1
    while True:
        args = replace(base, depth=depth, depth_single_blocks=2 * depth)
        if 4 * sum(torch.Size(one).numel() for one in our_shapes(args).values()) > gigabytes * 1e9:
            return args
        depth += 1


def write(folder: Path, args: FluxModelArgs) -> None:
    """Random weights as a diffusers folder, tensor by tensor."""
    shapes = foreign_shapes(args, layout_entries("diffusers", args))
    specs = {name: (torch.float32, shape) for name, shape in shapes.items()}
    name = f"{WEIGHTS_NAME}.safetensors"
    tensors = ((name, torch.randn(shape)) for name, shape in shapes.items())
    write_tensors(folder, {name: specs}, {"format": "pt"}, tensors)
    (folder / "config.json").write_text(json.dumps(to_diffusers_config(args)))


def measured(folder: Path, args: FluxModelArgs, allowance: int) -> bool:
    """Import as a run does, print the figures of this rank; whether they are as promised."""
    ranks = dist.get_world_size()
    dims = FluxParallelDims(1, ranks, 1, 1, 1, 1, 1, ranks)
    mesh = dims.data_mesh
    with torch.device("meta"):
        model = FluxModel(args)
    give_back_freed_memory()
    begin = time.perf_counter()
    with PeakMemory(torch.device("cpu")) as memory:
        weights = open_weights(folder, args)
        shard_model(model, mesh, param_dtype=torch.float32)
        model.to_empty(device="cpu")
        import_weights(dict(model.named_parameters()), weights)
        grown = memory.peak
    seconds = time.perf_counter() - begin
    whole = 4 * sum(torch.Size(one).numel() for one in weights.shapes.values())
    own = sum(local(p).nbytes for p in model.parameters())
    largest = 4 * max(torch.Size(one).numel() for one in weights.shapes.values())
    limit = 2 * own + largest + allowance
    print(
        f"rank {dist.get_rank()} of {ranks}: model {whole // MB} MB, own shards {own // MB} MB, "
        f"largest tensor {largest // MB} MB; RssAnon grew by {grown // MB} MB "
        f"({grown / own:.2f} x its shards), allowed {limit // MB} MB; {seconds:.1f} s",
        flush=True,
    )
    return grown <= limit


if __name__ == "__main__":
    main()
