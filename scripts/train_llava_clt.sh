#!/usr/bin/env bash
# Train a cross-layer transcoder of LLaVA-1.5-7B with configs/llava_clt.yaml on all GPUs here.
# Further flags win over the file's: scripts/train_llava_clt.sh --max_steps 100 --run_name trial
# A run that stopped is continued by the same command with --resume.
set -euo pipefail
cd "$(dirname "$0")/.."
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 1 ]; then
    exec torchrun --standalone --nproc_per_node "$gpus" -m sparsify_vlm train --config configs/llava_clt.yaml "$@"
fi
exec python3 -m sparsify_vlm train --config configs/llava_clt.yaml "$@"
