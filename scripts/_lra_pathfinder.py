"""Pictures in the manner of Pathfinder: do two discs mark the ends of one dashed contour? Our own generator.

Linsley et al. (2018, arXiv 1805.08315) proposed the task; Long Range Arena has it at 32 x 32. Here as there: two long
contours of 14 dashes, shorter distractors of 4, dashes of length 2 with gaps of 1, discs of radius 1.5. Everything else
(the random walk, how far contours keep apart, the drawing) is ours: these pictures are a stand-in, and accuracies on
them are not comparable with those on the files of the release.
"""

from dataclasses import dataclass

import numpy as np


SIZE = 32
DASH, GAP = 2.0, 1.0
LONG, SHORT, DISTRACTORS = 14, 4, 5
CLEARANCE = 2.0  # least distance between contours, and between a contour and its own earlier dashes; more than GAP
TURN = 0.45  # standard deviation of the angle between one dash and the next, in radians
THICKNESS, RADIUS = 1.0, 1.5
BRIGHTNESS = 0.75  # of dashes; discs have 1


@dataclass(frozen=True)
class Picture:
    """A picture and how it came about.

    Attributes:
        pixels: `[32, 32]` uint8.
        contours: Of each contour the ends of its dashes, `[dashes, 2, 2]` (dash, end, x and y in pixels); the two long
            ones come first.
        markers: `[2, 2]`, centres of the discs.
        label: 1 if both discs are on the first contour, 0 if one is on each of the long ones.
    """

    pixels: np.ndarray
    contours: tuple[np.ndarray, ...]
    markers: np.ndarray
    label: int


def draw_picture(draw: np.random.Generator, label: int) -> Picture:
    """A random picture with the label asked for; but for the discs, pictures of both labels are made alike."""
    contours = None
    while contours is None:
        contours = _contours(draw)
    first, second = contours[:2]
    if label == 1:
        markers = np.stack([first[0, 0], first[-1, 1]])
    else:
        markers = np.stack([contour[(0, -1)[end], end] for contour, end in ((first, draw.integers(2)), (second, 0))])
    return Picture(_render(np.concatenate(contours), markers), contours, markers, label)


def _contours(draw: np.random.Generator) -> tuple[np.ndarray, ...] | None:
    """Two long contours and the distractors; None if they find no room."""
    taken = np.empty((0, 2))
    contours = []
    for dashes in (LONG, LONG, *[SHORT] * DISTRACTORS):
        contour = next(filter(lambda c: c is not None, (_contour(draw, dashes, taken) for _ in range(100))), None)
        if contour is None:
            return None
        contours.append(contour)
        taken = np.concatenate([taken, _points(contour).reshape(-1, 2)])
    return tuple(contours)


def _contour(draw: np.random.Generator, dashes: int, taken: np.ndarray) -> np.ndarray | None:
    """A random walk `[dashes, 2, 2]` that keeps clear of `taken` points and of itself; None if it gets stuck."""
    position, angle = draw.uniform(RADIUS, SIZE - RADIUS, 2), draw.uniform(0, 2 * np.pi)
    result = np.empty((dashes, 2, 2))
    for i in range(dashes):
        own = _points(result[: max(0, i - 1)]).reshape(-1, 2)  # the dash before is near by design
        others = np.concatenate([taken, own])
        for _ in range(10):
            turned = angle + draw.normal(0, TURN) if i else angle
            direction = np.array([np.cos(turned), np.sin(turned)])
            start = position + GAP * direction if i else position
            dash = np.stack([start, start + DASH * direction])
            inside = (dash >= RADIUS).all() and (dash <= SIZE - RADIUS).all()
            distances = np.linalg.norm(_points(dash[None])[0][:, None] - others, axis=-1)
            if inside and (distances >= CLEARANCE).all():
                break
        else:
            return None
        result[i], position, angle = dash, dash[1], turned
    return result


def _points(dashes: np.ndarray) -> np.ndarray:
    """Points on dashes `[dashes, 2, 2]`, less than half a pixel apart: `[dashes, 6, 2]`."""
    along = np.linspace(0, 1, 6)[:, None]
    return dashes[:, None, 0] * (1 - along) + dashes[:, None, 1] * along


def _render(dashes: np.ndarray, markers: np.ndarray) -> np.ndarray:
    """Dashes `[dashes, 2, 2]` and discs `[2, 2]`, with soft edges, as `[32, 32]` uint8."""
    centres = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE)), -1).reshape(-1, 1, 2) + 0.5
    start, step = dashes[:, 0], dashes[:, 1] - dashes[:, 0]
    along = np.clip(((centres - start) * step).sum(-1) / (step**2).sum(-1), 0, 1)  # the nearest point of the dash
    to_dash = np.linalg.norm(centres - start - along[..., None] * step, axis=-1).min(1)
    to_disc = np.linalg.norm(centres - markers, axis=-1).min(1)
    light = np.maximum(BRIGHTNESS * np.clip(THICKNESS / 2 + 0.5 - to_dash, 0, 1), np.clip(RADIUS + 0.5 - to_disc, 0, 1))
    return np.round(255 * light).astype(np.uint8).reshape(SIZE, SIZE)
