"""Every key is accounted for: the one check that loading and converting weights go through."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from torchtitan_flux.formatting import listed

Shape = tuple[int, ...]

_SHOWN = 20


class KeyMismatch(ValueError):
    """State dict keys that are `missing`, `unknown` or `mis_shaped`.

    The last are lines "name: (found shape), expected (shape)"; `remedy` ends the message.
    """

    def __init__(
        self,
        what: str,
        missing: Sequence[str],
        unknown: Sequence[str],
        mis_shaped: Sequence[str],
        remedy: str = "",
    ):
        self.missing, self.unknown, self.mis_shaped = missing, unknown, mis_shaped
        named = {"missing": missing, "unknown": unknown, "mis-shaped": mis_shaped}
        parts = [
            f"{len(names)} {label}: {listed(names, _SHOWN)}"
            for label, names in named.items()
            if names
        ]
        super().__init__("; ".join([f"{what} does not fit", *parts, *([remedy] if remedy else [])]))


def check_keys(
    found: Mapping[str, Shape], expected: Mapping[str, Shape], what: str, remedy: str = ""
) -> None:
    """Raise KeyMismatch unless `found` has exactly the expected names and shapes.

    `remedy`: what to do where nothing but unknown tensors is wrong.
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    mis_shaped = [
        f"{name}: {tuple(found[name])}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if missing or unknown or mis_shaped:
        remedy = "" if missing or mis_shaped else remedy
        raise KeyMismatch(what, missing, unknown, mis_shaped, remedy)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Shape of each tensor of a state dict."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
