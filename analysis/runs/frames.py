"""DataFrames in files that keep "not measured" and "not a number" apart: CSV, or Parquet if large.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

from mambabyte.errors import UserError

LARGEST_CSV = 100_000  # bytes; beyond that nobody reads rows, and Parquet is a tenth of it
_CELL = re.compile(r'("(?:[^"]|"")*"|[^",\n]*)(,|\n)')
_WHOLE = re.compile(r"-?\d+")


def not_measured(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """A copy in which NaN in these columns is None: the report then says "not measured".

    Without names, in all columns. pandas turns None among floats into NaN, and a NaN may also be
    a result, so it is for the study to say which it is.
    """
    columns = columns or tuple(c for c in frame if frame[c].isna().any())
    changed = {c: frame[c].astype(object).where(frame[c].notna(), None) for c in columns}
    return frame.assign(**changed)


def in_words(frame: pd.DataFrame, column: str, none: str | pd.Series) -> pd.DataFrame:
    """A copy in which None of a column reads as what it means there, the rest as written numbers.

    For what was looked for and did not happen, which "not measured" would deny. ``none`` is a word
    for all rows, or one a row.
    """
    words = none if isinstance(none, pd.Series) else pd.Series(none, index=frame.index)
    said = [word if pd.isna(value) else f"{value:,.0f}"
            for value, word in zip(frame[column], words, strict=True)]
    return frame.assign(**{column: pd.Series(said, index=frame.index, dtype=object)})


def write_frame(folder: Path, name: str, frame: pd.DataFrame) -> Path:
    """``NAME.csv``, or ``NAME.parquet`` where that would be too large to be read by people.

    Both keep None and NaN apart: the first was not measured, the second was NaN. In the CSV words
    are in quotes, None is an empty cell, and nan, inf, -inf, true and false stand for themselves.
    """
    text = csv_text(name, frame)
    if len(text) <= LARGEST_CSV:
        path = folder / f"{name}.csv"
        path.write_text(text, encoding="utf-8", newline="")
        return path
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"{name}.parquet"
    pq.write_table(pa.table({str(c): _arrow(frame[c]) for c in frame.columns}), path,
                   compression="zstd")
    return path


def csv_text(name: str, frame: pd.DataFrame) -> str:
    """The CSV of ``write_frame``, of any size."""
    cells = {str(c): _cells(f"{name}: column {c!r}", frame[c]) for c in frame.columns}
    rows = [[_word(c) for c in cells], *map(list, zip(*cells.values(), strict=True))]
    return "".join(",".join(row) + "\n" for row in rows)


def read_frame(folder: Path, name: str) -> pd.DataFrame:
    """The inverse of write_frame; a column with unmeasured cells has dtype object and None."""
    path = table_file(folder, name)
    if path.suffix == ".csv":
        return _read_csv(path)
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return pd.DataFrame({
        column: pd.Series(values.to_pylist(), dtype=object) if values.null_count
        else values.to_pandas()
        for column, values in zip(table.column_names, table.columns, strict=True)})


def table_file(folder: Path, name: str) -> Path:
    """The file of a table; ValueError where there is none, as for a folder of its name."""
    for path in (folder / f"{name}.csv", folder / f"{name}.parquet"):
        if path.is_file():
            return path
    raise ValueError(f"there is no file {name}.csv or {name}.parquet")


def _read_csv(path: Path) -> pd.DataFrame:
    text = path.read_bytes().decode("utf-8")
    rows: list[list[Any]] = [[]]
    end = 0
    for cell in _CELL.finditer(text):
        if cell.start() != end:
            break
        rows[-1].append(_value(cell[1]))
        end = cell.end()
        if cell[2] == "\n":
            rows.append([])
    names, *cells, rest = [*rows, []] if len(rows) < 2 else rows
    if len(rows) < 2 or end != len(text) or rest or any(len(row) != len(names) for row in cells):
        raise ValueError(f"{path.name} has a row that is not {len(names)} cells long")
    columns = {name: [row[i] for row in cells] for i, name in enumerate(names)}
    return pd.DataFrame({name: pd.Series(values, dtype=object if None in values else None)
                         for name, values in columns.items()})


def _cells(what: str, column: pd.Series) -> list[str]:
    if isinstance(column.dtype, pd.StringDtype):  # says nan for a missing word
        column = column.astype(object).where(column.notna(), None)
    values = [None if v is pd.NA else v.item() if hasattr(v, "item") else v for v in column]
    kinds = {type(v) for v in values} - {type(None)}
    if not (kinds <= {int, float} or kinds in ({str}, {bool})):
        kind = ", ".join(sorted(k.__name__ for k in kinds))
        raise UserError(f"table {what} has cells of mixed or unknown types ({kind})")
    return [_word(v) if isinstance(v, str) else "" if v is None else repr(v).lower()
            for v in values]


def _word(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _value(cell: str) -> Any:
    if cell.startswith('"'):
        return cell[1:-1].replace('""', '"')
    if cell in ("", "true", "false"):
        return {"": None, "true": True, "false": False}[cell]
    return int(cell) if _WHOLE.fullmatch(cell) else float(cell)


def _arrow(column: pd.Series) -> Any:
    import pyarrow as pa

    if column.dtype.kind == "f" and not pd.api.types.is_extension_array_dtype(column.dtype):
        return pa.array(column.to_numpy(), from_pandas=False)
    if column.dtype == object:
        return pa.array([None if v is pd.NA else v for v in column], from_pandas=False)
    return pa.array(column.array)


def flat(what: str, frame: Any) -> pd.DataFrame:
    """``frame`` with plain, unique, named columns; UserError that begins with ``what``."""
    if not isinstance(frame, pd.DataFrame):
        raise UserError(f"{what} is a {type(frame).__name__}: give a pandas DataFrame")
    named = any(name is not None for name in frame.index.names)
    plain = frame.reset_index(drop=not named)
    if plain.columns.nlevels > 1 or not all(isinstance(c, str) and c for c in plain.columns):
        raise UserError(f"{what} has columns {list(plain.columns)!r}: give each one name with its "
                        "unit, e.g. 'peak, MiB'")
    if not plain.columns.is_unique:
        raise UserError(f"{what} has two columns of one name: {list(plain.columns)!r}")
    return plain
