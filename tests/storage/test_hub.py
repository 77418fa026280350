"""Weights of Hugging Face models in each of their forms; an index cannot lead out of its folder."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmshearing.errors import ShearingError
from llmshearing.storage import open_weights

WEIGHTS = {"a": torch.randn(3, 4), "b": torch.arange(5).bfloat16(), "c": torch.tensor(1.5)}


def whole(folder: Path) -> None:
    save_file(WEIGHTS, folder / "model.safetensors", {"format": "pt"})


def split(folder: Path, weight_map: dict[str, str] | None = None) -> None:
    names = weight_map or {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    names = {"c": names["b"], **names}
    for file in set(names.values()):
        if file.startswith("model-"):
            save_file({name: WEIGHTS[name] for name in names if names[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def pickled(folder: Path) -> None:
    torch.save(WEIGHTS, folder / "pytorch_model.bin")


@pytest.mark.parametrize("write", [whole, split, pickled])
def test_every_form_is_read(tmp_path: Path, write: Callable) -> None:
    write(tmp_path)
    read = open_weights(tmp_path)
    assert read.keys() == WEIGHTS.keys() and read.shapes["a"] == (3, 4)
    assert all(value.dtype == WEIGHTS[name].dtype and torch.equal(value, WEIGHTS[name]) for name, value in read.items())


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/../../x", "..", "..\\x"])
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, file: str) -> None:
    (tmp_path / "in").mkdir()
    whole(tmp_path)
    split(tmp_path / "in", {"a": file, "b": "model-00002-of-00002.safetensors"})
    with pytest.raises(ShearingError, match="which is not beside it"):
        open_weights(tmp_path / "in")


def test_what_is_wrong_with_the_files_is_said(tmp_path: Path) -> None:
    with pytest.raises(ShearingError, match=r"has no model\.safetensors and no pytorch_model\.bin"):
        open_weights(tmp_path)
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    with pytest.raises(ShearingError, match="something else than tensors by name"):
        open_weights(tmp_path)
    whole(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    for bad in (content[:-3], content[:20], b"", b"text" * 10):
        (tmp_path / "model.safetensors").write_bytes(bad)
        with pytest.raises(ShearingError, match=r"model\.safetensors is damaged or no file of safetensors"):
            open_weights(tmp_path)
    save_file({"x": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ShearingError, match="has tensors of 'F8_E4M3'"):
        open_weights(tmp_path)
    split(tmp_path)
    (tmp_path / "model.safetensors").unlink(missing_ok=True)  # a single file is taken before the index
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ShearingError, match=r"model-00001-of-00002\.safetensors, which its index lists, is missing"):
        open_weights(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").symlink_to("model-00002-of-00002.safetensors")
    with pytest.raises(ShearingError, match=r"[bc] is in model-00002-of-00002\.safetensors and in another file"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ShearingError, match="is no index of weights"):
        open_weights(tmp_path)


def test_a_file_of_a_name_on_the_hub_comes_from_its_cache(tmp_path: Path) -> None:
    """The cache's own layout, offline. Where it is, is read once in a process."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    whole(snapshot)
    code = "from llmshearing.storage import find_file; print(find_file('owner/name', 'model.safetensors'))"
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_CACHE"}
    environment |= {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).resolve() == (snapshot / "model.safetensors").resolve()
