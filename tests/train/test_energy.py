"""Energy: counters read right, wraps, idle subtraction; "not measured" otherwise."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from mambabyte import energy
from mambabyte.energy import EnergyMeter, RaplCounter
from tests.helpers.clock import Clock


def make_zone(root, name, value, limit=1000):
    zone = root / name
    zone.mkdir()
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


def test_not_measured_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "RAPL_ROOT", tmp_path)
    monkeypatch.setattr(RaplCounter.__init__, "__defaults__", (tmp_path,))
    reading = EnergyMeter("cpu").read()
    assert reading.joules is None
    assert reading.gross_joules is None
    assert str(reading).startswith("not measured (no RAPL zones")
    assert reading.seconds >= 0


def test_unreadable_counter_is_not_measured(monkeypatch, tmp_path):
    make_zone(tmp_path, "intel-rapl:0", "denied")
    monkeypatch.setattr(RaplCounter.__init__, "__defaults__", (tmp_path,))
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
