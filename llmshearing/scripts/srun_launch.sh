#!/usr/bin/env bash
# SLURM: srun starts every rank itself. Composer's own launcher kills its ranks 30 seconds after a signal and dies on
# SIGUSR1; ranks that SLURM starts get the signals of a preemption directly and have the time SLURM grants.
set -euo pipefail

usage() {
    cat <<EOF
usage: sbatch [SBATCH OPTIONS] srun_launch.sh CONFIG.yaml [key=value ...]

One task per GPU: give sbatch --nodes and --ntasks-per-node. Submit from the checkout (or set PROJ_DIR).
  PROJ_DIR=...     checkout of llmshearing (the directory sbatch was called in)
  PYTHON=...       interpreter whose environment has llmshearing (.venv of \`make install\`, else python3)
  MASTER_PORT=...  port of rank 0 (from the job's number)

example:
  sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --time=1-00 --signal=USR1@300 \\
      llmshearing/scripts/srun_launch.sh configs/llama2/7b.yaml autoresume=true
EOF
}
case "${1:-}" in -h | --help) usage; exit 0 ;; "") usage >&2; exit 2 ;; esac

if [[ -z "${SLURM_PROCID:-}" || -z "${LLMSHEARING_RANK_OF_SRUN:-}" ]]; then
    # First pass, in the batch script: sbatch runs a copy of this file, so the checkout is told by the caller.
    if [[ -z "${SLURM_JOB_ID:-}" ]]; then
        echo "error: SLURM_JOB_ID is not set: run this inside a SLURM job (sbatch or salloc)" >&2
        exit 1
    fi
    PROJ_DIR=${PROJ_DIR:-${SLURM_SUBMIT_DIR:-$PWD}}
    if [[ ! -f "$PROJ_DIR/llmshearing/scripts/srun_launch.sh" ]]; then
        echo "error: PROJ_DIR=$PROJ_DIR is no checkout of llmshearing: set PROJ_DIR to the checkout" >&2
        exit 1
    fi
    hosts=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}")
    MASTER_ADDR=${hosts%%$'\n'*}
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
    export PROJ_DIR MASTER_ADDR MASTER_PORT LLMSHEARING_RANK_OF_SRUN=1
    echo "+ srun bash $PROJ_DIR/llmshearing/scripts/srun_launch.sh $* (rank 0 at $MASTER_ADDR:$MASTER_PORT)"
    exec srun --kill-on-bad-exit=1 bash "$PROJ_DIR/llmshearing/scripts/srun_launch.sh" "$@"
fi

# Second pass, once per rank: what Composer reads from its launcher.
export RANK=$SLURM_PROCID
export LOCAL_RANK=$SLURM_LOCALID
export WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_NNODES))}
export NODE_RANK=$SLURM_NODEID
export PYTHONUNBUFFERED=1
export PYTHONPATH="$PROJ_DIR${PYTHONPATH:+:$PYTHONPATH}"
if [[ -z "${PYTHON:-}" && -x "$PROJ_DIR/.venv/bin/python" ]]; then PYTHON="$PROJ_DIR/.venv/bin/python"; fi
exec "${PYTHON:-python3}" "$PROJ_DIR/llmshearing/train.py" "$@"
