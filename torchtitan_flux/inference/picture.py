"""A picture to draw, and what a drawn one says of itself."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torchtitan_flux
from torchtitan_flux.image_file import read_facts
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.sampling.generate import SampleSettings
from torchtitan_flux.sampling.schedules import Schedule

SOFTWARE = "torchtitan-flux"


class NoPicture(ValueError):
    """A file that says nothing of how it was drawn; the message says why."""


@dataclass(frozen=True)
class Picture:
    """A picture to draw, or as it was drawn.

    Attributes:
        settings: size, steps, guidance, schedule, seed.
        index: of the caption; the noise is a function of (settings.seed, index).
        names: flavor, weights, encoders. They are text: nothing that a picture names is opened.
    """

    prompt: str
    negative_prompt: str
    settings: SampleSettings
    index: int
    names: Mapping[str, str] = field(default_factory=dict)

    def facts(self) -> dict[str, str | int]:
        """For `save_picture`."""
        return {
            **self.names,
            **self.settings.facts(),
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "index": self.index,
            "software": SOFTWARE,
            "version": torchtitan_flux.__version__,
        }

    @classmethod
    def read(cls, path: Path) -> "Picture":
        """From a PNG, JPEG or WebP; NoPicture where run_infer.sh did not write it."""
        try:
            _, text = read_facts(path)
        except FileNotFoundError:
            raise NoPicture(f"{path} does not exist") from None
        except (OSError, ValueError) as error:
            raise NoPicture(f"{path} is no picture that can be read ({error})") from None
        if text.get("software") != SOFTWARE:
            raise NoPicture(
                f"{path} holds no settings: it was not drawn by run_infer.sh, or saved again by a "
                "program that dropped them"
            )
        try:
            height, width = (int(side) for side in text["size"].split("x"))
            settings = SampleSettings(
                size=ImageSize(height, width),
                steps=int(text["steps"]),
                cfg=float(text["cfg"]),
                guidance=None if text["guidance"] == "None" else float(text["guidance"]),
                schedule=Schedule.parse(text["schedule"]),
                seed=int(text["seed"]),
            )
            found = cls(text["prompt"], text["negative_prompt"], settings, int(text["index"]))
        except (KeyError, ValueError) as error:
            raise NoPicture(
                f"{path} was drawn by {SOFTWARE} {text.get('version', '?')}, and its settings are "
                f"not complete ({type(error).__name__}: {error})"
            ) from None
        names = {name: value for name, value in text.items() if name not in found.facts()}
        return replace(found, names=names)

    def differences(self, other: "Picture") -> Iterator[str]:
        """What another picture has otherwise than this one, an entry each."""
        known = self.facts()
        for name, now in other.facts().items():
            then = known.get(name, now)
            if str(then) != str(now) and name != "version":
                yield f"{name} {now} (the picture: {then})"
