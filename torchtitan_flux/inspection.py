"""`scripts/inspect_data.py`: reads the data of a run without training."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import Problem
from torchtitan_flux.data.checks import data_key_problems
from torchtitan_flux.data.samples import TrainingSamples
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.source import UnreadableItem
from torchtitan_flux.data.sources.split import SourcePart, whole_of
from torchtitan_flux.data.survey import REFUSED, by_reason, survey, why_unreadable
from torchtitan_flux.launching.settings import Settings
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.sampling.generate import image_grid, to_pil
from torchtitan_flux.startup.load_config import (
    ConfigError,
    exit_on_config_error,
    located,
    read_config,
)
from torchtitan_flux.training.conditioning import build_tokenizer
from torchtitan_flux.training.data import open_source, training_samples

DECODED = 20_000
"""Data sets of up to so many items are decoded unless told otherwise."""

_CHUNK = 1024  # items that are given to the decoding threads at once
_COLUMNS, _CELL = 6, 256  # of the sheet; a cell's longer side in pixels at most


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, or 2 where a run would refuse the data."""
    options, keys = _parse(sys.argv[1:] if argv is None else argv)
    with exit_on_config_error():
        config = _read_data_config(keys)
        source, tokenizer = open_source(config, "train", unusable=True), None
        try:
            tokenizer = build_tokenizer(config)
        except (OSError, ValueError) as error:
            print(f"tokens of captions are not counted: {error}", file=sys.stderr)
        args, seed = FLAVORS[config.model.flavor], config.debug.seed or 0
        samples = training_samples(source, tokenizer or _no_tokens, config, args, seed)
        found = survey(source, config.training.image_size, tokenizer and tokenizer.cut)
        decode = found.items <= DECODED if options.decode is None else options.decode
        if decode or options.items or options.json:
            found = found._replace(unreadable=by_reason(_list_items(samples, decode, options)))
        sheet = _save_sheet(config, samples, options) if options.count > 0 else ""
        if options.json:
            summary: dict[str, Any] = found._asdict() | {"decoded": decode, "sheet": sheet}
            for name in ("unreadable", "notes"):
                summary[name] = [note._asdict() for note in summary[name]]
            print(json.dumps({"summary": summary}))
        else:
            print(*found.lines(), sep="\n")
            if not decode:
                print("Pictures were judged by their headers; --decode decodes all of them")
            if sheet:
                print(f"sheet: {sheet}")
        open_source(config, "train")
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


def _list_items(
    samples: TrainingSamples, decode: bool, options: argparse.Namespace
) -> Iterator[tuple[str, str]]:
    """(reason, item) of all that cannot be read, held-out items too; prints items if asked to.

    With `decode` every picture is decoded as in training; else the index is believed, which knows
    headers. None of data that the program makes.
    """
    part, source = samples.source, whole_of(samples.source)
    if not isinstance(source, IndexedSource):
        return
    held_out = set()
    if isinstance(part, SourcePart):
        other = SourcePart(source, "held_out", part.share)
        held_out = {other.row(index) for index in range(len(other))}

    def inspected(number: int) -> dict[str, Any]:
        row = source.index[number]
        reason = why_unreadable(source, row)
        if decode and reason in ("", REFUSED):
            try:
                samples.image(source[number], 0)
                reason = ""
            except UnreadableItem as error:
                reason = error.reason
        return {
            "item": row.item_id,
            "captions": source.captions(row),
            "width": row.width or None,
            "height": row.height or None,
            "held_out": number in held_out,
            "unreadable": reason or None,
        }

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # decoders let other threads run
        starts = range(0, len(source), _CHUNK)
        chunks = (range(start, min(start + _CHUNK, len(source))) for start in starts)
        for item in chain.from_iterable(threads.map(inspected, chunk) for chunk in chunks):
            why = item["unreadable"]
            if options.json:
                print(json.dumps(item))
            elif options.items:
                text = f"cannot be read: {why}" if why else " | ".join(map(repr, item["captions"]))
                print(f"{item['item']}  {item['width'] or '?'}x{item['height'] or '?'}  {text}")
            if why:
                yield why, item["item"]


def _save_sheet(
    config: FluxJobConfig, samples: TrainingSamples, options: argparse.Namespace
) -> str:
    """Where the first pictures of the run are shown, as they will be trained on; "" for none."""
    pictures = []
    for position in range(min(options.count, len(samples.source))):
        try:
            pictures.append(to_pil(samples.picture(position)[1]))
        except RuntimeError:  # no item near that position can be read: the table says why
            continue
        pictures[-1].thumbnail((_CELL, _CELL))
    if not pictures:
        return ""
    path = options.sheet or Path(config.job.dump_folder) / "contact_sheet.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid(pictures, min(_COLUMNS, len(pictures))).save(path, format="PNG")
    except OSError as error:
        raise ConfigError([f"--sheet: {path} cannot be written: {error.strerror}"]) from error
    return str(path)
