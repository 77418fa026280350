"""Files of torch.save, tensor by tensor, against torch.load; damage is found by the read that meets it."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_storage import assert_same, made
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from llmshearing.errors import ShearingError
from llmshearing.storage import open_archive

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Whole, a view into a larger storage, or transposed."""
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    value = torch.randint(0, 2, [size + 2 for size in shape]).to(draw(st.sampled_from(DTYPES)))
    part = value[tuple(slice(1, 1 + size) for size in shape)]
    turned = part.clone().permute(list(reversed(range(part.dim()))))
    return draw(st.sampled_from([part, part.clone(), turned]))


plain = st.one_of(st.integers(-(2**40), 2**40), st.none(), st.text(), st.booleans(), st.floats(allow_nan=False))


@given(values=st.dictionaries(st.text(max_size=5), st.one_of(tensors(), plain), max_size=5))
def test_all_that_torch_saves_is_read(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("t") / "x.pt"
    state = {"deep": [values, {"shared": list(values.values())}]}
    torch.save(state, path)
    archive = open_archive(path)
    assert_same(made(archive.subtree()), torch.load(path, weights_only=True))
    archive.verify()


def test_one_tensor_under_two_names_is_one(tmp_path: Path) -> None:
    one = torch.arange(6.0).view(2, 3)
    torch.save({"a": one, "b": one, "t": one.t(), "other": one.clone()}, tmp_path / "x.pt")
    read = open_archive(tmp_path / "x.pt").subtree()
    assert read["a"] is read["b"] and read["t"] is not read["a"] and read["other"] is not read["a"]
    assert torch.equal(read["t"].make(), one.t()) and read["t"].shape == (3, 2)


def test_tensors_of_a_gpu_and_plain_arrays_are_read_here(tmp_path: Path) -> None:
    with FakeTensorMode():
        on_gpu = torch.empty(3, 4, device="cuda", dtype=torch.bfloat16)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({"gpu": on_gpu, "array": np.arange(3)}, tmp_path / "x.pt")
    read = open_archive(tmp_path / "x.pt").subtree()
    assert read["gpu"].dtype == torch.bfloat16 and read["gpu"].shape == (3, 4)
    assert read["array"].tolist() == [0, 1, 2]


def test_nothing_is_read_before_it_is_asked_for_and_damage_is_found_then(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"good": torch.zeros(1000), "bad": torch.ones(1000)}, path)
    with zipfile.ZipFile(path) as file:
        record = file.getinfo("x/data/1")
    data = bytearray(path.read_bytes())
    data[record.header_offset + 2000] ^= 1
    path.write_bytes(data)
    archive = open_archive(path)
    assert torch.equal(archive.subtree("good").make(), torch.zeros(1000))
    for read in (archive.subtree("bad").make, archive.verify):
        with pytest.raises(ShearingError, match=r"damaged: checksum of its record x/data/1 is wrong"):
            read()


def test_a_compressed_record_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record), zipfile.ZIP_DEFLATED)
    with pytest.raises(ShearingError, match="is compressed or cut off"):
        open_archive(tmp_path / "y.pt")


@pytest.mark.parametrize("others_allow_it", [False, True])
def test_a_refused_pickle_is_not_advised_to_be_loaded_anyway(tmp_path: Path, others_allow_it: bool) -> None:
    torch.save({"a": Path("x")}, tmp_path / "x.pt")
    elsewhere = [type(Path("x"))] if others_allow_it else []  # by a library of the process, as megatron-core does
    with torch.serialization.safe_globals(elsewhere):
        before = torch.serialization.get_safe_globals()
        with pytest.raises(ShearingError, match=r"it names pathlib\.[\w.]+, which is no plain data") as error:
            open_archive(tmp_path / "x.pt")
        assert set(torch.serialization.get_safe_globals()) == set(before)  # its list comes in no order
    assert "weights_only" not in str(error.value)
