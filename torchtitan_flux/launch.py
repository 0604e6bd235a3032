"""Checks the configuration once, then starts the ranks; behind run_train.sh and run_infer.sh.

    NGPU=2 python -m torchtitan_flux.launch train --training.steps 100
    python -m torchtitan_flux.launch --check          # or --print-config, --help: nothing starts

Exit status: 0 done, or stopped on request and saved; 2 wrong configuration; 1 anything else.
"""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchtitan_flux.config.job_config import FluxJobConfig

MODULES = {"train": "torchtitan_flux.train", "infer": "torchtitan_flux.infer"}

ONLY = ("--check", "--print-config")
"""Options after which nothing is started."""


def main() -> None:
    """Entry point of the launcher; never returns."""
    # Nothing runs yet: Ctrl-C ends the seconds of import without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    command, arguments = "train", sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        command, *arguments = arguments
    if command not in MODULES:
        print(f"Unknown command {command!r}: train or infer", file=sys.stderr)
        sys.exit(2)
    sys.exit(launch(command, arguments))


def launch(command: str, arguments: list[str]) -> int:
    """Check, start the ranks ("train" or "infer"), wait; returns the exit status."""
    # imported here for the sake of Ctrl-C: torch takes seconds
    import torch

    from torchtitan_flux.config.job_config import FluxJobConfig
    from torchtitan_flux.config.problems import ConfigError, Problem, exit_on_config_error
    from torchtitan_flux.config.reference import ABOUT, as_toml
    from torchtitan_flux.launching.job import Job
    from torchtitan_flux.launching.settings import Settings
    from torchtitan_flux.planning.estimate import fits
    from torchtitan_flux.startup.dump_config import resolved_toml

    training, (only_check, only_print) = command == "train", (o in arguments for o in ONLY)
    if training and {"--help", "-h"} & set(arguments):
        print(ABOUT + as_toml(FluxJobConfig(), described=True))
        return 0
    arguments = [argument for argument in arguments if argument not in ONLY]
    with exit_on_config_error():
        settings = Settings.read(os.environ)
        ranks, cards = settings.ranks_per_node, torch.cuda.device_count()
        if not any(a.replace("-", "_").startswith("__job.config_file") for a in arguments):
            arguments = ["--job.config_file", settings.config_file, *arguments]
        config = check(command, arguments, settings.ranks, open_data=only_check)
        if training and only_check and (reason := fits(config, settings.ranks, ranks)):
            raise ConfigError([reason])
        if 0 < cards < ranks and not (only_check or only_print):
            raise ConfigError([Problem("NGPU", f"{ranks} ranks, and {cards} GPUs can be seen")])
    if training and only_check:
        print(
            f"The configuration is sound: {config.model.flavor} on {config.training.dataset} at "
            f"{config.training.image_size}, {config.training.steps} steps, {settings.ranks} "
            f"rank(s), into {config.job.dump_folder}"
        )
    if only_print:
        print(resolved_toml(config), end="")
    if only_check or only_print:
        return 0
    logs, timeout = Path(config.job.dump_folder) / "logs", config.comm.init_timeout_seconds
    return Job(settings, MODULES[command], arguments, logs, training, timeout).run()


def check(
    command: str, arguments: list[str], ranks: int, open_data: bool = False
) -> "FluxJobConfig":
    """The configuration, loaded as the ranks will.

    Args:
        command: "train" or "infer".
        arguments: of the ranks' command line.
        ranks: how many there will be.
        open_data: whether data to train on are opened, and indexed, too.

    Raises:
        ConfigError: with everything that is wrong.
    """
    from torchtitan_flux.startup.load_config import load_config
    from torchtitan_flux.training.data import data_problems

    training = command == "train"
    if not training:
        from torchtitan_flux.infer import parse

        _, arguments = parse(arguments)
    logging.disable(logging.WARNING)  # the ranks say it
    try:
        more = data_problems if training and open_data else None
        return load_config(arguments, training, more, ranks)
    finally:
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    main()
