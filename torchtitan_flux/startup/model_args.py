"""From the configuration to plain values: model arguments, sizes, settings."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import ConfigError, Problem, problem_of
from torchtitan_flux.encoders.autoencoder import autoencoder_geometry
from torchtitan_flux.encoders.pretrained import text_widths
from torchtitan_flux.flow_matching import TimeDensity
from torchtitan_flux.model import FIXED_WIDTH_FLAVORS, FLAVORS, FluxModelArgs
from torchtitan_flux.paths import locate, resolved_path
from torchtitan_flux.sampling.generate import SampleSettings
from torchtitan_flux.sampling.schedules import Schedule
from torchtitan_flux.weights.pruned import with_blocks_of, with_blocks_of_run
from torchtitan_flux.weights.scheduler import StatedScheduler, of_run, stated_scheduler

# a start asks six times, and names on the hub are asked for over the network
_text_widths, _autoencoder_geometry = lru_cache(text_widths), lru_cache(autoencoder_geometry)

AUTO = "auto"
"""The value of `sampling.schedule` that leaves it to the weights."""


def resolve_model_args(
    config: FluxJobConfig, weights: str | None = None, training: bool = True
) -> FluxModelArgs:
    """The flavor with the widths of the configured encoders and codec, and its weights' blocks.

    flux-dev and flux-schnell have fixed widths, which the encoders must have; other flavors
    follow the encoders.

    Args:
        config: the configuration.
        weights: file or folder to draw with, instead of the run's own checkpoint.
        training: whether the model will be trained; drawing takes the run's checkpoints also where
            `checkpoint.enable` is false.

    Raises:
        ConfigError: an encoder cannot be read or does not fit the flavor, or the weights' number
            of blocks cannot be read.
    """
    return with_configured_blocks(config, _with_widths(config), weights, training)


def with_configured_blocks(
    config: FluxJobConfig, args: FluxModelArgs, weights: str | None = None, training: bool = True
) -> FluxModelArgs:
    """`args` with as many blocks as the weights have that the model will get.

    Those of the run's own checkpoints; without any, of what `checkpoint.initial_load_path` names;
    else the flavor's. They are read from headers, and kept in every checkpoint, so that a run
    continues also when the weights that it began with are gone.
    """
    c = config.checkpoint
    with problem_of("checkpoint.initial_load_path"):
        if weights is None and (c.enable or not training):
            own = with_blocks_of_run(Path(config.job.dump_folder) / c.folder, args)
            if own is not None:
                return own
            weights = c.initial_load_path
        path = locate(weights) if weights else None
        return args if path is None else with_blocks_of(path, args)


def _with_widths(config: FluxJobConfig) -> FluxModelArgs:
    args = FLAVORS[config.model.flavor]
    t5_path, clip_path = map(
        resolved_path, (config.encoder.t5_encoder, config.encoder.clip_encoder)
    )
    with problem_of("encoder.t5_encoder", "encoder.clip_encoder"):
        t5_width, clip_width = _text_widths(t5_path, clip_path)
    if args.pixel_space:
        channels, downscale = config.encoder.pixel_channels, 1
    else:
        path = resolved_path(config.encoder.autoencoder_path)
        with problem_of("encoder.autoencoder_path"):
            channels, downscale = _autoencoder_geometry(path)
    features = channels * args.patch_size**2
    if config.model.flavor not in FIXED_WIDTH_FLAVORS:
        return replace(
            args,
            in_channels=features,
            out_channels=features,
            downscale=downscale,
            context_in_dim=t5_width,
            vec_in_dim=clip_width,
        )
    wrong = [
        Problem(
            f"encoder.{key}",
            f"width {have} does not fit model.flavor = {config.model.flavor!r}, which needs {want}",
            ("model.flavor",),
        )
        for key, have, want in (
            ("t5_encoder", t5_width, args.context_in_dim),
            ("clip_encoder", clip_width, args.vec_in_dim),
            ("autoencoder_path", features, args.in_channels),
        )
        if have != want
    ]
    if wrong:
        raise ConfigError(wrong)
    return args


def time_density(config: FluxJobConfig) -> TimeDensity:
    """Density of training times."""
    flow = config.flow
    return TimeDensity(flow.time_density, flow.logit_mean, flow.logit_std, flow.resolution_shift)


def sample_guidance(config: FluxJobConfig, args: FluxModelArgs) -> float | None:
    """Guidance input when sampling: what training used, unless the configuration says otherwise."""
    if not args.guidance_embed:
        return None
    given = config.sampling.guidance
    return config.flow.guidance if given is None else given


def configured_schedule(config: FluxJobConfig) -> Schedule | None:
    """What `sampling.schedule` names; None where it leaves it to the weights.

    Raises:
        ConfigError: it is none.
    """
    given = config.sampling.schedule
    with problem_of("sampling.schedule"):
        return None if given == AUTO else Schedule.parse(given)


def own_scheduler(config: FluxJobConfig) -> StatedScheduler | None:
    """What a run's checkpoints say of the schedule, before, what the weights that it begins with.

    Raises:
        UnreadableWeights: what says it is damaged.
    """
    c = config.checkpoint
    if stated := of_run(Path(config.job.dump_folder) / c.folder):
        return stated
    path = locate(c.initial_load_path) if c.enable and c.initial_load_path else None
    return None if path is None else stated_scheduler(path)


def sampling_schedule(
    config: FluxJobConfig, args: FluxModelArgs, weights: Path | None = None
) -> Schedule:
    """When pictures take their steps: as configured, else as the weights say, else as the flavor.

    `weights` are those that are drawn with, None for the run's own.

    Raises:
        ValueError: `sampling.schedule` is none, or the weights' is not computed here.
    """
    if schedule := configured_schedule(config):
        return schedule
    stated = own_scheduler(config) if weights is None else stated_scheduler(weights)
    return Schedule.of_flavor(args.guidance_embed) if stated is None else stated.schedule()


def sample_settings(
    config: FluxJobConfig, args: FluxModelArgs, weights: Path | None = None
) -> SampleSettings:
    """How pictures are drawn during training, or with weights that are given.

    Raises:
        ValueError: see `sampling_schedule`.
    """
    s = config.sampling
    return SampleSettings(
        size=config.training.image_size,
        steps=s.denoising_steps,
        cfg=s.classifier_free_guidance_scale,
        guidance=sample_guidance(config, args),
        schedule=sampling_schedule(config, args, weights),
        seed=s.seed,
    )
