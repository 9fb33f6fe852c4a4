"""Files of n-gram models: numbers alone, nothing that runs when loaded."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mambabyte.config.files import whole_file
from mambabyte.errors import UserError
from mambabyte.task.ngram import MAX_ORDER, Level, NgramModel, V, digest

_LOG = logging.getLogger(__name__)
_DTYPES = [torch.int64, torch.int32, torch.int32, torch.uint8, torch.int32]  # of a level's fields


def save(model: NgramModel, path: Path) -> None:
    """Write the tables as safetensors, under a checksum."""
    tensors, about = model.named()
    with whole_file(path) as temporary:
        save_file(tensors, temporary, {**about, "sha256": digest(tensors, about)})


def load(path: Path, device: torch.device | str = "cpu") -> NgramModel:
    """Read what ``save`` wrote. Raises UserError for a file that is not a whole model, or is
    not what was written; one from before there was a checksum is checked without it."""
    try:
        if not Path(path).is_file():  # to read a pipe would be to wait for ever
            raise ValueError("there is no such file")
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            order = int(about["order"])
            names = [f"{m}.{name}" for m in range(min(order, MAX_ORDER))
                     for name in Level.__dataclass_fields__]
            if not names or sorted(names) != sorted(file.keys()):
                raise ValueError(f"its tables are not those of order {order}")
            tensors = {name: file.get_tensor(name) for name in names}
        said, counted = about["discount"], int(about["bytes_counted"])
        discount = None if said == "None" else float(said)
        if discount is not None and not 0 < discount < 1:
            raise ValueError(f"its discount is {discount}, expected one between 0 and 1")
        said_digest = about.pop("sha256", None)
        if unknown := about.keys() - {"order", "discount", "bytes_counted"}:
            raise ValueError(f"it says {', '.join(sorted(unknown))}")  # a damaged "sha256", too
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is no n-gram model ({str(error).splitlines()[0]}): expected "
                        "a file written by mambabyte ngram --save") from None
    levels = [Level(*(tensors[f"{m}.{name}"] for name in Level.__dataclass_fields__))
              for m in range(order)]
    for m, level in enumerate(levels):
        _check_level(path, m, level, len(levels[m - 1].key) if m else 1,
                     {counted, len(levels[m + 1].symbol)} if m + 1 < order else {counted})
    if said_digest is None:
        _LOG.warning("note: %s has no checksum (made before there was one): damage to it may "
                     "not be told", path)
    elif said_digest != digest(tensors, about):
        raise UserError(f"{path} is not what was written (its SHA-256 is another): count the "
                        "text again")
    return NgramModel(levels, discount, counted).to(device)


def _check_level(path: Path, m: int, level: Level, parents: int, sums: set[int]) -> None:
    """UserError unless the tables of this level fit together, so that no lookup leaves them and
    distributions are some. ``sums``: what all counts may add up to, bytes or distinct pairs."""
    u, e = len(level.key), len(level.symbol)
    start = level.start
    sound = (
        [t.dtype for t in vars(level).values()] == _DTYPES
        and all(t.ndim == 1 for t in vars(level).values())
        and u >= 1 and len(start) == u + 1 and len(level.total) == u and len(level.count) == e
        and int(start[0]) == 0 and int(start[-1]) == e and bool((start[1:] > start[:-1]).all())
        and int(level.key[0]) >= 0 and int(level.key[-1]) < parents * V
        and bool((level.key[1:] > level.key[:-1]).all()) and bool((level.count >= 1).all())
        and _sums_agree(level, sums)
    )
    if not sound:
        raise UserError(f"{path} is no n-gram model: the tables of order {m + 1} do not agree")


def _sums_agree(level: Level, sums: set[int]) -> bool:
    """Whether ``total`` is the sum of counts, and bytes ascend within each context."""
    running = torch.cat([level.count.new_zeros(1, dtype=torch.int64), level.count.cumsum(0)])
    totals = running[level.start[1:].long()] - running[level.start[:-1].long()]
    first = torch.zeros(len(level.symbol), dtype=torch.bool, device="cpu")
    first[level.start[:-1].long()] = True
    ascend = (level.symbol[1:] > level.symbol[:-1]) | first[1:]
    return bool((totals == level.total).all() and ascend.all()) and int(running[-1]) in sums
