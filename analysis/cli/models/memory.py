"""Will a training step fit, by how much, and what would fit instead? Nothing is allocated.

    mambabyte memory --preset mamba_byte --batch-size 64 --context 2048 --device-memory 40GB
    mambabyte memory --preset hybrid_3_1 --device-memory 16GiB --json
    mambabyte memory runs/first --train.micro-batches 2 --device cpu
    mambabyte memory path/to/mamba-130m-hf/config.json --device-memory 24GB
    mambabyte memory --model.d-model 512 --model.n-layer 12 --train.precision fp32
    mambabyte memory --preset mamba_byte_original --scan-form document_chunked --device-memory 40GB

A run folder, or a file as ``train --config`` takes it, or the config.json of a public Mamba or
Mamba-2, stands for its model and training; the options of train change them. The study `memory`
holds these formulas against measurements.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from analysis.cli.options import POSITIONAL, parse, print_result
from analysis.cli.recipe import option, recipe
from mambabyte.config import ModelConfig, TrainConfig
from mambabyte.config.checks import Count
from mambabyte.config.mixers import LayerPattern
from mambabyte.config.presets import PresetName
from mambabyte.config.scan_forms import FormOrAuto


@dataclass(frozen=True)
class Options:
    run: Annotated[Path | None, POSITIONAL] = None
    """Run folder, or a file of JSON or TOML, whose model and training are asked about."""
    preset: PresetName = "mamba_byte"
    """Named system that fills the other options."""
    batch_size: Count | None = None
    """Sequences a step; short for --train.batch-size."""
    context: Count | None = None
    """Bytes a sequence; short for --train.context."""
    layer_pattern: LayerPattern | None = None
    """M, A, MMMA, ...; short for --model.layer-pattern."""
    scan_form: FormOrAuto | None = None
    """Form of the scan; short for --model.scan-form."""
    device: Literal["cuda", "cpu"] = "cuda"
    """What it would run on: on CUDA the fused scan and bf16 autocast are the default."""
    device_memory: str | None = None
    """What there is, e.g. 40GB (10^9) or 40GiB (2^30)."""
    json: bool = False
    """Print the result as JSON."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def run(argv: list[str]) -> int:
    named = option(argv, "--preset")
    options = _parsed(argv, named, None)
    if options.run is not None:
        options = _parsed(argv, named, options.run)

    from analysis.theory.fit import fit, parse_memory
    from mambabyte.errors import UserError

    def given(*names: str) -> dict[str, Any]:
        found = {name: getattr(options, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    model = replace(options.model, **given("layer_pattern", "scan_form"))
    train = replace(options.train, **given("batch_size", "context"))
    room = None if options.device_memory is None else parse_memory(options.device_memory)
    if room is not None and room < 10**6:  # a unit was forgotten, as in 40 for 40GB
        raise UserError(f"--device-memory is {room} bytes, less than any device has: write the "
                        "unit, e.g. 40GB or 40GiB")
    result = fit(model, train, room, device=options.device)

    of = options.run or options.preset
    lines = [f"{of}: {model.n_parameters:,} parameters, layers {model.layers}, batch "
             f"{train.batch_size} x context {train.context}, scan {result.budget.form}, "
             f"{result.budget.autocast} on {options.device}"]
    unit, size_of = ("GB", 1e9) if result.required_bytes >= 1e9 else ("MB", 1e6)
    lines += [f"  {name:12} {n / size_of:10.3f} {unit}" for name, n in result.breakdown.items()]
    lines.append(f"  {'needed':12} {result.required_bytes / size_of:10.3f} {unit}"
                 f"   (worst moment: {result.budget.worst_moment})")
    if room is not None and result.spare_bytes is not None:
        verdict = "fits, with" if result.fits else "does not fit: it lacks"
        lines += [
            f"  {verdict} {abs(result.spare_bytes) / 1e9:.3f} GB of {room / 1e9:.3f} GB",
            f"  largest batch at context {train.context}: {result.largest_batch}",
            f"  largest context at batch {train.batch_size}: {result.largest_context}",
        ]
    print_result({**asdict(result), "preset": None if options.run else options.preset,
                  "run": options.run, "model": asdict(model), "train": asdict(train)},
                 options.json, lines)
    return 0


def _parsed(argv: list[str], preset: str | None, file: Path | None) -> Options:
    start = recipe(preset, file)
    return parse(Options, argv, "memory", __doc__, model=start.model, train=start.train)
