"""Tests that need an NVIDIA GPU: ``pytest -m gpu``. Memory and races: test_gpu_sanitizer.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_gpu() -> Iterator[None]:
    if not torch.cuda.is_available():
        # They run only where they were asked for: a green line would be a lie.
        pytest.fail("these tests need a GPU: torch sees no CUDA device", pytrace=False)
    yield
    torch.cuda.synchronize()  # a fault belongs to the test that caused it
