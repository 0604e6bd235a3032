"""Whether a run grows: memory of each rank after its second and after its last save and validation.

    python -m torch.distributed.run --nproc-per-node 2 benchmarks/memory.py --async-mode async

Trains a small model on the digits with loader workers, saving and validating every 40 steps, and
prints RssAnon of each rank: file-backed pages come and go, these do not.
"""

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

import torchtitan_flux.torchtitan_shim  # before torchtitan

import torch
from torchtitan.tools.logging import init_logger

from torchtitan_flux.startup.load_config import load_config
from torchtitan_flux.training.process import start_process_group
from torchtitan_flux.training.trainer import FluxTrainer

EVERY = 40


def main() -> None:
    """Entry point of every rank."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=440)
    parser.add_argument("--async-mode", default="disabled", choices=("disabled", "async"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    init_logger()
    torchtitan_flux.torchtitan_shim.keep_freed_memory()  # as the trainer's own entry point
    with tempfile.TemporaryDirectory() as own:
        box = [own]  # all ranks write one folder
        start_process_group(load_config(arguments(own, options)))
        torch.distributed.broadcast_object_list(box, src=0)
        folder = box[0]
        trainer = FluxTrainer(load_config(arguments(folder, options)))
        sizes = measured(trainer)
        trainer.train()
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        trainer.close()
        torch.distributed.barrier()  # rank 0 removes the folder
        torch.distributed.destroy_process_group()
    growth = 100 * (sizes[-1] / sizes[1] - 1)
    print(
        f"rank {rank} of {ranks}, {options.async_mode}: {sizes[1]} kB after step {2 * EVERY}, "
        f"{sizes[-1]} kB after step {len(sizes) * EVERY}: {growth:+.2f} %",
        flush=True,
    )


def arguments(folder: str, options: argparse.Namespace) -> list[str]:
    """The run: 8 digits a step over all ranks."""
    keys: dict[str, Any] = {
        "job.config_file": "train_configs/flux_digits.toml",
        "job.dump_folder": folder,
        "debug.seed": 1,
        "training.steps": options.steps,
        "training.global_batch_size": 8,
        "training.local_batch_size": 1,
        "training.dataloader.num_workers": 1,
        "checkpoint.interval": EVERY,
        "checkpoint.keep_latest_k": 2,
        "checkpoint.async_mode": options.async_mode,
        "validation.freq": EVERY,
        "validation.steps": 1,
        "validation.dataloader.num_workers": 1,
    }
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return [*words, "--sampling.no-enable", "--score.no-enable", "--metrics.no-enable_tensorboard"]


def measured(trainer: FluxTrainer) -> list[int]:
    """A list that grows by RssAnon in kB after each validation, which follows a save."""
    validate, sizes = trainer.validator.validate, []

    def and_measure(*arguments: Any) -> None:
        validate(*arguments)
        found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        sizes.append(int(found.group(1)))

    trainer.validator.validate = and_measure  # type: ignore[method-assign]
    return sizes


if __name__ == "__main__":
    main()
