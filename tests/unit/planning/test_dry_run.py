"""Figures of the 12B model, and that three blocks of a kind tell what all of them do."""

from dataclasses import replace

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest

from torchtitan_flux.model import FLAVORS
from torchtitan_flux.planning.communication import Mesh, messages
from torchtitan_flux.planning.dry_run import dry_run
from torchtitan_flux.planning.estimate import GIB, Fitted, estimate, parameters_of, with_mesh
from torchtitan_flux.planning.propose import with_checkpointing
from torchtitan_flux.startup.load_config import read_config

TINY = replace(FLAVORS["flux-tiny"], depth=5, depth_single_blocks=6)


def configured(mode: str, mesh: Mesh, flavor: str = "flux-dev", *more: str):
    config = read_config(
        [
            "--job.config_file", "train_configs/flux_dev_model.toml",
            "--model.flavor", flavor,
            "--training.img_size", "1024",
            "--training.local_batch_size", "1",
            "--sampling.no-enable",
            *more,
        ]
    )  # fmt: skip
    return with_checkpointing(with_mesh(config, mesh), mode)


@pytest.mark.parametrize(
    ("mode", "mesh", "gib"),
    [
        ("none", Mesh(shard=8), 41.9),
        ("op", Mesh(shard=8), 15.8),
        ("full", Mesh(shard=8), 1.7),
        ("full", Mesh(cp=8), 0.21),
    ],
)
def test_activations_of_flux_dev_at_1024_pixels(mode, mesh, gib):
    run = dry_run(configured(mode, mesh), FLAVORS["flux-dev"], 1, 4096, 512)
    assert run.step.activations / GIB == pytest.approx(gib, rel=0.1)


@pytest.mark.parametrize(
    ("ranks", "gib"), [(8, 22.15), pytest.param(64, 2.77, marks=pytest.mark.long), (512, 0.35)]
)
def test_states_of_flux_dev(ranks, gib):
    found, _ = estimate(
        configured("full", Mesh(shard=ranks)), FLAVORS["flux-dev"], Mesh(shard=ranks)
    )
    states = found.parameters + found.gradients + found.optimizer
    assert states / GIB == pytest.approx(gib, rel=0.012)
    assert found.parameters * ranks / 4 == pytest.approx(
        parameters_of(FLAVORS["flux-dev"]), rel=1e-3
    )


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("mesh", [Mesh(shard=2, cp=2), Mesh(replicate=2)], ids=str)
def test_three_blocks_of_a_kind_stand_for_all(mesh, mode):
    config = configured(mode, mesh, "flux-tiny")
    few = dry_run(config, TINY, 2, 64, 16)
    whole = dry_run(config, TINY, 2, 64, 16, whole=True)
    assert few.parameters == whole.parameters
    assert few.step.activations == whole.step.activations
    assert few.step.peak == whole.step.peak
    assert few.step.sent() == whole.step.sent()


@pytest.mark.parametrize(
    ("mesh", "mode", "microbatches"),
    [
        (Mesh(replicate=2, shard=4), "none", 1),
        (Mesh(replicate=2, shard=4), "full", 3),
        (Mesh(shard=2, cp=4), "full", 1),
        pytest.param(Mesh(shard=4, tp=2), "full", 1, marks=pytest.mark.long),
        (Mesh(shard=2, cp=2, tp=2), "op", 1),
    ],
)
def test_messages_in_closed_form_are_those_counted(mesh, mode, microbatches):
    args = replace(TINY, hidden_size=384, num_heads=16)
    run = dry_run(configured(mode, mesh), args, 2, 256, 64, microbatches=microbatches)
    counted: dict[str, int] = {}
    for (kind, _), size in run.step.sent().items():
        counted[kind] = counted.get(kind, 0) + size
    found: dict[str, int] = {}
    own = sum(run.parameters.values()) // 4 * mesh.fsdp
    recomputed = float(mode == "full")
    for m in messages(args, mesh, own, 2, 256, 64, recomputed, microbatches):
        found[m.kind] = found.get(m.kind, 0) + m.sent
    for kind, size in found.items():
        assert size == pytest.approx(counted[kind], rel=0.05), kind
    assert sum(counted.values()) == pytest.approx(sum(found.values()), rel=0.05)


@pytest.mark.parametrize(
    ("mesh", "mode"),
    [
        pytest.param(Mesh(shard=16), "none", marks=pytest.mark.long),
        (Mesh(shard=16), "full"),
        pytest.param(Mesh(replicate=2, shard=2, cp=4, tp=2), "op", marks=pytest.mark.long),
    ],
)
def test_what_is_fitted_is_what_a_dry_run_finds(mesh, mode):
    args = replace(TINY, hidden_size=384, num_heads=16)
    config = configured(mode, mesh, "flux-tiny", "--training.img_size", "256")
    config.training.local_batch_size = 8
    found, _ = estimate(config, args, mesh)
    fitted = Fitted(config, args, mesh).estimate(mesh, 8)
    assert fitted.step == pytest.approx(found.step, rel=0.02)
    assert fitted.activations == pytest.approx(found.activations, rel=0.01)


def test_a_pipeline_stage_keeps_its_weights_whole():
    """The first of four stages has 14 of FLUX.1's double blocks, more than a quarter of it."""
    args, mesh = FLAVORS["flux-dev"], Mesh(shard=2, pp=4)
    config = configured("full", mesh, "flux-dev", "--training.local_batch_size", "8")
    found, run = estimate(config, args, mesh)
    double = run.parameters["double_blocks"] / args.depth
    assert 13 * double < found.parameters < 16 * double
    assert found.step > found.parameters / 4 * mesh.fsdp * (2 + 4)
    inputs = (4096 + 512) * args.hidden_size * 2
    assert found.activations == pytest.approx(4 * 14 * inputs, rel=0.01), "four microbatches"


def test_gradients_of_microbatches_are_kept_whole():
    """FSDP2 keeps gradients that it does not communicate unsharded: 44 GiB for FLUX.1."""
    args, mesh = FLAVORS["flux-dev"], Mesh(shard=64)
    one, _ = estimate(configured("full", mesh), args, mesh)
    config = configured("full", mesh, "flux-dev", "--training.global_batch_size", "128")
    two, _ = estimate(config, args, mesh)
    assert two.peak - one.peak > 44 * GIB
