"""A folder that has what the documents take for granted, and two ways to run a command in it.

Stand-ins: flavors, FLUX.1's files and data sets are tiny; /data is in the folder.
"""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import made_weights as made
import pyarrow as pa
import pyarrow.parquet
import torch.distributed.checkpoint as dcp
from documents import REPO, Command, block
from programs import Said, attempt
from ranks import run_ranks
from unit.data.test_mnist import write_idx

from torchtitan_flux import infer, launch, train
from torchtitan_flux.launching.settings import Settings
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.weights.convert import convert

TINY = FLAVORS["flux-tiny"]
GUIDED = replace(TINY, guidance_embed=True)
SMALL = ("--training.img_size", "64", "--encoder.max_t5_encoding_len", "32")
SHARDS = 100


def make_folder(folder: Path) -> Path:
    """A checkout's commands, FLUX.1's files with tiny widths, data sets of a few pictures."""
    for name in ("run_train.sh", "run_infer.sh", "scripts", "tests", "torchtitan"):
        (folder / name).symlink_to(REPO / name)
    published = folder / "assets/hf/FLUX.1-dev"
    weights = made.make(folder / "made", "bfl", GUIDED, made.state_dict(GUIDED))
    convert(weights, published, "pipeline")
    shutil.copy(REPO / "assets/tiny/ae.safetensors", published)
    shutil.copytree(published, folder / "assets/hf/FLUX.1-schnell")
    theirs = made.torchtitan_states(TINY, made.state_dict(TINY))
    dcp.save(theirs, checkpoint_id=folder / "torchtitan-outputs/checkpoint/step-500", no_dist=True)
    write_own_files(folder)
    (folder / "prompts.txt").write_text("a handwritten two\na handwritten three\n")
    make_data(folder / "data")
    return folder


def write_own_files(folder: Path) -> None:
    """The configurations of the guide."""
    shutil.copy(REPO / "tests/assets/torchtitan/debug_model.toml", folder / "theirs.toml")
    own = block("docs/guide.md", "toml", "[job]") + block("docs/guide.md", "toml", "[encoder]")
    (folder / "my.toml").write_text(own.replace("/data/", f"{folder}/data/"))


def make_data(data: Path) -> None:
    """The drawn pictures of the tests as a folder, as shards and as a table; MNIST's files."""
    pictures, shards, tables = (data / name for name in ("pictures", "shards", "tables"))
    with tarfile.open(next((REPO / "tests/assets/cc12m_test").glob("*.tar"))) as tar:
        tar.extractall(pictures, filter="data")
    images = sorted(pictures.glob("*.jpg"))
    captions = [path.with_suffix(".txt").read_text() for path in images]
    shards.mkdir()
    for number in range(SHARDS):
        image = images[number % len(images)]
        with tarfile.open(shards / f"{number:05d}.tar", "w") as tar:
            for path in (image, image.with_suffix(".txt")):
                tar.add(path, f"{number:05d}{path.suffix}")
    tables.mkdir()
    table = pa.table({"image": [path.read_bytes() for path in images], "text": captions})
    pyarrow.parquet.write_table(table, tables / "pictures.parquet")
    write_idx(data / "mnist")


def shell(command: Command, folder: Path, *more: str, **environment: str) -> str:
    """Bash runs it in the folder; what it said. It has to end with 0."""
    python = str(Path(sys.executable).parent)
    ran = subprocess.run(
        ["bash", "-c", " ".join([command.text, *map(shlex.quote, more)])],
        cwd=folder,
        env={**os.environ, "PATH": f"{python}:{os.environ['PATH']}", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ran.returncode == 0, f"{command.text} {more}\n{ran.stdout}"
    return ran.stdout


def here(command: Command, folder: Path, *more: str) -> str:
    """Its `main` on forked ranks, after the launcher's checks; what rank 0 said.

    Two ranks stand for eight cards. The status has to be 0.
    """
    words = [word.replace("/data/", f"{folder}/data/") for word in [*command.words, *more]]
    cards = {name: "2" if value == "8" else value for name, value in command.environment.items()}
    settings = Settings.read(cards)
    if words[0].endswith(("run_train.sh", "run_infer.sh")):
        kind = "train" if words[0].endswith("run_train.sh") else "infer"
        arguments, ranks = words[1:], settings.ranks
        if "--job.config_file" not in arguments:
            arguments = ["--job.config_file", settings.config_file, *arguments]
        main = {"train": train.main, "infer": infer.main}[kind]
        if "--check" in words:
            main, ranks = (lambda: sys.exit(launch.launch("train", arguments))), 1
        else:
            run_ranks(1, attempt_in, folder, lambda: launch.check(kind, arguments, ranks), [])
    elif words[1] == "-m":
        assert words[2] == "torchtitan_flux.infer"
        main, arguments, ranks = infer.main, words[3:], 1
    else:
        main, arguments, ranks = script(words[1]), words[2:], 1
    said = run_ranks(ranks, attempt_in, folder, main, arguments)
    assert [one.status for one in said] == [0] * ranks, f"{command.text} {more}\n{said[0].text}"
    return said[0].text


def script(path: str) -> Callable[[], None]:
    return runpy.run_path(str(REPO / path))["main"]


def attempt_in(folder: Path, main: Callable[[], None], argv: list[str]) -> Said:
    os.chdir(folder)
    return attempt(main, argv)
