"""The process group, started ahead of torchtitan so that ranks can agree before they build."""

import os

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools import utils

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.lifetime import die_with_parent


def start_process_group(config: FluxJobConfig) -> torch.device:
    """Join the ranks that torchrun started, or be the only one in a plain process.

    Returns:
        the device of this rank.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        torch.distributed.init_process_group(
            "gloo" if utils.device_type == "cpu" else "nccl",
            store=torch.distributed.HashStore(),
            rank=0,
            world_size=1,
        )
    index = int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu" if utils.device_type == "cpu" else f"{utils.device_type}:{index}")
    utils.device_module.set_device(device)
    if not torch.distributed.is_initialized():
        dist_utils.init_distributed(
            config.comm,
            enable_cpu_backend=config.training.enable_cpu_offload,
            base_folder=config.job.dump_folder,
        )
    return device
