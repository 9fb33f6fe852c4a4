"""Tests that need an NVIDIA GPU: ``pytest -m gpu``. Memory and races: test_gpu_sanitizer.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_gpu() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    yield
    torch.cuda.synchronize()  # a fault belongs to the test that caused it
