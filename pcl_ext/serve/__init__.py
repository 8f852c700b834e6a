"""Using a run: predictions and user vectors, in one process or in many."""

from pcl_ext.serve.inputs import read_histories
from pcl_ext.serve.predictor import Predictor, as_rows

__all__ = ["Predictor", "as_rows", "read_histories"]
