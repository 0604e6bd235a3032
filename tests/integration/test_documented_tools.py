"""Documented commands that plan, compare, kill, or start several launchers, as they stand.

Several nodes, and Slurm, are on this machine.
"""

import os
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
from documented_run import SMALL, make_folder, shell
from documents import Command, claimed

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("reader"))


def test_plans(folder):
    """Of the real model: by the shell, where the flavors are not tiny."""
    for command in claimed(__file__, "test_plans"):
        words = command.words
        said = shell(command, folder)
        if "--plot" in words:
            assert (folder / words[words.index("--plot") + 1]).is_file()
        elif "--gpus" in words:
            assert "s/image" in said
        else:
            assert re.search("^(fits|does not fit): ", said, re.MULTILINE)


SMALL_SCHNELL = (
    "--model.flavor", "flux-tiny", *SMALL, "--training.steps", "2", "--training.local_batch_size",
    "1", "--training.dataloader.num_workers", "0", "--validation.no-enable", "--sampling.no-enable",
    "--metrics.log_freq", "1",
)  # fmt: skip


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def test_two_nodes(folder):
    """Both on this machine, with one rank for the eight cards of each."""
    address, nodes = free_address(), claimed(__file__, "test_two_nodes")
    assert [command.environment["NODE_RANK"] for command in nodes] == ["0", "1"]
    commands = [
        Command(c.document, c.text.replace("node0:29500", address).replace("NGPU=8", "NGPU=1"))
        for c in nodes
    ]
    dump = ("--job.dump_folder", "outputs/nodes")
    with ThreadPoolExecutor() as both:
        said = list(both.map(lambda c: shell(c, folder, *SMALL_SCHNELL, *dump), commands))
    assert re.search(r"step: +2  loss", said[0]), said
    assert (folder / "outputs/nodes/checkpoint/step-2/manifest.json").is_file()


SLURM = {
    "sbatch": """
declare -A given
while [[ $1 == --* ]]; do given[${1#--}]=$2; shift 2; done
[[ ${given[gpus-per-node]} == 8 && ${given[time]} == 8:00:00 ]] || exit 1
export SLURM_SUBMIT_DIR=$PWD SLURM_JOB_ID=123 SLURM_JOB_NODELIST=here
export SLURM_JOB_NUM_NODES=${given[nodes]} SLURM_GPUS_ON_NODE=${given[gpus-per-node]}
cd / && bash "$SLURM_SUBMIT_DIR/$1" "${@:2}"
""",
    "scontrol": "echo localhost",
    "srun": """
shift
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node "$@" & tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || exit 1; done
""",
}
"""Slurm with all nodes on this machine."""


def test_slurm(folder):
    """Four launchers, with one rank each (NGPU) for the eight cards."""
    programs = folder / "slurm"
    programs.mkdir()
    for name, text in SLURM.items():
        (programs / name).write_text(f"#!/bin/bash\nset -e\n{text}")
        (programs / name).chmod(0o755)
    (command,) = claimed(__file__, "test_slurm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        dump = ("--job.dump_folder", "outputs/slurm")
        said = shell(command, folder, *SMALL_SCHNELL, *dump, NGPU="1", RDZV_ENDPOINT=free_address())
    assert re.search(r"step: +2  loss", said), said
    assert (folder / "outputs/slurm/checkpoint/step-2/manifest.json").is_file()


def test_torchrun_alone(folder):
    (command,) = claimed(__file__, "test_torchrun_alone")
    said = shell(command, folder, "--model.flavor", "flux-tiny", *SMALL, "--training.steps", "2")
    # every rank writes to the terminal
    assert len(re.findall(r"step: +2  loss.*grad_norm", said)) == 2


# ---- the tools --------------------------------------------------------------------------------


def test_comparing_losses(folder):
    for command in claimed(__file__, "test_comparing_losses"):
        more = (*SMALL, "--training.steps", "2", "--model.flavor", "flux-tiny")
        separator = () if "--" in command.words else ("--",)
        said = shell(command, folder, *separator, *more)
        assert re.search(r"^ +2 .*\n(?!.*above).*worst: ", said, re.MULTILINE), said
        assert (folder / "loss_compare.png").is_file()


def test_the_integration_table(folder):
    """All of it takes the time of a coffee: of the first command, two rows."""
    for command in claimed(__file__, "test_the_integration_table"):
        more = () if "--test_name" in command.words else ("--test_name", "ddp")
        assert "2 of 2 passed" in shell(command, folder, *more)


def test_the_kill_test(folder):
    (command,) = claimed(__file__, "test_the_kill_test")
    assert "survived 1 kills" in shell(command, folder, "--kills", "1", "--inside", "1")
