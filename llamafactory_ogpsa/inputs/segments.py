"""Where the rows of a matrix lie in a process's flat piece of it.

ZeRO lays parameters end to end and cuts them anywhere, so a process's piece may begin and end inside a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ..engines.processes import Processes


class Segment(NamedTuple):
    """Consecutive whole rows, or a part of one row, of a piece.

    Attributes:
        start: the first element in the piece.
        stop: the element after the last.
        rows: the number of rows; 1 for a part of one.
        column: the column of the first element.
        cut: the number of the row among all rows that are cut; None for whole rows.
    """

    start: int
    stop: int
    rows: int
    column: int
    cut: int | None


# The number of each row that is cut, by the index of its tensor and of the row.
Cuts = dict[tuple[int, int], int]


def find_cuts(
    widths: Sequence[int | None], offsets: Sequence[int], sizes: Sequence[int], processes: Processes
) -> Cuts:
    """Number the rows that several processes hold parts of; every process calls it and gets the same numbers.

    Args:
        widths: the columns of each tensor; None for those without rows.
        offsets: the first element of this process's piece of each, in the flattened tensor.
        sizes: the number of its elements.
        processes: all processes.
    """
    own = set()
    for index, (width, offset, size) in enumerate(zip(widths, offsets, sizes, strict=True)):
        if width is not None and size > 0:
            own |= {(index, end // width) for end in (offset, offset + size) if end % width}
    return {row: number for number, row in enumerate(processes.union(own))}


def split_piece(index: int, width: int, offset: int, size: int, cuts: Cuts) -> list[Segment]:
    """Split a tensor's piece into the part of a row at its start, whole rows, and the part of a row at its end.

    The parameters are those of `find_cuts`, for one tensor.
    """
    segments, at = [], 0
    while at < size:
        row, column = divmod(offset + at, width)
        left = size - at
        if column or left < width:
            length = min(width - column, left)
            segments.append(Segment(at, at + length, 1, column, cuts[index, row]))
        else:
            length = left // width * width
            segments.append(Segment(at, at + length, length // width, 0, None))
        at += length
    return segments
