"""What is measured: metrics of one task, and the matrix of results task by task."""

from pcl_ext.metrics.result_matrix import ResultMatrix, higher_is_better
from pcl_ext.metrics.task_metrics import TaskMetrics
from pcl_ext.task import METRICS

__all__ = ["METRICS", "ResultMatrix", "TaskMetrics", "higher_is_better"]
