"""FluxModel: two token sequences of different spaces, a vector and a time in; velocities out."""

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from torchtitan_flux.model.args import FluxModelArgs
from torchtitan_flux.model.initial_values import fill_initial_values
from torchtitan_flux.model.layers import (
    CastingLinear,
    DoubleStreamBlock,
    FinalLayer,
    MLPEmbedder,
    SingleStreamBlock,
)
from torchtitan_flux.model.rope import rope_table, sinusoid

TIME_FEATURES = 256


class FluxModel(nn.Module):
    """The FLUX.1 rectified-flow transformer (Black Forest Labs, 2024).

    Built on a real device it is ready to train: initial values are drawn from a seed that comes
    from torch's generator (torch.manual_seed). On the meta device it stays empty.
    """

    def __init__(self, args: FluxModelArgs):
        super().__init__()
        self.args = args
        hidden = args.hidden_size
        self.img_in = CastingLinear(args.in_channels, hidden)
        self.txt_in = CastingLinear(args.context_in_dim, hidden)
        self.time_in = MLPEmbedder(TIME_FEATURES, hidden)
        self.vector_in = MLPEmbedder(args.vec_in_dim, hidden)
        if args.guidance_embed:
            self.guidance_in = MLPEmbedder(TIME_FEATURES, hidden)
        # ModuleDict: a pipeline stage that keeps blocks 7 to 12 keeps their names
        self.double_blocks = nn.ModuleDict(
            {
                str(i): DoubleStreamBlock(hidden, args.head_dim, args.mlp_hidden, args.qkv_bias)
                for i in range(args.depth)
            }
        )
        self.single_blocks = nn.ModuleDict(
            {
                str(i): SingleStreamBlock(hidden, args.head_dim, args.mlp_hidden)
                for i in range(args.depth_single_blocks)
            }
        )
        self.final_layer = FinalLayer(hidden, args.out_channels)
        if self.img_in.weight.device.type != "meta":
            self.init_weights()

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draw initial values; `parallelize_flux` puts one in its place that knows the seed."""
        fill_initial_values(self, int(torch.randint(2**62, ())))

    def forward(
        self,
        img: Float[Tensor, "b img in_channels"],
        img_ids: Num[Tensor, "b img axes"],
        txt: Float[Tensor, "b txt context"],
        txt_ids: Num[Tensor, "b txt axes"],
        timesteps: Num[Tensor, " b"],
        y: Float[Tensor, "b vec"],
        guidance: Num[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b img out_channels"]:
        """Velocity of every image token.

        Args:
            img: image tokens.
            img_ids: position ids of the image tokens, any number type; never cast below float32.
            txt: text tokens (or any second sequence).
            txt_ids: their position ids; zero in FLUX.1, but any are used as they are.
            timesteps: times, 0 = data and 1 = noise; values outside [0, 1] are not refused.
            y: pooled text vector.
            guidance: guidance value of each sample; required exactly when args.guidance_embed.

        Raises:
            ValueError: naming the argument whose shape or presence does not fit.
        """
        self._check(img, img_ids, txt, txt_ids, timesteps, y, guidance)
        table = self.rotations(img_ids, txt_ids)
        img, txt, vec = self.embed(img, txt, timesteps, y, guidance)
        for block in self.double_blocks.values():
            img, txt = block(img, txt, vec, table)
        x = torch.cat([txt, img], dim=1)
        for block in self.single_blocks.values():
            x = block(x, vec, table)
        return self.final_layer(x[:, txt.shape[1] :], vec)

    def embed(
        self, img: Tensor, txt: Tensor, timesteps: Tensor, y: Tensor, guidance: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Both sequences [b, tokens, hidden], and the vector [b, hidden] that modulates them."""
        vec = self.time_in(sinusoid(timesteps, TIME_FEATURES)) + self.vector_in(y)
        if guidance is not None:
            vec = vec + self.guidance_in(sinusoid(guidance, TIME_FEATURES))
        return self.img_in(img), self.txt_in(txt), vec

    def rotations(self, img_ids: Tensor, txt_ids: Tensor) -> Float[Tensor, "b 1 tokens half 2"]:
        """Rope table of the joint sequence, text first."""
        ids = torch.cat([txt_ids, img_ids], dim=1)
        return rope_table(ids, self.args.axes_dim, self.args.theta)

    def _check(self, img, img_ids, txt, txt_ids, timesteps, y, guidance) -> None:
        args = self.args
        b, axes = (img.shape[0] if img.ndim else None), len(args.axes_dim)
        expected = {
            "img": (img, (b, None, args.in_channels)),
            "img_ids": (img_ids, (b, img.shape[1] if img.ndim == 3 else None, axes)),
            "txt": (txt, (b, None, args.context_in_dim)),
            "txt_ids": (txt_ids, (b, txt.shape[1] if txt.ndim == 3 else None, axes)),
            "timesteps": (timesteps, (b,)),
            "y": (y, (b, args.vec_in_dim)),
        }
        if (guidance is not None) != args.guidance_embed:
            given = "missing" if guidance is None else "given"
            raise ValueError(f"guidance is {given}, but guidance_embed is {args.guidance_embed}")
        if guidance is not None:
            expected["guidance"] = (guidance, (b,))
        for name, (tensor, shape) in expected.items():
            fits = zip(tensor.shape, shape, strict=False)
            if tensor.ndim != len(shape) or any(n not in (have, None) for have, n in fits):
                wanted = ", ".join("any" if n is None else str(n) for n in shape)
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({wanted})")
