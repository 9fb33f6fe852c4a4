"""Study: time, bytes and joules of every scan form and mixer against length and batch.

Which forms are linear in the length, and why not all of them are: taking a slice (or one step) of
a tensor in a loop costs nothing forward, but the gradient of each slice is a tensor of the full
length that is zero outside it. With L / T chunks that is (L / T) L elements written and added:
quadratic. ``split`` and ``unbind`` cut once and their gradients are joined once: linear. The
count of bytes that the backward pass allocates shows it without a clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from analysis.measure.bench.steps import Way, equal_sized, training_step
from analysis.measure.growth import crossover, exponent_table
from analysis.measure.threads import threads
from analysis.measure.timing import Case, measure
from analysis.runs.frames import not_measured
from analysis.runs.records import DATA, load_record, machine_name
from analysis.studies.throughput import INDEXED, PASSES, Parameters, Results
from analysis.studies.throughput.scans import (
    allocation_exponents,
    count_allocations,
    per_byte,
    points,
    time_scans,
)
from analysis.theory.flops import flops_per_byte, layer_flops_crossover
from analysis.theory.matching import match_patterns
from analysis.theory.sizes import at_size
from mambabyte.config import SPECS, ModelConfig, TrainConfig, get_preset
from mambabyte.config.mixers import kind_of, spec_of
from mambabyte.energy import EnergyMeter
from mambabyte.model import AttentionMixer, ByteLM, LayerState, MambaMixer
from mambabyte.model.mixer import mixer_of
from mambabyte.ops import FORMS
from mambabyte.stream import Engine, stream_engine
from mambabyte.train import autocast

# The scan against its peers on a GPU, by ``mambabyte bench scan`` on that machine.
RECORDED = "records/throughput/h200-scan/run.json"


def recorded_scan() -> tuple[pd.DataFrame, str]:
    """The record RECORDED, a row a shape, peer and pass; and the machine and day it is from."""
    found = load_record((DATA / RECORDED).parent)
    return found.tables["bench"].frame, f"{machine_name(found)}, {found.provenance['date'][:10]}"


def run(p: Parameters, report: Callable[[str], None] = lambda line: None) -> Results:
    """The whole study. Nothing is drawn and nothing is written."""
    with threads(p.threads):
        return _run(p, p.forms or (*FORMS, INDEXED), report)


def _run(p: Parameters, forms: tuple[str, ...], report: Callable[[str], None]) -> Results:
    report("scan forms")
    scans = time_scans(p, forms, report)
    report("mixers")
    mixers = time_mixers(p, report)
    report("allocations")
    allocations = count_allocations(p, forms)
    exponents = pd.concat([
        exponent_table(frame[frame["batch"] == p.batch_size].rename(columns={name: "what"}),
                       ("what", "pass"))
        for frame, name in ((scans, "form"), (mixers, "mixer"))], ignore_index=True)
    report("streaming")
    streaming = time_streaming(p)
    report("training steps")
    training = time_training(p, report)
    peers, machine = recorded_scan()
    return Results(
        scans=scans, mixers=mixers, exponents=exponents, allocations=allocations,
        allocation_exponents=allocation_exponents(allocations),
        crossovers=find_crossovers(p, mixers), streaming=streaming,
        training=training, peers=peers, peers_machine=machine)


# ------------------------------------------------------------------------------------- mixers


def model_config(p: Parameters, pattern: str = "M", form: str = "auto") -> ModelConfig:
    return at_size(get_preset(p.preset).model, p.d_model, p.n_layer, p.n_head, d_state=p.d_state,
                   layer_pattern=pattern, scan_form=form, attention_window=2**30)


def mixers_of(p: Parameters) -> dict[str, tuple[str, str]]:
    """The mixers that are compared by name, attention among them: letter, and form of the scan."""
    found: dict[str, tuple[str, str]] = {}
    for letter in dict.fromkeys((*(p.mixers or SPECS), AttentionMixer.letter)):
        if spec_of(letter).uses_scan_form:
            found |= {f"{kind_of(letter)} ({form})": (letter, form) for form in p.mixer_forms}
        else:
            found[kind_of(letter)] = letter, "auto"
    return found


def time_mixers(p: Parameters, report: Callable[[str], None]) -> pd.DataFrame:
    """Every mixer, those with a scan in each form, at the points of ``time_scans``."""
    cases = [
        Case((name, direction, batch if batch != p.batch_size else "lengths"), length,
             partial(_make_mixer, p, letter, form, direction, batch, length),
             {"mixer": name, "pass": direction, "batch": batch})
        for name, (letter, form) in mixers_of(p).items() for direction in PASSES
        for batch, length in points(p)]
    return per_byte(measure(
        cases, rounds=p.rounds, guard_seconds=p.guard_seconds, device=p.device, report=report,
        capture=True, energy_seconds=p.energy_seconds))


def _make_mixer(
    p: Parameters, letter: str, form: str, direction: str, batch: int, length: int
) -> Callable[[], None]:
    torch.manual_seed(0)
    mixer = mixer_of(letter)(model_config(p, letter, form)).to(p.device)
    backward = direction == PASSES[1]
    x = torch.randn(batch, length, p.d_model, device=p.device, requires_grad=backward)

    def call() -> None:
        with torch.set_grad_enabled(backward), autocast(torch.device(p.device), p.precision):
            y, _ = mixer(x, None)
        if backward:
            torch.autograd.grad(y.float().sum(), [x, *mixer.parameters()])

    return call


def find_crossovers(p: Parameters, mixers: pd.DataFrame) -> pd.DataFrame:
    """The length from which each mixer is cheaper than attention; by the clock and by count.

    ``in_operations`` compares forward and backward operations of the two layers in closed form.
    """
    config, attention = model_config(p), kind_of(AttentionMixer.letter)
    operations = {letter: layer_flops_crossover(config, mixer_of(letter))
                  for letter, _ in mixers_of(p).values() if letter != AttentionMixer.letter}
    rows = []
    for direction in PASSES:
        one = mixers[(mixers["pass"] == direction) & mixers["ms"].notna()
                     & (mixers["batch"] == p.batch_size)]
        wide = one.pivot(index="length", columns="mixer", values="ms").astype(float)
        for name, (letter, _) in mixers_of(p).items():
            if letter not in operations:
                continue
            both = wide[[name, attention]].dropna()
            at = crossover(both.index.tolist(), both[name].tolist(), both[attention].tolist())
            longest = both.index.max()
            rows.append({
                "mixer": name, "pass": direction, "crossover_length": at,
                "longest_length": int(longest),
                "ssm_over_attention_there": float(both.loc[longest, name]
                                                  / both.loc[longest, attention]),
                "crossover_in_operations": operations[letter],
            })
    return not_measured(pd.DataFrame(rows, columns=[
        "mixer", "pass", "crossover_length", "longest_length", "ssm_over_attention_there",
        "crossover_in_operations"]))


# ---------------------------------------------------------------------------------- streaming


@torch.inference_mode()
def time_streaming(p: Parameters) -> pd.DataFrame:
    """Latency of one more byte at batch 1 after so many bytes, and the state it carries.

    A mixer whose cache a window bounds is there twice: with the last ``stream_window`` keys, and
    with all of them.
    """
    systems: dict[str, ModelConfig] = {}
    for letter in dict.fromkeys(letter for letter, _ in mixers_of(p).values()):
        whole, name = model_config(p, letter), kind_of(letter)
        shapes = mixer_of(letter).state_shapes
        bounded = replace(whole, attention_window=p.stream_window)
        if shapes(whole, 2**20) == shapes(bounded, 2**20):
            systems[name] = whole
        else:
            systems |= {f"{name}, last {p.stream_window} keys": bounded,
                        f"{name}, all keys": whole}
    states: dict[tuple[str, int], tuple[Engine, list[LayerState]]] = {}
    for name, config in systems.items():
        torch.manual_seed(0)
        model = ByteLM(config).to(p.device).eval()
        engine = stream_engine(model)  # as generating and scoring byte by byte do
        seen, state = 1, model(torch.zeros(1, 1, dtype=torch.int64, device=p.device))[1]
        for position in sorted(p.stream_positions):
            while seen < position:
                step = min(1024, position - seen)
                part = torch.zeros(1, step, dtype=torch.int64, device=p.device)
                state = model(part, state)[1]
                seen += step
            states[name, position] = (engine, state)

    def make(engine: Engine, state: list[LayerState]) -> Callable[[], None]:
        # The first byte takes over the state of another's making, with all the keys of attention;
        # what is timed is the byte after it.
        _, own = engine(b"\0", state)

        def call() -> None:
            nonlocal own
            _, own = engine(b"\0", own)

        return call

    cases = [Case((name, position), position, partial(make, engine, state),
                  {"system": name, "bytes_seen": position})
             for (name, position), (engine, state) in states.items()]
    timed = measure(cases, rounds=p.stream_steps, guard_seconds=p.guard_seconds, device=p.device,
                    least_seconds=0.0)
    held = {key: sum(t.numel() * t.element_size() for layer in state for t in layer
                     if isinstance(t, Tensor)) for key, (_, state) in states.items()}
    keys = zip(timed["system"], timed["bytes_seen"], strict=True)
    timed = timed.drop(columns=["length", "timed_as", "joules"])
    return not_measured(timed.assign(state_bytes=[held[k] for k in keys]))


# ----------------------------------------------------------------------------------- training


def time_training(p: Parameters, report: Callable[[str], None]) -> pd.DataFrame:
    """Whole training steps (forward, backward, clip, AdamW) of parameter-matched patterns.

    Patterns with SSM layers are timed with each of ``training_forms``. Joules per megabyte
    (1e6 bytes) come from an energy counter over at least ``energy_seconds``, else None.
    """
    base = replace(model_config(p), attention_window=p.train_context)
    cuda = p.device.startswith("cuda")
    # Odd widths of an MLP, which a CPU does not mind, would slow a GPU's matrix products.
    systems = (equal_sized(base, p.patterns) if cuda else
               {pattern: m.config for pattern, m in match_patterns(base, p.patterns).items()})
    rows = []
    runs = []
    for pattern, config in systems.items():
        for form in p.training_forms if config.uses_scan_form else ("auto",):
            # Forms are compared on the pure SSM; other patterns run the default alone.
            if form == "auto" or pattern == MambaMixer.letter:
                runs.append((pattern, form, replace(config, scan_form=form)))
    recipe = TrainConfig(context=p.train_context, batch_size=p.train_batch, precision=p.precision)
    way: Way = "eager" if not cuda else "graph" if p.train_step == "auto" else p.train_step
    timed = []
    for pattern, form, config in runs:
        step, _ = training_step(config, recipe, p.device, way)
        timed.append(Case((pattern, form), p.train_context, partial(_constant, step),
                          {"pattern": pattern, "form": form}))
    frame = measure(timed, rounds=p.train_steps, guard_seconds=30 * p.guard_seconds,
                    device=p.device, least_seconds=0.0, report=report,
                    energy_seconds=p.energy_seconds)
    source = EnergyMeter(p.device).source
    size = p.train_batch * p.train_context
    for row, (_, _, config) in zip(frame.to_dict("records"), runs, strict=True):
        joules = row["joules"]
        rows.append({
            **row, "step": way, "batch": p.train_batch, "n_parameters": config.n_parameters,
            "bytes_per_second": size / row["ms"] * 1e3 if row["ms"] else None,
            "flops_per_second": flops_per_byte(config, p.train_context) * size / row["ms"] * 1e3
            if row["ms"] else None,
            "joules_per_megabyte": joules / size * 1e6 if pd.notna(joules) else None,
            "energy_source": source,
        })
    return not_measured(pd.DataFrame(rows).drop(columns=["timed_as", "joules"])
                        .rename(columns={"length": "context"}))


def steps_at(p: Parameters, batch: int, contexts: tuple[int, ...]) -> pd.DataFrame:
    """Training steps of an SSM and an attention model of equal size at one batch and these
    contexts: ``pattern``, ``context``, ``ms`` and ``joules_per_step``, None where not measured."""
    frames = []
    for context in contexts:
        one = replace(p, patterns=("M", "A"), training_forms=("auto",), train_batch=batch,
                      train_context=context)
        frames.append(time_training(one, lambda line: None))
    found = pd.concat(frames, ignore_index=True)
    joules = [None if j is None else j * batch * context / 1e6
              for j, context in zip(found["joules_per_megabyte"], found["context"], strict=True)]
    return not_measured(found.assign(joules_per_step=pd.Series(joules, dtype=object)))


def _constant(call: Callable[[], object]) -> Callable[[], object]:
    return call
