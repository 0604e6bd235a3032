"""A whole sampling run equals diffusers' FluxPipeline put together from the same tiny parts."""

from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from helpers import nonzero_model, relative_l2
from PIL import Image
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from torchtitan_flux.encoders.autoencoder import Autoencoder, load_autoencoder
from torchtitan_flux.encoders.text import ClipEncoder, T5Encoder
from torchtitan_flux.encoders.tokenizer import CaptionTokenizer
from torchtitan_flux.latents import ImageSize, pack
from torchtitan_flux.model import FLAVORS, FluxModel, FluxModelArgs
from torchtitan_flux.model.inputs import TextConditioning
from torchtitan_flux.sampling.generate import (
    SampleSettings,
    denoise,
    displayable,
    generate,
    image_grid,
    initial_noise,
    to_pil,
)
from torchtitan_flux.sampling.schedules import DEV, SCHNELL, Schedule
from torchtitan_flux.weights.key_maps import to_layout

TINY = Path(str(resources.files("torchtitan_flux"))) / "assets" / "tiny"
PLAIN = FLAVORS["flux-tiny"]
GUIDED = replace(PLAIN, guidance_embed=True)
SIZE = ImageSize(height=48, width=112)
T5_TOKENS = 24
PROMPTS = ["a red circle above a blue square", "a handwritten seven"]
STEPS = 5


@pytest.fixture(scope="module")
def encode_text():
    """Our encoders from assets/tiny."""
    tokenizer = CaptionTokenizer(TINY / "t5", TINY / "clip", T5_TOKENS)
    t5, clip = T5Encoder(TINY / "t5"), ClipEncoder(TINY / "clip")

    def encode(captions) -> TextConditioning:
        t5_tokens, clip_tokens = zip(*map(tokenizer, captions), strict=True)
        return TextConditioning(t5(torch.stack(t5_tokens)), clip(torch.stack(clip_tokens)))

    return encode


@pytest.fixture(scope="module")
def codec() -> Autoencoder:
    return load_autoencoder(TINY / "vae")


def model_and_pipeline(args: FluxModelArgs, schedule: Schedule) -> tuple[FluxModel, FluxPipeline]:
    ours = nonzero_model(args, seed=3)
    theirs = FluxTransformer2DModel(
        in_channels=args.in_channels,
        num_layers=args.depth,
        num_single_layers=args.depth_single_blocks,
        attention_head_dim=args.head_dim,
        num_attention_heads=args.num_heads,
        joint_attention_dim=args.context_in_dim,
        pooled_projection_dim=args.vec_in_dim,
        guidance_embeds=args.guidance_embed,
        axes_dims_rope=args.axes_dim,
    )
    theirs.load_state_dict(to_layout("diffusers", ours.state_dict(), args))
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(schedule.config()),
        vae=AutoencoderKL.from_pretrained(TINY / "vae", torch_dtype=torch.float32),
        text_encoder=CLIPTextModel.from_pretrained(TINY / "clip", dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(TINY / "clip"),
        text_encoder_2=T5EncoderModel.from_pretrained(TINY / "t5", dtype=torch.float32),
        tokenizer_2=AutoTokenizer.from_pretrained(TINY / "t5"),
        transformer=theirs.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return ours, pipeline


def pipeline_images(pipeline: FluxPipeline, args: FluxModelArgs, **more) -> torch.Tensor:
    """What the pipeline makes of our starting noise."""
    noise = [initial_noise(args.geometry, SIZE, seed=7, index=i) for i in range(len(PROMPTS))]
    return pipeline(
        PROMPTS,
        height=SIZE.height,
        width=SIZE.width,
        num_inference_steps=STEPS,
        latents=pack(torch.stack(noise), args.patch_size),
        max_sequence_length=T5_TOKENS,
        **more,
    ).images


@pytest.mark.parametrize(
    ("args", "schedule", "guidance"),
    [
        (GUIDED, DEV, 3.5),
        (GUIDED, DEV, 1.0),
        (PLAIN, SCHNELL, None),
        (PLAIN, Schedule(shift=3.0), None),
        (GUIDED, Schedule(use_dynamic_shifting=True, base_shift=0.9, max_shift=2.5), 3.5),
    ],
    ids=["dev", "dev, guidance 1", "schnell", "shift 3", "other line"],
)
def test_latents_equal_those_of_the_pipeline(args, schedule, guidance, encode_text):
    model, pipeline = model_and_pipeline(args, schedule)
    more = {"guidance_scale": guidance or 0.0, "output_type": "latent"}
    expected = pipeline_images(pipeline, args, **more)
    settings = SampleSettings(SIZE, STEPS, guidance=guidance, schedule=schedule, seed=7)
    noise = torch.stack([initial_noise(args.geometry, SIZE, 7, i) for i in range(len(PROMPTS))])
    latents = denoise(model, args.geometry, noise, encode_text(PROMPTS), None, settings)
    assert relative_l2(latents, noise) > 0.1, "the model does not move the noise"
    assert relative_l2(latents[:1], latents[1:]) > 0.1
    assert relative_l2(pack(latents, args.patch_size), expected) <= 1e-5


def test_images_equal_those_of_the_pipeline_with_a_negative_prompt(encode_text, codec):
    model, pipeline = model_and_pipeline(GUIDED, DEV)
    settings = SampleSettings(SIZE, STEPS, cfg=2.5, guidance=3.5, schedule=DEV, seed=7)
    negative = "a green triangle"
    expected = pipeline_images(
        pipeline,
        GUIDED,
        negative_prompt=[negative] * len(PROMPTS),
        true_cfg_scale=settings.cfg,
        guidance_scale=settings.guidance,
        output_type="pt",
    )
    found = generate(
        model,
        codec,
        encode_text,
        GUIDED.geometry,
        PROMPTS,
        range(len(PROMPTS)),
        settings,
        negative_prompt=negative,
    )
    assert found.shape == (len(PROMPTS), 3, SIZE.height, SIZE.width)
    assert relative_l2((found + 1) / 2, expected) <= 1e-5
    assert found.std() > 0.05


def test_a_picture_does_not_depend_on_its_batch(encode_text, codec):
    """Picture i starts from noise (seed, i), wherever it stands."""
    model, settings = nonzero_model(PLAIN), SampleSettings(SIZE, 2, cfg=2.0, seed=9)

    def draw(prompts, indices):
        return generate(model, codec, encode_text, PLAIN.geometry, prompts, indices, settings)

    together = draw(PROMPTS, [4, 11])
    assert relative_l2(draw(PROMPTS[1:], [11]), together[1:]) <= 1e-5
    assert relative_l2(draw(PROMPTS[1:], [12]), together[1:]) > 1e-2


def test_starting_noise_is_normal_and_addressed():
    noise = initial_noise(PLAIN.geometry, ImageSize(256, 384), seed=0, index=3)
    assert noise.shape == (16, 32, 48)
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert torch.equal(noise, initial_noise(PLAIN.geometry, ImageSize(256, 384), 0, 3))
    for seed, index in ((1, 3), (0, 4)):
        other = initial_noise(PLAIN.geometry, ImageSize(256, 384), seed, index)
        assert (other != noise).float().mean() > 0.99


def test_pictures_of_one_and_three_channels():
    ramp = torch.linspace(-1, 1, 6).reshape(1, 2, 3)
    grey = to_pil(ramp)
    assert grey.mode == "L"
    assert np.asarray(grey).tolist() == [[0, 51, 102], [153, 204, 255]]
    colour = to_pil(torch.cat([ramp, -ramp, torch.full_like(ramp, 3.0)]))
    assert (colour.mode, colour.size) == ("RGB", (3, 2))
    assert np.asarray(colour)[0].tolist() == [[0, 255, 255], [51, 204, 255], [102, 153, 255]]


def test_a_picture_that_is_not_finite_is_nan_all_over_and_the_others_are_clamped():
    images = torch.tensor([[0.5, -3.0], [torch.inf, 0.0], [0.0, torch.nan]]).view(3, 1, 1, 2)
    found = displayable(images)
    assert found[0].flatten().tolist() == [0.5, -1.0]
    assert found[1:].isnan().all()


def test_grid_places_pictures_row_by_row():
    images = [Image.new("L", (24, 16), 10 * i) for i in range(5)]
    sheet = image_grid(images, columns=3)  # enlarged 3 x: 72 x 48 each, 2 between
    assert sheet.size == (3 * 72 + 2 * 2, 2 * 48 + 2)
    centres = [sheet.getpixel((36 + 74 * (i % 3), 24 + 50 * (i // 3))) for i in range(5)]
    assert centres == [0, 10, 20, 30, 40]
    assert sheet.getpixel((72, 24)) == 255
