"""Our reading of MDS beside Streaming's own: what its writer writes, both decode alike."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from streaming import MDSWriter
from streaming.base.compression import compress, get_compressions
from streaming.base.format.mds import MDSReader
from streaming.base.format.mds.encodings import get_mds_encoded_size, mds_encode
from streaming.base.hashing import get_hash, get_hashes

from llmshearing.data.mds.compression import NAMES, PACKAGES, decompress
from llmshearing.data.mds.format import DTYPES, HASHES, Shard, digest
from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.errors import ShearingError

FILE = {"basename": "shard.00000.mds", "bytes": 1, "hashes": {}}


@st.composite
def columns(draw):
    """Columns [(name, encoding, value)] of every kind that ids and names come in, and of some that are passed over."""
    found = []
    for number in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["ndarray", "str", "bytes", "int", "json"]))
        value = {
            "ndarray": arrays(st.sampled_from(sorted(DTYPES.values())), array_shapes(max_dims=3, max_side=300)),
            "str": st.text(), "bytes": st.binary(), "int": st.integers(-9, 9), "json": st.lists(st.integers()),
        }[kind]  # fmt: skip
        value = draw(value)
        if kind == "ndarray":
            shape = ",".join(map(str, value.shape))
            kind = draw(st.sampled_from(["ndarray", f"ndarray:{value.dtype}", f"ndarray:{value.dtype}:{shape}"]))
        found.append((f"c{number}", kind, value))
    return found


@given(columns())
def test_samples_are_decoded_as_streaming_does(found):
    names, kinds, values = map(list, zip(*found, strict=True))
    sizes = [get_mds_encoded_size(kind) for kind in kinds]
    stored = [mds_encode(kind, value) for kind, value in zip(kinds, values, strict=True)]
    told = [len(data) for data, size in zip(stored, sizes, strict=True) if size is None]
    data = np.array(told, np.uint32).tobytes() + b"".join(stored)
    entry = {"column_names": names, "column_encodings": kinds, "column_sizes": sizes, "samples": 1,
             "raw_data": FILE, "zip_data": None, "compression": None}  # fmt: skip
    reader = MDSReader.from_json(
        "", None, {**entry, "version": 2, "format": "mds", "hashes": [], "size_limit": None}
    ).decode_sample(data)
    ours = Shard.of(entry).decode(data)
    assert set(ours) == {name for name, kind, _ in found if kind.startswith(("ndarray", "str", "bytes"))}
    for name, value in ours.items():
        assert type(value) is type(reader[name])
        assert np.array_equal(value, reader[name]) or value.tobytes() == reader[name].tobytes()  # NaN
        assert getattr(value, "dtype", None) == getattr(reader[name], "dtype", None)
    for end in range(0, len(data), 1 + len(data) // 5):
        with pytest.raises(Exception):  # the caller names the file
            Shard.of(entry).decode(data[:end])


def test_names_are_those_of_streaming():
    assert NAMES == get_compressions() and set(HASHES) == get_hashes()
    assert all(digest(name, b"shard") == get_hash(name, b"shard") for name in HASHES)


@pytest.mark.parametrize("name", sorted(name for name in NAMES if ":" not in name or name == "zstd:19"))
def test_what_streaming_compresses_is_read(tmp_path, name):
    data = np.random.default_rng(0).integers(0, 9, 10_000).tobytes()
    assert decompress(name, compress(name, data), len(data)) == data
    rows = np.random.default_rng(1).integers(0, 400, (20, 32)).astype("uint16")
    with MDSWriter(out=str(tmp_path), columns={"tokens": "ndarray:uint16:32", "set": "str"}, compression=name,
                   hashes=["sha1", "xxh64"]) as writer:  # fmt: skip
        for row in rows:
            writer.write({"tokens": row, "set": "web"})
    directory = MdsDirectory(tmp_path, None, None)
    assert np.array_equal([directory[i][0] for i in range(20)], rows)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_compression_without_its_package_is_named(name, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, PACKAGES[name][0], None)
    with pytest.raises(ShearingError, match=f"pip install {PACKAGES[name][1]}"):
        decompress(name, b"", 0)


@pytest.mark.parametrize("name", ["gz", "bz2", "zstd"])
def test_a_compressed_file_opens_to_no_more_than_the_index_says(name):
    assert len(decompress(name, compress(name, bytes(10_000_000)), 100)) == 101
