"""Which share of each cell of a grid polygons cover, exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Short of 1, so that a piece's place along its edge never counts as the next edge's number.
_BEFORE_THE_END = 1 - 1e-9


def covered_shares(outlines: list[Array], owners: list[int], num_masks: int, side: int) -> Array:
    """The covered share of every cell, float32 (num_masks, side, side), 0 to 1.

    Edges are cut at the grid's lines; each piece then covers a part of one cell, and all of the cells below it, once
    more or once less by its direction. Adding up along the columns gives the winding number, averaged over the cell.

    Args:
        outlines: Polygons, float64 (M, 2) each, x and y in cells; parts outside the grid cover nothing.
        owners: The mask that each belongs to. Where two of one mask overlap, the share is that of both, at most 1.
        num_masks: Masks.
        side: Cells along each side of a mask.

    Source: accumulated signed areas, as rasterisers of fonts use them.
    """
    lengths = np.array([len(outline) for outline in outlines])
    starts_xy = np.concatenate(outlines)
    ends_xy = np.concatenate([np.roll(outline, -1, axis=0) for outline in outlines])
    edges, places = _pieces(starts_xy, ends_xy, side)
    begin = starts_xy[edges] + places[:, None] * (ends_xy - starts_xy)[edges]
    is_last = np.append(edges[1:] != edges[:-1], True)
    end = np.where(is_last[:, None], ends_xy[edges], np.roll(begin, -1, axis=0))
    # Pieces do not cross the grid's border: pushed onto it, those beyond the top cover what is below them all the same.
    begin, end = np.clip(begin, 0, side), np.clip(end, 0, side)
    # Turned the same way all, or a cell in which two outlines of one mask end would lose what it should gain.
    width = (end - begin)[:, 0] * np.repeat(_turns(starts_xy, ends_xy, lengths), lengths)[edges]
    masks = np.repeat(np.array(owners), lengths)[edges]
    return _accumulated((begin + end) / 2, width, masks, num_masks, side)


def _turns(starts_xy: Array, ends_xy: Array, lengths: Array) -> Array:
    """1 for each outline that turns one way, -1 for the other."""
    doubled = starts_xy[:, 0] * ends_xy[:, 1] - starts_xy[:, 1] * ends_xy[:, 0]
    return np.where(np.add.reduceat(doubled, np.cumsum(lengths) - lengths) < 0, -1.0, 1.0)


def _pieces(starts_xy: Array, ends_xy: Array, side: int) -> tuple[Array, Array]:
    """Each piece's edge and where along it the piece begins, 0 to 1, in the order of the edges and along them."""
    num_edges = len(starts_xy)
    low, high = np.minimum(starts_xy, ends_xy), np.maximum(starts_xy, ends_xy)
    first = np.clip(np.floor(low) + 1, 0, side + 1).T.ravel()
    last = np.clip(np.ceil(high) - 1, -1, side).T.ravel()
    counts = np.maximum(last - first + 1, 0).astype(np.int64)
    crossed = np.repeat(np.arange(2 * num_edges), counts)
    lines = np.arange(len(crossed)) - np.repeat(np.cumsum(counts) - counts - first, counts)
    starts, lengths = starts_xy.T.ravel()[crossed], (ends_xy - starts_xy).T.ravel()[crossed]
    cuts = crossed % num_edges + np.clip((lines - starts) / lengths, 0, _BEFORE_THE_END)
    # One sort of plain numbers, edge and place in one, is far faster than an ordering by two keys.
    places = np.sort(np.concatenate([np.arange(num_edges, dtype=np.float64), cuts]))
    edges = places.astype(np.int64)
    return edges, places - edges


def _accumulated(middle_xy: Array, width: Array, masks: Array, num_masks: int, side: int) -> Array:
    column = np.minimum(middle_xy[:, 0].astype(np.int64), side - 1)
    row = middle_xy[:, 1].astype(np.int64)
    below = width * (middle_xy[:, 1] - row)
    # Two rows more than cells: for pieces on the lower border, and for what those of the last row add below it.
    cell = (masks * (side + 2) + row) * side + column
    weights = np.concatenate([width - below, below])
    areas = np.bincount(np.concatenate([cell, cell + side]), weights, num_masks * (side + 2) * side)
    winding = areas.astype(np.float32).reshape(num_masks, side + 2, side).cumsum(axis=1)[:, :side]
    return np.asarray(np.minimum(np.abs(winding), 1.0))
