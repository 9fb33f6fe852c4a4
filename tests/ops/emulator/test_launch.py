"""What the host gives a launch of ``hybrid.cu`` is what its structure takes."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from mambabyte.ops.stream import fitting


def test_a_launch_has_the_fields_of_the_kernels_structure_in_their_order() -> None:
    source = Path(fitting.__file__).with_name("hybrid.cu").read_text(encoding="utf-8")
    inside = re.sub(r"//.*", "", source.partition("struct Launch {")[2].partition("};")[0])
    letters = {"int": "i", "unsigned": "I", "unsigned long long": "Q", "float": "f"}
    found = []
    for line in inside.split(";")[:-1]:
        kind, names = re.findall(r"\s*((?:\w+ )+)(.+)", line)[0]
        found += [(name.strip(" *"), "P" if "*" in name else letters[kind.strip()])
                  for name in names.split(",")]
    assert found == list(fitting.LAUNCH.items())
    assert len(found) == 39
    without_gaps = struct.calcsize("=" + fitting.PARAMETERS.replace("P", "Q"))
    assert struct.calcsize("@" + fitting.PARAMETERS) - without_gaps == 4  # behind the last field
    values = fitting.packed_launch(patience=7, packets=5)
    assert (values[0], values[-1], sum(values)) == (5, 7, 12)
    with pytest.raises(KeyError, match="has no pakets"):
        fitting.packed_launch(pakets=5)
