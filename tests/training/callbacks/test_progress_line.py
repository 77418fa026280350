"""A run's progress in a file: plain lines of one kind, no cursor codes, evaluations in between."""

from helpers_runs import run, settings, write_yaml


def test_a_runs_log_has_plain_lines(lab, tmp_path) -> None:
    made = settings(lab, tmp_path / "run", progress_bar=True, max_duration="6ba", eval_interval="3ba", eval_first=True)
    path = write_yaml(tmp_path / "run.yaml", made)
    done = run("python3", "-m", "llmshearing", "train", path, LLMSHEARING_PROGRESS_SECONDS="0.001")
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    assert not {"\r", "\x1b"} & set(text)
    lines = text.splitlines()
    trained = [line for line in lines if line.startswith("training: ")]
    assert "6/6" in trained[-1] and "loss=" in trained[-1] and "evaluated=" in trained[-1]
    assert any(line.startswith("evaluating: ") for line in lines)  # the one before training
    assert any(line.startswith("evaluating 2/3: ") for line in lines)
