"""PCL against multi-task and continual-learning baselines: `python -m benchmarks.continual --help`."""
