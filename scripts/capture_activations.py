"""Store a model's activations on a dataset; the same as `sparsify-vlm capture`.

    python scripts/capture_activations.py --model llava --dataset shapes --n_targets 16 \
        --output_dir activations/
"""

from __future__ import annotations

import sys

from sparsify_vlm.cli import COMMANDS, run_command

if __name__ == "__main__":
    sys.exit(run_command(COMMANDS["capture"], sys.argv[1:], "capture_activations.py"))
