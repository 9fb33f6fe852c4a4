"""Energy: counters read right, wraps, idle subtraction; "not measured" otherwise."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from mambabyte import energy
from mambabyte.energy import EnergyMeter, RaplCounter
from tests.helpers.clock import Clock


def make_zone(root, name, value, limit=1000, called=""):
    zone = root / name
    zone.mkdir()
    if called:
        (zone / "name").write_text(called + "\n")
    (zone / "energy_uj").write_text(str(value))
    (zone / "max_energy_range_uj").write_text(str(limit))
    return zone / "energy_uj"


def test_rapl_sums_packages_and_survives_a_wrap(tmp_path):
    a = make_zone(tmp_path, "intel-rapl:0", 100)
    b = make_zone(tmp_path, "intel-rapl:1", 900)
    make_zone(tmp_path, "intel-rapl:0:0", 5)  # a part of package 0, not to be counted twice
    counter = RaplCounter(tmp_path)
    a.write_text("150")
    b.write_text("10")  # wrapped: 900 -> 1000 -> 10 is 111 of a counter that counts to 1000
    assert counter.joules() == pytest.approx((50 + 111) / 1e6)
    b.write_text("20")
    assert counter.joules() == pytest.approx((50 + 121) / 1e6)


def test_psys_holds_the_packages_and_is_not_added(tmp_path):
    package = make_zone(tmp_path, "intel-rapl:0", 0, called="package-0")
    platform = make_zone(tmp_path, "intel-rapl:1", 0, called="psys")
    counter = RaplCounter(tmp_path)
    package.write_text("500")
    platform.write_text("900")
    assert counter.joules() == pytest.approx(500 / 1e6)


@pytest.mark.parametrize(("values", "expected"), [
    ([(7, 57), (7, 57)], 50),  # both dies show the package's counter
    ([(7, 57), (400, 430)], 80),  # each has its own
    ([(7, 57), (7, 37)], 80),  # each its own, and they began alike
    ([(990, 20), (990, 20)], 31),  # one counter, which wrapped
])
def test_dies_that_show_one_counter_count_once(tmp_path, values, expected):
    dies = [make_zone(tmp_path, f"intel-rapl:{i}", before, called=f"package-0-die-{i}")
            for i, (before, _) in enumerate(values)]
    other = make_zone(tmp_path, "intel-rapl:9", 7, called="package-1-die-0")
    counter = RaplCounter(tmp_path)
    for die, (_, after) in zip(dies, values, strict=True):
        die.write_text(str(after))
    other.write_text("57")  # another package may show the same by chance
    assert counter.joules() == pytest.approx((expected + 50) / 1e6)


@pytest.mark.parametrize("fault", ["gone", "text", "back"])
def test_a_counter_that_fails_is_not_measured_from_then_on(monkeypatch, tmp_path, fault):
    file = make_zone(tmp_path, "intel-rapl:0", 100)
    monkeypatch.setattr(energy, "RAPL_ROOT", tmp_path)
    meter = EnergyMeter("cpu")
    file.write_text("150")
    assert meter.read().joules == pytest.approx(50e-6)
    if fault == "gone":
        file.unlink()
    elif fault == "text":
        file.write_text("")
    else:
        monkeypatch.setattr(RaplCounter, "joules", lambda self: 0.0)
    reading = meter.read(at="step 7")
    assert reading.joules is None
    assert reading.source.startswith("not measured from step 7 on (")
    file.write_text("200")  # back again: what was missed stays missed
    assert meter.read(at="step 8").source == reading.source


def test_a_lost_gpu_is_not_measured_from_then_on(monkeypatch):
    class NVMLError(Exception):
        pass

    readings = iter([5_000, 5_000, 6_000])

    def consumption(handle):
        try:
            return next(readings)
        except StopIteration:
            raise NVMLError("GPU is lost") from None

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=consumption))
    monkeypatch.setattr(energy, "_cuda_uuid", lambda index: None)
    meter = EnergyMeter("cuda")
    assert meter.read().gross_joules == pytest.approx(1.0)
    assert meter.read("step 3").source == "not measured from step 3 on (GPU is lost)"


def test_processes_add_their_counters_once_each():
    assert energy.total([("GPU-1", 2.0), ("GPU-2", 3.0)]) == 5.0
    assert energy.total([("RAPL of a", 2.0), ("RAPL of a", 2.0), ("RAPL of b", 1.0)]) == 3.0
    assert energy.total([("GPU-1", 2.0), ("", None)]) is None
    assert energy.total([("", None)]) is None


def test_not_measured_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "RAPL_ROOT", tmp_path)
    reading = EnergyMeter("cpu").read()
    assert reading.joules is None
    assert reading.gross_joules is None
    assert str(reading).startswith("not measured (no RAPL zones")
    assert reading.seconds >= 0


def test_unreadable_counter_is_not_measured(monkeypatch, tmp_path):
    make_zone(tmp_path, "intel-rapl:0", "denied")
    monkeypatch.setattr(energy, "RAPL_ROOT", tmp_path)
    assert EnergyMeter("cpu").read().source.startswith("not measured")


@pytest.mark.parametrize("uuid", [None, "GPU-1234"])
def test_nvml_millijoules_and_idle_subtraction(monkeypatch, uuid):
    readings = iter([5_000, 5_000, 8_500])  # at construction, at the start, at the end
    asked = []
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=asked.append,
        nvmlDeviceGetHandleByUUID=asked.append,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(readings)))
    monkeypatch.setattr(energy, "_cuda_uuid", lambda index: uuid)  # where CUDA hides other GPUs
    clock = Clock()
    monkeypatch.setattr(energy, "time", clock)
    meter = EnergyMeter("cuda:1", idle_watts=10)
    clock.sleep(0.05)
    reading = meter.read()
    assert asked == [uuid or 1]
    assert reading.gross_joules == pytest.approx(3.5)
    assert reading.joules == pytest.approx(3.5 - 10 * 0.05)
    assert "10 W idle subtracted" in str(reading)


@pytest.mark.parametrize(("properties", "name"), [
    (SimpleNamespace(uuid="12-34"), "GPU-12-34"), (SimpleNamespace(), None)])
def test_a_gpu_is_named_to_nvml_as_cuda_numbers_it(properties, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    for there, found in ((True, name), (False, None)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert energy._cuda_uuid(1) == found


def test_a_device_without_a_number_is_torchs_current_one(monkeypatch):
    asked = []
    monkeypatch.setattr(energy, "NvmlCounter", asked.append)
    for current in (1, 0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        EnergyMeter("cuda")
    assert asked == [1, 0]
