"""Weights between this package and the public layouts of Mamba and Mamba-2.

    mambabyte convert runs/first public/first --to mamba_ssm
    mambabyte convert public/first runs/again

The source is a run or checkpoint folder of this package, or a folder with config.json and
safetensors of transformers, mamba_ssm or MambaByte; nothing is downloaded. Numbers are written in
float32, a tensor at a time. docs/convert.md says which models the libraries have in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from analysis.cli.console import Bar
from analysis.cli.options import POSITIONAL, parse, print_result
from mambabyte.config.checks import Count
from mambabyte.config.public import Layout
from mambabyte.errors import UserError


@dataclass(frozen=True)
class Options:
    source: Annotated[Path, POSITIONAL]
    """Folder of the model to read."""
    target: Annotated[Path, POSITIONAL]
    """Folder to write, new or empty."""
    to: Layout = "mambabyte"
    """The library that is to read it."""
    shard_bytes: Count = 5 * 10**9
    """Of other libraries' files, how large one may be; a larger model is several."""
    json: bool = False
    """Print the result as JSON."""


def run(argv: list[str]) -> int:
    options = parse(Options, argv, "convert", __doc__)
    if options.target.exists() and not (
            options.target.is_dir() and not any(options.target.iterdir())):
        raise UserError(f"{options.target} is there already: choose a new folder")

    from mambabyte.checkpoint import find_checkpoint
    from mambabyte.model import ByteLM
    from mambabyte.model.pretrained import open_pretrained, save_pretrained

    with Bar("converting") as bar:
        run_folder = (options.source / "checkpoints").is_dir()
        source = open_pretrained(
            find_checkpoint(options.source) if run_folder else options.source, ByteLM)
        if options.to == "mambabyte":  # one file, which is made in memory
            source.check_memory()
        save_pretrained(options.target, source.config, source.tensors(bar), options.to,
                        options.shard_bytes)
    record = {"source": source.folder, "target": options.target, "layout": options.to,
              "parameters": source.config.n_parameters, "layers": source.config.layers,
              "vocab_size": source.config.vocab_size, "tied_head": source.config.tied_head}
    print_result(record, options.json, [
        f"{options.target}: {record['parameters']:,} parameters, {record['vocab_size']} symbols, "
        f"{source.config.n_layer} layers, for {options.to}"])
    return 0
