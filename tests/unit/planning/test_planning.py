"""Counted steps and estimates of the 12B model and of tiny ones; what fits is said to fit."""

from dataclasses import replace
from types import SimpleNamespace

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest

from torchtitan_flux.model import FLAVORS
from torchtitan_flux.planning import estimate as fits_module
from torchtitan_flux.planning.command import (
    USABLE,
    meshes,
    model_args,
    plan_text,
    proposals_text,
    propose,
)
from torchtitan_flux.planning.dry_run import Mesh, dry_run, parse_mesh, with_mesh
from torchtitan_flux.planning.estimate import (
    GIB,
    estimate,
    fits,
    lower_bound,
    parameters_of,
    resharded,
    sent_bytes,
)
from torchtitan_flux.startup.load_config import ConfigError, load_config, read_config

ONE = Mesh()
DEV = FLAVORS["flux-dev"]
TINY = replace(FLAVORS["flux-tiny"], depth=5, depth_single_blocks=6, hidden_size=384, num_heads=16)


def dev(mode: str, mesh: Mesh = ONE, *more: str):
    """FLUX.1-dev, one image of 1024 px a rank."""
    config = read_config(
        ["--job.config_file", "train_configs/flux_dev_model.toml", "--sampling.no-enable",
         "--training.img_size", "1024", "--training.local_batch_size", "1", *more]
    )  # fmt: skip
    config.activation_checkpoint.mode = "selective" if mode == "op" else mode  # type: ignore
    config.activation_checkpoint.selective_ac_option = "op"
    return with_mesh(config, mesh)


def tiny(*more: str):
    return load_config(
        ["--job.config_file", "train_configs/debug_model.toml", "--model.flavor", "flux-tiny",
         "--training.local_batch_size", "2", "--training.mixed_precision_param", "bfloat16", *more]
    )  # fmt: skip


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
    run = dry_run(dev(mode, mesh), DEV, mesh)
    assert run.step.activations / GIB == pytest.approx(gib, rel=0.1)


@pytest.mark.parametrize(
    ("ranks", "gib"), [(8, 22.15), pytest.param(64, 2.77, marks=pytest.mark.long), (512, 0.35)]
)
def test_states_of_flux_dev(ranks, gib):
    found, _ = estimate(dev("full"), DEV, Mesh(shard=ranks))
    states = found.parameters + found.gradients + found.optimizer
    assert states / GIB == pytest.approx(gib, rel=0.012)
    assert found.parameters * ranks / 4 == pytest.approx(parameters_of(DEV), rel=1e-3)


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("mesh", [Mesh(shard=2, cp=2), Mesh(replicate=2)], ids=str)
def test_three_blocks_of_a_kind_stand_for_all(mesh, mode):
    config = dev(mode, mesh, "--training.img_size", "256")
    few = dry_run(config, TINY, mesh)
    whole = dry_run(config, TINY, mesh, all_blocks=True)
    assert few.parameters == whole.parameters
    assert few.step.activations == whole.step.activations
    assert few.step.peak == whole.step.peak
    assert few.step.messages() == whole.step.messages()


@pytest.mark.parametrize(
    ("mesh", "mode", "summed"),
    [
        (Mesh(replicate=2, shard=4), "none", 1),
        (Mesh(replicate=2, shard=4), "full", 3),
        (Mesh(shard=2, cp=4), "full", 1),
        pytest.param(Mesh(shard=4, tp=2), "full", 1, marks=pytest.mark.long),
        (Mesh(shard=2, cp=2, tp=2), "none", 2),
    ],
)
def test_counted_messages_are_what_the_plan_of_parallelism_says(mesh, mode, summed):
    config = dev(mode, mesh, "--training.img_size", "256")
    config.training.local_batch_size = 2
    config.training.global_batch_size = 2 * mesh.data * summed
    run = dry_run(config, TINY, mesh, summed)
    own = sum(run.parameters.values()) // 4 * mesh.fsdp
    tokens = 16 * 16 + config.encoder.max_t5_encoding_len
    hidden = 2 * tokens // mesh.cp * TINY.hidden_size * 2  # bfloat16
    passes = summed * (3 if mode == "full" else 2)
    want = {
        # a block gathered for an earlier microbatch's backward pass stays
        ("all-gather", "fsdp"): (summed + 1) * 2 * own * (1 - 1 / mesh.fsdp),
        ("reduce-scatter", "fsdp"): 4 * own * (1 - 1 / mesh.fsdp),
        ("all-reduce", "replicate"): 4 * own // mesh.fsdp * 2 * (1 - 1 / mesh.replicate),
        ("all-reduce", "tp"): passes * 2 * hidden * (2 * 5 + 6) * (1 - 1 / mesh.tp),
        ("all-to-all", "cp"): passes * 4 * hidden / mesh.tp * (5 + 6) * (1 - 1 / mesh.cp),
    }
    sent = sent_bytes(run, config, TINY, mesh)
    for key, size in want.items():
        assert sent.get(key, 0) == pytest.approx(size, rel=0.05), key


@pytest.mark.parametrize(
    ("mesh", "mode"),
    [
        (Mesh(shard=16), "full"),
        pytest.param(Mesh(replicate=2, shard=8, cp=2, tp=2), "op", marks=pytest.mark.long),
    ],
)
def test_one_run_tells_of_any_number_of_shards_and_replicas(mesh, mode):
    config = dev(mode, mesh, "--training.img_size", "256")
    config.training.local_batch_size = 8
    probe = replace(mesh, replicate=2, shard=2)
    found = resharded(dry_run(config, TINY, probe), probe.fsdp / mesh.fsdp, TINY)
    run = dry_run(config, TINY, mesh)
    assert found.step.peak == pytest.approx(run.step.peak, rel=0.02)
    assert found.step.activations == pytest.approx(run.step.activations, rel=0.01)
    for key, size in sent_bytes(run, config, TINY, mesh).items():
        assert sent_bytes(found, config, TINY, mesh)[key] == pytest.approx(size, rel=0.02), key


def test_a_pipeline_stage_keeps_its_weights_whole():
    """The first of four stages has 14 of FLUX.1's double blocks, more than a quarter of it."""
    mesh = Mesh(shard=2, pp=4)
    found, run = estimate(dev("full", mesh, "--training.local_batch_size", "8"), DEV, mesh)
    double = run.parameters["double_blocks"] / DEV.depth
    assert 13 * double < found.parameters < 16 * double
    assert found.step > found.parameters / 4 * mesh.fsdp * (2 + 4)
    inputs = (4096 + 512) * DEV.hidden_size * 2
    assert found.activations == pytest.approx(4 * 14 * inputs, rel=0.01), "four microbatches"


def test_gradients_of_microbatches_are_kept_whole():
    """FSDP2 keeps gradients that it does not communicate unsharded: 44 GiB for FLUX.1."""
    mesh = Mesh(shard=64)
    one, _ = estimate(dev("full"), DEV, mesh)
    two, _ = estimate(dev("full", mesh, "--training.global_batch_size", "128"), DEV, mesh)
    assert two.peak - one.peak > 44 * GIB


def test_meshes_are_all_that_the_model_can_be_cut_by():
    found = list(meshes(DEV, 24))
    assert all(mesh.ranks == 24 and 24 // mesh.tp % mesh.cp == 0 for mesh in found)
    assert len(found) == len(set(found))
    assert Mesh(cp=24) in found
    assert Mesh(replicate=3, shard=8) in found
    assert Mesh(shard=3, tp=8) in found
    assert not any(mesh.tp in (12, 24) for mesh in found), "a tensor group stays on its node"


def test_what_is_proposed_fits_and_what_needs_more_does_not():
    config = tiny()
    args = model_args(config)
    whole, _ = estimate(with_mesh(config, Mesh(shard=4)), args, Mesh(shard=4))
    memory = whole.reserved / USABLE
    found = propose(config, args, 4, memory)
    assert len({p.mesh for p in found}) > 2
    needs = [p.estimate.reserved for p in found]
    assert needs == sorted(needs)
    for p in found:
        plan = estimate(with_mesh(config, p.mesh), args, p.mesh)[0]
        assert plan.reserved <= 1.05 * whole.reserved
    assert str(found[0].mesh) in proposals_text(found, 2)
    mesh = Mesh(replicate=2, shard=2)
    need, run = estimate(config, args, mesh)
    for room, said in ((2.0, "fits:"), (1.0, "DOES NOT FIT")):
        text = plan_text(config, args, mesh, need, run, room * need.reserved)
        assert said in text
        assert "all-reduce over replicate" in text
    assert propose(config, args, 4, memory / 1000) == []


@pytest.mark.parametrize(
    ("more", "optimizer", "averages"),
    [((), 2, 0), (("--optimizer.name", "AdamW8bit"), 0.51, 0),
     (("--optimizer.name", "Adafactor"), 0.0005, 0), (("--ema.decay", "0.9,0.99"), 2, 2)],
)  # fmt: skip
def test_optimizers_and_averages_are_counted(more, optimizer, averages):
    """In multiples of the parameters, four bytes each."""
    mesh = Mesh(shard=2)
    found, _ = estimate(config := dev("full", mesh, *more), DEV, mesh)
    assert config.ema.decay == ([0.9, 0.99] if averages else [])
    assert found.optimizer / found.parameters == pytest.approx(optimizer, rel=0.05)
    assert found.averages == averages * found.parameters


@pytest.mark.parametrize(
    ("mesh", "size", "batch", "mode", "took"),
    [(Mesh(shard=8), 256, 8, "op", 48.70), (Mesh(shard=8), 256, 32, "full", 40.71),
     (Mesh(shard=4, tp=2), 256, 8, "op", 43.30), (Mesh(2, 4), 1024, 2, "op", 82.62)],
)  # fmt: skip
def test_reserved_memory_is_what_torchs_allocator_took(mesh, size, batch, mode, took):
    """GiB of torch 2.13's CUDA build on a stub driver (docs/parallelism.md), in its third step."""
    more = ("--training.img_size", str(size), "--training.local_batch_size", str(batch))
    found, _ = estimate(dev(mode, mesh, *more), DEV, mesh)
    assert found.reserved / GIB == pytest.approx(took, rel=0.03)


def test_a_run_that_cannot_fit_is_refused(monkeypatch):
    monkeypatch.setattr(fits_module, "resolve_model_args", lambda _: DEV)

    def card(device: int) -> SimpleNamespace:
        return SimpleNamespace(total_memory=(80 if device == 3 else 40) * GIB)

    device_module = fits_module.utils.device_module
    monkeypatch.setattr(device_module, "get_device_properties", card, raising=False)
    eight, four = dev("full", Mesh(shard=8)), dev("full", Mesh(shard=4))
    need = sum(lower_bound(eight, 8).values())
    assert 0.7 * need < 22.15 * GIB < need <= estimate(eight, DEV, Mesh(shard=8))[0].peak
    assert fits(eight, 8, 1) is None
    assert "parallelism.data_parallel_shard_degree" in (fits(four, 4, 1) or "")
    assert fits(four, 4, 1, device=3) is None, "its own card is larger"
    summed = dev("full", Mesh(shard=8), "--training.global_batch_size", "16")
    assert "training.global_batch_size" in (fits(summed, 8, 1) or "")


def test_degrees_are_read_and_refused():
    assert parse_mesh("replicate=8,shard=4") == Mesh(8, 4)
    for wrong in ("fsdp=3", "shard", "shard=0", "shard=x"):
        with pytest.raises(ConfigError, match="write replicate=8"):
            parse_mesh(wrong)
