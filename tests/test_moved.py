"""Scripts of before the rooms find what they import."""

import subprocess
import sys
from importlib import import_module

import pytest

from llmshearing.moved import MOVED

OLD = {
    "llmshearing.axes": ("Selection", "Table", "fold", "gate_and_gather"),
    "llmshearing.gating": ("attach", "detach"),
    "llmshearing.checkpoint": ("read_checkpoint", "CheckpointInfo"),
    "llmshearing.data.shards": ("MdsDirectory",),
    "llmshearing.pruners.decoder": ("find_decoder",),
    "llmshearing.convert.hf": ("load_hf_model",),
    "llmshearing.callbacks.saver": ("Saver",),
}


@pytest.mark.parametrize("name", MOVED)
def test_every_old_name_leads_to_modules_that_exist(name):
    old = import_module(f"llmshearing.{name}")
    for new in MOVED[name]:
        assert {key for key in vars(import_module(f"llmshearing.{new}")) if not key.startswith("__")} <= set(vars(old))


@pytest.mark.parametrize("name", OLD)
def test_objects_are_the_same_ones(name):
    old = import_module(name)
    found = {key: getattr(old, key, None) for key in OLD[name]}
    assert all(value is not None for value in found.values()) or name.endswith("saver"), found


def test_importing_the_package_imports_none_of_them():
    code = "import sys, llmshearing; sys.exit(len([m for m in sys.modules if m.startswith('llmshearing.')]) > 2)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
