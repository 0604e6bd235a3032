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
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpoint import (
    LR_SCHEDULER,
    MODEL,
    OPTIMIZER,
    AsyncMode,
    CheckpointManager,
)
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import GarbageCollection

from torchtitan_flux.checkpoint.folder import (
    Choice,
    agree,
    rename_over,
    stale_steps,
    step_folder,
)
from torchtitan_flux.checkpoint.manifest import Manifest
from torchtitan_flux.checkpoint.optimizer_states import (
    PART_LEFT_OUT,
    OptimizerStates,
    ScheduleState,
)
from torchtitan_flux.checkpoint.run_facts import RunFacts, Settings
from torchtitan_flux.checkpoint.storage import (
    ManifestWriter,
    SafeReader,
    causes_of,
    load_states,
    partial_of,
)
from torchtitan_flux.files import DiskFull
from torchtitan_flux.formatting import listed
from torchtitan_flux.tensor_files.element_types import overflows
from torchtitan_flux.weights.adapter import FluxStateDictAdapter
from torchtitan_flux.weights.export import export_beside, exported
from torchtitan_flux.weights.load import import_weights
from torchtitan_flux.weights.open import Weights


class CheckpointNotSaved(RuntimeError):
    """A checkpoint could not be written; those before it are intact."""


class FluxCheckpointManager(CheckpointManager):
    """Saves with a manifest, keeps complete checkpoints, loads what was chosen beforehand.

    Args:
        facts: what the run is tied to; stored with every checkpoint.
        settings: what it may change when it goes on; stored, too.
        choice: the run's own checkpoint to continue from, verified; empty to begin.
        initial: the weights to begin with, or the verified folder of another run's checkpoint to
            go on from, or None.
        on_save_error: "continue" reports a checkpoint of the interval that could not be written
            and trains on; "stop" raises. The last one, and one that a stop asked for, always raise.
        arguments: torchtitan's.

    Raises:
        CheckpointNotSaved: by every method that saves or waits.
    """

    def __init__(
        self,
        *arguments: Any,
        facts: RunFacts,
        settings: Settings,
        choice: Choice,
        initial: Weights | Path | None,
        on_save_error: str,
        **more: Any,
    ):
        self.save_future: Future | None = None
        super().__init__(*arguments, **more)
        self.facts = facts
        self.settings = settings
        self.choice = choice
        self.initial = initial
        self.on_save_error = on_save_error
        self.damaged = set(choice.damaged)
        self._of_hooks: dict[str, Stateful] = {}
        self._saved_step: int | None = None  # known complete, in this process
        self._saving: tuple[int, ManifestWriter, float] | None = None
        self._background = ThreadPoolExecutor(1, "save")  # a thread only once it is needed
        if self.enable:
            self.states[OPTIMIZER] = OptimizerStates(self.states[OPTIMIZER])
            self.states[LR_SCHEDULER] = ScheduleState(self.states[LR_SCHEDULER])

    def add_states(self, states: Mapping[str, Stateful]) -> None:
        """What hooks keep in checkpoints, model-only ones too, each under its name."""
        if self.enable:
            self.states.update(states)
            self._of_hooks.update(states)

    # ---- saving -----------------------------------------------------------------------------

    @torch.no_grad()
    def save(self, curr_step: int, last_step: bool = False) -> None:
        """Save where the interval, the first or the last step asks for it (torchtitan's loop)."""
        if not self.saves_at(curr_step, last_step):
            return
        if self._is_saved(curr_step):
            pass
        elif last_step or curr_step == 0:
            model_only = self.last_save_model_only or curr_step == 0
            self._save(curr_step, model_only, background=False, required=True)
        else:
            background = self.async_mode != AsyncMode.DISABLED
            required = self.on_save_error == "stop"
            self._save(curr_step, model_only=False, background=background, required=required)
        if last_step and curr_step > 0 and self.last_save_in_hf:
            self._export(curr_step)

    def saves_at(self, step: int, last_step: bool) -> bool:
        """Whether the interval, the first or the last step asks for a checkpoint of this one."""
        return self._should_save(step, last_step)

    @torch.no_grad()
    def save_now(self, step: int) -> bool:
        """A full checkpoint of this step, on the disk when this returns.

        Returns:
            whether there is one: not where checkpoints are switched off or only loaded.
        """
        if not self.enable or self.load_only:
            return False
        if not self._is_saved(step):
            self._save(step, model_only=False, background=False, required=True)
        return True

    def _is_saved(self, step: int) -> bool:
        """Whether this process has seen the checkpoint of a step through to its name."""
        saving = self._saving is not None and self._saving[0] == step
        if saving:
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
        """Until a save in the background has ended; reports it when it failed.

        Args:
            required: raise when it failed; None does what `on_save_error` says.
        """
        future, self.save_future = self.save_future, None
        if future is None:
            return
        assert self._saving is not None
        step, writer, _ = self._saving
        try:
            future.result()
        except (CheckpointException, Exception) as error:
            if not isinstance(error, CheckpointException):
                # the process or thread that saves is gone, and with it the others' collective
                logger.error("Saving in the background broke; from here on it is done in place")
                self.async_mode = AsyncMode.DISABLED
            stop = self.on_save_error == "stop" if required is None else required
            self._failed(step, writer, error, stop)
        else:
            self._complete()

    def _save(self, step: int, model_only: bool, background: bool, required: bool) -> None:
        # in the foreground this save makes up for one that failed in the background
        self.wait(required=None if background else False)
        GarbageCollection.collect("GC collection invoked by checkpointer.")
        states = self.states[MODEL].state_dict()
        folder = step_folder(Path(self.folder), step)
        if model_only:
            states = {**self._in_export_dtype(states, folder), **self._of_hooks}
        else:
            states = self._flattened_model_states_sd()
        kind = "model" if model_only else "full"
        manifest = Manifest(step, kind, self.facts, settings=self.settings)
        writer = ManifestWriter(folder, manifest, step in self.damaged)
        if dist.get_rank() == 0:
            shutil.rmtree(partial_of(folder), ignore_errors=True)
        self._saving = step, writer, time.monotonic()
        try:
            if background:
                self._save_in_background(states, writer)
                logger.info(f"Saving {folder} in the background")
                return
            dcp.save(states, storage_writer=writer)
        except CheckpointException as error:
            self._failed(step, writer, error, required)
            return
        self._complete()

    def _in_export_dtype(self, weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
        """Weights in `checkpoint.export_dtype`, or as they are where one is beyond it; collective.

        By then the run is over: its result is kept, whatever the type.
        """
        if self.export_dtype == torch.float32:
            return weights
        found, beyond = {}, []
        for name, value in weights.items():
            found[name] = value.to(self.export_dtype)
            if overflows(_local(value), _local(found[name])):
                beyond.append(name)
        every: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(every, beyond)  # a rank sees its own shards, or stages, alone
        names = sorted({name for of_rank in every for name in of_rank})
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
        if self.async_mode == AsyncMode.ASYNC_WITH_PINNED_MEM:
            if self.stager is None:
                self.stager = DefaultStager(StagingOptions(True, True, True, True))
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
        else:
            # One thread for all saves: with dcp.async_save each has a thread of its own, whose end
            # leaves 10 MB of its heap with the C library, which malloc_trim does not give back.
            if self.stager is None:
                self.stager = DefaultStager(StagingOptions(False, False, False, False))
            states = {
                name: value.state_dict() if isinstance(value, Stateful) else value
                for name, value in states.items()
            }
            staged = self.stager.stage(states)
            assert isinstance(staged, dict)  # not a future: staging is not in the background
            self.save_future = self._background.submit(
                dcp.save, staged, storage_writer=writer, process_group=self.pg
            )

    def _complete(self) -> None:
        """A checkpoint has its name: say so, and let the oldest go."""
        assert self._saving is not None
        step, writer, begin = self._saving
        if self.async_mode == AsyncMode.DISABLED:
            seconds = time.monotonic() - begin
            logger.info(
                f"Saved {writer.folder} in {seconds:.2f} s, {writer.checksum_seconds:.2f} s of it "
                "for checksums"
            )
        else:
            logger.info(f"Saved {writer.folder}")
        self._saved_step = step
        self.damaged.discard(step)
        give_back_freed_memory()
        if dist.get_rank() == 0:
            self._purge_stale_checkpoints()

    def _purge_stale_checkpoints(self) -> None:
        folder = Path(self.folder)
        try:
            for step in stale_steps(folder, self.keep_latest_k, self.damaged):
                # renamed first: half a checkpoint must not bear the name of a whole one
                rename_over(step_folder(folder, step), "deleting")
            for going in folder.glob("step-*.deleting"):
                if self.purge_thread is None:
                    shutil.rmtree(going, ignore_errors=True)
                else:
                    self.purge_queue.put(str(going))
        except OSError as error:  # the checkpoint itself is good
            logger.warning(f"Old checkpoints in {folder} could not be deleted: {error}")

    def _failed(
        self, step: int, writer: ManifestWriter, error: BaseException, required: bool
    ) -> None:
        """Give back the space; then report, or raise where the run must not go on without it."""
        if dist.get_rank() == 0:
            shutil.rmtree(partial_of(writer.folder), ignore_errors=True)
        told = isinstance(error, CheckpointException)  # by each rank, to all of them
        causes = causes_of(error) if told else f"{type(error).__name__}: {error}"
        message = f"The checkpoint of step {step} could not be saved to {writer.folder} ({causes})"
        if told and any(isinstance(cause, DiskFull) for cause, _ in error.failures.values()):
            message += (
                "; make room there, keep fewer (checkpoint.keep_latest_k), or go on in a copy on "
                "another disk (job.dump_folder)"
            )
        if required:
            raise CheckpointNotSaved(f"{message}; those before it are intact") from error
        logger.error(
            f"{message}; training goes on, as checkpoint.on_save_error = "
            f'"{self.on_save_error}" says. Those before it are intact'
        )

    def _export(self, step: int) -> None:
        """The weights of a step, on the disk already, as a diffusers folder too."""
        assert isinstance(self.sd_adapter, FluxStateDictAdapter)
        checkpoint = step_folder(Path(self.folder), step)
        if problem := export_beside(checkpoint, self.sd_adapter.model_args):
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
            step: torchtitan's; which checkpoint it means was settled with `choice`.

        Raises:
            KeyMismatch: the weights there are not this model's.
        """
        if not self.enable:
            return False
        begin = time.monotonic()
        if self.choice.folder is not None:
            assert self.choice.manifest is not None
            self._saved_step = self.choice.manifest.step
            self._load_states(self.choice.folder, self.choice.manifest.kind == "model")
        elif isinstance(self.initial, Path):
            self._load_states(self.initial, model_only=False)
        elif self.initial is not None:
            logger.info(f"Reading {self.initial.path}")
            import_weights(self.states[MODEL].state_dict(), self.initial)
            give_back_freed_memory()
        else:
            return False
        GarbageCollection.collect("GC collection for checkpoint loading.")
        logger.info(f"Loaded it in {time.monotonic() - begin:.2f} s")
        self._make_up_for_export()
        return True

    def _load_states(self, folder: Path, model_only: bool) -> None:
        logger.info(f"Loading {folder}")
        left_out = [part for part in PART_LEFT_OUT if part in self.exclude_from_loading]
        if model_only:
            left_out = [part for part in left_out if part == MODEL]
        for part in left_out:
            logger.warning(f"checkpoint.exclude_from_loading: {part}: {PART_LEFT_OUT[part]}")
        if model_only and left_out:
            return  # there is nothing else in it
        states = {**self._states_to_load(model_only), **self._of_hooks}
        stored = SafeReader(folder).read_metadata().state_dict_metadata
        for name in self._of_hooks:
            if not any(entry.startswith(f"{name}.") for entry in stored):
                logger.warning(f"{folder} has no {name}: it begins with the weights there")
                del states[name]
        model_keys = set(self.states[MODEL].state_dict()) & set(states)
        load_states(states, model_keys, folder)
        if model_keys:
            self.states[MODEL].load_state_dict({name: states[name] for name in model_keys})

    def _make_up_for_export(self) -> None:
        """A finished run that was killed, or had no room, before its export was written."""
        manifest = self.choice.manifest
        if manifest is None or manifest.kind != "model" or not self.last_save_in_hf:
            return
        target = exported(step_folder(Path(self.folder), manifest.step))
        if manifest.step > 0 and not self.load_only and not agree(target.exists):
            self._export(manifest.step)

    def close(self) -> None:
        """End the background: a save in progress is finished first."""
        try:
            self.wait(required=False)
        finally:
            self._background.shutdown()
            super().close()


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


@contextmanager
def checkpoint_manager_bound(**known: Any) -> Iterator[None]:
    """torchtitan's Trainer, when built inside, gets this manager in place of its own.

    Args:
        known: FluxCheckpointManager's own arguments.
    """
    theirs = torchtitan.train.CheckpointManager
    torchtitan.train.CheckpointManager = partial(  # type: ignore[misc]
        FluxCheckpointManager, **known
    )
    try:
        yield
    finally:
        torchtitan.train.CheckpointManager = theirs
