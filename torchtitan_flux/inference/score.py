"""All figures of a digits run; scripts/score_digits.py is its command."""

import argparse
import sys

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torchtitan.tools.logging import init_logger

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.data.loader import ValidationLoader
from torchtitan_flux.data.sources.registry import build_source
from torchtitan_flux.data.sources.source import Item, Source, Split
from torchtitan_flux.evaluation.digits import (
    reader_accuracy,
    score_digits,
    score_prompts,
    score_settings,
)
from torchtitan_flux.inference.open_run import Session, open_session
from torchtitan_flux.startup.load_config import load_config_or_exit
from torchtitan_flux.training.console import quieten_libraries
from torchtitan_flux.training.data import validation_samples
from torchtitan_flux.training.losses import flow_inputs, sample_losses
from torchtitan_flux.training.validator import TIME_GRIDS, mean_loss


class SameNoise:
    """A source whose items go by their number modulo `period`.

    Validation noise belongs to the item id: under equal ids, held-out and training items meet
    the same noise.
    """

    def __init__(self, source: Source, period: int):
        self.source = source
        self.name = source.name
        self.period = period

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        item = self.source[index]
        return Item(item.image, item.captions, str(index % self.period))


def split_loss(session: Session, split: Split, period: int) -> float:
    """Mean loss over a split at all eight times, under noise shared between splits."""
    args = session.args
    source = SameNoise(build_source("digits", split), period)
    samples = validation_samples(source, session.encoders.tokenizer, session.config)
    loss, _ = mean_loss(
        ValidationLoader(samples, batch_size=120),
        session.encoders,
        lambda encoded, t: sample_losses(session.model, *flow_inputs(args, encoded, t, None)),
        TIME_GRIDS["midpoints"](),
        all_times=True,
    )
    return loss


def report(config: FluxJobConfig, count: int) -> None:
    """Print every figure of one run."""
    session = open_session(config, batch_size=250)
    print(f"checkpoint: {session.checkpoint}")
    own = reader_accuracy()
    print(f"reader on real held-out digits, 5-fold: {100 * own:.1f} %")
    prompts, labels = score_prompts(count)
    for cfg in (2.0, 1.0):
        images = session.painter.draw(prompts, score_settings(config, session.args, cfg))
        score = score_digits(images, labels)
        print(
            f"cfg {cfg:g}: {100 * score.read:.1f} % of {score.count} read as prompted · "
            f"nearest training image {score.nearest:.2f}, "
            f"{score.nearest / score.nearest_real:.2f} of real unseen digits' · "
            f"spread within a class {score.spread / score.spread_real:.2f} of the real one"
        )
    held_out_items = len(build_source("digits", "held_out"))
    held_out = split_loss(session, "held_out", held_out_items)
    train = split_loss(session, "train", held_out_items)
    print(
        f"loss at the same noise: held out {held_out:.4f}, training {train:.4f}, "
        f"ratio {held_out / train:.3f}"
    )


def main() -> None:
    """Command line of scripts/score_digits.py."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="digits at each CFG scale")
    options, rest = parser.parse_known_args()
    init_logger()
    quieten_libraries()
    if not any(arg.startswith("--job.config") for arg in rest):
        rest = ["--job.config_file", "train_configs/flux_digits.toml", *rest]
    config = load_config_or_exit(rest, training=False)
    try:
        report(config, options.count)
    except (ValueError, FileNotFoundError) as error:
        print(f"Cannot score: {error}", file=sys.stderr)
        sys.exit(2)
    torch.distributed.destroy_process_group()
