"""Recorded kernels, steps and loops decide what the ledger says of speed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from analysis.studies.claims import compute as claims
from analysis.studies.claims.evidence import Evidence
from analysis.studies.claims.ledger import CAVEAT, FAILS, HOLDS, OPEN
from tests.helpers.claims_lab import BY_ID, lab, on_gpu, run_of, training, verdict

SIZE = "16 x 1024 x 384"
GPU = {"machine": {"gpus": [{"name": "a GPU"}]}}


def scans(batch: int = 16, length: int = 1024, device: str = "cuda", **ms: float):
    rows = [{"pass": "forward+backward", "batch": batch, "length": length, "form": form, "ms": t}
            for form, t in ms.items()]
    return run_of("throughput", tables={"scan_time": rows}, device=device, provenance=GPU)


def bench(copies: float | None = None, size: str = SIZE, **us: float):
    """Kernels against each other, as ``mambabyte bench scan`` records them."""
    rows = [{"batch x length x channels": size, "of": of, "pass": "forward+backward",
             "median (us)": t} for of, t in us.items()]
    run = run_of("throughput", tables={"bench": rows}, provenance=GPU)
    return replace(run, parameters={"device": "a GPU", "copy_bytes_per_second": copies})


def steps(context: int, m: float, a: float, way: str = "compile"):
    run = run_of("throughput", {"ms_m": m, "ms_a": a}, name=f"steps-{context}")
    return replace(run, parameters={"device": "cuda", "way": way, "batch_size": 16, "d_model": 192,
                                    "n_layer": 4, "context": context})


# ------------------------------------------------------------------------ against a fused kernel


@pytest.mark.parametrize(("published", "after"), [(3.0, HOLDS), (5.0, CAVEAT), (63.0, FAILS)])
def test_recorded_scans_decide(published, after):
    assert verdict("overhead-2-4") == OPEN
    timed = Evidence((scans(document_chunked=published, fused=1.0),))
    assert verdict("overhead-2-4", timed) == after
    on_cpu = Evidence((scans(device="cpu", document_chunked=published, fused=1.0),))
    assert verdict("overhead-2-4", on_cpu) == OPEN  # a CPU's ratio says nothing about a GPU's


def test_the_kernel_that_is_meant_is_mamba_ssms():
    """Three times its time is in the range, whatever our own scan takes."""
    both = Evidence((scans(document_chunked=1.5, fused=0.1), bench(fused=100.0, mamba_ssm=500.0)))
    assert verdict("overhead-2-4", both) == HOLDS
    assert verdict("overhead-2-4", Evidence(both.runs[:1])) == FAILS
    elsewhere = Evidence((scans(1, 4096, document_chunked=1.5, fused=0.1), both.runs[1]))
    assert verdict("overhead-2-4", elsewhere) == FAILS  # of another size, so by our own scan


def test_a_newer_bench_of_mixers_does_not_hide_that_of_the_scan():
    mixers = run_of("throughput", provenance=GPU, tables={"bench": [
        {"batch x length x heads": "16 x 1024 x 6", "of": "fused", "pass": "forward+backward",
         "median (us)": 1.0}]})
    assert verdict("overhead-2-4", Evidence((
        scans(document_chunked=1.5, fused=0.1), mixers, bench(fused=100.0, mamba_ssm=500.0),
    ))) == HOLDS


@pytest.mark.parametrize(("published", "after"), [(8.0, HOLDS), (11.0, CAVEAT), (200.0, FAILS)])
def test_two_captured_steps_give_the_scan_by_their_difference(published, after):
    """(published - 3 ms) / 4 layers + 0.2 ms against 0.5."""
    steps_alone = run_of("throughput", tables=training(published, M=3.0), device="cuda")
    recorded = Evidence((steps_alone, bench(fused=200.0, mamba_ssm=500.0)))
    finding = claims.judge(BY_ID["slower-2-4"], lab(recorded))
    assert finding.verdict == after
    assert f"{((published - 3) / 4 + 0.2) / 0.5:.0f} x" in str(finding.ours)
    assert verdict("slower-2-4", Evidence((steps_alone,))) == OPEN


def test_the_documents_size_is_preferred():
    found = Evidence((scans(document_chunked=3.0, fused=1.0),))
    rows = [*found.runs[0].tables["scan_time"].frame.to_dict("records"),
            *scans(1, 65536, document_chunked=900.0, fused=1.0).tables["scan_time"].frame.to_dict(
                "records")]
    assert verdict("overhead-2-4", on_gpu(tables={"scan_time": rows})) == HOLDS


def test_a_measured_factor_makes_a_right_product_a_caveat():
    assert verdict("third-from-overhead") == HOLDS
    for published, after in ((3.0, HOLDS), (60.0, CAVEAT)):
        assert verdict("third-from-overhead", Evidence((scans(
            document_chunked=published, fused=1.0),))) == after


def test_what_slicing_adds_is_told_from_what_materialising_costs():
    assert verdict("overhead-cause") == FAILS  # by the bytes that are moved
    for ms, after in ((49.0, HOLDS), (30.0, CAVEAT), (4.0, FAILS)):
        timed = scans(1, document_chunked=50.0, corrected_cumsum=ms, fused=2.0)
        assert verdict("overhead-cause", Evidence((timed,))) == after


def test_bytes_at_the_speed_of_copying_explain_a_step():
    """16 x 1024 x 384 x 16 elements of 1,923 bytes in four layers are 774 GB."""
    steps_alone = run_of("throughput", tables=training(200.0, M=3.0), device="cuda", provenance=GPU)
    for speed, after in ((4.2e12, HOLDS), (12e12, CAVEAT), (50e12, FAILS)):
        recorded = Evidence((steps_alone, bench(copies=speed, fused=200.0)))
        assert verdict("bandwidth-bound", recorded) == after
    finding = claims.judge(BY_ID["bandwidth-bound"], lab(Evidence(
        (steps_alone, bench(copies=4.18e12, fused=200.0)))))
    assert "185 ms at the speed of copying, of 197 ms" in finding.reason
    other = replace(bench(copies=50e12, fused=200.0), provenance={
        "machine": {"gpus": [{"name": "another"}]}}, parameters={
            "device": "cuda", "copy_bytes_per_second": 50e12})
    assert verdict("bandwidth-bound", Evidence((steps_alone, other))) == HOLDS


# ----------------------------------------------------------------------------- against attention


def test_compiled_steps_at_the_documents_size_decide():
    for a, after in ((5.0, HOLDS), (2.0, CAVEAT), (0.99, FAILS)):
        recorded = Evidence((steps(1024, 1.0, a), steps(8192, 1.0, 9.0)))
        finding = claims.judge(BY_ID["five-times"], lab(recorded))
        assert finding.verdict == after
        assert "9.00 with 8192 bytes" in finding.reason
    assert verdict("five-times") == OPEN
    assert verdict("five-times", Evidence((steps(1024, 1.0, 5.0, way="graph"),))) == OPEN


def test_kernels_decide_where_no_step_was_compiled():
    for ratio, after in ((0.3, FAILS), (1.5, CAVEAT), (5.0, HOLDS)):
        recorded = Evidence((), (bench(sdpa=100 * ratio, mamba_ssm=100.0),))
        assert verdict("five-times", recorded) == after


def test_the_headline_is_not_the_kernels():
    for ratio, after in ((0.3, FAILS), (5.0, CAVEAT)):
        recorded = Evidence((bench(sdpa=100 * ratio, mamba_ssm=100.0),))
        assert verdict("five-times-kernel", recorded) == after


def test_bytes_a_second_against_the_length_of_windows_decide():
    def judged(m: float, a: float, **given: float) -> str:
        """Milliseconds with windows eight times as long."""
        return verdict("longer-window-speed",
                       Evidence((steps(1024, 1.0, 1.0), steps(8192, m, a))), **given)

    assert judged(8.0, 30.0) == CAVEAT
    assert judged(8.0, 30.0, operations__backward_exponent=1.0) == HOLDS
    assert judged(16.0, 30.0) == FAILS  # half as many bytes a second
    assert judged(8.0, 7.0) == FAILS  # attention is faster still
    assert verdict("longer-window-speed", Evidence((steps(1024, 1.0, 1.0),))) == OPEN


def test_the_published_loop_beside_attention_decides():
    """At every size that a record has of both."""
    def timed(*ratios: float) -> dict[str, list[dict]]:
        sizes = [(1, 128), (64, 1024)][:len(ratios)]
        both = [{"pass": "forward+backward", "batch": b, "length": n} for b, n in sizes]
        return {"scan_time": [{**row, "form": "indexed loop", "ms": 2 * ratio}
                              for row, ratio in zip(both, ratios, strict=True)],
                "mixers": [{**row, "mixer": "attention", "ms": 2.0} for row in both]}

    assert verdict("slower-50") == OPEN
    for ratios, after in (((50.0,), CAVEAT), ((56.0, 60.0), CAVEAT), ((70.0, 400.0), FAILS),
                          ((10.0,), FAILS)):
        finding = claims.judge(BY_ID["slower-50"], lab(on_gpu(tables=timed(*ratios))))
        assert finding.verdict == after
        assert finding.ours == f"{min(ratios):.0f} to {max(ratios):.0f} x"
    even = replace(BY_ID["slower-50"], numbers=(50.0, 35.0 + 2.8 / 9, 0.63))  # 100 x a layer
    per_layer = replace(even, numbers=(50.0, 250 * 0.07 + 4 * 0.07, 0.63))  # 50 x a layer
    record = on_gpu(tables=timed(50.0))
    assert claims.judge(even, lab(record)).verdict == CAVEAT
    assert claims.judge(per_layer, lab(record)).verdict == HOLDS
    on_cpu = Evidence((run_of("throughput", tables=timed(50.0)),))
    assert verdict("slower-50", on_cpu) == OPEN
