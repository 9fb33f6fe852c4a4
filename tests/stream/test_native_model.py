"""The whole model in C: equal to ByteLM in float64, its states, weights changed in between."""

from __future__ import annotations

import os
import platform
import struct
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mambabyte.config import ModelConfig, get_preset
from mambabyte.errors import UserError
from mambabyte.model import ByteLM
from mambabyte.ops.build import c as native_build
from mambabyte.stream import ByteStream, generate
from mambabyte.stream.engines import cpu as native_model
from mambabyte.stream.engines import hybrid
from mambabyte.stream.engines.cpu import NativeModel, supports
from mambabyte.stream.states import tensors_of

pytestmark = pytest.mark.skipif(native_model._library() is None, reason="no native model here")

DATA = bytes(torch.randint(256, (41,), generator=torch.Generator().manual_seed(1)).tolist())
ODD = ModelConfig(d_model=36, n_layer=3, d_state=5, d_conv=3, n_head=6, n_kv_head=2,
                  attention_window=7, embed_std=1.0)  # fmt: skip
CONFIGS = {
    "mamba_byte": replace(get_preset("mamba_byte").model, embed_std=0.5),
    "smoke": replace(get_preset("smoke").model, embed_std=1.0),
    "odd": ODD,
    "one tap, one state": replace(ODD, d_conv=1, d_state=1, dt_rank=1),
    "full step size, MLP": replace(ODD, dt_rank="full", norm="rms", mlp_ratio=1.7,
                                   logit_softcap=3.0),
    "attention": replace(ODD, layer_pattern="A", mlp_ratio=2.0, mlp_activation="gelu"),
    "window of one": replace(ODD, layer_pattern="MA", attention_window=1),
    "Mamba-2": replace(ODD, layer_pattern="S", ssd_head_dim=12, ssd_groups=2, ssd_d_state=10),
    "Mamba-3": replace(ODD, layer_pattern="R", ssd_head_dim=12, ssd_groups=2, ssd_d_state=14),
    "delta rule": replace(ODD, layer_pattern="DK", delta_head_dim=12, delta_expand_v=2,
                          norm="rms"),
    "all letters and extras": replace(
        ODD, layer_pattern="MALSDKR", n_layer=7, ssd_head_dim=24, delta_head_dim=9, local_window=3,
        linear_bias=True, ssm_bias=True, ssd_norm_eps=0.01, block_scales=True,
        residual_mix=True, unet_skips=True, qk_gain=1.5,
        qk_norm=True, embed_norm=True, embed_norm_gain=True, mlp_ratio=1.5, tied_head=False),
    "hybrid": replace(ODD, layer_pattern="MMA", norm="rms_plain", qk_norm=True, embed_norm=True,
                      rope_fraction=0.5, tied_head=False, mlp_ratio=1.0, mlp_activation="silu"),
}  # fmt: skip


def make(config: ModelConfig) -> ByteLM:
    """A model in which every parameter matters."""
    model = ByteLM(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


@torch.inference_mode()
def definition(model: ByteLM, data: bytes) -> Tensor:
    """Log p (L, V) by the recurrence in float64."""
    exact = ByteLM(replace(model.config, scan_form="recurrent"))
    exact.load_state_dict(model.state_dict())
    for module in exact.modules():
        if isinstance(module, nn.RMSNorm):
            module.eps = torch.finfo(torch.float32).eps  # the default depends on the dtype
    return torch.log_softmax(exact.double()(torch.tensor([list(data)]))[0][0], -1)


def step_by_step(model: ByteLM, data: bytes, state=None, sizes=(1,)):  # type: ignore[no-untyped-def]
    """Log p after every piece, and the state."""
    native, rows, at, i = NativeModel(model), [], 0, 0
    while at < len(data):
        piece = data[at : at + sizes[i % len(sizes)]]
        log_p, state = native(piece, state)
        rows.append(log_p)
        at, i = at + len(piece), i + 1
    return torch.stack(rows), state


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_definition(name: str) -> None:
    model = make(CONFIGS[name])
    exact = definition(model, DATA)
    got, _ = step_by_step(model, DATA)
    with torch.inference_mode():
        torchs = torch.log_softmax(model(torch.tensor([list(DATA)]))[0][0], -1)
    error, theirs = ((x.double() - exact).abs().max().item() for x in (got, torchs))
    assert error < max(4e-6, 2 * theirs)
    assert exact.std() > 0.1  # otherwise any model would do


@settings(max_examples=15)
@given(sizes=st.lists(st.integers(1, 16), min_size=1, max_size=4), cut=st.integers(1, 40),
       name=st.sampled_from(["odd", "hybrid", "window of one", "all letters and extras"]))
def test_pieces_and_states_of_the_parallel_model(sizes: list[int], cut: int, name: str) -> None:
    """parallel -> native in pieces -> parallel, as one parallel call."""
    model = make(CONFIGS[name])
    tokens = torch.tensor([list(DATA)])
    with torch.inference_mode():
        whole, _ = model(torch.cat([tokens, tokens[:, :5]], 1))
        _, state = model(tokens[:, :cut])
        if cut < len(DATA):
            rows, state = step_by_step(model, DATA[cut:], state, sizes)
            wanted = torch.log_softmax(whole[0, len(DATA) - 1], -1)
            torch.testing.assert_close(rows[-1], wanted, rtol=1e-5, atol=1e-5)
        after, _ = model(tokens[:, :5], state)
    torch.testing.assert_close(after[0], whole[0, len(DATA) :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_ahead_are_what_they_are_alone(name: str) -> None:
    """To the last bit, in log p and in the state after any of them; nothing before is touched."""
    native = NativeModel(make(CONFIGS[name]))
    alone, state = [], native(DATA[:9], None)[1]
    held = state
    for byte in DATA[9:18]:
        log_p, state = native(bytes([byte]), state)
        alone.append(log_p)
    for length, count in ((9, 9), (9, 3), (1, 1), (5, 4)):
        rows, after = native.ahead(DATA[9 : 9 + length], held)
        assert torch.equal(rows, torch.stack(alone[:length]))
        there = after(count)
        for byte, wanted in zip(DATA[9 + count : 18], alone[count:], strict=True):
            log_p, there = native(bytes([byte]), there)
            assert torch.equal(log_p, wanted)
        assert [t.tolist() for t in tensors_of(there)] == [t.tolist() for t in tensors_of(state)]


def test_rows_of_a_cache_that_were_given_up_are_used_again() -> None:
    """So that a wrong guess copies no cache; a state that someone has is not written over."""
    native = NativeModel(make(CONFIGS["attention"]))
    _, state = native(DATA[:9], None)
    _, after = native.ahead(DATA[9:14], state)
    kept = after(2)
    _, then = native(b"x", kept)
    assert then[0].room is state[0].room
    _, other = native(b"y", kept)
    assert other[0].room is not then[0].room


def test_states_are_values() -> None:
    model = make(CONFIGS["hybrid"])
    native = NativeModel(model)
    _, state = native(DATA[:9], None)
    before = [[t.clone() for t in layer[:2]] for layer in state]
    first, _ = native(b"a", state)
    native(b"b", state)
    again, _ = native(b"a", state)
    assert torch.equal(first, again)
    for layer, kept in zip(state, before, strict=True):
        assert all(torch.equal(t, k) for t, k in zip(layer[:2], kept, strict=True))


@pytest.mark.parametrize("how", ["optimizer", "data", "replaced"])
def test_weights_changed_in_between_count(how: str) -> None:
    model = make(replace(ODD, embed_std=0.1))
    native = NativeModel(model)
    _, state = native(DATA[:5], None)
    for mixer in (layer.mixer for layer in model.layers):
        for p in (mixer.A_log, mixer.conv1d.weight, mixer.dt_proj.weight, mixer.in_proj.weight):
            before = native(b"x", state)[0]
            with torch.no_grad():
                if how == "optimizer":
                    p += 0.3
                elif how == "data":
                    p.data.add_(0.3)  # leaves no trace in the version counter
                elif p is mixer.A_log:
                    mixer.A_log = nn.Parameter(p + 0.3)
                else:
                    p.data = p.data + 0.3
                logits, _ = model(torch.tensor([[ord("x")]]), state)
            after = native(b"x", state)[0]
            assert (after - before).abs().max() > 1e-4
            torch.testing.assert_close(after, torch.log_softmax(logits[0, -1], -1),
                                       rtol=1e-5, atol=1e-5)  # fmt: skip
    model.double()
    with pytest.raises(UserError, match=r"float64 on cpu now"):
        native(b"x", state)


def test_what_it_does_not_do_goes_through_torch() -> None:
    model = make(ODD)
    assert supports(model)
    assert not supports(make(replace(ODD, scan_form="chunked")))
    assert not supports(make(replace(ODD, vocab_size=255)))
    assert not supports(make(ODD).double())
    assert not supports(nn.Sequential(model))
    other = make(ODD)
    nn.utils.parametrizations.weight_norm(other.layers[0].mixer.in_proj)
    assert not supports(other)
    with torch.autocast("cpu", torch.bfloat16):
        assert not supports(model)
    seen: list[int] = []
    hook = model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    assert not supports(model)
    ByteStream(model).feed(b"ab")
    assert len(seen) == 2
    hook.remove()
    assert supports(model)
    for name, value in (("window", 8), ("form", "chunked")):  # set on a part after it was made
        changed = make(replace(ODD, layer_pattern="A" if name == "window" else "M"))
        part = next(m for m in changed.modules() if hasattr(m, name))
        setattr(part, name, value)
        assert not supports(changed), name


def test_defaults_of_torch_do_not_reach_the_c_code() -> None:
    model = make(ODD)
    expected, _ = step_by_step(model, DATA[:9])
    torch.set_default_dtype(torch.bfloat16)
    try:
        found, _ = step_by_step(model, DATA[:9])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_streams_and_text_profit_and_do_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(CONFIGS["hybrid"])
    calls: list[int] = []
    advance = native_model._library().advance

    def counted(*words):  # type: ignore[no-untyped-def]
        calls.append(1)
        return advance(*words)

    library = native_model._library()._replace(advance=counted)
    monkeypatch.setattr(native_model, "_library", lambda: library)
    fast = "".join(generate(model, "naïve", 40, seed=5))
    stream = ByteStream(model)
    stream.feed(DATA)  # longer than what goes byte by byte
    stream.feed(DATA[:7])
    assert len(calls) >= 40
    monkeypatch.setattr(native_model, "_library", lambda: None)
    assert fast == "".join(generate(model, "naïve", 40, seed=5))
    slow = ByteStream(model)
    slow.feed(DATA + DATA[:7])
    torch.testing.assert_close(stream.log_probs, slow.log_probs, rtol=1e-5, atol=1e-5)


def test_without_a_compiler_one_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "load", lambda source: "no luck")
    with pytest.warns(RuntimeWarning, match="streaming through torch, not in C: no luck"):
        assert native_model._library.__wrapped__() is None


def test_threads_and_a_fork() -> None:
    model = make(CONFIGS["mamba_byte"])
    wanted, _ = step_by_step(model, DATA)
    native, got = NativeModel(model), {}

    def run(i: int) -> None:
        state, rows = None, []
        for byte in DATA:
            log_p, state = native(bytes([byte]), state)
            rows.append(log_p)
        got[i] = torch.stack(rows)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], wanted) for i in range(3))
    child = os.fork()
    if child == 0:
        run(9)
        os._exit(0 if torch.equal(got[9], wanted) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("kept_stale", [False, True])
def test_parameters_replaced_during_a_call_are_not_freed(kept_stale: bool) -> None:
    """As another thread may do while C runs, which has no lock."""
    model = make(CONFIGS["mamba_byte"])
    native = NativeModel(model)
    wanted, _ = native(b"a", None)
    library = native._library
    others = []

    def advance(*words: bytes) -> int:
        for p in model.parameters():
            p.data = torch.full_like(p, float("nan"))
            others.append(torch.full_like(p, float("nan")))  # would take the freed memory
        return library.advance(*words)

    if kept_stale:
        with torch.no_grad():
            model.layers[0].mixer.A_log.mul_(1.5)
        wanted, _ = NativeModel(model)(b"a", None)
    native._library = library._replace(advance=advance)
    got, _ = native(b"a", None)
    assert torch.equal(got, wanted)
    native._library = library
    assert native(b"a", None)[0].isnan().any()  # the next byte is the new model's


def test_nothing_of_another_shape_reaches_c() -> None:
    model = make(CONFIGS["hybrid"])
    native = NativeModel(model)
    _, state = native(b"a", None)
    for i, layer in enumerate(state):
        for name in layer._fields:
            value = getattr(layer, name)
            if isinstance(value, torch.Tensor):
                for wrong in (value[..., :1], value[:0], torch.cat([value, value]), value[0]):
                    bad = [*state[:i], layer._replace(**{name: wrong}), *state[i + 1:]]
                    with pytest.raises(UserError, match=r"of the state is|expected"):
                        native(b"b", bad)
    with pytest.raises(UserError, match="no byte"):
        native(b"", state)
    for name, p in model.named_parameters():
        whole = p.data
        for wrong in (whole[:1].clone(), whole.double(), torch.cat([whole, whole])):
            if wrong.shape == whole.shape and wrong.dtype == whole.dtype:
                continue
            p.data = wrong
            with pytest.raises(UserError, match="now: a stream goes on as it began"):
                native(b"b", state)
        p.data = whole
        if whole.numel():
            storage = whole.untyped_storage()
            size = storage.nbytes()
            kept = whole.clone()
            storage.resize_(0)
            with pytest.raises(UserError, match="now: a stream goes on as it began"):
                native(b"b", state)
            storage.resize_(size)
            whole.copy_(kept)
        native(b"b", state)
        assert name


def test_a_byte_costs_the_same_after_many() -> None:
    """C is told the same of a byte early and late: nothing from which its work could grow."""
    native = NativeModel(make(CONFIGS["smoke"]))
    library, told = native._library, []

    def advance(words: bytes, layers: bytes, states: bytes, call: bytes, data: bytes) -> int:
        length_and_position = struct.unpack_from("2q", call)
        told.append((words, layers, len(states), length_and_position, data))
        return library.advance(words, layers, states, call, data)

    native._library = SimpleNamespace(advance=advance, kept_size=library.kept_size,
                                      keep=library.keep)
    shapes, state = [], None
    for _ in range(3000):
        _, state = native(b"a", state)
        shapes.append([tuple(x.shape) for layer in state for x in layer])
    assert told[1] == told[-1]
    assert shapes[0] == shapes[-1]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names an x86 processor")
@pytest.mark.long
def test_code_for_processors_without_wide_vectors(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Vectors of 16 bytes and no fused multiply-add: the path that aarch64 takes as well."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_build, "TUNING", (["-march=x86-64"],))
    library = native_model._library.__wrapped__()
    assert library is not None
    assert library.advance is not native_model._library().advance
    monkeypatch.setattr(native_model, "_library", lambda: library)
    for name in ("odd", "hybrid", "full step size, MLP"):
        test_equals_the_definition(name)


def test_what_the_kernel_on_a_card_has_not_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(hybrid.KINDS, "R")
    assert hybrid.unsupported(make(CONFIGS["Mamba-3"])) == "the kernel has no Mamba-3"
