"""Train a model on a corpus, or resume a run.

    mambabyte train --out runs/first
    mambabyte train --out runs/first --resume --train.max-seconds 120
    mambabyte train --preset mamba_byte --corpus path/to/text.txt --out runs/mine
    mambabyte train --preset hybrid_3_1 --train.context 512 --out runs/hybrid
    mambabyte train --config runs/first/config.json --train.lr 1e-3 --out runs/second
    torchrun --nproc-per-node 2 -m analysis.cli train --preset mamba_byte --out runs/two
    torchrun --nproc-per-node 2 -m analysis.cli train --out runs/shards --train.parallel sharded
    torchrun --nproc-per-node 2 -m analysis.cli train --out runs/long --train.context-parallel 2

The presets fill the --model and --train options; each can be overridden. Without --preset it is
quick_start on a CPU, which reads well after its 60 seconds, and mamba_byte on a GPU; with --resume,
model, recipe and corpus are those that the run was started with. A corpus below 10,000 training
bytes, or SMOKE_TEST_ONLY=1, selects smoke mode: the parts are checked and the smoke configuration
trains for two steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.cli.console import Bar, say
from analysis.cli.options import parse, pick_device, print_result
from analysis.cli.recipe import option, recipe
from analysis.cli.training import Story, describe, replaced
from mambabyte.config import PRESETS, ModelConfig, TrainConfig
from mambabyte.config.checks import DeviceOrAuto
from mambabyte.config.presets import PresetOrAuto
from mambabyte.errors import UserError

if TYPE_CHECKING:
    from mambabyte.corpus import Corpus


@dataclass(frozen=True)
class Options:
    out: Path
    """Run folder: configuration, metrics, checkpoints, result."""
    preset: PresetOrAuto = "auto"
    """Named system that fills the other options."""
    config: Path | None = None
    """File that fills them too: JSON or TOML with some of preset, model, train, corpus and
    device, such as a run's config.json."""
    corpus: str = "stdlib"
    """stdlib, wikitext103, a text file, or a folder of text files or wiki.*.raw."""
    device: DeviceOrAuto = "auto"
    """auto, cpu, cuda or cuda:N; auto is a GPU where there is one."""
    resume: bool = False
    """Continue the run in the folder from its newest checkpoint, with its own options."""
    json: bool = False
    """Print the result as JSON."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def run(argv: list[str]) -> int:
    named, file, out = (option(argv, name) for name in ("--preset", "--config", "--out"))
    own = Path(out or "") / "config.json"  # a run that is resumed knows what it is
    if named == "auto":
        named = None
    if "--resume" in argv and out and not named and not file:
        if own.is_file():
            file = str(own)
        elif not option(argv, "--corpus") and not option(argv, "--preset"):
            # A misspelt folder, or a run that ended before it began.
            raise UserError(f"{out} holds no run to resume, as it has no config.json: leave "
                            "--resume out to start one there, or say which by --preset, --config "
                            "or --corpus")
    start = recipe(named if named or file else _usual(argv), file)
    about = (__doc__ or "") + "\nPresets:\n\n" + "\n".join(
        f"    {name}: {p.about}" for name, p in PRESETS.items())
    options = parse(Options, argv, "train", about, model=start.model, train=start.train,
                    corpus=start.corpus or "stdlib", device=start.device or "auto")

    from mambabyte.model import distributed

    device = pick_device(options.device)
    with distributed.joined(device) as world:
        return _train(options, device, world.first)


def _usual(argv: list[str]) -> str:
    """The preset of a command that names none. Its help waits for no torch, which knows of GPUs."""
    if {"-h", "--help"} & {*argv}:
        return "quick_start"
    return ("quick_start" if pick_device(option(argv, "--device") or "auto") == "cpu"
            else "mamba_byte")


def _train(options: Options, device: str, first: bool) -> int:
    """Train on ``device``; of several processes only the first one talks."""
    from mambabyte import train as training
    from mambabyte.checkpoint import saved
    from mambabyte.config.files import write_json
    from mambabyte.corpus import load_corpus
    from mambabyte.ops import default_form
    from mambabyte.train.smoke import is_smoke, smoke_configs

    corpus = load_corpus(options.corpus, say)
    model, recipe = options.model, options.train
    smoke = is_smoke(len(corpus.train))
    record: dict[str, Any] = {}
    if smoke:
        model, recipe = smoke_configs(model, len(corpus.train))
        say(f"SMOKE mode (train={len(corpus.train)} bytes) ctx={recipe.context}")
        say(replaced(options.model, options.train, model, recipe))
        record["smoke"] = _smoke(model, recipe, corpus, device)
    _announce(model, recipe, device, corpus, first)
    if not first:
        record |= training.train(
            model, recipe, corpus, options.out, device=device, resume=options.resume)
        return 130 if record["stopped_by"] == "interrupt" else 0
    if options.resume and not saved(options.out):
        say(f"{options.out} has no checkpoint to resume from: starting at the first step")
    form = default_form(device) if model.scan_form == "auto" else model.scan_form
    story = Story(model, recipe, form)
    with Bar("training") as bar:
        def show(p: training.Progress, line: bool = False) -> None:
            for note in story.notes(p):
                say(f"note: {note}")
            bar(story.done(p), story.state(p), place=story.place(p), line=line)

        def scoring(done: float) -> None:
            bar.stage("scoring held-out text")
            bar(done)

        record |= training.train(
            model, recipe, corpus, options.out, device=device, resume=options.resume,
            report=lambda p: show(p, line=True), watch=show, report_scoring=scoring)
    if smoke and record["stopped_by"] != "interrupt":  # the run folder says so as well
        write_json(options.out / "result.json", record)
    last = ["SMOKE PASS"] if smoke else story.advice(record, options.out)
    _print(record | {"run": options.out}, options, last)
    return 130 if record["stopped_by"] == "interrupt" else 0


def _announce(
    model: ModelConfig, recipe: TrainConfig, device: str, corpus: Corpus, first: bool
) -> None:
    """Say what is trained, and what memory it needs; UserError in all processes where the first
    refuses that, as they would wait for it."""
    from mambabyte.config.provenance import provenance
    from mambabyte.model import distributed

    refused = None
    if first:
        say(f"{describe(model, recipe)} on {device}, {corpus.name}, "
            f"commit {provenance()['commit']}")
        try:
            say(_forecast(model, recipe, device))
        except UserError as error:
            refused = str(error)
    refused = distributed.current().agree(refused)
    if refused:
        raise UserError(refused)


def _smoke(model: ModelConfig, recipe: TrainConfig, corpus: Corpus, device: str) -> dict[str, Any]:
    """What checks of the parts have found, in a model of smoke mode."""
    import torch

    from mambabyte.model import ByteLM
    from mambabyte.train.smoke import smoke_check

    torch.manual_seed(recipe.seed)
    return smoke_check(ByteLM(model).to(device), corpus.train)


def _print(record: dict[str, Any], options: Options, last: list[str]) -> None:
    """The result of a run, and lines behind it."""
    bits = record.get("valid_bits_per_byte")
    energy = record["energy_source"]  # says "not measured" and why, where it was not
    if record["joules"] is not None:
        energy = f"{record['joules']:.1f} J ({energy})"
    print_result(record, options.json, [
        f"{record['steps']} steps in {record['seconds']:.1f} s, stopped by {record['stopped_by']}",
        "held-out: not measured" if bits is None else f"held-out: {bits:.4f} bits/byte over "
        f"{record['valid_bytes']} bytes of {record['valid_split_bytes']}",
        f"energy: {energy}",
        f"run folder: {options.out}",
        *last,
    ])


_FAR_TOO_MUCH = 1.25  # times what is free; the forecast itself is within 7 % on a CPU


def _forecast(model: ModelConfig, recipe: TrainConfig, device: str) -> str:
    """A line on the memory that a step needs, by the closed form, and whether it is there.

    A GPU refuses what it has not, in words; a CPU's system ends some process without any, so there
    UserError where far more is asked for than is free.
    """
    import torch

    from analysis.theory.fit import fit
    from mambabyte.config.provenance import memory_bytes
    from mambabyte.model import distributed
    from mambabyte.model.pretrained import free_bytes

    world = distributed.current().size
    on_cuda = device.startswith("cuda")
    room = torch.cuda.mem_get_info(device)[1] if on_cuda else memory_bytes()
    try:
        rows = recipe.batch_size * recipe.context_parallel // world
        own = replace(
            recipe, batch_size=rows, context=-(-recipe.context // recipe.context_parallel),
            micro_batches=min(recipe.micro_batches, rows)) if world > 1 else recipe
        found = fit(model, own, room, "cuda" if on_cuda else "cpu")
    except UserError as error:
        return f"memory: no forecast ({error})"
    needed = found.required_bytes / 1e9
    need = f"memory: a step needs {needed:{'.3g' if needed < 1000 else ',.0f'}} GB"
    if room is None:  # the system does not say
        return need
    need += f" of {room / 1e9:.3g} GB"
    if found.fits:
        return need
    would = ("a smaller model" if not found.largest_batch and not found.largest_context else
             f"--train.context {found.largest_context}" if not found.largest_batch else
             f"--train.batch-size {found.largest_batch}, or more --train.micro-batches,")
    said = f"{need}: it will not fit; {would} would"
    free = room if on_cuda else free_bytes(device) or room
    if not on_cuda and found.required_bytes > _FAR_TOO_MUCH * free:
        raise UserError(f"{said}. The system would end this process, or another, for it")
    return said
