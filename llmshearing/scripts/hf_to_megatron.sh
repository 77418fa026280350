#!/usr/bin/env bash
# Hugging Face model -> Megatron's shards: step 1 of LLaMA-Pruner.
set -euo pipefail

usage() {
    cat <<EOF
usage: [VARIABLE=value ...] hf_to_megatron.sh [option ...]

  HF_MODEL=...               source: Hugging Face directory or name (models/Llama-2-13b-hf)
  MEGATRON_MODEL=...         shards to write (out/megatron)
  TENSOR_PARALLEL_SIZE=8     ranks
  PIPELINE_PARALLEL_SIZE=1   stages
  SPEC=te                    names of modules: te (Transformer Engine) or local (megatron-core's own, as on a CPU)
  PYTHON=...                 interpreter whose environment has llmshearing (.venv of \`make install\`, else python3)
Further options go to \`llmshearing convert\` as they are (--overwrite, dtype=bfloat16).

example: HF_MODEL=models/Llama-2-13b-hf TENSOR_PARALLEL_SIZE=8 llmshearing/scripts/hf_to_megatron.sh
EOF
}
case "${1:-}" in -h | --help) usage; exit 0 ;; esac

PROJ_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [[ -z "${PYTHON:-}" && -x "$PROJ_DIR/.venv/bin/python" ]]; then PYTHON="$PROJ_DIR/.venv/bin/python"; fi
command=("${PYTHON:-python3}" -m llmshearing convert
    "${HF_MODEL:-models/Llama-2-13b-hf}" "${MEGATRON_MODEL:-out/megatron}"
    --tp "${TENSOR_PARALLEL_SIZE:-8}" --pp "${PIPELINE_PARALLEL_SIZE:-1}" --spec "${SPEC:-te}" "$@")
echo "+ ${command[*]}"
PYTHONPATH="$PROJ_DIR${PYTHONPATH:+:$PYTHONPATH}" exec "${command[@]}"
