"""Imports point one way: train -> training -> prune -> megatron -> checkpoints -> masks -> fold, data -> families."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llmshearing"
# A module may import its own layer and what lies below it.
LAYERS = [
    {"errors", "progress", "compat"},
    {"files", "families", "lookahead", "moved", "commands"},
    {"config", "storage"},
    {"fold", "data"},
    {"masks"},
    {"checkpoints"},
    {"gguf"},
    {"megatron"},
    {"prune", "checkpoint"},
    {"training"},
    {"train", "utils", "evaluate"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    """First part of a module's name below the package."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    assert room(path) in LEVEL, f"{room(path)}: give it a layer here"
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("llmshearing.")} & set(LEVEL)
    assert {name for name in rooms if LEVEL[name] > LEVEL[room(path)]} == set()
    assert {name for name in rooms if name != room(path) and LEVEL[name] == LEVEL[room(path)]} == set()


@pytest.mark.parametrize("name", ["families", "fold", "masks", "storage", "prune"])
def test_the_core_needs_neither_composer_nor_streaming(name: str) -> None:
    files = [path for path in MODULES if room(path) == name]
    used = {module.split(".")[0] for path in files for module in imported(path)}
    assert not used & {"composer", "streaming", "wandb", "omegaconf"}


def test_config_loads_without_torch() -> None:
    code = "import sys, llmshearing.config; sys.exit(bool({'torch', 'transformers', 'composer'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
