#!/usr/bin/env bash
# Prune Megatron's shards, rank by rank: step 2 of LLaMA-Pruner. By default LLaMA-2-13B to the shape of 7B.
set -euo pipefail

usage() {
    cat <<EOF
usage: [VARIABLE=value ...] prune_llama.sh [option ...]

  LOAD=...                          shards to prune (out/megatron)
  SAVE=...                          shards to write (out/megatron-pruned)
  METHOD=random                     or activation, fisher; these need --calibration DATA, and the model in memory
  HIDDEN_SIZE_REMAIN=4096  NUM_ATTENTION_HEADS_REMAIN=32  FFN_HIDDEN_SIZE_REMAIN=11008
  DROP_LAYERS="4 9 14 19 24 29 34 37"   by number from 0; empty: none
  PRUNE_TYPE=balance                every rank keeps equally many; unbalance: the result is of one rank
  PYTHON=...                        interpreter whose environment has llmshearing (.venv of \`make install\`, else python3)
What the model is stands in the shards. Further options go to \`llmshearing prune\` as they are (--seed 1).

example: LOAD=out/megatron SAVE=out/megatron-7b llmshearing/scripts/prune_llama.sh --overwrite
EOF
}
case "${1:-}" in -h | --help) usage; exit 0 ;; esac

PROJ_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [[ -z "${PYTHON:-}" && -x "$PROJ_DIR/.venv/bin/python" ]]; then PYTHON="$PROJ_DIR/.venv/bin/python"; fi
read -r -a drop <<<"${DROP_LAYERS-4 9 14 19 24 29 34 37}"
command=("${PYTHON:-python3}" -m llmshearing prune "${METHOD:-random}"
    --load "${LOAD:-out/megatron}" --save "${SAVE:-out/megatron-pruned}"
    --hidden_size_remain "${HIDDEN_SIZE_REMAIN:-4096}"
    --num_attention_heads_remain "${NUM_ATTENTION_HEADS_REMAIN:-32}"
    --ffn_hidden_size_remain "${FFN_HIDDEN_SIZE_REMAIN:-11008}"
    --prune_type "${PRUNE_TYPE:-balance}")
if ((${#drop[@]})); then command+=(--drop_layers "${drop[@]}"); fi
command+=("$@")
echo "+ ${command[*]}"
PYTHONPATH="$PROJ_DIR${PYTHONPATH:+:$PYTHONPATH}" exec "${command[@]}"
