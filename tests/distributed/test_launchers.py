"""The launchers as a user starts them: a SLURM job with a stand-in for srun, and two nodes without SLURM."""

import os
import stat
import subprocess
import sys

import pytest
from helpers_runs import ROOT, free_port, settings, write_yaml

from llmshearing.checkpoints.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow

# What the script uses of srun: one process a task, each with its place in SLURM's variables; a failed task ends all.
SRUN = """#!/usr/bin/env bash
[[ "$1" == --kill-on-bad-exit=1 ]] && shift || exit 9
pids=()
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE)) SLURM_NODEID=$((task / SLURM_NTASKS_PER_NODE)) \\
        "$@" &
    pids+=($!)
done
for _ in "${pids[@]}"; do
    wait -n || { code=$?; kill "${pids[@]}" 2>/dev/null; exit $code; }
done
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames node[1-2]" ]] && printf '127.0.0.1\\n127.0.0.2\\n'
"""
SHORT = ["max_duration=4ba", "eval_interval=4ba", "model.l0_module.lagrangian_warmup_steps=2ba"]


@pytest.fixture
def yaml(lab, tmp_path):
    return write_yaml(tmp_path / "run.yaml", settings(lab, tmp_path / "run"))


def environment(**changes):
    """This one, without what other launchers or another SLURM may have left in it."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in ours and not key.startswith("SLURM")}
    return {**kept, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **changes}


def script(name):
    return ["bash", str(ROOT / "llmshearing" / "scripts" / name)]


@pytest.fixture
def slurm(tmp_path):
    """The environment of a batch script of two nodes with a task each."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_SUBMIT_DIR": str(ROOT)}
    job |= {"SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "1", "MASTER_PORT": str(free_port())}
    return environment(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", **job)


def test_slurm_job_of_two_nodes(yaml, slurm, tmp_path):
    """Ranks that srun starts, sharded; a bad key ends all of them with an error."""
    command = [*script("srun_launch.sh"), str(yaml), *SHORT]
    done = subprocess.run([*command, "fsdp_config={}"], env=slurm, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "rank 0 at 127.0.0.1:" in done.stdout and "wrote" in done.stderr
    assert read_checkpoint(tmp_path / "run").masks.keys()


def test_two_nodes_without_slurm(yaml, tmp_path):
    """`launch.sh` on each node, told apart by NODE_RANK."""
    where = {"PROCESSES": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    nodes = [
        subprocess.Popen(
            [*script("launch.sh"), str(yaml), *SHORT],
            env=environment(NODE_RANK=str(node), **where), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    try:
        outputs = [node.communicate(timeout=300)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    assert read_checkpoint(tmp_path / "run").masks.keys()
