"""The commands of README.md and docs/, as they stand, and the test that runs each of them.

A test takes its commands by `claimed(__file__, "test_name")`, which looks them up in RUN_BY; a
command that nobody claims fails tests/unit/test_documents.py.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", *sorted(f"docs/{path.name}" for path in (REPO / "docs").glob("*.md")))


@dataclass(frozen=True)
class Command:
    """One command, its lines joined and its comment removed."""

    document: str
    text: str

    @property
    def environment(self) -> dict[str, str]:
        """What is assigned before the program."""
        assigned = shlex.split(self.text)[: -len(self.words)]
        return dict(word.split("=", 1) for word in assigned)

    @property
    def words(self) -> list[str]:
        """The program and its arguments."""
        words = shlex.split(self.text)
        while re.match(r"[A-Z_]+=", words[0]):
            del words[0]
        return words


def read(document: str, text: str) -> list[Command]:
    """The commands in the bash blocks of a Markdown text, in its order."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
            found += [Command(document, text) for text in _commands_of(line)]
    return found


def commands(document: str) -> list[Command]:
    """The commands of a file of the repository."""
    return read(document, (REPO / document).read_text(encoding="utf-8"))


def block(document: str, kind: str, beginning: str) -> str:
    """The fenced block of this kind (`toml`, or nothing) with this beginning; there is one."""
    text = (REPO / document).read_text(encoding="utf-8")
    blocks = re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (found,) = (block for block in blocks if block.startswith(beginning))
    return found


def _commands_of(line: str) -> list[str]:
    """What `&&` joins; `#` begins a comment where a word may begin; neither inside quotes."""
    quoted = r""""[^"]*"|'[^']*'"""
    code = re.match(rf"""({quoted}|[^"'#]|(?<=\S)#)*""", line)
    assert code is not None
    parts = re.finditer(rf"""({quoted}|[^"'&]|(?<!&)&(?!&))+""", code[0])
    return [text for part in parts if (text := part[0].strip())]


# ---- who runs them ----------------------------------------------------------------------------

CI = ".ci/run"
"""What it runs needs a fresh virtual environment, or takes minutes."""

_HERE = "tests/integration/test_documented_commands.py::"
_TOOLS = "tests/integration/test_documented_tools.py::"
_JOURNEYS = "tests/unit/weights/test_convert_journeys.py::test_every_command_of_the_document"
_DOWNLOADS = "tests/integration/test_downloads.py::test_documented_commands_fetch_what_they_name"
_STRANGER = "tests/integration/test_strangers_path.py::test_a_wheel_from_install_to_report"

RUN_BY: dict[str, dict[str, str]] = {
    "README.md": {
        "pip install -r requirements-flux.txt": CI,
        "./run_train.sh": CI,
        'pip install -e ".[dev]"': CI,
        "pytest": CI,
        "./run_train.sh --": _HERE + "test_the_readme",
        "./run_infer.sh --": _HERE + "test_the_readme",
        "NGPU=2 ./run_train.sh": _HERE + "test_the_readme",
        "CONFIG_FILE=train_configs/debug_model.toml ./run_train.sh": _HERE + "test_the_readme",
        "python scripts/score_digits.py": _HERE + "test_the_score",
        "python scripts/report.py": _HERE + "test_the_readme",
        "python scripts/inspect_data.py": _HERE + "test_the_readme",
        "tensorboard": _HERE + "test_the_readme",
        "python scripts/download_hf_assets.py": _DOWNLOADS,
        "pip wheel": _STRANGER,
        "pip install dist": _STRANGER,
        "python -m torchtitan_flux.": _STRANGER,
    },
    "docs/checkpoints.md": {"python scripts/": _JOURNEYS},
    "docs/data.md": {
        "CONFIG_FILE=train_configs/debug_model.toml ./run_train.sh": _HERE + "test_data",
        "python scripts/inspect_data.py": _HERE + "test_data",
        "hf download": _HERE + "test_data",
    },
    "docs/downloads.md": {"python scripts/download_hf_assets.py": _DOWNLOADS},
    "docs/guide.md": {
        "CONFIG_FILE=my.toml ./run_train.sh": _HERE + "test_the_guide",
        "NGPU=2 CONFIG_FILE=my.toml ./run_train.sh": _HERE + "test_the_guide",
        "NGPU=8 CONFIG_FILE=my.toml ./run_train.sh": _HERE + "test_the_guide",
        "CONFIG_FILE=theirs.toml ./": _HERE + "test_the_guide",
        "CONFIG_FILE=my.toml ./run_infer.sh": _HERE + "test_the_guide",
        "python scripts/report.py": _HERE + "test_the_guide",
        "python scripts/download_hf_assets.py": _DOWNLOADS,
        "python scripts/plan.py": _TOOLS + "test_plans",
        "python scripts/loss_compare.py": _TOOLS + "test_comparing_losses",
    },
    "docs/inference.md": {
        "./run_infer.sh": _HERE + "test_drawing",
        "NGPU=2 ./run_infer.sh": _HERE + "test_drawing",
        "CONFIG_FILE=train_configs/flux_dev_model.toml ./run_infer.sh": _HERE + "test_drawing",
        "python -m torchtitan_flux.infer": _HERE + "test_drawing",
    },
    "docs/parallelism.md": {"python scripts/plan.py": _TOOLS + "test_plans"},
    "docs/report.md": {"python scripts/report.py": _HERE + "test_the_readme"},
    "docs/running.md": {
        "CONFIG_FILE=train_configs/debug_model.toml NGPU=2 ./run_train.sh": _HERE + "test_running",
        "NGPU=8 CONFIG_FILE=train_configs/flux_dev_model.toml ./run_train.sh": _HERE
        + "test_running",
        "./run_infer.sh": _HERE + "test_running",
        "NNODES=2": _TOOLS + "test_two_nodes",
        "CONFIG_FILE=train_configs/flux_schnell_model.toml sbatch": _TOOLS + "test_slurm",
        "torchrun": _TOOLS + "test_torchrun_alone",
        "python scripts/loss_compare.py": _TOOLS + "test_comparing_losses",
        "python -m tests.integration_tests.run_tests": _TOOLS + "test_the_integration_table",
        "python scripts/kill_test.py": _TOOLS + "test_the_kill_test",
    },
}
"""By document: how a command begins -> the test that runs it; the longest beginning counts."""


def runner(command: Command) -> str | None:
    """The test that runs a command."""
    table = RUN_BY.get(command.document, {})
    fitting = [beginning for beginning in table if command.text.startswith(beginning)]
    return table[max(fitting, key=len)] if fitting else None


def claimed(file: str, test: str) -> list[Command]:
    """The commands that a test runs, in the order of the documents.

    Args:
        file: `__file__` of the test.
        test: its name.

    Raises:
        ValueError: there are none.
    """
    name = f"{Path(file).resolve().relative_to(REPO)}::{test}"
    found = [c for document in DOCUMENTS for c in commands(document) if runner(c) == name]
    if not found:
        raise ValueError(f"{name} runs no command of README.md and docs/")
    return found
