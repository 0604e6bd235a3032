"""Times that pictures are drawn at: FLUX.1's schedules, and those that diffusers can be told.

A schedule carries the settings of diffusers' FlowMatchEulerDiscreteScheduler under their names, so
that `scheduler_config.json` is read and written as it is. What is not computed here is refused by
name.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from torchtitan_flux.flow_matching import SHIFT_BASE, SHIFT_MAX, resolution_mu, shift_times

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
TRAIN_TIMESTEPS = 1000
"""What FLUX.1 multiplies times by; with another number diffusers tells the model other times."""
_SWITCHES = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_flow_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)
"""What is not computed here."""
_ONLY_DYNAMIC = (
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "time_shift_type",
)


class Schedule(NamedTuple):
    """How times are placed between noise and data; the defaults are FLUX.1-schnell's, (n - k) / n.

    Times are moved towards noise by a factor alpha: alpha t / (1 + (alpha - 1) t)
    (arXiv:2403.03206, eq. 23).

    Attributes:
        shift: alpha, unless use_dynamic_shifting.
        use_dynamic_shifting: alpha follows from the number of packed image tokens, by mu, which is
            linear in it.
        base_shift, base_image_seq_len: mu at this many tokens.
        max_shift, max_image_seq_len: a second point of that line.
        time_shift_type: alpha is e^mu ("exponential"), or mu itself ("linear").
        shift_terminal: time of the last step, to which all are stretched; None leaves them.
    """

    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = SHIFT_BASE[1]
    max_shift: float = SHIFT_MAX[1]
    base_image_seq_len: int = SHIFT_BASE[0]
    max_image_seq_len: int = SHIFT_MAX[0]
    time_shift_type: str = "exponential"
    shift_terminal: float | None = None

    @classmethod
    def of_flavor(cls, guidance_embed: bool) -> "Schedule":
        """FLUX.1-dev's where a model has a guidance input, else FLUX.1-schnell's."""
        return DEV if guidance_embed else SCHNELL

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> "Schedule":
        """From what a `scheduler_config.json` holds; what is not there, or null, has the default.

        Raises:
            ValueError: names every setting that is not computed here, or makes no sense.
        """
        name = config.get("_class_name", SCHEDULER)
        if name != SCHEDULER:
            raise ValueError(f"it is a {name}; only {SCHEDULER} is computed here")
        wrong = [f"{key} = {config[key]!r}" for key in _SWITCHES if config.get(key)]
        if (steps := config.get("num_train_timesteps", TRAIN_TIMESTEPS)) != TRAIN_TIMESTEPS:
            wrong.append(f"num_train_timesteps = {steps!r}, FLUX.1 has {TRAIN_TIMESTEPS}")
        if wrong:
            raise ValueError(f"{'; '.join(wrong)}: not computed here")
        given = {key: config[key] for key in cls._fields if config.get(key) is not None}
        return cls(**given)._checked()

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """From what `str` makes of one: "dev", "schnell", or settings as "shift=3.0".

        Raises:
            ValueError: says what is wrong, and what can be given.
        """
        if text in _NAMED:
            return _NAMED[text]
        given: dict[str, Any] = {}
        for entry in text.split(","):
            key, equals, value = (part.strip() for part in entry.partition("="))
            if not equals or key not in cls._fields:
                raise ValueError(
                    f'{entry.strip()!r} is unknown; "dev", "schnell", or key=value with keys of '
                    f"{', '.join(cls._fields)}, as in shift=3.0"
                )
            if key in given:
                raise ValueError(f"{key} is given twice")
            try:
                given[key] = json.loads(value)
            except ValueError:
                given[key] = value
        dynamic = given.get("use_dynamic_shifting", False)
        idle = [key for key in (("shift",) if dynamic else _ONLY_DYNAMIC) if key in given]
        if idle:
            needs = "without" if dynamic else "with"
            raise ValueError(f"{', '.join(idle)} counts only {needs} use_dynamic_shifting=true")
        return cls(**given)._checked()

    def __str__(self) -> str:
        for name, one in _NAMED.items():
            if self._counting() == one._counting():
                return name
        return ",".join(
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in self._counting().items()
        )

    def config(self) -> dict[str, Any]:
        """`scheduler_config.json` that has diffusers draw at these times."""
        later = ("time_shift_type", "shift_terminal")  # than FLUX.1, so only where they count
        own = {
            key: value
            for key, value in self._asdict().items()
            if key not in later or value != self._field_defaults[key]
        }
        return {
            "_class_name": SCHEDULER,
            "_diffusers_version": "0.30.0",  # the first release with FLUX.1
            "num_train_timesteps": TRAIN_TIMESTEPS,
            **own,
        }

    def times(self, steps: int, tokens: int) -> np.ndarray:
        """steps + 1 float64 values from 1 down to 0.

        Args:
            steps: number of Euler steps, at least 1.
            tokens: packed image tokens of a picture.

        Raises:
            ValueError: there are no such times.
        """
        if steps < 1:
            raise ValueError(f"denoising steps must be at least 1, not {steps}")
        times = shift_times(np.linspace(1.0, 0.0, steps + 1), self._alpha(tokens))
        if self.shift_terminal is None:
            return times
        if steps < 2:
            raise ValueError(f"shift_terminal = {self.shift_terminal} needs at least 2 steps")
        # source: diffusers, `stretch_shift_to_terminal`; the step to 0 comes after the last time
        times[:-1] = 1 - (1 - times[:-1]) * (1 - self.shift_terminal) / (1 - times[-2])
        return times

    def _alpha(self, tokens: int) -> float:
        if not self.use_dynamic_shifting:
            return self.shift
        base = (self.base_image_seq_len, self.base_shift)
        mu = resolution_mu(tokens, base, (self.max_image_seq_len, self.max_shift))
        alpha = mu
        if self.time_shift_type == "exponential":
            alpha = math.exp(mu) if abs(mu) < _LARGEST_MU else 0.0
        if alpha <= 0:
            raise ValueError(
                f"at {tokens} image tokens the schedule {self} has mu = {mu:.4g}, which is out of "
                "range; take another size or another schedule"
            )
        return alpha

    def _counting(self) -> dict[str, Any]:
        """Settings that the times depend on, and that are not as the defaults are."""
        idle = ("shift",) if self.use_dynamic_shifting else _ONLY_DYNAMIC
        return {
            key: value
            for key, value in self._asdict().items()
            if key not in idle and value != self._field_defaults[key]
        }

    def _checked(self) -> "Schedule":
        """Of the right types: numbers are float, and 0 is no terminal (as in diffusers).

        Raises:
            ValueError: names every setting that makes no sense.
        """
        given = self._replace(shift_terminal=self.shift_terminal or None)
        wrong = [
            f"{key} = {value!r} is no number"
            for key, value in given._numbers().items()
            if not _is_number(value)
        ]
        if not wrong and given.shift <= 0:
            wrong.append(f"shift = {given.shift} must be positive")
        if not wrong and not 0 < (given.shift_terminal or 0.5) < 1:
            wrong.append(f"shift_terminal = {given.shift_terminal} is not between 0 and 1")
        if not isinstance(given.use_dynamic_shifting, bool):
            wrong.append(
                f"use_dynamic_shifting = {given.use_dynamic_shifting!r} is not true or false"
            )
        lengths = (given.base_image_seq_len, given.max_image_seq_len)
        if not all(type(one) is int for one in lengths) or lengths[0] == lengths[1]:
            wrong.append(
                f"base_image_seq_len = {lengths[0]!r} and max_image_seq_len = {lengths[1]!r} are "
                "not two different whole numbers"
            )
        if given.time_shift_type not in ("exponential", "linear"):
            wrong.append(
                f'time_shift_type = {given.time_shift_type!r} is not "exponential" or "linear"'
            )
        if wrong:
            raise ValueError("; ".join(wrong))
        return given._replace(**{key: float(value) for key, value in given._numbers().items()})

    def _numbers(self) -> dict[str, Any]:
        terminal = () if self.shift_terminal is None else ("shift_terminal",)
        return {key: getattr(self, key) for key in ("shift", "base_shift", "max_shift", *terminal)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_LARGEST_MU = 300.0
"""Beyond, e^mu and what it is multiplied with are no numbers any more."""

DEV = Schedule(shift=3.0, use_dynamic_shifting=True)
"""FLUX.1-dev's, as published: the shift is written, and not used with dynamic shifting."""
SCHNELL = Schedule()
_NAMED = {"dev": DEV, "schnell": SCHNELL}
