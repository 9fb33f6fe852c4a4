"""What one scan keeps for its backward pass and needs besides, in closed form, by form.

Symbols: B batch, L length, D channels, N states; T steps a chunk. A *full tensor* is one of
B L D N float32 elements: the scan's intermediates before they are summed over the states.

What autograd keeps, read off the formulas (analysis.studies.memory.scans counts it):

recurrent         2 full tensors: exp(delta_t A) and h_t of every step.
document_chunked  5: b, exp(log_decay - cs), exp(cs), the bracket it multiplies, h. log_decay is
                  a sixth while the forward pass of the layer lasts (sub and cumsum keep nothing).
document_as_coded 6: delta x B too, which (delta x B) u needs for the gradient of u. It is the
                  order of the published script; document_chunked has the cheaper (delta u) x B.
document_cumsum   5, the same tensors in one chunk. corrected_cumsum 5, with exp(-cs).
chunked           5 - 2/T: the decays, the inputs (kept whole by the view of their first step),
                  the local states, exp(cs), h; and 2/T of carries.
fused             no full tensor: its inputs, and one state every few steps (``saved_shape``).
epsilon           5: b, exp(cs) + epsilon, exp(cs), the bracket, h. clamped 6, with -cs and its
                  exponential; centred 6, with both exponentials and the local sums.
pairwise          3 + T: b, exp(cs), h, and T weights a step, as segment_sum; late_mask 3 + 2 T,
                  the weights before and after the mask.
associative       2 + 3 log2 T: each doubling keeps a, and a and h as shifted.

The casts of autocast change none of these: the scan runs in float32.
"""

from __future__ import annotations

import math

import torch

from mambabyte.config.scan_forms import FORMS
from mambabyte.errors import UserError
from mambabyte.ops.scan import cpu as native_scan

FLOAT32 = 4  # bytes
_CUMSUMS = ("document_chunked", "document_as_coded", "document_cumsum", "corrected_cumsum")
# Full tensors that each repair of the trick keeps, in the words of mambabyte.ops.scan.repairs.
_REPAIRS = {
    "clamped": ("inputs b", "-cs", "exp(-cs), clamped", "exp(cs)", "bracket", "states h"),
    "epsilon": ("inputs b", "exp(cs) + epsilon", "exp(cs)", "bracket", "states h"),
    "centred": ("inputs b", "exp(cs - m)", "exp(m - cs)", "local sums", "exp(cs)", "states h"),
    "pairwise": ("inputs b", "exp(cs)", "states h"),
    "late_mask": ("inputs b", "exp(cs)", "states h"),
    "segment_sum": ("inputs b", "exp(cs)", "states h"),
    "associative": (),
}
# Tensors of a weight for each pair of steps in a chunk, and masks of a byte a pair.
_PAIRS = {"pairwise": (1, 1), "late_mask": (2, 1), "segment_sum": (1, 2)}

# What a scan keeps without the axis of the states: small beside a full tensor.
PER_CHANNEL = ("delta u", "delta, folded", "delta u, folded", "B and C, folded", "masks")


def scan_terms(
    form: str, batch: int, length: int, channels: int, states: int, chunk: int,
    device: str = "cpu", dtype: torch.dtype = torch.float32,
) -> list[tuple[str, int, int]]:
    """(tensor, elements, itemsize) that one scan keeps for its backward pass.

    Counts what the form itself makes; its inputs belong to the layer (see
    mambabyte.model.families.mamba). ``dtype`` is that of the streams, bfloat16 under bf16 autocast;
    it matters to the fused form alone.
    """
    wide = channels * states
    full = batch * length * wide
    token = batch * length * channels
    if form == "fused":
        shape = _fused_saved_shape(batch, length, channels, states, device, dtype)
        return [("state checkpoints", math.prod(shape), FLOAT32)]
    if form == "recurrent":
        return [
            ("decays exp(delta A)", full, FLOAT32),
            ("states h", full, FLOAT32),
            ("initial state", batch * wide, FLOAT32),
            ("delta u", token, FLOAT32),
        ]
    if form in _CUMSUMS:
        exponential = "exp(-cs)" if form == "corrected_cumsum" else "exp(log_decay - cs)"
        names = ("inputs b", exponential, "exp(cs)", "bracket (cumsum + carry)", "states h")
        inputs = (("delta x B", full, FLOAT32) if form == "document_as_coded"
                  else ("delta u", token, FLOAT32))
        return [*((name, full, FLOAT32) for name in names), inputs]
    if form == "chunked":
        steps = min(chunk, length)
        pieces = -(-length // steps)
        padded = batch * pieces * steps
        terms = [
            ("delta, folded", padded * channels, FLOAT32),
            ("delta u, folded", padded * channels, FLOAT32),
            ("B and C, folded", 2 * padded * states, FLOAT32),
            ("exp(cs)", padded * wide, FLOAT32),
            ("states h", padded * wide, FLOAT32),
            ("carries, stacked", batch * pieces * wide, FLOAT32),
            # The product of the last chunk makes the final state, which training does not use.
            ("carries", batch * (pieces - 1) * wide, FLOAT32),
        ]
        if steps > 1:
            terms += [
                ("decays exp(delta A)", padded * wide, FLOAT32),
                ("inputs", padded * wide, FLOAT32),
                ("local states", batch * pieces * (steps - 2) * wide, FLOAT32),
            ]
        return terms
    if form in _REPAIRS:
        return _repair_terms(form, batch, length, channels, states, chunk)
    raise UserError(f"no closed form for scan form {form!r}: choose {', '.join(FORMS)}")


def _chunks(length: int, chunk: int) -> list[int]:
    """Steps of each chunk: all ``chunk`` but perhaps the last; 0 is the whole length."""
    chunk = min(chunk or length, length)
    return [min(chunk, length - start) for start in range(0, length, chunk)]


def _repair_terms(
    form: str, batch: int, length: int, channels: int, states: int, chunk: int
) -> list[tuple[str, int, int]]:
    wide = batch * channels * states
    steps = _chunks(length, chunk)
    terms = [(name, length * wide, FLOAT32) for name in _REPAIRS[form]]
    if form in _PAIRS:
        weights, masks = _PAIRS[form]
        pairs = sum(t * t for t in steps)
        terms += [("weights", weights * pairs * wide, FLOAT32), ("masks", masks * pairs, 1)]
    if form == "associative":
        # Each doubling multiplies by a and by the shifted a and h; the carry by the last a, but
        # for the first chunk, whose state wants no gradient; C by h.
        doublings = [(t - 1).bit_length() for t in steps]
        kept = sum(t * (3 * n + 2) for t, n in zip(steps, doublings, strict=True))
        terms.append(("a, shifted a and h of each doubling",
                      (kept - (steps[0] if doublings[0] else 0)) * wide, FLOAT32))
    if form not in ("clamped", "epsilon"):
        terms.append(("initial state", wide, FLOAT32))
    return [*terms, ("delta u", batch * length * channels, FLOAT32)]


def _fused_saved_shape(
    batch: int, length: int, channels: int, states: int, device: str, dtype: torch.dtype
) -> tuple[int, ...]:
    if device != "cuda":
        return native_scan.saved_shape(batch, length, channels, states)
    from mambabyte.ops.scan import plan as cuda_plan

    return cuda_plan.saved_shape(batch, length, channels, states, dtype)


def scan_workspace(form: str, batch: int, length: int, channels: int, states: int, chunk: int,
                   ) -> tuple[int, int]:
    """Bytes that a scan needs above what it keeps: (forward, backward), at the worst moment.

    In full tensors, with k chunks (c = 1/k of one): the forward of the document's form holds
    log_decay and, of the chunk at hand, cs, inner and the product with C: 1 + 3 c. Its backward
    is worse: the gradient of each slice ``x[:, start:end]`` is a tensor of the *full* length,
    zero outside the chunk. Two of them accumulate (for b and log_decay) and a third is under
    way, while of the last chunk only the 4 c that it kept are free again: 3 - 4 c. ``split``
    instead of slices has gradients of the size of the chunk, joined once: no such excess.
    """
    full = batch * length * channels * states * FLOAT32
    if form in _CUMSUMS:
        c = full if form == "document_cumsum" else full * min(chunk, length) // length
        if form == "corrected_cumsum":
            return full + 2 * c, 2 * c
        return full + 3 * c, max(3 * full - 4 * c, 2 * c)
    if form in _REPAIRS:
        c = full * min(chunk, length) // length
        pairs = c * min(chunk, length)  # a weight for each pair of steps in one chunk
        # Forward: log_decay (and b, which associative does not keep), then what a chunk makes and
        # drops. Backward: gradients of the weights, one a pass over the pairs.
        return {
            "clamped": (full + 2 * c, 2 * c), "epsilon": (full + c, 2 * c),
            "centred": (full + 4 * c, 2 * c), "pairwise": (full + 2 * pairs, 2 * pairs),
            "late_mask": (full + pairs, 2 * pairs),
            "segment_sum": (full + 2 * pairs, 3 * pairs),
            "associative": (2 * full + 2 * c, 2 * c),
        }[form]
    if form == "chunked":
        # Forward: log_decay, the stacked local states and the product with the carries.
        return 3 * full, 3 * full
    if form == "recurrent":
        return 0, 6 * batch * channels * states * FLOAT32
    return 0, 0


def partial_sums(
    batch: int, length: int, channels: int, states: int, device: str, dtype: torch.dtype
) -> int:
    """Elements of the partial sums of dB and dC in the backward pass of the fused scan."""
    if device != "cuda":
        return 2 * batch * length * states * -(-channels // native_scan.GROUP)
    from mambabyte.ops.scan import plan as cuda_plan

    return math.prod(cuda_plan.partial_sums_shape(batch, length, channels, states, dtype))
