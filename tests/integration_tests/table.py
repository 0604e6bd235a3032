"""The runs. Each trains flux-tiny for STEPS steps of GLOBAL_BATCH images, whatever the mesh.

The same seed and the same global batch are the same trajectory on every mesh, so the losses of
every row are held against those of the first: to rounding, or to the row's tolerance where the
arithmetic itself is another one.
"""

from . import OverrideDefinitions, Start

STEPS = 6
HALF = STEPS // 2
GLOBAL_BATCH = 8
REFERENCE = "one_rank"

BASE = (
    "--job.config_file", "train_configs/debug_model.toml",
    "--model.flavor", "flux-tiny",
    "--training.img_size", "64",
    "--encoder.max_t5_encoding_len", "32",
    "--training.global_batch_size", str(GLOBAL_BATCH),
    "--training.local_batch_size", str(GLOBAL_BATCH),
    "--training.steps", str(STEPS),
    "--training.mixed_precision_param", "float32",
    "--training.flip_prob", "0.5",
    "--optimizer.lr", "8e-4",
    "--lr_scheduler.warmup_steps", "2",
    "--activation_checkpoint.mode", "none",
    "--validation.no-enable",
    "--debug.seed", "7",
    "--metrics.log_freq", "1",
    "--metrics.enable_tensorboard",
    "--metrics.save_tb_folder", "tb",
    "--checkpoint.interval", str(HALF),
    "--checkpoint.no-last_save_model_only",
)  # fmt: skip
"""What every start of a run that trains gets first."""


def mesh(
    *more: str,
    replicate: int = 1,
    shard: int = 1,
    cp: int = 1,
    tp: int = 1,
    pp: int = 1,
) -> tuple[str, ...]:
    """Overrides for a mesh; each data rank takes its share of the global batch."""
    degrees = {
        "data_parallel_replicate_degree": replicate,
        "data_parallel_shard_degree": shard,
        "context_parallel_degree": cp,
        "tensor_parallel_degree": tp,
        "pipeline_parallel_degree": pp,
    }
    words = [
        word
        for key, degree in degrees.items()
        if degree > 1 or key == "data_parallel_shard_degree"
        for word in (f"--parallelism.{key}", str(degree))
    ]
    local = GLOBAL_BATCH // (replicate * shard)
    return (*words, "--training.local_batch_size", str(local), *more)


def pipeline(schedule: str) -> tuple[str, ...]:
    """Microbatches of one image."""
    return (
        "--parallelism.pipeline_parallel_schedule", schedule,
        "--parallelism.pipeline_parallel_microbatch_size", "1",
    )  # fmt: skip


SAVE = ("--checkpoint.enable",)
VALIDATE = ("--validation.enable", "--validation.freq", str(HALF), "--validation.steps", "1",
            "--validation.local_batch_size", "2")  # fmt: skip
DRAW = Start(
    ("--prompt", "a red circle", "--prompt", "a blue square", "--steps", "2"), command="infer"
)


def build_flux_tests_list() -> list[OverrideDefinitions]:
    """All rows; the first is what the others are held against."""
    hsdp_cp = mesh(replicate=2, shard=2, cp=2)
    return [
        OverrideDefinitions((Start(),), "one rank, defaults", REFERENCE),
        OverrideDefinitions((Start(mesh(shard=2)),), "FSDP 2", "fsdp", ngpu=2),
        OverrideDefinitions((Start(mesh(replicate=2)),), "DDP 2", "ddp", ngpu=2),
        OverrideDefinitions((Start(mesh(replicate=2, shard=2)),), "HSDP 2x2", "hsdp", ngpu=4),
        OverrideDefinitions(
            (Start((*hsdp_cp, *VALIDATE, *SAVE)), DRAW),
            "HSDP 2x2, context parallel 2; validation, checkpoints, pictures",
            "hsdp_cp",
            ngpu=8,
            saved=(HALF, STEPS),
        ),
        OverrideDefinitions(
            (Start(mesh(shard=4, tp=2)),), "FSDP 4, tensor parallel 2", "fsdp_tp", ngpu=8
        ),
        OverrideDefinitions(
            (Start(mesh(*pipeline("1F1B"), shard=4, pp=2)),),
            "pipeline 2 (1F1B), FSDP 4",
            "pp_fsdp",
            ngpu=8,
        ),
        OverrideDefinitions(
            (Start(mesh(*pipeline("Interleaved1F1B"), shard=2, pp=2)),),
            "pipeline 2 (Interleaved1F1B), FSDP 2",
            "pp_interleaved",
            ngpu=4,
        ),
        OverrideDefinitions(
            (Start(mesh(*pipeline("ZBVZeroBubble"), shard=2, pp=2)),),
            "pipeline 2 (ZBVZeroBubble), FSDP 2",
            "pp_zbv",
            ngpu=4,
        ),
        OverrideDefinitions(
            (Start(mesh(shard=2, cp=2, tp=2)),),
            "FSDP 2, context parallel 2, tensor parallel 2",
            "fsdp_cp_tp",
            ngpu=8,
        ),
        OverrideDefinitions(
            (Start(("--activation_checkpoint.mode", "full")),),
            "every block recomputed",
            "ac_full",
        ),
        OverrideDefinitions(
            (Start(mesh("--activation_checkpoint.mode", "selective",
                        "--activation_checkpoint.selective_ac_option", "op", shard=2)),),
            "all but matrix products and attention recomputed, FSDP 2",
            "ac_selective_op",
            ngpu=2,
        ),
        OverrideDefinitions(
            (Start(("--activation_checkpoint.mode", "selective",
                    "--activation_checkpoint.selective_ac_option", "2")),),
            "every second block recomputed",
            "ac_selective_2",
        ),
        OverrideDefinitions(
            (Start(mesh("--compile.enable", shard=2)),),
            "compiled blocks, FSDP 2",
            "compile",
            ngpu=2,
            tolerance=1e-4,
        ),
        OverrideDefinitions(
            (Start(mesh("--model.converters", "quantize.linear.float8",
                        "--quantize.linear.float8.emulate", shard=2)),),
            "float8, emulated, FSDP 2",
            "float8_emulated",
            ngpu=2,
            tolerance=0.1,
        ),
        OverrideDefinitions(
            (Start(mesh("--training.local_batch_size", "1", shard=2)),),
            "four microbatches accumulated, FSDP 2",
            "accumulation",
            ngpu=2,
        ),
        OverrideDefinitions(
            (
                Start((*mesh(shard=2), *SAVE, "--training.steps", str(HALF))),
                Start((*mesh(replicate=2, shard=2), *SAVE), ranks=4),
            ),
            "saved on FSDP 2, continued on HSDP 2x2",
            "resize",
            ngpu=2,
            saved=(HALF, STEPS),
        ),
        OverrideDefinitions(
            (
                Start((*mesh(shard=4, tp=2), *SAVE, "--training.steps", str(HALF))),
                Start((*hsdp_cp, *SAVE)),
            ),
            "saved on FSDP 4 x tensor parallel 2, continued on HSDP 2x2 x context parallel 2",
            "resize_tp_to_cp",
            ngpu=8,
            saved=(HALF, STEPS),
        ),
        OverrideDefinitions(
            (
                Start((*mesh(shard=2), *SAVE, "--checkpoint.async_mode", "async",
                       "--training.steps", str(HALF))),
                Start((*mesh(shard=2), *SAVE, "--checkpoint.async_mode", "async")),
            ),
            "saved in the background and continued, FSDP 2",
            "async_checkpoint",
            ngpu=2,
            saved=(HALF, STEPS),
        ),
        OverrideDefinitions(
            (
                Start((*SAVE, "--checkpoint.create_seed_checkpoint"), ranks=1),
                Start((*mesh(shard=2), *SAVE)),
            ),
            "begun from a seed checkpoint of one rank, FSDP 2",
            "seed_checkpoint",
            ngpu=2,
            saved=(0, HALF, STEPS),
        ),
    ]  # fmt: skip
