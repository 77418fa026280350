#!/usr/bin/env bash
# Another number of ranks or stages for Megatron's shards, by default one; or back to Hugging Face.
set -euo pipefail

usage() {
    cat <<EOF
usage: [VARIABLE=value ...] transfer.sh [option ...]

  LOAD=...                   shards to read (out/megatron-pruned)
  SAVE=...                   shards to write (out/megatron-tp1); with TO=hf a Hugging Face directory
  TENSOR_PARALLEL_SIZE=1  PIPELINE_PARALLEL_SIZE=1     ranks and stages to write
  TO=megatron                or hf
  PYTHON=...                 interpreter whose environment has llmshearing (.venv of \`make install\`, else python3)
Further options go to \`llmshearing convert\` as they are (--overwrite, --spec local, tokenizer=DIR).

example: LOAD=out/megatron-pruned SAVE=out/megatron-tp2 TENSOR_PARALLEL_SIZE=2 llmshearing/scripts/transfer.sh
EOF
}
case "${1:-}" in -h | --help) usage; exit 0 ;; esac

PROJ_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [[ -z "${PYTHON:-}" && -x "$PROJ_DIR/.venv/bin/python" ]]; then PYTHON="$PROJ_DIR/.venv/bin/python"; fi
command=("${PYTHON:-python3}" -m llmshearing convert "${LOAD:-out/megatron-pruned}" "${SAVE:-out/megatron-tp1}")
case "${TO:-megatron}" in
    megatron) command+=(--tp "${TENSOR_PARALLEL_SIZE:-1}" --pp "${PIPELINE_PARALLEL_SIZE:-1}") ;;
    hf) ;;
    *) echo "error: TO=$TO: must be megatron or hf" >&2; exit 1 ;;
esac
command+=("$@")
echo "+ ${command[*]}"
PYTHONPATH="$PROJ_DIR${PYTHONPATH:+:$PYTHONPATH}" exec "${command[@]}"
