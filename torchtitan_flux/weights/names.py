"""Where in somebody's names of tensors the transformer is: behind which prefix, in which layout."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torchtitan_flux.model.initial_values import canonical_name
from torchtitan_flux.weights.key_maps import Layout

# What files hold beside the transformer, and checkpoints of other trainers beside the weights.
_OTHER_PARTS = re.compile(
    r"(vae|first_stage_model|autoencoder|text_encoder|text_encoder_2|text_encoders"
    r"|cond_stage_model|conditioner)\."
)
_TRAINING = re.compile(
    r"optim|lr_sched|scheduler\.|scaler|grad_scaler|rng|random|dataloader|train(er|ing)?_state|step$"
    r"|epoch$|global_step"
)
_INPUT = re.compile(r"(?:(.*)\.)?(?:img_in|x_embedder)\.weight")
_BLOCK = re.compile(
    r"(?:(.*?)\.)?(?:(?:double|single)_blocks|(?:single_)?transformer_blocks)\.\d+\."
)
_DIFFUSERS = re.compile(r"x_embedder\.|(single_)?transformer_blocks\.\d+\.")


@dataclass(frozen=True)
class Naming:
    """How tensors are named.

    Attributes:
        prefix: what the transformer's names begin with, its dot included.
        names: name in the transformer's layout -> name as it is stored. A name that belongs to no
            known part stands for itself.
        left_out: beginnings of the names of other parts.
    """

    prefix: str
    names: dict[str, str]
    left_out: tuple[str, ...]

    @property
    def transformer(self) -> bool:
        """Whether the input layer of a transformer is there."""
        return "img_in.weight" in self.names or "x_embedder.weight" in self.names

    @property
    def blocks(self) -> bool:
        """Whether there are blocks of a transformer."""
        return any(map(_BLOCK.match, self.names))


def naming(stored: Iterable[str]) -> Naming:
    """Find the transformer among names.

    Wrappers (`_orig_mod.` of torch.compile, `_fsdp_wrapped_module.`) are taken out wherever they
    stand. A prefix is whatever stands before the input layer, such as `transformer.`, `module.` or
    `model.diffusion_model.`. ValueError: there are several transformers, or two names mean one
    tensor.
    """
    plain = {name: canonical_name(name) for name in stored}
    found = {match[1] or "" for one in plain.values() if (match := _INPUT.fullmatch(one))}
    if len(found) > 1:
        raise ValueError(
            "holds several transformers: the names of one begin with "
            f"{', of another with '.join(map(repr, sorted(found)))}; save one of them alone"
        )
    if not found:  # the input layer is missing: the blocks tell, and what is missing is named later
        counted = Counter(m[1] or "" for one in plain.values() if (m := _BLOCK.match(one)))
        found = {one for one, _ in counted.most_common(1)}
    prefix = "".join(f"{one}." for one in found if one)
    names: dict[str, str] = {}
    left_out = set()
    for full, one in plain.items():
        inside = one.startswith(prefix)
        other = _OTHER_PARTS.match(one) or _TRAINING.match(one)
        if found and other and not (inside and prefix):
            left_out.add(f"{one.split('.')[0]}.")
            continue
        name = one.removeprefix(prefix) if inside else full
        if name in names:
            raise ValueError(f"holds {name} twice, as {names[name]} and as {full}")
        names[name] = full
    return Naming(prefix, names, tuple(sorted(left_out)))


def layout_of(names: Iterable[str]) -> Layout:
    """Whose names the tensors of a transformer have; Black Forest Labs' where nothing tells."""
    names = list(names)
    if any("_by_head." in name for name in names):
        return "ours"
    if any(map(_DIFFUSERS.match, names)):
        return "diffusers"
    norms = [name for name in names if name.endswith(("query_norm.weight", "query_norm.scale"))]
    return "torchtitan" if norms and norms[0].endswith(".weight") else "bfl"
