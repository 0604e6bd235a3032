"""What a picture of ours says about itself, enough to draw it again to the last bit."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import xxhash

import torchtitan_flux
from torchtitan_flux.checkpoint.manifest import MANIFEST
from torchtitan_flux.image_file import FORMATS, read_facts
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.sampling.generate import SampleSettings
from torchtitan_flux.sampling.schedules import DEV, SCHNELL, Schedule
from torchtitan_flux.tensor_files.safetensors_file import SAFETENSORS

SOFTWARE = "torchtitan-flux"
SAMPLES, SAMPLE = 256, 4096
"""Places of a file that are looked at, and bytes at each; training changes weights everywhere."""


MOST = 4096
"""Pictures of a batch; a stranger's file may say anything."""


class NoPicture(ValueError):
    """A file that cannot be repeated; says why."""


@dataclass(frozen=True)
class Source:
    """Files that a picture was drawn with.

    Attributes:
        path: file, folder or hub name.
        digest: of what lies there; empty for a hub name.
    """

    path: str
    digest: str

    @classmethod
    def of(cls, path: str | Path) -> "Source":
        return cls(str(path), digest(Path(path)))


@dataclass(frozen=True)
class Recorded:
    """How one picture was drawn.

    Attributes:
        prompt, negative_prompt: captions.
        settings: size, steps, guidance, schedule, seed.
        index: of the picture; its noise is a function of (seed, index).
        batch, row: shape of the batch that the transformer saw, and the picture's place in it.
        flavor: of the model.
        dtype: of the computation.
        text_tokens: length of the T5 encoding.
        pixel_channels: of flavors in pixel space.
        step: of the checkpoint; empty where the weights have none.
        own: whether the weights are a run's own checkpoint, and not any that were named.
        weights, t5, clip, autoencoder: what it was drawn with; no autoencoder in pixel space.
        version: of this package.
    """

    prompt: str
    negative_prompt: str
    settings: SampleSettings
    index: int
    batch: int
    row: int
    flavor: str
    dtype: str
    text_tokens: int
    pixel_channels: int
    step: str
    own: bool
    weights: Source
    t5: Source
    clip: Source
    autoencoder: Source | None
    version: str = torchtitan_flux.__version__

    def facts(self) -> dict[str, str | int]:
        """For `save_picture`."""
        found: dict[str, str | int] = {**self.settings.facts(), "software": SOFTWARE}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Source):
                name = "checkpoint" if field.name == "weights" and self.own else field.name
                found |= {name: value.path, f"{name}_digest": value.digest}
            elif isinstance(value, str | int) and field.name != "own":
                found[field.name] = value
        return found

    @classmethod
    def read(cls, path: Path) -> "Recorded":
        """From a PNG, JPEG or WebP.

        Raises:
            NoPicture: it is none, or not one that run_infer.sh wrote.
        """
        try:
            kind, text = read_facts(path)
        except FileNotFoundError:
            raise NoPicture(f"{path} does not exist") from None
        except (OSError, ValueError) as error:
            raise NoPicture(f"{path} is no picture that can be read ({error})") from None
        if kind not in FORMATS.values():
            raise NoPicture(
                f"{path} is a {kind}; the settings are in the PNG, JPEG or WebP that was drawn"
            )
        if text.get("software") != SOFTWARE:
            raise NoPicture(
                f"{path} holds no settings: it was not drawn by run_infer.sh, or saved again by a "
                "program that dropped them"
            )
        try:
            return cls._of(text)
        except (KeyError, ValueError) as error:
            raise NoPicture(
                f"{path} was drawn by {SOFTWARE} {text.get('version', '?')}, and what it says of "
                f"itself is not complete here ({type(error).__name__}: {error})"
            ) from None

    @classmethod
    def _of(cls, text: Mapping[str, str]) -> "Recorded":
        def source(name: str) -> Source:
            return Source(text[name], text[f"{name}_digest"])

        height, width = (int(side) for side in text["size"].split("x"))
        settings = SampleSettings(
            size=ImageSize(height, width),
            steps=int(text["steps"]),
            cfg=float(text["cfg"]),
            guidance=None if text["guidance"] == "None" else float(text["guidance"]),
            schedule=_schedule(text),
            seed=int(text["seed"]),
        )
        recorded = cls(
            prompt=text["prompt"],
            negative_prompt=text["negative_prompt"],
            settings=settings,
            index=int(text["index"]),
            batch=int(text["batch"]),
            row=int(text["row"]),
            flavor=text["flavor"],
            dtype=text["dtype"],
            text_tokens=int(text["text_tokens"]),
            pixel_channels=int(text["pixel_channels"]),
            step=text["step"],
            own="checkpoint" in text,
            weights=source("checkpoint" if "checkpoint" in text else "weights"),
            t5=source("t5"),
            clip=source("clip"),
            autoencoder=source("autoencoder") if "autoencoder" in text else None,
            version=text["version"],
        )
        if not 0 <= recorded.row < recorded.batch <= MOST:
            raise ValueError(f"row {recorded.row} of a batch of {recorded.batch}")
        return recorded


def _schedule(text: Mapping[str, str]) -> Schedule:
    if "schedule" not in text and "shifted" in text:  # drawn before there were others
        return {"True": DEV, "False": SCHNELL}[text["shifted"]]
    return Schedule.parse(text["schedule"])


def digest(path: Path) -> str:
    """A number that differs where files differ, without reading all of them.

    A checkpoint of ours has checksums in its manifest; of other files, the size and evenly spread
    samples are looked at.

    Args:
        path: a file, or a folder of which weights and json files count; empty where there is none.
    """
    state = xxhash.xxh3_128()
    if (path / MANIFEST).is_file():
        state.update((path / MANIFEST).read_bytes())
        return state.hexdigest()
    if path.is_file():
        files = [path]
    else:
        files = sorted(p for p in path.rglob("*") if p.suffix in (*SAFETENSORS, ".json"))
    for file in files:
        size = file.stat().st_size
        state.update(f"{file.name if path.is_dir() else ''}:{size}\n".encode())
        with file.open("rb") as content:
            for begin in _sampled(size):
                content.seek(begin)
                state.update(content.read(SAMPLE))
    return state.hexdigest() if files else ""


def _sampled(size: int) -> list[int]:
    """First bytes of the samples of a file."""
    if size <= SAMPLES * SAMPLE:
        return list(range(0, size, SAMPLE))
    return [(size - SAMPLE) * i // (SAMPLES - 1) for i in range(SAMPLES)]
