"""Several nodes, Slurm, and torchrun alone; all nodes are this machine."""

import os
import re
import socket
from pathlib import Path

import pytest
from documents import REPO
from integration.test_readme import LATENT, shell

pytestmark = pytest.mark.long

SMALL = (
    *LATENT, "--training.local_batch_size", "1", "--training.dataloader.num_workers", "0",
    "--validation.no-enable", "--sampling.no-enable", "--metrics.log_freq", "1",
    "--job.dump_folder", "outputs/nodes", "--checkpoint.enable",
)  # fmt: skip
START = f"CONFIG_FILE={REPO}/train_configs/debug_model.toml"
SLURM = {
    "sbatch": """
declare -A given
while [[ $1 == --* ]]; do given[${1#--}]=$2; shift 2; done
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


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


@pytest.fixture
def checkout(tmp_path) -> Path:
    for name in ("run_train.sh", "scripts"):
        (tmp_path / name).symlink_to(REPO / name)
    return tmp_path


def trained(said: str, folder: Path) -> bool:
    manifest = folder / "outputs/nodes/checkpoint/step-2/manifest.json"
    return bool(re.search(r"step: +2  loss", said)) and manifest.is_file()


def test_slurm(checkout, monkeypatch):
    """Four launchers with one rank each (NGPU)."""
    programs = checkout / "slurm"
    programs.mkdir()
    for name, text in SLURM.items():
        (programs / name).write_text(f"#!/bin/bash\nset -e\n{text}")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    start = f"NGPU=1 RDZV_ENDPOINT={free_address()} {START} sbatch --nodes 4 --gpus-per-node 8"
    assert trained(shell(f"{start} scripts/slurm.sh", checkout, *SMALL), checkout)


def test_torchrun_alone(checkout):
    start = "torchrun --nproc_per_node 2 -m torchtitan_flux.train --job.config_file"
    said = shell(f"{start} {REPO}/train_configs/debug_model.toml", checkout, *SMALL)
    # every rank writes to the terminal
    assert len(re.findall(r"step: +2  loss.*grad_norm", said)) == 2
