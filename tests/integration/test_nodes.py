"""torchrun alone, without the launcher."""

import re

import pytest
from documents import REPO
from integration.test_readme import LATENT, shell

SMALL = (
    *LATENT, "--training.local_batch_size", "1", "--training.dataloader.num_workers", "0",
    "--validation.no-enable", "--sampling.no-enable", "--metrics.log_freq", "1",
    "--job.dump_folder", "outputs/nodes", "--checkpoint.enable",
)  # fmt: skip


@pytest.mark.long
def test_torchrun_alone(tmp_path):
    start = "torchrun --nproc_per_node 2 -m torchtitan_flux.train --job.config_file"
    said = shell(f"{start} {REPO}/train_configs/debug_model.toml", tmp_path, *SMALL)
    # every rank writes to the terminal
    assert len(re.findall(r"step: +2  loss.*grad_norm", said)) == 2
