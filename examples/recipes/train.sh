#!/usr/bin/env bash
# One stage of a recipe, with the files of examples/yaml/recipes:
#
#     examples/recipes/train.sh MODEL TUNING STAGE METHOD [key=value ...]
#
# MODEL is qwen2_5_7b or llama3_1_8b, TUNING full or lora, STAGE sft or dpo, METHOD ogpsa or naive. What follows is
# added to the command line, e.g. dataset_dir=/data/recipes. The result is in saves/MODEL/TUNING/STAGE_METHOD;
# SAVES=DIR takes another folder than saves.
set -euo pipefail

usage() {
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
[ $# -ge 4 ] || usage
model=$1 tuning=$2 stage=$3 method=$4
shift 4

case $model in
  qwen2_5_7b) words=(model_name_or_path=Qwen/Qwen2.5-7B-Instruct template=qwen) ;;
  llama3_1_8b) words=(model_name_or_path=meta-llama/Llama-3.1-8B-Instruct template=llama3) ;;
  *) usage ;;
esac
case $method in
  ogpsa) ;;
  naive) words+=("stage=$stage" ogpsa_dataset=null ogpsa_num_samples=null ogpsa_update_interval=null) ;;
  *) usage ;;
esac
case $tuning in
  full) export FORCE_TORCHRUN=1 ;; # DeepSpeed runs under torchrun only, also on one GPU
  lora) ;;
  *) usage ;;
esac
case $stage in sft | dpo) ;; *) usage ;; esac

root=$(realpath "$(dirname "$0")/../..")
words+=("output_dir=$(realpath -m "${SAVES:-$root/saves}")/$model/$tuning/${stage}_$method")
cd "$root"
exec llamafactory-cli train "examples/yaml/recipes/${tuning}_$stage.yaml" "${words[@]}" "$@"
