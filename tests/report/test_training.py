"""The record of real runs: what was logged and saved, on the page, in TensorBoard, after a resume; never in the way."""

import json
import logging
from collections import defaultdict

import pytest
import torch
from helpers_runs import configured, trainer_of
from safetensors.torch import load_file

from llmshearing.checkpoints.checkpoint import read_checkpoint
from llmshearing.errors import ShearingError
from llmshearing.report.maps import decoded
from llmshearing.report.read import read_run
from llmshearing.report.record import PAGE_FILE, RUN_FILE
from llmshearing.train import train
from llmshearing.training import build
from llmshearing.training.callbacks import record as recording

KINDS = {"hidden": (32, 20), "head": (2, 1), "intermediate": (48, 28), "layer": (3, 2)}
LENGTH = {"max_duration": "4ba", "eval_interval": "2ba", "save_interval": "2ba"}


@pytest.fixture(scope="module")
def finished(lab, tmp_path_factory):
    """(metrics in memory, folder) of a pruning run with TensorBoard."""
    folder = tmp_path_factory.mktemp("recorded")
    board = {"loggers__tensorboard": {"log_dir": str(folder / "board")}}
    trainer, memory = trainer_of(configured(lab, folder, **LENGTH, **board))
    trainer.eval()
    trainer.fit()
    trainer.close()
    return {name: {int(t.batch): float(v) for t, v in pairs} for name, pairs in memory.data.items()}, folder / "run"


def test_steps_are_what_was_logged(finished):
    metrics, folder = finished
    run = read_run(folder)
    assert list(run.steps) == [1, 2, 3, 4] and run.end["state"] == "finished"
    for batch, step in run.steps.items():
        assert step["tokens"] == batch * 4 * 32 and step["seconds"] > 0
        assert step["values"]["loss/train/cross_entropy"] == pytest.approx(metrics["loss/train/cross_entropy"][batch])
        for kind, (size, _) in KINDS.items():
            wanted = (1 - metrics[f"pruning/target_sparsity/{kind}"][batch]) * size
            assert step["values"][f"pruning/wanted_units/{kind}"] == pytest.approx(wanted)
            now = metrics[f"pruning/open_units/{kind}"][batch]
            assert step["values"][f"pruning/open_units/{kind}"] == pytest.approx(now, rel=1e-6)


def test_evaluations_and_maps_are_those_of_the_other_files(finished):
    metrics, folder = finished
    run = read_run(folder)
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert list(run.evaluations) == list(run.maps) == [0, 2, 4] == [line["batch"] for line in lines]
    for line in lines:
        found = run.evaluations[line["batch"]]
        assert found["domains"] == pytest.approx(line["domains"]) and found["loss"] == pytest.approx(line["loss"])
        shares = {name: metrics[f"mixture/{name}/proportion"][line["batch"]] for name in found["domains"]}
        assert found["mixture"] == pytest.approx(shares)
        saved = load_file(folder / "gates" / f"gates-ba{line['batch']}.safetensors")
        for kind, (_, target) in KINDS.items():
            told = run.maps[line["batch"]]["maps"]["kept"][kind]
            cells = [value for row in decoded(told["rows"]) for value in row.tolist()]
            assert cells == saved[f"gate.{kind}"].ne(0).flatten().tolist()  # so few units that each has its cell
            assert sum(told["sums"]) == target * (3 if kind in ("head", "intermediate") else 1)


def test_sizes_are_closed_forms(finished):
    """The target's two layers: q, o [20, 16], k, v [20, 8], three of [20, 28]; two FLOPs each; attention; the head."""
    rows = {row[0]: row[1:] for row in read_run(finished[1]).tables["Sizes"]["rows"]}
    small = 2 * 384 * 20 + 2 * (2 * 20 * 16 + 2 * 20 * 8 + 3 * 20 * 28 + 2 * 20) + 20
    assert rows["parameters"][1] == small
    matrices = 2 * (2 * (2 * 20 * 16 + 2 * 20 * 8 + 3 * 20 * 28) + 384 * 20)
    assert rows["FLOPs/token at 32"][1] == matrices + 32 * 2 * 4 * 16
    assert rows["mask hidden, units a row"][:2] == [32, 20] and 0 < rows["mask hidden, units a row"][2] <= 32


def test_tensorboard_has_the_pictures(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = defaultdict(dict)  # name -> step -> image; TensorBoard begins a new file at each flush
    for file in (finished[1].parent / "board").rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file), size_guidance={"images": 0})
        events.Reload()
        for tag in events.Tags()["images"]:
            found[tag] |= {each.step: each for each in events.Images(tag)}
    assert set(found) == {f"{what}/{kind}" for what in ("masks/kept", "masks/open", "shape") for kind in KINDS}
    images = found["masks/kept/intermediate"]
    assert set(images) == {0, 2, 4} and images[4].encoded_image_string.startswith(b"\x89PNG")
    assert images[4].width == 48 * (512 // 48) and set(found["shape/hidden"]) == {2, 4}


def test_the_page_in_a_browser(finished, browser):
    browser.problems.clear()
    browser.open(finished[1] / PAGE_FILE)
    assert browser.problems == [] and browser.do("document.documentElement.dataset.drawn") == "yes"
    titles = browser.do("[...document.querySelectorAll('figure')].map(e => e.querySelector('figcaption').textContent)")
    for wanted in [f"Open units: {kind}" for kind in KINDS] + ["Loss at evaluations", "Mixture", "Speed", "Penalty"]:
        assert any(title.startswith(wanted) for title in titles), wanted
    assert "intermediate  28 of 48 a layer, on average" in titles
    browser.do("document.querySelector('input[value=open]').click()")
    maps = "[...document.querySelectorAll('figure.map')].map(e => e.innerHTML).join()"
    before = browser.do(maps)
    browser.do("document.querySelector('input[type=range]').focus()")
    browser.key("ArrowLeft")
    assert browser.do("document.querySelector('output').textContent") == "2" and browser.do(maps) != before


def test_a_run_that_goes_on(lab, tmp_path):
    train(configured(lab, tmp_path, **LENGTH))
    lost = tmp_path / "run" / RUN_FILE
    text = lost.read_text()
    first = next(line for line in text.splitlines() if '"event": "step"' in line)
    lost.write_text(
        text + json.dumps({**json.loads(first), "batch": 50}) + '\n{"event": "ste'
    )  # and then it was killed
    train(configured(lab, tmp_path, **{**LENGTH, "max_duration": "6ba"}, autoresume=True))
    run = read_run(tmp_path / "run")
    assert list(run.steps) == [1, 2, 3, 4, 5, 6] and [start["batch"] for start in run.starts] == [0, 4]
    assert list(run.evaluations) == [2, 4, 6] and run.end["batch"] == 6
    before = lost.read_bytes()
    train(configured(lab, tmp_path, **{**LENGTH, "max_duration": "6ba"}, autoresume=True))  # has ended already
    with pytest.raises(ShearingError, match="checkpoints of an earlier run"):
        train(configured(lab, tmp_path, **LENGTH, autoresume=False))
    assert lost.read_bytes() == before


def test_a_run_that_folds_itself_has_one_record(lab, tmp_path):
    train(
        configured(
            lab, tmp_path, **LENGTH, model__l0_module__lagrangian_warmup_steps="1ba", model__l0_module__fold_at="2ba"
        )
    )
    run = read_run(tmp_path / "run")
    assert list(run.steps) == [1, 2, 3, 4] and len(run.starts) == 2 and run.end["state"] == "finished"
    assert "pruning/open_units/hidden" in run.steps[2]["values"] and not any(
        name.startswith("pruning/") for name in run.steps[3]["values"]
    )
    assert run.tables["Sizes"]["columns"] == ["model"]
    assert (tmp_path / "run" / PAGE_FILE).is_file()


def test_it_changes_nothing_and_its_failure_neither(lab, tmp_path, monkeypatch, caplog):
    """Weights and masks of a run whose recorder breaks, and of one that has none, are those of one that has."""

    def result(name):
        train(configured(lab, tmp_path / name, **LENGTH))
        found = read_checkpoint(tmp_path / name / "run" / "latest-rank0.pt")
        return {**dict(found.weights.items()), **{f"masks.{key}": value for key, value in found.masks.items()}}

    with_record = result("with")

    def broken(*given):
        raise RuntimeError("a mistake in the maps")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(recording, "mask_maps", broken)
        with_broken = result("broken")
    assert caplog.text.count("the record for report.html ends here, training goes on") == 1
    with monkeypatch.context() as patch:
        patch.setattr(build, "build_record", lambda *given, **options: [])
        without = result("without")
    assert not (tmp_path / "without" / "run" / RUN_FILE).exists()
    for other in (with_broken, without):
        assert set(other) == set(with_record)
        assert all(torch.equal(torch.as_tensor(other[name]), torch.as_tensor(with_record[name])) for name in other)
