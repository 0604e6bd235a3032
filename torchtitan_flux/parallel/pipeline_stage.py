"""A part of FluxModel, for one pipeline stage.

Stages pass on (img, txt, vec) while double blocks are to come, then (x, vec), x the joint sequence.
vec travels with the tokens, so that only the first stage embeds; rope is cheap and made again by
each stage from the position ids, which every rank has.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchtitan_flux.model import FluxModel


class FluxStage(FluxModel):
    """Some modules of a FluxModel, under the names that they have there.

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
