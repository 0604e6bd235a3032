"""Pictures for people, by `infer.main` on forked ranks: repeated, part after part, refused."""

import errno
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
from helpers import model_inputs, nonzero_model
from made_weights import save_checkpoint
from programs import Said, attempt, pixels
from ranks import run_ranks
from tiny_run import arguments

from torchtitan_flux import infer, train
from torchtitan_flux.image_file import read_facts
from torchtitan_flux.inference import draw, render
from torchtitan_flux.model import FLAVORS, FluxModel
from torchtitan_flux.training.trainer import FluxTrainer

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


def own(dump: Path, *more: str) -> list[str]:
    return [*PROMPTS, *SETTINGS, *more, *arguments(dump, 8)]


@dataclass(frozen=True)
class Drawn:
    folder: Path
    dump: Path
    said: dict[str, Said]

    def pixels(self, name: str) -> bytes:
        return pixels(self.folder / name)


def nothing_opened() -> None:
    with patch.object(infer, "open_run", side_effect=AssertionError("opened")):
        infer.main()


def one_round_a_time() -> None:
    draw.MAX_IMAGES_PER_CHUNK = 1


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Drawn:
    folder = tmp_path_factory.mktemp("drawn")
    dump, png = folder / "run", folder / "normal" / NAMES[1]
    save_checkpoint(dump / "checkpoint/step-7", ARGS, nonzero_model(ARGS, 3).state_dict())
    again = ("--from-png", str(png), *arguments(dump, 8), "--out")
    alone = ("--prompt", "a red circle", *SETTINGS[:6], *SINGLE, *arguments(dump, 8))
    counted = ("--prompt", "a red circle", "--count", "2", *arguments(dump, 8))
    jpeg, taken = str(folder / "jpeg-2.jpg"), folder / "taken.png"
    taken.touch()
    commands = {
        "normal": Command(own(dump, "--out", str(folder / "normal"))),
        "low": Command(own(dump, "--out", str(folder / "low"), "--low_memory"), one_round_a_time),
        "again": Command([*again, str(folder / "again.png")]),
        "other seed": Command([*again, str(folder / "other.png"), "--seed", "12"]),
        "other words": Command([*again, str(folder / "words.png"), "--prompt", "a red circle"]),
        "counted": Command([*alone, *SEED, "--count", "3", "--out", str(folder / "n.webp")]),
        "alone": Command([*alone, "--seed", "13", "--out", str(folder / "third.png")]),
        "jpeg": Command([*counted, *SETTINGS, "--out", str(folder / "jpeg.jpg")]),
        "jpeg again": Command(
            ["--from-png", jpeg, "--out", f"{folder}/j.JPG", *arguments(dump, 8)]
        ),
        "there": Command([*alone, *SEED, "--out", str(taken)], main=nothing_opened),
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


def test_from_png_draws_the_picture_again(drawn):
    said = drawn.said["again"]
    assert said.status == 0, said.text
    assert "Not the same picture" not in said.text
    assert drawn.pixels("again.png") == drawn.pixels(f"normal/{NAMES[1]}")
    facts = read_facts(drawn.folder / "again.png")[1]
    assert (facts["index"], facts["negative_prompt"]) == ("1", "blurred")
    assert drawn.said["jpeg again"].status == 0, drawn.said["jpeg again"].text
    assert drawn.pixels("j.JPG") == drawn.pixels("jpeg-2.jpg") != drawn.pixels("jpeg-1.jpg")


def test_what_the_command_line_says_outranks_the_picture_and_is_said(drawn):
    for name, path, line in (
        ("other seed", "other.png", "seed 12 (the picture: 11)"),
        ("other words", "words.png", "prompt a red circle (the picture: a blue square)"),
    ):
        assert drawn.said[name].status == 0, drawn.said[name].text
        assert line in drawn.said[name].text
        assert drawn.pixels(path) != drawn.pixels(f"normal/{NAMES[1]}")


def test_a_counted_picture_is_the_one_of_its_own_seed(drawn):
    assert drawn.said["counted"].status == drawn.said["alone"].status == 0, drawn.said
    names = [f"n-{i}.webp" for i in (1, 2, 3)]
    assert len({drawn.pixels(name) for name in names}) == 3
    assert drawn.pixels("n-3.webp") == drawn.pixels("third.png")


def test_a_picture_that_is_there_is_replaced_only_when_told_to(drawn):
    """And refused before weights are looked for."""
    said = drawn.said["there"]
    assert said.status == 2, said.text
    assert "taken.png exists already: --overwrite replaces it" in said.text
    assert drawn.said["over"].status == 0, drawn.said["over"].text
    assert drawn.pixels("taken.png") == drawn.pixels("n-1.webp")


def test_a_fresh_seed_is_said_and_kept_and_cut_captions_are_said(drawn):
    seed = re.search(r"--seed (\d+) was drawn", drawn.said["fresh"].text)
    assert seed is not None
    assert read_facts(drawn.folder / "fresh.png")[1]["seed"] == seed[1]
    said = drawn.said["long"]
    assert said.status == 0, said.text
    assert re.search(r"fox fox.* is cut for T5: it has \d+ tokens, 32 are read", said.text)
    assert "is cut for CLIP" in said.text


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


def draw_too_much() -> None:
    infer.render = too_much


def on_a_full_disk() -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    with patch.object(render, "save_picture", side_effect=error):
        infer.main()


def not_finite() -> None:
    """From the second step on."""
    forward = FluxModel.forward

    def at_half(self, *args: torch.Tensor) -> torch.Tensor:
        velocity = forward(self, *args)
        return velocity if args[4][0] > 0.9 else velocity * torch.inf

    with patch.object(FluxModel, "forward", at_half):
        infer.main()


def train_too_much() -> None:
    FluxTrainer.train_step = too_much  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def refused(drawn, tmp_path_factory) -> dict[str, Said]:
    """What is asked for and cannot be; nothing is drawn."""
    folder = tmp_path_factory.mktemp("refused")
    plain, png = folder / "plain", drawn.folder / "normal" / NAMES[1]
    plain.touch()
    nowhere = ("--out", str(folder / "never.png"))
    one = ["--prompt", "a", "--steps", "1", *nowhere, *arguments(drawn.dump, 8)]
    commands = {
        "foreign": Command(["--from-png", str(plain), *nowhere]),
        "negative": Command([*one, "--negative", "b"]),
        "unwritable": Command([*one, "--out", str(plain)], main=nothing_opened),
        "full disk": Command(one, main=on_a_full_disk),
        "sampling": Command(["--from-png", str(png), *nowhere, "--sampling.seed", "3"]),
        "not finite": Command([*one, "--steps", "3"], main=not_finite),
        "not finite, low": Command([*one, "--steps", "3", "--low_memory"], main=not_finite),
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
    ("name", "status", "parts"),
    [
        ("foreign", 2, ("--from-png", "plain is no picture")),
        ("negative", 2, ("--negative needs classifier-free guidance", "--cfg")),
        ("unwritable", 2, ("/plain cannot be written (Not a directory)", "--out")),
        ("full disk", 2, ("never.png cannot be written (No space left on device)", "--out")),
        ("sampling", 2, ("--sampling.seed", "--from-png", "--seed can be changed")),
        ("not finite", 1, ("'a' is not finite at step 2 of 3. What may help: ",)),
        ("not finite, low", 1, ("'a' is not finite at step 2 of 3. What may help: ",)),
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
