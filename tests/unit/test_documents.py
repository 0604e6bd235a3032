"""What README.md and docs/ name is there: links, keys and options of commands."""

import re
from pathlib import Path

import pytest
from documents import DOCUMENTS, REPO, Command, commands, read

from torchtitan_flux import infer
from torchtitan_flux.startup.load_config import read_config

STARTS = [
    command
    for document in DOCUMENTS
    for command in commands(document)
    if command.words[0].endswith(("run_train.sh", "run_infer.sh"))
]
STANDARD = "train_configs/flux_digits.toml"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    targets = re.findall(r"\]\((?!http)([^)#]+)", read(document))
    assert [t for t in targets if not (REPO / document).parent.joinpath(t).exists()] == []


@pytest.mark.parametrize("command", STARTS, ids=lambda c: f"{c.document}: {c.text}"[:90])
def test_keys_and_options_of_a_start_exist(command: Command):
    """And have a value of their type."""
    words = [word for word in command.words[1:] if word != "--check"]
    if "--from-png" in words:
        return  # what it needs is in the picture
    if "--job.config_file" not in words:
        config = Path(command.environment.get("CONFIG_FILE", STANDARD))
        words += ["--job.config_file", str(config if (REPO / config).exists() else STANDARD)]
    read_config(infer.parse(words)[1] if "infer" in command.words[0] else words)


def test_readme_is_short():
    assert len(read("README.md").splitlines()) <= 150


def test_the_set_up_of_readme_is_what_ci_runs():
    ci = (REPO / ".ci/run").read_text(encoding="utf-8")
    for words in ("pip install -q -r requirements-flux.txt", "./run_train.sh", "python -m pytest"):
        assert words in ci
