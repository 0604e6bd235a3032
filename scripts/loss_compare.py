"""The losses of two runs beside each other: one configuration on two meshes, or two configurations.

    python scripts/loss_compare.py --config train_configs/debug_model.toml --steps 20 \\
        --a "--parallelism.data_parallel_shard_degree 1" --a-ranks 1 \\
        --b "--parallelism.data_parallel_shard_degree 8" --b-ranks 8 \\
        -- --model.flavor flux-tiny --training.img_size 64

What follows `--` goes to both. Both go through the launcher, one after the other, without
checkpoints, validation and pictures. Where nothing says otherwise they share a seed, and B trains
on as many images a step as A. Losses are read from TensorBoard, as the float32 they were logged in.
Prints a table, writes a plot (needs matplotlib), and ends with status 1 when the largest relative
difference is above --tolerance; 2 when there is nothing to compare.
"""

import argparse
import math
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from torchtitan_flux.startup.load_config import exit_on_config_error, load_config

REPO = Path(__file__).resolve().parents[1]
TAG = "loss_metrics/global_avg_loss"
FLOOR = 1e-9
"""Where the plot shows a difference of zero."""

Losses = dict[int, float]
"""Loss of each step."""


def main() -> None:
    """Command line."""
    options = parse(sys.argv[1:])
    common = [*baseline(options), *options.common]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        series = {}
        for name in ("a", "b"):
            arguments = [*common, *shlex.split(getattr(options, name))]
            ranks = getattr(options, f"{name}_ranks")
            config = getattr(options, f"{name}_config") or options.config
            series[name] = run(name, config, ranks, arguments, folder / name)
    worst = report(series["a"], series["b"])
    draw(series["a"], series["b"], options)
    if not worst <= options.tolerance:
        print(f"above --tolerance {options.tolerance:g}", file=sys.stderr)
        sys.exit(1)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="train_configs/debug_model.toml")
    parser.add_argument("--steps", type=int, default=20)
    for name in ("a", "b"):
        parser.add_argument(f"--{name}", default="", help="its own --section.key value …")
        parser.add_argument(f"--{name}-ranks", type=int, default=1)
        parser.add_argument(f"--{name}-config", help="its own TOML file, instead of --config")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative")
    parser.add_argument("--plot", default="loss_compare.png")
    parser.add_argument("--folder", help="keeps what the runs leave; default: a temporary one")
    parser.add_argument("common", nargs="*", help="-- --section.key value … of both")
    return parser.parse_args(argv)


def baseline(options: argparse.Namespace) -> list[str]:
    """What both runs get first, so that anything later outranks it."""
    shared = [
        "--training.steps", str(options.steps),
        "--checkpoint.no-enable", "--validation.no-enable",
        "--sampling.no-enable", "--score.no-enable",
    ]  # fmt: skip
    config = resolved(
        options.a_config or options.config,
        options.a_ranks,
        [*shared, *options.common, *shlex.split(options.a)],
    )
    if config.debug.seed is None:
        shared += ["--debug.seed", "0"]
    if config.training.global_batch_size == -1:
        p = config.parallelism
        peers = p.tensor_parallel_degree * p.context_parallel_degree * p.pipeline_parallel_degree
        images = config.training.local_batch_size * (options.a_ranks // peers)
        shared += ["--training.global_batch_size", str(images)]
    return shared


def resolved(config_file: str, ranks: int, arguments: list[str]) -> Any:
    """The configuration as this many ranks would read it; ends the process when it is wrong."""
    os.environ["WORLD_SIZE"] = str(ranks)
    try:
        with exit_on_config_error():
            return load_config(["--job.config_file", config_file, *arguments])
    finally:
        del os.environ["WORLD_SIZE"]


def run(name: str, config: str, ranks: int, arguments: list[str], dump: Path) -> Losses:
    """Train, and return the losses."""
    if dump.exists():
        sys.exit(f"{dump} exists; --folder wants one without")
    print(f"{name}: {ranks} rank{'s' * (ranks > 1)}, {config} {shlex.join(arguments)}", flush=True)
    logged = ["--metrics.enable_tensorboard", "--metrics.log_freq", "1"]
    status, output = launch(
        "train", ranks, ["--job.config_file", config, *arguments, *logged,
                         "--job.dump_folder", str(dump)]
    )  # fmt: skip
    losses = read_losses(dump) if status == 0 else {}
    if not losses:
        print(output, file=sys.stderr)
        print(f"{name} ended with status {status}: nothing to compare", file=sys.stderr)
        sys.exit(2)
    return losses


def launch(command: str, ranks: int, arguments: list[str]) -> tuple[int, str]:
    """Train or infer through our launcher; returns its exit status and what it said."""
    environment = {
        **os.environ,
        "NGPU": str(ranks),
        "PYTHONPATH": os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    finished = subprocess.run(
        [sys.executable, "-m", "torchtitan_flux.launch", command, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return finished.returncode, finished.stdout


def read_losses(dump: Path) -> Losses:
    """Losses in the TensorBoard files of a run, from all its starts; the last start counts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses: Losses = {}
    files = sorted(dump.glob("tb/**/events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    for file in files:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        if TAG in events.Tags()["scalars"]:
            losses |= {event.step: event.value for event in events.Scalars(TAG)}
    return dict(sorted(losses.items()))


def relative(a: float, b: float) -> float:
    """|b - a| / |a|; infinite where one of them is not finite."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(b - a) / abs(a) if a else abs(b)


def report(a: Losses, b: Losses) -> float:
    """Print the table; returns the worst relative difference, infinite where a step is missing."""
    print("  step          loss A          loss B    relative")
    worst, at = 0.0, 0
    for step in sorted(a.keys() | b.keys()):
        if step not in a or step not in b:
            print(f"{step:6d}  missing in {'B' if step in a else 'A'}")
            worst, at = math.inf, step
            continue
        difference = relative(a[step], b[step])
        print(f"{step:6d}  {a[step]:14.8f}  {b[step]:14.8f}  {difference:10.2e}")
        if difference > worst:
            worst, at = difference, step
    print(f"worst: {worst:.2e}" + (f" at step {at}" if at else ""))
    return worst


def draw(a: Losses, b: Losses, options: argparse.Namespace) -> None:
    """Both curves, and below them the relative difference."""
    try:
        import matplotlib
    except ImportError:
        print('no plot: matplotlib is not installed (`pip install -e ".[dev]"`)', file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(2, sharex=True, figsize=(8, 6), layout="constrained")
    for losses, name, style in ((a, "a", "-"), (b, "b", "--")):
        ranks, own = getattr(options, f"{name}_ranks"), getattr(options, name)
        own = own if len(own) < 60 else own[:59] + "…"
        label = f"{name.upper()}: {ranks} rank{'s' * (ranks > 1)} {own}"
        upper.plot(list(losses), list(losses.values()), style, label=label)
    steps = [step for step in a if step in b]
    lower.semilogy(steps, [max(relative(a[s], b[s]), FLOOR) for s in steps], ".-", color="black")
    lower.axhline(options.tolerance, color="tab:red", linestyle=":", label="tolerance")
    upper.set_ylabel("loss")
    lower.set_ylabel("relative difference")
    lower.set_xlabel("step")
    lower.xaxis.get_major_locator().set_params(integer=True)
    for axes in (upper, lower):
        axes.legend(fontsize="small")
    path = Path(options.plot)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")


if __name__ == "__main__":
    main()
