"""The throughput study: fits on known data, allocations, the guard, and a tiny whole run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.measure import timing
from analysis.measure.allocations import AllocationCounter
from analysis.measure.growth import Exponent, crossover, exponent_table, fit_exponent
from analysis.measure.threads import threads
from analysis.measure.timing import Case, captured, measure
from analysis.runs.frames import not_measured
from analysis.studies.throughput import compute as throughput
from analysis.studies.throughput import figures
from analysis.studies.throughput import scans as scan_timing
from analysis.studies.throughput import values as answers
from analysis.studies.throughput.tables import crossovers_in_words
from mambabyte.energy import Energy
from mambabyte.errors import UserError
from tests.helpers.clock import Clock

LENGTHS = [64, 128, 256, 512, 1024]


def test_exponent_of_a_power_law():
    fit = fit_exponent(LENGTHS, [3e-4 * n**1.7 for n in LENGTHS])
    assert fit.exponent == pytest.approx(1.7)
    assert fit.low == pytest.approx(1.7, abs=1e-6)
    assert (fit.first_length, fit.last_length, fit.points) == (64, 1024, 5)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        noisy = [n**2.0 * np.exp(0.1 * rng.standard_normal()) for n in LENGTHS]
        fit = fit_exponent(LENGTHS, noisy)
        hits += fit.low <= 2.0 <= fit.high
    assert 270 <= hits <= 297  # 95 % of 300 is 285


def test_exponent_needs_points():
    assert fit_exponent([64], [1.0]).exponent is None
    two = fit_exponent([64, 128], [1.0, 2.0])
    assert (two.exponent, two.low) == (pytest.approx(1), None)
    with pytest.raises(UserError, match="positive"):
        fit_exponent([1, 2, 3], [1.0, 0.0, 1.0])
    with pytest.raises(UserError, match="pair up"):
        fit_exponent([1, 2], [1.0])


def test_exponents_are_fitted_to_the_longest_lengths():
    # Overhead, then quadratic: the tail shows it.
    frame = pd.DataFrame({"what": "x", "length": [1, 2, 4, 100, 200, 400, 800],
                          "ms": [1.0, 1.0, 1.0, 1e4, 4e4, 16e4, 64e4]})
    table = exponent_table(frame, ("what",))
    assert table["exponent"][0] == pytest.approx(2.0)
    assert table["first_length"][0] == 100


def test_a_streams_growth_is_of_its_last_byte_over_its_first():
    frame = pd.DataFrame([
        {"system": system, "bytes_seen": seen, "ms": ms, "state_bytes": 10 * seen}
        for system, first, last in (("SSM", 2.0, 3.0), ("attention, last 64", 1.0, 4.0),
                                    ("attention, all keys", 1.0, 8.0))
        for seen, ms in ((4096, last), (64, first))])
    found = {name: value.value for name, value in answers._streaming(frame).items()}
    assert found == {"stream_positions": 4096, "stream_growth_ssm": 1.5,
                     "stream_growth_window": 4.0, "stream_growth_cache": 8.0,
                     "stream_state_bytes": 40_960, "stream_cache_bytes": 40_960}


def test_crossover():
    assert crossover([1, 2, 4], [2.0, 2.0, 2.0], [1.0, 2.0, 4.0]) == pytest.approx(2.0)
    assert crossover([1, 4], [2.0, 2.0], [1.0, 4.0]) == pytest.approx(2.0)
    assert crossover([1, 4], [1.0, 1.0], [2.0, 2.0]) == 1.0  # from the start
    assert crossover([1, 4], [3.0, 3.0], [2.0, 2.0]) is None  # never
    assert crossover([1, 2, 4], [1.0, 3.0, 1.0], [2.0, 2.0, 2.0]) > 2.0  # the last one counts


def test_allocations_by_hand():
    x = torch.zeros(8, 4)
    with AllocationCounter() as counter:
        y = x + 1
        _ = y[2:]  # a view makes nothing
        y.add_(1)  # nor does work in place
    assert sum(counter.bytes.values()) == 8 * 4 * 4
    assert counter.calls["aten.add_"] == 1


@pytest.mark.parametrize(("cut", "exponent"), [("slice", 2.0), ("split", 1.0)])
def test_gradients_of_slices_are_quadratic_and_of_split_linear(cut, exponent):
    costs = []
    for length in LENGTHS:
        x = torch.zeros(length, 4, requires_grad=True)
        parts = ([x[i : i + 8] for i in range(0, length, 8)] if cut == "slice"
                 else x.split(8))
        y = torch.cat([p * 2 for p in parts]).sum()
        with AllocationCounter() as counter:
            y.backward()
        costs.append(sum(counter.bytes.values()))
    assert fit_exponent(LENGTHS[-3:], costs[-3:]).exponent == pytest.approx(exponent, abs=0.1)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The clock of what is timed; a test moves it."""
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def case(series: str, length: int, seconds: float, log: list, clock: Clock | None = None) -> Case:
    def call() -> None:
        log.append((series, length))
        if clock:
            clock.sleep(seconds)

    return Case((series,), length, lambda: call, {"what": series})


def test_guard_ends_a_series_and_says_so(clock):
    log: list = []
    cases = [case("slow", n, n * 1e-4, log, clock) for n in (10, 100, 1000)]
    cases += [case("fast", n, 0.0, log, clock) for n in (10, 1000)]
    table = measure(cases, rounds=2, guard_seconds=0.02, least_seconds=0.0)
    status = table.set_index(["what", "length"])["status"]
    assert status["slow", 100] == "measured"
    assert status["slow", 1000].startswith("skipped: about 0.1 s")
    assert status["fast", 1000] == "measured"
    assert ("slow", 1000) not in log
    assert table["ms"].isna().sum() == 1
    assert table.set_index(["what", "length"])["ms"]["slow", 100] == pytest.approx(10)


def test_a_first_call_that_compiles_does_not_end_a_series(clock):
    calls: list = []

    def compiling() -> None:
        calls.append(len(calls))
        clock.sleep(0.1 if len(calls) == 1 else 0.0)

    quick = case("s", 10, 1e-3, [], clock)
    slow_at_first = Case(("s",), 20, lambda: compiling, {"what": "s"})
    table = measure([quick, slow_at_first, case("s", 40, 1e-3, [], clock)], rounds=2,
                    guard_seconds=0.05, least_seconds=0.0)
    assert list(table["status"]) == ["measured"] * 3


def test_on_a_cpu_nothing_is_captured():
    def call() -> None: ...

    assert captured(call, "cpu") == (call, "wall clock")


def test_rounds_take_turns(clock):
    log: list = []
    measure([case("a", 1, 0.0, log), case("b", 1, 0.0, log)], rounds=5, guard_seconds=1.0,
            least_seconds=0.0)
    timed = log[4:]  # after two warming calls each
    assert all({timed[i][0], timed[i + 1][0]} == {"a", "b"} for i in range(0, len(timed), 2))


def test_progress_is_said_while_it_takes_time(monkeypatch):
    monkeypatch.setattr(timing, "SAY_SECONDS", 0.0)
    lines: list[str] = []
    measure([case("a", n, 0.0, []) for n in (1, 2)], rounds=1, guard_seconds=1.0,
            report=lines.append)
    assert lines == ["trying 1 of 2 points: a, length 1", "trying 2 of 2 points: a, length 2",
                     "round 1 of 1: 0 of 2 points", "round 1 of 1: 1 of 2 points",
                     "round 1 of 1: 2 points"]


def test_out_of_memory_is_a_row():
    def make():
        raise MemoryError

    table = measure([Case(("x",), n, make, {}) for n in (1, 2)], rounds=1, guard_seconds=1.0)
    assert table["status"].tolist() == ["out of memory"] * 2


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_not_measured():
    frame = not_measured(pd.DataFrame({"a": [1.0, float("nan")], "b": [1.0, 2.0]}))
    assert frame["a"].tolist() == [1.0, None]
    assert frame["b"].dtype == float


TINY = throughput.Parameters(
    d_model=8, n_layer=2, d_state=4, lengths=(8, 16, 32), batches=(1, 2), batch_length=8,
    forms=("recurrent", "chunked", "document_chunked", scan_timing.INDEXED), mixer_forms=("auto",),
    rounds=1, guard_seconds=5.0, allocation_lengths=(64, 128, 256, 512),
    stream_positions=(0, 40), stream_steps=2, stream_window=16, patterns=("M", "A"),
    train_context=8, train_batch=1, train_steps=1)


def test_indexed_loop_computes_the_definition():
    inputs = scan_timing._scan_inputs(TINY, 2, 9, grad=True)
    y, h = scan_timing.indexed_scan(*inputs)
    y_ref, h_ref = scan_timing.selective_scan(*inputs, delta_softplus=True, form="recurrent")
    assert torch.allclose(y, y_ref, atol=1e-5)
    assert torch.allclose(h, h_ref, atol=1e-5)


@pytest.fixture(scope="module")
def found():
    return throughput.run(TINY)


def test_a_tiny_study_end_to_end(found):
    assert (found.scans["status"] == "measured").all()
    assert set(found.scans["form"]) == set(TINY.forms)
    assert found.training["bytes_per_second"].notna().all()
    stream = found.streaming.set_index(["system", "bytes_seen"])["state_bytes"]
    assert stream["SSM", 0] == stream["SSM", 40]
    assert stream["attention, all keys", 40] > stream["attention, last 16 keys", 40]
    values = answers.values(found, TINY)
    assert values["longest_length"].value == 32
    assert values["crossover_operations"].value > 0


def test_a_streamed_byte_is_timed_behind_one_that_takes_the_state_over(monkeypatch, clock):
    made: list = []

    class Slow:
        """An engine that takes a second for a state that is not its own."""

        def __init__(self, model):
            made.append(model)

        def __call__(self, data, state):
            clock.sleep(0.001 if state == "own" else 1.0)
            return None, "own"

    monkeypatch.setattr(throughput, "stream_engine", Slow)
    table = throughput.time_streaming(TINY)
    assert table["ms"].tolist() == pytest.approx([1.0] * len(table))
    assert len(made) == table["system"].nunique()


def test_quadratic_forms_show_in_the_count(found):
    table = found.allocation_exponents.set_index(["what", "form"])["exponent"]
    assert table["zero_fill_bytes", scan_timing.INDEXED] == pytest.approx(2.0, abs=0.01)
    assert table["zero_fill_bytes", "document_chunked"] == pytest.approx(2.0, abs=0.05)
    assert table["allocated_bytes", "recurrent"] == pytest.approx(1.0, abs=0.05)
    assert table["allocated_bytes", "chunked"] == pytest.approx(1.0, abs=0.05)


def test_attention_beside_the_loop_is_of_its_batch(found):
    """Where the guard ended the loop at the length that several batches are timed at."""
    scans, mixers = found.scans.copy(), found.mixers.copy()
    loop = scans["form"] == scan_timing.INDEXED
    scans["ms"] = scans["ms"].mask(loop, 3.0).mask(loop & (scans["length"] > TINY.batch_length))
    scans.loc[scans["form"] == "chunked", "form"] = "fused"
    for batch, ms in ((1, 2.0), (2, 5.0)):
        mixers.loc[(mixers["mixer"] == "attention") & (mixers["batch"] == batch), "ms"] = ms
    values = answers.values(replace(found, scans=scans, mixers=mixers), TINY)
    assert values["loop_over_fused_length"].value == TINY.batch_length
    assert values["loop_over_attention"].value == pytest.approx(3.0 / 2.0)


def test_lengths_are_of_the_batch_that_was_asked_for(found):
    """Also where they are fewer than the batches."""
    few = replace(TINY, lengths=(16,), batch_size=2, batches=(1, 3))
    scans = found.scans.assign(form=found.scans["form"].replace("chunked", "fused")).query(
        "length == 8").assign(ms=1.0)
    scans = pd.concat([scans[scans["batch"] == 1],
                       scans[scans["batch"] == 1].assign(batch=3),
                       scans[scans["batch"] == 1].assign(batch=2, length=16)])
    values = answers.values(replace(found, scans=scans), few)
    assert values["document_over_fused_length"].value == 16
    assert values["document_over_fused_batch_size"].value == 3


def test_energy_is_not_made_up(found):
    for row in found.training.to_dict("records"):
        if row["joules_per_megabyte"] is None:
            assert row["energy_source"].startswith("not measured")


def test_bad_parameters_are_one_clear_line():
    with pytest.raises(UserError, match="rising order"):
        replace(TINY, lengths=(16, 8))
    with pytest.raises(UserError, match=r"forms is .*: expected"):
        replace(TINY, forms=("nothing",))


def test_the_recorded_scan_is_drawn_with_its_machine():
    bench, machine = throughput.recorded_scan()
    assert machine.startswith("NVIDIA H200, 20")
    figure = figures.scan_peers(bench)
    forward, backward = figure.axes
    drawn = {line.get_label(): line for line in forward.lines}
    ours = bench[(bench["of"] == "fused") & (bench["pass"] == "forward")]["median (us)"] / 1e3
    assert drawn["fused (this project)"].get_xdata().tolist() == pytest.approx(ours.tolist())
    assert len(drawn["fused, recomputed backward"].get_xdata()) == 0
    assert {len(line.get_xdata()) for line in backward.lines} == {len(ours)}


@pytest.mark.parametrize("name", ["lengths", "mixer_forms", "allocation_lengths",
                                  "stream_positions"])
def test_an_empty_list_of_what_is_timed_is_refused(name):
    with pytest.raises(UserError, match=name):
        replace(TINY, **{name: ()})



def test_a_crossing_that_did_not_happen_says_by_when():
    frame = pd.DataFrame({"crossover_length": [None, 512.0], "longest_length": [2048, 2048],
                          "crossover_in_operations": [None, 1245]})
    words = crossovers_in_words(frame)
    assert words["crossover_length"].tolist() == ["not by 2,048", "512"]
    assert words["crossover_in_operations"].tolist() == ["never", "1,245"]


@pytest.mark.parametrize(("low", "high", "reading"), [
    (0.9, 1.1, "linear"), (1.1, 1.9, "faster than linear"), (0.7, 0.9, "slower than linear"),
    (0.4, 1.6, "undecided"), (None, None, "undecided")])
def test_an_exponent_says_what_its_interval_allows(low, high, reading):
    assert Exponent(1.0, low, high, 4, 1, 2).reading == reading


def test_joules_are_counted_between_moves_of_the_counter(monkeypatch, clock):
    class Slow:  # 100 W, a counter that moves ten times a second
        source = "a counter"

        def read(self):
            joules = 10.0 * int(10 * clock.perf_counter())
            return Energy(joules, joules, 0.0, 0.0, self.source)

    monkeypatch.setattr(timing, "EnergyMeter", lambda device: Slow())
    found = timing.joules_of(lambda: clock.sleep(0.005), 0.4, "cpu")
    assert found == pytest.approx(0.5, rel=0.05)  # 100 W for 5 ms, in whole calls

    class Still(Slow):
        def read(self):
            return Energy(1.0, 1.0, 0.0, 0.0, self.source)

    monkeypatch.setattr(timing, "EnergyMeter", lambda device: Still())
    monkeypatch.setattr(timing, "COUNTER_WAIT", 0.05)
    assert timing.joules_of(lambda: clock.sleep(0.001), 0.01, "cpu") is None
