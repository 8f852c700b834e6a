"""Using a run: predictions and user vectors, in one process or in many."""

from pcl_ext.model.answers import as_rows
from pcl_ext.serve.inputs import read_histories
from pcl_ext.serve.item_ids import ItemIds
from pcl_ext.serve.predictor import Predictor

__all__ = ["ItemIds", "Predictor", "as_rows", "read_histories"]
