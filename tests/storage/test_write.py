"""What is written tensor by tensor is what torch.save and safetensors write: their own readers read it."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmshearing.errors import ShearingError
from llmshearing.storage import LazyTensor, lazily, write_safetensors, write_torch_file
from llmshearing.storage.write import DTYPES

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def values_of(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(0, 2, shape).to(dtype)


@given(kinds=st.lists(st.tuples(shapes, st.sampled_from(list(DTYPES))), max_size=5))
def test_torch_loads_it_in_each_of_its_ways(tmp_path_factory: pytest.TempPathFactory, kinds: list) -> None:
    path = tmp_path_factory.mktemp("w") / "x.pt"
    weights = {f"t{at}": values_of(*kind) for at, kind in enumerate(kinds)}
    lazy = lazily(weights).entries
    write_torch_file(path, {"state": {"model": lazy, "again": list(lazy.values())}, "plain": [1, "a", None, 2.5]})
    for mmap in (False, True):
        state = torch.load(path, weights_only=True, mmap=mmap)
        assert state["plain"] == [1, "a", None, 2.5]
        for (name, value), again in zip(weights.items(), state["state"]["again"], strict=True):
            read = state["state"]["model"][name]
            assert read.dtype == value.dtype and torch.equal(read, value) and read.is_contiguous()
            assert read.data_ptr() == again.data_ptr()
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None


def test_tensors_begin_where_torch_would_align_them(tmp_path: Path) -> None:
    weights = {f"{'n' * at}": torch.arange(at, dtype=torch.float64) for at in range(1, 40)}
    path = write_torch_file(tmp_path / "x.pt", lazily(weights).entries)
    for value in torch.load(path, weights_only=True, mmap=True).values():
        assert value.untyped_storage().data_ptr() % 64 == 0
    assert path.read_bytes() == write_torch_file(tmp_path / "y.pt", lazily(weights).entries).read_bytes()


def test_transposed_and_partial_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    weights = {"t": torch.arange(6).view(2, 3).t(), "part": torch.arange(100)[10:20:2]}
    read = torch.load(write_torch_file(tmp_path / "x.pt", lazily(weights).entries), weights_only=True)
    assert all(torch.equal(read[name], value) for name, value in weights.items())
    write_safetensors(tmp_path / "x.safetensors", lazily(weights).entries)
    assert all(torch.equal(value, weights[name]) for name, value in load_file(tmp_path / "x.safetensors").items())


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_safetensors_writes_the_same_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {name: values_of(shape, dtype) for name, shape in {"b": (3, 2), "a": (), "c": (0, 4), "ä": (5,)}.items()}
    save_file(weights, tmp_path / "theirs", {"format": "pt"})
    write_safetensors(tmp_path / "ours", lazily(weights).entries)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@given(kinds=st.lists(st.tuples(shapes, st.sampled_from(list(DTYPES))), max_size=5))
def test_safetensors_reads_it(tmp_path_factory: pytest.TempPathFactory, kinds: list) -> None:
    path = tmp_path_factory.mktemp("w") / "x.safetensors"
    weights = {f"t{at}": values_of(*kind) for at, kind in enumerate(kinds)}
    read = load_file(write_safetensors(path, lazily(weights).entries))
    assert read.keys() == weights.keys()
    assert all(value.dtype == weights[name].dtype and torch.equal(value, weights[name]) for name, value in read.items())


@pytest.mark.parametrize("write", [write_torch_file, write_safetensors])
def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path, write: Callable) -> None:
    path = tmp_path / "x"
    path.write_text("before")

    def fails() -> torch.Tensor:
        raise ShearingError("its source is damaged")

    good = LazyTensor((2,), torch.float32, lambda: torch.zeros(2))
    cases = {
        "its source is damaged": LazyTensor((2,), torch.float32, fails),
        r"\[2\] torch.float32 was announced, \[3\] torch.float32 was made": LazyTensor(
            (2,), torch.float32, lambda: torch.zeros(3)
        ),
        "torch.complex64 cannot be written": LazyTensor((2,), torch.complex64, lambda: torch.zeros(2).cfloat()),
    }
    for message, bad in cases.items():
        with pytest.raises(ShearingError, match=message):
            write(path, {"good": good, "bad": bad})
        assert path.read_text() == "before" and [item.name for item in tmp_path.iterdir()] == ["x"]
    with pytest.raises(ShearingError, match=r"x/y cannot be written"):
        write(path / "y", {"good": good})


def test_progress_is_told(tmp_path: Path) -> None:
    calls: list[int] = []
    tensor = LazyTensor((2,), torch.float32, lambda: torch.zeros(2))
    other = LazyTensor((2,), torch.float32, lambda: torch.zeros(2))
    write_torch_file(tmp_path / "x.pt", {"a": tensor, "tied": tensor, "b": other}, lambda: calls.append(1))
    assert len(calls) == 2
