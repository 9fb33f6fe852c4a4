"""Will a training step fit, by how much, and what would fit instead? Nothing is allocated.

    mambabyte memory --preset mamba_byte --batch-size 64 --context 2048 --device-memory 40GB
    mambabyte memory --preset hybrid_3_1 --device-memory 16GiB --json
    mambabyte memory --preset mamba_byte_original --scan-form document_chunked --device-memory 40GB

The study `memory` holds these formulas against measurements.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

from analysis.cli.options import parse, print_result


@dataclass(frozen=True)
class Options:
    preset: str = "mamba_byte"
    """Named system."""
    batch_size: int | None = None
    """Sequences a step; the preset's when not given."""
    context: int | None = None
    """Bytes a sequence; the preset's when not given."""
    layer_pattern: str | None = None
    """M, A, MMMA, ...; the preset's when not given."""
    scan_form: str | None = None
    """Form of the scan; the preset's when not given."""
    device: Literal["cuda", "cpu"] = "cuda"
    """What it would run on: on CUDA the fused scan and bf16 autocast are the default."""
    device_memory: str | None = None
    """What there is, e.g. 40GB (10^9) or 40GiB (2^30)."""
    json: bool = False
    """Print the result as JSON."""


def run(argv: list[str]) -> int:
    options = parse(Options, argv, "memory", __doc__)

    from analysis.theory.fit import fit, parse_memory
    from mambabyte.config import get_preset
    from mambabyte.errors import UserError

    preset = get_preset(options.preset)
    model = replace(
        preset.model,
        layer_pattern=(preset.model.layer_pattern if options.layer_pattern is None
                       else options.layer_pattern),
        scan_form=preset.model.scan_form if options.scan_form is None else options.scan_form,
    )
    recipe = replace(
        preset.train,
        batch_size=preset.train.batch_size if options.batch_size is None else options.batch_size,
        context=preset.train.context if options.context is None else options.context,
    )
    room = None if options.device_memory is None else parse_memory(options.device_memory)
    if room is not None and room < 10**6:  # a unit was forgotten, as in 40 for 40GB
        raise UserError(f"--device-memory is {room} bytes, less than any device has: write the "
                        "unit, e.g. 40GB or 40GiB")
    result = fit(model, recipe, room, device=options.device)

    lines = [f"{options.preset}: {model.n_parameters:,} parameters, layers {model.layers}, batch "
             f"{recipe.batch_size} x context {recipe.context}, scan {result.budget.form}, "
             f"{result.budget.autocast} on {options.device}"]
    lines += [f"  {name:12} {size / 1e9:10.3f} GB" for name, size in result.breakdown.items()]
    lines.append(f"  {'needed':12} {result.required_bytes / 1e9:10.3f} GB"
                 f"   (worst moment: {result.budget.worst_moment})")
    if room is not None and result.spare_bytes is not None:
        verdict = "fits, with" if result.fits else "does not fit: it lacks"
        lines += [
            f"  {verdict} {abs(result.spare_bytes) / 1e9:.3f} GB of {room / 1e9:.3f} GB",
            f"  largest batch at context {recipe.context}: {result.largest_batch}",
            f"  largest context at batch {recipe.batch_size}: {result.largest_context}",
        ]
    print_result({**asdict(result), "preset": options.preset}, options.json, lines)
    return 0
