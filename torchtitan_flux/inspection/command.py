"""`scripts/inspect_data.py`: reads the data of a run without training."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from io import TextIOWrapper
from pathlib import Path

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import Problem
from torchtitan_flux.data.checks import data_key_problems
from torchtitan_flux.data.samples import TrainingSamples
from torchtitan_flux.data.survey import Survey, survey
from torchtitan_flux.inspection.contact_sheet import save_contact_sheet
from torchtitan_flux.inspection.items import Inspected, inspect, unreadable
from torchtitan_flux.launching.settings import Settings
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.startup.load_config import (
    ConfigError,
    exit_on_config_error,
    located,
    read_config,
)
from torchtitan_flux.training.conditioning import build_tokenizer
from torchtitan_flux.training.data import open_source, refuse_bad_data, training_samples

DECODED = 20_000
"""Data sets of up to so many items are decoded unless told otherwise."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, or 2 where a run would refuse the data."""
    options, keys = _parse(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal may not have the letters of a caption
            stream.reconfigure(errors="backslashreplace")
    with exit_on_config_error():
        config = _read_data_config(keys)
        source = open_source(config, "train")
        args, seed = FLAVORS[config.model.flavor], config.debug.seed or 0
        samples = training_samples(source, _no_tokens, config, args, seed)
        try:
            _show(config, samples, options)
        except BrokenPipeError:  # as of `| head`, which has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        refuse_bad_data(source, "train", config)
    return 0


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="inspect_data.py",
        description="Read the data of a run without training: a table of what was found, and a "
        "sheet of pictures as they will be trained on.",
        epilog="All other arguments are keys of a run, as run_train.sh takes them: "
        "--training.dataset folder --training.dataset_path PICTURES; CONFIG_FILE, or "
        "--job.config_file, names the configuration.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--items", action="store_true", help="list every item")
    add("--json", action="store_true", help="print JSON, a line for each item and one for all")
    decode = f"decode every picture, not headers alone; unset: of no more than {DECODED:,}"
    add("--decode", action=argparse.BooleanOptionalAction, help=decode)
    add("--sheet", type=Path, help="the PNG; unset: in job.dump_folder")
    add("--count", type=int, default=24, help="pictures on it (24); 0 for none")
    return parser.parse_known_args(argv)


def _read_data_config(keys: list[str]) -> FluxJobConfig:
    """The configuration; ConfigError with everything that is wrong with what is about data."""
    if not any(key.replace("-", "_").startswith("__job.config_file") for key in keys):
        keys = ["--job.config_file", Settings.read(os.environ).config_file, *keys]
    config = read_config(keys)
    found = [p for p in data_key_problems(config) if not p.key.startswith("validation.")]
    if config.model.flavor not in FLAVORS:
        found.append(Problem("model.flavor", "is unknown"))
    if found:
        raise ConfigError(located(found, config))
    return config


def _no_tokens(caption: str):
    raise NotImplementedError


def _show(config: FluxJobConfig, samples: TrainingSamples, options: argparse.Namespace) -> None:
    tokenizer, missing = None, ""
    try:
        tokenizer = build_tokenizer(config)
    except (OSError, ValueError) as error:
        missing = f"tokens of captions are not counted: {error}"
    found = survey(samples.source, config.training.image_size, tokenizer)
    decode = found.items <= DECODED if options.decode is None else options.decode
    if decode or options.items or options.json:
        found = replace(found, unreadable=unreadable(_listed(inspect(samples, decode), options)))
    sheet = _save_sheet(config, samples, options) if options.count > 0 else None
    if options.json:
        summary = {**asdict(found), "decoded": decode, "sheet": sheet and str(sheet)}
        for name in ("unreadable", "notes", "enlarged"):
            summary[name] = [note._asdict() for note in getattr(found, name)]
        summary["tokens"] = {name: one._asdict() for name, one in found.tokens.items()}
        print(json.dumps({"summary": summary}))
        return
    headers = "Pictures were judged by their headers; --decode decodes all of them"
    headers = headers if found.sizes and not decode else ""
    for line in (*_table(found), missing, headers, f"sheet: {sheet}" if sheet else ""):
        if line:
            print(line)


def _listed(items: Iterator[Inspected], options: argparse.Namespace) -> Iterator[Inspected]:
    """The items, each printed on its way where that was asked for."""
    for one in items:
        if options.json:
            print(json.dumps(one._asdict()))
        elif options.items:
            why = one.unreadable
            text = f"cannot be read: {why}" if why else " | ".join(map(_printable, one.captions))
            print(f"{one.item}  {one.width or '?'}x{one.height or '?'}  {text}")
        yield one


def _printable(caption: str) -> str:
    """A caption with its ends of lines, and what else a terminal obeys, written out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in caption)


def _table(found: Survey) -> Iterator[str]:
    yield from found.lines()
    for name, one in found.tokens.items():
        yield (
            f"{name} tokens of {found.counted:,} captions: median {one.median:g}, longest "
            f"{one.longest}, of {one.limit}"
        )
    if found.sizes:
        least, *quartiles, most = [f"{width}x{height}" for width, height in found.sizes]
        yield f"sizes: {least} to {most}, quartiles {', '.join(quartiles)}"
        aspects = sorted(found.aspects.items(), key=lambda one: -one[1])
        shown = [f"{ratio} ({count:,})" for ratio, count in aspects[:8]]
        yield f"width / height: {', '.join(shown)}{', …' if len(aspects) > 8 else ''}"


def _save_sheet(
    config: FluxJobConfig, samples: TrainingSamples, options: argparse.Namespace
) -> Path | None:
    """The contact sheet of the first positions of the run."""
    pictures = []
    for position in range(min(options.count, len(samples.source))):
        try:
            item, image, _ = samples.picture(position)
        except RuntimeError:  # no item near that position can be read: the table says why
            continue
        pictures.append((image, samples.caption(item, position)))
    if not pictures:
        return None
    path = options.sheet or Path(config.job.dump_folder) / "contact_sheet.png"
    try:
        save_contact_sheet(pictures, path)
    except OSError as error:
        key = "--sheet" if options.sheet else "job.dump_folder"
        raise ConfigError([f"{key}: {path} cannot be written: {error.strerror}"]) from error
    return path
