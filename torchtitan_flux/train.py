"""Entry point of every rank that trains: FluxTrainer, with the hooks that this run asks for.

    torchrun --nproc_per_node 1 -m torchtitan_flux.train \\
        --job.config_file train_configs/flux_digits.toml
"""

import os
import signal
import sys
from collections.abc import Callable

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)
from torchtitan_flux.torchtitan_shim import keep_freed_memory, local_ranks

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan.tools import utils
from torchtitan.tools.logging import init_logger, logger

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.startup.load_config import (
    ConfigError,
    exit_on_config_error,
    load_config_or_exit,
)
from torchtitan_flux.training.checkpoint_manager import CheckpointNotSaved
from torchtitan_flux.training.console import quieten_libraries
from torchtitan_flux.training.hooks import Hook
from torchtitan_flux.training.nonfinite import NonFinite
from torchtitan_flux.training.out_of_memory import exit_when_out_of_memory, training_remedies
from torchtitan_flux.training.quarantine import TooManyUnreadable
from torchtitan_flux.training.stopping import SIGNALS, noted
from torchtitan_flux.training.trainer import FluxTrainer


class DigitsScore(Hook):
    """Draws digits at the end of a run and has a classifier read them."""

    def __init__(self, trainer: FluxTrainer):
        self.trainer = trainer

    def results(self, step: int) -> list[str]:
        from torchtitan_flux.evaluation.digits import score_digits, score_prompts, score_settings

        trainer = self.trainer
        prompts, labels = score_prompts(trainer.config.score.count)
        settings = score_settings(trainer.config, trainer.model_args)
        score = score_digits(trainer.image_sampler.sample(prompts, settings), labels)
        trainer.metrics_processor.write({"score/read_as_prompted(%)": 100 * score.read}, step)
        return [score.line]


def hooks_of(config: FluxJobConfig) -> list[Callable[[FluxTrainer], Hook]]:
    """What a run does beside training, from packages that training itself does not import."""
    return [DigitsScore] if config.score.enable else []


@record
def main() -> None:
    """Entry point of every rank."""
    init_logger()
    quieten_libraries()
    config = load_config_or_exit(sys.argv[1:])
    if utils.device_type == "cpu" and local_ranks() == 1:
        keep_freed_memory()
    # What holds after StopSignals: a saved run ends well. SIG_IGN would also drop a signal that the
    # launcher's rank holds back until StopSignals listens.
    for number in SIGNALS:
        signal.signal(number, noted)
    with exit_on_config_error(), exit_when_out_of_memory(lambda: training_remedies(config)):
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        device = int(os.environ.get("LOCAL_RANK", "0"))
        from torchtitan_flux.planning.estimate import fits  # which training does not need

        if reason := fits(config, ranks, local_ranks(), device):
            raise ConfigError([reason])
        trainer = FluxTrainer(config, hooks_of(config))
    try:
        with exit_when_out_of_memory(lambda: training_remedies(config)):
            if config.checkpoint.create_seed_checkpoint:
                trainer.save_seed_checkpoint()
            else:
                trainer.train()
    except (NonFinite, TooManyUnreadable, CheckpointNotSaved) as error:
        logger.error(str(error))  # a complete message, and the same on every rank
        sys.exit(1)
    finally:
        trainer.close()
    if torch.distributed.get_rank() == 0:
        print("\n".join(trainer.results), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
