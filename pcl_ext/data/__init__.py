"""Datasets on disk, their preparation, splits and batches."""

from pcl_ext.data.check import check
from pcl_ext.data.dataset import Dataset
from pcl_ext.data.examples import Examples
from pcl_ext.data.loader import ExampleBatch, iterate, make_batch, plan
from pcl_ext.data.split import FOLDS, fold_of
from pcl_ext.data.table import TaskTable
from pcl_ext.data.writer import DatasetWriter

__all__ = [
    "FOLDS",
    "Dataset",
    "DatasetWriter",
    "ExampleBatch",
    "Examples",
    "TaskTable",
    "check",
    "fold_of",
    "iterate",
    "make_batch",
    "plan",
]
