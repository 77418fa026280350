"""The SmolLM2 pipeline's driver: stages that exist are not run again, a failing one says so; its configs fit."""

from pathlib import Path

import pytest

from examples.smollm2 import run
from llmshearing.config import load_config, source_shape, target_shape
from llmshearing.errors import ShearingError


def test_a_stage_runs_once_and_shows_its_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    target = tmp_path / "a b"
    arguments = ("zipfile", "-c", target, __file__)  # a module of Python's own that makes a file
    run.stage("pack", target, *arguments)
    assert target.is_file() and f"$ python -m zipfile -c '{target}'" in caplog.text
    stamp = target.stat().st_mtime_ns
    run.stage("pack", target, *arguments)
    assert f"pack: {target} exists" in caplog.text and target.stat().st_mtime_ns == stamp
    with pytest.raises(ShearingError, match="unpack failed with exit status"):
        run.stage("unpack", tmp_path / "never", "zipfile", "-l", tmp_path / "missing.zip")


def test_continued_pretraining_starts_from_the_shape_that_pruning_reaches(root: Path) -> None:
    prune, later, recover = (load_config(root / path) for path in (run.PRUNE, run.CONTINUE, run.RECOVER))
    assert target_shape(prune) == source_shape(later) == source_shape(recover)
    batches = [int(cfg.max_duration.removesuffix("ba")) for cfg in (prune, later, recover)]
    assert batches[0] + batches[1] == batches[2]
    assert len({cfg.global_train_batch_size for cfg in (prune, later, recover)}) == 1
    assert later.model.path == f"{prune.save_folder}/pruned-latest-rank0.pt"
    assert Path(prune.data_local).parent == run.OUTPUT and prune.data_local == later.data_local
    assert prune.callbacks.data_loading.set_names == later.callbacks.data_loading.set_names


def test_an_output_that_is_a_file_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(root)
    (tmp_path / "notes").write_text("mine")
    assert run.main(["--output", str(tmp_path / "notes")]) == 1
    assert "notes" in caplog.text and (tmp_path / "notes").read_text() == "mine"
