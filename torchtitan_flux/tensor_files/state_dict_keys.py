"""Every key is accounted for: the one check that loading and converting weights go through."""

from collections.abc import Mapping, Sequence

from torch import Tensor

_SHOWN = 20


class KeyMismatch(ValueError):
    """State dict keys that are missing, unknown or of another shape than the model's.

    Attributes:
        missing: expected names that are not there.
        unknown: names that nothing expects.
        mis_shaped: lines "name: (found shape), expected (shape)".
    """

    def __init__(
        self,
        what: str,
        missing: Sequence[str],
        unknown: Sequence[str],
        mis_shaped: Sequence[str],
        remedy: str = "",
    ):
        self.missing = list(missing)
        self.unknown = list(unknown)
        self.mis_shaped = list(mis_shaped)
        parts = [
            f"{len(names)} {label}: {_listed(names)}"
            for label, names in (
                ("missing", self.missing),
                ("unknown", self.unknown),
                ("mis-shaped", self.mis_shaped),
            )
            if names
        ]
        super().__init__("; ".join([f"{what} does not fit", *parts, *([remedy] if remedy else [])]))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} … and {len(names) - _SHOWN} more"


def check_keys(
    found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Raise KeyMismatch unless `found` has exactly the expected names and shapes.

    Args:
        found: the state dict.
        expected: name -> shape.
        what: what is being loaded, for the message.
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    mis_shaped = [
        f"{name}: {tuple(found[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]
    if missing or unknown or mis_shaped:
        raise KeyMismatch(what, missing, unknown, mis_shaped)
