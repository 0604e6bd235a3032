"""Run a function on several gloo ranks: import once, fork, meet at a file (0.5 s for 4 ranks)."""

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call function(*args) on `world_size` forked ranks, each with the environment of torchrun.

    Where LOCAL process groups are wanted, `function` finds torch.distributed initialised.

    Returns:
        what each rank returned (through torch.save), in the order of ranks.

    Raises:
        RuntimeError: with the traceback of the rank that failed.
    """
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(folder, rank, world_size, function, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        errors = sorted(Path(folder).glob("error-*"))
        if errors:
            raise RuntimeError("\n".join(path.read_text() for path in errors))
        codes = [process.exitcode for process in ranks]
        if any(codes):
            raise RuntimeError(f"exit codes of the ranks: {codes}")
        return [
            torch.load(Path(folder) / f"result-{rank}", weights_only=False)
            for rank in range(world_size)
        ]


def _rank(folder: str, rank: int, world_size: int, function: Callable, args: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(f"{folder}/store", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        torch.save(function(*args), f"{folder}/result-{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)  # the others wait in a collective: their connection breaks, and they end too
    os._exit(0)  # no clean-up of what the parent owns


def keep_process_group() -> None:
    """For a program that leaves the ranks' group at its end: it is needed again by the next one."""
    destroy = dist.destroy_process_group
    dist.destroy_process_group = lambda group=None: group and destroy(group)
