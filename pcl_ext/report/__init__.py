"""`report`: one page that shows what a run has learned, and that it forgot nothing."""

from pcl_ext.report.page import report

__all__ = ["report"]
