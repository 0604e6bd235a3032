"""The keys of a configuration class, with types, defaults and meanings; merging of two classes."""

import ast
import functools
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, make_dataclass
from dataclasses import field as dataclass_field
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
    """A dataclass with the fields of both; where both have one, `custom` decides.

    Sections are merged field by field. The result is a subclass of `base` only.
    """
    own = {f.name: f for f in fields(custom)}
    meanings = {**meanings_of(base), **meanings_of(custom)}
    result: list[tuple[str, Any, Any]] = []
    for theirs in fields(base):
        mine = own.pop(theirs.name, theirs)
        if mine is not theirs and is_dataclass(theirs.type) and is_dataclass(mine.type):
            section = merged(theirs.type, mine.type)  # type: ignore[arg-type]
            result.append((mine.name, section, dataclass_field(default_factory=section)))
        else:
            result.append((mine.name, mine.type, mine))
    result += [(f.name, f.type, f) for f in own.values()]
    namespace = {"meanings": meanings}
    return make_dataclass(base.__name__, result, bases=(base,), namespace=namespace)


def meanings_of(cls: type) -> dict[str, str]:
    """Field -> the string that stands below it in the source, as one paragraph."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        found.update(one.__dict__.get("meanings") or _meanings_in_source(one))
    return found


@functools.cache
def _meanings_in_source(cls: type) -> dict[str, str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):  # made at run time
        return {}
    body = tree.body[0].body  # type: ignore[attr-defined]
    found = {}
    for statement, following in itertools.pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            found[statement.target.id] = " ".join(following.value.value.split())
    return found


def default_of(f: Field) -> Any:
    """The value of a field that nobody sets."""
    return f.default if f.default is not MISSING else f.default_factory()  # type: ignore[misc]


def keys_of(cls: type, prefix: str = "") -> Iterator[Key]:
    """All keys of a configuration class, section by section, keys before subsections."""
    nested = []
    meanings = meanings_of(cls)
    for f in fields(cls):
        name = prefix + f.name
        if is_dataclass(f.type):
            nested.append((name, f.type))
        else:
            meaning = meanings.get(f.name, "")
            yield Key(name, f.type, default_of(f), MEANINGS.get(name, "") or meaning)
    for name, section in nested:
        yield from keys_of(section, f"{name}.")  # type: ignore[arg-type]


def sections_of(cls: type, prefix: str = "") -> Iterator[str]:
    """Names of all sections and subsections."""
    for f in fields(cls):
        if is_dataclass(f.type):
            yield prefix + f.name
            yield from sections_of(f.type, f"{prefix}{f.name}.")  # type: ignore[arg-type]


def get(config: Any, key: str) -> Any:
    """The value of "section.key"."""
    return functools.reduce(getattr, key.split("."), config)


def put(config: Any, key: str, value: Any) -> None:
    """Set "section.key"."""
    section, _, name = key.rpartition(".")
    setattr(get(config, section), name, value)
