"""Pipeline parallelism: every rank holds some stages of the model, and microbatches go through.

The schedules are those of torch.distributed.pipelining. Sizes of what stages send are fixed when a
schedule first runs, so there is one schedule for each batch and size, around the same stages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.flow_matching import Errors, squared_errors
from torchtitan_flux.model import FluxModel, FluxModelArgs
from torchtitan_flux.model.inputs import FluxInputs
from torchtitan_flux.parallel.context import tokens_per_rank
from torchtitan_flux.parallel.parallelize import reshard
from torchtitan_flux.parallel.pipeline_plan import Schedule, pipeline_schedule, split_model


class FluxStage(FluxModel):
    """Some modules of a FluxModel, under the names that they have there.

    Stages pass on (img, txt, vec) while double blocks are to come, then (x, vec), x the joint
    sequence. vec travels with the tokens, so that only the first stage embeds; rope is cheap and
    made again by each stage from the position ids, which every rank has.

    Args:
        model: what they are taken from; a block belongs to one stage only.
        modules: their names: embedders, `double_blocks.0` …, `final_layer`.
    """

    def __init__(self, model: FluxModel, modules: Sequence[str]):
        nn.Module.__init__(self)  # FluxModel's would build a whole one
        self.args = model.args
        for name, child in model.named_children():
            if isinstance(child, nn.ModuleDict):
                kept = {key: block for key, block in child.items() if f"{name}.{key}" in modules}
                setattr(self, name, nn.ModuleDict(kept))
            elif name in modules:
                setattr(self, name, child)
        self.joins = f"double_blocks.{self.args.depth - 1}" in modules or not self.args.depth
        """Whether no double block comes after this stage."""

    def run(
        self, streams: Sequence[Tensor], vec: Tensor, img_ids: Tensor, txt_ids: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        """Through this stage's blocks: what the next stage takes, or of the last the velocity.

        `streams` are image and text tokens, or both joined, each [b, tokens, hidden].
        """
        table = self.rotations(img_ids, txt_ids)
        if len(streams) == 2:
            img, txt = streams
            for block in self.double_blocks.values():
                img, txt = block(img, txt, vec, table)
            if not self.joins:
                return img, txt, vec
            x = torch.cat([txt, img], dim=1)
        else:
            (x,) = streams
        for block in self.single_blocks.values():
            x = block(x, vec, table)
        if hasattr(self, "final_layer"):
            return self.final_layer(x[:, txt_ids.shape[1] :], vec)
        return x, vec


class FirstStage(FluxStage):
    """The embedders, and blocks."""

    def forward(  # type: ignore[override]
        self,
        img: Tensor,
        txt: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        *,
        img_ids: Tensor,
        txt_ids: Tensor,
    ) -> Tensor | tuple[Tensor, ...]:
        """FluxModel's arguments; those that other stages take as well by keyword."""
        self._check(img, img_ids, txt, txt_ids, timesteps, y, guidance)
        img, txt, vec = self.embed(img, txt, timesteps, y, guidance)
        return self.run((img, txt), vec, img_ids, txt_ids)


class LaterStage(FluxStage):
    """Blocks, and on the last stage the final layer."""

    def forward(  # type: ignore[override]
        self, *hidden: Tensor, img_ids: Tensor, txt_ids: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        """What the stage before returned, and the position ids."""
        *streams, vec = hidden
        # a copy: torch detaches what a stage returns, in place, and vec came from another
        return self.run(streams, vec.clone(), img_ids, txt_ids)


def pipeline_flux(
    model: FluxModel,
    parallel_dims: ParallelDims,
    job_config: FluxJobConfig,
    device: torch.device,
    model_args: FluxModelArgs,
    parallelize: Callable[[FluxStage, ParallelDims, FluxJobConfig], FluxStage],
    loss_fn: object = None,
) -> tuple["Pipeline", list[nn.Module], bool, bool]:
    """Cut a model on the meta device into stages; torchtitan's `pipelining_fn`, whose `loss_fn` is
    not used: ours is given to each step. `parallelize` is applied to each stage of this rank.

    Returns:
        the pipeline, this rank's stages, whether it has the first stage, and whether the last.
    """
    p, mesh = job_config.parallelism, parallel_dims.get_mesh("pp")
    split = split_model(p, model_args)
    schedule = pipeline_schedule(p)
    stages = {
        index: parallelize(
            (LaterStage if index else FirstStage)(model, split[index]), parallel_dims, job_config
        )
        for index in schedule.stages_of(mesh.get_local_rank(), mesh.size(), len(split))
    }
    for index, names in enumerate(split):
        logger.info(f"pipeline stage {index}: {names[0]} to {names[-1]}")
    layout = Layout(
        args=model_args,
        stages=len(split),
        joined=sum(any("double_blocks." in name for name in names) for names in split),
        microbatch=p.pipeline_parallel_microbatch_size,
        context_ranks=parallel_dims.cp,
        dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_param],
    )
    # torchtitan numbers even the CPU by the local rank
    device = torch.device("cpu") if device.type == "cpu" else device
    pipeline = Pipeline(stages, layout, schedule, mesh.get_group(), device)
    return pipeline, list(stages.values()), pipeline.has_first, pipeline.has_last


@dataclass(frozen=True)
class Layout:
    """What stages send to each other.

    Attributes:
        args: of the model.
        stages: how many there are.
        joined: the first stage that takes both sequences joined.
        microbatch: samples that go through together.
        context_ranks: ranks that share each sequence.
        dtype: of hidden states.
    """

    args: FluxModelArgs
    stages: int
    joined: int
    microbatch: int
    context_ranks: int
    dtype: torch.dtype

    def inputs_of(self, stage: int, img: int, txt: int) -> tuple[Tensor, ...]:
        """What a stage takes from the one before for a microbatch of so many tokens, on meta; of
        the number after the last stage, the velocity."""
        if stage == self.stages:
            shapes = [(img, self.args.out_channels)]
        else:
            hidden = self.args.hidden_size
            img, txt = (tokens_per_rank(n, self.context_ranks) for n in (img, txt))
            lengths = (img, txt) if stage < self.joined else (img + txt,)
            shapes = [*((n, hidden) for n in lengths), (hidden,)]
        return tuple(
            torch.empty(
                self.microbatch, *shape, dtype=self.dtype, device="meta", requires_grad=True
            )
            for shape in shapes
        )


class Pipeline(nn.Module):
    """The model of all pipeline ranks. Every one of them calls, with the same whole batch.

    Called like FluxModel it gives the velocity, without gradients; `forward_backward` trains.
    `stages` are this rank's by number, `group` the ranks that share the model.
    """

    def __init__(
        self,
        stages: dict[int, FluxStage],
        layout: Layout,
        schedule: Schedule,
        group: ProcessGroup,
        device: torch.device,
    ):
        super().__init__()
        self.stages = nn.ModuleDict({str(index): stage for index, stage in stages.items()})
        self.layout = layout
        self.schedule = schedule
        self.group = group
        self.device = device
        ranks, last = group.size(), layout.stages - 1
        self.has_first, self.has_last = 0 in stages, last in stages
        self.last_rank = next(
            r for r in range(ranks) if last in schedule.stages_of(r, ranks, layout.stages)
        )
        self._losses: Errors = squared_errors
        self._sample_losses: list[Tensor] = []
        self._schedules: dict[tuple[object, ...], tuple[Any, list[_Stage]]] = {}
        # NCCL makes a group's connections in its first collective, where all must take part
        dist.all_reduce(torch.zeros(1, device=device), group=group)

    def forward_backward(
        self,
        inputs: FluxInputs,
        target: Float[Tensor, "b img out_channels"],
        losses: Errors,
        reduce: bool = True,
    ) -> Float[Tensor, " b"]:
        """Forward and backward of one local batch, a multiple of the microbatch: the loss of each
        sample, on every rank, without gradient. `reduce`: whether data ranks reduce the gradients
        now, or more are added first."""
        schedule, stages = self._schedule_for(inputs, training=True)
        for stage in stages:
            stage.reduces = reduce
        self._losses, self._sample_losses = losses, []
        schedule.step(
            *self._positional(inputs),
            **_keywords(inputs),
            target=target if self.has_last else None,
            return_outputs=False,
        )
        if not self.has_last:
            return self._from_last(torch.empty(target.shape[0], device=self.device))
        return self._from_last(torch.cat(self._sample_losses))

    def _microbatch_loss(self, velocity: Tensor, target: Tensor) -> Tensor:
        """What the last stage calls on each microbatch, in order."""
        losses = self._losses(velocity, target)
        self._sample_losses.append(losses.detach())
        return losses.sum()

    @torch.no_grad()
    def forward(self, *arguments: Tensor | None) -> Tensor:
        """Velocity [b, img, out_channels] on every rank; arguments are those of FluxModel."""
        inputs = FluxInputs(*arguments)  # type: ignore[arg-type]
        b = inputs.img.shape[0]
        ranks, microbatch = self.group.size(), self.layout.microbatch
        count = -(-b // microbatch)
        if self.schedule.in_rounds and count > ranks:
            count = -(-count // ranks) * ranks
        inputs = inputs.padded_to(count * microbatch)
        schedule, _ = self._schedule_for(inputs, training=False)
        velocity = schedule.eval(*self._positional(inputs), **_keywords(inputs))
        reshard(self.stages)
        if velocity is None:
            (of_one,) = self.layout.inputs_of(self.layout.stages, inputs.img.shape[1], 0)
            shape = (count * microbatch, *of_one.shape[1:])
            velocity = torch.empty(shape, dtype=of_one.dtype, device=self.device)
        return self._from_last(velocity)[:b]

    def _from_last(self, x: Tensor) -> Tensor:
        """What the rank with the last stage has; others give its shape."""
        x = x.contiguous()
        dist.broadcast(x, group=self.group, group_src=self.last_rank)
        return x

    def _positional(self, inputs: FluxInputs) -> tuple[Tensor, ...]:
        """What the first stage takes by position: torch cuts it into microbatches."""
        return _of_first_stage(inputs) if self.has_first else ()

    def _schedule_for(self, inputs: FluxInputs, training: bool) -> tuple[Any, list["_Stage"]]:
        """The schedule for a batch of this size and its stages of this rank, kept once made."""
        size = (inputs.img.shape[:2], inputs.txt.shape[1], inputs.guidance is None, training)
        if size not in self._schedules:
            self._schedules[size] = self._new_schedule(inputs, training)
        return self._schedules[size]

    def _new_schedule(self, inputs: FluxInputs, training: bool) -> tuple[Any, list["_Stage"]]:
        layout, (b, img), txt = self.layout, inputs.img.shape[:2], inputs.txt.shape[1]
        assert b % layout.microbatch == 0, f"{b} samples in microbatches of {layout.microbatch}"
        first = tuple(x[: layout.microbatch].to("meta") for x in _of_first_stage(inputs))
        stages = [
            _Stage(
                stage,
                index,
                layout.stages,
                self.device,
                # given here, they need not be found out by a forward and a backward pass
                input_args=layout.inputs_of(index, img, txt) if index else first,
                output_args=layout.inputs_of(index + 1, img, txt),
                group=self.group,
            )
            for index, stage in ((int(name), stage) for name, stage in self.stages.items())
        ]
        kind = get_schedule_class(self.schedule.name if training else self.schedule.evaluation)
        schedule = kind(
            stages if self.schedule.several else stages[0],
            n_microbatches=b // layout.microbatch,
            loss_fn=self._microbatch_loss if training else None,
            scale_grads=False,  # the loss is a sum, and divided already
        )
        return schedule, stages


class _Stage(PipelineStage):
    """torch's, which shares gradients among data ranks after every step, and when it evaluates
    would pass gradients that there are not from one stage of a V to the other."""

    reduces = True
    """Whether this step's gradients are shared, or stay for the next one to add to."""

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        if self.has_backward and self.reduces:
            super().perform_reduce_grad(grad_scale_factor)

    def get_local_bwd_output(self, mb_index: int) -> Any:
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)


def _of_first_stage(inputs: FluxInputs) -> tuple[Tensor, ...]:
    given = (inputs.img, inputs.txt, inputs.timesteps, inputs.y)
    return given if inputs.guidance is None else (*given, inputs.guidance)


def _keywords(inputs: FluxInputs) -> dict[str, Tensor]:
    """What every stage takes."""
    return {"img_ids": inputs.img_ids, "txt_ids": inputs.txt_ids}
