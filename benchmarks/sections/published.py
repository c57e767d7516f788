"""The published multiply-accumulates: which row is furthest off."""

from __future__ import annotations

import json

from sections.golden import REFERENCE
from sections.published_counts import compare_published
from sections.record import table


def section() -> str:
    """The worst rows of the comparison."""
    tables, backbones = (
        json.loads((REFERENCE / name).read_text()) for name in ("piip_tables.json", "released_backbones.json")
    )
    counts = compare_published(tables, backbones)
    worst = sorted(counts, key=lambda count: -abs(count.ours / count.published - 1))[:3]
    rows = [
        [
            count.name,
            "/".join(map(str, count.resolution)),
            f"{count.published:,g}",
            f"{count.ours:,.1f}",
            f"{count.ours / count.published - 1:+.2%}",
        ]
        for count in worst
    ]
    head = ["network", "resolution", "published, GMACs", "ours", "difference"]
    return f"The furthest of {len(counts)} published rows; all of them are in `published_macs.md`.\n\n" + table(
        head, rows
    )
