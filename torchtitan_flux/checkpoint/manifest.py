"""What a complete checkpoint consists of: `manifest.json`, written last (contract 5).

It lists every file with its size and checksum, and what the run is tied to, so that both can be
read without unpickling anything.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import xxhash

from torchtitan_flux.files import replacing
from torchtitan_flux.randomness import RANDOMNESS_VERSION

MANIFEST = "manifest.json"
FORMAT = 1

Kind = Literal["full", "model"]

Settings = dict[str, str]
"""Keys of the configuration that may change when a run is resumed -> their values as in TOML."""


class Damaged(Exception):
    """A checkpoint is not what its manifest says, or has none."""


@dataclass(frozen=True)
class RunFacts:
    """Facts that must not change when a run is resumed.

    Attributes:
        global_batch_size: positions of one step.
        context_in_dim, vec_in_dim, in_channels: widths that followed the encoders and the codec.
        depth, depth_single_blocks: None in checkpoints from before they were stored.
    """

    seed: int
    global_batch_size: int
    context_in_dim: int
    vec_in_dim: int
    in_channels: int
    randomness_version: int = RANDOMNESS_VERSION
    depth: int | None = None
    depth_single_blocks: int | None = None

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "RunFacts":
        """From a dictionary; KeyError where one is missing that may not be None."""
        given: dict[str, Any] = {}
        for one in fields(cls):
            value = state.get(one.name) if one.default is None else state[one.name]
            given[one.name] = None if value is None else int(value)
        return cls(**given)


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes and XXH3-128 of a file; several times faster than a disk, and no secret."""

    size: int
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """Everything known about one checkpoint.

    Attributes:
        kind: "full" continues a run; "model" holds weights alone.
        created: seconds since 1970, when it was complete.
        files: by name in the folder; the manifest itself is not among them.
        settings: what the run was trained with; empty in manifests from before there were any.
    """

    step: int
    kind: Kind
    facts: RunFacts
    created: float = 0.0
    files: dict[str, FileFacts] = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Durably and at once."""
        with replacing(folder / MANIFEST) as unfinished:
            unfinished.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a checkpoint folder; Damaged where there is none that is understood."""
        try:
            content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise Damaged(f"it has no {MANIFEST}, so it was not saved completely") from None
        except (OSError, ValueError) as error:
            raise Damaged(f"its {MANIFEST} cannot be read ({error})") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise Damaged(f"its {MANIFEST} is not of format {FORMAT}")
        try:
            return cls(
                step=int(content["step"]),
                kind=content["kind"],
                facts=RunFacts.from_state(content["facts"]),
                created=float(content["created"]),
                files={name: FileFacts(**facts) for name, facts in content["files"].items()},
                settings=dict(content.get("settings", {})),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Damaged(f"its {MANIFEST} cannot be understood ({error!r})") from error

    def check_sizes(self, folder: Path) -> None:
        """Damaged where a file is missing or of another size; reads no file."""
        for name, facts in self.files.items():
            path = folder / name
            if not path.is_file():
                raise Damaged(f"{name} is missing")
            if (size := path.stat().st_size) != facts.size:
                raise Damaged(f"{name} has {size} bytes instead of {facts.size}")

    def check_contents(self, folder: Path, names: list[str]) -> None:
        """Damaged where one of these files is not what was saved; reads them whole."""
        for name in names:
            try:
                found = file_facts(folder / name)
            except OSError as error:
                raise Damaged(f"{name} cannot be read ({error})") from error
            if found != self.files[name]:
                raise Damaged(f"the checksum of {name} is wrong")


def file_facts(path: Path) -> FileFacts:
    """Size and checksum of a file."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(2**20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
        return FileFacts(file.tell(), digest.hexdigest())
