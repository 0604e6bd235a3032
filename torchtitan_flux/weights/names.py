"""The transformer among the names of tensors: behind which prefix, in which layout."""

import re
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from torchtitan_flux.formatting import listed
from torchtitan_flux.model.initial_values import canonical_name
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights
from torchtitan_flux.tensor_files.weight_kinds import kind_of
from torchtitan_flux.weights.key_maps import Layout

_OTHER_PARTS = re.compile(
    r"(vae|first_stage_model|autoencoder|text_encoder|text_encoder_2|text_encoders"
    r"|cond_stage_model|conditioner)\."
    # beside the weights, in checkpoints of other trainers
    r"|optim|lr_sched|scheduler\.|scaler|grad_scaler|rng|random|dataloader|train(er|ing)?_state"
    r"|step$|epoch$|global_step"
)
_INPUT = re.compile(r"(?:(.*)\.)?(?:img_in|x_embedder)\.weight")
_BLOCK = re.compile(
    r"(?:(.*?)\.)?(?:(?:double|single)_blocks|(?:single_)?transformer_blocks)\.\d+\."
)
_DIFFUSERS = re.compile(r"x_embedder\.|(single_)?transformer_blocks\.\d+\.")


class Names(NamedTuple):
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


def find_transformer(path: Path, stored: Collection[str]) -> Names:
    """Find the transformer among names.

    Wrappers (`_orig_mod.` of torch.compile, `_fsdp_wrapped_module.`) are taken out wherever they
    stand. A prefix is whatever stands before the input layer, such as `transformer.`, `module.` or
    `model.diffusion_model.`. UnreadableWeights: there is none, and what is there instead; there
    are several; or two names mean one tensor.
    """
    plain = {name: canonical_name(name) for name in stored}
    prefixes = {match[1] or "" for one in plain.values() if (match := _INPUT.fullmatch(one))}
    if len(prefixes) > 1:
        raise UnreadableWeights(
            f"{path} holds several transformers, with names that begin with "
            f"{' and '.join(map(repr, sorted(prefixes)))}; save one of them alone"
        )
    if not prefixes:  # the input layer is missing: the blocks tell, what is missing is named later
        counted = Counter(m[1] or "" for one in plain.values() if (m := _BLOCK.match(one)))
        prefixes = {one for one, _ in counted.most_common(1)}
    prefix = "".join(f"{one}." for one in prefixes if one)
    names: dict[str, str] = {}
    left_out = set()
    for full, one in plain.items():
        inside = one.startswith(prefix)
        if prefixes and _OTHER_PARTS.match(one) and not (inside and prefix):
            left_out.add(f"{one.split('.')[0]}.")
            continue
        name = one.removeprefix(prefix) if inside else full
        if name in names:
            raise UnreadableWeights(f"{path} holds {name} twice, as {names[name]} and as {full}")
        names[name] = full
    whole = "img_in.weight" in names or "x_embedder.weight" in names
    if kind := kind_of(stored, whole):
        raise UnreadableWeights(f"{path} {kind.what}; {kind.remedy}")
    if not whole and not any(map(_BLOCK.match, names)):
        named = f": its {len(stored)} tensors are named {listed(stored, 4)}"
        raise UnreadableWeights(
            f"{path} holds no FLUX transformer{named if stored else ', nor any tensor'}"
        )
    return Names(prefix, names, tuple(sorted(left_out)))


def layout_of(names: Iterable[str]) -> Layout:
    """Whose names the tensors of a transformer have; Black Forest Labs' where nothing tells."""
    names = list(names)
    if any("_by_head." in name for name in names):
        return "ours"
    if any(map(_DIFFUSERS.match, names)):
        return "diffusers"
    norms = [name for name in names if name.endswith(("query_norm.weight", "query_norm.scale"))]
    return "torchtitan" if norms and norms[0].endswith(".weight") else "bfl"
