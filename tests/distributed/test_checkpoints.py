"""Contract 5: a checkpoint is complete or invisible; damage is named and passed over."""

import contextlib
import errno
import io
import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_run import Run, arguments, refusal, train, worst
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.distributed.tensor import DTensor
from torch.utils.tensorboard import SummaryWriter

from torchtitan_flux.checkpoint.folder import choose_checkpoint, complete_steps
from torchtitan_flux.checkpoint.manifest import MANIFEST, Manifest
from torchtitan_flux.checkpoint.storage import SafeReader
from torchtitan_flux.startup.load_config import load_config
from torchtitan_flux.training import sample_grids as pictures
from torchtitan_flux.training.trainer import FluxTrainer

SHORT = ("--training.steps", "6", "--checkpoint.interval", "2", "--lr_scheduler.warmup_steps", "2")


def run(ranks: int, dump: Path, *more: str, change=None) -> Run:
    argv = arguments(dump, 8 // ranks, *SHORT, *more)
    return run_ranks(ranks, train, argv, change)[0]


def steps_in(dump: Path) -> list[str]:
    return sorted(path.name for path in (dump / "checkpoint").iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Run]:
    dump = tmp_path_factory.mktemp("finished")
    return dump, run(2, dump)


def copy_of(finished: tuple[Path, Run], dump: Path, *steps: int) -> Path:
    for step in steps:
        shutil.copytree(finished[0] / f"checkpoint/step-{step}", dump / f"checkpoint/step-{step}")
    return dump


def biggest_file(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def half_written(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()


def flip(checkpoint: Path) -> None:
    flip_bit(biggest_file(checkpoint))


DAMAGES = {
    "truncated": (lambda c: os.truncate(biggest_file(c), 1000), "has 1000 bytes instead of"),
    "flipped": (flip, "the checksum of"),
    "deleted": (lambda c: biggest_file(c).unlink(), "is missing"),
    "half written": (half_written, f"it has no {MANIFEST}"),
    "metadata": (lambda c: flip_bit(c / ".metadata"), "the checksum of .metadata is wrong"),
    "garbled": (lambda c: (c / MANIFEST).write_text("{"), f"its {MANIFEST} cannot be read"),
}


def test_a_checkpoint_is_a_manifest_of_all_its_files(finished):
    dump, _ = finished
    assert steps_in(dump) == ["step-2", "step-4", "step-6"]
    for step in (2, 4, 6):
        folder = dump / f"checkpoint/step-{step}"
        manifest = Manifest.read(folder)
        assert (manifest.step, manifest.kind, manifest.facts.seed) == (step, "full", 7)
        names = {path.name for path in folder.iterdir()} - {MANIFEST}
        assert set(manifest.files) == names
        assert sum(name.endswith(".distcp") for name in names) == 2, "one file a rank"
        content = json.loads((folder / MANIFEST).read_text())
        assert (content["step"], content["facts"]["randomness_version"]) == (step, 1)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_passed_over(finished, tmp_path, name):
    damage, why = DAMAGES[name]
    folder = copy_of(finished, tmp_path, 2, 4) / "checkpoint"
    damage(folder / "step-4")
    choice = choose_checkpoint(folder)
    assert choice.folder == folder / "step-2"
    assert why in choice.damaged[4]


@pytest.mark.parametrize("name", ["flipped", "half written"])
def test_a_run_continues_from_the_one_before(finished, tmp_path, name):
    """With k = 2 the last good one stays, and the run ends as if nothing had happened."""
    damage, why = DAMAGES[name]
    dump = copy_of(finished, tmp_path, 2, 4)
    damage(dump / "checkpoint/step-4")
    again = run(2, dump, "--checkpoint.keep_latest_k", "2")
    for part in (f"{dump}/checkpoint/step-4 is damaged", why, "continuing from step-2"):
        assert part in again.log
    reference = finished[1]
    assert again.losses == {s: reference.losses[s] for s in (3, 4, 5, 6)}
    for name, value in again.weights.items():
        assert torch.equal(value, reference.weights[name]), name
    assert steps_in(dump) == ["step-4", "step-4.damaged", "step-6"]
    assert choose_checkpoint(dump / "checkpoint").folder == dump / "checkpoint/step-6"


def test_only_complete_checkpoints_count_for_keep_latest_k(finished, tmp_path):
    """Three damaged newer ones, k = 2: the good one outlives the next two saves."""
    dump = copy_of(finished, tmp_path, 2)
    for step, name in ((7, "half written"), (8, "deleted"), (9, "truncated")):
        shutil.copytree(finished[0] / "checkpoint/step-6", dump / f"checkpoint/step-{step}")
        DAMAGES[name][0](dump / f"checkpoint/step-{step}")
    again = run(1, dump, "--checkpoint.keep_latest_k", "2", "--training.steps", "4")
    assert again.error == ""
    assert list(complete_steps(dump / "checkpoint")) == [4, 2]


def test_only_damaged_ones_left_refuses_to_start_over_unless_told(finished, tmp_path):
    dump = copy_of(finished, tmp_path, 2, 4)
    flip(dump / "checkpoint/step-2")
    half_written(dump / "checkpoint/step-4")
    (message,) = run_ranks(1, refusal, arguments(dump, 8, *SHORT))
    for part in ("step-2 is damaged", "step-4 is damaged", "start_over_when_damaged"):
        assert part in message
    assert steps_in(dump) == ["step-2", "step-4"], "nothing was touched"
    again = run(1, dump, "--checkpoint.start_over_when_damaged")
    assert min(again.losses) == 1
    assert "step-2.damaged" in steps_in(dump)
    assert "step-4.damaged" in steps_in(dump)


def test_a_named_step_that_is_damaged_or_absent_is_refused(finished, tmp_path):
    dump = copy_of(finished, tmp_path, 2, 4)
    flip(dump / "checkpoint/step-4")
    for step, why in ((4, "the checksum of"), (3, "does not exist")):
        argv = arguments(dump, 8, *SHORT, "--checkpoint.load_step", str(step))
        (message,) = run_ranks(1, refusal, argv)
        assert f"checkpoint.load_step = {step}" in message
        assert why in message


def test_what_a_killed_run_left_is_removed_or_gets_its_name(finished, tmp_path):
    dump = copy_of(finished, tmp_path, 4)
    folder = dump / "checkpoint"
    for name in ("step-5.partial", "step-1.deleting"):
        shutil.copytree(folder / "step-4", folder / name)
        half_written(folder / name)
    (folder / "step-4").rename(folder / "step-4.partial")
    again = run(1, dump)
    assert again.log.count("Removed") == 2
    assert "step-4 was complete but for its name" in again.log
    assert list(again.losses) == [5, 6]
    assert steps_in(dump) == ["step-4", "step-6"]


def test_going_back_leaves_no_second_future(finished, tmp_path):
    """Continued from step 2 on purpose, then continued as usual: from what came of it."""
    dump = copy_of(finished, tmp_path, 2, 4, 6)
    k = ("--checkpoint.keep_latest_k", "2")
    back = run(1, dump, "--checkpoint.load_step", "2", "--training.steps", "5", *k)
    assert "Going back to step-2" in back.log
    assert list(back.losses) == [3, 4, 5]
    again = run(1, dump, *k)
    assert list(again.losses) == [6]
    assert steps_in(dump) == ["step-4.abandoned", "step-5", "step-6", "step-6.abandoned"]


def test_the_initial_path_counts_where_only_an_unfinished_save_lies(finished, tmp_path):
    """torchtitan begins from nothing as soon as its checkpoint folder exists."""
    (tmp_path / "checkpoint/step-2.partial").mkdir(parents=True)
    initial = ("--checkpoint.initial_load_path", str(finished[0] / "checkpoint/step-6"))
    again = run(1, tmp_path, *initial)
    assert min(again.losses) == 1
    assert abs(again.losses[1] / finished[1].losses[1] - 1) > 1e-3, "other weights, same samples"
    bad = copy_of(finished, tmp_path / "bad", 2) / "checkpoint/step-2"
    flip(bad)
    for path, why in ((bad, "is damaged"), (tmp_path / "nowhere", "initial_load_path")):
        argv = arguments(tmp_path / "new", 8, *SHORT, "--checkpoint.initial_load_path", str(path))
        (message,) = run_ranks(1, refusal, argv)
        assert why in message
        assert str(path) in message


def test_another_run_is_resumed(finished, tmp_path):
    again = run(
        2,
        tmp_path,
        *("--checkpoint.initial_load_path", str(finished[0] / "checkpoint/step-4")),
        "--checkpoint.no-initial_load_model_only",
    )
    assert again.losses == {s: finished[1].losses[s] for s in (5, 6)}


def test_saved_in_the_background_is_the_same(finished, tmp_path):
    again = run(2, tmp_path, "--checkpoint.async_mode", "async")
    assert again.losses == finished[1].losses
    shutil.rmtree(tmp_path / "checkpoint/step-6")
    shutil.rmtree(tmp_path / "checkpoint/step-4")
    continued = run(1, tmp_path, "--checkpoint.async_mode", "async")
    assert list(continued.losses) == [3, 4, 5, 6]
    assert worst(continued.losses, finished[1].losses) <= 1e-5
    assert list(complete_steps(tmp_path / "checkpoint")) == [6, 4, 2]


def test_a_model_only_end_is_small_and_recognised(finished, tmp_path):
    dump = copy_of(finished, tmp_path, 4)
    model_only = ("--checkpoint.last_save_model_only", "--checkpoint.export_dtype", "bfloat16")
    again = run(2, dump, *model_only)
    folder = dump / "checkpoint/step-6"
    assert Manifest.read(folder).kind == "model"
    metadata = SafeReader(folder).read_metadata()
    assert {entry.properties.dtype for entry in metadata.state_dict_metadata.values()} == {
        torch.bfloat16
    }
    finished_again = run(1, dump, *model_only)
    assert finished_again.losses == {}
    assert "This run is finished" in finished_again.log
    for name, value in finished_again.weights.items():
        assert torch.equal(value, again.weights[name].bfloat16().float()), name
    argv = arguments(dump, 8, *SHORT, "--training.steps", "8")
    (message,) = run_ranks(1, refusal, argv)
    assert "holds only a model" in message
    further = run(1, dump, "--training.steps", "8", "--checkpoint.load_step", "4")
    assert list(further.losses) == [5, 6, 7, 8]


LARGE = ("double_blocks.0.img_mlp.0.bias", "final_layer.linear.bias")


def enlarge(trainer: FluxTrainer) -> None:
    """The last element of two biases is beyond float16's range when the run ends."""
    save = trainer.checkpointer.save
    rank_of = {LARGE[0]: dist.get_world_size() - 1, LARGE[1]: 0}

    def saved(step: int, last_step: bool = False) -> None:
        for name, parameter in trainer.model_parts[0].named_parameters() if last_step else ():
            assert isinstance(parameter, DTensor)
            if rank_of.get(name) == dist.get_rank():
                parameter.to_local().detach()[-1] = 1e5
        save(step, last_step)

    trainer.checkpointer.save = saved  # type: ignore[method-assign]


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_weight_becomes_infinite_by_the_type_of_the_last_checkpoint(ranks, tmp_path):
    """Each of two ranks holds one of the values; both say the same, and keep float32."""
    argv = arguments(
        *(tmp_path, 8 // ranks, *SHORT, "--training.steps", "1"),
        *("--checkpoint.last_save_model_only", "--checkpoint.export_dtype", "float16"),
        "--checkpoint.last_save_in_hf",
    )
    runs = run_ranks(ranks, train, argv, enlarge)
    folder = tmp_path / "checkpoint/step-1"
    for one in runs:
        assert one.error == ""
        assert "checkpoint.export_dtype = 'float16' cannot hold all values" in one.log
        assert f"of {LARGE[0]}, {LARGE[1]}; {folder} keeps" in one.log
    assert Manifest.read(folder).kind == "model"
    values = load_file(tmp_path / "checkpoint/step-1-hf/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert values["transformer_blocks.0.ff.net.0.proj.bias"][-1] == 1e5
    assert values["proj_out.bias"].isfinite().all()


def limit_files(trainer: FluxTrainer) -> None:
    """Nothing longer than 100 kB can be written: what a full disk does, without a disk."""
    unlimited = resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited))
    close = trainer.close

    def closed() -> None:
        close()
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))

    trainer.close = closed  # type: ignore[method-assign]


class SmallDisk(io.FileIO):
    """A file on a disk that is full after 100 kB, in the midst of torch's archive of a tensor."""

    def write(self, data) -> int:
        return super().write(data) if self.tell() + len(data) <= 100_000 else full()


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_disk(trainer: FluxTrainer) -> None:
    """torch closes its archive on such a disk with an error of its own, which says nothing."""

    @contextlib.contextmanager
    def create_stream(self, path, mode):
        with SmallDisk(path, mode) if mode == "wb" else open(path, mode) as file:
            yield file

    FileSystem.create_stream = create_stream


FAULTS = {
    "continue": (fill_disk, "ranks 0, 1: no space left on /"),
    "stop": (limit_files, "File too large"),
}


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_full_disk_is_reported_and_the_run_goes_on_or_stops(finished, tmp_path, mode):
    for policy, last_loss in (("continue", 5), ("stop", 4 if mode == "disabled" else 5)):
        dump = copy_of(finished, tmp_path / policy, 2)
        fault, said = FAULTS[policy]
        again = run(
            2,
            dump,
            *("--checkpoint.on_save_error", policy, "--checkpoint.async_mode", mode),
            *("--checkpoint.interval", "4", "--training.steps", "5"),
            change=fault,
        )
        # the last checkpoint is required whatever the policy
        assert again.error.startswith("CheckpointNotSaved")
        assert said in again.error
        assert max(again.losses) == last_loss
        if policy == "continue":
            assert "The checkpoint of step 4 could not be saved" in again.log
            assert again.log.count("no space left on") == 1, "and the last one raises"
            assert "checkpoint.keep_latest_k" in again.error
            assert "inline_container" not in again.log + again.error
        assert steps_in(dump) == ["step-2"], "the partial one gave its space back"
        assert choose_checkpoint(dump / "checkpoint").manifest is not None


def fill_disk_for_others(trainer: FluxTrainer) -> None:
    """TensorBoard's writer and the grid's file meet a full disk."""
    SummaryWriter.add_scalar = full
    pictures.save_picture = full


def test_curves_and_grids_that_have_no_room_end_no_run(tmp_path):
    again = run(
        1,
        tmp_path,
        *("--training.steps", "2", "--metrics.enable_tensorboard", "--sampling.enable"),
        *("--sampling.prompts", "one", "--sampling.images_per_prompt", "1"),
        *("--sampling.denoising_steps", "1", "--sampling.freq", "1", "--validation.no-enable"),
        change=fill_disk_for_others,
    )
    assert again.error == ""
    assert list(again.losses) == [1, 2]
    assert again.log.count("TensorBoard's file could not be written (no space left on") == 1
    for step in (1, 2):
        assert f"step-{step}.png could not be written (no space left on" in again.log
    assert again.results == []


def test_a_seed_checkpoint_begins_runs(finished, tmp_path):
    def seed(argv):
        trainer = FluxTrainer(load_config(argv))
        trainer.save_seed_checkpoint()
        trainer.close()

    run_ranks(1, seed, arguments(tmp_path, 4, *SHORT))
    assert Manifest.read(tmp_path / "checkpoint/step-0").kind == "model"
    again = run(2, tmp_path)
    assert again.losses == finished[1].losses


def test_a_pickle_in_place_of_metadata_runs_nothing(finished, tmp_path):
    """Even where a manifest vouches for it."""
    dump = copy_of(finished, tmp_path, 2)
    folder = dump / "checkpoint/step-2"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(pickle.UnpicklingError, match=r"system"):
        SafeReader(folder).read_metadata()
    assert not (tmp_path / "ran").exists()


def test_members_of_enums_load_as_every_python_pickles_them(finished, tmp_path):
    """Python 3.11.0 to 3.11.3 write getattr(enum, name); of anything else it stays refused."""
    folder = copy_of(finished, tmp_path, 2) / "checkpoint/step-2"
    metadata = SafeReader(folder).read_metadata()

    class Read:
        def __init__(self, *of):
            self.of = of

        def __reduce__(self):
            return getattr, self.of

    metadata.planner_data = Read(_MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    read = SafeReader(folder).read_metadata()
    assert read.planner_data is _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    metadata.planner_data = Read(type(metadata), "__init__")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(pickle.UnpicklingError, match="no enum"):
        SafeReader(folder).read_metadata()


def test_another_model_is_refused_key_by_key(finished, tmp_path):
    def load(argv):
        with pytest.raises(ValueError, match=r"(?s)does not fit.*mis-shaped"):
            train(argv)

    argv = arguments(copy_of(finished, tmp_path, 2), 8, *SHORT, "--model.flavor", "flux-debug")
    run_ranks(1, load, argv)
