"""Audit a scan, an SSD, a delta rule, an attention or a convolution of any library.

    mambabyte audit mambabyte.ops:ssd_scan
    mambabyte audit mambabyte.ops:selective_scan --out audits/scan --html

Others: transformers.models.mamba2.modeling_mamba2:mamba2_chunk_scan, mambapy.pscan:pscan,
mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined, fla.ops.kda:chunk_kda, or file.py:name
of your own with --kind (docs/audit.md has the protocol, and what is checked). Values, states and
every gradient are compared with the definition in float64. The exit status is 1 where there is a
fault. With --out the inputs of a fault are kept: mambabyte audit FILE runs that check again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from analysis.cli.console import Bar
from analysis.cli.options import POSITIONAL, parse, pick_device, print_result
from mambabyte.config.checks import DeviceOrAuto, Positive
from mambabyte.errors import UserError

Dtype = Literal["float64", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Options:
    target: Annotated[str, POSITIONAL]
    """module:function or file.py:function; or a file of inputs that failed."""
    kind: Literal["auto", "scan", "ssd", "delta", "kda", "attention", "conv"] = "auto"
    """What it computes; auto goes by its name."""
    adapter: str = "auto"
    """How it is called: the name of a known one, such as fla.gated_delta; auto goes by its name,
    else it is the protocol."""
    dtypes: tuple[Dtype, ...] = ()
    """Of its inputs; none is float32, and bfloat16 too on a GPU."""
    device: DeviceOrAuto = "auto"
    """auto, cpu, cuda or cuda:N; auto is a GPU where there is one."""
    tolerance: Positive | None = None
    """Largest relative error that is no fault; none is the dtype's own."""
    max_seconds: Positive | None = None
    """Ends after so long, and says which cases it did not reach."""
    out: Path | None = None
    """Folder for report.txt, report.json and the inputs that failed."""
    html: bool = False
    """Write report.html there, too."""
    json: bool = False
    """Print the result as JSON."""


def run(argv: list[str]) -> int:
    options = parse(Options, argv, "audit", __doc__)
    if options.html and options.out is None:
        raise UserError("--html needs --out: the folder for report.html")

    import torch

    from analysis.measure.audit.report import lines, page
    from analysis.measure.audit.run import audit, reproduce
    from analysis.measure.audit.targets import find_target
    from mambabyte.config.files import make_dir, to_json, whole_file

    device = pick_device(options.device)
    if options.out is not None:
        make_dir(options.out)  # now, and not after the audit
    if options.target.endswith(".safetensors"):
        found = reproduce(Path(options.target), device)
    else:
        names = options.dtypes or (
            ("float32", "bfloat16") if device.startswith("cuda") else ("float32",))
        target = find_target(options.target, *(
            None if word == "auto" else word for word in (options.kind, options.adapter)))
        with Bar("auditing") as bar:
            found = audit(target, [getattr(torch, name) for name in dict.fromkeys(names)], device,
                          options.out, options.tolerance, bar, options.max_seconds or math.inf)
    text = lines(found)

    def keep() -> None:
        if options.out is None:
            return
        written = {"report.txt": "\n".join(text) + "\n",
                   "report.json": to_json(found.as_dict(), indent=2) + "\n"}
        if options.html:
            written["report.html"] = page(found)
        for name, content in written.items():
            with whole_file(options.out / name) as temporary:
                temporary.write_text(content, encoding="utf-8")

    print_result(found.as_dict(), options.json, text, keep)
    return 130 if found.interrupted else 1 if found.of("fault") else 0
