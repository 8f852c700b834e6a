"""What needs no backbone: the best constant, and a simple model that takes seconds."""

from __future__ import annotations

from pcl_ext import baselines

REFERENCES = {"popularity": baselines.trivial, "cheap": baselines.cheap}
