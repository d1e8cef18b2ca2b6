"""`python -m sparsify_vlm`: the same as the script `sparsify-vlm`."""

from __future__ import annotations

import sys

from sparsify_vlm.cli import main

if __name__ == "__main__":
    sys.exit(main(program="python -m sparsify_vlm"))
