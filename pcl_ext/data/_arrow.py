"""pyarrow, or a clear word on how to get it."""

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv as csv
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq
except ImportError as error:
    raise ImportError("datasets on disk need pyarrow: pip install '.[cli]' in the sources of pcl_ext") from error

__all__ = ["csv", "ds", "pa", "pc", "pq"]
