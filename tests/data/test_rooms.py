"""The rooms of ``data/`` stand on each other in one order."""

import ast
from pathlib import Path

from layer_rules import imports

import piip_scale.data

# A room imports rooms before it, and itself; modules at the top are rooms of their own.
ORDER = [
    *("orientation", "images", "photos", "set_kinds", "batch", "order", "reading", "augment", "samples"),
    *("loader", "stream", "packing"),
]


def test_no_room_of_data_imports_a_later_one():
    folder = Path(piip_scale.data.__file__).parent
    faults = []
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        if parts == ("__init__",):
            continue
        assert parts[0] in ORDER, f"{parts[0]} is no room of data/: put it into one, or name its place in the order"
        module = ".".join(("piip_scale", "data", *parts))
        for imported in imports(ast.parse(path.read_text(encoding="utf-8")), module):
            room = imported.name.removeprefix("piip_scale.data.").split(".")[0]
            if imported.name.startswith("piip_scale.data.") and ORDER.index(room) > ORDER.index(parts[0]):
                faults.append(f"{module}:{imported.line} imports {imported.name}")
    assert not faults
