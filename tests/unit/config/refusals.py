"""Inputs that are refused: the table behind test_refusals.py and docs/errors.md.

python tests/unit/config/refusals.py          # writes docs/errors.md, by what is really reported
"""

import contextlib
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

from torchtitan_flux.config.problems import ConfigError
from torchtitan_flux.startup import checks
from torchtitan_flux.startup.load_config import load_config

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = ROOT / "docs" / "errors.md"
TINY = ROOT / "assets" / "tiny"

BASE = {
    "model.flavor": '"flux-digits"',
    "training.dataset": '"digits"',
    "training.img_size": "8",
    "training.local_batch_size": "8",
}
"""The file `run.toml` of every case, but for the keys that the case gives itself."""

LATENT = 'model.flavor = "flux-tiny"\ntraining.img_size = 64\n'
NEW = "checkpoint.enable = true\n"
SAVING = "--checkpoint.enable"

TABLE: dict[str, list[str]] = {
    "The file": [
        "training.steps = ",
        "training.steps = 3\ntraining.steps = 4",
        "--job.config_file no.toml",
        "--job.config_file folder",
        "--job.config_file picture.toml",
        'job.config_file = "other.toml"',
        'job.custom_config_module = "my.config"',
    ],
    "Unknown names": [
        "training.stepps = 100",
        "trainig.steps = 100",
        "training.lr = 1e-4",
        "quantize.linear.float8.emulated = true",
        "training = 3",
        "--steps 100",
        "--training.local-batch 8",
        "--mixed_precision_param float32",
        "--training.no-steps",
    ],
    "Types": [
        'training.steps = "100"',
        "training.steps = 100.0",
        "training.steps = true",
        "optimizer.lr = nan",
        'checkpoint.enable = "false"',
        "encoder.t5_encoder = 5",
        'sampling.prompts = "a red circle"',
        'sampling.prompts = ["a red circle", 3]',
        'flow.time_density = "lognormal"',
        "encoder.pixel_channels = 2",
        "training.steps = 2026-01-01",
        "training.dataloader = 4",
        "--training.steps 1e3",
        "--training.steps",
        "--checkpoint.enable maybe",
        "--checkpoint.no-enable true",
        "--training.mixed_precision_param bf16",
        "--training.steps 3 4",
        "--data.background 255,255,white",
    ],
    "Numbers": [
        "training.steps = 0",
        "training.classifier_free_guidance_prob = 1.5",
        "optimizer.lr = -1e-4",
        "optimizer.beta2 = 1",
        "training.max_norm = 0",
        "checkpoint.enable = true\ncheckpoint.keep_latest_k = 1",
        "data.background = [255, 255]",
        "training.dataloader.prefetch_factor = 2",
        "validation.enable = true\nvalidation.steps = 0",
        "--flow.logit_mean inf",
        "optimizer.lr = 1" + 310 * "0",
        "debug.seed = 18446744073709551616",
        "training.steps = 9223372036854775808",
        "training.steps = 200\nlr_scheduler.total_steps = 100\nlr_scheduler.decay_ratio = 0.0",
    ],
    "Files and folders": [
        'encoder.clip_encoder = "./nowhere"',
        LATENT + 'encoder.autoencoder_path = "picture.toml"',
        LATENT + 'encoder.autoencoder_path = "pointer.safetensors"',
        LATENT + 'encoder.autoencoder_path = "cut.safetensors"',
        LATENT + 'encoder.autoencoder_path = "page.safetensors"',
        LATENT + 'encoder.autoencoder_path = "assets/tiny/t5/model.safetensors"',
        'encoder.t5_encoder = "assets/tiny/clip"',
        'encoder.t5_encoder = "assets/tiny/t5/config.json"',
        'job.dump_folder = "picture.toml/run"',
        'training.dataset = "folder"',
        'data.caption_prefix = "art: "',
        'training.dataset = "folder"\ntraining.dataset_path = "./nowhere"',
        'training.dataset = "imagenet"',
        NEW + 'checkpoint.folder = "/data/checkpoints"',
        'sampling.enable = true\nsampling.prompts = ["one"]\nsampling.folder = "../samples"',
        NEW + 'checkpoint.initial_load_path = "somebody/flux-merged"',
        NEW + 'checkpoint.initial_load_path = "lora.safetensors"',
    ],
    "Model and sizes": [
        'model.name = "llama3"',
        'model.flavor = "flux-pro"',
        "training.img_size = 7",
        "training.img_height = 9",
        'model.flavor = "flux-schnell"\ntraining.img_size = 256',
        'validation.enable = true\ntraining.dataset = "cc12m-test"',
        "sampling.enable = true",
        'sampling.schedule = "shifted"',
        "--sampling.schedule max_shift=1.3",
        'score.enable = true\ntraining.dataset = "shapes"',
    ],
    "Ranks": [
        "NGPU=2 --parallelism.data_parallel_replicate_degree 3",
        "NGPU=3 --parallelism.tensor_parallel_degree 3",
        "--parallelism.context_parallel_degree 0",
        "--training.global_batch_size 100",
        "NGPU=2 --parallelism.pipeline_parallel_degree 2 "
        "--parallelism.pipeline_parallel_schedule 1F2B",
        "NGPU=8 --parallelism.pipeline_parallel_degree 8",
        "--parallelism.expert_parallel_degree 2",
    ],
    "The machine and what does not go together": [
        "--model.converters quantize.linear.float8",
        "--model.converters float8",
        "--training.enable_cpu_offload",
        "--training.dtype bfloat16 --optimizer.name Adam",
        "--ema.decay 1,0.9",
        "--ema.use_for ema",
        "--training.train_only lora",
        "--optimizer.name SGD",
        "--activation_checkpoint.mode memory_budget",
        "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option two",
        "--compile.enable --compile.components model,optimizer",
        "--comm.mode fake_backend",
        "--checkpoint.create_seed_checkpoint",
        f"{SAVING} --checkpoint.create_seed_checkpoint --checkpoint.load_only",
        f"{SAVING} --checkpoint.load_step 100",
        "--checkpoint.load_step 100",
        f"{SAVING} --checkpoint.exclude_from_loading model,scheduler",
        f"{SAVING} --checkpoint.exclude_from_loading train_state",
        f"{SAVING} --checkpoint.exclude_from_loading model --checkpoint.initial_load_path folder",
        f"{SAVING} --checkpoint.initial_load_path folder --checkpoint.no-initial_load_model_only",
        "--checkpoint.exclude_from_loading optimizer",
        "--metrics.enable_wandb",
    ],
}
"""Part of the document -> a mistake each: first lines of the file, or a command line ("--")."""

LORA = b'{"x.lora_A.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 335304388\n"

FILES = {
    "picture.toml": b"\x89PNG\r\n\x1a\n\x00\xff" * 9,
    "pointer.safetensors": POINTER,
    "page.safetensors": b"<!DOCTYPE html><html>Sign in</html>",
    "lora.safetensors": len(LORA).to_bytes(8, "little") + LORA + bytes(4),
    "cut.safetensors": (TINY / "ae.safetensors").read_bytes()[:600_000],
}
"""Files, beside an empty `folder`, that are not what they claim to be."""


def find_spec_without_wandb(name: str) -> object:
    return None if name == "wandb" else find_spec(name)


@contextlib.contextmanager
def situation(given: str, folder: Path) -> Iterator[list[str]]:
    """The command line that a mistake is refused by, with `folder` as current folder."""
    (folder / "folder").mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    typed = shlex.split(given) if "--" in given else []
    ranks = typed.pop(0).removeprefix("NGPU=") if given.startswith("NGPU=") else "1"
    lines = [] if typed else given.splitlines()
    keys = {text.split(" = ")[0] for text in lines}
    keys |= {f"{key}." for key in keys if "." not in key}
    for key, value in BASE.items():
        if not keys.intersection((key, f"{key.split('.')[0]}.")):
            lines.append(f"{key} = {value}")
    (folder / "run.toml").write_text("\n".join(lines) + "\n")
    named = "--job.config_file" in typed
    with (
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, WORLD_SIZE=ranks),
        mock.patch.object(checks, "find_spec", find_spec_without_wandb),
    ):
        yield [*([] if named else ["--job.config_file", "run.toml"]), *typed]


def row(given: str, argv: list[str], folder: Path) -> str:
    """A row of the document: what is reported, with the paths of this machine cut off."""
    try:
        load_config(argv)
        lines = []
    except ConfigError as error:
        lines = [
            line.replace(f"{folder}/", "").replace(f"{ROOT}/", "")
            for problem in error.found
            for line in problem.splitlines()
        ]
    return f"| {_cell(given.splitlines())} | {_cell(lines)} |"


def _cell(lines: list[str]) -> str:
    quoted = (f"`` {line} ``" if "`" in line else f"`{line}`" for line in lines)
    return "<br>".join(quoted).replace("|", "\\|")


HEAD = """\
# Errors

A configuration that cannot run is refused before anything is built: one report of all
that is wrong, on stderr, exit status 2. `./run_train.sh --check` only looks. Below is what
is said of one mistake at a time; `run.toml` is the file that CONFIG_FILE names, the number
is the line. Written by `python tests/unit/config/refusals.py` from what is really reported."""


def document() -> str:
    """docs/errors.md."""
    lines = [HEAD]
    for title, rows in TABLE.items():
        lines += ["", f"## {title}", "", "| given | said |", "|---|---|"]
        for given in rows:
            with tempfile.TemporaryDirectory() as name, situation(given, Path(name)) as argv:
                lines.append(row(given, argv, Path(name)))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
    print(DOCUMENT, file=sys.stderr)
