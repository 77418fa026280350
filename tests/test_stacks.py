"""Both stacks on one machine: transformers 4.57 and 5 prune alike, and each loads what the other wrote.

The other interpreter is that of `.venv` or `.venv-current`, or named by LLMSHEARING_OTHER_PYTHON.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_stacks import CASES

from llmshearing.compat import FIVE

ROOT = Path(__file__).resolve().parent.parent
OTHER = Path(os.environ.get("LLMSHEARING_OTHER_PYTHON", ROOT / (".venv" if FIVE else ".venv-current") / "bin/python"))
NAMES = {False: "four", True: "five"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not OTHER.is_file():
        said = f"the other stack is not installed: no {OTHER} (make install STACK={'default' if FIVE else 'current'})"
        if os.environ.get("LLMSHEARING_BOTH_STACKS"):
            pytest.fail(said)
        pytest.skip(said)
    place = tmp_path_factory.mktemp("stacks")
    pythons = {FIVE: Path(sys.executable), not FIVE: OTHER}
    _run(pythons[False], "sources", place, "four")
    for step in ("prune", "judge"):
        for five, python in pythons.items():
            _run(python, step, place, NAMES[five])
    return place


def _run(python: Path, step: str, place: Path, name: str) -> None:
    path = os.pathsep.join(str(each) for each in (ROOT, ROOT / "tests", ROOT / "tests/families"))
    words = [str(python), str(ROOT / "tests/helpers_stacks.py"), step, str(place), name]
    found = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr[-4000:]


@pytest.mark.parametrize("case", CASES)
def test_both_write_the_same_bytes(place: Path, case: str) -> None:
    """All but what says which version wrote it."""
    four, five = (place / name / case for name in ("four", "five"))
    assert {file.name for file in four.iterdir()} == {file.name for file in five.iterdir()}
    assert (four / "model.safetensors").read_bytes() == (five / "model.safetensors").read_bytes()
    configs = [(folder / "config.json").read_text().splitlines() for folder in (four, five)]
    assert len(configs[0]) == len(configs[1])
    differ = [(one, other) for one, other in zip(*configs, strict=True) if one != other]
    assert [one.split('"')[1] for one, _ in differ] == ["transformers_version"]
    assert json.loads("\n".join(configs[0]))


@pytest.mark.parametrize("case", CASES)
def test_each_loads_what_the_other_wrote(place: Path, case: str) -> None:
    found = {name: dict(np.load(place / f"{name}.npz")) for name in NAMES.values()}
    for writer in ("sources", "four", "five"):
        one, other = (found[reader][f"{writer}/{case}"] for reader in NAMES.values())
        assert np.abs(one - other).max() < 1e-5
    assert np.abs(found["four"][f"sources/{case}"] - found["four"][f"four/{case}"]).max() > 1e-2
