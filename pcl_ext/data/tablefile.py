"""Reading a Parquet file, a folder of them, or a CSV file into memory, by default only the columns asked for."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path

from pcl_ext.data._arrow import csv, ds, pa, pc
from pcl_ext.data.coded import Coder, can_code, give_back
from pcl_ext.data.config import TableConfig
from pcl_ext.data.id_text import empty_as_null, integer_ids, refuse_line_breaks

_SEPARATOR = "\x1f"
_PARQUET = (".parquet", ".pq")
_FEW = {  # batches of a Parquet file in memory at a time
    "batch_readahead": 4,
    "fragment_readahead": 1,
    "fragment_scan_options": ds.ParquetFragmentScanOptions(pre_buffer=False),
}
_BLOCK = 1 << 22  # bytes of a CSV that are read at a time; the first block says what the columns hold
_KEYS = {"user_id": "user", "item_id": "item"}  # by the name of the column that they have by default
_NULLS = ["", "NA", "NaN", "nan", "null"]  # of numbers and keys; another text is missing where it is empty
_ENCODING = ': give the `encoding` of the file, as "latin-1"'


def read_table(
    config: TableConfig, folder: Path, where: str, required: set[str], optional: Iterable[str] | None = None
) -> pa.Table:
    """The `required` columns and those of `optional` that are there (None: all). NaN is null; ids are coded.

    Raises FileNotFoundError, or ValueError naming the TOML table, the file and the column.
    """
    path = folder / config.file
    files = files_of(path)
    if not files:
        what = "has no Parquet files" if path.is_dir() else "is missing"
        raise FileNotFoundError(f"{where}: {'folder' if path.is_dir() else 'file'} {path} {what}")
    if files[0].suffix not in _PARQUET:
        return _read_csv(config, path, where, required, optional)
    _refuse_csv_keys(config, path, where)
    try:
        parts = _parts(path, files, where, required, optional)
        _choose(parts.schema.names, path, where, set(config.text), ())
        columns = _choose(parts.schema.names, path, where, required, optional)
        scan = parts.scanner(columns=columns, **_FEW)
        clean = lambda table: _clean(table, config, f"{where}: {path}")  # noqa: E731
        return _collect(scan.projected_schema, scan.to_batches(), config.ids, clean)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{where}: {path} is not a readable Parquet file: {error}") from error


def _collect(
    schema: pa.Schema, batches: Iterable[pa.RecordBatch], ids: list[str], clean: Callable[[pa.Table], pa.Table]
) -> pa.Table:
    """The table of all batches, cleaned, of which those read so far hold their ids as codes only."""
    kinds = {field.name: field.type for field in clean(schema.empty_table()).schema}
    columns = {name: Coder(kind) if name in ids and can_code(kind) else [] for name, kind in kinds.items()}
    for batch in batches:
        table = clean(pa.Table.from_batches([batch]))
        for name, column in columns.items():
            for chunk in table[name].chunks:
                column.append(chunk)
    for name, column in columns.items():  # a coder goes before the next joins its codes
        columns[name] = pa.chunked_array(column, kinds[name]) if isinstance(column, list) else column.column()
    give_back()
    return pa.table(columns)


def _clean(table: pa.Table, config: TableConfig, where: str) -> pa.Table:
    table = _nan_as_null(_plain_text(table, config.text, where))
    for name in config.keys:
        table = empty_as_null(table, name, [""])
    return table


def columns_of(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    """Columns that can be let go one by one."""
    return dict(zip(table.column_names, table.columns, strict=True))


def _refuse_csv_keys(config: TableConfig, path: Path, where: str) -> None:
    """ValueError for a key that would do nothing: who gave it believes that it does."""
    for key in ("delimiter", "quote", "columns", "encoding"):
        if getattr(config, key) != getattr(TableConfig, key):
            raise ValueError(f"{where}: {key} is for a CSV, {path} is Parquet: leave it out")


def _plain_text(table: pa.Table, as_text: Iterable[str], where: str) -> pa.Table:
    """With the columns named as text, and those of the type string_view, as strings."""
    for place, field in enumerate(table.schema):
        if field.name in as_text or str(field.type) == "string_view":  # a type that not every pyarrow knows
            try:
                table = table.set_column(place, field.name, table.column(place).cast(pa.string()))
            except pa.ArrowException as error:
                raise ValueError(f"{where}: column {field.name!r} cannot be read as text: {error}") from error
    return table


def _parts(path: Path, files: list[Path], where: str, required: set[str], optional) -> ds.Dataset:
    """One file, or many as one table: of a column's types the widest, null where a file lacks an optional column.
    Columns that are not read may be of any types."""
    names = [str(file) for file in files]
    if not path.is_dir():
        return ds.dataset(names, format="parquet")
    base = {"format": "parquet", "partition_base_dir": str(path), "partitioning": "hive"}
    parts = ds.dataset(names, **base)
    schemas = {part.path: part.physical_schema for part in parts.get_fragments()}
    first = schemas[names[0]].names
    folders = [field for field in parts.schema if field.name not in first]
    for name, schema in schemas.items():
        _choose([*schema.names, *(field.name for field in folders)], Path(name), where, required, ())
    known = pa.schema([])
    for name, schema in schemas.items():
        fields = [f for f in schema if optional is None or f.name in required or f.name in optional]
        try:
            known = pa.unify_schemas([known, pa.schema(fields)], promote_options="permissive")
        except pa.ArrowException as error:
            hint = "write a column alike in all files"
            raise ValueError(f"{where}: {name} does not go with the files before it: {error}; {hint}") from error
    others = {field.name: field for schema in schemas.values() for field in [*schema, *folders]}
    return ds.dataset(names, schema=pa.schema([*known, *(others[n] for n in others if n not in known.names)]), **base)


def files_of(path: Path) -> list[Path]:
    """The file at a path, or the Parquet files in a folder and its folders, by name; not what begins with . or _."""
    if not path.is_dir():
        return [path] if path.is_file() else []
    found = [file for file in path.rglob("*") if file.suffix in _PARQUET and file.is_file()]
    return sorted(file for file in found if not any(part[0] in "._" for part in file.relative_to(path).parts))


def _choose(names: list[str], path: Path, where: str, required: set[str], optional) -> list[str]:
    if missing := sorted(required - set(names)):
        hint = f"; `{_KEYS[missing[0]]}` says which column it is" if missing[0] in _KEYS else ""
        hint = "; `delimiter` says what is between the cells" if len(names) == 1 else hint
        raise ValueError(f"{where}: {path} has no column {missing[0]!r}; it has {', '.join(names)}{hint}")
    chosen = [name for name in names if optional is None or name in required or name in optional]
    if twice := sorted(name for name in chosen if chosen.count(name) > 1):
        raise ValueError(f"{where}: {path} has two columns {twice[0]!r}")
    return chosen


def _read_csv(config: TableConfig, path: Path, where: str, required: set[str], optional) -> pa.Table:
    delimiter, quote, text, encoding = config.delimiter, config.quote, None, config.encoding
    try:
        if len(delimiter) != 1:
            text = path.read_text(encoding=encoding).replace(delimiter, _SEPARATOR).encode()
            delimiter, quote, encoding = _SEPARATOR, "", "utf-8"
        parse = csv.ParseOptions(delimiter=delimiter, quote_char=quote or False, newlines_in_values=bool(quote))
        options = {
            "read_options": csv.ReadOptions(column_names=config.columns, encoding=encoding, block_size=_BLOCK),
            "parse_options": parse,
        }
        convert = csv.ConvertOptions(
            column_types=dict.fromkeys(config.as_text, pa.string()), strings_can_be_null=False, null_values=_NULLS
        )

        def source():
            return str(path) if text is None else io.BytesIO(text)

        with csv.open_csv(source(), convert_options=convert, **options) as reader:
            names = reader.schema.names
        _choose(names, path, where, set(config.text), ())
        convert.include_columns = _choose(names, path, where, required, optional)
        table = _collect_csv(source, config, options | {"convert_options": convert})
    except (pa.ArrowException, OSError, UnicodeError, LookupError) as error:
        raise ValueError(f"{where}: {path} is not readable as CSV: {error}{_hint(error, config)}") from error
    for name in table.column_names:
        if pa.types.is_binary(table[name].type):
            raise ValueError(f"{where}: {path}: column {name!r} is not {config.encoding} text{_ENCODING}")
        if name in config.ids and name not in config.text:
            table = integer_ids(table, name, _NULLS, where)
        if name in {*config.ids, *config.keys}:
            refuse_line_breaks(table[name], f"{where}: {path}: column {name!r}")
        if name in config.ids:
            table = empty_as_null(table, name, _NULLS if name in config.keys else [""])
    return table


def _collect_csv(source: Callable, config: TableConfig, options: dict) -> pa.Table:
    """All columns that `options` ask for, ids coded as they are written, of other text null for what is empty."""

    def clean(table: pa.Table) -> pa.Table:
        for name in set(table.column_names) - set(config.ids):
            table = empty_as_null(table, name, _NULLS if name in config.keys else [""])
        return table

    try:
        with csv.open_csv(source(), **options) as reader:
            return _collect(reader.schema, reader, config.ids, clean)
    except pa.ArrowInvalid as error:
        if "conversion error" not in str(error):
            raise
    # A column is of another kind than its first block: Arrow finds the one that fits where it reads all.
    table = csv.read_csv(source(), **options)
    return _collect(table.schema, table.to_batches(), config.ids, clean)


def _hint(error: Exception, config: TableConfig) -> str:
    """What mends a CSV that cannot be read."""
    if isinstance(error, UnicodeError) or "UTF8" in str(error) or "\0" in str(error):  # UTF-16 has zeros
        return _ENCODING
    quoted = config.quote and (config.quote in str(error) or "straddl" in str(error))  # a cell longer than a block
    return '; quote = "" where a quote is a character as others' if quoted else ""


def _nan_as_null(table: pa.Table) -> pa.Table:
    for place, field in enumerate(table.schema):
        column = table.column(place)
        if pa.types.is_floating(field.type) and pc.any(pc.is_nan(column)).as_py():
            table = table.set_column(place, field, pc.if_else(pc.is_nan(column), pa.scalar(None, field.type), column))
    return table
