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
    """What function(*args) returns on each of `world_size` forked ranks of an initialised group,
    with the environment of torchrun; raises with the traceback of the rank that failed."""
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
        if errors := sorted(Path(folder).glob("error-*")):
            raise RuntimeError("\n".join(path.read_text() for path in errors))
        codes = [process.exitcode for process in ranks]
        assert not any(codes), f"exit codes of the ranks: {codes}"
        results = [Path(folder) / f"result-{rank}" for rank in range(world_size)]
        return [torch.load(path, weights_only=False) for path in results]


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
