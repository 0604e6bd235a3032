"""torchtitan's checkpoint manager, with checkpoints that are complete or invisible (contract 5)."""

import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)
from torchtitan_flux.torchtitan_shim import give_back_freed_memory

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchtitan.train
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.checkpoint.stateful import Stateful
from torchtitan.components.checkpoint import (
    LR_SCHEDULER,
    MODEL,
    OPTIMIZER,
    AsyncMode,
    CheckpointManager,
)
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import GarbageCollection

from torchtitan_flux.checkpoint.folder import rename_over, stale_steps, step_folder
from torchtitan_flux.checkpoint.manifest import Manifest
from torchtitan_flux.checkpoint.optimizer_states import OptimizerStates, ScheduleState
from torchtitan_flux.checkpoint.storage import (
    ManifestWriter,
    SafeReader,
    causes_of,
    load_states,
    partial_of,
)
from torchtitan_flux.collectives import from_rank_0, gather
from torchtitan_flux.files import DiskFull
from torchtitan_flux.formatting import listed
from torchtitan_flux.shards import local
from torchtitan_flux.tensor_files.element_types import overflows
from torchtitan_flux.training.resume import ResumePlan
from torchtitan_flux.weights.export import export_beside, exported
from torchtitan_flux.weights.open import import_weights

_LEFT_OUT = {
    "model": "the weights are initialised anew, while the optimizer keeps its moments unless it "
    "is left out too",
    "optimizer": "the optimizer's moments begin at zero",
    "lr_scheduler": "the learning rate's schedule begins again, warm-up included",
    "dataloader": "the data begin again at position 0, with the samples, times and noise of the "
    "first steps",
}
"""Parts of a checkpoint that a run can resume without -> what that means."""


class CheckpointNotSaved(RuntimeError):
    """A checkpoint could not be written; those before it are intact."""


class FluxCheckpointManager(CheckpointManager):
    """Saves with a manifest, keeps complete checkpoints, loads what was chosen beforehand.

    Every method that saves or waits raises CheckpointNotSaved: for a checkpoint of the interval
    where `checkpoint.on_save_error` is "stop"; always for the last one and what `save_now` saves.

    Args:
        plan: what to load, and what is stored with every checkpoint.
        arguments: torchtitan's.
    """

    def __init__(self, *arguments: Any, plan: ResumePlan, **more: Any):
        self.save_future: Future | None = None
        # torchtitan asks for an adapter of state dicts where it exports; this class does it itself
        super().__init__(*arguments, **{**more, "sd_adapter": self})
        self.plan = plan
        self.on_save_error = plan.config.checkpoint.on_save_error
        self.damaged = set(plan.choice.damaged)
        self._hook_states: dict[str, Stateful] = {}
        self._saved_step: int | None = None  # known to be complete, by this process
        self._saving: tuple[ManifestWriter, float] | None = None
        self._background = ThreadPoolExecutor(1, "save")  # a thread only once it is needed
        if self.enable:
            self.states[OPTIMIZER] = OptimizerStates(self.states[OPTIMIZER])
            self.states[LR_SCHEDULER] = ScheduleState(self.states[LR_SCHEDULER])

    def add_states(self, states: Mapping[str, Stateful]) -> None:
        """What hooks keep in checkpoints, model-only ones too, each under its name."""
        if self.enable:
            self.states.update(states)
            self._hook_states.update(states)

    # ---- saving -----------------------------------------------------------------------------

    @torch.no_grad()
    def save(self, curr_step: int, last_step: bool = False) -> None:
        """Save where the interval, the first or the last step asks for it (torchtitan's loop)."""
        if not self.saves_at(curr_step, last_step):
            return
        if not self._is_saved(curr_step):
            ends = last_step or curr_step == 0
            self._save(
                curr_step,
                model_only=ends and (self.last_save_model_only or curr_step == 0),
                background=not ends and self.async_mode != AsyncMode.DISABLED,
                required=ends or self.on_save_error == "stop",
            )
        if last_step and curr_step > 0 and self.last_save_in_hf:
            self._export(curr_step)

    def saves_at(self, step: int, last_step: bool) -> bool:
        """Whether the interval, the first or the last step asks for a checkpoint of this one."""
        return self._should_save(step, last_step)

    @torch.no_grad()
    def save_now(self, step: int) -> bool:
        """A full checkpoint of this step, on the disk when this returns.

        False where checkpoints are switched off or only loaded.
        """
        if not self.enable or self.load_only:
            return False
        if not self._is_saved(step):
            self._save(step, model_only=False, background=False, required=True)
        return True

    def _is_saved(self, step: int) -> bool:
        """Whether this process has seen the checkpoint of a step through to its name."""
        if self._saving is not None and self._saving[0].manifest.step == step:
            self.wait(required=False)
        return self._saved_step == step

    def maybe_wait_for_staging(self) -> None:
        """torchtitan calls this in every step: a save that has ended meanwhile is noted."""
        super().maybe_wait_for_staging()
        future = self.save_future
        # a failure waits for the next save, which all ranks reach in the same step
        if future is not None and future.done() and future.exception() is None:
            self.wait()

    def wait(self, required: bool | None = None) -> None:
        """Until a save in the background has ended.

        Args:
            required: raise when it failed, else report it; None does what `on_save_error` says.
        """
        future, self.save_future = self.save_future, None
        if future is None:
            return
        try:
            future.result()
        except (CheckpointException, Exception) as error:
            if not isinstance(error, CheckpointException):
                # the process or thread that saves is gone, and with it the others' collective
                logger.error("Saving in the background broke; from here on it is done in place")
                self.async_mode = AsyncMode.DISABLED
            self._failed(error, self.on_save_error == "stop" if required is None else required)
        else:
            self._complete()

    def _save(self, step: int, model_only: bool, background: bool, required: bool) -> None:
        # in the foreground this save makes up for one that failed in the background
        self.wait(required=None if background else False)
        GarbageCollection.collect("GC collection invoked by checkpointer.")
        folder = step_folder(Path(self.folder), step)
        if model_only:
            weights = self._in_export_dtype(self.states[MODEL].state_dict(), folder)
            states = {**weights, **self._hook_states}
        else:
            states = self._flattened_model_states_sd()
        kind = "model" if model_only else "full"
        manifest = Manifest(step, kind, self.plan.facts, settings=self.plan.settings)
        writer = ManifestWriter(folder, manifest, step in self.damaged)
        if dist.get_rank() == 0:
            shutil.rmtree(partial_of(folder), ignore_errors=True)
        self._saving = writer, time.monotonic()
        try:
            if background:
                self._save_in_background(states, writer)
                logger.info(f"Saving {folder} in the background")
                return
            dcp.save(states, storage_writer=writer)
        except CheckpointException as error:
            self._failed(error, required)
        else:
            self._complete()

    def _in_export_dtype(self, weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
        """Weights in `checkpoint.export_dtype`, or as they are where one is beyond it; collective.

        By then the run is over: its result is kept, whatever the type.
        """
        if self.export_dtype == torch.float32:
            return weights
        found = {name: value.to(self.export_dtype) for name, value in weights.items()}
        beyond = [n for n, value in weights.items() if overflows(local(value), local(found[n]))]
        # a rank sees its own shards, or stages, alone
        names = sorted({name for of_rank in gather(beyond) for name in of_rank})
        if not names:
            return found
        given = str(self.export_dtype).removeprefix("torch.")
        logger.error(
            f"checkpoint.export_dtype = {given!r} cannot hold all values (beyond "
            f"{torch.finfo(self.export_dtype).max:.5g} in size) of {listed(names)}; {folder} keeps "
            f"the type of training; `python scripts/convert_checkpoint.py {folder} …` writes others"
        )
        return weights

    def _save_in_background(self, states: dict[str, Any], writer: ManifestWriter) -> None:
        pinned = self.async_mode == AsyncMode.ASYNC_WITH_PINNED_MEM
        if self.stager is None:
            self.stager = DefaultStager(StagingOptions(pinned, pinned, pinned, pinned))
        if pinned:
            response = dcp.async_save(
                states,
                storage_writer=writer,
                process_group=self.pg,
                async_checkpointer_type=AsyncCheckpointerType.PROCESS,
                async_stager=self.stager,
            )
            assert isinstance(response, AsyncSaveResponse)
            self.staging_future, self.staging = response.staging_completion, True
            self.save_future = response.upload_completion
            return
        # One thread for all saves: with dcp.async_save each has a thread of its own, whose end
        # leaves 10 MB of its heap with the C library, which malloc_trim does not give back.
        values = {n: s.state_dict() if isinstance(s, Stateful) else s for n, s in states.items()}
        staged = self.stager.stage(values)
        assert isinstance(staged, dict)  # not a future: staging is not in the background
        self.save_future = self._background.submit(
            dcp.save, staged, storage_writer=writer, process_group=self.pg
        )

    def _complete(self) -> None:
        """A checkpoint has its name: say so, and let the oldest go."""
        assert self._saving is not None
        writer, begin = self._saving
        took = f" in {time.monotonic() - begin:.2f} s"
        logger.info(f"Saved {writer.folder}{took if self.async_mode == AsyncMode.DISABLED else ''}")
        self._saved_step = writer.manifest.step
        self.damaged.discard(self._saved_step)
        give_back_freed_memory()
        if dist.get_rank() == 0:
            self._purge_stale_checkpoints()

    def _purge_stale_checkpoints(self) -> None:
        folder = Path(self.folder)
        try:
            for step in stale_steps(folder, self.keep_latest_k, self.damaged):
                # renamed first: half a checkpoint must not bear the name of a whole one
                self.purge_queue.put(str(rename_over(step_folder(folder, step), "deleting")))
        except OSError as error:  # the checkpoint itself is good
            logger.warning(f"Old checkpoints in {folder} could not be deleted: {error}")

    def _failed(self, error: BaseException, required: bool) -> None:
        """Give back the space; then report, or raise where the run must not go on without it."""
        assert self._saving is not None
        folder, step = self._saving[0].folder, self._saving[0].manifest.step
        if dist.get_rank() == 0:
            shutil.rmtree(partial_of(folder), ignore_errors=True)
        causes, remedy = f"{type(error).__name__}: {error}", ""
        if isinstance(error, CheckpointException):
            causes = causes_of(error)
            if any(isinstance(cause, DiskFull) for cause, _ in error.failures.values()):
                remedy = (
                    "; make room there, keep fewer (checkpoint.keep_latest_k), or go on in a copy "
                    "on another disk (job.dump_folder)"
                )
        message = f"The checkpoint of step {step} could not be saved to {folder} ({causes}){remedy}"
        if required:
            raise CheckpointNotSaved(f"{message}; those before it are intact") from error
        logger.error(
            f"{message}; training goes on, as checkpoint.on_save_error = "
            f'"{self.on_save_error}" says. Those before it are intact'
        )

    def _export(self, step: int) -> None:
        """The weights of a step, on the disk already, as a diffusers folder too."""
        checkpoint = step_folder(Path(self.folder), step)
        if problem := export_beside(checkpoint, self.plan.model_args):
            target = exported(checkpoint)
            raise CheckpointNotSaved(
                f"{checkpoint} is saved, but {target} could not be written ({problem}); the same "
                "command again makes up for it, and so does "
                f"`python scripts/convert_checkpoint.py {checkpoint} {target} --to diffusers`"
            )

    # ---- loading ----------------------------------------------------------------------------

    @torch.no_grad()
    def load(self, step: int = -1) -> bool:
        """Load what was chosen before anything was built; False where the run begins anew.

        Args:
            step: torchtitan's; the plan says which checkpoint it means.

        Raises:
            KeyMismatch: the weights there are not this model's.
        """
        choice, initial = self.plan.choice, self.plan.initial
        if not self.enable or (choice.folder is None and initial is None):
            return False
        begin = time.monotonic()
        if choice.folder is not None:
            assert choice.manifest is not None
            self._saved_step = choice.manifest.step
            self._load_states(choice.folder, choice.manifest.kind == "model")
        elif isinstance(initial, Path):
            self._load_states(initial, model_only=False)
        elif initial is not None:
            logger.info(f"Reading {initial.path}")
            import_weights(self.states[MODEL].state_dict(), initial)
            give_back_freed_memory()
        GarbageCollection.collect("GC collection for checkpoint loading.")
        logger.info(f"Loaded it in {time.monotonic() - begin:.2f} s")
        self._make_up_for_export()
        return True

    def _load_states(self, folder: Path, model_only: bool) -> None:
        logger.info(f"Loading {folder}")
        parts = (MODEL,) if model_only else _LEFT_OUT
        left_out = [part for part in parts if part in self.exclude_from_loading]
        for part in left_out:
            logger.warning(f"checkpoint.exclude_from_loading: {part}: {_LEFT_OUT[part]}")
        if model_only and left_out:
            return  # there is nothing else in it
        states = {**self._states_to_load(model_only), **self._hook_states}
        stored = SafeReader(folder).read_metadata().state_dict_metadata
        for name in self._hook_states:
            if not any(entry.startswith(f"{name}.") for entry in stored):
                logger.warning(f"{folder} has no {name}: it begins with the weights there")
                del states[name]
        model_keys = set(self.states[MODEL].state_dict()) & set(states)
        load_states(states, model_keys, folder)
        if model_keys:
            self.states[MODEL].load_state_dict({name: states[name] for name in model_keys})

    def _make_up_for_export(self) -> None:
        """A finished run that was killed, or had no room, before its export was written."""
        manifest = self.plan.choice.manifest
        if manifest is None or manifest.kind != "model" or manifest.step == 0:
            return
        target = exported(step_folder(Path(self.folder), manifest.step))
        if self.last_save_in_hf and not self.load_only and not from_rank_0(target.exists):
            self._export(manifest.step)

    def close(self) -> None:
        """End the background: a save in progress is finished first."""
        try:
            self.wait(required=False)
        finally:
            self._background.shutdown()
            super().close()


@contextmanager
def checkpoint_manager_bound(plan: ResumePlan) -> Iterator[None]:
    """torchtitan's Trainer, when built inside, gets this manager in place of its own."""
    theirs = torchtitan.train.CheckpointManager
    ours = partial(FluxCheckpointManager, plan=plan)
    torchtitan.train.CheckpointManager = ours  # type: ignore[misc]
    try:
        yield
    finally:
        torchtitan.train.CheckpointManager = theirs
