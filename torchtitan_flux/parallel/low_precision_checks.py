"""Which layers are computed in 8 bits, and what low precision asks of the machine.

Two of torchtitan's model converters are for FLUX: "quantize.linear.float8" and
"quantize.linear.mx", both on torchao. What they convert are the linears that see every token of
the sequence: qkv_by_head, proj and the MLP of double blocks, linear1_by_head and linear2_by_head
of single blocks. In FLUX.1 these are 97 % of all FLOPs at 256 pixels, 93 % at 512 and 80 % at 1024;
attention itself, which no converter touches, is nearly all of the rest.

What stays as it is (`KEPT`), with its share of FLOPs at 256 pixels and 256 text tokens:

    modulation         0.1 %     one vector an image: its product is bound by reading the weights,
                                 its gradient sums over a batch of which 16 would have to divide
                                 the size, and its error shifts and scales every token alike
    embedders          0.1 %     they take float32 inputs into the compute type (CastingLinear),
                                 which torchao's linears do not
    final layer        0.002 %   its output is the velocity itself
"""

from collections.abc import Iterator
from importlib.util import find_spec

import torch

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import Problem, violated
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.parallel.card import card

FLOAT8 = "quantize.linear.float8"
MX = "quantize.linear.mx"

MX_RECIPES = ("mxfp8_cublas", "mxfp8_cublas_rceil")


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
    mx = config.quantize.linear.mx
    yield from violated(
        (
            not _device_has((10, 0), rocm=(9, 5)),
            "model.converters",
            f"needs a Blackwell GPU (compute capability 10.0 or later), and {_device()}; remove "
            f"it, or use {FLOAT8!r} from compute capability 8.9 on",
        ),
        (
            mx.recipe_name not in MX_RECIPES,
            f"{MX}.recipe_name",
            f"is not one of {', '.join(MX_RECIPES)}",
        ),
        (
            mx.mxfp8_dim1_cast_kernel_choice == "cuda",
            f"{MX}.mxfp8_dim1_cast_kernel_choice",
            'is a library of torchao 0.16 for torch 2.10 alone; set "triton"',
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
    """Widths and numbers of tokens that 8-bit products cannot take.

    Args:
        config: one that `low_precision_problems` has nothing against.
        args: the model as resolved.
        size: image size in pixels.
    """
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
