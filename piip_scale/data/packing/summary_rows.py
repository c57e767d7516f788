"""What a packed set holds, as rows of a name and a text."""

from __future__ import annotations

from collections.abc import Iterator

from piip_scale.data.packing.summary import summarise, summarise_labels, summarise_maps
from piip_scale.data.reading.shards import ShardSet

_MOST_CLASSES = 40
"""A set of more classes is summed up by its rarest and its most frequent one."""

Rows = Iterator[tuple[str, str]]


def object_rows(shards: ShardSet) -> Rows:
    """Of a detection set.

    Raises:
        DataError: A shard is gone or its annotations are damaged.
    """
    summary = summarise(shards)
    yield "images", f"{summary.num_images}, {summary.num_empty_images} without objects"
    yield from _edges(summary.short_edges_px, summary.long_edges_px)
    yield "objects an image", "median {}, most {}".format(*summary.objects_per_image)
    yield "objects by size", ", ".join(f"{count} {name}" for name, count in summary.objects_of_size.items())
    yield "crowd regions", str(summary.num_crowds)
    for name, count in summary.objects_of_class.items():
        yield f"class {name}", str(count)


def label_rows(shards: ShardSet) -> Rows:
    """Of a classification set.

    Raises:
        DataError: A shard is gone or its labels are damaged.
    """
    summary = summarise_labels(shards)
    yield "images", str(summary.num_images)
    yield from _edges(summary.short_edges_px, summary.long_edges_px)
    counts = sorted(summary.images_of_class.items(), key=lambda item: item[1])
    (rarest, fewest), (middle, (frequent, most)) = counts[0], (counts[len(counts) // 2][1], counts[-1])
    yield "classes", str(len(counts))
    yield "images a class", f"{fewest} ({rarest}) to {most} ({frequent}), median {middle}"
    for name, count in summary.images_of_class.items() if len(counts) <= _MOST_CLASSES else ():
        yield f"class {name}", str(count)


def map_rows(shards: ShardSet) -> Rows:
    """Of a segmentation set.

    Raises:
        DataError: A shard is gone or a label map is damaged.
    """
    summary = summarise_maps(shards)
    yield "images", str(summary.num_images)
    yield from _edges(summary.short_edges_px, summary.long_edges_px)
    shares = summary.share_of_class.items()
    shown = shares if len(shares) <= _MOST_CLASSES else sorted(shares, key=lambda item: -item[1])[:_MOST_CLASSES]
    yield "classes", str(len(shares)) + (f", the largest {len(shown)}:" if len(shown) < len(shares) else "")
    for name, share in shown:
        yield f"class {name}", f"{share:.2%} of the pixels"
    yield "no class", f"{summary.ignored_share:.2%} of the pixels"


def _edges(short_px: tuple[int, int, int], long_px: tuple[int, int, int]) -> Rows:
    for name, (low, middle, high) in (("short edge", short_px), ("long edge", long_px)):
        yield name, f"{low} to {high} px, median {middle}"
