"""Pictures for people, by `infer.main` on forked ranks: repeated, in little memory, refused."""

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
from helpers import nonzero_model
from made_weights import save_checkpoint
from PIL import Image
from programs import Said, attempt, pixels
from ranks import run_ranks
from safetensors.torch import save_file
from tiny_run import arguments

from torchtitan_flux import infer, train
from torchtitan_flux.image_file import read_facts
from torchtitan_flux.inference import draw, memory, render
from torchtitan_flux.inference.estimate import SLACK, TOLERANCE, estimate
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model import FLAVORS, FluxModel
from torchtitan_flux.sampling.generate import SampleSettings
from torchtitan_flux.startup.load_config import load_config
from torchtitan_flux.training.trainer import FluxTrainer
from torchtitan_flux.weights import to_bfl
from torchtitan_flux.weights.key_maps import our_shapes

ROOT = Path(__file__).resolve().parents[2]
ARGS = FLAVORS["flux-tiny"]
PROMPTS = ("--prompt", "a red circle", "--prompt", "a blue square", "--prompt", "a red circle")
SEED = ("--seed", "11")
SETTINGS = ("--steps", "2", "--cfg", "2", "--negative", "blurred", *SEED)
NAMES = ("0000-a-red-circle.png", "0001-a-blue-square.png", "0002-a-red-circle.png")
SINGLE = ("--inference.local_batch_size", "1")


@dataclass(frozen=True)
class Command:
    """A command line, and what is done to this rank before."""

    argv: list[str]
    before: Callable[[], None] = lambda: None
    main: Callable[[], None] = infer.main


def run(commands: list[Command]) -> list[Said]:
    """`run_infer.sh` without its launcher, several times in one process."""

    def prepared(command: Command) -> None:
        command.before()
        command.main()

    return [attempt(partial(prepared, command), command.argv) for command in commands]


def warm(dump: Path) -> None:
    """Estimate here what ranks will draw: they are forked, and need not do it again."""
    config = load_config(arguments(dump, 8), training=False)
    base = SampleSettings(ImageSize(64, 64), 2)
    for cfg, batch, low in product((1.0, 2.0), (1, 2), (True,)):
        settings = replace(base, cfg=cfg)
        estimate(config, ARGS, settings, batch, 1, low, torch.float32, "cpu")


def checkpoint(dump: Path, seed: int) -> Path:
    """What a run of flux-tiny would leave, with random weights."""
    states = nonzero_model(ARGS, seed).state_dict()
    return save_checkpoint(dump / "checkpoint" / "step-7", ARGS, states)


def own(dump: Path, *more: str) -> list[str]:
    return [*PROMPTS, *SETTINGS, *more, *arguments(dump, 8)]


@dataclass(frozen=True)
class Drawn:
    folder: Path
    dump: Path
    said: dict[str, Said]

    def pixels(self, name: str) -> bytes:
        return pixels(self.folder / name)


def own_run(dump: Path) -> tuple[str, ...]:
    """A command line whose configuration has the files of a picture of this run."""
    return ("--job.config_file", "train_configs/debug_model.toml", "--job.dump_folder", str(dump))


def no_beginning() -> None:
    with patch.object(infer, "begin", side_effect=AssertionError("begun")):
        infer.main()


def one_round_a_time() -> None:
    draw.AT_ONCE = 1


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Drawn:
    folder = tmp_path_factory.mktemp("drawn")
    dump, png = folder / "run", folder / "normal" / NAMES[1]
    checkpoint(dump, seed=3)
    warm(dump)
    again = ("--from-png", str(png), "--trust", "--out")
    alone = ("--prompt", "a red circle", *SETTINGS[:6], *SINGLE, *arguments(dump, 8))
    counted = ("--prompt", "a red circle", "--count", "2", *arguments(dump, 8))
    jpeg, taken = str(folder / "jpeg-2.jpg"), folder / "taken.png"
    taken.touch()
    commands = {
        "normal": Command(own(dump, "--out", str(folder / "normal"))),
        "low": Command(own(dump, "--out", str(folder / "low"), "--low_memory"), one_round_a_time),
        "again": Command([*again, str(folder / "again.png")]),
        "again low": Command([*again, str(folder / "again low.png"), "--low_memory"]),
        "other seed": Command([*again, str(folder / "other.png"), "--seed", "12"]),
        "other words": Command([*again, str(folder / "words.png"), "--prompt", "a red circle"]),
        "estimate": Command([*again, str(folder / "none.png"), "--estimate"]),
        "untrusted": Command(["--from-png", str(png), "--out", str(folder / "never.png")]),
        "own": Command(["--from-png", str(png), "--out", str(folder / "own.png"), *own_run(dump)]),
        "counted": Command([*alone, *SEED, "--count", "3", "--out", str(folder / "n.webp")]),
        "alone": Command([*alone, "--seed", "13", "--out", str(folder / "third.png")]),
        "jpeg": Command([*counted, *SETTINGS, "--out", str(folder / "jpeg.jpg")]),
        "jpeg again": Command(["--from-png", jpeg, "--trust", "--out", f"{folder}/j.JPG"]),
        "there": Command([*alone, *SEED, "--out", str(taken)], main=no_beginning),
        "over": Command([*alone, *SEED, "--out", str(taken), "--overwrite"]),
        "fresh": Command([*alone, "--seed", "-1", "--out", str(folder / "fresh.png")]),
        "long": Command([*alone, *SEED, "--out", str(folder / "l.png"), "--prompt", "fox " * 99]),
    }
    (said,) = run_ranks(1, run, list(commands.values()))
    return Drawn(folder, dump, dict(zip(commands, said, strict=True)))


def test_low_memory_draws_the_same_pictures(drawn):
    assert drawn.said["normal"].status == drawn.said["low"].status == 0, drawn.said
    for name in NAMES:
        assert drawn.pixels(f"low/{name}") == drawn.pixels(f"normal/{name}")
    assert drawn.pixels(f"normal/{NAMES[0]}") != drawn.pixels(f"normal/{NAMES[1]}")
    assert drawn.pixels(f"normal/{NAMES[0]}") != drawn.pixels(f"normal/{NAMES[2]}"), "other noise"


def test_every_drawing_ends_with_its_peak_beside_the_other_path(drawn):
    size = r"[\d.]+ [MG]iB"
    line = rf"peak memory: {size} beside the program's {size} \(estimated {size}; {{}} --low_memory"
    assert re.search(line.format("with"), drawn.said["normal"].text)
    assert re.search(line.format("without"), drawn.said["low"].text)


def test_from_png_draws_the_identical_picture(drawn):
    for name in ("again", "again low"):
        assert drawn.said[name].status == 0, drawn.said[name].text
        assert "Not the same picture" not in drawn.said[name].text
        assert drawn.pixels(f"{name}.png") == drawn.pixels(f"normal/{NAMES[1]}")
    with Image.open(drawn.folder / "again.png") as picture:
        facts = picture.text  # type: ignore[attr-defined]
    assert (facts["index"], facts["batch"], facts["row"]) == ("1", "2", "1")
    assert facts["negative_prompt"] == "blurred"


def test_a_picture_opens_what_the_configuration_has_and_else_what_is_trusted(drawn):
    assert drawn.said["own"].status == 0, drawn.said["own"].text
    assert drawn.pixels("own.png") == drawn.pixels(f"normal/{NAMES[1]}")
    said = drawn.said["untrusted"]
    assert said.status == 2
    for part in ("--weights", "step-7", "--trust", "--job.dump_folder"):
        assert part in said.text
    assert not (drawn.folder / "never.png").exists()
    assert "--trust opens: --weights" in drawn.said["again"].text


def test_a_counted_picture_is_the_one_of_its_own_seed(drawn):
    assert drawn.said["counted"].status == drawn.said["alone"].status == 0, drawn.said
    assert "seed 13 -> " in drawn.said["counted"].text
    names = [f"n-{i}.webp" for i in (1, 2, 3)]
    assert len({drawn.pixels(name) for name in names}) == 3
    assert drawn.pixels("n-3.webp") == drawn.pixels("third.png")


def test_a_jpeg_is_repeated_from_its_exif(drawn):
    assert drawn.said["jpeg"].status == drawn.said["jpeg again"].status == 0, drawn.said
    assert drawn.pixels("j.JPG") == drawn.pixels("jpeg-2.jpg") != drawn.pixels("jpeg-1.jpg")
    assert read_facts(drawn.folder / "j.JPG")[1]["seed"] == "12"


def test_a_picture_that_is_there_is_replaced_only_when_told_to(drawn):
    """And refused before weights are looked for."""
    said = drawn.said["there"]
    assert said.status == 2, said.text
    assert "taken.png exists already: --overwrite replaces it" in said.text
    assert drawn.said["over"].status == 0, drawn.said["over"].text
    assert drawn.pixels("taken.png") == drawn.pixels("n-1.webp")


def test_a_fresh_seed_is_drawn_said_and_kept(drawn):
    said = drawn.said["fresh"]
    assert said.status == 0, said.text
    seed = re.search(r"--seed (\d+) was drawn", said.text)
    assert seed is not None
    assert read_facts(drawn.folder / "fresh.png")[1]["seed"] == seed[1]


def test_captions_that_are_cut_are_said_and_drawn(drawn):
    said = drawn.said["long"]
    assert said.status == 0, said.text
    assert re.search(r"fox fox.* is cut for T5: it has \d+ tokens, 32 are read", said.text)
    assert "is cut for CLIP" in said.text


def test_what_the_command_line_says_outranks_the_picture_and_is_said(drawn):
    for name, path, line in (
        ("other seed", "other.png", "--seed 12 (the picture: 11)"),
        ("other words", "words.png", "--prompt (the picture: 'a blue square')"),
    ):
        assert drawn.said[name].status == 0, drawn.said[name].text
        assert drawn.said[name].text.count("Not the same picture") == 1
        assert line in drawn.said[name].text
        assert drawn.pixels(path) != drawn.pixels(f"normal/{NAMES[1]}")


def test_an_estimate_shows_both_paths_and_draws_nothing(drawn):
    said = drawn.said["estimate"]
    assert said.status == 0
    for part in ("normal: ", "--low_memory: ", "text encoders", "transformer", "codec", "fits"):
        assert part in said.text
    assert not (drawn.folder / "none.png").exists()


@pytest.mark.slow
def test_two_ranks_draw_the_same_pictures_on_either_path(drawn, tmp_path):
    """Batches of one, so that the transformer sees the same shapes whoever draws."""
    commands = [
        Command(own(drawn.dump, "--out", str(tmp_path / name), *more, *SINGLE), one_round_a_time)
        for name, more in {"normal": (), "low": ("--low_memory",)}.items()
    ]
    run_ranks(1, run, [Command(own(drawn.dump, "--out", str(tmp_path / "one"), *SINGLE))])
    for said in run_ranks(2, run, commands):
        assert [one.status for one in said] == [0, 0], said
        assert all("all ProcessGroups to 1 day, 0:00:00" in one.text for one in said)
    for name in NAMES:
        expected = pixels(tmp_path / "one" / name)
        assert pixels(tmp_path / "normal" / name) == expected
        assert pixels(tmp_path / "low" / name) == expected


def too_much(*_: object) -> None:
    torch.empty(2**46)  # more than there are addresses for


def draw_too_much() -> None:
    infer.render = too_much


def on_a_full_disk() -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    with patch.object(render, "save_picture", side_effect=error):
        infer.main()


def not_finite() -> None:
    """From the second step on."""
    forward, rendered = FluxModel.forward, infer.render

    def at_half(self, *args: torch.Tensor) -> torch.Tensor:
        velocity = forward(self, *args)
        return velocity if args[4][0] > 0.9 else velocity * torch.inf

    def rendering(*args: object) -> None:
        with patch.object(FluxModel, "forward", at_half):
            rendered(*args)

    with patch.object(infer, "render", rendering):
        infer.main()


def train_too_much() -> None:
    FluxTrainer.train_step = too_much  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def refused(drawn, tmp_path_factory) -> dict[str, Said]:
    """What is asked for and cannot be; nothing is drawn."""
    folder = tmp_path_factory.mktemp("refused")
    foreign = folder / "foreign.png"
    Image.new("RGB", (4, 4)).save(foreign)
    moved, dump, png = folder / "moved", folder / "run", folder / "mine.png"
    step = checkpoint(dump, seed=5)

    def other() -> None:
        shutil.rmtree(step)
        checkpoint(dump, seed=6)

    plain = folder / "plain"
    plain.touch()
    nowhere = ("--out", str(folder / "never.png"))
    one = ["--prompt", "a", "--steps", "1", *nowhere, *arguments(drawn.dump, 8)]
    mine = ["--from-png", str(png), "--trust", *nowhere]
    commands = {
        "foreign": Command(["--from-png", str(foreign), *nowhere]),
        "prompts": Command(["--from-png", str(foreign), "--prompts", "a.txt", *nowhere]),
        "negative": Command([*one, "--negative", "b"]),
        "draw": Command(["--prompt", "a", "--steps", "1", "--out", str(png), *arguments(dump, 8)]),
        "unwritable": Command([*one, "--out", str(plain)], main=no_beginning),
        "unwritable, estimate": Command([*one, "--out", str(plain), "--estimate"]),
        "full disk": Command(one, main=on_a_full_disk),
        "sampling": Command([*mine, "--sampling.seed", "3"]),
        "changed": Command(mine, other),
        "gone": Command(mine, lambda: shutil.move(step, moved)),
        "too large": Command([*one, "--size", "65536"]),
        "too large, low": Command([*one, "--size", "65536", "--low_memory"]),
        "not finite": Command([*one, "--steps", "3"], main=not_finite),
        "not finite, low": Command([*one, "--steps", "3", "--low_memory"], main=not_finite),
        "elsewhere": Command([*one, "--estimate", "--memory", "0.001"]),
        "out of memory": Command([*one, "--size", "1024"], draw_too_much),
        "training": Command(
            arguments(folder / "trained", 8, "--validation.no-enable", "--checkpoint.no-enable"),
            train_too_much,
            train.main,
        ),
    }
    (said,) = run_ranks(1, run, list(commands.values()))
    assert not (folder / "never.png").exists()
    return dict(zip(commands, said, strict=True))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("foreign", ("--from-png", "foreign.png holds no settings")),
        ("prompts", ("--from-png", "holds no settings")),
        ("negative", ("--negative needs classifier-free guidance", "--cfg")),
        ("unwritable", ("/plain cannot be written (Not a directory)", "--out")),
        ("full disk", ("never.png cannot be written (No space left on device)", "--out")),
        ("sampling", ("--sampling.seed", "--from-png", "--seed can be changed")),
        ("changed", ("step-7", "contents have changed", "--weights")),
        ("gone", ("step-7", "does not exist", "--weights PATH")),
        ("too large", ("needs about", "are free", "--low_memory (about", "a smaller --size")),
        ("too large, low", ("needs about", "a smaller --size (now 65536x65536)")),
    ],
)
def test_what_cannot_be_is_refused_in_one_message(refused, name, parts):
    said = refused[name]
    assert said.status == 2, said.text
    for part in parts:
        assert part in said.text
    assert "Traceback" not in said.text
    assert (
        len([line for line in said.text.splitlines() if "Cannot" in line or "cannot" in line]) < 3
    )


@pytest.mark.parametrize("name", ["not finite", "not finite, low"])
def test_a_picture_that_is_not_finite_is_an_error(refused, name):
    """The caption, the step, and what may help; nothing is written, as `refused` looks after."""
    said = refused[name]
    assert said.status == 1, said.text
    assert "Drawing failed: 'a' is not finite at step 2 of 3. What may help: " in said.text
    assert "Traceback" not in said.text


def test_an_estimate_for_another_card_says_what_does_not_fit(refused):
    assert refused["unwritable, estimate"].status == 0, "it writes nothing"
    said = refused["elsewhere"]
    assert said.status == 0, said.text
    assert said.text.count("does not fit") == 2
    assert "1 MiB free as given by --memory" in said.text


def assert_one_message(said, parts):
    assert said.status == 1, said.text
    (line,) = [line for line in said.text.splitlines() if "Out of memory" in line]
    for part in parts:
        assert part in line
    assert "Traceback" not in said.text


def test_out_of_memory_is_one_message_with_what_to_change(refused):
    parts = ("asked for", "--low_memory", "a smaller --size (now 1024x1024)")
    assert_one_message(refused["out of memory"], parts)


def test_out_of_memory_in_training_is_one_message_with_the_keys(refused):
    parts = ("training.local_batch_size (now 8)", "activation_checkpoint.mode", "img_size")
    assert_one_message(refused["training"], parts)


# ---- how much memory it takes ---------------------------------------------------------------


def measured(argv: list[str]) -> tuple[float, float]:
    """(measured, estimated) bytes, as the command itself says them.

    Forked from a test worker it would begin with a heap full of what other tests had freed, and be
    served from it.
    """
    ran = subprocess.run(["./run_infer.sh", *argv], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    said = re.search(r"peak memory: (.*) beside .* \(estimated (.*?);", ran.stdout + ran.stderr)
    assert said is not None, ran.stderr
    print(said[0])
    found, expected = (
        float(number) * 2 ** {"MiB": 20, "GiB": 30}[unit]
        for number, unit in map(str.split, said.groups())
    )
    return found, expected


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's accounting")
def test_streaming_takes_a_block_and_the_estimate_is_right(tmp_path):
    """flux-debug: 240 million weights, 0.9 GiB in float32, of which a double block is a third."""
    args = FLAVORS["flux-debug"]
    args = type(args)(**{**vars(args), "context_in_dim": 32, "vec_in_dim": 32})
    rng = torch.Generator().manual_seed(0)
    states = {
        name: torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.05, 0.05, generator=rng)
        for name, shape in our_shapes(args).items()
    }
    weights = tmp_path / "flux1-debug.safetensors"
    save_file(to_bfl(states, args), weights)
    size = sum(tensor.numel() for tensor in states.values()) * 4
    del states
    common = [*PROMPTS[:2], "--steps", "2", "--weights", str(weights)]
    config = [*arguments(tmp_path, 8), "--model.flavor", "flux-debug"]
    low = measured([*common, "--out", str(tmp_path / "low.png"), "--low_memory", *config])
    normal = measured([*common, "--out", str(tmp_path / "normal.png"), *config])
    assert pixels(tmp_path / "low.png") == pixels(tmp_path / "normal.png")
    for found, expected in (low, normal):
        assert abs(found - expected) <= TOLERANCE * expected + SLACK, (low, normal)
    assert normal[0] > size
    assert low[0] < 0.5 * normal[0], (low, normal)


def test_the_peak_that_is_measured_is_what_was_taken():
    with memory.PeakMemory(torch.device("cpu")) as taken:
        tensor = torch.ones(40 * 2**20)  # 160 MiB
        assert taken.peak >= tensor.nbytes
        del tensor
        again = torch.ones(2**20)
    assert 160 * 2**20 <= taken.peak < 200 * 2**20
    assert again.sum() == 2**20
