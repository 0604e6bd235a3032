"""Times that pictures are drawn at: FLUX.1's schedules, and others that diffusers can be told.

A schedule has the settings of diffusers' FlowMatchEulerDiscreteScheduler under their names, so that
`scheduler_config.json` is read and written as it is; what is not computed here is refused by name.
"""

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field, StrictBool, StrictInt, TypeAdapter, ValidationError

from torchtitan_flux.flow_matching import SHIFT_BASE, SHIFT_MAX, resolution_mu, shift_times

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
TRAIN_TIMESTEPS = 1000
"""What FLUX.1 multiplies times by; with another number diffusers tells the model other times."""
_UNSUPPORTED = (
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas"),
    *("invert_sigmas", "stochastic_sampling", "shift_terminal"),
)
_ONLY_DYNAMIC = {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"}
_LARGEST_MU = 300.0
"""Beyond, e^mu and its products overflow."""

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Schedule(NamedTuple):
    """How times are placed between noise and data; the defaults are FLUX.1-schnell's, (n - k) / n.

    Times are moved towards noise by a factor alpha: alpha t / (1 + (alpha - 1) t)
    (arXiv:2403.03206, eq. 23).

    Attributes:
        shift: alpha, unless use_dynamic_shifting.
        use_dynamic_shifting: alpha is e^mu, and mu is linear in the number of image tokens.
        base_shift, base_image_seq_len: mu at this many tokens.
        max_shift, max_image_seq_len: a second point of that line.
    """

    shift: Annotated[Number, Field(gt=0)] = 1.0
    use_dynamic_shifting: StrictBool = False
    base_shift: Number = SHIFT_BASE[1]
    max_shift: Number = SHIFT_MAX[1]
    base_image_seq_len: StrictInt = SHIFT_BASE[0]
    max_image_seq_len: StrictInt = SHIFT_MAX[0]

    @classmethod
    def of_flavor(cls, guidance_embed: bool) -> "Schedule":
        """FLUX.1-dev's where a model has a guidance input, else FLUX.1-schnell's."""
        return DEV if guidance_embed else SCHNELL

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> "Schedule":
        """From a `scheduler_config.json`; what is missing or null has the default.

        Raises:
            ValueError: names every setting that is not computed here, or is invalid.
        """
        name = config.get("_class_name", SCHEDULER)
        if name != SCHEDULER:
            raise ValueError(f"it is a {name}; only {SCHEDULER} is computed here")
        wrong = [f"{key} = {config[key]!r}" for key in _UNSUPPORTED if config.get(key)]
        if (steps := config.get("num_train_timesteps", TRAIN_TIMESTEPS)) != TRAIN_TIMESTEPS:
            wrong.append(f"num_train_timesteps = {steps!r}, FLUX.1 has {TRAIN_TIMESTEPS}")
        if (kind := config.get("time_shift_type") or "exponential") != "exponential":
            wrong.append(f"time_shift_type = {kind!r}")
        if wrong:
            raise ValueError(f"{'; '.join(wrong)}: not computed here")
        given = {key: config[key] for key in cls._fields if config.get(key) is not None}
        return cls(**given)._validated()

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """The inverse of `str`: "dev", "schnell", or settings as "shift=3.0".

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
            try:
                given[key] = json.loads(value)
            except ValueError:
                given[key] = value
        schedule = cls(**given)._validated()
        if unused := given.keys() & schedule._unused():
            needs = "without" if schedule.use_dynamic_shifting else "with"
            raise ValueError(f"{', '.join(unused)} counts only {needs} use_dynamic_shifting=true")
        return schedule

    def __str__(self) -> str:
        for name, one in _NAMED.items():
            if self._effective() == one._effective():
                return name
        settings = self._effective().items()
        return ",".join(f"{key}={json.dumps(value)}" for key, value in settings)

    def config(self) -> dict[str, Any]:
        """`scheduler_config.json` that has diffusers draw at these times."""
        return {
            "_class_name": SCHEDULER,
            "_diffusers_version": "0.30.0",  # the first release with FLUX.1
            "num_train_timesteps": TRAIN_TIMESTEPS,
            **self._asdict(),
        }

    def times(self, steps: int, tokens: int) -> np.ndarray:
        """steps + 1 float64 values from 1 down to 0, for so many packed image tokens.

        Raises:
            ValueError: there are no such times.
        """
        if steps < 1:
            raise ValueError(f"denoising steps must be at least 1, not {steps}")
        return shift_times(np.linspace(1.0, 0.0, steps + 1), self._alpha(tokens))

    def _alpha(self, tokens: int) -> float:
        if not self.use_dynamic_shifting:
            return self.shift
        base = (self.base_image_seq_len, self.base_shift)
        mu = resolution_mu(tokens, base, (self.max_image_seq_len, self.max_shift))
        if abs(mu) > _LARGEST_MU:
            raise ValueError(
                f"at {tokens} image tokens the schedule {self} has mu = {mu:.4g}, which is out of "
                "range; take another size or another schedule"
            )
        return math.exp(mu)

    def _effective(self) -> dict[str, Any]:
        """Settings that the times depend on, where they are not the defaults."""
        unused, defaults = self._unused(), self._field_defaults
        settings = self._asdict().items()
        return {k: value for k, value in settings if k not in unused and value != defaults[k]}

    def _unused(self) -> set[str]:
        return {"shift"} if self.use_dynamic_shifting else _ONLY_DYNAMIC

    def _validated(self) -> "Schedule":
        """With numbers as float."""
        try:
            given = _VALIDATOR.validate_python(self._asdict())
        except ValidationError as error:
            wrong = [f"{e['loc'][0]} = {e['input']!r}: {e['msg']}" for e in error.errors()]
            raise ValueError("; ".join(wrong)) from None
        if given.base_image_seq_len == given.max_image_seq_len:
            raise ValueError("base_image_seq_len and max_image_seq_len must differ")
        return given


_VALIDATOR = TypeAdapter(Schedule)

DEV = Schedule(shift=3.0, use_dynamic_shifting=True)
"""FLUX.1-dev's, as published: the shift is written, and not used with dynamic shifting."""
SCHNELL = Schedule()
_NAMED = {"dev": DEV, "schnell": SCHNELL}
