"""Train a model on a corpus, or resume a run.

    mambabyte train --preset mamba_byte --corpus stdlib --out runs/first
    mambabyte train --preset hybrid_3_1 --train.context 512 --out runs/hybrid
    mambabyte train --out runs/first --resume
    mambabyte train --config runs/first/config.json --train.lr 1e-3 --out runs/second
    torchrun --nproc-per-node 2 -m analysis.cli train --preset mamba_byte --out runs/two
    torchrun --nproc-per-node 2 -m analysis.cli train --out runs/shards --train.parallel sharded

The presets fill the --model and --train options; each can be overridden. A corpus below 10,000
training bytes, or SMOKE_TEST_ONLY=1, selects smoke mode: the parts are checked and the smoke
configuration trains for two steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.cli.console import Bar, say, training_note
from analysis.cli.options import parse, pick_device, print_result
from analysis.cli.recipe import option, recipe
from mambabyte.config import PRESETS, ModelConfig, TrainConfig
from mambabyte.errors import UserError


@dataclass(frozen=True)
class Options:
    out: Path
    """Run folder: configuration, metrics, checkpoints, result."""
    preset: str = "mamba_byte"
    """Named system that fills the other options."""
    config: Path | None = None
    """File that fills them too: JSON or TOML with some of preset, model, train, corpus and
    device, such as a run's config.json."""
    corpus: str = "stdlib"
    """stdlib, wikitext103, a folder with wiki.*.raw, or a text file."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    resume: bool = False
    """Continue the run in the folder from its newest checkpoint, with its own options."""
    json: bool = False
    """Print the result as JSON."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def run(argv: list[str]) -> int:
    named, file, out = (option(argv, name) for name in ("--preset", "--config", "--out"))
    own = Path(out or "") / "config.json"  # a run that is resumed knows what it is
    if "--resume" in argv and out and not named and not file and own.is_file():
        file = str(own)
    start = recipe(named, file)
    about = (__doc__ or "") + "\nPresets:\n\n" + "\n".join(
        f"    {name}: {p.about}" for name, p in PRESETS.items())
    default = Options(out=Path(), model=start.model, train=start.train,
                      corpus=start.corpus or "stdlib", device=start.device or "auto")
    options = parse(Options, argv, "train", about, default)
    if options.out == Path():
        raise UserError("no run folder was given: add --out FOLDER")

    from mambabyte.model import distributed

    device = pick_device(options.device)
    with distributed.joined(device) as world:
        return _train(options, device, world.first)


def _train(options: Options, device: str, first: bool) -> int:
    """Train on ``device``; of several processes only the first one talks."""
    from mambabyte import train as training
    from mambabyte.config.provenance import provenance
    from mambabyte.corpus import load_corpus
    from mambabyte.train.smoke import is_smoke, smoke_check, smoke_configs

    corpus = load_corpus(options.corpus, say)
    model, recipe = options.model, options.train
    smoke = is_smoke(len(corpus.train))
    record: dict[str, Any] = {}
    if smoke:
        import torch

        from mambabyte.model import ByteLM

        model, recipe = smoke_configs(model, len(corpus.train))
        say(f"SMOKE mode (train={len(corpus.train)} bytes) ctx={recipe.context}")
        torch.manual_seed(recipe.seed)
        record["smoke"] = smoke_check(ByteLM(model).to(device), corpus.train)
    if not first:
        record |= training.train(
            model, recipe, corpus, options.out, device=device, resume=options.resume)
        return 130 if record["stopped_by"] == "interrupt" else 0
    say(f"{model.n_parameters / 1e6:.2f}M parameters, layers {model.layers}, context "
        f"{recipe.context}, batch {recipe.batch_size}, {recipe.n_steps} steps on {device}, "
        f"commit {provenance()['commit']}")
    if options.resume and not any((options.out / "checkpoints").glob("step_*")):
        say(f"{options.out} has no checkpoint to resume from: starting at the first step")
    with Bar("training") as bar:
        def scoring(done: float) -> None:
            bar.stage("scoring held-out text")
            bar(done)

        record |= training.train(
            model, recipe, corpus, options.out, device=device, resume=options.resume,
            report=lambda p: bar(p.step / p.n_steps, training_note(p), line=True),
            report_scoring=scoring,
        )
    record["run"] = options.out
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
        *(["SMOKE PASS"] if smoke else []),
    ])
    return 130 if record["stopped_by"] == "interrupt" else 0
