"""PCL against multi-task and continual-learning baselines: `python -m benchmarks.continual --help`."""

import sys
from pathlib import Path

# `python -m` looks into the repository's root first, whose pcl_ext has nothing compiled in it: the installed one goes
# before it.
_ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [*(entry for entry in sys.path if Path(entry).resolve() != _ROOT), str(_ROOT)]
