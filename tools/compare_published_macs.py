"""Writes a table of the published multiply-accumulates beside ours.

Needs the two reference files of the released project: the published tables and the released backbone dicts.
Example: python tools/compare_published_macs.py ../shared/reference > benchmarks/published_macs.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from piip_scale.models.counting import PUBLISHED, PUBLISHED_UNPADDED, Convention, count_network
from piip_scale.models.official_config import OfficialModel, read_official_config

HEAD = """# Published multiply-accumulates and ours

Of the backbone alone, for one square image at the highest resolution: branches, interactions and merging, in GMACs
(printed as FLOPs in the published tables). Written by `tools/compare_published_macs.py`.

- The published counts leave padded tokens out of windowed attention, and count the merging before a simple pyramid as
  one 1x1 kernel a branch, where the released code has two 3x3 kernels.
- "no padding": rows that come out only if the qkv projection is counted without padded tokens too. The others count it
  as it is computed.
- "tiny branch": the released four-branch class builds its last branch from the third one's arguments; the published
  count is of the tiny branch that the config asks for.
- "as computed" is what the network here, and the released code, really spend, with padding and 3x3 merging.

| network | resolution | published | ours | difference | note | as computed |
|---|---|---:|---:|---:|---|---:|"""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference", type=Path, help="folder with piip_tables.json and released_backbones.json")
    folder = parser.parse_args().reference
    backbones = json.loads((folder / "released_backbones.json").read_text())
    print(HEAD)
    for row in json.loads((folder / "piip_tables.json").read_text()):
        if row.get("flops_G") and row["config"] in backbones:
            print(_line(row, read_official_config(backbones[row["config"]])))


def _line(row: dict[str, Any], official: OfficialModel) -> str:
    size, published = row["resolution_high_to_low"][0], row["flops_G"]
    computed = _gmacs(official, size, Convention())
    notes = []
    if len(official.config.branches) == 4:
        official = _with_tiny_branch(official)
        notes.append("tiny branch")
    padded, unpadded = _gmacs(official, size, PUBLISHED), _gmacs(official, size, PUBLISHED_UNPADDED)
    ours = min(padded, unpadded, key=lambda count: abs(count - published))
    if ours != padded:
        notes.append("no padding")
    resolution = "/".join(map(str, row["resolution_high_to_low"]))
    cells = (row["name"], resolution, f"{published:,g}", f"{ours:,.1f}", f"{ours / published - 1:+.2%}")
    return f"| {' | '.join((*cells, ', '.join(notes), f'{computed:,.1f}'))} |"


def _gmacs(official: OfficialModel, size: int, convention: Convention) -> float:
    parts = count_network(official.config, size, size, official.head, convention)
    return sum(part.total_macs for part in parts if part.name not in ("pyramid", "head")) / 1e9


def _with_tiny_branch(official: OfficialModel) -> OfficialModel:
    *rest, last = official.config.branches
    tiny = last.model_copy(update={"embed_dim": 192, "num_heads": 3})
    config = official.config.model_copy(update={"branches": (*rest, tiny)})
    return OfficialModel(config, official.head, official.kinds)


if __name__ == "__main__":
    main()
