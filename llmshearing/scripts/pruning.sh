#!/usr/bin/env bash
# Shear LLaMA-2-7B to 2.7B, 1.3B or 370M: the published recipe. Everything is a variable; the rest is in the YAML.
set -euo pipefail

usage() {
    cat <<EOF
usage: [VARIABLE=value ...] pruning.sh [key=value ...]

  from_model=7b           configs/llama2/\$from_model.yaml, the source
  to_model=1.3b           target: 2.7b, 1.3b or 370m
  model_path=...          source: Hugging Face directory or converted .pt (models/Llama-2-7b-hf)
  data_local=...          MDS data (data/redpajama)
  save_folder=...         checkpoints (out/llama2-\$from_model-to-\$to_model)
  max_duration=3200ba  lagrangian_warmup_steps=640ba  t_warmup=320ba  lr=1e-4  lag_lr=1.0
  launcher=launch.sh      or srun_launch.sh inside a SLURM job
Further key=value arguments go to train.py as they are, after these (--dry-run too).

example: model_path=/models/Llama-2-7b-hf data_local=/data/mds to_model=2.7b llmshearing/scripts/pruning.sh
EOF
}
case "${1:-}" in -h | --help) usage; exit 0 ;; esac

PROJ_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
from_model=${from_model:-7b}
to_model=${to_model:-1.3b}
model_path=${model_path:-models/Llama-2-7b-hf}
data_local=${data_local:-data/redpajama}
run_name=${run_name:-llama2-${from_model}-to-${to_model}}
save_folder=${save_folder:-out/$run_name}
max_duration=${max_duration:-3200ba}
lagrangian_warmup_steps=${lagrangian_warmup_steps:-640ba} # 20% of the run
t_warmup=${t_warmup:-320ba}                               # 10% of the run
lr=${lr:-1e-4}
lag_lr=${lag_lr:-1.0}
launcher=${launcher:-launch.sh}

# target shape, and the loss that the scaling law predicts for a model of that size on each domain:
# cc, github, book, stackexchange, wiki, arxiv, c4-rp
case $to_model in
    2.7b)
        d_model=2560 n_heads=20 n_layers=32 intermediate_size=6912
        target_loss=[1.8712,0.6883,2.0325,1.5353,1.6297,1.3560,2.0328] ;;
    1.3b)
        d_model=2048 n_heads=16 n_layers=24 intermediate_size=5504
        target_loss=[1.9643,0.7459,2.1393,1.6117,1.7590,1.4449,2.1251] ;;
    370m)
        d_model=1024 n_heads=8 n_layers=24 intermediate_size=2816
        target_loss=[2.1401,0.8694,2.3625,1.7791,2.047,1.6637,2.3139] ;;
    *)
        echo "error: to_model=$to_model: must be 2.7b, 1.3b or 370m" >&2
        exit 1 ;;
esac
if [[ ! -f "$PROJ_DIR/configs/llama2/$from_model.yaml" ]]; then
    echo "error: from_model=$from_model: there is no configs/llama2/$from_model.yaml" >&2
    exit 1
fi

command=(bash "$PROJ_DIR/llmshearing/scripts/$launcher" "$PROJ_DIR/configs/llama2/$from_model.yaml"
    "run_name=$run_name"
    "data_local=$data_local"
    "model.path=$model_path"
    "max_duration=$max_duration"
    "scheduler.t_warmup=$t_warmup"
    "optimizer.lr=$lr"
    "optimizer.lag_lr=$lag_lr"
    "model.l0_module.lagrangian_warmup_steps=$lagrangian_warmup_steps"
    "model.l0_module.target_model.d_model=$d_model"
    "model.l0_module.target_model.n_heads=$n_heads"
    "model.l0_module.target_model.n_layers=$n_layers"
    "model.l0_module.target_model.intermediate_size=$intermediate_size"
    "callbacks.data_loading.target_loss=$target_loss"
    "save_folder=$save_folder"
    "$@")
echo "+ ${command[*]}"
exec "${command[@]}"
