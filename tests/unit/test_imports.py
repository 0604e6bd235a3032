"""Imports of torchtitan_flux point only downwards, and torchtitan is the installed one."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "torchtitan_flux"
ROOT = Path(__file__).resolve().parents[2]

LEVELS = {
    "engine": 0,
    "latents": 0,
    "lifetime": 0,
    "durable": 0,
    "paths": 0,
    "file_kinds": 0,
    "file_sets": 0,
    "weight_kinds": 0,
    "image_file": 0,
    "randomness": 0,
    "state_dict_keys": 0,
    "element_types": 0,
    "quantized": 0,
    "flow_matching": 1,
    "sampling": 2,
    "schedules": 2,
    "model": 2,
    "encoders": 2,
    "checkpoint": 3,
    "generate": 3,
    "config": 4,
    "data": 3,
    "parallel": 5,
    "downloads": 5,
    "evaluation": 5,
    "planning": 6,
    "report": 6,
    "training": 7,
    "inference": 8,
    "launching": 8,
    "inspection": 9,
    "infer": 9,
    "launch": 10,
}
"""Module or sub-package -> level; a module imports from lower levels or its own sub-package."""

WITH_TORCHTITAN = {
    "engine",
    "config",
    "parallel",
    "checkpoint",
    "planning",
    "training",
    "inference",
    "infer",
    "launch",
}


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything imported, inside functions as well.

    `from a import b` counts as a.b: b may be a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def part_of(name: str) -> str:
    """The module or sub-package right below the package: torchtitan_flux.data.order -> data."""
    return name.split(".")[1] if "." in name else ""


def violations(package: Path, levels: dict[str, int], with_torchtitan: set[str]) -> list[str]:
    """Every import of the package's modules that the rules forbid, as "module:line: why"."""
    found = []
    for path in sorted(package.rglob("*.py")):
        names = path.relative_to(package.parent).with_suffix("").parts
        is_package = names[-1] == "__init__"
        module = ".".join(names[:-1] if is_package else names)
        part = part_of(module)
        lines = sorted(imports(ast.parse(path.read_text(encoding="utf-8")), module, is_package))
        if part and part not in levels:
            found.append(f"{module}: {part} has no level")
            continue
        engine_line = None
        for line, name in lines:
            where = f"{module}:{line}"
            head, target = name.split(".")[0], part_of(name)
            if head == package.name:
                if target == "engine" and part not in with_torchtitan:
                    found.append(f"{where}: may not import the engine")
                if target == "engine" and engine_line is None:
                    engine_line = line
                if target in ("", "__version__"):
                    continue
                if not part:
                    found.append(f"{where}: the package itself imports nothing of its own")
                elif target not in levels:
                    found.append(f"{where}: {name} has no level")
                elif target != part and levels[target] >= levels[part]:
                    found.append(f"{where}: {part} may not import {target}")
            elif head == "torchtitan":
                if part not in with_torchtitan:
                    found.append(f"{where}: may not import torchtitan")
                elif part != "engine" and engine_line is None:
                    found.append(f"{where}: imports torchtitan before the engine")
    return found


def test_imports_point_downwards():
    assert violations(ROOT / PACKAGE, LEVELS, WITH_TORCHTITAN) == []


def test_the_check_finds_what_it_should(tmp_path):
    package = tmp_path / "pkg"
    files = {
        "__init__.py": '__version__ = "1"\n',
        "low.py": "import torch\n\n\ndef f():\n    from pkg.high import thing\n",
        "high/__init__.py": "from pkg.high.a import x\nfrom . import a\nfrom .. import low\n",
        "high/a.py": "import pkg.top\nfrom ..peer import p\nfrom .b import y\n",
        "high/b.py": "from pkg import engine, low\nfrom torchtitan.config import X\n",
        "peer.py": "import torchtitan_flux\nfrom torchtitan import train\nimport pkg.low as low\n",
        "top.py": "def main():\n    import torchtitan.tools\n\nfrom pkg import engine\n",
        "engine.py": "import torchtitan\n",
        "stray.py": "",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    levels = {"engine": 0, "low": 0, "high": 1, "peer": 1, "top": 2}
    assert violations(package, levels, {"engine", "high", "top"}) == [
        "pkg.high.a:1: high may not import top",
        "pkg.high.a:2: high may not import peer",
        "pkg.low:5: low may not import high",
        "pkg.peer:2: may not import torchtitan",
        "pkg.stray: stray has no level",
        "pkg.top:2: imports torchtitan before the engine",
    ]


def run_python(code: str) -> str:
    """Run code in a fresh interpreter started from the repository root."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_library_loads_no_torchtitan():
    """The model, the flow step and the sampler serve where torchtitan is not installed."""
    loaded = run_python(
        "import sys, torchtitan_flux\n"
        "assert 'torch' not in sys.modules, 'the package alone is light'\n"
        "import torchtitan_flux.model, torchtitan_flux.flow_matching, torchtitan_flux.sampling\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('torchtitan', 'transformers')])"
    )
    assert loaded == "[]"


def test_torchtitan_is_the_installed_one():
    """The folder torchtitan/ of the repository must not shadow it, whoever comes first on
    sys.path."""
    origin = run_python(
        "import importlib.util\nprint(importlib.util.find_spec('torchtitan').origin)"
    )
    assert Path(origin).name == "__init__.py"
    assert "site-packages" in Path(origin).parts
    assert ROOT / "torchtitan" not in Path(origin).parents


def test_the_folder_torchtitan_holds_no_python():
    folder = ROOT / "torchtitan"
    if not folder.is_dir():
        pytest.skip("not started from a checkout")
    assert [str(p) for p in folder.rglob("*") if p.suffix in (".py", ".pyi", ".so")] == []
