"""Pictures for people, by `infer.main` on forked ranks: repeated, part after part, refused."""

import errno
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
from helpers import model_inputs, nonzero_model
from programs import Said, attempt, pixels
from ranks import run_ranks
from tiny_run import arguments
from weight_files import save_checkpoint

from torchtitan_flux import infer, train
from torchtitan_flux.image_file import read_facts
from torchtitan_flux.inference import draw
from torchtitan_flux.model import FLAVORS, FluxModel
from torchtitan_flux.training.trainer import FluxTrainer

ARGS = FLAVORS["flux-tiny"]
CIRCLE = ("--prompt", "a red circle")
PROMPTS = (*CIRCLE, "--prompt", "a blue square", *CIRCLE)
SEED = ("--seed", "11")
SETTINGS = ("--steps", "2", "--cfg", "2", "--negative", "blurred")
NAMES = ("0000-a-red-circle.png", "0001-a-blue-square.png", "0002-a-red-circle.png")
SINGLE = ("--inference.local_batch_size", "1")


class Command(NamedTuple):
    """A command line, and what runs it in a rank."""

    argv: list[str]
    main: Callable[[], None] = infer.main


def run(commands: list[Command]) -> list[Said]:
    """`run_infer.sh` without its launcher, several times in one process."""
    return [attempt(command.main, command.argv) for command in commands]


def patched(target: object, name: str, value: object, main: Callable[[], None]) -> None:
    with patch.object(target, name, value):
        main()


def nothing_opened() -> None:
    patched(infer, "open_run", None, infer.main)  # calling it fails


def in_small_chunks() -> None:
    patched(draw, "MAX_IMAGES_PER_CHUNK", 1, infer.main)


class Drawn(NamedTuple):
    folder: Path
    dump: Path
    said: dict[str, Said]

    def pixels(self, name: str) -> bytes:
        return pixels(self.folder / name)

    def text(self, name: str, status: int = 0) -> str:
        assert self.said[name].status == status, self.said[name].text
        return self.said[name].text


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Drawn:
    folder = tmp_path_factory.mktemp("drawn")
    dump, png = folder / "run", folder / "normal" / NAMES[1]
    save_checkpoint(dump / "checkpoint/step-7", ARGS, nonzero_model(ARGS, 3).state_dict())
    taken = folder / "taken.png"
    taken.touch()

    def command(out: str, *argv: str, main: Callable[[], None] = infer.main) -> Command:
        return Command([*argv, *arguments(dump, 8), "--out", str(folder / out)], main)

    again = ("--from-png", str(png))
    all_three, alone = (*PROMPTS, *SETTINGS, *SEED), (*CIRCLE, *SETTINGS, *SINGLE)
    commands = {
        "normal": command("normal", *all_three),
        "low": command("low", *all_three, "--low_memory", main=in_small_chunks),
        "again": command("again.png", *again),
        "other seed": command("other.png", *again, "--seed", "12"),
        "other words": command("words.png", *again, *CIRCLE),
        "counted": command("n.webp", *alone, *SEED, "--count", "3"),
        "alone": command("third.png", *alone, "--seed", "13"),
        "jpeg": command("jpeg.jpg", *CIRCLE, *SETTINGS, *SEED, "--count", "2"),
        "jpeg again": command("j.JPG", "--from-png", str(folder / "jpeg-2.jpg")),
        "there": command("taken.png", *alone, *SEED, main=nothing_opened),
        "over": command("taken.png", *alone, *SEED, "--overwrite"),
        "long": command("l.png", *alone, *SEED, "--prompt", "fox " * 99),
    }
    (said,) = run_ranks(1, run, list(commands.values()))
    return Drawn(folder, dump, dict(zip(commands, said, strict=True)))


def test_low_memory_draws_the_same_pictures(drawn):
    drawn.text("normal")
    drawn.text("low")
    for name in NAMES:
        assert drawn.pixels(f"low/{name}") == drawn.pixels(f"normal/{name}")
    assert len({drawn.pixels(f"normal/{name}") for name in NAMES}) == 3


def test_from_png_draws_the_picture_again(drawn):
    assert "Not the same picture" not in drawn.text("again")
    assert drawn.pixels("again.png") == drawn.pixels(f"normal/{NAMES[1]}")
    facts = read_facts(drawn.folder / "again.png")
    assert (facts["index"], facts["negative_prompt"]) == ("1", "blurred")
    drawn.text("jpeg again")
    assert drawn.pixels("j.JPG") == drawn.pixels("jpeg-2.jpg") != drawn.pixels("jpeg-1.jpg")


def test_the_command_line_outranks_the_picture_and_says_so(drawn):
    for name, path, line in (
        ("other seed", "other.png", "seed 12 (the picture: 11)"),
        ("other words", "words.png", "prompt a red circle (the picture: a blue square)"),
    ):
        assert line in drawn.text(name)
        assert drawn.pixels(path) != drawn.pixels(f"normal/{NAMES[1]}")


def test_a_counted_picture_is_the_one_of_its_own_seed(drawn):
    drawn.text("counted")
    drawn.text("alone")
    names = [f"n-{i}.webp" for i in (1, 2, 3)]
    assert len({drawn.pixels(name) for name in names}) == 3
    assert drawn.pixels("n-3.webp") == drawn.pixels("third.png")


def test_an_existing_picture_is_replaced_only_with_overwrite(drawn):
    """And refused before weights are looked for."""
    assert "taken.png exists: --overwrite replaces it" in drawn.text("there", status=2)
    drawn.text("over")
    assert drawn.pixels("taken.png") == drawn.pixels("n-1.webp")


def test_cut_captions_are_logged(drawn):
    text = drawn.text("long")
    assert re.search(r"fox fox.* is cut for T5: it has \d+ tokens, 32 are read", text)
    assert "is cut for CLIP" in text


@pytest.mark.slow
def test_two_ranks_draw_the_same_pictures_on_either_path(drawn, tmp_path):
    """Batches of one, so that the transformer sees the same shapes whoever draws."""

    def command(name: str, *more: str) -> Command:
        argv = [*PROMPTS, *SETTINGS, *SEED, *SINGLE, *more, *arguments(drawn.dump, 8)]
        return Command([*argv, "--out", str(tmp_path / name)], in_small_chunks)

    run_ranks(1, run, [command("one")])
    for said in run_ranks(2, run, [command("normal"), command("low", "--low_memory")]):
        assert [one.status for one in said] == [0, 0], said
    for name in NAMES:
        expected = pixels(tmp_path / "one" / name)
        assert pixels(tmp_path / "normal" / name) == expected
        assert pixels(tmp_path / "low" / name) == expected


def test_offloaded_blocks_compute_what_the_model_does():
    """accelerate's hooks on our model, which the CPU itself does not need."""
    from accelerate import cpu_offload

    model = nonzero_model(ARGS)
    inputs = model_inputs(ARGS, 2, 3, 5, 7, seed=1)
    with torch.no_grad():
        expected = model(**inputs)
        cpu_offload(model, "cpu", preload_module_classes=["DoubleStreamBlock", "SingleStreamBlock"])
        assert {p.device.type for p in model.parameters()} == {"meta"}, "nothing stays"
        assert torch.equal(model(**inputs), expected)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def too_much(*_: object) -> None:
    torch.empty(2**46)  # more than there are addresses for


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


FORWARD = FluxModel.forward


def not_finite(self, *args: torch.Tensor) -> torch.Tensor:
    """From the second step on."""
    velocity = FORWARD(self, *args)
    return velocity if args[4][0] > 0.9 else velocity * torch.inf


@pytest.fixture(scope="module")
def refused(drawn, tmp_path_factory) -> dict[str, Said]:
    """What is asked for and cannot be; nothing is drawn."""
    folder = tmp_path_factory.mktemp("refused")
    plain, never = folder / "plain", folder / "never.png"
    plain.touch()
    one = ["--prompt", "a", "--steps", "3", "--out", str(never), *arguments(drawn.dump, 8)]
    training = arguments(folder / "run", 8, "--validation.no-enable", "--checkpoint.no-enable")
    on_full_disk = partial(patched, draw, "save_picture", full_disk, infer.main)
    broken = partial(patched, FluxModel, "forward", not_finite, infer.main)
    commands = {
        "foreign": Command(["--from-png", str(plain), "--out", str(never)]),
        "negative": Command([*one, "--negative", "b"]),
        "unwritable": Command([*one, "--out", str(plain)], nothing_opened),
        "full disk": Command(one, on_full_disk),
        "not finite": Command(one, broken),
        "out of memory": Command(
            [*one, "--size", "1024"], partial(patched, infer, "render", too_much, infer.main)
        ),
        "training": Command(
            training, partial(patched, FluxTrainer, "train_step", too_much, train.main)
        ),
    }
    (said,) = run_ranks(1, run, list(commands.values()))
    assert not never.exists()
    return dict(zip(commands, said, strict=True))


@pytest.mark.parametrize(
    ("name", "status", "parts"),
    [
        ("foreign", 2, ("--from-png", "plain does not say how it was drawn")),
        ("negative", 2, ("--negative needs classifier-free guidance", "--cfg")),
        ("unwritable", 2, ("/plain cannot be written (Not a directory)", "--out")),
        ("full disk", 2, ("never.png cannot be written (No space left on device)", "--out")),
        ("not finite", 1, ("'a' is not finite. What may help: ",)),
        ("out of memory", 1, ("asked for", "--low_memory", "a smaller --size (now 1024x1024)")),
        ("training", 1, ("training.local_batch_size (now 8)", "activation_checkpoint.mode")),
    ],
)
def test_what_cannot_be_is_one_message(refused, name, status, parts):
    said = refused[name]
    assert said.status == status, said.text
    for part in parts:
        assert part in said.text
    assert "Traceback" not in said.text
