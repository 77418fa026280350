"""The YAML files and the scripts that ship: each validates, and the scripts' command lines do too."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llmshearing.config import Shape, head_mode, load_config, source_shape, target_shape, to_yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SCRIPTS = ROOT / "llmshearing" / "scripts"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_yaml_validates_and_round_trips(path: Path, tmp_path: Path) -> None:
    cfg = load_config(path)
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(cfg))
    assert load_config(again) == cfg
    assert (target_shape(cfg) is None) == (cfg.model.l0_module is None)
    assert not Path(cfg.data_local).is_absolute()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_yaml_dry_runs(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Source and target are told from the shape keys: no weights are here."""
    from llmshearing.train import main  # brings torch and Composer

    monkeypatch.chdir(ROOT)
    assert main([str(path), "--dry-run", "model.path=not/here"]) == 0
    output = capsys.readouterr().out
    shape = source_shape(load_config(path))
    assert shape is not None and f"'hidden_size': {shape.hidden}" in output
    assert f"max_duration: {load_config(path).max_duration}" in output


def test_published_recipe() -> None:
    cfg = load_config(ROOT / "configs/llama2/7b.yaml")
    assert source_shape(cfg) == Shape(4096, 32, 32, 128, 11008, 32, 32000)
    assert target_shape(cfg) == Shape(2048, 16, 16, 128, 5504, 24, 32000)
    assert (cfg.max_duration, cfg.scheduler.t_warmup, cfg.eval_interval) == ("3200ba", "320ba", "50ba")
    assert cfg.model.l0_module is not None and cfg.model.l0_module.lagrangian_warmup_steps == "640ba"
    assert (cfg.optimizer.lr, cfg.optimizer.lag_lr, cfg.global_train_batch_size) == (1e-4, 1.0, 32)


def test_smollm2_cuts_whole_groups() -> None:
    cfg = load_config(ROOT / "configs/smollm2/135m.yaml")
    assert target_shape(cfg) == Shape(384, 6, 2, 64, 1024, 22, 49152)
    assert head_mode(cfg) == "group"


@pytest.mark.parametrize("size", ["2.7b", "1.3b", "370m"])
def test_continued_pretraining_has_the_shape_that_pruning_reaches(size: str) -> None:
    pruned = _config_of("pruning.sh", to_model=size)
    cfg = _config_of("continue_pretraining.sh", model=size)
    assert target_shape(pruned) == source_shape(cfg)
    assert pruned.callbacks.data_loading.target_loss == cfg.callbacks.data_loading.target_loss
    assert cfg.model.path == f"{pruned.save_folder}/pruned-latest-rank0.pt"
    assert (cfg.max_duration, cfg.global_train_batch_size) == ("48000ba", 256)


def _config_of(script: str, **variables: str):
    """The configuration that a script's command gives, with `echo` in place of the launcher's interpreter."""
    output = _run(["bash", str(SCRIPTS / script)], PYTHON="echo", PROCESSES="1", **variables).stdout
    words = shlex.split(output.splitlines()[-1])
    config = next(index for index, word in enumerate(words) if word.endswith(".yaml"))
    return load_config(words[config], words[config + 1 :])


def _run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse_and_explain_themselves(script: Path) -> None:
    assert _run(["bash", "-n", str(script)]).returncode == 0
    help_text = _run(["bash", str(script), "--help"])
    assert help_text.returncode == 0 and "usage:" in help_text.stdout and "example:" in help_text.stdout


@pytest.mark.parametrize(("script", "variable"), [("pruning.sh", "to_model"), ("continue_pretraining.sh", "model")])
def test_scripts_refuse_an_unknown_model(script: str, variable: str) -> None:
    result = _run(["bash", str(SCRIPTS / script)], **{variable: "13b"})
    assert result.returncode == 1 and f"{variable}=13b" in result.stderr


def test_srun_launch_needs_a_job() -> None:
    result = _run(["bash", str(SCRIPTS / "srun_launch.sh"), "configs/llama2/7b.yaml"], SLURM_JOB_ID="")
    assert result.returncode == 1 and "SLURM_JOB_ID" in result.stderr


def test_srun_launch_gives_every_rank_what_composer_reads(tmp_path: Path) -> None:
    """No SLURM here: stand-ins for its two commands start 4 ranks on 2 nodes, and the ranks show their environment."""
    tools = {
        "scontrol": "echo node0; echo node1",
        "srun": "shift; for rank in 0 1 2 3; do SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) "
        'SLURM_NODEID=$((rank / 2)) SLURM_NTASKS=4 SLURM_NNODES=2 "$@"; done',
        "show": 'echo "rank=$RANK local=$LOCAL_RANK node=$NODE_RANK world=$WORLD_SIZE/$LOCAL_WORLD_SIZE '
        'at=$MASTER_ADDR:$MASTER_PORT unbuffered=$PYTHONUNBUFFERED args=$*"',
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    result = _run(
        ["bash", str(SCRIPTS / "srun_launch.sh"), "c.yaml", "autoresume=true"],
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="node[0-1]",
        SLURM_SUBMIT_DIR=str(ROOT),
        PYTHON="show",
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("rank=")]
    assert [re.findall(r"(?:rank|local|node)=(\d)", line) for line in lines] == [
        ["0", "0", "0"],
        ["1", "1", "0"],
        ["2", "0", "1"],
        ["3", "1", "1"],
    ], result.stderr
    for line in lines:
        assert "world=4/2 at=node0:20007 unbuffered=1" in line
        assert line.endswith(f"args={ROOT}/llmshearing/train.py c.yaml autoresume=true")


def test_launch_echoes_its_command() -> None:
    result = _run(["bash", str(SCRIPTS / "launch.sh"), "c.yaml", "a=b"], PYTHON="echo", PROCESSES="2")
    assert result.stdout.splitlines()[-1] == f"-m composer.cli -n 2 {ROOT}/llmshearing/train.py c.yaml a=b"


def test_configs_and_scripts_name_no_python_of_this_machine() -> None:
    for path in [*CONFIGS, *SCRIPTS.glob("*.sh")]:
        assert sys.prefix not in path.read_text()
