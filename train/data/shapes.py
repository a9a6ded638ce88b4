"""The generated data set `shapes`: ten classes of textured shapes, as an ImageFolder of JPEGs.

Every image is a pure function of (seed, split, class, number). A scene has a two-colour background
with slow texture and clutter, one object of the class with a pose and a class-typical texture, an
optional outline, occluders, a lighting gradient and sensor noise. Colours lean towards a
class-typical hue but do not give the class away; the texture and the outline of the object do.

Coordinates: the canvas spans [-1, 1] in x and y, y downwards. A signed distance is negative inside.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ...export.documents import read_json
from ...export.durable import full_disk_explained, replacing

SIZE_PX = 64
GENERATOR_VERSION = 1
SPLITS = {"train": 0, "val": 1}
JPEG_QUALITY = 95
_IMAGE_BYTES = 2**13  # most need less

Array = np.ndarray
_EDGE_PER_UNIT = 24.0
"""Coverage per signed distance: about 1.3 px of anti-aliasing at 64 px."""
_axis = ((np.arange(SIZE_PX) + 0.5) / SIZE_PX * 2 - 1).astype(np.float32)
_X, _Y = np.meshgrid(_axis, _axis)


def _polygon(points: list[tuple[float, float]]) -> Callable[[Array, Array, float], Array]:
    """The signed distance function of a closed polygon (even-odd rule)."""

    def distance(u: Array, v: Array, _variant: float) -> Array:
        nearest = np.full(u.shape, np.inf, np.float32)
        inside = np.zeros(u.shape, bool)
        for (ax, ay), (bx, by) in zip(points, points[-1:] + points[:-1], strict=True):
            ex, ey, wu, wv = bx - ax, by - ay, u - ax, v - ay
            along = np.clip((wu * ex + wv * ey) / (ex * ex + ey * ey), 0, 1)
            nearest = np.minimum(nearest, (wu - ex * along) ** 2 + (wv - ey * along) ** 2)
            inside ^= ((v >= ay) != (v >= by)) & ((ex * wv > ey * wu) == (by > ay))
        return np.where(inside, -1, 1) * np.sqrt(nearest)

    return distance


def _box(u: Array, v: Array, half_width: float, half_height: float) -> Array:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _cross(u: Array, v: Array, variant: float) -> Array:
    arm = 0.25 + 0.08 * variant
    return np.minimum(_box(u, v, 0.95, arm), _box(u, v, arm, 0.95))


def _bars(u: Array, v: Array, variant: float) -> Array:
    half = 0.17 + 0.04 * variant
    return np.minimum.reduce([_box(u, v + shift, 0.9, half) for shift in (-0.66, 0.0, 0.66)])


def _star_points() -> list[tuple[float, float]]:
    radii = [1.05 if k % 2 == 0 else 0.45 for k in range(10)]
    return [
        (r * float(np.sin(k * np.pi / 5)), -r * float(np.cos(k * np.pi / 5)))
        for k, r in enumerate(radii)
    ]


def _heart_points() -> list[tuple[float, float]]:
    t = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    x = np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 15
    return [(float(a), float(b)) for a, b in zip(x, y, strict=True)]


_ZIGZAG = [
    (-0.95, 0.15),
    (-0.35, -0.85),
    (0.15, 0.05),
    (0.6, -0.85),
    (0.98, -0.6),
    (0.25, 0.9),
    (-0.3, 0.05),
    (-0.6, 0.6),
]

# class → signed distance in object coordinates; `variant` in [-1, 1] varies proportions
OUTLINES: dict[str, Callable[[Array, Array, float], Array]] = {
    "disc": lambda u, v, _: np.hypot(u, v) - 0.88,
    "ring": lambda u, v, k: np.abs(np.hypot(u, v) - 0.72) - (0.20 + 0.06 * k),
    "square": lambda u, v, _: _box(u, v, 0.8, 0.8),
    "triangle": _polygon([(0.0, -1.0), (0.95, 0.72), (-0.95, 0.72)]),
    "star": _polygon(_star_points()),
    "cross": _cross,
    "crescent": lambda u, v, _: np.maximum(np.hypot(u, v) - 0.95, 0.78 - np.hypot(u - 0.45, v)),
    "bars": _bars,
    "heart": _polygon(_heart_points()),
    "zigzag": _polygon(_ZIGZAG),
}
CLASS_NAMES = tuple(OUTLINES)


def _hard_wave(x: Array) -> Array:
    """A sine turned into soft-edged stripes, in [0, 1]."""
    return 0.5 + 0.5 * np.clip(np.sin(x) * 2.5, -1, 1)


def _value_noise(rng: np.random.Generator, cells: int) -> Array:
    """Bilinear value noise of `cells` × `cells` knots over the canvas, in [0, 1]."""
    knots = rng.random((cells, cells)).astype(np.float32)
    at = np.linspace(0, cells - 1, SIZE_PX)
    low = np.clip(at.astype(int), 0, cells - 2)
    frac = (at - low).astype(np.float32)
    rows = knots[low] * (1 - frac)[:, None] + knots[low + 1] * frac[:, None]
    return rows[:, low] * (1 - frac) + rows[:, low + 1] * frac


def _texture(rng: np.random.Generator, name: str, u: Array, v: Array) -> Array:
    """The class-typical two-tone texture in object coordinates, in [0, 1]."""
    k, phase = rng.uniform(0.85, 1.2), rng.uniform(0, 2 * np.pi)
    match name:
        case "disc":  # concentric
            return _hard_wave(np.hypot(u, v) * 11 * k + phase)
        case "ring":  # plain
            return np.full_like(u, 0.15)
        case "square":  # checks
            checks = np.sin(u * 8 * k + phase) * np.sin(v * 8 * k + phase * 1.7)
            return 0.5 + 0.5 * np.clip(checks * 4, -1, 1)
        case "triangle":  # horizontal stripes
            return _hard_wave(v * 11 * k + phase)
        case "star":  # radial gradient
            return np.clip(np.hypot(u, v) * k, 0, 1)
        case "cross":  # diagonal stripes
            return _hard_wave((u + v) * 8 * k + phase)
        case "crescent":  # dots
            dots = np.sin(u * 11 * k + phase) + np.sin(v * 11 * k + phase * 1.3) - 0.9
            return 0.5 + 0.5 * np.clip(dots * 2.5, -1, 1)
        case "bars":  # plain, in the other tone
            return np.full_like(u, 0.9)
        case "heart":  # blotches
            return np.clip(_value_noise(rng, 9) * 2.4 - 0.7, 0, 1)
        case _:  # zigzag: vertical stripes
            return _hard_wave(u * 11 * k + phase)


def _hsv(hue: float, saturation: float, value: float) -> Array:
    sector = (np.array([5.0, 3.0, 1.0]) + hue % 1 * 6) % 6
    ramp = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return (value * (1 - saturation * ramp)).astype(np.float32)


def _any_colour(rng: np.random.Generator) -> Array:
    return _hsv(rng.random(), rng.uniform(0.2, 1.0), rng.uniform(0.15, 1.0))


def _leaning_colour(rng: np.random.Generator, hue: float, share: float, darkest: float) -> Array:
    """A colour near `hue` with probability `share`, else of any hue."""
    hue = hue + rng.normal(0, 0.07) if rng.random() < share else rng.random()
    return _hsv(hue, rng.uniform(0.35, 1.0), rng.uniform(darkest, 1.0))


def _distinct_colour(rng: np.random.Generator, hue: float, darkest: float, other: Array) -> Array:
    """A colour leaning to `hue`, at least 0.75 (sum of channel differences) away from `other`."""
    for _ in range(20):
        colour = _leaning_colour(rng, hue, 0.6, darkest)
        if np.abs(colour - other).sum() > 0.75:
            break
    return colour


def _paint(canvas: Array, colour: Array, distance: Array) -> Array:
    cover = np.clip(0.5 - distance * _EDGE_PER_UNIT, 0, 1)[..., None]
    return canvas * (1 - cover) + colour * cover


def _rotated(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    c, s = np.cos(angle), np.sin(angle)
    return x * c + y * s, y * c - x * s


def _paint_scraps(rng: np.random.Generator, canvas: Array, count: int, reach: float) -> Array:
    """Paint `count` small dots, bars and tiles: clutter behind the object, occluders in front."""
    for _ in range(count):
        x, y = rng.uniform(-reach, reach, 2)
        u, v = _rotated(_X - x, _Y - y, rng.uniform(0, np.pi))
        half = rng.uniform(0.06, 0.16)
        match rng.integers(3):
            case 0:
                distance = np.hypot(u, v) - half
            case 1:
                distance = _box(u, v, half * 3, half * 0.45)
            case _:
                distance = _box(u, v, half, half * 0.7)
        canvas = _paint(canvas, _any_colour(rng), distance)
    return canvas


def _background(rng: np.random.Generator, hue: float) -> Array:
    near = _leaning_colour(rng, hue, 0.5, 0.2)
    far = np.clip(near * rng.uniform(0.5, 1) + 0.35 * (_any_colour(rng) - 0.4), 0, 1)
    u, _ = _rotated(_X, _Y, rng.uniform(0, 2 * np.pi))
    mix = (0.5 + 0.5 * u) * 0.5 + _value_noise(rng, int(rng.integers(3, 7))) * rng.uniform(0.2, 0.7)
    mix = np.clip(mix, 0, 1)[..., None]
    return near * (1 - mix) + far * mix


def image(seed: int, split: str, class_index: int, number: int) -> Array:
    """Image `number` of a class and split: uint8 [64, 64, 3], the same on every machine."""
    rng = np.random.default_rng([seed, SPLITS[split], class_index, number])
    name, hue = CLASS_NAMES[class_index], class_index / len(CLASS_NAMES)
    canvas = _background(rng, hue * 3 + 0.35)
    canvas = _paint_scraps(rng, canvas, int(rng.integers(0, 4)), reach=1.0)

    tone_a = _distinct_colour(rng, hue, 0.3, canvas.mean((0, 1)))
    tone_b = _distinct_colour(rng, hue * 7 + 0.5, 0.0, tone_a)
    radius, aspect = rng.uniform(0.55, 0.85), rng.uniform(0.88, 1.14)
    x, y = rng.uniform(-1, 1, 2) * (1 - radius) * 0.9
    u, v = _rotated(_X - x, _Y - y, rng.uniform(-0.35, 0.35))
    mirrored = -1 if rng.random() < 0.5 else 1
    u, v = u * mirrored / (radius * aspect), v / (radius / aspect)
    distance = OUTLINES[name](u, v, rng.uniform(-1, 1)) * radius
    blend = (_texture(rng, name, u, v) * rng.uniform(0.6, 1.0))[..., None]
    if rng.random() < 0.3:
        canvas = _paint(canvas, _any_colour(rng) * 0.4, np.abs(distance) - 0.03)
    canvas = _paint(canvas, tone_a * (1 - blend) + tone_b * blend, distance)

    canvas = _paint_scraps(rng, canvas, int(rng.integers(0, 3)), reach=0.9)
    lit, _ = _rotated(_X, _Y, rng.uniform(0, 2 * np.pi))
    canvas = canvas * (1 + rng.uniform(0, 0.35) * lit)[..., None] * rng.uniform(0.8, 1.1)
    canvas = canvas + rng.normal(0, 1, canvas.shape) * rng.uniform(0.0, 0.015)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def _write_class(folder: Path, seed: int, split: str, class_index: int, count: int) -> None:
    target = folder / split / CLASS_NAMES[class_index]
    target.mkdir(parents=True)
    for number in range(count):
        picture = Image.fromarray(image(seed, split, class_index, number))
        picture.save(target / f"{number:05d}.jpg", quality=JPEG_QUALITY, subsampling=0)


def _end_with_parent() -> None:
    """End this worker when its parent is gone, even by kill -9: nobody would read its result."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _watch_parent() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def write_shapes(
    folder: Path, *, seed: int = 0, train_per_class: int = 1000, val_per_class: int = 200
) -> Path:
    """Write the set as `folder/{train,val}/<class>/*.jpg` unless it exists; returns `folder`.

    Writes the whole folder or nothing. Raises FileExistsError when it holds something else.
    """
    recipe = {
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "train_per_class": train_per_class,
        "val_per_class": val_per_class,
    }
    card = folder / "shapes.json"
    remedy = f"remove {folder}, and the set is generated again"
    if card.is_file() and read_json(card, ValueError, remedy) == recipe:
        return folder
    if folder.exists():
        raise FileExistsError(
            f"{folder} exists but is not the shapes set of {recipe}: "
            "remove it or choose another folder"
        )
    counts = {"train": train_per_class, "val": val_per_class}
    try:
        needed_bytes = _IMAGE_BYTES * len(CLASS_NAMES) * sum(counts.values())
        with (
            full_disk_explained(folder, needed_bytes, "set XDG_CACHE_HOME to a folder"),
            replacing(folder, overwrite=False) as building,
        ):
            with ProcessPoolExecutor(initializer=_watch_parent) as pool:
                jobs = [
                    pool.submit(_write_class, building, seed, split, index, count)
                    for split, count in counts.items()
                    for index in range(len(CLASS_NAMES))
                ]
            for job in jobs:
                job.result()
            (building / card.name).write_text(json.dumps(recipe, indent=2) + "\n")
    except FileExistsError:  # another process finished first: its copy is the same
        if not card.is_file():
            raise
    return folder
