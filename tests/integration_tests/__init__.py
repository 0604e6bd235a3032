"""Named runs through the launcher, in the manner of torchtitan's own integration tests."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Start:
    """One start of the launcher.

    Attributes:
        overrides: of the configuration; for "infer" also what run_infer.sh takes.
        ranks: where they differ from those of the row.
        command: "train", or "infer", which is to leave pictures.
    """

    overrides: tuple[str, ...] = ()
    ranks: int | None = None
    command: Literal["train", "infer"] = "train"


@dataclass(frozen=True)
class OverrideDefinitions:
    """A named run: one or more starts into one dump folder, and what is to come of it.

    Attributes:
        starts: one after the other.
        test_descr: what it shows.
        test_name: for --test_name.
        ngpu: ranks.
        tolerance: largest relative difference of its losses from those of one rank.
        saved: steps whose checkpoints must be there and complete at the end.
    """

    starts: tuple[Start, ...]
    test_descr: str
    test_name: str
    ngpu: int = 1
    tolerance: float = 1e-5
    saved: tuple[int, ...] = ()

    def ranks(self, start: Start) -> int:
        """Of one start."""
        return self.ngpu if start.ranks is None else start.ranks
