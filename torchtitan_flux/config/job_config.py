"""The configuration: torchtitan's sections, derived where FLUX adds keys or has other defaults.

torchtitan reads the types of these fields at run time: no `from __future__ import annotations` in
this file.
"""

# pyright: reportIncompatibleVariableOverride=false
# (sections are of a class derived from torchtitan's; nobody puts one of the base class there)

from dataclasses import dataclass, field
from typing import Literal

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan.config import job_config as torchtitan_config

from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model.args import EMBEDDERS

KEPT = (*EMBEDDERS, "img_mod", "txt_mod", "modulation", "final_layer")
"""Layers that are not computed in 8 bits unless the configuration says so."""


@dataclass
class Job(torchtitan_config.Job):
    description: str = "FLUX pretraining"
    """Description of the job"""
    save_config_file: str | None = "config.toml"
    """File below job.dump_folder for the configuration as resolved, which repeats the run"""


@dataclass
class Model(torchtitan_config.Model):
    name: str = "flux"
    """Which model to train: FLUX"""
    flavor: str = "flux-digits"
    """flux-dev, flux-schnell, flux-debug, flux-mnist, flux-digits or flux-tiny"""


@dataclass
class DataLoader(torchtitan_config.DataLoader):
    pin_memory: bool = True
    """Hand out batches in pinned memory where there is a GPU: it copies them while it computes"""


@dataclass
class Training(torchtitan_config.Training):
    dataset: str = "digits"
    """Where images and captions come from: digits, shapes, mnist, folder, webdataset, parquet,
    cc12m-wds, cc12m-test, coco-validation; training.dataset_path says where the files are"""
    img_size: int = 256
    """Image height and width in pixels"""
    img_height: int = 0
    """Image height in pixels where images are not square; 0 takes img_size"""
    img_width: int = 0
    """Image width in pixels where images are not square; 0 takes img_size"""
    classifier_free_guidance_prob: float = 0.0
    """Probability of replacing a caption by the empty one"""
    caption_dropout: Literal["independent", "joint"] = "independent"
    """Whether each text encoding is dropped on its own, or both together"""
    flip_prob: float = 0.0
    """Probability of a horizontal flip"""
    nonfinite: Literal["skip", "stop"] = "skip"
    """When the loss or a gradient is not finite: skip that step, or stop the run"""
    max_nonfinite_steps: int = 10
    """The run stops when so many steps in a row had to be skipped"""
    train_only: list[str] = field(default_factory=list)
    """Parameters whose name contains one of these are trained, the others stay as they were
    begun with; empty trains all"""
    dataloader: DataLoader = field(default_factory=DataLoader)
    test_mode: bool = False
    """torchtitan's test mode: here the tiny encoders of assets/tiny, loaded as any others"""

    @property
    def image_size(self) -> ImageSize:
        """Size of training images in pixels."""
        return ImageSize(self.img_height or self.img_size, self.img_width or self.img_size)


@dataclass
class Data:
    index_folder: str = ""
    """Where indexes of data sets are kept; empty: beside the data, or the user's cache folder"""
    image_column: str = ""
    """Column of tables that holds images, or suffix of the pictures in tar shards; empty finds
    it"""
    caption_column: str = ""
    """Column of tables, or key of json captions; empty finds it."""
    captions: Literal["whole", "lines"] = "whole"
    """Whether a text is one caption, or every line of it that is not blank is one of several"""
    default_caption: str | None = None
    """Caption of items that have none; "" trains without captions. Unset: they are left out"""
    caption_prefix: str = ""
    """Text before every caption"""
    color_profiles: Literal["ignore", "srgb"] = "ignore"
    """srgb converts images with an embedded ICC profile to sRGB"""
    background: list[int] = field(default_factory=lambda: [255, 255, 255])
    """Red, green and blue, 0 to 255, behind transparent parts of images"""
    held_out_share: float = 0.0
    """Share of the training data kept back for validation, where the data have no such part"""
    min_image_size: int = 8
    """Images whose shorter side has fewer pixels are replaced and listed as too small"""
    max_image_pixels: int = 2**27
    """Images of more pixels are not decoded, but replaced and listed as decompression bombs"""
    max_unreadable_share: float = 0.1
    """The run stops when more than this share of the items it asked for could not be read"""


@dataclass
class Flow:
    time_density: Literal["uniform", "logit_normal"] = "uniform"
    """Density of training times"""
    logit_mean: float = 0.0
    """Mean of the normal behind logit_normal"""
    logit_std: float = 1.0
    """Standard deviation of the normal behind logit_normal"""
    resolution_shift: bool = False
    """Shift training times by the number of image tokens, as FLUX.1-dev samples"""
    guidance: float = 1.0
    """Constant guidance input of flavors with guidance embedding, when training"""


@dataclass
class Encoder:
    t5_encoder: str = "assets/tiny/t5"
    """T5 encoder: a local folder or a hub name"""
    clip_encoder: str = "assets/tiny/clip"
    """CLIP text encoder: a local folder or a hub name"""
    autoencoder_path: str = "assets/tiny/ae.safetensors"
    """BFL autoencoder file or diffusers vae folder; unused in pixel space"""
    max_t5_encoding_len: int = 256
    """Length of the T5 encoding in tokens, padding included"""
    pixel_channels: Literal[1, 3] = 1
    """Image channels of pixel-space flavors"""


@dataclass
class Validation(torchtitan_config.Validation):
    dataset: str = ""
    """Held-out data; empty means the held-out part of training.dataset"""
    seed: int = 0
    """Noise of a validation sample is a function of this seed and the item id"""
    time_grid: Literal["midpoints", "mlperf"] = "midpoints"
    """Times (i + 1/2) / 8, or MLPerf's i / 8; losses of the two are not comparable"""
    all_timesteps: bool = False
    """All eight times for every sample, instead of one in turn"""
    enable_classifier_free_guidance: bool = False
    eval_freq: int = 100
    classifier_free_guidance_scale: float = 5.0
    denoising_steps: int = 50
    save_img_count: int = 1
    save_img_folder: str = "img"
    dataloader: DataLoader = field(default_factory=DataLoader)


@dataclass
class EMA:
    decay: list[float] = field(default_factory=list)
    """Decays of exponential moving averages of the weights, one average each; empty: none"""
    every: int = 1
    """Optimizer steps between updates of the averages"""
    start: int = 0
    """Step up to which the averages are the weights themselves"""
    use_for: Literal["model", "ema", "both"] = "both"
    """Weights that validation and grids use: the trained ones, the averages, or both"""


@dataclass
class Sampling:
    enable: bool = False
    """Draw a grid of pictures during training"""
    freq: int = 100
    """Draw every so many steps, and at the last"""
    prompts: list[str] = field(default_factory=list)
    """Prompts of the grid, one row of pictures each"""
    images_per_prompt: int = 4
    """Pictures in a row"""
    seed: int = 0
    """The same seed starts every grid from the same noise"""
    denoising_steps: int = 28
    """Euler steps"""
    classifier_free_guidance_scale: float = 1.0
    """Scale of classifier-free guidance; 1 switches it off"""
    guidance: float | None = None
    """Guidance input of flavors with guidance embedding, when sampling; unset: flow.guidance"""
    local_batch_size: int = 16
    """Pictures drawn at once by one rank"""
    schedule: str = "auto"
    """When the steps are. dev: shifted by the number of image tokens; schnell: evenly spaced; or
    settings of diffusers' scheduler, as "shift=3.0" or "use_dynamic_shifting=true,max_shift=1.3".
    auto: what the weights say that are drawn with or begun with (a pipeline's scheduler), else dev
    for flavors with guidance embedding and schnell for others"""
    folder: str = "samples"
    """Folder below job.dump_folder"""


@dataclass
class Score:
    enable: bool = False
    """At the end, draw digits and let a classifier read them (dataset digits only)"""
    count: int = 200
    """How many digits"""
    classifier_free_guidance_scale: float = 2.0
    """Scale of classifier-free guidance"""
    denoising_steps: int = 16
    """Euler steps"""


@dataclass
class Inference:
    save_img_folder: str = "inference_results"
    """Folder below job.dump_folder for pictures"""
    prompts_path: str = "assets/prompts.txt"
    """File with one prompt a line"""
    local_batch_size: int = 2
    """Pictures drawn at once by one rank"""
    img_size: int = 0
    """Picture height and width in pixels; 0 takes the size of training"""


@dataclass
class Checkpoint(torchtitan_config.Checkpoint):
    on_save_error: Literal["continue", "stop"] = "continue"
    """When a checkpoint of the interval cannot be written: report it and train on, or stop"""
    start_over_when_damaged: bool = False
    """Begin again at step 0 when every checkpoint of the run is damaged, and set those aside"""
    guidance_weights: Literal["match", "drop", "initialize"] = "match"
    """When the weights to begin from and model.flavor differ in having a guidance embedding: match
    refuses; drop leaves those of the file out; initialize gives the model fresh ones"""
    unknown_weights: Literal["refuse", "drop"] = "refuse"
    """When the weights to begin from hold tensors that no FLUX.1 transformer has: refuse names
    them; drop leaves them out"""


@dataclass
class ActivationCheckpoint(torchtitan_config.ActivationCheckpoint):
    mode: Literal["selective", "full", "memory_budget", "none"] = "none"
    """none keeps all activations; full recomputes every block; selective by selective_ac_option:
    "N" every N-th block, "op" all but matrix products, attention and what came from other ranks;
    memory_budget lets the compiler choose"""
    determinism_check: Literal["default", "none"] = "default"
    """Whether what is recomputed is compared by shape and type with the first time"""
    offload_inputs: bool = False
    """Keep the inputs of recomputed blocks in the CPU's memory (mode full, or selective "N")"""


@dataclass
class Float8Linear(torchtitan_config.Float8Linear):
    filter_fqns: list[str] = field(default_factory=lambda: list(KEPT))
    """Linears whose name contains one of these are not computed in float8"""


@dataclass
class MXLinear(torchtitan_config.MXLinear):
    filter_fqns: list[str] = field(default_factory=lambda: list(KEPT))
    """Linears whose name contains one of these are not computed in MXFP8"""
    recipe_name: Literal["mxfp8_cublas", "mxfp8_cublas_rceil"] = "mxfp8_cublas"
    """How scales are rounded"""
    mxfp8_dim1_cast_kernel_choice: Literal["triton", "torch"] = "triton"
    """Kernel of the cast along columns"""


@dataclass
class QuantizedLinear(torchtitan_config.QuantizedLinear):
    float8: Float8Linear = field(default_factory=Float8Linear)
    mx: MXLinear = field(default_factory=MXLinear)


@dataclass
class Quantize(torchtitan_config.Quantize):
    linear: QuantizedLinear = field(default_factory=QuantizedLinear)


@dataclass
class Experimental(torchtitan_config.Experimental):
    custom_import: str = "torchtitan_flux.training.train_spec"
    """Registers FLUX with torchtitan"""


@dataclass
class FluxJobConfig(torchtitan_config.JobConfig):
    """The complete configuration of a run."""

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    data: Data = field(default_factory=Data)
    flow: Flow = field(default_factory=Flow)
    encoder: Encoder = field(default_factory=Encoder)
    validation: Validation = field(default_factory=Validation)
    ema: EMA = field(default_factory=EMA)
    sampling: Sampling = field(default_factory=Sampling)
    score: Score = field(default_factory=Score)
    inference: Inference = field(default_factory=Inference)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    quantize: Quantize = field(default_factory=Quantize)
    experimental: Experimental = field(default_factory=Experimental)

    def maybe_log(self) -> None:
        """torchtitan's trainer asks; ours writes the configuration as resolved (dump_config)."""

    def compiles(self, component: Literal["model", "loss"]) -> bool:
        """Whether torch.compile is asked for."""
        return self.compile.enable and component in self.compile.components


JobConfig = FluxJobConfig
"""The name that torchtitan looks for in `job.custom_config_module`."""
