"""Datasets on disk, their preparation, splits and batches."""

from pcl_ext.data.check import check, check_task
from pcl_ext.data.dataset import Dataset
from pcl_ext.data.events import prepare as prepare_events
from pcl_ext.data.examples import Examples
from pcl_ext.data.loader import ExampleBatch, iterate, make_batch, plan
from pcl_ext.data.ml_1m import prepare as prepare_ml_1m
from pcl_ext.data.online_retail import prepare as prepare_online_retail
from pcl_ext.data.split import FOLDS, fold_of
from pcl_ext.data.synthetic import prepare as prepare_synthetic
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
    "check_task",
    "fold_of",
    "iterate",
    "make_batch",
    "plan",
    "prepare_events",
    "prepare_ml_1m",
    "prepare_online_retail",
    "prepare_synthetic",
]
