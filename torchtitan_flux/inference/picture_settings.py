"""What a picture of ours says of itself, and what of it is read again."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torchtitan_flux
from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.image_file import read_facts
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.sampling.generate import SampleSettings
from torchtitan_flux.sampling.schedules import DEV, SCHNELL, Schedule

SOFTWARE = "torchtitan-flux"


class NoPicture(ValueError):
    """A file that says nothing of how it was drawn; the message says why."""


@dataclass(frozen=True)
class PictureSettings:
    """How a picture was drawn.

    Attributes:
        prompt, negative_prompt: captions.
        settings: size, steps, guidance, schedule, seed.
        index: of the picture; its noise is a function of (seed, index).
        names: flavor, weights, encoders by their names. They are text: nothing that a picture names
            is ever opened.
    """

    prompt: str
    negative_prompt: str
    settings: SampleSettings
    index: int
    names: Mapping[str, str]

    def facts(self) -> dict[str, str | int]:
        """For `save_picture`."""
        return {
            **self.settings.facts(),
            **self.names,
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "index": self.index,
            "software": SOFTWARE,
            "version": torchtitan_flux.__version__,
        }

    @classmethod
    def read(cls, path: Path) -> "PictureSettings":
        """From a PNG, JPEG or WebP.

        Raises:
            NoPicture: it is none, or not one that run_infer.sh wrote.
        """
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
                schedule=_schedule(text),
                seed=int(text["seed"]),
            )
            captions = text["prompt"], text["negative_prompt"]
            names = {name: text[name] for name in NAMES if name in text}
            return cls(*captions, settings, int(text["index"]), names)
        except (KeyError, ValueError) as error:
            raise NoPicture(
                f"{path} was drawn by {SOFTWARE} {text.get('version', '?')}, and what it says of "
                f"itself is not complete ({type(error).__name__}: {error})"
            ) from None

    def differences(self, names: Mapping[str, str]) -> Iterator[str]:
        """What of `names` is another than the picture's, an entry each."""
        for name, now in names.items():
            then = self.names.get(name, now)
            if then != now:
                yield f"{name} {now} (the picture: {then})"


NAMES = (
    "flavor",
    "dtype",
    "text_tokens",
    "t5",
    "clip",
    "autoencoder",
    "weights",
    "checkpoint",
    "step",
)


def names_of(config: FluxJobConfig, weights: Path, own: bool) -> dict[str, str]:
    """What a picture names of what it is drawn with.

    Args:
        config: of the drawing.
        weights: file or folder.
        own: whether they are the run's checkpoint.
    """
    encoder = config.encoder
    return {
        "flavor": config.model.flavor,
        "dtype": config.training.mixed_precision_param,
        "text_tokens": str(encoder.max_t5_encoding_len),
        "t5": encoder.t5_encoder,
        "clip": encoder.clip_encoder,
        "autoencoder": encoder.autoencoder_path,
        "checkpoint" if own else "weights": str(weights),
        **({"step": weights.name.removeprefix("step-")} if own else {}),
    }


def _schedule(text: Mapping[str, str]) -> Schedule:
    if "schedule" not in text and "shifted" in text:  # drawn before there were others
        return {"True": DEV, "False": SCHNELL}[text["shifted"]]
    return Schedule.parse(text["schedule"])
