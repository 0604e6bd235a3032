"""Most memory that a rank takes for two real steps, printed in bytes; a process of its own.

    python tests/measured_step.py 2 full

Forked from a test worker the ranks would begin with a heap full of what other tests had freed, and
be served from it.
"""

import ctypes
import sys
from dataclasses import replace
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from torchtitan_flux.flow_matching import squared_errors
from torchtitan_flux.model import FLAVORS, FluxModel
from torchtitan_flux.model.inputs import FluxInputs
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.parallel.parallelize import parallelize_flux
from torchtitan_flux.planning.dry_run import Mesh, model_inputs, with_mesh
from torchtitan_flux.startup.load_config import load_config

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from peak_memory import PeakMemory

# 17 M parameters, pixel space: states of 270 MB, and activations of as many again
ARGS = replace(FLAVORS["flux-mnist"], depth=2, depth_single_blocks=2)
M_MMAP_THRESHOLD = -3


def configured(mode: str):
    config = load_config(
        [
            "--job.config_file", "train_configs/flux_mnist.toml",
            "--training.img_size", "32",
            "--training.local_batch_size", "4",
            "--training.mixed_precision_param", "float32",
            "--encoder.max_t5_encoding_len", "64",
            "--activation_checkpoint.mode", mode,
            "--sampling.no-enable",
            "--debug.seed", "1",
        ]
    )  # fmt: skip
    return config


def measured_peak(mode: str) -> int:
    """Two real steps on the ranks that are joined: most memory beyond what was there before."""
    config = configured(mode)
    mesh = Mesh(shard=dist.get_world_size())
    config = with_mesh(config, mesh)
    dims = FluxParallelDims.of(config.parallelism, mesh.ranks)
    dims.build_mesh()
    # what is freed goes back to the system, else the peak would be the allocator's
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    with PeakMemory(torch.device("cpu")) as memory:
        with torch.device("meta"):
            model: nn.Module = FluxModel(ARGS)
        model = parallelize_flux(model, dims, config)  # type: ignore[arg-type]
        model.to_empty(device="cpu")
        model.init_weights()  # type: ignore[operator]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        inputs = model_inputs(config, ARGS, 4, torch.float32)
        inputs = FluxInputs(*(None if x is None else torch.zeros_like(x) for x in inputs))  # type: ignore[arg-type]
        for _ in range(2):
            velocity = model(*inputs)
            squared_errors(velocity, torch.rand_like(velocity)).sum().backward()
            del velocity
            optimizer.step()
            optimizer.zero_grad()
        return memory.peak


if __name__ == "__main__":
    print(max(run_ranks(int(sys.argv[1]), measured_peak, sys.argv[2])))
