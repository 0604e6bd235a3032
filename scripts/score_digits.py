"""Judge the digits that a trained run draws: read as prompted, own or copied, and their spread.

python scripts/score_digits.py --count 1000
python scripts/score_digits.py --count 1000 --job.dump_folder outputs/flux_digits
"""

import argparse
import sys

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torchtitan.tools.logging import init_logger

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.evaluation.digits import (
    reader_accuracy,
    score_digits,
    score_prompts,
    score_settings,
)
from torchtitan_flux.inference.open_run import load_model, open_run
from torchtitan_flux.startup.load_config import load_config_or_exit
from torchtitan_flux.training.console import quieten_libraries
from torchtitan_flux.training.image_sampler import ImageSampler


def report(config: FluxJobConfig, count: int) -> None:
    """Print every figure of one run."""
    context = open_run(config)
    model, encoders = load_model(context)
    sampler = ImageSampler(model, encoders, context.args.geometry, context.dims, batch_size=250)
    print(f"checkpoint: {context.checkpoint}")
    print(f"reader on real held-out digits, 5-fold: {100 * reader_accuracy():.1f} %")
    prompts, labels = score_prompts(count)
    for cfg in (2.0, 1.0):
        images = sampler.sample(prompts, score_settings(config, context.args, cfg))
        score = score_digits(images, labels)
        print(
            f"cfg {cfg:g}: {100 * score.read:.1f} % of {score.count} read as prompted · "
            f"nearest training image {score.nearest:.2f}, "
            f"{score.nearest / score.nearest_real:.2f} of real unseen digits' · "
            f"spread within a class {score.spread / score.spread_real:.2f} of the real one"
        )


def main() -> None:
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


if __name__ == "__main__":
    main()
