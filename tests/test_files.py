"""Files and folders appear whole or not at all."""

import os
import re
from pathlib import Path

import pytest

from llmshearing import files
from llmshearing.errors import ShearingError

PACKAGE = Path(files.__file__).parent


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "below" / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(KeyError), files.whole(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise KeyError
    assert path.read_text() == "old" and os.listdir(path.parent) == ["a.txt"]
    files.write_text(path, "new", alone=False)
    assert path.read_text() == "new" and os.listdir(path.parent) == ["a.txt"]


def test_processes_that_write_one_file_have_names_of_their_own(tmp_path):
    with files.whole(tmp_path / "a", alone=False) as one, files.whole(tmp_path / "a") as other:
        assert one != other
        with files.whole(tmp_path / "a", alone=False) as third:  # of the same number on another machine
            assert third != one
            one.touch(), other.touch(), third.touch()


def test_content_is_on_disk_before_the_name_moves(tmp_path, monkeypatch):
    done = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), real["fsync"](fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append((str(a), str(b))), real["replace"](a, b)))
    path, temporary = tmp_path / "a", str(tmp_path / ".a.tmp")
    files.write_text(path, "x")
    assert done == [temporary, (temporary, str(path)), str(tmp_path)]


def test_a_folder_takes_the_place_of_the_old_one_when_it_is_whole(tmp_path):
    path = tmp_path / "model"
    for text in ("one", "two"):
        with files.whole_folder(path) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / "file").write_text(text)
        assert (path / "sub" / "file").read_text() == text and os.listdir(tmp_path) == ["model"]
    with pytest.raises(KeyError), files.whole_folder(path) as temporary:
        (temporary / "file").write_text("half")
        raise KeyError
    assert (path / "sub" / "file").read_text() == "two" and os.listdir(tmp_path) == ["model"]


def test_the_old_folder_comes_back_if_the_new_one_cannot_get_its_name(tmp_path, monkeypatch):
    path, real = tmp_path / "model", os.replace
    path.mkdir(), (path / "file").write_text("old")

    def replace(source, target):
        if str(source).endswith(".tmp"):
            raise OSError("no")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError), files.whole_folder(path) as temporary:
        (temporary / "file").write_text("new")
    assert (path / "file").read_text() == "old" and os.listdir(tmp_path) == ["model"]


def test_a_file_that_cannot_be_written_is_one_error(tmp_path):
    with pytest.raises(ShearingError, match="nothing/x cannot be written"):
        (tmp_path / "nothing").touch()
        with files.new_file(tmp_path / "nothing" / "x"):
            pass


def test_nothing_in_the_package_moves_files_by_itself():
    """`os.replace` and `Path.rename` without a flush leave an empty file under the final name after a power cut."""
    bypass = re.compile(r"os\.(replace|rename)\(|\.rename\(|shutil\.move")
    found = {str(path) for path in PACKAGE.rglob("*.py") if bypass.search(path.read_text(encoding="utf-8"))}
    assert found == {str(PACKAGE / "files.py")}
