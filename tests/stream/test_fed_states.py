"""States that the GPU's engine gives out for fed bytes, with a launch that writes in the host's
memory in place of the kernel's."""

from __future__ import annotations

import copy
import ctypes
import math
from types import SimpleNamespace

import pytest
import torch

from mambabyte.errors import NonFiniteError
from mambabyte.ops.stream import cuda

SHAPE = cuda.Shape(2, 4, 6, 3, 2, 4)


@pytest.fixture
def streamer(monkeypatch: pytest.MonkeyPatch) -> cuda.CudaStreamer:
    def launch(grid, block, shared, stream, *args) -> None:
        _, _, tokens, _, tail, ssm, new_tail, new_ssm, _, log_probs, done, ticket = args[:12]
        byte = ctypes.c_uint8.from_address(tokens).value
        for old, new, size in ((tail, new_tail, 2 * 3 * 6), (ssm, new_ssm, 2 * 6 * 3)):
            numbers = torch.tensor((ctypes.c_float * size).from_address(old)) + byte
            ctypes.memmove(new, numbers.data_ptr(), 4 * size)
        ctypes.c_float.from_address(log_probs).value = math.nan if byte == 255 else -byte
        ctypes.c_uint32.from_address(done).value = ticket

    monkeypatch.setattr(cuda, "cluster_blocks", lambda shape, device: 8)
    monkeypatch.setattr(cuda, "_plan_for", lambda *_: SimpleNamespace(
        blocks=8, streams=1, shared_bytes=0))
    monkeypatch.setattr(cuda, "_kernel", lambda *_: SimpleNamespace(launch=launch))
    monkeypatch.setattr(cuda, "raw_stream", lambda device: 0)
    monkeypatch.setattr(cuda, "pack", lambda *_: torch.zeros(1))
    norm = torch.ones(4), torch.zeros(4)
    return cuda.CudaStreamer(SHAPE, torch.zeros(256, 4), [], norm, torch.zeros(256, 4))


def test_no_state_is_given_out_twice(streamer: cuda.CudaStreamer) -> None:
    state, states = streamer.new_state(1), []
    for byte in range(3 * cuda._MADE):
        log_probs, state = streamer.feed_byte(byte, state)
        states.append(state)
        assert log_probs[0] == -byte
    for byte, kept in enumerate(states):
        assert all((x == sum(range(byte + 1))).all() for x in kept)
    # From a copy, and from one whose tensors were replaced, elsewhere in memory.
    moved = states[4]._replace(ssm=states[4].ssm + 100)
    for start, added in ((copy.deepcopy(states[4]), 0), (moved, 100)):
        _, after = streamer.feed_byte(5, start)
        assert (after.tail == states[5].tail).all()
        assert (after.ssm == states[5].ssm + added).all()


def test_probabilities_that_are_no_numbers_are_said(streamer: cuda.CudaStreamer) -> None:
    with pytest.raises(NonFiniteError, match="weights have gone nan"):
        streamer.feed_byte(255, streamer.new_state(1))
