# ruff: noqa: E501 (a row is a line)
"""Inputs that are refused: the table behind test_refusals.py and docs/errors.md.

python tests/unit/config/refusals.py          # writes docs/errors.md, by what is really reported
"""

import contextlib
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from torchtitan_flux.config.problems import ConfigError, Problem
from torchtitan_flux.parallel.low_precision_checks import Card
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


@dataclass(frozen=True)
class Refusal:
    """One wrong input.

    Attributes:
        given: the mistake: what stands in the file, as its first lines, or on the command line.
        problems: "key: part of the message" of each problem, in order.
        typed: whether it stands on the command line.
        ranks: how many are started.
        needs: things of `THINGS` in the current folder, a card, or a package that is missing.
        varies: whether the message depends on the machine.
    """

    given: str
    problems: tuple[str, ...] = ()
    typed: bool = False
    ranks: int = 1
    needs: tuple[str, ...] = ()
    varies: bool = False


def refused(given: str, *problems: str, typed: bool = False, **more) -> Refusal:
    return Refusal(given, problems, typed or given.startswith("--"), **more)


TABLE: dict[str, list[Refusal]] = {
    "The file": [
        refused("training.steps = ", "job.config_file: 'run.toml' is not valid TOML: Invalid"),
        refused(
            "training.steps = 3\ntraining.steps = 4", "job.config_file: 'run.toml' is not valid"
        ),
        refused("training.steps = 30 000", "job.config_file: 'run.toml' is not valid TOML"),
        refused("--job.config_file no.toml", "job.config_file: 'no.toml' does not exist"),
        refused(
            "--job.config_file folder", "job.config_file: 'folder' is a folder", needs=("folder",)
        ),
        refused(
            "--job.config_file picture.toml",
            "job.config_file: 'picture.toml' is not",
            needs=("picture.toml",),
        ),
        refused(
            "--job.config_file run.toml --job.config_file other.toml",
            "job.config_file: is given more than once",
        ),
        refused('job.config_file = "other.toml"', "job.config_file: belongs on the command"),
        refused(
            'job.custom_config_module = "nowhere.config"',
            "job.custom_config_module: 'nowhere.config' cannot",
        ),
    ],
    "Unknown names": [
        refused("training.stepps = 100", "training.stepps: did you mean training.steps?"),
        refused("trainig.steps = 100", "trainig: did you mean [training]?"),
        refused("training.lr = 1e-4", "training.lr: is unknown; did you mean optimizer.lr?"),
        refused("training.seed = 1", "training.seed: is unknown; did you mean debug.seed?"),
        refused("optimiser.lr = 1e-4", "optimiser: is an unknown section; did you mean"),
        refused(
            "quantize.linear.float8.emulated = true",
            "quantize.linear.float8.emulated: is unknown; did you",
        ),
        refused("training = 3", "training: is a section: write [training], and its keys below"),
        refused("--training.stepps 100", "training.stepps: did you mean training.steps?"),
        refused("--steps 100", "steps: is unknown; ./run_train.sh --help lists all keys"),
        refused("--training.local-batch 8", "training.local_batch: is unknown; did you mean"),
        refused("training.steps=100", "'training.steps=100': belongs to no key; did", typed=True),
        refused("--mixed_precision_param float32", "mixed_precision_param: is unknown; did you"),
        refused("--training.no-steps", "training.steps: only switches are given in this form"),
    ],
    "Types": [
        refused('training.steps = "100"', "training.steps: must be a valid integer"),
        refused("training.steps = 100.0", "training.steps: must be a valid integer"),
        refused("training.steps = true", "training.steps: must be a valid integer"),
        refused('optimizer.lr = "1e-4"', "optimizer.lr: must be a valid number"),
        refused("optimizer.lr = nan", "optimizer.lr: must be a number"),
        refused('checkpoint.enable = "false"', "checkpoint.enable: must be a valid boolean"),
        refused("checkpoint.enable = 1", "checkpoint.enable: must be a valid boolean"),
        refused("encoder.t5_encoder = 5", "encoder.t5_encoder: must be a valid string"),
        refused('sampling.prompts = "a red circle"', "sampling.prompts: must be a valid list"),
        refused(
            'sampling.prompts = ["a red circle", 3]',
            "sampling.prompts: item 1 must be a valid string",
        ),
        refused('debug.seed = "42"', "debug.seed: must be a valid integer"),
        refused('flow.time_density = "lognormal"', "flow.time_density: must be 'uniform' or"),
        refused("encoder.pixel_channels = 2", "encoder.pixel_channels: must be 1 or 3"),
        refused("training.steps = 2026-01-01", "training.steps: must be a valid integer"),
        refused("training.dataloader = 4", "training.dataloader: is a section: write"),
        refused("--training.steps ten", "training.steps: must be a valid integer, unable to"),
        refused("--training.steps 1e3", "training.steps: must be a valid integer, unable to"),
        refused("--training.steps", "training.steps: needs a value (int)"),
        refused("--checkpoint.enable maybe", "checkpoint.enable: must be a valid boolean"),
        refused("--checkpoint.no-enable true", "checkpoint.enable: only switches are given in"),
        refused(
            "--training.mixed_precision_param bf16",
            "training.mixed_precision_param: must be 'bfloat16' or",
        ),
        refused("--training.steps 3 4", "'4': belongs to no key; keys are given as"),
        refused("--data.background 255,255,white", "data.background: must be a valid integer"),
    ],
    "Numbers": [
        refused("training.steps = 0", "training.steps: must be at least 1"),
        refused("training.local_batch_size = 0", "training.local_batch_size: must be at least 1"),
        refused(
            "training.classifier_free_guidance_prob = 1.5",
            "training.classifier_free_guidance_prob: must be at most 1",
        ),
        refused("optimizer.lr = -1e-4", "optimizer.lr: must be at least 0"),
        refused("optimizer.beta2 = 1", "optimizer.beta2: must be in [0, 1)"),
        refused("lr_scheduler.decay_ratio = 20", "lr_scheduler.decay_ratio: must be at most 1"),
        refused("training.max_norm = 0", "training.max_norm: must be positive"),
        refused(
            "checkpoint.enable = true\ncheckpoint.keep_latest_k = 1",
            "checkpoint.keep_latest_k: keep at least 2, for",
        ),
        refused("data.held_out_share = 1.0", "data.held_out_share: must be in [0, 1)"),
        refused("data.background = [255, 255]", "data.background: must be a list of red"),
        refused(
            "training.dataloader.prefetch_factor = 2",
            "training.dataloader.prefetch_factor: batches are made ahead",
        ),
        refused(
            "validation.enable = true\nvalidation.steps = 0",
            "validation.steps: must be positive, or -1",
        ),
        refused(
            "profiling.enable_profiling = true\nprofiling.profile_freq = 2",
            "profiling.enable_profiling: needs a GPU; set it to false",
            "profiling.profile_freq: must be at least profiling.profiler_warmup +",
        ),
        refused(
            "profiling.enable_profiling = true\nprofiling.profiler_active = 0",
            "profiling.profiler_active: must be at least 1",
            "profiling.enable_profiling: needs a GPU; set it to false",
        ),
        refused("optimizer.lr = inf", "optimizer.lr: must be at most 3.40282e+38"),
        refused("optimizer.lr = -inf", "optimizer.lr: must be at least 0"),
        refused("optimizer.lr = 1e300", "optimizer.lr: must be at most 3.40282e+38"),
        refused("--flow.logit_mean inf", "flow.logit_mean: must be at most 3.40282e+38"),
        refused("optimizer.lr = 1" + 310 * "0", "optimizer.lr: must be a valid number"),
        refused("optimizer.eps = 0", "optimizer.eps: must be positive"),
        refused("debug.seed = 18446744073709551616", "debug.seed: must be at most"),
        refused("training.steps = 9223372036854775808", "training.steps: must be at most"),
        refused(
            "comm.init_timeout_seconds = 1000000000000",
            "comm.init_timeout_seconds: must be at most",
        ),
        refused(
            "training.steps = 200\nlr_scheduler.total_steps = 100\nlr_scheduler.decay_ratio = 0.0",
            "training.steps: is beyond the schedule",
        ),
    ],
    "Files and folders": [
        refused('encoder.clip_encoder = "./nowhere"', "encoder.clip_encoder: does not exist"),
        refused(
            'model.flavor = "flux-tiny"\ntraining.img_size = 64\nencoder.autoencoder_path = "no.safetensors"',
            "encoder.autoencoder_path: does not exist",
        ),
        refused(
            'model.flavor = "flux-tiny"\ntraining.img_size = 64\nencoder.autoencoder_path = "picture.toml"',
            "encoder.autoencoder_path: is a PNG picture",
            needs=("picture.toml",),
        ),
        refused(
            'model.flavor = "flux-tiny"\ntraining.img_size = 64\nencoder.autoencoder_path = "pointer.safetensors"',
            "encoder.autoencoder_path: is a Git LFS pointer",
            needs=("pointer.safetensors",),
        ),
        refused(
            'model.flavor = "flux-tiny"\ntraining.img_size = 64\nencoder.autoencoder_path = "cut.safetensors"',
            "encoder.autoencoder_path: was cut off or damaged",
            needs=("cut.safetensors",),
        ),
        refused(
            'model.flavor = "flux-tiny"\ntraining.img_size = 64\nencoder.autoencoder_path = "assets/tiny/t5/model.safetensors"',
            "encoder.autoencoder_path: is a T5 text encoder",
        ),
        refused(
            'encoder.t5_encoder = "assets/tiny/clip"',
            "encoder.t5_encoder: its model_type is 'clip_text_model'",
        ),
        refused(
            'encoder.t5_encoder = "google/t5-v1_1-xxl"',
            "encoder.t5_encoder: cannot load the",
            varies=True,
        ),
        refused(
            'encoder.t5_encoder = "assets/tiny/t5/config.json"',
            "encoder.t5_encoder: is a file; name the",
        ),
        refused(
            'encoder.t5_encoder = "shards"',
            "encoder.t5_encoder: names model-00002-of-00002.safetensors",
            needs=("shards",),
        ),
        refused(
            'encoder.t5_encoder = "stray"\nencoder.clip_encoder = "headless"',
            "encoder.t5_encoder: cannot load the weights from stray: it does not fit; 1",
            "encoder.clip_encoder: cannot load the weights from headless: it does not fit; 2",
            needs=("stray", "headless"),
        ),
        refused(
            'encoder.t5_encoder = "int8"',
            "encoder.t5_encoder: holds bitsandbytes int8 weights",
            needs=("int8",),
        ),
        refused(
            'encoder.t5_encoder = "unscaled"',
            "encoder.t5_encoder: holds no scales",
            needs=("unscaled",),
        ),
        refused(
            'encoder.t5_encoder = "quantised"',
            "encoder.t5_encoder: bitsandbytes, 4 bits",
            needs=("quantised",),
        ),
        refused(
            'encoder.clip_encoder = "pickled"',
            "encoder.clip_encoder: pytorch_model.bin is not read",
            needs=("pickled",),
        ),
        refused(
            'job.dump_folder = "picture.toml/run"',
            "job.dump_folder: picture.toml is a file",
            needs=("picture.toml",),
        ),
        refused('training.dataset = "folder"', "training.dataset_path: is not set: 'folder'"),
        refused('data.caption_prefix = "art: "', "data.caption_prefix: training.dataset ="),
        refused(
            'training.dataset = "folder"\ntraining.dataset_path = "./nowhere"',
            "training.dataset_path: does not exist",
        ),
        refused('training.dataset = "imagenet"', "training.dataset: is not available; use one"),
        refused('training.dataset = "cc12m-wds"', "training.dataset_path: is not set: 'cc12m-wds'"),
        refused(
            'checkpoint.enable = true\ncheckpoint.folder = "/data/checkpoints"',
            "checkpoint.folder: is not below",
        ),
        refused(
            'sampling.enable = true\nsampling.prompts = ["one"]\nsampling.folder = "../samples"',
            "sampling.folder: is not below",
        ),
        refused(
            'checkpoint.enable = true\ncheckpoint.folder = "config.toml"',
            "checkpoint.folder: is the name of",
        ),
        refused(
            'job.dump_folder = "."\nmetrics.enable_tensorboard = true\nmetrics.save_tb_folder = "picture.toml/tb"',
            "metrics.save_tb_folder: picture.toml is a file",
            needs=("picture.toml",),
        ),
        refused(
            'job.dump_folder = "."\njob.save_config_file = "folder"',
            "job.save_config_file: folder is a folder",
            needs=("folder",),
        ),
        refused(
            'checkpoint.enable = true\ncheckpoint.initial_load_path = "./nowhere"',
            "checkpoint.initial_load_path: does not exist",
        ),
        refused(
            'checkpoint.enable = true\ncheckpoint.initial_load_path = "somebody/flux-merged"',
            "checkpoint.initial_load_path: does not exist here",
        ),
        refused(
            'checkpoint.enable = true\ncheckpoint.initial_load_path = "link.safetensors"',
            "checkpoint.initial_load_path: is a link to",
            needs=("link.safetensors",),
        ),
        refused(
            'checkpoint.enable = true\ncheckpoint.initial_load_path = "page.safetensors"',
            "checkpoint.initial_load_path: is a web page",
            needs=("page.safetensors",),
        ),
        refused(
            'checkpoint.enable = true\ncheckpoint.initial_load_path = "lora.safetensors"',
            "checkpoint.initial_load_path: is a LoRA (adapter)",
            needs=("lora.safetensors",),
        ),
        refused(
            'model.flavor = "flux-tiny"\ntraining.img_size = 64\nencoder.autoencoder_path = "page.safetensors"',
            "encoder.autoencoder_path: is a web page",
            needs=("page.safetensors",),
        ),
        refused(
            'encoder.t5_encoder = "link.safetensors"',
            "encoder.t5_encoder: is a link to",
            needs=("link.safetensors",),
        ),
    ],
    "Model and sizes": [
        refused('model.name = "llama3"', "model.name: this trainer trains 'flux'"),
        refused('model.flavor = "flux-pro"', "model.flavor: is unknown; known: flux-dev"),
        refused("training.img_size = 7", "training.img_size: image height 7 is not a positive"),
        refused("training.img_height = 9", "training.img_height: image height 9 is not a"),
        refused(
            'model.flavor = "flux-schnell"\ntraining.img_size = 256',
            "encoder.t5_encoder: width 32 does not fit model.flavor = 'flux-schnell', which",
            "encoder.clip_encoder: width 32 does not fit model.flavor = 'flux-schnell', which",
        ),
        refused(
            'validation.enable = true\ntraining.dataset = "cc12m-test"',
            "validation.enable: nothing is held out",
        ),
        refused(
            "sampling.classifier_free_guidance_scale = inf",
            "sampling.classifier_free_guidance_scale: must be at most",
        ),
        refused("sampling.guidance = -1.0", "sampling.guidance: must be at least 0"),
        refused("sampling.enable = true", "sampling.enable: needs sampling.prompts, a list of"),
        refused('sampling.schedule = "shifted"', "sampling.schedule: 'shifted' is unknown"),
        refused("--sampling.schedule max_shift=1.3", "sampling.schedule: max_shift counts only"),
        refused(
            'score.enable = true\ntraining.dataset = "shapes"', "score.enable: reads 8 x 8 digits"
        ),
    ],
    "Ranks": [
        refused(
            "--parallelism.data_parallel_replicate_degree 3",
            "parallelism.data_parallel_replicate_degree: times",
            ranks=2,
        ),
        refused(
            "--parallelism.tensor_parallel_degree 3",
            "parallelism.tensor_parallel_degree: times",
            ranks=3,
        ),
        refused(
            "--parallelism.context_parallel_degree 0",
            "parallelism.context_parallel_degree: must be at least 1",
        ),
        refused(
            "--training.global_batch_size 100", "training.global_batch_size: is not a multiple of"
        ),
        refused(
            "--parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_schedule 1F2B",
            "parallelism.pipeline_parallel_schedule: is not available; use",
            ranks=2,
        ),
        refused(
            "--parallelism.pipeline_parallel_degree 8",
            "parallelism.pipeline_parallel_degree: makes 8 stages of 6",
            ranks=8,
        ),
        refused(
            "--parallelism.expert_parallel_degree 2",
            "parallelism.expert_parallel_degree: FLUX has no experts",
        ),
    ],
    "The machine and what does not go together": [
        refused(
            "--training.mixed_precision_param bfloat16",
            "training.mixed_precision_param: needs a GPU of compute",
            needs=("card 7.5",),
        ),
        refused(
            "--model.converters quantize.linear.float8", "model.converters: needs a GPU of compute"
        ),
        refused("--model.converters float8", "model.converters: float8 is unknown; FLUX has"),
        refused(
            "--training.enable_cpu_offload", "training.enable_cpu_offload: needs a GPU; set it to"
        ),
        refused(
            "--training.dtype bfloat16 --optimizer.name Adam",
            "training.dtype: needs optimizer.name =",
        ),
        refused("--ema.decay 1,0.9", "ema.decay: must be in [0, 1)"),
        refused("--ema.use_for ema", "ema.use_for: needs ema.decay, the decay of an average"),
        refused("--training.train_only lora", "training.train_only: names no parameter; they"),
        refused("--optimizer.name SGD", "optimizer.name: is not available; use one of AdamW"),
        refused(
            "--activation_checkpoint.mode memory_budget",
            "activation_checkpoint.mode: is a choice of the",
        ),
        refused(
            "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option two",
            'activation_checkpoint.selective_ac_option: must be "op", or a',
        ),
        refused(
            "--compile.enable --compile.components model,optimizer",
            "compile.components: optimizer is unknown",
        ),
        refused("--comm.mode fake_backend", "comm.mode: is not available"),
        refused("--fault_tolerance.enable", "fault_tolerance.enable: is not available"),
        refused("--memory_estimation.enable", "memory_estimation.enable: is not available"),
        refused(
            "--checkpoint.create_seed_checkpoint",
            "checkpoint.create_seed_checkpoint: needs checkpoint.enable",
        ),
        refused(
            "--checkpoint.enable --checkpoint.create_seed_checkpoint --checkpoint.load_only",
            "checkpoint.create_seed_checkpoint: saves",
        ),
        refused(
            "--checkpoint.enable --checkpoint.load_step 100",
            "checkpoint.load_step: outputs/checkpoint/step-",
        ),
        refused(
            "--comm.save_traces_file_prefix ranks/rank_",
            "comm.save_traces_file_prefix: begins a file's name",
        ),
        refused("--checkpoint.load_step 100", "checkpoint.load_step: nothing is loaded or"),
        refused(
            "--checkpoint.enable --checkpoint.exclude_from_loading model,scheduler",
            "checkpoint.exclude_from_loading: no checkpoint has",
        ),
        refused(
            "--checkpoint.enable --checkpoint.exclude_from_loading train_state",
            "checkpoint.exclude_from_loading: without train_state",
        ),
        refused(
            "--checkpoint.enable --checkpoint.exclude_from_loading model --checkpoint.initial_load_path folder",
            "checkpoint.exclude_from_loading: without model, nothing is left of",
            "checkpoint.initial_load_path: folder holds no FLUX weights: expected is a",
            needs=("folder",),
        ),
        refused(
            "--checkpoint.enable --checkpoint.initial_load_path folder --checkpoint.no-initial_load_model_only",
            "checkpoint.initial_load_path: cannot be continued: it",
            needs=("folder",),
        ),
        refused(
            "--checkpoint.exclude_from_loading optimizer",
            "checkpoint.exclude_from_loading: nothing is loaded or",
        ),
        refused("--training.gc_debug", "training.gc_debug: needs a GPU; set it to false"),
        refused(
            "--profiling.enable_memory_snapshot",
            "profiling.enable_memory_snapshot: needs a GPU; set it to",
        ),
        refused(
            "--metrics.enable_wandb",
            "metrics.enable_wandb: wandb is not installed",
            needs=("no wandb",),
        ),
        refused(
            "--experimental.custom_import nowhere",
            "experimental.custom_import: is no module that can",
        ),
        refused(
            "--compile.enable --compile.backend inductr",
            "compile.backend: is not available; torch",
            varies=True,
        ),
    ],
}
"""Part of the document -> its rows."""

WI = "encoder.block.0.layer.1.DenseReluDense.wi_0"


def put_encoder(part: str, change) -> Callable[[Path], None]:
    """A text encoder with other weights than its config.json asks for."""

    def put(path: Path) -> None:
        shutil.copytree(TINY / part, path)
        weights = path / "model.safetensors"
        save_file(change(load_file(weights)), weights, metadata={"format": "pt"})

    return put


def put_shards(path: Path) -> None:
    shutil.copytree(TINY / "t5", path)
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def put_pickle(path: Path) -> None:
    shutil.copytree(TINY / "clip", path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def put_quantised(path: Path) -> None:
    shutil.copytree(TINY / "t5", path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (path / "config.json").write_text(json.dumps(config))


LORA = b'{"x.lora_A.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 335304388\n"

THINGS = {
    "folder": Path.mkdir,
    "picture.toml": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff" * 9),
    "pointer.safetensors": lambda path: path.write_text(POINTER),
    "page.safetensors": lambda path: path.write_text("<!DOCTYPE html><html>Sign in</html>"),
    "link.safetensors": lambda path: path.symlink_to("/mnt/gone/flux1-dev.safetensors"),
    "lora.safetensors": lambda path: path.write_bytes(
        len(LORA).to_bytes(8, "little") + LORA + bytes(4)
    ),
    "cut.safetensors": lambda path: path.write_bytes(
        (TINY / "ae.safetensors").read_bytes()[:600_000]
    ),
    "shards": put_shards,
    "pickled": put_pickle,
    "quantised": put_quantised,
    "stray": put_encoder("t5", lambda t: {**t, "encoder.block.0.bias": torch.ones(3)}),
    "headless": put_encoder(
        "clip", lambda t: {n: x for n, x in t.items() if "final_layer_norm" not in n}
    ),
    "int8": put_encoder("t5", lambda t: {**t, f"{WI}.SCB": torch.ones(64)}),
    "unscaled": put_encoder(
        "t5",
        lambda t: {
            **t,
            f"{WI}.weight": t[f"{WI}.weight"].to(torch.float8_e4m3fn),
            "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn),
        },
    ),
}
"""Name -> puts something of that name there that is not what it claims to be."""

PATCHES = {
    "card 7.5": lambda: mock.patch.object(checks, "card", return_value=Card("Tesla T4", (7, 5))),
    "no wandb": lambda: mock.patch.object(
        checks, "find_spec", lambda name: None if name == "wandb" else 1
    ),
}


@contextlib.contextmanager
def situation(case: Refusal, folder: Path) -> Iterator[list[str]]:
    """The command line that a case is refused by, with `folder` as current folder."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(mock.patch.dict(os.environ, WORLD_SIZE=str(case.ranks)))
        for name in case.needs:
            if name in PATCHES:
                stack.enter_context(PATCHES[name]())
            else:
                THINGS[name](folder / name)
        lines = [] if case.typed else case.given.splitlines()
        given = {text.split(" = ")[0] for text in lines}
        sections = {key.split(".")[0] for key in given if "." not in key}
        lines += [
            f"{key} = {value}"
            for key, value in BASE.items()
            if key not in given and key.split(".")[0] not in sections
        ]
        (folder / "run.toml").write_text("\n".join(lines) + "\n")
        typed = shlex.split(case.given) if case.typed else []
        named = "--job.config_file" in typed
        yield [*([] if named else ["--job.config_file", "run.toml"]), *typed]


def reported(argv: list[str]) -> list[Problem]:
    """The problems of a configuration."""
    try:
        load_config(argv)
    except ConfigError as error:
        return error.problems
    return []


def lines_of(problems: list[Problem], folder: Path) -> list[str]:
    """What is printed of problems, with the paths of this machine cut off."""
    return [str(problem).replace(f"{folder}/", "").replace(f"{ROOT}/", "") for problem in problems]


def cells(case: Refusal, lines: list[str]) -> str:
    """A row of the document."""
    return f"| {_cell(case.given)} | {_cell(chr(10).join(lines))} |"


def _cell(text: str) -> str:
    quoted = (f"`` {part} ``" if "`" in part else f"`{part}`" for part in text.splitlines())
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
        for case in rows:
            with tempfile.TemporaryDirectory() as name, situation(case, Path(name)) as argv:
                lines.append(cells(case, lines_of(reported(argv), Path(name))))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
    print(DOCUMENT, file=sys.stderr)
