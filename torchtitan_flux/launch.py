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
    """Check, start the ranks, wait.

    Args:
        command: "train" or "infer".
        arguments: of the ranks' command line.

    Returns:
        the exit status.
    """
    # imported here for the sake of Ctrl-C: torch takes seconds
    from torchtitan_flux.config.problems import exit_on_config_error
    from torchtitan_flux.launching.job import Job
    from torchtitan_flux.launching.settings import Settings

    if command == "train" and {"--help", "-h"} & set(arguments):
        print(_help())
        return 0
    only_check, only_print = (option in arguments for option in ONLY)
    arguments = [argument for argument in arguments if argument not in ONLY]
    with exit_on_config_error():
        settings = Settings.read(os.environ)
        if not any(a.replace("-", "_").startswith("__job.config_file") for a in arguments):
            arguments = ["--job.config_file", settings.config_file, *arguments]
        config = check(command, arguments, settings.ranks, open_data=only_check)
        if command == "train" and only_check:
            print(_summary(config, settings.ranks, settings.ranks_per_node))
    if only_print:
        from torchtitan_flux.startup.dump_config import resolved_toml

        print(resolved_toml(config), end="")
    if only_check or only_print:
        return 0
    with exit_on_config_error():
        check_cards(settings.ranks_per_node)
    return Job(
        settings,
        MODULES[command],
        arguments,
        Path(config.job.dump_folder) / "logs",
        saves=command == "train",
        join_timeout=config.comm.init_timeout_seconds,
    ).run()


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

    if command == "infer":
        from torchtitan_flux.infer import parse

        _, arguments = parse(arguments)
    training = command == "train"
    logging.disable(logging.WARNING)  # the ranks say it
    try:
        more = data_problems if training and open_data else None
        return load_config(arguments, training, more, ranks)
    finally:
        logging.disable(logging.NOTSET)


def check_cards(ranks: int) -> None:
    """Whether each rank of this machine gets a GPU; where there is none, they share the CPU.

    Raises:
        ConfigError: there are fewer GPUs than ranks.
    """
    import torch

    from torchtitan_flux.config.problems import ConfigError, Problem

    cards = torch.cuda.device_count()
    if 0 < cards < ranks:
        message = f"{ranks} ranks, and {cards} of this machine's GPUs can be seen"
        raise ConfigError([Problem("NGPU", message)])


def _summary(config: "FluxJobConfig", ranks: int, ranks_per_machine: int) -> str:
    """What a checked run would do, in one line.

    Raises:
        ConfigError: it cannot fit this machine.
    """
    from torchtitan_flux.config.problems import ConfigError
    from torchtitan_flux.planning.estimate import fits

    if reason := fits(config, ranks, ranks_per_machine):
        raise ConfigError([reason])
    t = config.training
    return (
        f"The configuration is sound: {config.model.flavor} on {t.dataset} at {t.image_size}, "
        f"{t.steps} steps, {ranks} {'ranks' if ranks > 1 else 'rank'}, into "
        f"{config.job.dump_folder}"
    )


def _help() -> str:
    from torchtitan_flux.config.job_config import FluxJobConfig
    from torchtitan_flux.config.reference import help_text
    from torchtitan_flux.config.schema import keys_of
    from torchtitan_flux.launching.settings import Settings

    return help_text(keys_of(FluxJobConfig), "./run_train.sh", Settings.config_file)


if __name__ == "__main__":
    main()
