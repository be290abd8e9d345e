#!/usr/bin/env bash
# Safety SFT, then DPO on top of it:
#
#     examples/recipes/sft_then_dpo.sh MODEL TUNING METHOD [key=value ...]
#
# MODEL is qwen2_5_7b or llama3_1_8b, TUNING full or lora, METHOD ogpsa or naive. What follows goes to both stages, e.g.
# dataset_dir=/data/recipes. The results are in saves/MODEL/TUNING/; SAVES=DIR takes another folder than saves.
set -euo pipefail

if [ $# -lt 3 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
model=$1 tuning=$2 method=$3
shift 3

here=$(dirname "$0")
saves=$(realpath -m "${SAVES:-$here/../../saves}")/$model/$tuning
if [ "$tuning" = full ]; then
  start=("model_name_or_path=$saves/sft_$method")
else
  # The SFT's adapter is merged first, so that DPO's reference model is the model after SFT.
  start=("adapter_name_or_path=$saves/sft_$method" "create_new_adapter=true")
fi

"$here/train.sh" "$model" "$tuning" sft "$method" "$@"
"$here/train.sh" "$model" "$tuning" dpo "$method" "output_dir=$saves/sft_dpo_$method" "$@" "${start[@]}"
