"""Checks the configuration once, then starts the ranks; behind run_train.sh and run_infer.sh.

    NGPU=2 python -m torchtitan_flux.launch train --training.steps 100

Exit status: 0 done, or stopped on request and saved; 2 wrong configuration; 1 anything else.
"""

import logging
import os
import signal
import sys
from pathlib import Path

MODULES = {"train": "torchtitan_flux.training.trainer", "infer": "torchtitan_flux.infer"}


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
    from torchtitan_flux.config.manager import exit_on_config_error
    from torchtitan_flux.launching.job import Job
    from torchtitan_flux.launching.settings import Settings

    with exit_on_config_error():
        settings = Settings.read(os.environ)
        if not any(a.replace("-", "_").startswith("__job.config_file") for a in arguments):
            arguments = ["--job.config_file", settings.config_file, *arguments]
        dump_folder = check(command, arguments, settings.ranks)
    logs = dump_folder / "logs"
    return Job(settings, MODULES[command], arguments, logs, saves=command == "train").run()


def check(command: str, arguments: list[str], ranks: int) -> Path:
    """Load the configuration as the ranks will.

    Returns:
        its dump folder.

    Raises:
        ConfigError: with everything that is wrong.
    """
    from torchtitan_flux.config.manager import load_config

    if command == "infer":
        from torchtitan_flux.infer import parse

        _, arguments = parse(arguments)
    os.environ["WORLD_SIZE"] = str(ranks)
    logging.disable(logging.WARNING)  # the ranks say it
    try:
        config = load_config(arguments, training=command == "train")
    finally:
        logging.disable(logging.NOTSET)
    return Path(config.job.dump_folder)


if __name__ == "__main__":
    main()
