"""FluxTrainer: torchtitan's Trainer with FLUX's batch, loss, validation and pictures.

    torchrun --nproc_per_node 1 -m torchtitan_flux.training.trainer \
        --job.config_file train_configs/flux_digits.toml
"""

import copy
import importlib
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torchtitan_flux.engine  # noqa: F401  (before torchtitan)

import torch
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import init_logger, logger
from torchtitan.train import Trainer

from torchtitan_flux.checkpoint.run_facts import RunFacts, newest_step, read_run_facts
from torchtitan_flux.config.manager import load_config_or_exit
from torchtitan_flux.config.resolve import resolve_model_args, sample_settings
from torchtitan_flux.evaluation.digits import score_line, score_prompts, score_settings
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.randomness import draw_seed
from torchtitan_flux.training.conditioning import build_frozen_parts
from torchtitan_flux.training.console import quieten_libraries
from torchtitan_flux.training.data import build_validation_loader, global_batch_size
from torchtitan_flux.training.losses import Batch, sample_losses
from torchtitan_flux.training.metrics import FluxMetrics
from torchtitan_flux.training.pictures import Painter, save_grid
from torchtitan_flux.training.process import start_process_group
from torchtitan_flux.training.validator import FluxValidator


class FluxTrainer(Trainer):
    """Pretrains FLUX with a flow-matching loss on frozen encoders.

    Args:
        job_config: from `load_config`.

    Raises:
        ValueError: when the newest checkpoint belongs to another run than is configured.
    """

    metrics_processor: FluxMetrics
    parallel_dims: FluxParallelDims
    model_args: FluxModelArgs  # type: ignore[assignment]

    def __init__(self, job_config: Any):
        self.results: list[str] = []
        """Lines that a finished run ends with."""
        device = start_process_group(job_config)
        job_config, self.facts = settle(job_config)
        super().__init__(job_config)
        config: Any = self.job_config
        self.device = device  # torchtitan numbers even the CPU by the local rank
        self.model_args = resolve_model_args(config)
        self.parts = build_frozen_parts(
            config,
            self.model_args,
            self.parallel_dims,
            self.device,
            TORCH_DTYPE_MAP[config.training.mixed_precision_param],
        )
        self.painter = Painter(
            self.model_parts[0], self.parts, self.model_args.geometry, self.parallel_dims
        )
        if config.validation.enable:
            self.validator = FluxValidator(  # type: ignore[assignment]
                build_validation_loader(self.parallel_dims, self.parts.tokenizer, config),
                self._losses,
                config,
                self.parallel_dims.data_group,
                self.device,
                self.metrics_processor,
            )

    def init_distributed(self) -> FluxParallelDims:
        """Our meshes (torchtitan calls this)."""
        return FluxParallelDims.of(self.job_config.parallelism, torch.distributed.get_world_size())

    # ---- one step -------------------------------------------------------------------------

    def batch_generator(self, data_iterable: Iterable[Batch]) -> Iterator[Batch]:  # type: ignore[override]
        """Batches of the loader, with the time spent waiting for them."""
        self.metrics_processor.start(self.step)  # here, before the loop counts its first step
        return self._timed(iter(data_iterable))

    def _timed(self, iterator: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            begin = time.perf_counter()
            batch = next(iterator)  # endless
            self.metrics_processor.data_loading_times.append(time.perf_counter() - begin)
            yield batch

    def train_step(self, data_iterator: Iterator[Batch]) -> None:  # type: ignore[override]
        """One optimizer step over `training.global_batch_size` positions."""
        self.optimizers.zero_grad()
        lr = float(self.lr_schedulers.schedulers[0].get_last_lr()[0])
        microbatches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        elements, images = self._global_counts(microbatches)

        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(microbatches):
            self._sync_gradients(number == len(microbatches) - 1)
            part = self._losses(self.model_parts[0], batch, batch["t"]).sum() / elements
            part.backward()
            loss += part.detach()

        grad_norm = dist_utils.clip_grad_norm_(
            [p for model in self.model_parts for p in model.parameters()],
            self.job_config.training.max_norm,
            foreach=True,
        )
        self.checkpointer.maybe_wait_for_staging()
        self.optimizers.step()
        self.lr_schedulers.step()

        self.ntokens_seen += images * self.metrics_processor.tokens_per_image
        self.metrics_processor.advance(images)
        if self.metrics_processor.should_log(self.step):
            self._log(loss, elements, microbatches, grad_norm, lr)
        if self._should_draw():
            with self.metrics_processor.pause():
                self._draw_grid()

    def _losses(self, model: nn.Module, batch: Batch, t: Tensor) -> Tensor:
        config: Any = self.job_config
        guidance = config.flow.guidance if self.model_args.guidance_embed else None
        return sample_losses(model, self.parts, self.model_args, batch, t, guidance)

    def _sync_gradients(self, last: bool) -> None:
        """Communicate gradients in the last microbatch only."""
        for model in self.model_parts:
            assert isinstance(model, FSDPModule)
            model.set_requires_gradient_sync(last)
            model.set_is_last_backward(last)
            model.set_reshard_after_backward(last)

    def _global_counts(self, microbatches: list[Batch]) -> tuple[float, int]:
        """Loss elements and images of the step over all ranks, before anything is sharded."""
        counts = torch.tensor(
            [
                sum(batch["noise"].numel() for batch in microbatches),
                sum(len(batch["noise"]) for batch in microbatches),
            ],
            dtype=torch.int64,
        )
        if (group := self.parallel_dims.data_group) is not None:
            counts = counts.to(self.device)
            torch.distributed.all_reduce(counts, group=group)
        elements, images = counts.tolist()
        return float(elements), images

    def _log(
        self, loss: Tensor, elements: float, microbatches: list[Batch], grad_norm: Tensor, lr: float
    ) -> None:
        mine = sum(batch["noise"].numel() for batch in microbatches)
        mesh = self.parallel_dims.get_optional_mesh("loss")
        self.metrics_processor.log(
            self.step,
            dist_utils.dist_sum(loss, mesh),
            dist_utils.dist_max(loss * elements / mine, mesh),
            grad_norm.item(),
            extra_metrics={"n_tokens_seen": self.ntokens_seen, "lr": lr},
        )

    # ---- pictures, validation, score ------------------------------------------------------

    def _should_draw(self) -> bool:
        config: Any = self.job_config
        s = config.sampling
        return s.enable and (self.step % s.freq == 0 or self.step == config.training.steps)

    def _draw_grid(self) -> None:
        """A row of pictures for each prompt, the same seeds every time."""
        config: Any = self.job_config
        s = config.sampling
        settings = sample_settings(config, self.model_args)
        prompts = [prompt for prompt in s.prompts for _ in range(s.images_per_prompt)]
        images = self.painter.draw(prompts, settings)
        if torch.distributed.get_rank() == 0:
            pixels = save_grid(
                images,
                self.grid_path(),
                s.images_per_prompt,
                settings,
                prompts=" | ".join(s.prompts),
                step=self.step,
                flavor=config.model.flavor,
            )
            self.metrics_processor.log_image("samples", pixels.numpy(), self.step)

    def grid_path(self) -> Path:
        """Where the grid of this step lies."""
        config: Any = self.job_config
        return Path(config.job.dump_folder) / config.sampling.folder / f"step-{self.step}.png"

    def train(self) -> None:
        """Train to the last step, then score where that is configured."""
        super().train()
        config: Any = self.job_config
        if config.score.enable:
            prompts, labels = score_prompts(config.score.count)
            images = self.painter.draw(prompts, score_settings(config, self.model_args))
            self.results.append(score_line(images, labels))
        if config.sampling.enable:
            self.results.append(f"grid: {self.grid_path()}")

    def close(self) -> None:
        """End loader workers, checkpoint threads and loggers."""
        if getattr(self, "dataloader", None) is not None:
            self.dataloader.close()  # type: ignore[union-attr]
        super().close()

    # ---- what is stored with checkpoints ----------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self.facts.as_state()}


def settle(job_config: Any) -> tuple[Any, RunFacts]:
    """The configuration with its seed settled, and what the run is tied to.

    The newest checkpoint decides: its seed is kept. Without one, an unset seed is drawn on rank 0
    and told to the others.

    Raises:
        ValueError: naming the key that differs from the run that is to be continued.
    """
    folder = Path(job_config.job.dump_folder) / job_config.checkpoint.folder
    step = newest_step(folder) if job_config.checkpoint.enable else None
    stored = None if step is None else read_run_facts(folder / f"step-{step}")
    if step is not None and stored is None:
        raise ValueError(
            f"{folder}/step-{step} holds only a model (checkpoint.last_save_model_only = true), so "
            "this run is finished; set another job.dump_folder, or start a new run from it by "
            "checkpoint.initial_load_path"
        )
    seed = job_config.debug.seed
    if stored is not None:
        if seed is not None and seed != stored.seed:
            raise ValueError(
                f"debug.seed = {seed}, but the run in {folder} was started with {stored.seed}; "
                "remove the key to continue it, or set another job.dump_folder"
            )
        seed = stored.seed
    elif seed is None:
        box = [draw_seed()]
        torch.distributed.broadcast_object_list(box, src=0)
        seed = box[0]
        logger.info(f"debug.seed was not set; this run's seed is {seed}")
    config = copy.deepcopy(job_config)
    config.debug.seed = seed

    args = resolve_model_args(config)
    facts = RunFacts(
        seed=seed,
        global_batch_size=global_batch_size(config, torch.distributed.get_world_size()),
        context_in_dim=args.context_in_dim,
        vec_in_dim=args.vec_in_dim,
        in_channels=args.in_channels,
    )
    if stored is not None:
        _check_same_run(facts, stored, folder, config)
    return config, facts


def _check_same_run(now: RunFacts, stored: RunFacts, folder: Path, config: Any) -> None:
    remedies = {
        "context_in_dim": "encoder.t5_encoder",
        "vec_in_dim": "encoder.clip_encoder",
        "in_channels": "encoder.autoencoder_path / encoder.pixel_channels",
        "randomness_version": "the version of torchtitan-flux",
    }
    if config.training.global_batch_size <= 0:
        remedies["global_batch_size"] = (
            "training.global_batch_size (set it to continue with another on purpose)"
        )
    for name, key in remedies.items():
        if getattr(now, name) != getattr(stored, name):
            raise ValueError(
                f"{name} is {getattr(now, name)}, but the run in {folder} was started with "
                f"{getattr(stored, name)}: see {key}"
            )


@record
def main() -> None:
    """Entry point of every rank."""
    init_logger()
    quieten_libraries()
    config = load_config_or_exit(sys.argv[1:])
    importlib.import_module(config.experimental.custom_import)
    trainer = FluxTrainer(config)
    try:
        if config.checkpoint.create_seed_checkpoint:
            trainer.checkpointer.save(curr_step=0, last_step=True)
            logger.info("Created seed checkpoint")
        else:
            trainer.train()
    finally:
        trainer.close()
    rank = torch.distributed.get_rank()
    torch.distributed.destroy_process_group()
    if rank == 0:
        print("\n".join(trainer.results), flush=True)


if __name__ == "__main__":
    main()
