"""States of prompts on disk: what a prompt begins with, and was read before, is not read again."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from mambabyte.config.checks import CountOrNone, fit, path_of
from mambabyte.config.files import make_dir, private_dir
from mambabyte.errors import UserError
from mambabyte.stream.engines.base import ByteModel
from mambabyte.stream.saved import VERSION, load_state, save_state
from mambabyte.stream.states import n_bytes, weights_digest
from mambabyte.stream.streams import ByteStream

_LOG = logging.getLogger(__name__)
LEAST = 1024  # bytes: to read fewer costs less than to look for them
_FRACTION = 16  # of what lies before, that is read again at most
_NAME = re.compile(r"[0-9a-f]{40}\.state")


def places(length: int) -> Iterator[int]:
    """After how many bytes of a prompt states are kept, its end the last of them.

    At multiples of LEAST, and further apart the further on, so that there are few: all of a prompt
    but a 16th at most is found by another that begins alike.
    """
    at = LEAST
    while at < length:
        yield at
        at += max(LEAST, (1 << at.bit_length() - 1) // _FRACTION)
    if length:
        yield length


class PrefixCache:
    """A folder of states after what prompts begin with, by weights and bytes, of ``max_bytes`` in
    all; those longest unused go first.

    Reading goes by the same pieces whether or not something was found, so what follows is the same
    to the last bit. A file that is damaged or of another model is said, ignored and written anew;
    a folder that cannot be written is said once, and serves for what is in it. Other files in the
    folder are left alone. Several processes may use it at once.
    """

    def __init__(self, folder: Path | str, max_bytes: int = 1 << 30) -> None:
        self.folder = path_of(folder, "the folder of a cache")
        self.max_bytes = fit(max_bytes, CountOrNone, "max_bytes")
        self.read_bytes = self.found_bytes = 0  # of all prompts: by the model, and in the folder
        self._writable = True
        if self.folder.exists() or not private_dir(self.folder):
            make_dir(self.folder)  # says why not

    def read(
        self, model: ByteModel, prompt: bytes, report: Callable[[float], None] = lambda done: None
    ) -> ByteStream:
        """A stream of ``model`` behind ``prompt``; ``report`` is called with the share done."""
        total = hashlib.sha256(f"{VERSION} {model.device.type} {weights_digest(model)}".encode())
        keys, done = {}, 0
        for at in places(len(prompt)):
            total.update(prompt[done:at])
            done = at
            keys[at] = total.hexdigest()
        stream, done = self._longest(model, keys)
        self.found_bytes += done
        for at, key in keys.items():
            if at > done:
                stream.feed(prompt[done:at])
                self.read_bytes += at - done
                done = at
                self._keep(model, stream, key)
                report(done / len(prompt))
        return stream

    def _path(self, key: str) -> Path:
        return self.folder / f"{key[:40]}.state"

    def _longest(self, model: ByteModel, keys: dict[int, str]) -> tuple[ByteStream, int]:
        for at, key in reversed(keys.items()):
            path = self._path(key)
            if not os.path.lexists(path):
                continue
            try:
                found = ByteStream.at(model, load_state(path, model, key))
            except UserError as error:
                _LOG.warning("note: kept state ignored, the prompt is read again: %s", error)
                continue
            with suppress(OSError):  # another process may have removed it
                os.utime(path)
            return found, at
        return ByteStream(model), 0

    def _keep(self, model: ByteModel, stream: ByteStream, key: str) -> None:
        kept = stream.kept
        size = n_bytes([kept.state, kept.log_probs])
        if not self._writable or size > self.max_bytes:
            return
        try:
            save_state(self._path(key), model, kept, key)
        except UserError as error:
            self._writable = False
            _LOG.warning("note: states of prompts are not kept: %s", error)
        else:
            self._shrink()

    def _shrink(self) -> None:
        """Remove what was longest unused, until the rest fits."""
        found = []
        for path in self.folder.iterdir():
            with suppress(OSError):  # removed by another process
                if _NAME.fullmatch(path.name) and path.is_file():
                    about = path.stat()
                    found.append((about.st_mtime_ns, path.name, about.st_size))
        size = sum(bytes_ for *_, bytes_ in found)
        for _, name, bytes_ in sorted(found):
            if size <= self.max_bytes:
                break
            with suppress(OSError):
                (self.folder / name).unlink()
            size -= bytes_
