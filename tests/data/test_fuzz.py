"""Manifests, shard indexes and shards changed at random: one ShearingError that names the file, or what was written."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_fuzz import mutated, mutations
from hypothesis import given, settings
from hypothesis import strategies as st

from llmshearing.data.mds.manifest import MANIFEST, check_model, read_manifest, table
from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.errors import ShearingError

from .conftest import SEQ, VOCAB

SAMPLES = 9
leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["..", "../x", "/etc/passwd", "pkl", "mds", "zstd", "xxh64", "ndarray", "ndarray:uint64:16", -1])
)  # fmt: skip
values = st.recursive(leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3))


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """Every path into a JSON value but the empty one."""
    keys = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in keys for found in [(*path, key), *places(value, (*path, key))]]


def changed(tree: Any, data: st.DataObject) -> Any:
    """A copy in which the value at some path is another, or gone."""
    out = json.loads(json.dumps(tree))
    *path, last = data.draw(st.sampled_from(places(out)))
    inner = out
    for key in path:
        inner = inner[key]
    if data.draw(st.booleans()):
        del inner[last]
    else:
        inner[last] = data.draw(values)
    return out


@pytest.fixture(scope="module")
def manifest(prepared, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    return Path(shutil.copy(prepared / MANIFEST, folder / MANIFEST))


@pytest.fixture(scope="module", params=["hashed", "without a hash", "predecessor's"])
def shards(request, tmp_path_factory) -> Path:
    """An MDS directory of three shards, whose sample i is i everywhere."""
    from streaming import MDSWriter

    folder = tmp_path_factory.mktemp("shards") / "a"
    old = request.param == "predecessor's"
    columns = {"tokens": "bytes" if old else f"ndarray:uint16:{SEQ}", "set": "str"}
    hashes = ["xxh64"] if request.param == "hashed" else []
    with MDSWriter(out=str(folder), columns=columns, hashes=hashes, size_limit=300) as writer:
        for i in range(SAMPLES):
            tokens = np.full(SEQ, i, np.uint16)
            writer.write({"tokens": tokens.tobytes() if old else tokens, "set": "a"})
    return folder


def right_or_refused(folder: Path, intact: bool = True) -> bool:
    """Whether it was refused. `intact`: else what comes out is what was written, since the shards are whole."""
    try:
        directory = MdsDirectory(folder, SEQ, VOCAB)
        found = [directory[i] for i in range(len(directory))]
    except ShearingError as error:
        assert str(folder) in str(error)
        return True
    for tokens, name in found:
        assert tokens.shape == (SEQ,) and tokens.dtype == np.int64 and isinstance(name, str)
        assert tokens.min() >= 0 and tokens.max() < VOCAB
        assert not intact or (tokens.min() == tokens.max() < SAMPLES and name == "a")
    return False


def manifest_right_or_refused(path: Path) -> None:
    try:
        assert table(read_manifest(path.parent))
        check_model(path.parent, SEQ, VOCAB)
    except ShearingError as error:
        assert str(path) in str(error)


@given(data=st.data())
def test_a_manifest_of_another_structure(manifest: Path, prepared: Path, data) -> None:
    manifest.write_text(json.dumps(changed(json.loads((prepared / MANIFEST).read_text()), data)))
    manifest_right_or_refused(manifest)


@pytest.mark.parametrize(
    ("key", "value"),
    [("skipped", None), ("duplicates", None), ("duplicates", {"web": None}), ("duplicates", {"web": True}),
     ("skipped", {"web": {"count": 1, "first": []}}), ("skipped", {"web": {"count": None, "first": ["a:1"]}}),
     ("skipped", {"web": 3}), ("skipped", {"web": {"count": 1, "what": {"line": "1"}, "first": ["a:1"]}})],
)  # fmt: skip
def test_a_manifest_that_is_wrong_about_what_was_left_out(manifest: Path, prepared: Path, key, value) -> None:
    manifest.write_text(json.dumps({**json.loads((prepared / MANIFEST).read_text()), key: value}))
    with pytest.raises(ShearingError, match=f"{key}.*\n?.*copy it again"):
        read_manifest(manifest.parent)


@given(changes=mutations)
def test_a_manifest_with_bytes_changed(manifest: Path, prepared: Path, changes) -> None:
    manifest.write_bytes(mutated((prepared / MANIFEST).read_bytes(), changes))
    manifest_right_or_refused(manifest)


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_an_index_of_another_structure(shards: Path, data) -> None:
    index = shards / "index.json"
    whole = index.read_bytes()
    try:
        index.write_text(json.dumps(changed(json.loads(whole), data)))
        right_or_refused(shards)
    finally:
        index.write_bytes(whole)


@pytest.mark.parametrize("name", ["index.json", "shard.00001.mds"])
@given(changes=mutations)
@settings(deadline=None, max_examples=200)
def test_a_file_with_bytes_changed(shards: Path, name: str, changes) -> None:
    """A changed shard with a hash is refused; what comes out of one without are at least tokens of the vocabulary."""
    file = shards / name
    whole = file.read_bytes()
    hashed = all(shard["raw_data"]["hashes"] for shard in json.loads((shards / "index.json").read_bytes())["shards"])
    try:
        file.write_bytes(changed_bytes := mutated(whole, changes))
        refused = right_or_refused(shards, intact=name == "index.json")
        assert refused or not hashed or name == "index.json" or changed_bytes == whole
    finally:
        file.write_bytes(whole)
