# ruff: noqa: E501 (messages are whole, so that they can be searched for)
"""Inputs that are refused, and what is said: the table behind test_refusals.py and docs/errors.md.

python tests/unit/config/refusals.py          # writes docs/errors.md
"""

from dataclasses import dataclass, field
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "errors.md"

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
        message: what is said of it; several where one mistake has several lines.
        toml: what stands in the file, as its first lines.
        argv: what stands on the command line.
        ranks: how many are started.
        needs: stand-ins that test_refusals.py puts into the current folder, a card, or a package
            that is not installed.
    """

    message: tuple[str, ...]
    toml: str = ""
    argv: tuple[str, ...] = ()
    ranks: int = 1
    needs: tuple[str, ...] = field(default=())

    @property
    def given(self) -> str:
        """The mistake, as a reader would type it."""
        return self.toml or " ".join(f'"{a}"' if " " in a else a for a in self.argv)


def file(toml: str, *message: str, **more) -> Refusal:
    return Refusal(message, toml=toml, **more)


def line(argv: str, *message: str, **more) -> Refusal:
    return Refusal(message, argv=tuple(argv.split()), **more)


TABLE: dict[str, list[Refusal]] = {
    "The file": [
        file(
            "training.steps = ",
            "job.config_file = 'run.toml' is not valid TOML: Invalid value (at line 1, column 18)",
        ),
        file(
            "training.steps = 3\ntraining.steps = 4",
            "job.config_file = 'run.toml' is not valid TOML: Cannot overwrite a value (at line 2, column 19)",
        ),
        file(
            "training.steps = 30 000",
            "job.config_file = 'run.toml' is not valid TOML: Expected newline or end of document after a statement (at line 1, column 21)",
        ),
        line("--job.config_file no.toml", "job.config_file = 'no.toml' does not exist"),
        line(
            "--job.config_file folder",
            "job.config_file = 'folder' is a folder; name the TOML file in it",
            needs=("folder",),
        ),
        line(
            "--job.config_file picture.toml",
            "job.config_file = 'picture.toml' is not text in UTF-8 (invalid start byte); is it a TOML file?",
            needs=("picture.toml",),
        ),
        line(
            "--job.config_file run.toml --job.config_file other.toml",
            "job.config_file is given more than once: run.toml, other.toml; choose one",
        ),
        file(
            'job.config_file = "other.toml"',
            "run.toml:1: job.config_file belongs on the command line; remove it",
        ),
        file(
            'job.custom_config_module = "nowhere.config"',
            "job.custom_config_module = 'nowhere.config' cannot be used (ModuleNotFoundError: No module named 'nowhere')",
        ),
    ],
    "Unknown names": [
        file(
            "training.stepps = 100",
            "run.toml:1: training.stepps is unknown; did you mean training.steps?",
        ),
        file(
            "trainig.steps = 100",
            "run.toml:1: the section [trainig] is unknown; did you mean [training]?",
        ),
        file(
            "training.lr = 1e-4", "run.toml:1: training.lr is unknown; did you mean optimizer.lr?"
        ),
        file("training.seed = 1", "run.toml:1: training.seed is unknown; did you mean debug.seed?"),
        file(
            "optimiser.lr = 1e-4",
            "run.toml:1: the section [optimiser] is unknown; did you mean [optimizer]?",
        ),
        file(
            "quantize.linear.float8.emulated = true",
            "run.toml:1: quantize.linear.float8.emulated is unknown; did you mean quantize.linear.float8.emulate?",
        ),
        file(
            "training = 3",
            "run.toml:1: training is a section: write [training], and its keys below",
        ),
        line("--training.stepps 100", "--training.stepps is unknown; did you mean training.steps?"),
        line("--steps 100", "--steps is unknown; ./run_train.sh --help lists all keys"),
        line(
            "--training.local-batch 8",
            "--training.local-batch is unknown; did you mean training.local_batch_size?",
        ),
        line(
            "training.steps=100",
            "'training.steps=100' on the command line belongs to no key; did you mean --training.steps=100?",
        ),
        line(
            "--mixed_precision_param float32",
            "--mixed_precision_param is unknown; did you mean training.mixed_precision_param?",
        ),
        line(
            "--training.no-steps",
            "--training.no-steps: --training.steps is no switch; its value must be a whole number",
        ),
    ],
    "Types": [
        file(
            'training.steps = "100"',
            'run.toml:1: training.steps = "100" must be a whole number, not a string',
        ),
        file(
            "training.steps = 100.0",
            "run.toml:1: training.steps = 100.0 must be a whole number, not a number with a fraction",
        ),
        file(
            "training.steps = true",
            "run.toml:1: training.steps = true must be a whole number, not a boolean",
        ),
        file(
            'optimizer.lr = "1e-4"',
            'run.toml:1: optimizer.lr = "1e-4" must be a number, not a string',
        ),
        file("optimizer.lr = nan", "run.toml:1: optimizer.lr = nan must be a number, not nan"),
        file(
            'checkpoint.enable = "false"',
            'run.toml:1: checkpoint.enable = "false" must be true or false, not a string',
        ),
        file(
            "checkpoint.enable = 1",
            "run.toml:1: checkpoint.enable = 1 must be true or false, not a whole number",
        ),
        file(
            "encoder.t5_encoder = 5",
            "run.toml:1: encoder.t5_encoder = 5 must be a string in quotes, not a whole number",
        ),
        file(
            'sampling.prompts = "a red circle"',
            'run.toml:1: sampling.prompts = "a red circle" must be a list of strings, not a string',
        ),
        file(
            'sampling.prompts = ["a red circle", 3]',
            'run.toml:1: sampling.prompts = ["a red circle", 3] must be a list of strings',
        ),
        file(
            'debug.seed = "42"',
            'run.toml:1: debug.seed = "42" must be a whole number or "None", not a string',
        ),
        file(
            'flow.time_density = "lognormal"',
            'run.toml:1: flow.time_density = "lognormal" must be one of "uniform", "logit_normal"',
        ),
        file(
            "encoder.pixel_channels = 2",
            "run.toml:1: encoder.pixel_channels = 2 must be one of 1, 3",
        ),
        file(
            "training.steps = 2026-01-01",
            "run.toml:1: training.steps = 2026-01-01 must be a whole number, not a date or time",
        ),
        file(
            "training.dataloader = 4",
            "run.toml:1: training.dataloader is a section: write [training.dataloader], and its keys below",
        ),
        line("--training.steps ten", "--training.steps ten: the value must be a whole number"),
        line("--training.steps 1e3", "--training.steps 1e3: the value must be a whole number"),
        line("--training.steps", "--training.steps: the value must be a whole number"),
        line(
            "--checkpoint.enable maybe",
            "--checkpoint.enable maybe: it is --checkpoint.enable or --checkpoint.no-enable, without a value",
        ),
        line(
            "--checkpoint.no-enable true",
            "--checkpoint.no-enable true: it is --checkpoint.enable or --checkpoint.no-enable, without a value",
        ),
        line(
            "--training.mixed_precision_param bf16",
            '--training.mixed_precision_param bf16: the value must be one of "bfloat16", "float32"',
        ),
        line(
            "--training.steps 3 4",
            "'4' on the command line belongs to no key; keys are given as --section.key value",
        ),
        line(
            "--data.background 255,255,white",
            "--data.background 255,255,white: the value must be a list of whole numbers",
        ),
    ],
    "Numbers": [
        file("training.steps = 0", "run.toml:1: training.steps = 0 must be at least 1"),
        file(
            "training.local_batch_size = 0",
            "run.toml:1: training.local_batch_size = 0 must be at least 1",
        ),
        file(
            "training.classifier_free_guidance_prob = 1.5",
            "run.toml:1: training.classifier_free_guidance_prob = 1.5 is not a probability",
        ),
        file("optimizer.lr = -1e-4", "run.toml:1: optimizer.lr = -0.0001 must be at least 0"),
        file("optimizer.beta2 = 1", "run.toml:1: optimizer.beta2 = 1.0 is not in [0, 1)"),
        file(
            "lr_scheduler.decay_ratio = 20",
            "run.toml:1: lr_scheduler.decay_ratio = 20.0 is not in [0, 1]",
        ),
        file(
            "training.max_norm = 0",
            "run.toml:1: training.max_norm = 0.0 must be positive; inf is off",
        ),
        file(
            "checkpoint.enable = true\ncheckpoint.keep_latest_k = 1",
            "run.toml:2: checkpoint.keep_latest_k = 1: keep at least 2, for the newest may turn out damaged; 0 keeps all",
        ),
        file(
            "data.held_out_share = 1.0",
            "run.toml:1: data.held_out_share = 1.0 is not a share in [0, 1)",
        ),
        file(
            "data.background = [255, 255]",
            "run.toml:1: data.background = [255, 255] is not a list of red, green, blue, 0 to 255",
        ),
        file(
            "training.dataloader.prefetch_factor = 2",
            "run.toml:1: training.dataloader.prefetch_factor = 2: batches are made ahead by training.dataloader.num_workers = 0 processes; both must be at least 1",
        ),
        file(
            "validation.enable = true\nvalidation.steps = 0",
            "run.toml:2: validation.steps = 0 must be positive, or -1 for all",
        ),
        file(
            "profiling.enable_profiling = true\nprofiling.profile_freq = 2",
            "run.toml:1: profiling.enable_profiling = true needs a GPU; set it to false",
            "run.toml:2: profiling.profile_freq = 2 must be at least profiler_warmup + profiler_active = 4",
        ),
        file(
            "profiling.enable_profiling = true\nprofiling.profiler_active = 0",
            "run.toml:1: profiling.enable_profiling = true needs a GPU; set it to false",
            "run.toml:2: profiling.profiler_active = 0 must be at least 1",
        ),
        file("optimizer.lr = inf", "run.toml:1: optimizer.lr = inf is not finite"),
        file("optimizer.lr = -inf", "run.toml:1: optimizer.lr = -inf must be at least 0"),
        file("optimizer.lr = 1e300", "run.toml:1: optimizer.lr = 1e+300 is beyond float32"),
        line("--flow.logit_mean inf", "flow.logit_mean = inf is not finite"),
        file(
            f"optimizer.lr = 1{'0' * 310}",
            f"run.toml:1: optimizer.lr = 1{'0' * 55} …0 must be a number, not one of more than 308 digits",
        ),
        file("optimizer.eps = 0", "run.toml:1: optimizer.eps = 0.0 must be at least 1.17549 …"),
        file(
            "debug.seed = 18446744073709551616",
            "run.toml:1: debug.seed = 18446744073709551616 is beyond 64 bits",
        ),
        file(
            "training.steps = 9223372036854775808",
            "run.toml:1: training.steps = 9223372036854775808 is beyond 64 bits",
        ),
        file(
            "comm.init_timeout_seconds = 1000000000000",
            "run.toml:1: comm.init_timeout_seconds = 1000000000000 must be at most 1000000000",
        ),
        file(
            "training.steps = 200\nlr_scheduler.total_steps = 100\nlr_scheduler.decay_ratio = 0.0",
            "run.toml:1: training.steps = 200 is beyond the schedule of the learning rate, lr_scheduler.total_steps = 100; raise that, or remove it to take training.steps",
        ),
    ],
    "Files and folders": [
        file(
            'encoder.clip_encoder = "./nowhere"',
            "run.toml:1: encoder.clip_encoder = './nowhere' does not exist",
        ),
        file(
            'model.flavor = "flux-tiny"\ntraining.img_size = 64\nencoder.autoencoder_path = "no.safetensors"',
            "run.toml:3: encoder.autoencoder_path = 'no.safetensors' does not exist",
        ),
        file(
            'model.flavor = "flux-tiny"\ntraining.img_size = 64\nencoder.autoencoder_path = "picture.toml"',
            "run.toml:3: encoder.autoencoder_path = 'picture.toml': picture.toml is a PNG picture, not weights; give a safetensors file",
            needs=("picture.toml",),
        ),
        file(
            'model.flavor = "flux-tiny"\ntraining.img_size = 64\nencoder.autoencoder_path = "pointer.safetensors"',
            "run.toml:3: encoder.autoencoder_path = 'pointer.safetensors': pointer.safetensors is a Git LFS pointer, not the weights: run `git lfs pull` there",
            needs=("pointer.safetensors",),
        ),
        file(
            'model.flavor = "flux-tiny"\ntraining.img_size = 64\nencoder.autoencoder_path = "cut.safetensors"',
            "run.toml:3: encoder.autoencoder_path = 'cut.safetensors': cut.safetensors is damaged: it has 600,000 bytes, and by its header 772,326",
            needs=("cut.safetensors",),
        ),
        file(
            'model.flavor = "flux-tiny"\ntraining.img_size = 64\nencoder.autoencoder_path = "assets/tiny/t5/model.safetensors"',
            "run.toml:3: encoder.autoencoder_path: assets/tiny/t5/model.safetensors is a T5 text encoder, and no autoencoder of FLUX.1 ('encoder.conv_in.weight'); give ae.safetensors of FLUX.1, or a diffusers vae folder with its config.json",
        ),
        file(
            'encoder.t5_encoder = "assets/tiny/clip"',
            "run.toml:1: encoder.t5_encoder: cannot load the configuration from assets/tiny/clip: its model_type is 'clip_text_model', needed is 't5'",
        ),
        file(
            'encoder.t5_encoder = "google/t5-v1_1-xxl"\nencoder.clip_encoder = "openai/clip-vit-large-patch14"',
            "run.toml:1: encoder.t5_encoder: cannot load the configuration from google/t5-v1_1-xxl: …",
            "run.toml:2: encoder.clip_encoder: cannot load the configuration from openai/clip-vit-large-patch14: …",
        ),
        file(
            'encoder.t5_encoder = "assets/tiny/t5/config.json"',
            "run.toml:1: encoder.t5_encoder = 'assets/tiny/t5/config.json': is a file; name the folder with its config.json",
        ),
        file(
            'encoder.t5_encoder = "shards"',
            "run.toml:1: encoder.t5_encoder = 'shards': shards/model.safetensors.index.json names model-00002-of-00002.safetensors, which does not exist; get it again",
            needs=("shards",),
        ),
        file(
            'encoder.t5_encoder = "stray"\nencoder.clip_encoder = "headless"',
            "run.toml:1: encoder.t5_encoder: cannot load the weights from stray: it does not fit; 1 unknown: encoder.block.0.bias",
            "run.toml:2: encoder.clip_encoder: cannot load the weights from headless: it does not fit; 2 missing: final_layer_norm.weight, final_layer_norm.bias",
            needs=("stray", "headless"),
        ),
        file(
            'encoder.t5_encoder = "int8"',
            "run.toml:1: encoder.t5_encoder: cannot load the weights from int8: it holds bitsandbytes int8 weights (encoder.block.0.layer.1.DenseReluDense.wi_0.SCB), which are not read; give the file that it was made from, or one in float8 with a scale for each tensor or row",
            needs=("int8",),
        ),
        file(
            'encoder.t5_encoder = "unscaled"',
            "run.toml:1: encoder.t5_encoder: cannot load the weights from unscaled: it says by scaled_fp8 that its float8 weights are scaled, and holds no scales (scale_weight or weight_scale); get it again",
            needs=("unscaled",),
        ),
        file(
            'encoder.t5_encoder = "quantised"',
            "run.toml:1: encoder.t5_encoder: cannot load the configuration from quantised: its quantization_config says that the weights are quantised by bitsandbytes, 4 bits, which is not read; give the file that it was made from, or one in float8 with a scale for each tensor or row",
            needs=("quantised",),
        ),
        file(
            'encoder.clip_encoder = "pickled"',
            "run.toml:1: encoder.clip_encoder = 'pickled': pickled/model.safetensors does not exist, nor an index of shards; pytorch_model.bin is not read, for it could run code",
            needs=("pickled",),
        ),
        file(
            'job.dump_folder = "picture.toml/run"',
            "run.toml:1: job.dump_folder = 'picture.toml/run': picture.toml is a file; name a folder",
            needs=("picture.toml",),
        ),
        file(
            'training.dataset = "folder"',
            "training.dataset_path is not set: 'folder' needs the folder of its files",
        ),
        file(
            'data.caption_prefix = "art: "',
            "run.toml:1: data.caption_prefix = 'art: ': training.dataset = 'digits' makes its own captions; remove the key",
        ),
        file(
            'training.dataset = "folder"\ntraining.dataset_path = "./nowhere"',
            "run.toml:2: training.dataset_path = './nowhere' does not exist",
        ),
        file(
            'training.dataset = "imagenet"',
            "run.toml:1: training.dataset = 'imagenet' is not available; use one of digits, shapes …",
        ),
        file(
            'training.dataset = "cc12m-wds"',
            "training.dataset_path is not set: 'cc12m-wds' needs the folder of its files; download them with `hf download pixparse/cc12m-wds --repo-type dataset --include '*.tar' --local-dir cc12m-wds`",
        ),
        file(
            'checkpoint.enable = true\ncheckpoint.folder = "/data/checkpoints"',
            "run.toml:2: checkpoint.folder = '/data/checkpoints' is not below job.dump_folder, the one folder that is kept from being written by two runs; name one in it",
        ),
        file(
            'sampling.enable = true\nsampling.prompts = ["one"]\nsampling.folder = "../samples"',
            "run.toml:3: sampling.folder = '../samples' is not below job.dump_folder, the one folder that is kept from being written by two runs; name one in it",
        ),
        file(
            'checkpoint.enable = true\ncheckpoint.folder = "config.toml"',
            "run.toml:2: checkpoint.folder = 'config.toml' is the name of job.save_config_file; choose another",
        ),
        file(
            'job.dump_folder = "."\nmetrics.enable_tensorboard = true\nmetrics.save_tb_folder = "picture.toml/tb"',
            "run.toml:3: metrics.save_tb_folder = 'picture.toml/tb': picture.toml is a file; name a folder",
            needs=("picture.toml",),
        ),
        file(
            'job.dump_folder = "."\njob.save_config_file = "folder"',
            "run.toml:2: job.save_config_file = 'folder': folder is a folder; name a file",
            needs=("folder",),
        ),
        file(
            'checkpoint.enable = true\ncheckpoint.initial_load_path = "./nowhere"',
            "run.toml:2: checkpoint.initial_load_path = './nowhere' does not exist",
        ),
        file(
            'checkpoint.enable = true\ncheckpoint.initial_load_path = "somebody/flux-merged"',
            "run.toml:2: checkpoint.initial_load_path = 'somebody/flux-merged' does not exist here; what the hub has is downloaded first: `python scripts/download_hf_assets.py --repo_id somebody/flux-merged --assets transformer --hf_token <token>`, then name assets/hf/flux-merged/transformer",
        ),
        file(
            'checkpoint.enable = true\ncheckpoint.initial_load_path = "link.safetensors"',
            "run.toml:2: checkpoint.initial_load_path = 'link.safetensors' is a link to /mnt/gone/flux1-dev.safetensors, which does not exist",
            needs=("link.safetensors",),
        ),
        file(
            'checkpoint.enable = true\ncheckpoint.initial_load_path = "page.safetensors"',
            "run.toml:2: checkpoint.initial_load_path = 'page.safetensors': page.safetensors is a web page or XML, not weights; where it was downloaded, that failed: get it again, logged in or with a token (--hf_token) if the model asks for one",
            needs=("page.safetensors",),
        ),
        file(
            'checkpoint.enable = true\ncheckpoint.initial_load_path = "lora.safetensors"',
            "run.toml:2: checkpoint.initial_load_path = 'lora.safetensors': lora.safetensors is a LoRA (adapter), not whole weights; there is no LoRA here: merge it into the model that it was made for (diffusers: load_lora_weights, fuse_lora), and give the result",
            needs=("lora.safetensors",),
        ),
        file(
            'model.flavor = "flux-tiny"\ntraining.img_size = 64\nencoder.autoencoder_path = "page.safetensors"',
            "run.toml:3: encoder.autoencoder_path = 'page.safetensors': page.safetensors is a web page or XML, not weights; where it was downloaded, that failed: get it again, logged in or with a token (--hf_token) if the model asks for one",
            needs=("page.safetensors",),
        ),
        file(
            'encoder.t5_encoder = "link.safetensors"',
            "run.toml:1: encoder.t5_encoder = 'link.safetensors' is a link to /mnt/gone/flux1-dev.safetensors, which does not exist",
            needs=("link.safetensors",),
        ),
    ],
    "Model and sizes": [
        file(
            'model.name = "llama3"', "run.toml:1: model.name = 'llama3': this trainer trains 'flux'"
        ),
        file(
            'model.flavor = "flux-pro"',
            "run.toml:1: model.flavor = 'flux-pro' is unknown; known: flux-dev …",
        ),
        file(
            "training.img_size = 7",
            "run.toml:1: training.img_size: image height 7 is not a positive multiple of 2 pixels (codec downscale 1 x patch 2); nearest: 6x6, 6x8, 8x6, 8x8",
        ),
        file(
            "training.img_height = 9",
            "run.toml:1: training.img_height / img_width: image height 9 is not a positive multiple of 2 pixels (codec downscale 1 x patch 2); nearest: 8x8, 10x8",
        ),
        file(
            'model.flavor = "flux-schnell"\ntraining.img_size = 256',
            "run.toml:1: encoder.t5_encoder: width 32 does not fit model.flavor = 'flux-schnell', which needs 4096; encoder.clip_encoder: width 32 does not fit model.flavor = 'flux-schnell', which needs 768",
        ),
        file(
            'validation.enable = true\ntraining.dataset = "cc12m-test"',
            "run.toml:1: validation.enable = true, and nothing is held out: set validation.dataset_path to other data, or data.held_out_share to the share of the training data to keep back",
        ),
        file(
            "sampling.classifier_free_guidance_scale = inf",
            "run.toml:1: sampling.classifier_free_guidance_scale = inf must be a finite number, 0 or more",
        ),
        file(
            "sampling.guidance = -1.0",
            "run.toml:1: sampling.guidance = -1.0 must be a finite number, 0 or more",
        ),
        file(
            "sampling.enable = true",
            "run.toml:1: sampling.enable = true needs sampling.prompts, a list of captions",
        ),
        file(
            'sampling.schedule = "shifted"',
            "run.toml:1: sampling.schedule = 'shifted': 'shifted' is unknown; \"dev\", \"schnell\", or key=value with keys of shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len, time_shift_type, shift_terminal, as in shift=3.0",
        ),
        line(
            "--sampling.schedule max_shift=1.3",
            "sampling.schedule = 'max_shift=1.3': max_shift counts only with use_dynamic_shifting=true",
        ),
        file(
            'score.enable = true\ntraining.dataset = "shapes"',
            "run.toml:1: score.enable = true reads 8 x 8 digits: training.dataset must be digits, not shapes",
        ),
    ],
    "Ranks": [
        line(
            "--parallelism.data_parallel_replicate_degree 3",
            "parallelism.data_parallel_replicate_degree = 3 times data_parallel_shard_degree = -1 does not make the 2 ranks that were started; -1 for the shard degree takes what is left",
            ranks=2,
        ),
        line(
            "--parallelism.tensor_parallel_degree 3",
            "parallelism.tensor_parallel_degree = 3 does not divide the 4 heads of model.flavor = 'flux-digits'; use one of 2, 4",
            ranks=3,
        ),
        line(
            "--parallelism.context_parallel_degree 0",
            "parallelism.context_parallel_degree = 0 must be at least 1",
        ),
        line(
            "--training.global_batch_size 100",
            "training.global_batch_size = 100 is not a multiple of training.local_batch_size = 8 times 1 rank",
        ),
        line(
            "--parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_schedule 1F2B",
            "parallelism.pipeline_parallel_schedule = '1F2B' is not available; use one of GPipe, 1F1B, Interleaved1F1B, InterleavedZeroBubble, ZBVZeroBubble",
            ranks=2,
        ),
        line(
            "--parallelism.pipeline_parallel_degree 8",
            "parallelism.pipeline_parallel_degree = 8 with parallelism.pipeline_parallel_schedule = '1F1B' makes 8 stages, more than the 6 blocks of the model; choose a smaller degree",
            ranks=8,
        ),
        line(
            "--parallelism.expert_parallel_degree 2",
            "parallelism.expert_parallel_degree = 2: FLUX has no experts; set it to 1",
        ),
    ],
    "The machine and what does not go together": [
        line(
            "--training.mixed_precision_param bfloat16",
            'training.mixed_precision_param = "bfloat16" needs a GPU of compute capability 8.0 or later, and Tesla T4 has 7.5; compute in float32: --training.mixed_precision_param float32',
            needs=("card 7.5",),
        ),
        line(
            "--model.converters quantize.linear.float8",
            "model.converters = ['quantize.linear.float8'] needs a GPU of compute capability 8.9 or later, and this machine has no GPU; remove it, or set quantize.linear.float8.emulate = true (slow, for trying out)",
        ),
        line(
            "--model.converters float8",
            "model.converters = ['float8']: float8 is unknown; FLUX has 'quantize.linear.float8' and 'quantize.linear.mx'",
        ),
        line(
            "--training.enable_cpu_offload",
            "training.enable_cpu_offload = true needs a GPU; set it to false",
        ),
        line(
            "--training.dtype bfloat16 --optimizer.name Adam",
            "training.dtype = 'bfloat16': weights are kept in float32, or in bfloat16 with optimizer.name = AdamW or AdamW8bit, which then round stochastically; the compute type is training.mixed_precision_param",
        ),
        line(
            "--ema.decay 1,0.9",
            "ema.decay = [1.0, 0.9]: each has to be in [0, 1)",
        ),
        line(
            "--ema.use_for ema",
            'ema.use_for = "ema" needs ema.decay, the decay of an average',
        ),
        line(
            "--training.train_only lora",
            "training.train_only = ['lora'] names no parameter; they are called as img_in.weight, img_in.bias, txt_in.weight …",
        ),
        line(
            "--optimizer.name SGD",
            "optimizer.name = 'SGD' is not available; use one of AdamW, Adam, AdamW8bit, Adafactor",
        ),
        line(
            "--activation_checkpoint.mode memory_budget",
            'activation_checkpoint.mode = "memory_budget" is a choice of the compiler: set compile.enable = true with "model" in compile.components, or use another mode',
        ),
        line(
            "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option two",
            "activation_checkpoint.selective_ac_option = 'two': use \"op\", or a number N >= 1 in quotes to recompute every N-th block",
        ),
        line(
            "--compile.enable --compile.components model,optimizer",
            "compile.components names optimizer; known: model, loss",
        ),
        line(
            "--comm.mode fake_backend",
            "comm.mode = 'fake_backend' trains nothing; set it to \"default\" (scripts/plan.py tries meshes without ranks)",
        ),
        line(
            "--fault_tolerance.enable",
            "fault_tolerance.enable = true is not supported; set it to false",
        ),
        line(
            "--memory_estimation.enable",
            "memory_estimation.enable = true is not available; set it to false and use scripts/plan.py",
        ),
        line(
            "--checkpoint.create_seed_checkpoint",
            "checkpoint.create_seed_checkpoint = true needs checkpoint.enable = true",
        ),
        line(
            "--checkpoint.enable --checkpoint.create_seed_checkpoint --checkpoint.load_only",
            "checkpoint.create_seed_checkpoint = true saves, checkpoint.load_only = true does not",
        ),
        line(
            "--checkpoint.enable --checkpoint.load_step 100",
            "checkpoint.load_step = 100: outputs/checkpoint/step-100 does not exist; there is none",
        ),
        line(
            "--comm.save_traces_file_prefix ranks/rank_",
            "comm.save_traces_file_prefix = 'ranks/rank_': it begins a file's name, so no /",
        ),
        line(
            "--checkpoint.load_step 100",
            "checkpoint.load_step = 100 is set, and nothing is loaded: set checkpoint.enable = true, or remove the key",
        ),
        line(
            "--checkpoint.enable --checkpoint.exclude_from_loading model,scheduler",
            "checkpoint.exclude_from_loading names 'scheduler', which no checkpoint has; its parts are model, optimizer, lr_scheduler, dataloader, train_state",
        ),
        line(
            "--checkpoint.enable --checkpoint.exclude_from_loading train_state",
            "checkpoint.exclude_from_loading names 'train_state': the steps would be counted from 0 beside checkpoints of later ones, from which the next start would go on; to begin anew from these weights, set another job.dump_folder and checkpoint.initial_load_path",
        ),
        line(
            "--checkpoint.enable --checkpoint.exclude_from_loading model --checkpoint.initial_load_path folder",
            "checkpoint.initial_load_path = 'folder': folder holds no FLUX weights: expected is …",
            "checkpoint.exclude_from_loading names 'model', and checkpoint.initial_load_path has nothing else to give while checkpoint.initial_load_model_only = true; remove one of them",
            needs=("folder",),
        ),
        line(
            "--checkpoint.enable --checkpoint.initial_load_path folder --checkpoint.no-initial_load_model_only",
            "checkpoint.initial_load_path = 'folder' cannot be gone on with: it has no manifest.json, so it was not saved completely; set checkpoint.initial_load_model_only = true where only its weights are wanted",
            needs=("folder",),
        ),
        line(
            "--checkpoint.exclude_from_loading optimizer",
            "checkpoint.exclude_from_loading is set, and nothing is loaded or saved: set checkpoint.enable = true (with checkpoint.load_only = true to save nothing), or remove the key",
        ),
        line("--training.gc_debug", "training.gc_debug = true needs a GPU; set it to false"),
        line(
            "--profiling.enable_memory_snapshot",
            "profiling.enable_memory_snapshot = true needs a GPU; set it to false",
        ),
        line(
            "--metrics.enable_wandb",
            "metrics.enable_wandb = true, and wandb is not installed: pip install wandb, or set it to false",
            needs=("no wandb",),
        ),
        line(
            "--experimental.custom_import nowhere",
            "experimental.custom_import = 'nowhere' is no module that can be imported",
        ),
        line(
            "--compile.enable --compile.backend inductr",
            "compile.backend = 'inductr' is not available; torch has …",
        ),
    ],
}
"""Part of the document -> its rows. A message that ends in " …" goes on."""


def document() -> str:
    """docs/errors.md."""
    lines = [
        "# Errors",
        "",
        "A configuration that cannot run is refused before anything is built: one report of all",
        "that is wrong, on stderr, exit status 2. `./run_train.sh --check` only looks. Below is what",
        "is said of one mistake at a time; `run.toml` is the file that CONFIG_FILE names, the number",
        "is the line. Written by `python tests/unit/config/refusals.py` from the table of the tests.",
    ]
    for title, rows in TABLE.items():
        lines += ["", f"## {title}", "", "| given | said |", "|---|---|"]
        lines += [f"| {_cell(row.given)} | {_cell(chr(10).join(row.message))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    quoted = (f"`` {part} ``" if "`" in part else f"`{part}`" for part in text.splitlines())
    return "<br>".join(quoted).replace("|", "\\|")


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
    print(DOCUMENT)
