#!/usr/bin/env bash
# Continue pretraining of a sheared model: the published recipe, 50 billion tokens.
set -euo pipefail

usage() {
    cat <<EOF
usage: [VARIABLE=value ...] continue_pretraining.sh [key=value ...]

  model=1.3b              configs/llama2/\$model.yaml: 2.7b, 1.3b or 370m
  model_path=...          the folded model (out/llama2-7b-to-\$model/pruned-latest-rank0.pt)
  data_local=...          MDS data (data/redpajama)
  save_folder=...         checkpoints (out/llama2-7b-to-\$model-ft)
  max_duration=48000ba  t_warmup=1440ba  lr=1e-4
  proportion=[...]        mixture to start from: better, the one your pruning run ended with
  launcher=launch.sh      or srun_launch.sh inside a SLURM job
Further key=value arguments go to train.py as they are, after these (--dry-run too).

example: model=2.7b data_local=/data/mds llmshearing/scripts/continue_pretraining.sh
EOF
}
case "${1:-}" in -h | --help) usage; exit 0 ;; esac

PROJ_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
model=${model:-1.3b}
model_path=${model_path:-out/llama2-7b-to-$model/pruned-latest-rank0.pt}
data_local=${data_local:-data/redpajama}
run_name=${run_name:-llama2-7b-to-${model}-ft}
save_folder=${save_folder:-out/$run_name}
max_duration=${max_duration:-48000ba} # 50 billion tokens
t_warmup=${t_warmup:-1440ba}          # 3% of the run
lr=${lr:-1e-4}
proportion=${proportion:-}
launcher=${launcher:-launch.sh}

if [[ ! -f "$PROJ_DIR/configs/llama2/$model.yaml" ]]; then
    echo "error: model=$model: there is no configs/llama2/$model.yaml" >&2
    exit 1
fi

command=(bash "$PROJ_DIR/llmshearing/scripts/$launcher" "$PROJ_DIR/configs/llama2/$model.yaml"
    "run_name=$run_name"
    "data_local=$data_local"
    "model.path=$model_path"
    "model.l0_module=null"
    "max_duration=$max_duration"
    "scheduler.t_warmup=$t_warmup"
    "optimizer.lr=$lr"
    "save_folder=$save_folder")
if [[ -n "$proportion" ]]; then command+=("callbacks.data_loading.proportion=$proportion"); fi
command+=("$@")
echo "+ ${command[*]}"
exec "${command[@]}"
