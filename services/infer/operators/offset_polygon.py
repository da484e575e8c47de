"""Polygon offsetting: a convex polygon grown outwards by a distance, with round corners, on whole coordinates.

For convex polygons the corners equal those of Clipper 6's ClipperOffset (JT_ROUND, ET_CLOSEDPOLYGON, arc tolerance
0.25), which post-processors of text detectors use: the same truncation to whole numbers, the same steps of the arcs.
Each edge moves along its normal. An arc joins two edges, as chords that deviate from the arc by at most the tolerance.
"""

from __future__ import annotations

import math

import numpy as np

from services.infer.requests.tensors import Tensor

_ARC_TOLERANCE = 0.25

Point = tuple[int, int]


def offset_polygon(corners: Tensor, distance: float) -> Tensor:
    """Return the grown polygon.

    Args:
        corners: [n, 2] of a convex polygon; fractions are truncated.
        distance: in the coordinates' unit, more than 0.

    Returns:
        [m, 2] INT32; empty when fewer than three different corners remain after truncation.
    """
    points = _whole(corners)
    if len(points) < 3:
        return np.empty((0, 2), np.int32)
    normals = [_normal(points[n], points[(n + 1) % len(points)]) for n in range(len(points))]
    deviation = min(_ARC_TOLERANCE, distance * _ARC_TOLERANCE)
    per_turn = min(math.pi / math.acos(1 - deviation / distance), distance * math.pi)
    grown: list[Point] = []
    before = normals[-1]
    for point, after in zip(points, normals, strict=True):
        sine = before[0] * after[1] - after[0] * before[1]
        cosine = before[0] * after[0] + before[1] * after[1]
        # The edges are nearly parallel: one point replaces the arc.
        if abs(sine * distance) < 1 and cosine > 0:
            grown.append(_moved(point, before, distance))
            continue
        if sine < 0:
            grown += [_moved(point, before, distance), point, _moved(point, after, distance)]
        else:
            grown += _arc(point, before, math.atan2(min(sine, 1.0), cosine), per_turn, distance)
            grown.append(_moved(point, after, distance))
        before = after
    return np.array(grown, np.int32)


def _whole(corners: Tensor) -> list[Point]:
    """Return whole coordinates without repeated corners, counter-clockwise where y points up."""
    points: list[Point] = []
    for x, y in corners.tolist():
        if not points or points[-1] != (int(x), int(y)):
            points.append((int(x), int(y)))
    while len(points) > 1 and points[0] == points[-1]:
        points.pop()
    area = sum(points[n - 1][0] * y - x * points[n - 1][1] for n, (x, y) in enumerate(points))
    return points[::-1] if area < 0 else points


def _normal(start: Point, end: Point) -> tuple[float, float]:
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = math.hypot(dx, dy)
    return dy / length, -dx / length


def _arc(point: Point, start: tuple[float, float], angle: float, per_turn: float, distance: float) -> list[Point]:
    x, y = start
    sine, cosine = math.sin(2 * math.pi / per_turn), math.cos(2 * math.pi / per_turn)
    arc = []
    for _ in range(max(_rounded(per_turn / (2 * math.pi) * abs(angle)), 1)):
        arc.append(_moved(point, (x, y), distance))
        x, y = x * cosine - sine * y, x * sine + y * cosine
    return arc


def _moved(point: Point, along: tuple[float, float], distance: float) -> Point:
    return _rounded(point[0] + along[0] * distance), _rounded(point[1] + along[1] * distance)


def _rounded(value: float) -> int:
    """Return the nearest whole number; halves are rounded away from zero."""
    return math.floor(value + 0.5) if value >= 0 else -math.floor(0.5 - value)
