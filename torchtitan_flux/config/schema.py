"""The keys of a configuration class, with types, defaults and meanings."""

import ast
import difflib
import functools
import inspect
import itertools
import textwrap
from collections.abc import Collection, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from torchtitan_flux.config.meanings import MEANINGS
from torchtitan_flux.config.problems import Problem


@dataclass(frozen=True)
class Key:
    """A key that TOML files and the command line may set.

    Attributes:
        name: "section.key", or "section.subsection.key".
        annotation: its type.
        default: its value where nobody sets it.
        meaning: one or two sentences.
    """

    name: str
    annotation: Any
    default: Any
    meaning: str

    @property
    def section(self) -> str:
        return self.name.rpartition(".")[0]


@functools.cache
def meanings_of(cls: type) -> dict[str, str]:
    """Field -> the string that stands below it in the source, as one paragraph."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        for statement, following in itertools.pairwise(tree.body[0].body):  # type: ignore[attr-defined]
            match statement, following:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = " ".join(text.split())
    return found


def keys_of(cls: type, prefix: str = "") -> Iterator[Key]:
    """All keys of a configuration class, section by section, keys before subsections."""
    nested = []
    for f in fields(cls):
        name = prefix + f.name
        if is_dataclass(f.type):
            nested.append((name, f.type))
        else:
            default = f.default if f.default is not MISSING else f.default_factory()  # type: ignore[misc]
            yield Key(name, f.type, default, MEANINGS.get(name) or meanings_of(cls).get(f.name, ""))
    for name, section in nested:
        yield from keys_of(section, f"{name}.")  # type: ignore[arg-type]


def get(config: object, key: str) -> Any:
    """The value of "section.key"."""
    return functools.reduce(getattr, key.split("."), config)


def put(config: object, key: str, value: object) -> None:
    """Set "section.key"."""
    section, _, name = key.rpartition(".")
    setattr(get(config, section), name, value)


def unknown_name(
    name: str, keys: Collection[str], given: str, section: bool = False
) -> tuple[Problem, list[str]]:
    """What to say of a key or `section` that does not exist, `given` in this way and place.

    Returns:
        the problem, and the key that was probably meant (then its value is in doubt), if any: a
        slip of the finger within the section comes before the right key in a wrong section.
    """
    head, _, last = name.rpartition(".")
    if section:
        near = difflib.get_close_matches(name, {key.rpartition(".")[0] for key in keys}, n=1)
        hint = f"did you mean [{near[0]}]?" if near else "--help lists all sections"
        return Problem(name, f"is an unknown section; {hint}", given=given), []
    within = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == head}
    near = [within[found] for found in difflib.get_close_matches(last, within, n=1)]
    same = [key for key in keys if key.rpartition(".")[2] == last]
    near = near or same[: len(same) == 1] or difflib.get_close_matches(name, keys, 1, cutoff=0.7)
    hint = f"did you mean {near[0]}?" if near else "--help lists all keys"
    return Problem(name, f"is unknown; {hint}", given=given), near
