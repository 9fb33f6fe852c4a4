"""DataFrames in files: Parquet that keeps "not measured" and "not a number" apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from mambabyte.errors import UserError


def not_measured(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """A copy in which NaN in these columns is None: the report then says "not measured".

    Without names, in all columns. pandas turns None among floats into NaN, and a NaN may also be
    a result, so it is for the study to say which it is.
    """
    columns = columns or tuple(c for c in frame if frame[c].isna().any())
    changed = {c: frame[c].astype(object).where(frame[c].notna(), None) for c in columns}
    return frame.assign(**changed)


def in_words(
    frame: pd.DataFrame, column: str, none: str | pd.Series, form: str = "{:,.0f}"
) -> pd.DataFrame:
    """A copy in which None of a column reads as what it means there, the rest as written numbers.

    For what was looked for and did not happen, which "not measured" would deny. ``none`` is a word
    for all rows, or one a row.
    """
    words = none if isinstance(none, pd.Series) else pd.Series(none, index=frame.index)
    said = [word if pd.isna(value) else form.format(value)
            for value, word in zip(frame[column], words, strict=True)]
    return frame.assign(**{column: pd.Series(said, index=frame.index, dtype=object)})


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Parquet that keeps None and NaN apart: the first was not measured, the second was NaN."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = {str(c): _arrow(frame[c]) for c in frame.columns}
        pq.write_table(pa.table(columns), path)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise UserError(
            f"table {path.stem!r} has a column of mixed or unknown types: {error}") from None


def read_frame(path: Path) -> pd.DataFrame:
    """The inverse of write_frame; a column with unmeasured cells has dtype object and None."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.null_count:
            columns[name] = pd.Series(column.to_pylist(), dtype=object)
        else:
            columns[name] = column.to_pandas()
    return pd.DataFrame(columns)


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
