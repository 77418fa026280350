#!/usr/bin/env bash
# A short continued training of Megatron's shards in megatron-core: step 3 of LLaMA-Pruner, as a check.
set -euo pipefail

usage() {
    cat <<EOF
usage: [VARIABLE=value ...] check_model.sh [option ...]

  LOAD=...                   shards (out/megatron-pruned), with the names of megatron-core's own modules (--spec local)
  DATA=...                   MDS data of \`llmshearing data prepare\` (data/mds)
  TENSOR_PARALLEL_SIZE=1     ranks of the shards, a process each: NCCL on GPUs, gloo on the CPU
  PYTHON=...                 interpreter whose environment has llmshearing[megatron] (.venv, else python3)
Further options go to \`python -m llmshearing.megatron.check\` as they are (--steps 10 --lr 1e-4).

example: LOAD=out/megatron-tp2 DATA=data/mds TENSOR_PARALLEL_SIZE=2 llmshearing/scripts/check_model.sh --steps 20
EOF
}
case "${1:-}" in -h | --help) usage; exit 0 ;; esac

PROJ_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [[ -z "${PYTHON:-}" && -x "$PROJ_DIR/.venv/bin/python" ]]; then PYTHON="$PROJ_DIR/.venv/bin/python"; fi
command=("${PYTHON:-python3}" -m torch.distributed.run --standalone --nproc_per_node "${TENSOR_PARALLEL_SIZE:-1}"
    -m llmshearing.megatron.check --load "${LOAD:-out/megatron-pruned}" --data "${DATA:-data/mds}" "$@")
echo "+ ${command[*]}"
PYTHONPATH="$PROJ_DIR${PYTHONPATH:+:$PYTHONPATH}" exec "${command[@]}"
