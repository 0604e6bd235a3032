"""FluxTrainer: torchtitan's Trainer with FLUX's batch, loss, validation and pictures."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torchtitan_flux.torchtitan_shim

import torch
import torchtitan.train
from torch import Tensor
from torchtitan.components.checkpoint import DATALOADER
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.logging import logger
from torchtitan.train import Trainer

import torchtitan_flux.training.train_spec  # noqa: F401  (registers "flux")
from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.data.batch import TrainingBatch
from torchtitan_flux.data.loader import FluxDataLoader
from torchtitan_flux.data.sources.source import items_digest
from torchtitan_flux.flow_matching import squared_errors
from torchtitan_flux.model import FluxModel, FluxModelArgs
from torchtitan_flux.model.inputs import FluxInputs
from torchtitan_flux.optimizers import FluxOptimizers
from torchtitan_flux.parallel.clip import clip_gradients
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.parallel.pipeline import Pipeline
from torchtitan_flux.randomness import Stream, digest
from torchtitan_flux.startup.dump_config import log_resolved
from torchtitan_flux.startup.model_args import resolve_model_args, sample_settings
from torchtitan_flux.training.checkpoint_manager import (
    FluxCheckpointManager,
    checkpoint_manager_bound,
)
from torchtitan_flux.training.conditioning import (
    EncodedBatch,
    Encoders,
    build_frozen_encoders,
)
from torchtitan_flux.training.data import build_validation_loader, log_surveys
from torchtitan_flux.training.ema import EMA
from torchtitan_flux.training.environment import append_environment, environment
from torchtitan_flux.training.heartbeat import Heartbeat
from torchtitan_flux.training.hooks import Hook
from torchtitan_flux.training.image_sampler import ImageSampler
from torchtitan_flux.training.losses import flow_inputs, forward_backward, sample_losses
from torchtitan_flux.training.metrics import FluxMetrics
from torchtitan_flux.training.nonfinite import report_nonfinite
from torchtitan_flux.training.out_of_memory import (
    note_second_step,
    training_remedies,
)
from torchtitan_flux.training.process import start_process_group
from torchtitan_flux.training.quarantine import Quarantine, TooManyUnreadable, take_replaced
from torchtitan_flux.training.resume import plan_resume
from torchtitan_flux.training.sample_grids import SampleGrids
from torchtitan_flux.training.step_flags import FlagExchange, Step, StepFlags, step_unless
from torchtitan_flux.training.stopping import StopSignals
from torchtitan_flux.training.validator import FluxValidator

# it warns that only the last pipeline rank knows the loss; here all do
torchtitan.train.ensure_pp_loss_visible = lambda *_: None  # type: ignore[attr-defined]


class FluxTrainer(Trainer):
    """Pretrains FLUX with a flow-matching loss on frozen encoders.

    Args:
        job_config: from `load_config`.
        hooks: built once everything else is, in this order.

    Raises:
        ConfigError: when the newest checkpoint belongs to another run than is configured.
    """

    metrics_processor: FluxMetrics  # type: ignore[assignment]
    checkpointer: FluxCheckpointManager  # type: ignore[assignment]
    dataloader: FluxDataLoader  # type: ignore[assignment]
    parallel_dims: FluxParallelDims  # type: ignore[assignment]
    model_args: FluxModelArgs  # type: ignore[assignment]

    def __init__(
        self, job_config: FluxJobConfig, hooks: Sequence[Callable[["FluxTrainer"], Hook]] = ()
    ):
        self.results: list[str] = []  # lines that a run ends with
        self.stopped = False  # by a signal, before the last step
        self._step_is_new = False
        self._skipped_in_a_row = 0
        self._signals = StopSignals()
        self._heartbeat = Heartbeat()
        device = start_process_group(job_config)
        self.resume_plan = plan_resume(job_config)
        self.config = self.resume_plan.config
        self.facts = self.resume_plan.facts
        self.quarantine = Quarantine(
            Path(job_config.job.dump_folder) / "quarantine.jsonl",
            job_config.data.max_unreadable_share,
        )
        log_resolved(self.config)
        with checkpoint_manager_bound(self.resume_plan):
            super().__init__(self.config)
        config = self.config  # complete
        self.device = device  # torchtitan numbers even the CPU by the local rank
        self.model_args = resolve_model_args(config)  # type: ignore[assignment]
        frozen = build_frozen_encoders(
            config,
            self.model_args,
            self.tokenizer,  # type: ignore[arg-type]
            self.parallel_dims,
            self.device,
            TORCH_DTYPE_MAP[config.training.mixed_precision_param],
        )
        self.encoders: Encoders = frozen
        self._flags = FlagExchange(device, late=device.type == "cuda")
        self._errors = (
            torch.compile(
                squared_errors, backend=config.compile.backend, fullgraph=True, dynamic=False
            )
            if config.compiles("loss")
            else squared_errors
        )
        self._guidance = config.flow.guidance if self.model_args.guidance_embed else None
        self.image_sampler = ImageSampler(
            self.model,
            frozen,
            self.model_args.geometry,
            self.parallel_dims,
            config.sampling.local_batch_size,
        )
        ema = EMA(self.model_parts, config.ema.decay, config.ema.every, config.ema.start)
        weights = ema.weights(config.ema.use_for)
        self.hooks: list[Hook] = [ema, *(build(self) for build in hooks)]
        if config.sampling.enable:
            settings = sample_settings(config, self.model_args)
            beat = partial(self._heartbeat.beat, phase="drawing")
            self.hooks.append(
                SampleGrids(
                    config, self.image_sampler, settings, self.metrics_processor, weights, beat
                )
            )
        for hook in self.hooks:
            self.checkpointer.add_states(hook.states())
        sources = {"training": self.dataloader.samples.source}
        if config.validation.enable:
            loader = build_validation_loader(self.parallel_dims, frozen.tokenizer, config)
            sources["validation"] = loader.samples.source
            self.validator = FluxValidator(  # type: ignore[assignment]
                loader,
                self.encoders,
                self._losses,
                config,
                self.parallel_dims.data_group,
                self.device,
                self.metrics_processor,
                self.quarantine.record,
                weights,
            )
        if torch.distributed.get_rank() == 0:
            log_surveys(sources, config.training.image_size, frozen.tokenizer)

    @property
    def model(self) -> FluxModel | Pipeline:
        """What is called like FluxModel, on any mesh."""
        return self.pp_schedule if self.parallel_dims.pp_enabled else self.model_parts[0]  # type: ignore[return-value]

    def init_distributed(self) -> FluxParallelDims:
        """Our meshes (torchtitan calls this)."""
        return FluxParallelDims.of(self.config.parallelism, torch.distributed.get_world_size())

    # ---- one step -------------------------------------------------------------------------

    def batch_generator(self, data_iterable: Iterable[TrainingBatch]) -> Iterator[TrainingBatch]:  # type: ignore[override]
        """Batches of the loader, with the time spent waiting for them."""
        self.metrics_processor.start(self.step - 1)  # the loop has counted its first step already
        iterator = iter(data_iterable)
        while True:
            self._heartbeat.beat(self.step, "data")
            begin = time.perf_counter()
            batch = next(iterator)  # endless
            self.metrics_processor.data_loading_times.append(time.perf_counter() - begin)
            yield batch

    def train_step(self, data_iterator: Iterator[TrainingBatch]) -> None:  # type: ignore[override]
        """One optimizer step over `training.global_batch_size` positions.

        Raises:
            NonFinite: the loss or a gradient is not finite, where that ends the run.
            TooManyUnreadable: more items could not be read than `data.max_unreadable_share`.
            CheckpointNotSaved: a stop was asked for and the run could not be saved.
        """
        self.optimizers.zero_grad()
        lr = float(self.lr_schedulers.schedulers[0].get_last_lr()[0])
        microbatches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        # over all ranks, before anything is sharded; one size in a step, so no need to ask them
        images = self.facts.global_batch_size
        elements = images * microbatches[0].noise[0].numel()

        self._heartbeat.beat(self.step, "forward/backward")
        losses = [  # of each sample, over `elements`; the last microbatch reduces the gradients
            self._forward_backward(batch, elements, last=number == len(microbatches))
            for number, batch in enumerate(microbatches, start=1)
        ]
        loss = torch.stack([part.sum() for part in losses]).sum()

        grad_norm = clip_gradients(
            [p for model in self.model_parts for p in model.parameters()],
            self.config.training.max_norm,
            self.parallel_dims.get_optional_mesh("pp"),
        )
        self._heartbeat.beat(self.step, "reducing flags")
        positions = torch.cat([batch.position for batch in microbatches])
        skip = self._flags.send(
            Step(self.step, positions, torch.cat(losses), grad_norm),
            loss,
            stop=self._signals.requested,
            unreadable=len(self.dataloader.replaced) > 0,
        )
        self._heartbeat.beat(self.step, "optimizer")
        self.checkpointer.maybe_wait_for_staging()
        assert isinstance(self.optimizers, FluxOptimizers)
        rounding = digest(self.facts.seed, Stream.ROUNDING, self.step) % 2**63
        step_unless(skip, self.optimizers, rounding)
        for hook in self.hooks:
            hook.after_optimizer_step(self.step)
        self._heartbeat.beat(self.step, "reducing flags")
        received = self._receive_flags()
        self.lr_schedulers.step()

        self.ntokens_seen += images * self.metrics_processor.tokens_per_image
        self.metrics_processor.images_since_last_log += images
        if self.step == 1 and self.device.type == "cuda":
            note_second_step(self.optimizers, self.device, lambda: training_remedies(self.config))
        if self.metrics_processor.should_log(self.step):
            self._log(loss, grad_norm, lr)
        self._step_is_new = True
        self._heartbeat.beat(self.step, "saving")
        if any(one.unreadable for one in received):
            self.quarantine.record(take_replaced(self.dataloader), "training")
            try:
                self.quarantine.check(self.dataloader.position)
            except TooManyUnreadable:
                self.checkpointer.save_now(self.step)
                raise
        if any(one.stop for one in received) and self.step < self.config.training.steps:
            self._stop()

    def _receive_flags(self) -> list[StepFlags]:
        """Flags of steps up to this one; those that were not finite are reported.

        Nothing is left open before something is saved, logged, validated or drawn.
        """
        received = self._flags.receive(everything=self._is_watched())
        if any(one.stop or one.unreadable for one in received):  # either may save
            received += self._flags.receive(everything=True)
        for one in received:
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if one.nonfinite else 0
            if one.nonfinite:
                report_nonfinite(one.step, self.config.training, self._skipped_in_a_row)
        return received

    def _is_watched(self) -> bool:
        """Whether anything but training belongs to this step."""
        config, step = self.config, self.step
        return (
            self.metrics_processor.should_log(step)
            or self.checkpointer.saves_at(step, step == config.training.steps)
            or (config.validation.enable and self.validator.should_validate(step))
            or any(hook.acts_after(step) for hook in self.hooks)
        )

    def _stop(self) -> None:
        """Save and leave the loop, as a signal asked for."""
        saved = self.checkpointer.save_now(self.step)
        self.stopped = True
        self.results = [
            f"stopped at step {self.step} and saved; the same command "
            f"{'without checkpoint.load_step ' * (self.config.checkpoint.load_step != -1)}continues"
            if saved
            else f"stopped at step {self.step}; nothing was saved, as [checkpoint] says"
        ]

    def _forward_backward(self, batch: TrainingBatch, elements: int, last: bool) -> Tensor:
        """Loss of each sample over `elements`; gradients are added up, and shared with the last."""
        inputs, target = self._flow_inputs(self.encoders.encode(batch), batch.t)
        return forward_backward(self.model, inputs, target, elements, last, self._errors)

    def _losses(self, encoded: EncodedBatch, t: Tensor) -> Tensor:
        return sample_losses(self.model, *self._flow_inputs(encoded, t), self._errors)

    def _flow_inputs(self, encoded: EncodedBatch, t: Tensor) -> tuple[FluxInputs, Tensor]:
        return flow_inputs(self.model_args, encoded, t, self._guidance)

    def _log(self, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        mean, worst = loss.clone(), loss * self.parallel_dims.data_degree
        group = self.parallel_dims.data_group  # context peers have the same loss
        if group is not None:
            torch.distributed.all_reduce(mean, group=group)
            torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX, group=group)
        values = torch.stack([mean, worst, grad_norm.to(mean)]).tolist()  # waits, once
        more = {"n_tokens_seen": self.ntokens_seen, "lr": lr}
        self.metrics_processor.log(self.step, *values, extra_metrics=more)

    # ---- around the steps -------------------------------------------------------------------

    def should_continue_training(self) -> bool:
        """torchtitan asks after a step's checkpoint and validation: then hooks may act."""
        if self._step_is_new:
            self._step_is_new = False
            for hook in self.hooks:
                hook.after_step(self.step)
        return not self.stopped and super().should_continue_training()

    def train(self) -> None:
        """Train to the last step (a finished run does not), then collect the results of hooks."""
        if self.resume_plan.finished:
            self._load_finished()
        else:
            if torch.distributed.get_rank() == 0:
                dims = self.parallel_dims
                mesh = {n: getattr(dims, n) for n in ("dp_replicate", "dp_shard", "cp", "tp", "pp")}
                facts = environment(dims.world_size, mesh, self.device)
                append_environment(Path(self.config.job.dump_folder), facts)
            super().train()
        self._heartbeat.beat(self.step, "done")
        if not self.stopped:
            self.results += [line for hook in self.hooks for line in hook.results(self.step)]

    def save_seed_checkpoint(self) -> None:
        """The initial weights as step 0, for runs that are to begin from the same ones."""
        self.checkpointer.save(0, last_step=True)
        self.results.append(f"seed checkpoint: {self.checkpointer.folder}/step-0")

    def _load_finished(self) -> None:
        manifest = self.resume_plan.choice.manifest
        assert manifest is not None
        self.checkpointer.load()
        self.step = manifest.step
        logger.info(
            f"This run is finished: {self.resume_plan.choice.folder} is its last step. "
            f"To train on, raise training.steps = {self.config.training.steps}; for a new run set "
            "another job.dump_folder"
        )
        self.quarantine.check(self.dataloader.position)
        for hook in self.hooks:
            hook.resumed_when_finished(self.step)

    def close(self) -> None:
        """End loader workers, checkpoint threads and loggers."""
        if getattr(self, "dataloader", None) is not None:
            self.dataloader.close()
        super().close()
        if self.resume_plan.lock is not None:
            self.resume_plan.lock.release()
        self._signals.uninstall()

    # ---- what is stored with checkpoints ----------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        more = {"unreadable": self.quarantine.count, "items": self._items()}
        return {**super().state_dict(), **more}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if DATALOADER not in self.config.checkpoint.exclude_from_loading:
            self.quarantine.count = state_dict["unreadable"]  # of the positions before this one
        before, now = state_dict["items"], self._items()
        if isinstance(before, int):  # without a digest: checkpoints of earlier versions
            before = (before, now[1])
        if before[0] != now[0]:
            logger.warning(
                f"The data set had {before[0]} items and now has {now[0]}: their order changes "
                "from here on, and so do the items held out by data.held_out_share"
            )
        elif tuple(before) != now:
            logger.warning(
                f"The data set has {now[0]} items as before, but other ones (renamed, exchanged or "
                "reordered): what is held out for validation may have been trained on"
            )

    def _items(self) -> tuple[int, str]:
        """Number of training items, and the digest of their ids."""
        source = self.dataloader.samples.source
        return len(source), items_digest(source)
