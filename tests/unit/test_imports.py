"""Imports of torchtitan_flux point only downwards, and torchtitan is the installed one."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "torchtitan_flux"
ROOT = Path(__file__).resolve().parents[2]

LEVELS = {
    "torchtitan_shim": 0,
    "latents": 0,
    "lifetime": 0,
    "files": 0,
    "collectives": 0,
    "formatting": 0,
    "paths": 0,
    "image_file": 1,
    "randomness": 0,
    "adafactor": 1,
    "shards": 0,
    "tensor_files": 1,
    "flow_matching": 1,
    "model": 2,
    "config": 3,
    "encoders": 4,
    "optimizers": 4,
    "sampling": 5,
    "data": 5,
    "checkpoint": 5,
    "weights": 6,
    "parallel": 7,
    "downloads": 7,
    "startup": 8,
    "evaluation": 9,
    "training": 10,
    "planning": 11,
    "report": 11,
    "inference": 11,
    "launching": 12,
    "inspection": 13,
    "infer": 14,
    "train": 14,
    "launch": 15,
}
"""Module or sub-package -> level; a module imports from lower levels or its own sub-package."""

WITH_TORCHTITAN = {
    "torchtitan_shim",
    "config",
    "startup",
    "report",
    "optimizers",
    "parallel",
    "checkpoint",
    "weights",
    "planning",
    "training",
    "inference",
    "evaluation",
    "infer",
    "train",
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
        if part and part not in levels:
            found.append(f"{module}: {part} has no level")
            continue
        shim_first = False
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, name in sorted(imports(tree, module, is_package)):
            head, target = name.split(".")[0], part_of(name)
            wrong = ""
            if head == "torchtitan" or (head == package.name and target == "torchtitan_shim"):
                if part not in with_torchtitan:
                    wrong = f"may not import {target if head == package.name else head}"
                elif head == "torchtitan" and part != "torchtitan_shim" and not shim_first:
                    wrong = "imports torchtitan before torchtitan_shim"
                shim_first = True
            if not wrong and head == package.name and target not in ("", "__version__"):
                if not part:
                    wrong = "the package itself imports nothing of its own"
                elif target not in levels:
                    wrong = f"{name} has no level"
                elif target != part and levels[target] >= levels[part]:
                    wrong = f"{part} may not import {target}"
            if wrong:
                found.append(f"{module}:{line}: {wrong}")
    return found


def test_imports_point_downwards():
    assert violations(ROOT / PACKAGE, LEVELS, WITH_TORCHTITAN) == []


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
        "import torchtitan_flux.model, torchtitan_flux.flow_matching\n"
        "import torchtitan_flux.sampling.euler\n"
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


def test_training_imports_what_it_uses():
    """Torch, torchtitan, and of our own dependencies only what a step needs."""
    unwanted = (
        "sklearn scipy matplotlib plotly diffusers accelerate torchao transformers.modeling_utils "
        "torchtitan_flux.planning.estimate "
        "torchtitan_flux.evaluation.digits torchtitan_flux.report.page"
    )
    found = run_python(
        "import sys, torchtitan_flux.train\n"
        f"print([name for name in {unwanted.split()!r} if name in sys.modules])"
    )
    assert found.splitlines()[-1] == "[]"
