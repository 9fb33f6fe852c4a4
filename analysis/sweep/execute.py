"""One run of one notebook, in its own process: the only place that touches papermill.

``python -m analysis.sweep.execute PARENT`` reads a Task as JSON on standard input. The run folder
is written under a temporary name and renamed when complete; a run that is interrupted leaves
nothing, a run that fails leaves a folder with the error, the notebook and what was printed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from analysis.runs.folders import RECORD, made, seal, write_record
from mambabyte.config.files import make_dir, put_in_place, scratch_dir, to_json, write_json
from mambabyte.config.owners import end_with
from mambabyte.errors import UserError, means_no_memory

ROOT = Path(__file__).resolve().parents[2]
SHORT_PATH = 90  # a UNIX socket's path has room for 107 bytes


@dataclass(frozen=True)
class Task:
    """Everything a worker needs, as plain values, so that it travels as JSON."""

    study: str
    notebook: str
    parameters: dict[str, Any]
    run_id: str
    folder: str  # where the finished run goes
    temporary: str  # where it is written; beside ``folder``
    sources: str
    profile: str
    command: str
    cwd: str  # relative paths in parameters mean the caller's folder

    @property
    def log(self) -> Path:
        return Path(self.temporary) / "log.txt"

    def attempt(self, number: int) -> Task:
        """The same task in the temporary folder of its attempt ``number``, from 0: what a lost
        worker began may still be ending in that of the one before."""
        before, token, tag, kind = Path(self.temporary).name.rsplit(".", 3)
        name = ".".join((before, f"{token[:-2]}{number:02x}", tag, kind))
        return replace(self, temporary=str(Path(self.temporary).with_name(name)))

    def to_json(self) -> str:
        return to_json(asdict(self))


def execute(task: Task) -> None:
    """Runs the notebook and puts the run folder in place, done or failed.

    Raises only what is not the notebook's fault: an unwritable folder, an interruption.
    """
    os.chdir(task.cwd)
    task = _own_attempt(task)
    temporary = Path(task.temporary)
    began = time.perf_counter()
    try:
        # Only what a study says is progress; what libraries write to stderr is kept beside it.
        with (task.log.open("w", encoding="utf-8") as log,
              (temporary / "stderr.txt").open("a", encoding="utf-8") as errors,
              _inherited(errors)):
            error = _papermill(task, log, errors)
        if not error and not (temporary / RECORD).is_file():
            error = "the notebook ended without keeping a run: its last cell is save(run)"
        _clean(temporary, task)
        if error:
            _record_failure(temporary, task, error)
        _complete(temporary, task, time.perf_counter() - began)
        folder = Path(task.folder)
        put_in_place(temporary, folder, _made(folder))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _own_attempt(task: Task) -> Task:
    """The task in a temporary folder that no other attempt has made."""
    make_dir(Path(task.temporary).parent)
    for number in range(256):
        mine = task.attempt(number)
        with suppress(FileExistsError):
            Path(mine.temporary).mkdir()
            return mine
    raise UserError(f"{task.folder} was begun 256 times and never ended: remove "
                    f"{Path(task.temporary).parent}/.{task.run_id}.*")


def _made(folder: Path) -> set[str]:
    try:
        return made(folder)
    except UserError:  # damaged; it has this run's name, so the names in it are a run's
        return set()


def _papermill(task: Task, log: TextIO, errors: TextIO) -> str:
    """Executes the notebook into the temporary folder; returns the error's one line or ""."""
    from nbclient.exceptions import DeadKernelError
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    output = Path(task.temporary) / "notebook.ipynb"
    with _quiet_jupyter() as manager:
        try:
            execute_notebook(
                task.notebook, str(output),
                # Relative, so that the executed notebook shows no path of this machine.
                parameters={**task.parameters, "run_dir": os.path.relpath(task.temporary)},
                kernel_name="python3", progress_bar=False, stdout_file=log, stderr_file=errors,
                start_timeout=120, extra_arguments=["--HistoryManager.enabled=False"],
                config=Config({"KernelManager": manager}),
            )
        except PapermillExecutionError as error:
            return why(error.ename, error.evalue)
        except DeadKernelError:
            return (f"the kernel died ({_last_words(errors) or 'out of memory, or killed'}); see "
                    "stderr.txt")
        except Exception as error:  # a notebook that cannot even start is a failed run
            words = _last_words(errors)
            return f"{type(error).__name__}: {_first_line(str(error))}" + (
                f" ({words}; see stderr.txt)" if words else "")
    return ""


def why(kind: str, words: str) -> str:
    """A run's error in one line."""
    line = f"{kind}: {_first_line(words)}"
    return f"out of memory: give smaller parameters ({line})" if means_no_memory(words) else line


@contextmanager
def _inherited(errors: TextIO) -> Iterator[None]:
    """What processes started here write to their standard error: a kernel's reason to die."""
    kept = os.dup(2)
    os.dup2(errors.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _last_words(errors: TextIO) -> str:
    errors.flush()
    text = Path(errors.name).read_text(encoding="utf-8", errors="replace")
    return next((line.strip()[:200] for line in reversed(text.splitlines())
                 if line.strip() and not line.startswith("Kernel died")), "")  # Jupyter's own


@contextmanager
def _quiet_jupyter() -> Iterator[dict[str, str]]:
    """An environment for kernels that reads and writes nothing of the user's, and in which python3
    is this interpreter, whatever kernels the user's Jupyter has.

    Yields the kernel manager's options: sockets in a private folder instead of ports, which clash
    when many kernels start at once. The folder must be named: the default is the working folder,
    where two kernels would take each other's sockets.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(
        p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    # A kernel imports what it needs; the debugger's frozen-modules warning is only noise here.
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    with scratch_dir() as scratch:
        folder = str(scratch)
        os.environ["JUPYTER_RUNTIME_DIR"] = folder
        os.environ["IPYTHONDIR"] = folder
        os.environ["JUPYTER_PATH"] = folder
        write_json(scratch / "kernels" / "python3" / "kernel.json", {
            "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": "Python 3", "language": "python"})
        short = os.name == "posix" and len(folder) <= SHORT_PATH
        yield {"transport": "ipc", "ip": os.path.join(folder, "k")} if short else {}


def _record_failure(temporary: Path, task: Task, error: str) -> None:
    from mambabyte.config.provenance import provenance

    for table in (*temporary.glob("*.csv"), *temporary.glob("*.parquet")):
        table.unlink()
    write_record(temporary, {
        "study": task.study, "parameters": task.parameters, "status": "failed",
        "error": _scrub(error, task), "provenance": provenance(),
    })


def _complete(temporary: Path, task: Task, seconds: float) -> None:
    """What the sweep knows: identity, sources, duration and the command that repeats it."""
    record = json.loads((temporary / RECORD).read_text(encoding="utf-8"))
    seal(
        temporary, parameters=task.parameters, run_id=task.run_id, sources=task.sources,
        profile=task.profile, seconds=round(seconds, 3),
        provenance={**record["provenance"], "command": task.command},
    )


def _clean(temporary: Path, task: Task) -> None:
    """Takes papermill's bookkeeping and this machine's paths out of notebook and log."""
    notebook = temporary / "notebook.ipynb"
    content = None
    if notebook.is_file():
        try:
            content = _strings(json.loads(notebook.read_text(encoding="utf-8")),
                               lambda text: _scrub(text, task))
        except ValueError:  # cut by a full disk, which is the error to be told
            notebook.unlink()
    if content is not None:
        content["metadata"].pop("papermill", None)
        for cell in content["cells"]:
            for key in ("papermill", "execution"):
                cell["metadata"].pop(key, None)
        notebook.write_text(to_json(content, indent=1, ensure_ascii=False) + "\n",
                            encoding="utf-8")
    for name in ("log.txt", "stderr.txt"):
        path = temporary / name
        path.write_text(_scrub(path.read_text(encoding="utf-8", errors="replace"), task),
                        encoding="utf-8")


def _scrub(text: str, task: Task) -> str:
    text = text.replace(Path(task.temporary).name, task.run_id)
    for folder in (task.cwd, str(ROOT)):
        text = text.replace(folder.rstrip("/") + "/", "")
    return text.replace(str(Path.home()), "~")


def _strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_strings(v, change) for v in value]
    if isinstance(value, dict):
        return {k: _strings(v, change) for k, v in value.items()}
    return value


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:500] if lines else "(no message)"


def _stop(_signal: int, _frame: Any) -> None:
    raise SystemExit(143)  # so that ``finally`` blocks shut the kernel down


def main() -> None:
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the sweep's to handle
    end_with(int(sys.argv[1]))  # no orphan of a killed sweep disturbs a timing
    execute(Task(**json.load(sys.stdin)))


if __name__ == "__main__":
    main()
