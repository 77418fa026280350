"""Sharded folders as torch.distributed.checkpoint writes them; hostile ones are refused, and run nothing."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers_storage import assert_same, made, save_sharded

from llmshearing.errors import ShearingError
from llmshearing.storage import open_archive

STATE: dict[str, Any] = {
    "state": {
        "model": {
            "model.a": torch.arange(20.0).view(5, 4), "model.b": torch.randn(3), "scalar": torch.tensor(2.5),
            "model.half": torch.randn(4, 2).bfloat16(),
        },
        "callbacks": {"Info": {"config": {"size": 1, "list": [1, 2], "dicts": [{"q": 1}, {"q": [3]}]}, "none": None}},
    },
    "rng": [{"cuda": torch.arange(3)}],
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The state by one process, and by two that hold half of each matrix."""
    root = tmp_path_factory.mktemp("sharded")
    return {ranks: save_sharded(root / str(ranks), STATE, ranks) for ranks in (1, 2)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_that_was_saved_is_read(folders: dict[int, Path], ranks: int) -> None:
    archive = open_archive(folders[ranks])
    archive.verify()
    assert_same(made(archive.subtree("state")), STATE["state"])
    assert_same(made(archive.subtree("rng")), STATE["rng"])
    assert archive.subtree("state", "nothing") is None
    if ranks == 2:
        assert (folders[2] / "__1_0.distcp").stat().st_size > 100  # its half is in there


@pytest.fixture
def folder(tmp_path: Path, folders: dict[int, Path]) -> Path:
    return Path(shutil.copytree(folders[2], tmp_path / "copy"))


def change(folder: Path, edit: Callable[[Any], None]) -> None:
    """Edit the records of torch.distributed.checkpoint."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


class Executes:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def place(metadata: Any, name: str) -> Any:
    """Where the bytes of an item's first piece are."""
    return next(value for key, value in metadata.storage_data.items() if key.fqn == name)


def chunks(metadata: Any) -> list[Any]:
    return metadata.state_dict_metadata[A].chunks


def swap_type(metadata: Any) -> None:
    metadata.state_dict_metadata[A].properties.dtype = torch.int32


A, B = "state.model.model.a", "state.model.model.b"
HOSTILE: dict[str, tuple[Callable[[Any], None], str]] = {
    "outside": (lambda m: setattr(place(m, A), "relative_path", "../x"), r"'\.\./x', which is not in the folder"),
    "absolute": (lambda m: setattr(place(m, B), "relative_path", "/etc/passwd"), "is not in the folder"),
    "no file": (lambda m: setattr(place(m, B), "relative_path", "x.distcp"), "x.distcp is missing"),
    "too far": (lambda m: setattr(place(m, B), "offset", 1 << 40), "is cut off"),
    "negative": (lambda m: setattr(place(m, B), "offset", -1), "damaged"),
    "huge": (lambda m: setattr(m.state_dict_metadata[A], "size", torch.Size([1 << 40, 4])), "do not make up its shape"),
    "hole": (lambda m: chunks(m).pop(), "do not make up its shape"),
    "twice": (lambda m: chunks(m).append(chunks(m)[0]), "do not make up its shape"),
    "piece": (lambda m: setattr(chunks(m)[0], "sizes", torch.Size([1 << 50, 4])), "does not fit into its"),
    "compressed": (lambda m: setattr(place(m, B), "transform_descriptors", ["stream.zstd/1"]), "is compressed"),
    "code": (lambda m: setattr(m, "planner_data", Executes()), r"builtins\.print does not belong"),
    "nothing": (lambda m: setattr(m, "storage_data", None), "damaged or not of"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_the_metadata_says_is_not_believed(folder: Path, case: str, capsys: pytest.CaptureFixture) -> None:
    edit, message = HOSTILE[case]
    change(folder, edit)
    with pytest.raises(ShearingError, match=message) as error:
        open_archive(folder)
    assert str(folder) in str(error.value)
    assert "executed" not in capsys.readouterr().out


def test_a_piece_that_is_another_tensor_is_refused(folder: Path) -> None:
    change(folder, swap_type)
    with pytest.raises(ShearingError, match=r"its part of state\.model\.model\.a is something else"):
        open_archive(folder).subtree("state", "model")["model.a"].make()


def test_damage_is_found_by_the_read_that_meets_it(folder: Path) -> None:
    whole = dcp.FileSystemReader(folder).read_metadata()
    at = place(whole, B)
    file = folder / at.relative_path
    data = bytearray(file.read_bytes())
    where = data.index(STATE["state"]["model"]["model.b"].numpy().tobytes())
    data[where] ^= 1
    file.write_bytes(data)
    archive = open_archive(folder)
    assert torch.equal(archive.subtree("state", "model")["model.a"].make(), STATE["state"]["model"]["model.a"])
    for read in (archive.subtree("state", "model")["model.b"].make, archive.verify):
        with pytest.raises(ShearingError, match=r"__0_0\.distcp is damaged: checksum"):
            read()


def test_missing_short_and_empty_files_are_named(folder: Path) -> None:
    (folder / "__1_0.distcp").write_bytes((folder / "__1_0.distcp").read_bytes()[:-10])
    with pytest.raises(ShearingError, match=r"__1_0\.distcp is cut off, [\d,]+ of [\d,]+ bytes"):
        open_archive(folder)
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(ShearingError, match=r"its file __1_0\.distcp is missing"):
        open_archive(folder)
    for content in (b"", b"text", pickle.dumps({"state": 1}), pickle.dumps(Executes())):
        (folder / ".metadata").write_bytes(content)
        with pytest.raises(ShearingError, match=r"\.metadata is damaged or not of torch\.distributed\.checkpoint"):
            open_archive(folder)
