"""The keys of a configuration class, with types, defaults and meanings; merging of two classes."""

import ast
import functools
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass
from typing import Any

from torchtitan_flux.config.meanings import MEANINGS


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


def merged(base: type, custom: type) -> type:
    """A subclass of `base` with the keys of `custom` too, section by section.

    Where both have a key, `custom` decides, unless it has it from a class that `base` derives from.
    """
    own = {f.name: f for f in fields(base)}
    ancestors = [f for cls in base.__mro__[1:] if is_dataclass(cls) for f in fields(cls)]
    members = []
    for f in fields(custom):
        if any(f is other for other in ancestors):
            continue
        kind: Any = f.type
        if f.name in own and is_dataclass(kind):
            kind = merged(own[f.name].type, kind)  # type: ignore[arg-type]
        default: Any = (
            field(default_factory=kind) if isinstance(kind, type) and is_dataclass(kind) else f
        )
        members.append((f.name, kind, default))
    namespace = {"meanings": meanings_of(custom)}
    return make_dataclass(base.__name__, members, bases=(base,), namespace=namespace)


@functools.cache
def meanings_of(cls: type) -> dict[str, str]:
    """Field -> the string that stands below it in the source, as one paragraph."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        found |= base.__dict__.get("meanings", {})
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # made at run time
            continue
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
