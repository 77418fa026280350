"""The record of a run: what a resume takes back, what a kill leaves, what is damaged; maps and pictures."""

import json
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmshearing.errors import ShearingError
from llmshearing.report.images import curve_image, map_image
from llmshearing.report.maps import TOP, WIDTH, binned, decoded, encoded
from llmshearing.report.read import read_run
from llmshearing.report.record import RUN_FILE, Recorder


def steps(record, first, last):
    for batch in range(first, last + 1):
        record.step(batch, 10 * batch, 0.5, {"loss/train/cross_entropy": float(batch)})
    return record


def test_a_resumed_run_takes_back_what_was_lost(tmp_path):
    record = steps(Recorder(tmp_path).start("train", "first"), 1, 7)
    for batch in (4, 6):
        record.evaluation(batch, 10 * batch, 1.0, {"web": 1.0})
    record.end(7, "stopped")
    going_on = steps(Recorder(tmp_path).start("train", "again", batch=4, fresh=False), 5, 6)
    run = read_run(tmp_path)
    assert list(run.steps) == [1, 2, 3, 4, 5, 6] and list(run.evaluations) == [4]
    assert len(run.starts) == 2 and run.end is None and run.last_batch == 6
    going_on.evaluation(6, 60, 2.0, {"web": 2.0})
    assert read_run(tmp_path).evaluations[6]["loss"] == 2.0
    steps(Recorder(tmp_path).start("train", "anew"), 1, 2)
    assert list(read_run(tmp_path).steps) == [1, 2]


@pytest.mark.parametrize("left", [b'{"event": "st', b'{"event": "step", "batch": 3, "tok', b"\xff\xfe"])
def test_a_line_cut_off_by_a_kill(tmp_path, left):
    steps(Recorder(tmp_path).start("train", "first"), 1, 2)
    with open(tmp_path / RUN_FILE, "ab") as file:
        file.write(left)
    assert list(read_run(tmp_path).steps) == [1, 2]
    steps(Recorder(tmp_path).start("train", "again", batch=2, fresh=False), 3, 3)
    assert list(read_run(tmp_path).steps) == [1, 2, 3]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("{", "no JSON object"),
        ("[1]", "no JSON object"),
        ('{"event": 3}', "no JSON object with an event"),
        ('{"event": "step", "batch": 1, "tokens": 2, "seconds": 0.1}', "values of its step is absent, not dict"),
        (
            '{"event": "step", "batch": "1", "tokens": 2, "seconds": 0.1, "values": {}}',
            "batch of its step is '1', not int",
        ),
        ('{"event": "step", "batch": 1, "tokens": 2, "seconds": 0.1, "values": {"a": "b"}}', "'a' is 'b', no number"),
        (
            '{"event": "evaluation", "batch": 1, "tokens": 2, "loss": 1, "domains": {"a": []}, "mixture": {}}',
            "'a' is []",
        ),
        ('{"event": "table", "title": "a", "columns": [], "rows": [[]]}', "rows of its table"),
        ('{"event": "points", "x": "a", "y": "b", "points": [{"name": 1}]}', "its points need"),
        (
            '{"event": "maps", "batch": 1, "maps": {"kept": {"a": {"units": 3, "rows": [3], "sums": [1]}}}}',
            "rows of text",
        ),
        (
            '{"event": "maps", "batch": 1, "maps": {"kept": {"a": {"units": 3, "rows": ["A"], "sums": []}}}}',
            "a sum for",
        ),
        ("[" * 5000, "no JSON object"),
    ],
)
def test_damaged_lines_are_named(tmp_path, line, wanted):
    steps(Recorder(tmp_path).start("train", "first"), 1, 2)
    path = tmp_path / RUN_FILE
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]))
    with pytest.raises(ShearingError) as raised:
        read_run(tmp_path)
    assert f"{path}, line 2 is damaged: " in str(raised.value) and wanted in str(raised.value)


def test_what_is_no_record(tmp_path):
    for make, wanted in (
        (lambda: None, f"is no run: it has no {RUN_FILE}"),
        (lambda: (tmp_path / RUN_FILE).write_text(""), "is empty"),
        (lambda: (tmp_path / RUN_FILE).write_text('{"event": "start", "format": "other"}\n'), "'other', not"),
        (lambda: (tmp_path / RUN_FILE).write_bytes(b"\x00\x01"), "no record of a run"),
    ):
        make()
        with pytest.raises(ShearingError, match=wanted):
            read_run(tmp_path)
    with pytest.raises(ShearingError, match="no such folder"):
        read_run(tmp_path / "absent")


def test_events_of_later_versions_pass(tmp_path):
    steps(Recorder(tmp_path).start("train", "first"), 1, 1)._write("hologram", {"x": 1})
    assert list(read_run(tmp_path).steps) == [1]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    Recorder(tmp_path).start("train", "t").step(1, 2, 0.1, {"a": float("nan"), "b": float("-inf"), "c": 1 / 3})
    line = (tmp_path / RUN_FILE).read_text().splitlines()[1]
    assert json.loads(line, parse_constant=pytest.fail)["values"] == {"a": None, "b": None, "c": 0.3333333}


def test_a_full_disk_is_told_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        record = Recorder(tmp_path / "file").start("train", "a folder that cannot be")
        steps(record, 1, 5).end(5)
    assert len(caplog.records) == 1 and "is not written any more" in caplog.text
    caplog.clear()
    record = Recorder(tmp_path / "ok").start("train", "t")
    record._file.close()
    record._file = open("/dev/full", "w")  # noqa: SIM115 - every flush fails as on a full disk
    steps(record, 1, 5).end(5)
    assert len(caplog.records) == 1 and list(read_run(tmp_path / "ok").steps) == []


@given(st.integers(1, 700), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_maps_are_means_of_neighbours(size, layers, seed):
    values = np.random.default_rng(seed).random((layers, size))
    found = encoded(values)
    width = min(size, WIDTH)
    assert found["units"] == size and found["sums"] == pytest.approx(values.sum(1))
    for row, cells in zip(values, decoded(found["rows"]), strict=True):
        assert len(cells) == width
        for cell in range(width):  # the slow way
            start, end = int(cell * size / width), int((cell + 1) * size / width)
            assert abs(cells[cell] - row[start:end].mean()) <= 0.5 / TOP + 1e-9
    assert len(binned(values[0])) == width


def test_pictures():
    found = encoded([[1.0, 0.0], [0.0, 1.0]])
    image = map_image(found)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[1] == 512
    half = image.shape[0] // 2
    assert image[0, 0].tolist() == image[half, -1].tolist() == [29, 91, 145] != image[0, -1].tolist()
    curve = curve_image([1.0, 0.0], [0.0, 1.0])
    blue = (curve == [29, 91, 145]).all(-1)
    rows = [np.flatnonzero(blue[:, column]).mean() for column in (5, 256, 506)]
    assert rows[0] > rows[1] > rows[2] and blue.any(0).all()
