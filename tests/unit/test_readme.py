"""The README's file map is true: every module has its line, and every line its file."""

import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
README = (REPO / "README.md").read_text()
MAP = README.split("## File map")[1].split("```")[1]


def mapped() -> set[str]:
    """Paths of torchtitan_flux that the map names."""
    found, folder = set(), ""
    for line in MAP.split("torchtitan_flux/\n")[1].splitlines():
        if match := re.match(r"  (\w+)/$", line):
            folder = f"{match[1]}/"
        elif match := re.match(r"    (\w+\.py) ", line):
            found.add(folder + match[1])
        elif match := re.match(r"  (\w+\.py) ", line):
            found.add(match[1])
    return found


def test_the_file_map_has_one_line_for_each_file():
    package = REPO / "torchtitan_flux"
    files = {str(p.relative_to(package)) for p in package.rglob("*.py")}
    assert mapped() == {f for f in files if not f.endswith("__init__.py")}


def test_every_file_named_in_the_readme_exists():
    names = re.findall(r"(?:scripts|examples|docs|train_configs|tests)/[\w/.-]+\w", README)
    assert len(names) > 8
    assert [name for name in names if not (REPO / name).exists()] == []
