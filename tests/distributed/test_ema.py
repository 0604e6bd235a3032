"""Averages of the weights: right, the same on every mesh, exact when resumed, used where asked."""

import sys

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from ranks import keep_process_group, run_ranks
from tiny_run import arguments
from torch import Tensor

from torchtitan_flux import infer
from torchtitan_flux.startup.load_config import load_config
from torchtitan_flux.training.hooks import Hook
from torchtitan_flux.training.trainer import FluxTrainer
from torchtitan_flux.weights.convert_command import main, open_as
from torchtitan_flux.weights.key_maps import to_layout

STEPS, START, DECAYS = 6, 2, (0.5, 0.9)
EMA = [
    "--training.steps", str(STEPS),
    "--checkpoint.interval", "3",
    "--validation.no-enable",
    "--ema.decay", ",".join(map(str, DECAYS)),
    "--ema.start", str(START),
]  # fmt: skip
FSDP_TP = ["--parallelism.data_parallel_shard_degree", "2"]
FSDP_TP += ["--parallelism.tensor_parallel_degree", "2"]
PP = ["--parallelism.pipeline_parallel_degree", "2"]


class Recorder(Hook):
    """Keeps the whole weights of every step, in float64."""

    def __init__(self, trainer: FluxTrainer):
        self.trainer = trainer
        self.weights: list[dict[str, Tensor]] = []

    def after_optimizer_step(self, step: int) -> None:
        self.weights.append(
            {
                name: parameter.full_tensor().detach().double()
                for part in self.trainer.model_parts
                for name, parameter in part.named_parameters()
            }
        )


def run(argv: list[str]) -> tuple[list[dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """Weights of every step, and the averages at the end, of this rank's stages."""
    recorders: list[Recorder] = []
    trainer = FluxTrainer(load_config(argv), [lambda t: recorders.append(Recorder(t)) or Hook()])
    trainer.hooks.append(recorders[0])
    trainer.train()
    averages = {
        key: {name: value.full_tensor() for name, value in average.values.items()}
        for key, average in trainer.hooks[0].averages.items()
    }
    trainer.close()
    return recorders[0].weights, averages


def reference(
    weights: list[dict[str, Tensor]], decay: float, every: int = 1, start: int = START
) -> dict[str, Tensor]:
    """The average in float64, by its definition."""
    average = weights[0]
    for step, now in enumerate(weights, 1):
        if step <= start:
            average = now
        elif step % every == 0:
            average = {n: decay * average[n] + (1 - decay) * w for n, w in now.items()}
    return average


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n].double() - w.double()).abs().max()) for n, w in expected.items())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    dump = tmp_path_factory.mktemp("ema")
    return run_ranks(1, run, arguments(dump, 8, *EMA))[0], dump


def test_the_average_is_that_of_float64(alone):
    (weights, averages), _ = alone
    assert len(weights) == STEPS
    for decay in DECAYS:
        assert worst(averages[str(decay)], reference(weights, decay)) < 5e-7
        assert worst(averages[str(decay)], weights[-1]) > 1e-5, "it is no copy of the weights"


def test_every_second_step(tmp_path):
    argv = arguments(tmp_path, 8, *EMA, "--ema.every", "2")
    ((weights, averages),) = run_ranks(1, run, argv)
    assert worst(averages["0.9"], reference(weights, 0.9, every=2)) < 5e-7


@pytest.mark.parametrize(
    ("ranks", "mesh", "local_batch"),
    [(4, [], 2), (4, FSDP_TP, 4), (2, PP, 8)],
    ids=["FSDP 4", "FSDP 2 x TP 2", "PP 2"],
)
def test_every_mesh_has_the_same(alone, tmp_path, ranks, mesh, local_batch):
    """That of its own weights to the last digit, and of one rank's as far as those agree."""
    (weights, expected), _ = alone
    runs = run_ranks(ranks, run, arguments(tmp_path, local_batch, *EMA, *mesh))
    found = {k: {n: v for r in runs for n, v in r[1][k].items()} for k in expected}
    own = [{n: w for r in runs for n, w in r[0][s].items()} for s in range(STEPS)]
    apart = max(worst(*pair) for pair in zip(own, weights, strict=True))
    assert apart < 1e-4
    for key, values in expected.items():
        assert worst(found[key], reference(own, float(key))) < 5e-7
        assert worst(found[key], values) < apart + 5e-7


@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_it_goes_on(alone, tmp_path, ranks):
    """From step 3, on one rank to the last bit, and on two."""
    (_, expected), _ = alone
    short = ["--training.steps", "3", "--lr_scheduler.total_steps", str(STEPS)]
    run_ranks(1, run, arguments(tmp_path, 8, *EMA, *short))
    argv = arguments(tmp_path, 8 // ranks, *EMA)
    found = run_ranks(ranks, run, argv)[0][1]
    for key, values in expected.items():
        assert worst(found[key], values) <= (0 if ranks == 1 else 2e-6)


def used(argv: list[str]) -> list[tuple[str, float]]:
    """What validation measures at the last step: (weights, loss)."""
    losses = []
    trainer = FluxTrainer(load_config(argv))
    trainer.validator.metrics.log_validation = lambda loss, step, by_time, weights: losses.append(
        (weights, loss)
    )
    trainer.train()

    def weights() -> dict[str, Tensor]:
        return {n: p.full_tensor() for n, p in trainer.model_parts[0].named_parameters()}

    trained, ema = weights(), trainer.hooks[0]
    average = {n: v.full_tensor() for n, v in ema.averages["0.5"].values.items()}
    with torch.no_grad(), ema.applied("0.5"):
        assert worst(weights(), average) == 0
    assert worst(weights(), trained) == 0, "the trained weights are back"
    trainer.close()
    return losses


@pytest.mark.parametrize(
    ("use_for", "expected"), [("model", [""]), ("ema", ["ema_0.5"]), ("both", ["", "ema_0.5"])]
)
def test_validation_uses_what_was_asked_for(tmp_path, use_for, expected):
    argv = arguments(
        tmp_path, 4, "--training.steps", "3", "--validation.enable", "--validation.freq", "3",
        "--validation.dataset", "shapes", "--validation.steps", "1", "--ema.decay", "0.5",
        "--ema.use_for", use_for, "--validation.local_batch_size", "2",
    )  # fmt: skip
    losses = run_ranks(2, used, argv)[0]
    assert [name for name, _ in losses] == expected
    if use_for == "both":
        assert losses[0][1] != losses[1][1]


def test_a_checkpoint_without_it_begins_with_its_weights(tmp_path):
    without = [*EMA, "--ema.decay", "[]", "--training.steps", "3"]
    run_ranks(1, run, arguments(tmp_path, 8, *without, "--lr_scheduler.total_steps", str(STEPS)))
    ((weights, averages),) = run_ranks(1, run, arguments(tmp_path, 8, *EMA))
    assert worst(averages["0.9"], reference(weights, 0.9, start=1)) < 5e-7


def test_the_average_is_exported_and_drawn(alone, tmp_path):
    """diffusers opens what `convert_checkpoint.py --ema` writes; another decay is refused."""
    (_, averages), dump = alone
    checkpoint = dump / "checkpoint" / f"step-{STEPS}"
    opened = open_as(checkpoint, "flux-tiny", average="0.9")
    for name, value in averages["0.9"].items():
        assert torch.equal(opened.read(name), value), name
    main([str(checkpoint), str(tmp_path / "average"), "--to", "diffusers", "--ema", "0.5"])
    theirs = FluxTransformer2DModel.from_pretrained(tmp_path / "average").state_dict()
    for name, value in to_layout("diffusers", averages["0.5"], opened.args).items():
        assert torch.equal(theirs[name], value), name
    with pytest.raises(ValueError, match=r"no average alone.*decay 0\.5, 0\.9"):
        open_as(checkpoint, "flux-tiny", average="")
    argv = ["--prompt", "a", "--steps", "1", "--size", "64", *arguments(dump, 8)]
    of_weights, of_average = (
        run_ranks(1, draw, [*argv, "--out", str(tmp_path / f"{i}.png"), *more])[0]
        for i, more in enumerate(([], ["--ema", "0.9"]))
    )
    assert of_weights != of_average


def draw(argv: list[str]) -> bytes:
    keep_process_group()
    sys.argv[1:] = argv
    infer.main()
    return Image.open(argv[argv.index("--out") + 1]).tobytes()
