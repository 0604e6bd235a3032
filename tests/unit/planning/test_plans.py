"""What is proposed fits, what cannot fit is refused, and trackers count what lives."""

from types import SimpleNamespace

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch

from torchtitan_flux.model import FLAVORS
from torchtitan_flux.planning import fits as fits_module
from torchtitan_flux.planning.command import model_args, parse_mesh
from torchtitan_flux.planning.communication import Mesh
from torchtitan_flux.planning.estimate import GIB, estimate, with_mesh
from torchtitan_flux.planning.fits import fits, least
from torchtitan_flux.planning.propose import USABLE, meshes, propose, with_checkpointing
from torchtitan_flux.planning.report import plan_text, proposals_text
from torchtitan_flux.planning.timeline import Segment, Timeline
from torchtitan_flux.planning.tracker import MemoryTracker, ring_bytes
from torchtitan_flux.startup.load_config import ConfigError, load_config, read_config

MIB = 2**20


def tiny(*more: str):
    return load_config(
        [
            "--job.config_file", "train_configs/debug_model.toml",
            "--model.flavor", "flux-tiny",
            "--training.local_batch_size", "2",
            "--training.mixed_precision_param", "bfloat16",
            *more,
        ]
    )  # fmt: skip


def dev(*more: str):
    return read_config(
        [
            "--job.config_file", "train_configs/flux_dev_model.toml",
            "--training.img_size", "1024",
            "--training.local_batch_size", "1",
            "--sampling.no-enable",
            *more,
        ]
    )  # fmt: skip


def test_the_tracker_counts_storages_while_they_live():
    with MemoryTracker() as tracker:
        a = torch.zeros(MIB)
        view = a[10:]
        b = a + 1
        assert tracker.alive == 8 * MIB
        tracker.mark("then")
        del a, b
        assert tracker.alive == 4 * MIB, "the view keeps it"
        c = torch.zeros(3 * MIB)
        c.untyped_storage().resize_(0)
        tracker.mark("end")
    assert tracker.segments == [
        Segment("begin", kept=8 * MIB, rise=8 * MIB),
        Segment("then", kept=-4 * MIB, rise=8 * MIB),
    ]
    del view


def test_a_timeline_repeats_its_middle():
    shown = [Segment("forward", "double_blocks", n, kept=10 + n, rise=100) for n in range(3)]
    line = Timeline([*shown, Segment("backward", kept=-33, rise=5)])
    many = line.repeated({"double_blocks": 6, "single_blocks": 0})
    assert many.activations == 10 + 4 * 11 + 12
    assert many.peak == 10 + 4 * 11 + 100


@pytest.mark.parametrize(
    ("kind", "sent"), [("all-gather", 75), ("reduce-scatter", 75), ("all-to-all", 75),
                       ("all-reduce", 150), ("send", 100)],
)  # fmt: skip
def test_bytes_on_a_ring_of_four(kind, sent):
    assert ring_bytes(kind, 4, 100) == sent


def test_meshes_are_all_that_the_model_can_be_cut_by():
    found = list(meshes(FLAVORS["flux-dev"], 24))
    assert all(mesh.ranks == 24 and 24 // mesh.tp % mesh.cp == 0 for mesh in found)
    assert len(found) == len(set(found))
    assert Mesh(cp=24) in found
    assert Mesh(replicate=3, shard=8) in found
    assert Mesh(shard=3, tp=8) in found
    assert not any(mesh.tp in (12, 24) for mesh in found), "a tensor group stays on its node"


@pytest.mark.long
def test_what_is_proposed_fits_and_what_needs_more_does_not():
    config = tiny()
    args = model_args(config)
    whole, _ = estimate(with_mesh(config, Mesh(shard=4)), args, Mesh(shard=4))
    memory = whole.reserved / USABLE
    found = propose(config, args, 4, memory, keep=3)
    assert len({p.mesh for p in found}) == 3
    needs = [p.estimate.reserved for p in found]
    assert needs == sorted(needs)
    for p in found:
        plan = with_checkpointing(with_mesh(config, p.mesh), p.checkpointing)
        assert estimate(plan, args, p.mesh)[0].reserved <= 1.05 * whole.reserved
    assert str(found[0].mesh) in proposals_text(found, 4, memory, 2)
    assert propose(config, args, 4, memory / 1000) == []


def test_a_plan_says_what_does_not_fit():
    mesh = Mesh(replicate=2, shard=2, tp=2)
    config = with_mesh(tiny(), mesh)
    args = model_args(config)
    found, _ = estimate(config, args, mesh)
    text = plan_text(config, args, mesh, found, 2.0 * found.reserved)
    assert "fits:" in text
    assert "gradients of replicas (all-reduce)" in text
    assert found.peak < found.reserved
    text = plan_text(config, args, mesh, found, 1.0 * found.reserved)
    assert "DOES NOT FIT" in text, "a part of the memory is not planned with"


@pytest.mark.parametrize(
    ("more", "optimizer", "averages"),
    [((), 2, 0), (("--optimizer.name", "AdamW8bit"), 0.51, 0),
     (("--optimizer.name", "Adafactor"), 0.0005, 0), (("--ema.decay", "0.9,0.99"), 2, 2)],
)  # fmt: skip
def test_optimizers_and_averages_are_counted(more, optimizer, averages):
    """In multiples of the parameters, four bytes each."""
    mesh = Mesh(shard=2)
    found, _ = estimate(config := with_mesh(dev(*more), mesh), FLAVORS["flux-dev"], mesh)
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
    config = with_checkpointing(with_mesh(dev("--training.img_size", str(size)), mesh), mode)
    config.training.local_batch_size = batch
    config.sampling.enable = False
    found, _ = estimate(config, FLAVORS["flux-dev"], mesh)
    assert found.reserved / GIB == pytest.approx(took, rel=0.03)


def test_the_bound_from_below_is_below(monkeypatch):
    monkeypatch.setattr(fits_module, "resolve_model_args", lambda _: FLAVORS["flux-dev"])
    for mode in ("none", "full"):
        config = with_checkpointing(dev(), mode)
        found, _ = estimate(with_mesh(config, Mesh(shard=8)), FLAVORS["flux-dev"], Mesh(shard=8))
        assert 0.7 * found.peak < sum(least(config, 8).values()) <= found.peak


def test_a_run_that_cannot_fit_is_refused(monkeypatch):
    monkeypatch.setattr(fits_module, "resolve_model_args", lambda _: FLAVORS["flux-dev"])

    def card(device: int) -> SimpleNamespace:
        return SimpleNamespace(total_memory=(80 if device == 3 else 40) * GIB)

    monkeypatch.setattr(
        fits_module.utils.device_module, "get_device_properties", card, raising=False
    )
    reason = fits(dev("--activation_checkpoint.mode", "none"), 8, 1)
    assert reason is not None
    assert "at least 59.9 GiB" in reason
    assert 'activation_checkpoint.mode = "full"' in reason
    assert fits(dev("--activation_checkpoint.mode", "full"), 8, 1) is None
    accumulated = ("--training.global_batch_size", "16")
    reason = fits(dev("--activation_checkpoint.mode", "full", *accumulated), 8, 1)
    assert reason is not None
    assert "training.global_batch_size" in reason
    own = fits(dev("--activation_checkpoint.mode", "none"), 8, 1, device=3)
    assert own is None, "its own card is larger"


def test_a_small_run_is_never_refused():
    assert fits(tiny(), 1, 1) is None


def test_ranks_that_share_a_machine_without_gpus_share_its_memory(monkeypatch):
    need = sum(least(tiny(), 4).values())

    class Machine:
        total_memory = 2 * need

    device = fits_module.utils.device_module
    monkeypatch.setattr(device, "get_device_properties", lambda _=None: Machine, raising=False)
    assert fits(tiny(), 4, 2) is None, "two machines"
    assert "the run needs at least" in (fits(tiny(), 4, 4) or "")


def test_degrees_are_read_and_refused():
    assert parse_mesh("replicate=8,shard=4") == Mesh(8, 4)
    for wrong in ("fsdp=3", "shard", "shard=0", "shard=x"):
        with pytest.raises(ConfigError, match="write replicate=8"):
            parse_mesh(wrong)
