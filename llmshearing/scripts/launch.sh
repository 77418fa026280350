#!/usr/bin/env bash
# One node, or several where it is started on each: composer starts a process per GPU and stops all when one fails.
set -euo pipefail

usage() {
    cat <<EOF
usage: launch.sh CONFIG.yaml [key=value ...]

Trains on all GPUs of this machine (one process where there is none).
  PROCESSES=N  number of processes
  PYTHON=...   interpreter whose environment has llmshearing (.venv of \`make install\`, else python3)
Several nodes without SLURM: run it on each, with
  WORLD_SIZE=N            processes of all nodes together
  NODE_RANK=n             this node, from 0
  MASTER_ADDR=host  MASTER_PORT=port   of node 0

example: PROCESSES=8 llmshearing/scripts/launch.sh configs/llama2/7b.yaml model.path=models/Llama-2-7b-hf
EOF
}
case "${1:-}" in -h | --help) usage; exit 0 ;; "") usage >&2; exit 2 ;; esac

PROJ_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [[ -z "${PYTHON:-}" && -x "$PROJ_DIR/.venv/bin/python" ]]; then PYTHON="$PROJ_DIR/.venv/bin/python"; fi
PYTHON=${PYTHON:-python3}
PROCESSES=${PROCESSES:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)')}

# the launcher as a module: the `composer` of some other environment on PATH is not taken
command=("$PYTHON" -m composer.cli -n "$PROCESSES" "$PROJ_DIR/llmshearing/train.py" "$@")
echo "+ ${command[*]}"
PYTHONPATH="$PROJ_DIR${PYTHONPATH:+:$PYTHONPATH}" exec "${command[@]}"
