"""Bytes changed at random: each reader gives one ShearingError, or the right values.

Checksums catch nearly all of it; so pickles are changed behind a right checksum too, where values may differ.
"""

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_fuzz import mutated, mutations
from helpers_storage import assert_same, made, save_sharded
from hypothesis import given, settings

from llmshearing.errors import ShearingError
from llmshearing.storage import open_archive

STATE: dict[str, Any] = {
    "state": {
        "model": {"model.a": torch.arange(20.0).view(5, 4), "model.b": torch.randn(3).bfloat16()},
        "callbacks": {"Info": {"config": {"size": 1, "list": [1, 2]}, "none": None}},
    }
}


def read(path: Path) -> Any:
    archive = open_archive(path)
    values = made(archive.subtree("state"))
    archive.verify()
    return values


def right_or_refused(path: Path) -> None:
    try:
        values = read(path)
    except ShearingError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert_same(values, STATE["state"])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "x.pt"
    torch.save(STATE, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sharded(tmp_path_factory.mktemp("fuzz") / "sharded", STATE)


@settings(max_examples=150)
@given(changes=mutations)
def test_a_file_of_torch_save(file: Path, changes: list) -> None:
    (target := file.with_name("y.pt")).write_bytes(mutated(file.read_bytes(), changes))
    right_or_refused(target)


@settings(max_examples=150)
@given(changes=mutations)
def test_its_pickle_behind_a_right_checksum(file: Path, changes: list) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(buffer, "w") as new:
        for record in old.infolist():
            data = old.read(record)
            new.writestr(record.filename, mutated(data, changes) if record.filename.endswith("data.pkl") else data)
    (target := file.with_name("z.pt")).write_bytes(buffer.getvalue())
    refused_if_anything(lambda: read(target))


def refused_if_anything(reading: Callable[[], Any]) -> None:
    try:
        reading()
    except ShearingError as error:
        assert str(error)


@settings(max_examples=150)
@given(changes=mutations)
def test_metadata_of_a_sharded_folder(folder: Path, changes: list) -> None:
    """It has no checksum of its own: a name or a number in it may change, and then says so or is of no consequence."""
    target = folder.with_name("metadata")
    shutil.copytree(folder, target, dirs_exist_ok=True)
    (target / ".metadata").write_bytes(mutated((folder / ".metadata").read_bytes(), changes))
    refused_if_anything(lambda: read(target))


@settings(max_examples=100)
@given(changes=mutations)
def test_pieces_of_a_sharded_folder(folder: Path, changes: list) -> None:
    target = folder.with_name("pieces")
    shutil.copytree(folder, target, dirs_exist_ok=True)
    (target / "__0_0.distcp").write_bytes(mutated((folder / "__0_0.distcp").read_bytes(), changes))
    right_or_refused(target)
