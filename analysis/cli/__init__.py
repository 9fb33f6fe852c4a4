"""The command line: ``mambabyte COMMAND``. Errors the user can fix are one line and status 2."""

from __future__ import annotations

import errno
import importlib
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mambabyte import __version__
from mambabyte.errors import UserError, means_no_memory, nearest

# command -> (module, what it does); a module is imported when its command runs, not before.
COMMANDS = {
    "train": ("analysis.cli.models.train", "train a model on a corpus, or resume a run"),
    "eval": ("analysis.cli.models.evaluate", "bits per byte and accuracy of a checkpoint"),
    "generate": ("analysis.cli.models.generate", "stream text from a checkpoint"),
    "runs": ("analysis.cli.models.runs", "list, show, compare and plot training runs"),
    "convert": ("analysis.cli.models.convert", "weights from and to other libraries"),
    "memory": ("analysis.cli.models.memory", "will a training step fit, and what would?"),
    "corpus": ("analysis.cli.models.corpus", "fetch, build or look at a corpus"),
    "study": ("analysis.cli.studies.study", "run one study with other parameters"),
    "sweep": ("analysis.cli.studies.sweep", "run the studies, or a grid, skipping what is done"),
    "report": ("analysis.cli.studies.report", "render the HTML report from the run folders"),
    "ngram": ("analysis.cli.models.ngram", "count, score and save a byte n-gram model"),
    "task": ("analysis.cli.models.task", "a named system under the rules of the public task"),
    "audit": ("analysis.cli.studies.audit", "check any library's scan, SSD, delta rule, attention"),
    "bench": ("analysis.cli.studies.bench", "time the scan, streaming, or training steps"),
}

# These read and write beside the sources: notebooks/, data/ and reports/ are in no wheel.
IN_CHECKOUT = ("study", "sweep", "report")
ROOT = Path(__file__).resolve().parents[2]
INTERRUPTED = "interrupted"
KEEPING = {"train", "study", "sweep"}  # these leave what was finished in their folders


# For bash, and for zsh after `autoload bashcompinit && bashcompinit`.
COMPLETION = """_mambabyte() {
    COMPREPLY=($(compgen -W "$(mambabyte --complete "${COMP_WORDS[@]:1:COMP_CWORD-1}")" \\
        -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _mambabyte mambabyte"""
# What the system says of a path that the user gave and that cannot be what it should be.
_PATHS = {errno.ENOENT, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR,
          errno.ENOTDIR, errno.ELOOP}
_DISK = {errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT}  # it has failed
# A card that is lost, and a kernel that broke: after either no call to the driver succeeds.
_GPU_FAILED = re.compile(r"^CUDA (error|driver)(?!.*out of memory)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (0 only on success)."""
    args = list(sys.argv[1:] if argv is None else argv)
    _open_streams()
    if hasattr(sys.stdout, "reconfigure"):  # text that a terminal's encoding lacks is shown as ?
        sys.stdout.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings(), _ended_like_ctrl_c():
            warnings.showwarning = _note  # type: ignore[assignment]
            if not args or args[0] not in COMMANDS:
                return _about(args)
            _check_folder()
            if args[0] in IN_CHECKOUT and not (ROOT / "notebooks").is_dir():
                raise UserError(f"mambabyte {args[0]} needs the project's checkout: an installed "
                                "package has no notebooks, records and prose. Clone the project, "
                                "pip install -e . there, and run it in that environment")
            run: Callable[[list[str]], int] = importlib.import_module(COMMANDS[args[0]][0]).run
            return run(args[1:])
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        kept = "; what was finished is kept" if KEEPING & {*args[:1]} else ""
        _say(f"{INTERRUPTED}{kept}")
        return 130
    except BrokenPipeError:  # the reader went away, as in `mambabyte generate | head`
        _discard(sys.stdout)
        return 1
    except OSError as error:
        if error.errno in _PATHS and error.filename is not None:
            return _fail(f"cannot use {os.fsdecode(error.filename)}: {error.strerror}")
        if error.errno in _DISK:  # reading on does not say in which file
            where = os.fsdecode(error.filename) if error.filename is not None else "a file"
            return _fail(f"{where} could not be read or written to its end: {error.strerror}")
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _discard(sys.stdout)
        return _fail(f"no room left ({error.strerror}); what was finished is kept: make room and "
                     "run it again, with --resume where it has it")
    except (MemoryError, RuntimeError) as error:
        if _GPU_FAILED.search(str(error)):
            return _fail(f"the GPU failed ({str(error).splitlines()[0]}): nothing that was on it "
                         "can be read; what was saved before is kept: run it again, with --resume "
                         "where it has it")
        if not (isinstance(error, MemoryError) or means_no_memory(str(error))):
            raise
        return _fail("out of memory: give smaller sizes; mambabyte memory says what a training "
                     "step needs and what would fit")


def completions(words: Sequence[str]) -> list[str]:
    """The words that may stand next on a command line, after the whole ``words``."""
    if not words or words[0] not in COMMANDS:
        return [] if words else [*COMMANDS]
    from analysis.cli.parser import complete, options_of

    module = importlib.import_module(COMMANDS[words[0]][0])
    actions = getattr(module, "ACTIONS", {})
    if actions and (len(words) < 2 or words[1] not in actions):
        return [] if len(words) > 1 else [*actions, "--help"]
    options = actions[words[1]].options if actions else module.Options
    return complete(options_of(options), words[2 if actions else 1:])


def _about(args: Sequence[str]) -> int:
    """What is no command: help, the version, completion."""
    if not args or args[0] in ("-h", "--help"):
        text, status = _usage(), 0 if args else 2
    elif args[0] in ("-V", "--version"):
        text, status = f"mambabyte {__version__}", 0
    elif args[0] == "--completion":
        text, status = COMPLETION, 0
    elif args[0] == "--complete":
        text, status = "\n".join(completions(args[1:])), 0
    else:
        raise UserError(f"there is no command {args[0]!r}{nearest(args[0], COMMANDS)}: choose one "
                        f"of {', '.join(COMMANDS)}")
    print(text, flush=True)
    return status


def _discard(stream: TextIO) -> None:
    """What is still to be written there goes nowhere, lest the interpreter fail at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_streams() -> None:
    """A standard stream that the caller has closed is None: what is written to it goes nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, as long as the process


def _check_folder() -> None:
    try:
        os.getcwd()
    except OSError:
        raise UserError("the working folder is no longer there: change to another one") from None


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """What a batch system, `kill` or a closed terminal sends does what Ctrl-C does. A SIGHUP that
    is ignored, as under nohup, stays so.

    While torch is imported the process ends at once: its C++ aborts where an exception comes out of
    Python, or drops it, and nothing of the user's is in work yet.
    """
    def interrupt(number: int, frame: object) -> None:
        spec = getattr(sys.modules.get("torch"), "__spec__", None)
        if getattr(spec, "_initializing", False):  # as importlib marks a module until it is whole
            os.write(2, f"{INTERRUPTED}\n".encode())
            os._exit(130)
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number and signal.getsignal(number) in (
                        signal.SIG_DFL, signal.default_int_handler):
                    before[number] = signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(message: str) -> int:
    _say(f"error: {message}")
    return 2


def _say(line: str) -> None:
    """One line on stderr, where it takes it; on a full disk the status alone says it."""
    from analysis.cli.console import one_line, say

    say(one_line(line))


def _note(message: Warning | str, *where: object) -> None:
    """A warning as one line, without the source line that Python adds for programmers."""
    _say(f"note: {message}")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join([
        "usage: mambabyte COMMAND [options]", "",
        "Byte-level selective state-space language models: train, score, stream, study.", "",
        *lines, "", "mambabyte COMMAND --help shows the options of a command and an example.",
        "mambabyte --version, or -V, says the version. Completion of commands and options in bash:",
        'eval "$(mambabyte --completion)".',
    ])

