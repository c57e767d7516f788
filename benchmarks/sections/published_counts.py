"""The published multiply-accumulates beside ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from piip_scale.models.counting import count_network
from piip_scale.models.network_work import AS_COMPUTED, PUBLISHED, PUBLISHED_UNPADDED, Convention
from piip_scale.models.official_config import OfficialModel, read_official_config

_TINY = {"embed_dim": 192, "num_heads": 3}
_GIGA = 1e9
_HEAD = """# Published multiply-accumulates and ours

Of the backbone alone, for one square image at the highest resolution: branches, interactions and merging, in GMACs
(printed as FLOPs in the published tables). Written by `benchmarks/published_macs.py`.

- The published counts leave padded tokens out of windowed attention, and count the merging before a simple pyramid as
  one 1x1 kernel a branch, where the released code has two 3x3 kernels.
- "no padding": rows that come out only if the qkv projection is counted without padded tokens too. The others count it
  as it is computed.
- "tiny branch": the released four-branch class builds its last branch from the third one's arguments; the published
  count is of the tiny branch that the config asks for.
- "as computed" is what the network here, and the released code, really spend, with padding and 3x3 merging.

| network | resolution | published | ours | difference | note | as computed |
|---|---|---:|---:|---:|---|---:|"""


@dataclass(frozen=True)
class PublishedCount:
    """A published row and what we count, in 10 ** 9 multiply-accumulates of the backbone for one image.

    Attributes:
        name: The network's published name.
        resolution: Of its branches, highest first, in px.
        published: As printed.
        ours: By the published convention.
        computed: What the network really spends.
        notes: What it took to meet the published number.
    """

    name: str
    resolution: tuple[int, ...]
    published: float
    ours: float
    computed: float
    notes: tuple[str, ...]


def compare_published(
    tables: Iterable[Mapping[str, Any]], backbones: Mapping[str, Mapping[str, Any]]
) -> list[PublishedCount]:
    """Counts every published row whose released config is at hand.

    Args:
        tables: Published rows: ``name``, ``config``, ``resolution_high_to_low``, ``flops_G``.
        backbones: ``model.backbone`` of the released configs, by path.

    Raises:
        ConfigError: A released config is not understood.
    """
    counted = [row for row in tables if row.get("flops_G") and row["config"] in backbones]
    return [_compare(row, read_official_config(backbones[row["config"]])) for row in counted]


def published_table(counts: Sequence[PublishedCount]) -> str:
    """The comparison as Markdown, with what its columns mean."""
    return "\n".join([_HEAD, *(_line(count) for count in counts)])


def _compare(row: Mapping[str, Any], official: OfficialModel) -> PublishedCount:
    size, published, notes = row["resolution_high_to_low"][0], row["flops_G"], []
    computed = _gmacs(official, size, AS_COMPUTED)
    if len(official.config.branches) == 4:
        official = _with_tiny_branch(official)
        notes.append("tiny branch")
    padded, unpadded = _gmacs(official, size, PUBLISHED), _gmacs(official, size, PUBLISHED_UNPADDED)
    ours = min(padded, unpadded, key=lambda count: abs(count - published))
    if ours != padded:
        notes.append("no padding")
    resolution = tuple(row["resolution_high_to_low"])
    return PublishedCount(row["name"], resolution, published, ours, computed, tuple(notes))


def _gmacs(official: OfficialModel, size: int, convention: Convention) -> float:
    parts = count_network(official.config, size, size, official.head, convention)
    return sum(part.total_macs for part in parts if part.name not in ("pyramid", "head")) / _GIGA


def _with_tiny_branch(official: OfficialModel) -> OfficialModel:
    """The four-branch network that the config asks for, not the one that its released class builds."""
    *rest, last = official.config.branches
    config = official.config.model_copy(update={"branches": (*rest, last.model_copy(update=_TINY))})
    return OfficialModel(config, official.head, official.kinds)


def _line(count: PublishedCount) -> str:
    numbers = (f"{count.published:,g}", f"{count.ours:,.1f}", f"{count.ours / count.published - 1:+.2%}")
    cells = (count.name, "/".join(map(str, count.resolution)), *numbers, ", ".join(count.notes))
    return f"| {' | '.join((*cells, f'{count.computed:,.1f}'))} |"
