"""States that the GPU's engine gives out for fed bytes, with a function in place of the kernel that
stays: it takes an order from the host's memory, answers there, and leaves."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import math
from types import SimpleNamespace

import pytest
import torch

from mambabyte.errors import NonFiniteError
from mambabyte.ops.stream import cuda, server
from mambabyte.ops.stream.grid.memory import Room

SHAPE = cuda.Shape(2, 4, 6, 3, 2, 4)
FLOATS = 2 * 6 * (3 + 3)


@pytest.fixture
def streamer(monkeypatch: pytest.MonkeyPatch) -> cuda.CudaStreamer:
    def launch(grid, block, shared, stream, *args) -> None:
        log_probs, done, ticket = args[9:12]
        words = (ctypes.c_uint32 * 10).from_address(args[-2])
        assert set(words[1::2]) == {ticket}
        order, before, after = words[0], *(words[i] | words[i + 2] << 32 for i in (2, 6))
        assert order < 256  # it has no state at hand that it could go on from
        numbers = torch.tensor((ctypes.c_float * FLOATS).from_address(before)) + order
        ctypes.memmove(after, numbers.data_ptr(), 4 * FLOATS)
        ctypes.c_float.from_address(log_probs).value = math.nan if order == 255 else -order
        ctypes.c_uint32.from_address(done).value = ticket

    stream = SimpleNamespace(cuda_stream=0, query=lambda: True, wait_stream=lambda other: None)
    monkeypatch.setattr(server, "_SERVERS", set())
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **more: stream)
    monkeypatch.setattr(cuda, "raw_stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(cuda, "cluster_blocks", lambda shape, device: 8)
    monkeypatch.setattr(cuda, "_plan_for", lambda *_: SimpleNamespace(
        blocks=8, streams=1, shared_bytes=0))
    monkeypatch.setattr(cuda, "_kernel", lambda *_: SimpleNamespace(launch=launch))
    monkeypatch.setattr(cuda, "pack", lambda *_: torch.zeros(1))
    monkeypatch.setattr(cuda, "pack_table", lambda *_: torch.zeros(1))
    norm = torch.ones(4), torch.zeros(4)
    return cuda.CudaStreamer(SHAPE, torch.zeros(256, 4), [None], norm, torch.zeros(256, 4))


def test_no_state_is_given_out_twice(streamer: cuda.CudaStreamer) -> None:
    state, states = streamer.new_state(1), []
    for byte in range(3 * server._MADE):
        log_probs, state = streamer.feed_byte(byte, state)
        states.append(state)
        assert log_probs[0] == -byte
    for byte, kept in enumerate(states):
        assert all((x == sum(range(byte + 1))).all() for x in streamer.outside(kept))
    # From a copy, and from one whose tensors were replaced, elsewhere in memory.
    moved = streamer.outside(states[4])
    moved = moved._replace(ssm=moved.ssm + 100)
    for start, added in ((copy.deepcopy(states[4]), 0), (moved, 100)):
        _, after = streamer.feed_byte(5, start)
        there, known = streamer.outside(after), streamer.outside(states[5])
        assert (there.tail == known.tail).all()
        assert (there.ssm == known.ssm + added).all()


def test_a_state_of_another_engine_is_taken_in(streamer: cuda.CudaStreamer) -> None:
    _, state = streamer.feed_byte(7, streamer.new_state(1))
    norm = torch.ones(4), torch.zeros(4)
    other = cuda.CudaStreamer(SHAPE, torch.zeros(256, 4), [None], norm, torch.zeros(256, 4))
    _, after = other.feed_byte(5, state)
    assert (other.outside(after).tail == 12).all()


def test_a_byte_that_was_interrupted_is_as_if_it_had_not_been_fed(
    streamer: cuda.CudaStreamer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, state = streamer.feed_byte(3, streamer.new_state(1))

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(streamer._server, "_launch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            streamer.feed_byte(9, state)
    for _ in range(2):  # from the same state, both times
        log_probs, after = streamer.feed_byte(4, state)
        assert log_probs[0] == -4
        assert (streamer.outside(after).ssm == 7).all()


def test_a_kernel_that_stays_leaves_where_others_need_the_device(
    streamer: cuda.CudaStreamer, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamer.feed_byte(1, streamer.new_state(1))
    kernel = streamer._server
    words = (ctypes.c_uint32 * 10).from_address(kernel._orders.data_ptr())
    asked: list[list[int]] = []

    def query() -> bool:  # it runs until it finds its next order, and that is to leave
        asked.append(list(words))
        return words[0] == server._LEAVE and words[1] == kernel._ticket

    monkeypatch.setattr(kernel._stream, "query", query)
    server.make_room(torch.device("cuda", 7))  # not there
    server.make_room(streamer.device, large=True)  # it takes up a part alone
    assert not asked
    server.make_room(streamer.device)
    assert len(asked) == 2
    assert asked[0][1] + 1 == asked[1][1]  # the order after the one that it had done


def test_probabilities_that_are_no_numbers_are_said(streamer: cuda.CudaStreamer) -> None:
    with pytest.raises(NonFiniteError, match="weights have gone nan"):
        streamer.feed_byte(255, streamer.new_state(1))


def test_rows_of_keys_are_free_again_when_their_state_is_gone() -> None:
    room = Room(10, 4, torch.zeros(1, 1, 2, 1, 1, 10, 2), stream=7)
    first = room.extend(4, 2, 7)
    assert first is not None
    assert room.extend(4, 1, 7) is None  # the first has them
    second = room.extend(6, 3, 7)
    assert second is not None
    assert room.extend(9, 2, 7) is None  # there are no more
    del first
    assert room.extend(4, 1, 7) is None  # the second goes on from the first's
    del second
    again = room.extend(4, 6, 7)
    assert again is not None
    del again
    # On another stream what wrote them may come later.
    assert room.extend(4, 1, 8) is None
    assert room.extend(4, 1, 7) is None
    assert room.extend(10, 0, 8) is not None
