"""Ids in MDS shards that other tools wrote: every way of storing them gives the same ids, or is refused and named."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from streaming import MDSWriter

from llmshearing.data.inspect import inspect
from llmshearing.data.mds.shards import MdsDirectory
from llmshearing.data.mds.tokens import recognise
from llmshearing.errors import ShearingError
from llmshearing.prune.calibration import SequenceOptions, read_calibration

BYTES = ["<u2", "<i4", "<u4", "<i8", "<u8"]


def write(folder: Path, rows: np.ndarray, dtype: str, array: bool = False, name: str = "web") -> Path:
    """An MDS directory of rows [N, T], stored as an array or as plain bytes of a dtype."""
    kind = f"ndarray:{np.dtype(dtype).name}" if array else "bytes"
    with MDSWriter(out=str(folder), columns={"tokens": kind, "set": "str"}) as writer:
        for row in rows:
            stored = row.astype(dtype)
            writer.write({"tokens": stored if array else stored.tobytes(), "set": name})
    return folder


@given(
    dtype=st.sampled_from(BYTES), length=st.integers(1, 40), number=st.integers(1, 5),
    vocab=st.sampled_from([11, 400, 32_000, 65_536, 70_000, 151_936]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(deadline=None)
def test_bytes_of_any_width_are_told_by_what_they_can_be(dtype, length, number, vocab, seed):
    """The right length is known, or there are ids enough; then the width is the one they were written in."""
    top = min(vocab, 65_536) if dtype == "<u2" else vocab
    rows = np.random.default_rng(seed).integers(1, top, (number, length))
    samples = [row.astype(dtype).tobytes() for row in rows]
    found = recognise(samples, length, vocab)
    assert np.array_equal(np.frombuffer(samples[0], found), rows[0])
    if rows.size >= 8:  # whatever length is asked for
        assert recognise(samples, None, vocab) == recognise(samples, 4 * length, vocab) == found


@given(length=st.integers(1, 40), ids=st.lists(st.integers(0, 10), min_size=1, max_size=40), vocab=st.integers(11, 99))
def test_a_narrow_reading_is_never_taken_for_a_wide_one(length, ids, vocab):
    """Ids of 16 bits with even one of the second tokens above 0 fit no wider width."""
    assume(len(ids) >= 2 and any(ids[1::2]) and vocab < 65_536)
    assert recognise([np.array(ids, "<u2").tobytes()], length, vocab) == np.dtype("<u2")


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("array", [True, False])
def test_every_reader_sees_the_same_ids(tmp_path, dtype, array):
    rows = np.random.default_rng(0).integers(2, 400, (20, 32))
    for split in ("for_prune", "eval_merge"):
        write(tmp_path / split, rows, dtype, array)
    directory = MdsDirectory(tmp_path / "for_prune", 32, 400)
    assert np.array_equal(np.stack([directory[i][0] for i in range(20)]), rows)
    assert directory[3][0].dtype == np.int64
    shown = inspect(tmp_path, samples=20)
    assert all(f"[web {i}] {row.tolist()}" in shown for i, row in enumerate(rows))
    found = read_calibration(tmp_path, tmp_path, 400, 64, SequenceOptions(samples=20, report_samples=20))
    assert np.array_equal(found.select.numpy(), rows) and np.array_equal(found.report.numpy(), rows)


@pytest.mark.parametrize("dtype, length, asked", [("<i8", 32, 128), ("<i4", 16, 32), ("<i8", 8, 32), ("<i4", 4, 8)])
def test_a_length_that_only_fits_another_width_is_refused_with_the_width(tmp_path, dtype, length, asked):
    folder = write(tmp_path / "a", np.random.default_rng(0).integers(2, 400, (9, length)), dtype)
    said = rf"{length} tokens long \(bytes of {8 * np.dtype(dtype).itemsize}-bit ids\), max_seq_len is {asked}"
    with pytest.raises(ShearingError, match=said):
        MdsDirectory(folder, asked, 400)


def test_a_sequence_of_zeros_is_what_its_length_says(tmp_path):
    rows = np.zeros((3, 16), int)
    assert MdsDirectory(write(tmp_path / "a", rows, "<u2"), 16, 400)[0][0].tolist() == [0] * 16
    assert MdsDirectory(write(tmp_path / "b", rows, "<i8"), 16, 400)[0][0].tolist() == [0] * 16
    with pytest.raises(ShearingError, match="64 of 16 bits, 32 of 32 bits, 16 of 64 bits cannot be told"):
        MdsDirectory(tmp_path / "b", 12, 400)
    with pytest.raises(ShearingError, match="max_seq_len is not given"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    "rows, dtype, said",
    [
        (np.full((2, 16), -100), "<i8", "64 bits: from -100 to -100"),
        (np.full((2, 16), 500), "<u2", "16 bits: from 500 to 500"),
        (np.full((2, 16), 0.5), "<f4", "no token ids below vocab_size = 400"),
        (np.full((2, 15), 7), "u1", "16 bits: not a whole number of ids"),
    ],
)
def test_bytes_that_are_no_ids_are_refused(tmp_path, rows, dtype, said):
    with pytest.raises(ShearingError, match=said):
        MdsDirectory(write(tmp_path / "a", rows, dtype), 16, 400)


def test_a_later_sample_of_another_width_is_refused(tmp_path):
    rows = np.random.default_rng(0).integers(2, 400, (66, 32))
    with MDSWriter(out=str(tmp_path / "a"), columns={"tokens": "bytes", "set": "str"}) as writer:
        for i, row in enumerate(rows):
            stored = row.astype("<u2") if i < 65 else row[:16].astype("<i4")
            writer.write({"tokens": stored.tobytes(), "set": "web"})
    directory = MdsDirectory(tmp_path / "a", 32, 400)
    assert directory[64][0].tolist() == rows[64].tolist()
    with pytest.raises(ShearingError, match="sample 65: its ids have 32 bits, those of the first samples 16"):
        directory[65]


def test_arrays_that_are_no_row_of_ids_are_refused(tmp_path):
    for name, kind, tokens, said in (
        ("a", "ndarray:float32", np.ones(16, np.float32), "of float32"),
        ("b", "ndarray:int64", np.full(16, -1), "below 0"),
        ("c", "ndarray:uint16:4,4", np.ones((4, 4), np.uint16), r"the shape \[4, 4\], not one row"),
    ):
        with MDSWriter(out=str(tmp_path / name), columns={"tokens": kind, "set": "str"}) as writer:
            writer.write({"tokens": tokens, "set": "web"})
        with pytest.raises(ShearingError, match=said):
            MdsDirectory(tmp_path / name, 16, 400)


@given(
    compression=st.sampled_from([None, "zstd", "gz"]), more=st.booleans(), indent=st.sampled_from([None, 2]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]), hashes=st.booleans(), backwards=st.booleans(),
    dtype=st.sampled_from(BYTES), array=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_an_odd_directory_is_its_sequences(
    tmp_path_factory, compression, more, indent, encoding, hashes, backwards, dtype, array
):
    rows = np.random.default_rng(1).integers(2, 400, (30, 16))
    folder = tmp_path_factory.mktemp("odd") / "a"
    columns = {"tokens": f"ndarray:{np.dtype(dtype).name}" if array else "bytes", "set": "str"}
    columns |= {"another": "int"} if more else {}
    settings = {"compression": compression, "hashes": ["sha1"] if hashes else [], "size_limit": 700}
    with MDSWriter(out=str(folder), columns=columns, **settings) as writer:
        for row in rows:
            stored = row.astype(dtype)
            writer.write({"tokens": stored if array else stored.tobytes(), "set": "web", "another": 7})
    index = json.loads((folder / "index.json").read_text())
    index = dict(reversed(index.items())) if backwards else index
    (folder / "index.json").write_text(json.dumps(index, indent=indent), encoding=encoding)
    directory = MdsDirectory(folder, 16, 400)
    assert np.array_equal(np.stack([directory[i][0] for i in range(30)]), rows) and directory.names() == ["web"] * 30


def test_calibration_needs_two_parts(tmp_path):
    folder = write(tmp_path / "a", np.ones((3, 16), int), "<u2")
    with pytest.raises(ShearingError, match="is one MDS directory, which cannot both choose and report"):
        read_calibration(folder, folder, 400, 64, SequenceOptions())
