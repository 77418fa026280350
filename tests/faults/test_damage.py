"""Checkpoints that are damaged, cut short, empty or foreign, and full disks: what is said, and what is used."""

import logging
import os
import pickle
import shutil
import signal
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from helpers_faults import differences, load_plain
from helpers_runs import configured, make_model
from helpers_storage import save_sharded

from llmshearing.checkpoints.checkpoint import CheckpointInfo, save_checkpoint
from llmshearing.errors import ShearingError, Stopped
from llmshearing.storage import open_archive
from llmshearing.train import train
from llmshearing.training.resilience import resume
from llmshearing.training.resilience.resume import check_same_run, checkpoints, name_pattern, prepare, verify
from llmshearing.training.resilience.saver import WRITING
from llmshearing.training.resilience.signals import stop_request
from llmshearing.training.source import build_masks, read_source

LATEST = "latest-rank0.pt"


@pytest.fixture(scope="module")
def finished(lab, tmp_path_factory):
    """Folder of a run of 8 batches, saved after 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("finished")
    train(configured(lab, folder, save_interval="2ba"))
    return folder / "run"


@pytest.fixture
def broken(finished, tmp_path):
    """A copy of it, to damage."""
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def test_a_signal_while_a_checkpoint_is_read_damages_nothing(tmp_path, lab, broken, monkeypatch):
    def signalled(path):
        os.kill(os.getpid(), signal.SIGTERM)
        return verify(path)

    cfg, before = configured(lab, tmp_path, save_interval="2ba", autoresume=True), sorted(broken.iterdir())
    source = read_source(cfg)
    monkeypatch.setattr(resume, "verify", signalled)
    with pytest.raises(Stopped, match="stopped by SIGTERM before training began"), stop_request():
        prepare(cfg, source, build_masks(source, cfg))
    assert sorted(broken.iterdir()) == before


def flip(path: Path) -> None:
    """One bit of the largest record, away from the zip's own structure."""
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[record.header_offset + 200 + record.file_size // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pickle_of(value) -> bytes:
    return pickle.dumps(value)


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


DAMAGE = {
    "a bit flipped": (flip, "is damaged: checksum of its record"),
    "cut short": (cut, "is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged or no checkpoint"),
    "text": (lambda path: path.write_text("not a checkpoint"), "is damaged or no checkpoint"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "is no Composer checkpoint"),
    "a pickle": (lambda path: path.write_bytes(pickle_of({"state": {}})), "is damaged or no checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_one_before_a_damaged_checkpoint_is_used(lab, finished, broken, tmp_path, caplog, damage):
    """It is named with the reason, kept under another name, and the run ends as it had."""
    spoil, reason = DAMAGE[damage]
    newest = broken / "ep0-ba8-rank0.pt"
    spoil(newest)
    with caplog.at_level(logging.INFO):
        train(configured(lab, tmp_path, save_interval="2ba", autoresume=True))
    text = caplog.text
    assert str(newest) in text and reason in text and "the one before it is used" in text
    assert "going on from batch 6" in text
    assert (broken / "ep0-ba8-rank0.pt.damaged").is_file()
    one, other = (load_plain(folder / LATEST)["state"] for folder in (broken, finished))
    parts = ("model", "optimizers", "dataset_state", "schedulers")
    assert differences({key: one[key] for key in parts}, other) == []


def test_a_pickle_in_the_run_folder_is_not_run(lab, broken, tmp_path):
    trap = tmp_path / "executed"
    torch.save({"state": {"model": {"model.x": torch.zeros(1)}}, "more": Evil(trap)}, broken / "ep0-ba8-rank0.pt")
    train(configured(lab, tmp_path, save_interval="2ba", autoresume=True))
    assert not trap.exists() and (broken / "ep0-ba8-rank0.pt.damaged").is_file()


def test_nothing_whole_is_an_error_and_not_a_new_start(lab, broken, tmp_path):
    for path in broken.glob("ep*.pt"):
        cut(path)
    for _ in range(2):  # started once more, it still does not begin anew over what is left of the old run
        with pytest.raises(ShearingError, match="no checkpoint in .* is whole.*ep0-ba8-rank0.pt.damaged"):
            train(configured(lab, tmp_path, save_interval="2ba", autoresume=True))
    assert len(list(broken.glob("*.damaged"))) == 4


def test_a_newer_file_than_latest_is_gone_on_from(lab, broken, tmp_path, caplog):
    """Killed between a save's two renames: Composer alone would refuse the newer file."""
    (broken / LATEST).unlink()
    (broken / LATEST).symlink_to("ep0-ba4-rank0.pt")
    (broken / WRITING).mkdir()
    (broken / WRITING / "ep0-ba10-rank0.pt").write_bytes(b"half")
    with caplog.at_level(logging.INFO):
        train(configured(lab, tmp_path, save_interval="2ba", autoresume=True, max_duration="10ba"))
    assert "going on from batch 8" in caplog.text
    assert (broken / LATEST).resolve().name == "ep0-ba10-rank0.pt" and not (broken / WRITING).exists()


def test_a_checkpoint_of_another_run_is_refused_and_left(lab, broken, tmp_path):
    """Keys are compared strictly: other masks, another shape, weights without a training state."""
    before = sorted(path.name for path in broken.iterdir())
    changes = {"autoresume": True, "model__l0_module__pruning_modules": ["head", "intermediate", "hidden"]}
    changes["model__l0_module__target_model"] = {"d_model": 20, "n_heads": 2, "intermediate_size": 28}
    with pytest.raises(ShearingError, match=r"is of another run.*masks\.lambda_1\.layer|masks\.log_alpha\.layer"):
        train(configured(lab, tmp_path, **changes))
    make_model(hidden_size=24, num_attention_heads=2, num_key_value_heads=1).save_pretrained(tmp_path / "small")
    with pytest.raises(ShearingError, match="is of another run.*masks.log_alpha.head"):
        train(configured(lab, tmp_path, autoresume=True, model__path=str(tmp_path / "small")))
    assert sorted(path.name for path in broken.iterdir()) == before


def test_weights_alone_are_no_state_of_a_run(lab, tmp_path):
    model = make_model()
    path = save_checkpoint(tmp_path / "ep0-ba3-rank0.pt", model.state_dict(), CheckpointInfo(model.config.to_dict()))
    with pytest.raises(ShearingError, match="is not the state of a training run: it has no optimizers"):
        verify(path)


def test_missing_and_foreign_keys(lab, finished, tmp_path):
    cfg = configured(lab, tmp_path)
    source = read_source(cfg)
    masks = build_masks(source, cfg)
    state = load_plain(finished / LATEST)
    check_same_run(verify(finished / LATEST), source, masks)
    for change in ("missing", "foreign", "optimizer"):
        model, optimizers = dict(state["state"]["model"]), state["state"]["optimizers"]
        name = "model.model.norm.weight"
        if change == "missing":
            del model[name]
        elif change == "foreign":
            model["model.extra"] = torch.zeros(2)
        else:
            adam = next(iter(optimizers.values()))
            optimizers = {"AdamW": {**adam, "state": {k: v for k, v in adam["state"].items() if k != name}}}
        torch.save({"state": {**state["state"], "model": model, "optimizers": optimizers}}, tmp_path / "x.pt")
        with pytest.raises(ShearingError, match="model.extra" if change == "foreign" else name):
            check_same_run(open_archive(tmp_path / "x.pt"), source, masks)


@pytest.mark.parametrize("keep", [1, 3])
def test_old_checkpoints_are_removed_also_after_a_resume(lab, tmp_path, keep):
    changes = {"save_interval": "2ba", "autoresume": True, "save_num_checkpoints_to_keep": keep}
    for duration in ("6ba", "10ba"):
        train(configured(lab, tmp_path, max_duration=duration, scheduler__t_max="20ba", **changes))
    names = {path.name for path in (tmp_path / "run").glob("ep*.pt")}
    assert names == {f"ep0-ba{batch}-rank0.pt" for batch in (10, 8, 6)[:keep]}


def test_names_are_sorted_by_batch(tmp_path):
    for batch in (10, 9, 100):
        (tmp_path / f"ep0-ba{batch}-rank0.pt").write_bytes(b"")
    (tmp_path / "ep0-ba11-rank0.pt.damaged").write_bytes(b"")
    (tmp_path / "ep0-ba20").mkdir()
    found = [path.name for path in checkpoints(tmp_path, "ep{epoch}-ba{batch}-rank{rank}.pt")]
    assert found == ["ep0-ba100-rank0.pt", "ep0-ba20", "ep0-ba10-rank0.pt", "ep0-ba9-rank0.pt"]
    assert name_pattern("a.b{batch}").fullmatch("a.b7") and not name_pattern("a.b{batch}").fullmatch("aXb7")


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "index"])
def test_a_damaged_sharded_folder_is_noticed(lab, finished, tmp_path, damage):
    folder = save_sharded(tmp_path / "ep0-ba8", load_plain(finished / LATEST))
    cfg = configured(lab, tmp_path)
    source = read_source(cfg)
    check_same_run(verify(folder), source, build_masks(source, cfg))
    part = next(folder.glob("*.distcp"))
    if damage == "cut":
        cut(part)
    elif damage == "flipped":
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    elif damage == "missing":
        part.unlink()
    else:
        cut(folder / ".metadata")
    with pytest.raises(ShearingError, match="damaged|missing"):
        verify(folder)


def test_a_folder_is_no_file(lab, finished, tmp_path):
    """Composer would fail on it with an error of its own."""
    save_sharded(tmp_path / "run" / "ep0-ba8", load_plain(finished / LATEST))
    with pytest.raises(ShearingError, match="is a sharded folder: go on with fsdp_config.state_dict_type = sharded"):
        train(configured(lab, tmp_path, autoresume=True))


# Full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB; three checkpoints of 0.65 MB fit. Skipped where mounting is not allowed."""
    place = tmp_path / "run"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_keeps_the_checkpoint_before(lab, small_disk, tmp_path, caplog):
    """It is said, training goes on, the next save is tried; as the last one fails too, so does the run."""
    with caplog.at_level(logging.INFO), pytest.raises(ShearingError) as error:
        train(configured(lab, tmp_path, save_interval="2ba", max_duration="10ba"))
    failed = [record.getMessage() for record in caplog.records if "was not saved" in record.getMessage()]
    assert len(failed) == 2 and "ep0-ba8-rank0.pt was not saved" in failed[0], caplog.text
    assert "No space left" in failed[0] and "MiB free" in failed[0] and "Kept: " in failed[0]
    assert "ended at batch 10" in str(error.value) and "ep0-ba6-rank0.pt" in str(error.value)
    verify(small_disk / LATEST)
    assert (small_disk / LATEST).resolve().name == "ep0-ba6-rank0.pt"
    # with room again the run goes on from there
    (small_disk / "ep0-ba2-rank0.pt").unlink()
    (small_disk / "ep0-ba4-rank0.pt").unlink()
    train(configured(lab, tmp_path, save_interval="5ba", max_duration="10ba", autoresume=True))
    assert (small_disk / LATEST).resolve().name == "ep0-ba10-rank0.pt"


def test_a_disk_that_has_room_again(lab, small_disk, tmp_path, caplog):
    """Room for one checkpoint beside another: each is removed only when its successor is whole."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 500_000)
    changes = {"save_interval": "2ba", "max_duration": "10ba", "save_num_checkpoints_to_keep": 1}
    train(configured(lab, tmp_path, **changes))
    assert "was not saved" not in caplog.text
    assert [path.name for path in small_disk.glob("ep*.pt")] == ["ep0-ba10-rank0.pt"]


# What may be loaded ----------------------------------------------------------------------------------------------


def test_load_path_from_outside_holds_plain_data_only(lab, finished, tmp_path):
    """A pickle is refused and not run, unless it is trusted; our own checkpoints load."""
    trap = tmp_path / "executed"
    train(configured(lab, tmp_path / "a", load_path=str(finished / "ep0-ba4-rank0.pt"), max_duration="6ba"))
    state = load_plain(finished / "ep0-ba4-rank0.pt")
    evil = tmp_path / "evil.pt"
    torch.save({**state, "more": Evil(trap)}, evil)
    with pytest.raises(ShearingError, match=r"evil\.pt"):
        train(configured(lab, tmp_path / "b", load_path=str(evil)))
    assert not trap.exists()
    train(configured(lab, tmp_path / "c", load_path=str(evil), trust_checkpoint=True))
    assert trap.exists()


def test_load_path_from_the_run_folder_is_looked_at_too(lab, broken, tmp_path):
    """A pickle that somebody put there, in a file and behind the index of a sharded folder."""
    trap = tmp_path / "executed"
    evil = broken / "ep0-ba6-rank0.pt"
    torch.save({**load_plain(evil), "more": Evil(trap)}, evil)
    with pytest.raises(ShearingError, match=r"ep0-ba6-rank0\.pt"):
        train(configured(lab, tmp_path, load_path=str(evil), save_overwrite=True))
    folder = broken / "ep0-ba9"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle_of(Evil(trap)))
    with pytest.raises(ShearingError, match="ep0-ba9"):
        train(configured(lab, tmp_path, load_path=str(folder), save_overwrite=True))
    assert not trap.exists()


def test_a_pickle_cannot_slip_in_after_the_check(lab, finished, tmp_path, monkeypatch):
    """Composer itself loads plain data only, whatever the file has become since it was looked at."""
    from llmshearing.training.resilience import resume as module

    trap = tmp_path / "executed"
    evil = tmp_path / "evil.pt"
    torch.save({**load_plain(finished / "ep0-ba4-rank0.pt"), "more": Evil(trap)}, evil)
    monkeypatch.setattr(module, "check_load_path", lambda cfg, path: None)
    with pytest.raises(ShearingError, match="more than plain data.*trust_checkpoint"):
        train(configured(lab, tmp_path / "b", load_path=str(evil)))
    assert not trap.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_sharded_checkpoint_from_outside_is_refused(lab, tmp_path):
    (tmp_path / "ep0-ba4").mkdir()
    with pytest.raises(ShearingError, match=r"index is a pickle.*trust_checkpoint=true"):
        train(configured(lab, tmp_path / "b", load_path=str(tmp_path / "ep0-ba4")))


def test_prepare_finds_nothing_in_a_new_folder(lab, tmp_path):
    cfg = configured(lab, tmp_path, autoresume=True)
    assert prepare(cfg, read_source(cfg), None) is None
