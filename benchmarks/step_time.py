"""Seconds of one optimisation step, ours beside that of torchtitan 0.2.2's own FLUX:

    python benchmarks/step_time.py --dtype bfloat16
    python benchmarks/step_time.py --case alike --dtype bfloat16 --compile ours
    python benchmarks/step_time.py --case alike --device cuda --dtype bfloat16 --compile --batch 16

A step is the flow step, forward, backward, clipping and AdamW of the transformer, on one rank and
on encoded tensors that are the same for both; encoders, codec and data loading are left out of
both. The model is flux-debug, whose dimensions are equal in both: hidden 1536, 12 heads, 2 + 2
blocks, 4096 text and 768 pooled features. Each side is put together as its trainer does it on one
rank: ours under fully_shard, theirs bare under torch.autocast; each clips with its own function,
and AdamW (fused) is torchtitan's, for both. They step by turns, each in a process of its own that
is set up as by its trainer (on a CPU ours keeps freed memory), with the same threads; ratios are
those of neighbouring turns.

--case shipped (the default) gives each the activation checkpointing of its own debug_model.toml:
full in theirs, none in ours, where it fits; --case alike gives both --ac. The --dtype is the same
in both. With --compile the blocks of both are compiled, though their trainer compiles nothing, and
with --compile ours only ours.

Their attention is causal (0.2.2 lets is_causal default to true), half of attention's arithmetic and
3 % of the step's at 256 px; the times are compared as they are.
"""

import argparse
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchtitan_flux.torchtitan_shim  # isort: skip  before torchtitan

import tomli
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchtitan.components.loss import build_mse_loss
from torchtitan.components.optimizer import build_optimizers
from torchtitan.config import ConfigManager
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.models.flux.utils import create_position_encoding_for_latents, pack_latents

from torchtitan.models import flux as theirs
from torchtitan_flux.latents import ImageSize, pack
from torchtitan_flux.model import FLAVORS, FluxModel, FluxModelArgs, flops_per_image
from torchtitan_flux.model.inputs import TextConditioning
from torchtitan_flux.parallel.clip import clip_gradients
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.parallel.parallelize import parallelize_flux
from torchtitan_flux.startup.load_config import load_config
from torchtitan_flux.training.conditioning import EncodedBatch
from torchtitan_flux.training.losses import flow_inputs, forward_backward
from torchtitan_flux.training.process import start_process_group

FLAVOR = "flux-debug"
MAX_NORM = 2.0
Step = Callable[[], Tensor]
"""Does one optimisation step and returns its loss."""


@dataclass(frozen=True)
class Setting:
    """How one side computes."""

    dtype: str
    ac: str
    compile: bool

    def __str__(self) -> str:
        return f"{self.dtype}, ac {self.ac}{', compiled' * self.compile}"


@dataclass(frozen=True)
class Inputs:
    """What the encoders would have made of a batch, and its noise and times."""

    latents: Tensor
    noise: Tensor
    t: Tensor
    text: Tensor
    pooled: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=["alike", "shipped"], default="shipped")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--ac", choices=["none", "full"], help="with --case alike: of both")
    parser.add_argument("--compile", nargs="?", choices=["both", "ours"], const="both")
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--text-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--profile", action="store_true", help="print where each side's time goes")
    options = parser.parse_args()
    if (options.device == "cuda") != torch.cuda.is_available():
        # torchtitan binds its device when it is imported
        parser.error("--device cuda needs a GPU; --device cpu needs CUDA_VISIBLE_DEVICES=''")
    if options.ac and options.case == "shipped":
        parser.error("--ac is of --case alike; --case shipped takes it from the two TOML files")
    args = FLAVORS[FLAVOR]
    sides = dict(zip(STEPS, settings(options), strict=True))
    for name, setting in sides.items():
        print(f"{name:10} {setting}")
    print(
        f"{FLAVOR}, {options.batch} x {options.size} px, {options.text_tokens} text tokens; "
        f"{torch.get_num_threads()} threads, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    flops = options.batch * flops_per_image(args, ImageSize.of(options.size), options.text_tokens)
    steppers = {name: Stepper(name, setting, options) for name, setting in sides.items()}
    compare(steppers, options, flops)
    for stepper in steppers.values():
        stepper.close()


def settings(options: argparse.Namespace) -> tuple[Setting, Setting]:
    """Ours and theirs."""
    files = ("train_configs/debug_model.toml", "tests/assets/torchtitan/debug_model.toml")
    shipped = options.case == "shipped"
    ours, theirs = (checkpointing(file) if shipped else options.ac or "none" for file in files)
    return (
        Setting(options.dtype, ours, compile=options.compile is not None),
        Setting(options.dtype, theirs, compile=options.compile == "both"),
    )


def checkpointing(file: str) -> str:
    """activation_checkpoint.mode of a TOML file of this repository."""
    section = tomli.loads(Path(file).read_text()).get("activation_checkpoint", {})
    return section.get("mode", "none")


def draw(args: FluxModelArgs, size: ImageSize, options: argparse.Namespace) -> Inputs:
    """A batch of normal numbers."""
    torch.manual_seed(0)
    b, device = options.batch, options.device
    latents = (b, *args.geometry.latent_shape(size))
    return Inputs(
        latents=torch.randn(latents).to(device),
        noise=torch.randn(latents).to(device),
        t=torch.rand(b).to(device),
        text=torch.randn(b, options.text_tokens, args.context_in_dim).to(device),
        pooled=torch.randn(b, args.vec_in_dim).to(device),
    )


def our_step(args: FluxModelArgs, inputs: Inputs, setting: Setting) -> Step:
    """Model and step of training/trainer.py on one rank."""
    switch = "--compile.enable" if setting.compile else "--compile.no-enable"
    config = load_config(
        ["--job.config_file", "train_configs/debug_model.toml", "--debug.seed", "0", switch,
         "--activation_checkpoint.mode", setting.ac,
         "--training.mixed_precision_param", setting.dtype]
    )  # fmt: skip
    start_process_group(config)
    if inputs.latents.device.type == "cpu":
        torchtitan_flux.torchtitan_shim.keep_freed_memory()
    dims = FluxParallelDims.of(config.parallelism, 1)
    dims.build_mesh()
    with torch.device("meta"):
        model = FluxModel(args)
    model = parallelize_flux(model, dims, config)
    ready(model, inputs)
    optimizers = build_optimizers([model], config.optimizer, dims)
    patch = args.geometry.patch
    height, width = (side * args.downscale for side in inputs.latents.shape[-2:])
    text = TextConditioning(inputs.text, inputs.pooled)

    def step() -> Tensor:
        optimizers.zero_grad()
        latents, noise = (pack(x, patch) for x in (inputs.latents, inputs.noise))
        encoded = EncodedBatch(latents, noise, text, ImageSize(height, width))
        flow = flow_inputs(args, encoded, inputs.t, None)
        losses = forward_backward(model, *flow, latents.numel(), last=True)
        clip_gradients(model.parameters(), MAX_NORM)
        optimizers.step()
        return losses.sum()

    return step


def their_step(args: FluxModelArgs, inputs: Inputs, setting: Setting) -> Step:
    """Model and step of torchtitan/models/flux/train.py on one rank, after its encoders."""
    config = ConfigManager().parse_args(
        ["--activation_checkpoint.mode", setting.ac,
         "--training.mixed_precision_param", setting.dtype]
    )  # fmt: skip
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    with torch.device("meta"):
        model = theirs.FluxModel(theirs.flux_args[FLAVOR])
    model = theirs.parallelize_flux(model, dims, config)
    if setting.compile:
        for block in [*model.double_blocks, *model.single_blocks]:  # type: ignore[misc]
            block.compile()
    ready(model, inputs)
    optimizers = build_optimizers([model], config.optimizer, dims)
    amp = dist_utils.maybe_enable_amp(dims, setting.dtype, inputs.latents.device.type)
    loss_fn = build_mse_loss(config)
    b, _, height, width = inputs.latents.shape

    def step() -> Tensor:
        optimizers.zero_grad()
        with torch.no_grad(), torch.device(inputs.latents.device):
            sigmas = inputs.t.view(-1, 1, 1, 1)
            latents = pack_latents((1 - sigmas) * inputs.latents + sigmas * inputs.noise)
            target = pack_latents(inputs.noise - inputs.latents)
            positions = create_position_encoding_for_latents(b, height, width, 3)
            text_positions = torch.zeros(b, inputs.text.shape[1], 3)
        with amp:
            predicted = model(
                img=latents,
                img_ids=positions,
                txt=inputs.text,
                txt_ids=text_positions,
                y=inputs.pooled,
                timesteps=inputs.t,
            )
            loss = loss_fn(predicted, target) / target.numel()
        del predicted, target
        loss.backward()
        dist_utils.clip_grad_norm_(list(model.parameters()), MAX_NORM, foreach=True)
        optimizers.step()
        return loss.detach()

    return step


def ready(model: nn.Module, inputs: Inputs) -> None:
    """Off the meta device, with initial values."""
    model.to_empty(device=inputs.latents.device)
    with torch.no_grad():
        model.init_weights()  # type: ignore[operator]
    model.train()


class Stepper:
    """One side in a process of its own, which steps when it is told to."""

    def __init__(self, name: str, setting: Setting, options: argparse.Namespace) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(name, setting, options, theirs))
        self._process.start()

    def ask(self, what: str) -> Any:
        """ "step" -> Turn, "profile" -> text."""
        self._pipe.send(what)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def serve(name: str, setting: Setting, options: argparse.Namespace, pipe: Any) -> None:
    """The process of one side."""
    warnings.filterwarnings("ignore")
    args = FLAVORS[FLAVOR]
    step = STEPS[name](args, draw(args, ImageSize.of(options.size), options), setting)
    while (what := pipe.recv()) is not None:
        pipe.send(profiled(step, options.device) if what == "profile" else timed(step, options))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def compare(steppers: dict[str, Stepper], options: argparse.Namespace, flops: float) -> None:
    """Both by turns; prints medians and ratios."""
    turns: dict[str, list[Turn]] = {name: [] for name in steppers}
    for name, stepper in steppers.items():
        for _ in range(options.warmup):
            if not math.isfinite(stepper.ask("step").loss):
                raise SystemExit(f"{name}: the loss is not finite")
    for number in range(options.rounds):
        for name in sorted(steppers, reverse=bool(number % 2)):
            turns[name].append(steppers[name].ask("step"))
    for name, found in turns.items():
        seconds = [turn.seconds for turn in found]
        middle = statistics.median(seconds)
        print(
            f"{name:10} {1e3 * middle:9.1f} ms a step "
            f"({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f}), "
            f"{options.batch / middle:.3f} images/s, {flops / middle / 1e12:.3f} TFLOP/s, "
            f"CPU time {1e3 * statistics.median(turn.busy for turn in found):.1f} ms"
        )
    pairs = list(zip(turns["ours"], turns["torchtitan"], strict=True))
    ratios = [b.seconds / a.seconds for a, b in pairs]
    cheaper = [b.busy / a.busy for a, b in pairs]
    print(
        f"ours is {statistics.median(ratios):.2f} times as fast "
        f"({min(ratios):.2f} to {max(ratios):.2f}, {options.rounds} rounds); "
        f"by CPU time {statistics.median(cheaper):.2f} "
        f"({min(cheaper):.2f} to {max(cheaper):.2f})"
    )
    if options.profile:
        for name, stepper in steppers.items():
            print(f"\n{name}\n{stepper.ask('profile')}")


@dataclass(frozen=True)
class Turn:
    """What one step took: by the clock, and of all threads of its process."""

    seconds: float
    busy: float
    loss: float


def timed(step: Step, options: argparse.Namespace) -> Turn:
    begin, busy = time.perf_counter(), time.process_time()
    loss = step()
    if options.device == "cuda":
        torch.cuda.synchronize()
    return Turn(time.perf_counter() - begin, time.process_time() - busy, loss.item())


def profiled(step: Step, device: str) -> str:
    """Operators of one step by their own time."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as found:
        step()
    by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return found.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=50)


STEPS = {"ours": our_step, "torchtitan": their_step}


if __name__ == "__main__":
    main()
