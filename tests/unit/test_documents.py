"""Every command of README.md and docs/ is claimed by a test that takes it from there."""

import ast
import shlex
from pathlib import Path

import documents
import pytest
from documents import CI, DOCUMENTS, REPO, RUN_BY, commands, read, runner

ALL = [command for document in DOCUMENTS for command in commands(document)]
TESTS = sorted({test for table in RUN_BY.values() for test in table.values()} - {CI})


def test_every_command_is_claimed():
    assert len(ALL) > 60
    assert [f"{c.document}: {c.text}" for c in ALL if runner(c) is None] == []


def test_every_claim_is_of_a_command():
    used = {(c.document, begin) for c in ALL for begin in RUN_BY[c.document] if _fits(c, begin)}
    assert used == {(document, begin) for document in RUN_BY for begin in RUN_BY[document]}


def _fits(command: documents.Command, beginning: str) -> bool:
    longer = [b for b in RUN_BY[command.document] if command.text.startswith(b)]
    return beginning in longer and len(beginning) == max(map(len, longer))


@pytest.mark.parametrize("test", TESTS)
def test_a_claiming_test_takes_its_commands_from_the_documents(test):
    """It calls `claimed(__file__, "its own name")`."""
    file, name = test.split("::")
    tree = ast.parse((REPO / file).read_text(encoding="utf-8"))
    (function,) = (f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == name)
    calls = [ast.unparse(node) for node in ast.walk(function) if isinstance(node, ast.Call)]
    assert f"claimed(__file__, {name!r})" in calls
    assert documents.claimed(str(REPO / file), name)


def test_what_ci_claims_is_in_it():
    """The words of the command in their order; some may come between."""
    lines = [shlex.split(line, comments=True) for line in _plain_lines(REPO / CI)]
    for command in ALL:
        if runner(command) == CI:
            assert any(_in_order(command.words, line) for line in lines), command.text


def _plain_lines(script: Path) -> list[str]:
    lines = script.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith(("pip ", "./", "python "))]


def _in_order(words: list[str], line: list[str]) -> bool:
    rest = iter(line)
    return all(word in rest for word in words)


def test_no_other_kind_of_block_holds_commands():
    kinds = {
        line.removeprefix("```")
        for document in DOCUMENTS
        for line in (REPO / document).read_text(encoding="utf-8").splitlines()
        if line.startswith("```")
    }
    assert kinds == {"", "bash", "python", "json", "toml"}


def test_commands_are_read_as_a_shell_would():
    text = """
```bash
# a remark
A=1 B='x #y' prog --key "a # b" c#d \\
    --more   # a comment && no command
one && two 'it && is'
```

```
not this
```
"""
    first, *others = read("x.md", text)
    assert first.text == "A=1 B='x #y' prog --key \"a # b\" c#d --more"
    assert first.environment == {"A": "1", "B": "x #y"}
    assert first.words == ["prog", "--key", "a # b", "c#d", "--more"]
    assert [command.text for command in others] == ["one", "two 'it && is'"]
