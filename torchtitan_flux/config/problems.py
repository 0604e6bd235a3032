"""What is wrong with a configuration: collected as values, reported once."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with the value of a key.

    Attributes:
        key: "section.key", or another thing that the user sets ("NGPU"); empty where the message
            says it.
        message: what is wrong with its value, and the remedy.
        related: other keys that the rule is about.
        given: how and where the key was given; shown instead of its name.
    """

    key: str
    message: str
    related: tuple[str, ...] = ()
    given: str = ""

    def __str__(self) -> str:
        name = self.given or self.key
        return f"{name}: {self.message}" if name else self.message


def violated(*rules: tuple) -> Iterator[Problem]:
    """A problem for each rule (condition, key, message, *related keys) whose condition holds."""
    for condition, key, message, *related in rules:
        if condition:
            yield Problem(key, message, tuple(related))


class ConfigError(ValueError):
    """A configuration that cannot run; the message lists everything that is wrong."""

    def __init__(self, problems: Iterable[Problem | str]):
        self.problems = [
            Problem("", problem) if isinstance(problem, str) else problem for problem in problems
        ]
        super().__init__("\n".join(f"  - {problem}" for problem in self.problems))

    @property
    def found(self) -> list[str]:
        """A line for each problem."""
        return [str(problem) for problem in self.problems]


@contextmanager
def problem_of(key: str, *others: str) -> Iterator[None]:
    """What is raised within is a problem of a key: of the one that its message begins with.

    Raises:
        ConfigError: instead of a ValueError or OSError.
    """
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        text = str(error)
        named = next((name for name in (key, *others) if text.startswith(f"{name}: ")), key)
        raise ConfigError([Problem(named, text.removeprefix(f"{named}: "))]) from error


@contextmanager
def exit_on_config_error() -> Iterator[None]:
    """A wrong configuration ends the process: one report, status 2, no traceback."""
    try:
        yield
    except ConfigError as error:
        print(f"The configuration cannot run:\n{error}", file=sys.stderr)
        sys.exit(2)
