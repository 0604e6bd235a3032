"""Write the tiny encoders that everything runs with offline.

    python scripts/make_tiny_assets.py

writes torchtitan_flux/assets/tiny/ (or the folder given as argument):

    t5/             config.json, model.safetensors, tokenizer files: T5 v1.1, width 32, 2 layers
    clip/           the same of a CLIP text model, width 32, 2 layers, 77 positions
    ae.safetensors  the autoencoder in Black Forest Labs' layout: 16 channels, downscale 8
    vae/            the same weights as a diffusers folder

The file formats are the real ones; the weights are random, fixed (every run writes the same bytes)
and scaled so that captions that differ in a word have clearly different features. They take four
values each, so that git and wheels compress the files to a fraction of their size.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_tokenizers import clip_tokenizer, t5_tokenizer

from torchtitan_flux.encoders.autoencoder import to_diffusers
from torchtitan_flux.encoders.autoencoder_layers import AutoencoderArgs, parameter_shapes
from torchtitan_flux.randomness import Stream, generator
from torchtitan_flux.weights.convert_autoencoder import vae_config

FOLDER = Path(__file__).parent.parent / "torchtitan_flux" / "assets" / "tiny"
SEED = 20240801
WIDTH, HEADS, LAYERS, MLP = 32, 4, 2, 64
AUTOENCODER = AutoencoderArgs(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
"""The least that four levels, one block each and 32 normalisation groups allow."""
LATENT_GAIN = 4.9
"""Measured: what gives the latents of photographs a standard deviation near 1."""

Weights = dict[str, torch.Tensor]


def draw(name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    """Weights of the given standard deviation, taking four values, each row of (almost) zero sum.

    A row is what the first axis counts: an output of a layer, or a word of an embedding.
    """
    rows, row = shape[0], int(np.prod(shape[1:]))
    values = np.resize(np.array([-3.0, -1.0, 1.0, 3.0]) / np.sqrt(5.0), row)
    rng = generator(SEED, Stream.WEIGHTS, name)
    drawn = rng.permuted(np.tile(values, (rows, 1)), axis=1) * std
    return torch.from_numpy(drawn).reshape(shape).to(torch.bfloat16)


def constant(shape: tuple[int, ...], value: float) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch.bfloat16)


def t5_weights(vocabulary: int) -> Weights:
    """T5 v1.1 encoder: no biases, gated GELU, RMSNorm; the last norm makes features of RMS 1.

    What attention and MLP add is kept small, so that a word's features stay its own.
    """
    weights = {
        "shared.weight": draw("t5.shared", (vocabulary, WIDTH), 1.0),
        "encoder.final_layer_norm.weight": constant((WIDTH,), 1.0),
    }
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    weights[bias] = draw("t5.bias", (32, HEADS), 0.5)
    for i in range(LAYERS):
        attention = f"encoder.block.{i}.layer.0.SelfAttention"
        mlp = f"encoder.block.{i}.layer.1.DenseReluDense"
        # T5 does not divide q·k by the root of the head width; its queries are small instead.
        for name, shape, std in (
            (f"{attention}.q.weight", (WIDTH, WIDTH), (WIDTH * WIDTH / HEADS) ** -0.5),
            (f"{attention}.k.weight", (WIDTH, WIDTH), WIDTH**-0.5),
            (f"{attention}.v.weight", (WIDTH, WIDTH), WIDTH**-0.5),
            (f"{attention}.o.weight", (WIDTH, WIDTH), 0.25 * WIDTH**-0.5),
            (f"{mlp}.wi_0.weight", (MLP, WIDTH), WIDTH**-0.5),
            (f"{mlp}.wi_1.weight", (MLP, WIDTH), WIDTH**-0.5),
            (f"{mlp}.wo.weight", (WIDTH, MLP), 0.5 * MLP**-0.5),
        ):
            weights[name] = draw(f"t5.{name}", shape, std)
        for layer in (0, 1):
            norm = f"encoder.block.{i}.layer.{layer}.layer_norm.weight"
            weights[norm] = constant((WIDTH,), 1.0)
    return weights


def t5_config(vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": MLP,
        "d_kv": WIDTH // HEADS,
        "d_model": WIDTH,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.0,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "num_decoder_layers": LAYERS,
        "num_heads": HEADS,
        "num_layers": LAYERS,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary,
    }


def clip_weights(vocabulary: int) -> Weights:
    """CLIP text model.

    The pooled vector is the state at end-of-text, which is the same token in every caption: what
    the caption says arrives there through attention only, hence its large output projections, and
    queries and keys large enough to prefer some words to others.
    """
    embeddings, final = "text_model.embeddings", "text_model.final_layer_norm"
    token, position = f"{embeddings}.token_embedding", f"{embeddings}.position_embedding"
    weights = {
        f"{token}.weight": draw("clip.token", (vocabulary, WIDTH), 1.0),
        f"{position}.weight": draw("clip.position", (77, WIDTH), 0.25),
        f"{final}.weight": constant((WIDTH,), 1.0),
        f"{final}.bias": constant((WIDTH,), 0.0),
    }
    for i in range(LAYERS):
        layer = f"text_model.encoder.layers.{i}"
        for name, shape, std in (
            ("self_attn.q_proj", (WIDTH, WIDTH), 1.5 * WIDTH**-0.5),
            ("self_attn.k_proj", (WIDTH, WIDTH), 1.5 * WIDTH**-0.5),
            ("self_attn.v_proj", (WIDTH, WIDTH), WIDTH**-0.5),
            ("self_attn.out_proj", (WIDTH, WIDTH), 4 * WIDTH**-0.5),
            ("mlp.fc1", (MLP, WIDTH), WIDTH**-0.5),
            ("mlp.fc2", (WIDTH, MLP), 0.5 * MLP**-0.5),
        ):
            weights[f"{layer}.{name}.weight"] = draw(f"clip.{i}.{name}", shape, std)
            weights[f"{layer}.{name}.bias"] = constant(shape[:1], 0.0)
        for norm in ("layer_norm1", "layer_norm2"):
            weights[f"{layer}.{norm}.weight"] = constant((WIDTH,), 1.0)
            weights[f"{layer}.{norm}.bias"] = constant((WIDTH,), 0.0)
    return weights


def clip_config(vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "hidden_act": "quick_gelu",
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "pad_token_id": vocabulary - 1,
        "projection_dim": WIDTH,
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary,
    }


def autoencoder_weights() -> Weights:
    """The autoencoder in our layout.

    The last norm of the encoder makes every channel normal within an image, so that the size of
    conv_out's weights sets the size of the latents: z has mean near shift_factor and standard
    deviation near 1 / scale_factor. The posterior is narrow: standard deviation exp(-3) of z.
    """
    weights = {}
    for name, shape in parameter_shapes(AUTOENCODER).items():
        if "norm" in name:
            weights[name] = constant(shape, 1.0 if name.endswith(".weight") else 0.0)
        elif name.endswith(".bias"):
            weights[name] = constant(shape, 0.0)
        else:
            weights[name] = draw(f"ae.{name}", shape, float(np.prod(shape[1:])) ** -0.5)
    channels, out = AUTOENCODER.z_channels, "encoder.conv_out"
    weights[f"{out}.weight"][:channels] *= LATENT_GAIN
    weights[f"{out}.weight"][channels:] *= 0.0
    weights[f"{out}.bias"][:channels] = AUTOENCODER.shift_factor
    weights[f"{out}.bias"][channels:] = -6.0
    return weights


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(path: Path, weights: Weights) -> None:
    weights = {name: value.contiguous().clone() for name, value in weights.items()}
    save_file(weights, path, metadata={"format": "pt"})


def write_tiny_assets(folder: Path) -> None:
    """Write all of it below `folder`, over what is there."""
    for name, tokenizer, config, weights in (
        ("t5", t5_tokenizer(), t5_config, t5_weights),
        ("clip", clip_tokenizer(), clip_config, clip_weights),
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file, content in tokenizer.files.items():
            (folder / name / file).write_text(content, encoding="utf-8")
        write_json(folder / name / "config.json", config(tokenizer.vocabulary))
        write_weights(folder / name / "model.safetensors", weights(tokenizer.vocabulary))

    autoencoder = autoencoder_weights()
    write_weights(folder / "ae.safetensors", autoencoder)
    (folder / "vae").mkdir(exist_ok=True)
    write_json(folder / "vae" / "config.json", vae_config(AUTOENCODER, sample_size=64))
    write_weights(
        folder / "vae" / "diffusion_pytorch_model.safetensors",
        to_diffusers(autoencoder, AUTOENCODER),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the tiny encoders.")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    write_tiny_assets(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
