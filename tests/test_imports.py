"""Imports point one way: train -> training -> prune -> megatron -> checkpoints -> masks -> fold, data -> families."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llmshearing"
# A module may import its own layer and what lies below it.
LAYERS = [
    {"errors", "progress", "compat", "onimport"},
    {"files", "families", "lookahead", "moved", "commands"},
    {"config", "storage"},
    {"fold", "data"},
    {"masks", "report"},
    {"checkpoints"},
    {"gguf"},
    {"megatron"},
    {"prune", "checkpoint"},
    {"training"},
    {"train", "utils", "evaluate"},
    {"finetune"},
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


# Training and writing its data; all else runs in an installation without the extra `train`.
MAY_TRAIN = ("train.py", "training/", "data/mixture/loader.py", "data/prepare/", "data/mds/remote.py")
TRAINING = {"composer", "streaming", "wandb", "tensorboard", "torchvision", "torchmetrics"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_composer_and_streaming_are_for_training_alone(path: Path) -> None:
    used = {module.split(".")[0] for module in imported(path)}
    if not str(path.relative_to(PACKAGE)).startswith(MAY_TRAIN):
        assert not used & TRAINING
    if room(path) in ("families", "fold", "masks", "storage", "prune"):
        assert "omegaconf" not in used


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to work in: models and a pruning run's checkpoint, from a process that cannot import Composer."""
    place = tmp_path_factory.mktemp("without")
    found = _commands(place, "import helpers_without; helpers_without.build('.')")
    assert found.returncode == 0, found.stderr
    return place


def _commands(place: Path, code: str) -> subprocess.CompletedProcess[str]:
    forbid = "import sys, helpers_forbid; helpers_forbid.install()"
    words = [sys.executable, "-c", f"{forbid}; {code}"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)


CORE = {
    "prune": ["prune", "random", "--model", "source", "--output", "small", "--target", "hidden_size=8",
              "--calibration", "mds", "--samples", "4", "--report_samples", "4"],
    "fold": ["fold", "run/latest-rank0.pt"],
    "convert": ["convert", "run/pruned-latest-rank0.pt", "folded"],
    "compare": ["compare", "folded", "run/pruned-latest-rank0.pt"],
    "evaluate": ["evaluate", "small", "--source", "source", "--data", "mds", "--output", "judged", "--prompt", "4",
                 "--generate", "2", "--rounds", "1"],
}  # fmt: skip


def test_the_core_runs_where_composer_and_streaming_cannot_be_imported(without: Path) -> None:
    """Calibration and losses are of prepared data (MDS), which Streaming wrote elsewhere."""
    code = f"from llmshearing.cli import main; sys.exit(max(main(words) for words in {list(CORE.values())}))"
    found = _commands(without, code)
    assert found.returncode == 0, found.stderr
    assert (without / "small/model.safetensors").is_file() and (without / "folded/model.safetensors").is_file()
    assert (without / "judged/evaluation.csv").is_file()


PREPARE = ["--input", ".", "--tokenizer", ".", "--output", "out", "--max_seq_len", "8"]


@pytest.mark.parametrize(("name", "words"), [("train", ["x.yaml"]), ("data prepare", PREPARE)])
def test_training_without_composer_says_what_to_install(tmp_path: Path, name: str, words: list[str]) -> None:
    found = _commands(tmp_path, f"from llmshearing.cli import main; sys.exit(main({[*name.split(), *words]}))")
    assert found.returncode == 1
    assert f"llmshearing {name} needs" in found.stderr and "pip install 'llmshearing[train]'" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(("module", "name"), [("train", "train"), ("training.cache.cli", "distill cache")])
def test_programs_of_their_own_say_it_too(tmp_path: Path, module: str, name: str) -> None:
    """`python -m` of a module that imports Composer at its top, and the launcher's way, which is the same."""
    code = f"import runpy; sys.argv = ['x', 'x.yaml']; runpy.run_module('llmshearing.{module}', run_name='__main__')"
    found = _commands(tmp_path, code)
    said = f"error: llmshearing {name} needs composer, which is not installed: pip install 'llmshearing[train]'"
    assert (found.returncode, found.stderr.splitlines()[-1]) == (1, said) and "Traceback" not in found.stderr


def test_importing_the_package_takes_less_than_50_milliseconds() -> None:
    """The fastest of five processes; what is measured is user time, which other work does not lengthen much."""
    code = (
        "import resource; u = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_utime; a = u();"
        "import llmshearing; print(u() - a)"
    )
    found = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True) for _ in range(5)]
    assert min(float(each.stdout) for each in found) < 0.05


def test_config_loads_without_torch() -> None:
    code = "import sys, llmshearing.config; sys.exit(bool({'torch', 'transformers', 'composer'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
