"""Carry one set of points in the plane into another, with FluxModel as a library.

    python examples/point_sets.py --picture point_sets.png

trains a transformer of 0.4 M parameters for about a minute on one core. No images, no text, no
trainer: the two token sequences of FLUX.1 are two sets of points of different kind and size.

    image tokens   128 points (x, y): two moons at t = 1, points of the target curve at t = 0
    text tokens    20 sketch points (x, y, direction) of the target: where to go
    y              mean and spread of the sketch
    ids            where a point is: the sets have no order, and attention sees who is near whom

The target is a ring, a spiral or a figure eight, turned, stretched and moved at random, so that
every set is new. What is printed is the sliced Wasserstein distance to the target of sets that
training never saw, before and after the way from t = 1 to t = 0.
"""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchtitan_flux.flow_matching import Velocity, interpolate, squared_errors
from torchtitan_flux.model import FluxModel, FluxModelArgs
from torchtitan_flux.sampling.euler import euler
from torchtitan_flux.sampling.schedules import SCHNELL

POINTS, SKETCH = 128, 20
IDS_PER_UNIT = 4.0  # rotary angles fit a picture some units wide
SHAPES = ("ring", "spiral", "eight")
ARGS = FluxModelArgs(
    in_channels=2,
    out_channels=2,
    context_in_dim=4,
    vec_in_dim=4,
    hidden_size=64,
    num_heads=4,
    depth=1,
    depth_single_blocks=3,
    axes_dim=(8, 8),
    theta=100,
)


@dataclass(frozen=True)
class PointSets:
    """A batch: where the points start, where they shall go, and what the model is told."""

    source: Tensor  # [b, POINTS, 2]
    target: Tensor  # [b, POINTS, 2]
    twin: Tensor  # the same of another draw: the distance that remains by chance
    sketch: Tensor  # [b, SKETCH, 4]
    summary: Tensor  # [b, 4]


def curve(shape: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Points [b, n, 2] at places u [b, n] in [0, 1] of curves; shape [b] counts in SHAPES."""
    a = 2 * math.pi * u
    ring = np.stack([np.cos(a), np.sin(a)], axis=-1)
    radius = 0.15 + 1.05 * u
    spiral = radius[..., None] * np.stack([np.cos(1.25 * a), np.sin(1.25 * a)], axis=-1)
    eight = np.stack([1.2 * np.sin(a), 1.2 * np.sin(a) * np.cos(a)], axis=-1)
    return np.choose(shape[:, None, None], [ring, spiral, eight])


def two_moons(rng: np.random.Generator, b: int, n: int) -> np.ndarray:
    """Two interleaved half circles with a little noise, [b, n, 2]."""
    a = math.pi * rng.random((b, n))
    upper = rng.random((b, n)) < 0.5
    x = np.where(upper, np.cos(a), 1 - np.cos(a)) - 0.5
    y = np.where(upper, np.sin(a), 0.5 - np.sin(a)) - 0.25
    return np.stack([x, y], axis=-1) + 0.06 * rng.standard_normal((b, n, 2))


def draw(rng: np.random.Generator, b: int, shape: np.ndarray | None = None) -> PointSets:
    """A batch of b pairs; shape [b] fixes the kinds of curve."""
    if shape is None:
        shape = rng.integers(len(SHAPES), size=b)
    angle = 2 * math.pi * rng.random(b)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretch = rng.uniform(0.6, 1.1, (b, 2, 1))
    placed = np.moveaxis(turn, -1, 0) * stretch.transpose(0, 2, 1)
    centre = rng.uniform(-0.6, 0.6, (b, 1, 2))

    def points_at(u: np.ndarray) -> np.ndarray:
        return curve(shape, u) @ placed.transpose(0, 2, 1) + centre

    def points() -> np.ndarray:
        return points_at(rng.random((b, POINTS))) + 0.02 * rng.standard_normal((b, POINTS, 2))

    places = np.broadcast_to((np.arange(SKETCH) + 0.5) / SKETCH, (b, SKETCH))
    here, ahead = points_at(places), points_at(places + 1e-3)
    direction = (ahead - here) / np.linalg.norm(ahead - here, axis=-1, keepdims=True)
    sketch = np.concatenate([here, direction], axis=-1)
    summary = np.concatenate([here.mean(axis=1), here.std(axis=1)], axis=-1)
    arrays = (two_moons(rng, b, POINTS), points(), points(), sketch, summary)
    return PointSets(*(torch.from_numpy(array).float() for array in arrays))


def velocity_of(model: FluxModel, sets: PointSets) -> Velocity:
    """What training and sampling call: the velocity of points x at times t."""
    sketch_ids = IDS_PER_UNIT * sets.sketch[..., :2]

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return model(x, IDS_PER_UNIT * x, sets.sketch, sketch_ids, t, sets.summary)

    return velocity


def train(model: FluxModel, rng: np.random.Generator, steps: int, batch: int) -> None:
    """Adam with a short warm-up and a cosine to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    begin = time.perf_counter()
    for step in range(steps):
        rate = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 2e-3 * rate
        sets = draw(rng, batch)
        t = torch.from_numpy(rng.random(batch)).float()
        x_t, target = interpolate(sets.target, sets.source, t)
        losses = squared_errors(velocity_of(model, sets)(x_t, t), target)
        loss = losses.sum() / sets.target.numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.perf_counter() - begin
            print(f"step {step:5d}   loss {loss.item():.3f}   {seconds:5.1f} s")


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 64) -> Tensor:
    """Mean over directions of the 1-D Wasserstein-1 distance of the projections; [sets]."""
    angle = math.pi * torch.arange(directions) / directions
    axes = torch.stack([angle.cos(), angle.sin()])
    return ((a @ axes).sort(dim=1).values - (b @ axes).sort(dim=1).values).abs().mean(dim=(1, 2))


def plot(path: Path, sets: PointSets, frames: Sequence[Tensor], titles: Sequence[str]) -> None:
    """One row for each kind of curve: the points on their way, the target behind the last."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(SHAPES), len(frames), figsize=(2.4 * len(frames), 2.4 * len(SHAPES))
    )
    for row in range(len(SHAPES)):
        for column, (frame, title) in enumerate(zip(frames, titles, strict=True)):
            axis = axes[row, column]
            if column == 0:
                ways = torch.stack([f[row, ::6] for f in frames])
                axis.plot(*ways.unbind(-1), color="0.8", linewidth=0.7, zorder=0)
                start, heading = sets.sketch[row, :, :2], sets.sketch[row, :, 2:]
                axis.quiver(*start.T, *heading.T, color="tab:orange", width=0.008, scale=14)
            if column == len(frames) - 1:
                axis.scatter(*sets.target[row].T, s=10, color="0.8")
            axis.scatter(*frame[row].T, s=3, color="tab:blue")
            axis.set(xlim=(-2, 2), ylim=(-2, 2), aspect="equal", xticks=[], yticks=[])
            if row == 0:
                axis.set_title(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"picture: {path}")


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Train, carry unseen sets over, print and draw. Returns the distance before and after."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    parser.add_argument("--batch", type=int, default=8, help="sets per step")
    parser.add_argument("--sampling-steps", type=int, default=24, help="Euler steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="PNG to write (needs matplotlib)")
    options = parser.parse_args(argv)

    torch.manual_seed(options.seed)
    model = FluxModel(ARGS)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, np.random.default_rng(options.seed), options.steps, options.batch)

    rng = np.random.default_rng(options.seed + 10**6)
    unseen = draw(rng, 48, shape=np.arange(48) % len(SHAPES))
    velocity = velocity_of(model, unseen)
    times = SCHNELL.times(options.sampling_steps, tokens=POINTS)
    frames = [unseen.source]
    stops = np.linspace(0, options.sampling_steps, 5).astype(int)
    for first, last in pairwise(stops):
        frames.append(euler(velocity, frames[-1], times[first : last + 1]))
    before = sliced_wasserstein(unseen.source, unseen.target)
    after = sliced_wasserstein(frames[-1], unseen.target)
    chance = sliced_wasserstein(unseen.twin, unseen.target)
    print("sliced Wasserstein distance to the target: before, after, of another draw of the target")
    for i, shape in enumerate(SHAPES):
        of_shape = slice(i, None, len(SHAPES))
        means = [distance[of_shape].mean().item() for distance in (before, after, chance)]
        print(f"{shape:>8}   {means[0]:.3f}   {means[1]:.3f}   {means[2]:.3f}")
    if options.picture:
        titles = [f"t = {times[stop]:.2f}" for stop in stops]
        plot(options.picture, unseen, frames, titles)
    return before.mean().item(), after.mean().item()


if __name__ == "__main__":
    main()
