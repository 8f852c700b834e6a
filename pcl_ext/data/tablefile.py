"""Reading a Parquet or CSV file into memory, by default only the columns that are asked for."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from pcl_ext.data._arrow import csv, pa, pc, pq
from pcl_ext.data.config import TableConfig

_SEPARATOR = "\x1f"
NULLS = [
    "",
    "NA",
    "NaN",
    "nan",
    "null",
]  # numbers, and keys of events; another text is missing where it is empty


def read_table(
    config: TableConfig, folder: Path, where: str, required: set[str], optional: Iterable[str] | None = None
) -> pa.Table:
    """The `required` columns and those of `optional` that are there (None: all).

    Raises FileNotFoundError, or ValueError naming the TOML table, the file and the column.
    """
    path = folder / config.file
    if not path.is_file():
        raise FileNotFoundError(f"{where}: file {path} is missing")
    if path.suffix not in (".parquet", ".pq"):
        return _read_csv(config, path, where, required, optional)
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        return file.read(columns=_choose(names, path, where, required, optional))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{where}: {path} is not a readable Parquet file: {error}") from error


def _choose(names: list[str], path: Path, where: str, required: set[str], optional) -> list[str]:
    if missing := sorted(required - set(names)):
        raise ValueError(f"{where}: {path} has no column {missing[0]!r}; it has {', '.join(names)}")
    return [name for name in names if optional is None or name in required or name in optional]


def _read_csv(config: TableConfig, path: Path, where: str, required: set[str], optional) -> pa.Table:
    delimiter, text = config.delimiter, None
    try:
        if len(delimiter) != 1:
            text = path.read_text(encoding=config.encoding).replace(delimiter, _SEPARATOR).encode()
            delimiter = _SEPARATOR
        encoding = "utf-8" if text is not None else config.encoding
        options = {
            "read_options": csv.ReadOptions(column_names=config.columns, encoding=encoding),
            "parse_options": csv.ParseOptions(delimiter=delimiter, quote_char=False if text is not None else '"'),
        }
        convert = csv.ConvertOptions(
            column_types=dict.fromkeys(config.text, pa.string()), strings_can_be_null=False, null_values=NULLS
        )

        def source():
            return str(path) if text is None else io.BytesIO(text)

        with csv.open_csv(source(), convert_options=convert, **options) as reader:
            names = reader.schema.names
        convert.include_columns = _choose(names, path, where, required, optional)
        return _empty_texts_are_null(csv.read_csv(source(), convert_options=convert, **options))
    except (pa.ArrowException, OSError, UnicodeError, LookupError) as error:
        raise ValueError(f"{where}: {path} is not readable as CSV: {error}") from error


def _empty_texts_are_null(table: pa.Table) -> pa.Table:
    for place, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            column = table.column(place)
            table = table.set_column(place, field, pc.if_else(pc.equal(column, ""), None, column))
    return table
