"""The commands of README.md and docs/, as they stand."""

import itertools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", *sorted(f"docs/{path.name}" for path in (REPO / "docs").glob("*.md")))


@dataclass(frozen=True)
class Command:
    document: str
    text: str

    @property
    def environment(self) -> dict[str, str]:
        """What is assigned before the program."""
        words = shlex.split(self.text, comments=True)
        assigned = itertools.takewhile(re.compile(r"[A-Z_]+=").match, words)
        return dict(word.split("=", 1) for word in assigned)

    @property
    def words(self) -> list[str]:
        """The program and its arguments."""
        return shlex.split(self.text, comments=True)[len(self.environment) :]


def read(document: str) -> str:
    return (REPO / document).read_text(encoding="utf-8")


def commands(document: str) -> list[Command]:
    """What the bash blocks of a document run, in its order; `&&` joins two."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", read(document), re.DOTALL | re.MULTILINE):
        for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
            found += [part.strip() for part in line.split(" && ")]
    return [Command(document, text) for text in found if text and not text.startswith("#")]
