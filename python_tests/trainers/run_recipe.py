"""Runs a recipe as its reader would, and writes down the losses: RECIPE [step in which rank 1 is killed]."""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_hook

recipe, kill_at = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None
rank = os.environ.get("RANK", "0")
losses = []


def watch(module, inputs, output):
    if type(module).__name__.endswith("NextItem"):
        losses.append(output.item())
        if len(losses) == kill_at and rank == "1":
            os.kill(os.getpid(), signal.SIGKILL)


torch.set_num_threads(1)
register_module_forward_hook(watch)
sys.path.insert(0, str(recipe.parent))
runpy.run_path(str(recipe), run_name="__main__")
Path(f"losses-{rank}.json").write_text(json.dumps(losses))
sys.stdout.flush()
os._exit(0)  # a thread of gloo that outlives the interpreter's end may abort a process whose work is done
