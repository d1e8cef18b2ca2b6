"""Started by test_peak_memory.py: trains in forks of its own, and says how much memory that took.

A run is given as "train" (arguments of TrainConfig), "coder" (of CoderConfig), "environment" and,
for a live run, "model" and "data" (of DataConfig).

Said are the bytes by which the peak of the resident memory stands above what was resident before.
By then everything is imported and compiled, a tiny coder has been trained on the same data, and the
model is loaded.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
from pathlib import Path
from typing import Any

import torch
from forks import serve

import sparsify_vlm.training.run  # noqa: F401 - `train` imports it when it is called
from sparsify_vlm.coders import Clt, CltConfig, forward_backward
from sparsify_vlm.data import DataConfig
from sparsify_vlm.models import load_model
from sparsify_vlm.training import CoderConfig, TrainConfig, train
from sparsify_vlm.training.at_once import UpdatedAtOnce
from sparsify_vlm.training.distributed import World
from sparsify_vlm.training.optimizers import Optimizers

M_MMAP_THRESHOLD = -3  # glibc's malloc.h
os.fsync = os.fstat  # gigabytes of checkpoints that nobody reads


def resident(which: str) -> int:
    """Bytes: VmRSS now, VmHWM at the most since it was last reset."""
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def warm_up(cfg: TrainConfig) -> None:
    """One tiny step with everything that is made once per process."""
    clt = Clt(CltConfig(16, ["a", "b"], num_latents=256, k=4, n_targets=2))
    optimizers = Optimizers(list(clt.parameters()), cfg, 256, 10)
    x = torch.randn(2, 64, 16)
    for number in range(2):
        optimizers.begin(number)
        at_once = UpdatedAtOnce(clt, optimizers, World())
        forward_backward(clt, x, x, gradients=at_once)
        optimizers.finish()
        forward_backward(clt, x, x)
        optimizers.finish()


def grown(settings: dict[str, Any]) -> int:
    os.environ.update(settings["environment"])
    cfg = TrainConfig(sae=CoderConfig(**settings["coder"]), **settings["train"])
    warm_up(cfg)
    data = DataConfig(**settings.get("data", {}))
    loaded = load_model(settings["model"], "cpu") if "model" in settings else None
    tiny = {"batch_tokens": 64, "batch_size": 2, "max_steps": 1, "save_dir": f"{cfg.save_dir}/tiny"}
    first = {
        **settings["train"],
        "micro_acc_steps": 1,
        "stream_activations": False,
        "penalty": "none",
    }
    coder = CoderConfig(transcode=True, num_latents=32, k=4)
    train(TrainConfig(sae=coder, **(first | tiny)), data, loaded=loaded, quiet=True)
    if loaded is not None:  # `load_model` told glibc to keep what is freed
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, int(os.environ["MALLOC_MMAP_THRESHOLD_"]))
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    train(cfg, data, loaded=loaded, quiet=True)
    return resident("VmHWM") - before


if __name__ == "__main__":
    serve(grown)
