"""Which layers are computed in 8 bits, and what low precision asks of the machine.

Converted (by "quantize.linear.float8" or "quantize.linear.mx", both on torchao) are the linears
that see every token: 97 % of FLUX.1's FLOPs at 256 pixels, 93 % at 512 and 80 % at 1024. `KEPT` are
modulation (one vector an image; its error shifts every token alike), embedders (torchao's do not
cast float32 inputs) and the final layer (its output is the velocity): 0.2 % at 256 pixels.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import Problem, violated
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model import FluxModelArgs

_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""
FLOAT8 = "quantize.linear.float8"
MX = "quantize.linear.mx"


@dataclass(frozen=True)
class Card:
    """A GPU: its name and compute capability (on ROCm: gfx version)."""

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.name} has {major}.{minor}"


def card() -> Card | None:
    """This process's first GPU; None on a machine without one.

    The driver is asked where it can be: torch would make a context, which holds some hundred
    megabytes of the card for as long as the launcher lives.
    """
    if not torch.cuda.is_available():
        return None
    return _from_driver() or Card(torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def _from_driver() -> Card | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # ROCm, or another system
        return None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    return None if failed else Card(name.value.decode(), (major.value, minor.value))


def low_precision_problems(config: FluxJobConfig) -> Iterator[Problem]:
    """What is wrong with `model.converters` and the keys that belong to them."""
    chosen, key = config.model.converters, "model.converters"
    if unknown := [name for name in chosen if name not in (FLOAT8, MX)]:
        yield Problem(key, f"{', '.join(unknown)} is unknown; FLUX has {FLOAT8!r} and {MX!r}")
    elif len(chosen) > 1:
        yield Problem(key, "choose one of them, once")
    elif chosen:
        missing = find_spec("torchao") is None
        yield from violated((missing, key, 'needs torchao: pip install "torchtitan-flux[float8]"'))
        yield from _float8(config) if FLOAT8 in chosen else _mx(config)


def _float8(config: FluxJobConfig) -> Iterator[Problem]:
    f = config.quantize.linear.float8
    yield from violated(
        (
            not f.emulate and not _device_has((8, 9)),
            "model.converters",
            f"needs a GPU of compute capability 8.9 or later, and {_device()}; remove it, or set "
            f"{FLOAT8}.emulate = true (slow, for trying out)",
            f"{FLOAT8}.emulate",
        ),
        (
            f.emulate and config.compiles("model"),
            f"{FLOAT8}.emulate",
            "cannot be compiled; set compile.enable = false, or emulate = false on a GPU that has "
            "float8",
            "compile.enable",
        ),
        (
            f.enable_fsdp_float8_all_gather and f.recipe_name is not None,
            f"{FLOAT8}.enable_fsdp_float8_all_gather",
            f"needs one scale a tensor, and recipe_name = {f.recipe_name!r} was set; remove "
            "recipe_name (one scale a tensor is the default), or set it to false",
            f"{FLOAT8}.recipe_name",
        ),
        (
            f.precompute_float8_dynamic_scale_for_fsdp and not f.enable_fsdp_float8_all_gather,
            f"{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp",
            "does nothing without enable_fsdp_float8_all_gather = true",
            f"{FLOAT8}.enable_fsdp_float8_all_gather",
        ),
    )


def _mx(config: FluxJobConfig) -> Iterator[Problem]:
    yield from violated(
        (
            not _device_has((10, 0), rocm=(9, 5)),
            "model.converters",
            f"needs a Blackwell GPU (compute capability 10.0 or later), and {_device()}; remove "
            f"it, or use {FLOAT8!r} from compute capability 8.9 on",
        ),
        (
            config.compiles("model") and config.parallelism.tensor_parallel_degree > 1,
            "model.converters",
            f"{MX} cannot be compiled with tensor parallelism; set compile.enable = false or "
            "parallelism.tensor_parallel_degree = 1",
            "compile.enable",
            "parallelism.tensor_parallel_degree",
        ),
    )


def low_precision_fit(
    config: FluxJobConfig, args: FluxModelArgs, size: ImageSize
) -> Iterator[Problem]:
    """Widths and numbers of tokens that 8-bit products cannot take, for images of `size`."""
    if not config.model.converters:
        return
    p, f = config.parallelism, config.quantize.linear.float8
    mx, key = MX in config.model.converters, "model.converters"
    multiple = 32 if mx else 16
    tp, cp = max(1, p.tensor_parallel_degree), max(1, p.context_parallel_degree)
    for name, width in (("hidden", args.hidden_size), ("MLP", args.mlp_hidden)):
        # every side of a converted weight is a sum of multiples of these two
        if width % (multiple * tp):
            yield Problem(
                key,
                f"the {name} width {width} of model.flavor = {config.model.flavor!r} over "
                f"parallelism.tensor_parallel_degree = {tp} is not a multiple of {multiple}; "
                "choose another degree, or remove the converter",
                ("parallelism.tensor_parallel_degree",),
            )
    key_of_samples, samples = "training.local_batch_size", config.training.local_batch_size
    if p.pipeline_parallel_degree > 1:
        key_of_samples = "parallelism.pipeline_parallel_microbatch_size"
        samples = p.pipeline_parallel_microbatch_size
    # the gradient of a weight is a product over the tokens of a microbatch
    if mx or not (f.emulate or f.recipe_name == "rowwise_with_gw_hp"):
        for key_of_tokens, tokens in (
            ("training.img_size", args.geometry.grid(size).tokens),
            ("encoder.max_t5_encoding_len", config.encoder.max_t5_encoding_len),
        ):
            if samples * tokens % (multiple * cp):
                yield Problem(
                    key,
                    f"{key_of_samples} = {samples} times {tokens} tokens ({key_of_tokens}) over "
                    f"parallelism.context_parallel_degree = {cp} is not a multiple of {multiple}; "
                    "change one of them",
                    (key_of_samples, key_of_tokens, "parallelism.context_parallel_degree"),
                )


def _device_has(cuda: tuple[int, int], rocm: tuple[int, int] | None = None) -> bool:
    """Whether this process's GPU has a compute capability (on ROCm: a gfx version) or a later."""
    wanted = rocm if rocm is not None and torch.version.hip is not None else cuda
    here = card()
    return here is not None and here.capability >= wanted


def _device() -> str:
    """What there is instead, as part of a sentence."""
    return str(card() or "this machine has no GPU")
