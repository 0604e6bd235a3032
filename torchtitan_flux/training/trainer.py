"""FluxTrainer: torchtitan's Trainer with FLUX's batch, loss, validation and pictures.

    torchrun --nproc_per_node 1 -m torchtitan_flux.training.trainer \
        --job.config_file train_configs/flux_digits.toml
"""

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torchtitan_flux.engine

import torch
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import init_logger
from torchtitan.train import Trainer

import torchtitan_flux.training.train_spec  # noqa: F401  (registers "flux")
from torchtitan_flux.config.manager import exit_on_config_error, load_config_or_exit
from torchtitan_flux.config.resolve import resolve_model_args, sample_settings
from torchtitan_flux.data.loader import Batch
from torchtitan_flux.evaluation.digits import score_line, score_prompts, score_settings
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.training.conditioning import build_frozen_parts
from torchtitan_flux.training.console import quieten_libraries
from torchtitan_flux.training.data import build_validation_loader
from torchtitan_flux.training.losses import EncodedBatch, encode_batch, sample_losses
from torchtitan_flux.training.metrics import FluxMetrics
from torchtitan_flux.training.pictures import Painter, save_grid
from torchtitan_flux.training.process import start_process_group
from torchtitan_flux.training.settle import settle
from torchtitan_flux.training.validator import FluxValidator


class FluxTrainer(Trainer):
    """Pretrains FLUX with a flow-matching loss on frozen encoders.

    Args:
        job_config: from `load_config`.

    Raises:
        ConfigError: when the newest checkpoint belongs to another run than is configured.
    """

    metrics_processor: FluxMetrics
    parallel_dims: FluxParallelDims
    model_args: FluxModelArgs  # type: ignore[assignment]

    def __init__(self, job_config: Any):
        self.results: list[str] = []
        """Lines that a finished run ends with."""
        self._grid_is_due = False
        device = start_process_group(job_config)
        job_config, self.facts = settle(job_config)
        super().__init__(job_config)
        config = self.config
        self.device = device  # torchtitan numbers even the CPU by the local rank
        self.model_args = resolve_model_args(config)
        self.parts = build_frozen_parts(
            config,
            self.model_args,
            self.tokenizer,  # type: ignore[arg-type]
            self.parallel_dims,
            self.device,
            TORCH_DTYPE_MAP[config.training.mixed_precision_param],
        )
        self.painter = Painter(
            self.model_parts[0],
            self.parts,
            self.model_args.geometry,
            self.parallel_dims,
            config.sampling.local_batch_size,
        )
        if config.validation.enable:
            self.validator = FluxValidator(  # type: ignore[assignment]
                build_validation_loader(self.parallel_dims, self.parts.tokenizer, config),
                self._encode,
                self._losses,
                config,
                self.parallel_dims.data_group,
                self.device,
                self.metrics_processor,
            )

    @property
    def config(self) -> Any:
        """torchtitan's JobConfig with FLUX's sections merged in."""
        return self.job_config

    def init_distributed(self) -> FluxParallelDims:
        """Our meshes (torchtitan calls this)."""
        return FluxParallelDims.of(self.config.parallelism, torch.distributed.get_world_size())

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
        # over all ranks, before anything is sharded; one size in a run, so no need to ask them
        images = self.facts.global_batch_size
        elements = images * microbatches[0]["noise"][0].numel()

        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(microbatches):
            self._sync_gradients(number == len(microbatches) - 1)
            encoded = self._encode(batch)
            part = self._losses(self.model_parts[0], encoded, batch["t"]).sum() / elements
            part.backward()
            loss += part.detach()

        grad_norm = dist_utils.clip_grad_norm_(
            [p for model in self.model_parts for p in model.parameters()],
            self.config.training.max_norm,
            foreach=True,
        )
        self.checkpointer.maybe_wait_for_staging()
        self.optimizers.step()
        self.lr_schedulers.step()

        self.ntokens_seen += images * self.metrics_processor.tokens_per_image
        self.metrics_processor.advance(images)
        if self.metrics_processor.should_log(self.step):
            self._log(loss, grad_norm, lr)
        self._grid_is_due = self._should_draw()

    def _encode(self, batch: Batch) -> EncodedBatch:
        return encode_batch(self.parts, self.model_args, batch)

    def _losses(self, model: nn.Module, encoded: EncodedBatch, t: Tensor) -> Tensor:
        config = self.config
        guidance = config.flow.guidance if self.model_args.guidance_embed else None
        return sample_losses(model, self.model_args, encoded, t, guidance)

    def _sync_gradients(self, last: bool) -> None:
        """Communicate gradients in the last microbatch only."""
        for model in self.model_parts:
            assert isinstance(model, FSDPModule)
            model.set_requires_gradient_sync(last)
            model.set_is_last_backward(last)
            model.set_reshard_after_backward(last)

    def _log(self, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        mesh = self.parallel_dims.get_optional_mesh("loss")
        self.metrics_processor.log(
            self.step,
            dist_utils.dist_sum(loss, mesh),
            dist_utils.dist_max(loss * self.parallel_dims.data_degree, mesh),
            grad_norm.item(),
            extra_metrics={"n_tokens_seen": self.ntokens_seen, "lr": lr},
        )

    # ---- pictures, validation, score ------------------------------------------------------

    def should_continue_training(self) -> bool:
        """torchtitan asks after a step's checkpoint and validation: then it is safe to draw."""
        if self._grid_is_due:
            self._grid_is_due = False
            with self.metrics_processor.pause():
                self._draw_grid()
        return super().should_continue_training()

    def _should_draw(self) -> bool:
        config = self.config
        s = config.sampling
        return s.enable and (self.step % s.freq == 0 or self.step == config.training.steps)

    def _draw_grid(self) -> None:
        """A row of pictures for each prompt, the same seeds every time."""
        config = self.config
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
        config = self.config
        return Path(config.job.dump_folder) / config.sampling.folder / f"step-{self.step}.png"

    def train(self) -> None:
        """Train to the last step, then score where that is configured."""
        super().train()
        config = self.config
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


@record
def main() -> None:
    """Entry point of every rank."""
    init_logger()
    quieten_libraries()
    config = load_config_or_exit(sys.argv[1:])
    with exit_on_config_error():
        trainer = FluxTrainer(config)
    try:
        trainer.train()
    finally:
        trainer.close()
    rank = torch.distributed.get_rank()
    torch.distributed.destroy_process_group()
    if rank == 0:
        print("\n".join(trainer.results), flush=True)


if __name__ == "__main__":
    main()
