"""A table simulated with numpy: scenes, two cameras, a gripper and a demonstrator.

The table is the unit square, so lengths are in table widths and an action is a displacement of the
gripper in table widths per step. All functions work on arrays over N scenes without a Python loop
over them. Only the random numbers are drawn scene by scene, so that scene `i` of a seed does not
depend on how many other scenes are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from atlas.data.arrays import Array, Floats, Ints, Pixels

CAMERAS = ("overhead", "oblique")
SIZE = 56  # pixels, height and width of each view
COLOURS = {
    "red": (214, 48, 49),
    "green": (39, 174, 96),
    "blue": (41, 98, 217),
    "yellow": (241, 196, 15),
}
KINDS = ("ball", "box", "cone", "ring")
VERBS = ("touch", "reach", "find", "go to")
OBJECTS = 3
RADIUS = 0.075  # of an object, in table widths
TOUCH = 0.08  # the gripper touches an object whose centre is nearer than this
STEP = 0.045  # the longest displacement of the demonstrator in one step
GAIN = 0.5  # fraction of the remaining distance that the last steps cover, if below STEP
ARRIVED = 0.012  # a demonstration ends at this distance from the target's centre
NOISE = 0.004  # standard deviation of the executed minus the commanded displacement
LONGEST = 40  # steps of the longest demonstration

_COLOUR_VALUES = np.array(list(COLOURS.values()), np.float32)
_SPRITE = 5  # half the width of the window that the gripper is drawn in, in pixels
_GRIPPER, _RIM = (25.0, 25.0, 30.0), (245.0, 245.0, 245.0)


@dataclass(frozen=True)
class Scenes:
    """`N` scenes; every field is an array over them."""

    kinds: Ints  # [N, 3] into KINDS, distinct in a scene
    colours: Ints  # [N, 3] into COLOURS, distinct in a scene
    positions: Floats  # [N, 3, 2] centres of the objects
    verbs: Ints  # [N] into VERBS
    starts: Floats  # [N, 2] initial positions of the gripper
    tables: Floats  # [N, 3] colour of the table
    noise: Floats  # [N, LONGEST, 2] added to each command of a demonstration

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, index: Ints | list[int]) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @property
    def targets(self) -> Floats:
        """[N, 2], the centres of the named objects: the first of each scene."""
        return self.positions[:, 0]

    def instructions(self) -> list[str]:
        """Return an instruction for each scene, such as `touch the red ball`."""
        names = list(COLOURS)
        return [
            f"{VERBS[verb]} the {names[colour]} {KINDS[kind]}"
            for verb, colour, kind in zip(
                self.verbs, self.colours[:, 0], self.kinds[:, 0], strict=True
            )
        ]


def draw_scenes(seed: int, stream: int, indices: list[int]) -> Scenes:
    """Return the scenes `indices`; each depends only on (seed, stream, index)."""
    drawn = [_draw_scene(np.random.default_rng([seed, stream, index])) for index in indices]
    return Scenes(**{f.name: np.stack([one[f.name] for one in drawn]) for f in fields(Scenes)})


def _draw_scene(rng: np.random.Generator) -> dict[str, Array]:
    points = _spread_points(rng)
    return {
        "kinds": rng.permutation(len(KINDS))[:OBJECTS],
        "colours": rng.permutation(len(COLOURS))[:OBJECTS],
        "positions": points[:OBJECTS],
        "verbs": rng.integers(len(VERBS)),
        "starts": points[OBJECTS],
        "tables": (200 + rng.uniform(-25, 25, 3)).astype(np.float32),
        "noise": rng.normal(0, NOISE, (LONGEST, 2)).astype(np.float32),
    }


def _spread_points(rng: np.random.Generator, apart: float = 0.24) -> Floats:
    """Return positions of the objects and the gripper, [4, 2], at least `apart` from each other."""
    while True:
        points = rng.uniform(0.1, 0.9, (OBJECTS + 1, 2)).astype(np.float32)
        gaps = np.linalg.norm(points[:, None] - points[None], axis=-1)
        if gaps[np.triu_indices(OBJECTS + 1, 1)].min() >= apart:
            return points


def command(grippers: Floats, targets: Floats) -> Floats:
    """Return the demonstrator's displacements [N, 2]: straight to the target, slower near it."""
    difference = targets - grippers
    distance = np.linalg.norm(difference, axis=-1, keepdims=True)
    length = np.minimum(GAIN * distance, STEP)
    action: Floats = difference * (length / np.maximum(distance, 1e-6))
    return action


def move(grippers: Floats, actions: Floats) -> Floats:
    """Return the positions [N, 2] after these displacements; the table's edge stops a gripper."""
    stopped: Floats = np.clip(grippers + actions, 0.0, 1.0)
    return stopped


def demonstrate(scenes: Scenes) -> tuple[Floats, Floats, Ints]:
    """Return positions [N, LONGEST, 2], commands [N, LONGEST, 2] and lengths [N] in steps.

    Noise is added to each command before it is executed, so that demonstrations also show how to
    return from the positions that a policy's errors lead to. Rows past an episode's length are
    meaningless.
    """
    states = np.empty((len(scenes), LONGEST, 2), np.float32)
    actions = np.empty_like(states)
    lengths = np.full(len(scenes), LONGEST)
    gripper = scenes.starts
    for step in range(LONGEST):
        states[:, step] = gripper
        actions[:, step] = command(gripper, scenes.targets)
        near = np.linalg.norm(scenes.targets - gripper, axis=-1) < ARRIVED
        lengths = np.where(near, np.minimum(lengths, step + 1), lengths)
        gripper = move(gripper, actions[:, step] + scenes.noise[:, step])
    return states, actions, lengths


def on_target(scenes: Scenes, grippers: Floats) -> NDArray[np.bool_]:
    """Return whether each gripper touches the named object, [N]."""
    touched: NDArray[np.bool_] = np.linalg.norm(grippers - scenes.targets, axis=-1) < TOUCH
    return touched


def draw_tables(scenes: Scenes) -> Pixels:
    """Return the cameras' images of the table and its objects, without grippers [N, V, 3, H, W]."""
    views = [_draw_objects(scenes, camera) for camera in CAMERAS]
    return np.stack(views, axis=1)


def draw_grippers(images: Pixels, grippers: Floats) -> None:
    """Draw the grippers [N, 2] into `images` [N, V, 3, H, W], in place.

    Only a window of pixels around each gripper is changed, so this takes about as long as to copy
    the images.
    """
    for view, camera in enumerate(CAMERAS):
        centres, scale = _project(grippers, camera)
        centres[:, 1] -= _height(camera) * scale
        offsets = np.arange(-_SPRITE, _SPRITE + 1)
        # At the border, clipped indices repeat; they write the same value twice.
        columns = np.clip(np.floor(centres[:, :1]).astype(int) + offsets, 0, SIZE - 1)
        rows = np.clip(np.floor(centres[:, 1:]).astype(int) + offsets, 0, SIZE - 1)
        where = np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]
        x = columns[:, None, :] + 0.5 - centres[:, 0, None, None]
        y = rows[:, :, None] + 0.5 - centres[:, 1, None, None]
        distance = np.hypot(x, y).astype(np.float32)
        for channel in range(3):
            plane = images[:, view, channel]
            pixels = plane[where].astype(np.float32)
            pixels = _blend(pixels, _RIM[channel], 3.4 - distance)
            plane[where] = _blend(pixels, _GRIPPER[channel], 2.2 - distance).round()


def _blend(pixels: Floats, colour: float | Floats, inside: Floats) -> Floats:
    """Return `pixels` with `colour` where `inside` is positive.

    `inside` is the distance from a shape's edge in pixels. Within half a pixel of the edge the
    colours are mixed, so that positions finer than a pixel are visible.
    """
    cover = np.clip(inside + 0.5, 0.0, 1.0)
    painted: Floats = pixels + cover * (colour - pixels)
    return painted


def _project(points: Floats, camera: str) -> tuple[Floats, Floats]:
    """Return the pixels (column, row) [N, 2] of table points, and the pixels per table width [N].

    The oblique camera sees distant points smaller, so the scale depends on the point.
    """
    if camera == "overhead":
        scale = np.full(len(points), SIZE - 8.0, np.float32)
        return 4.0 + points * scale[:, None], scale
    depth = 1.0 + 0.7 * points[:, 1]
    column = SIZE / 2 + (points[:, 0] - 0.5) * (SIZE - 8.0) / depth
    row = 52.0 - 80.0 * points[:, 1] / depth
    return np.stack([column, row], axis=1), (SIZE - 8.0) / depth


def _height(camera: str) -> float:
    """Return how far above its base an object's centre appears, in table widths."""
    return 0.0 if camera == "overhead" else 0.05


def _draw_objects(scenes: Scenes, camera: str) -> Pixels:
    """Return images of the table and its objects, [N, 3, H, W], the distant objects drawn first."""
    image = np.empty((len(scenes), 3, SIZE, SIZE), np.float32)
    image[:] = scenes.tables[:, :, None, None]
    order = np.argsort(-scenes.positions[:, :, 1], axis=1, kind="stable")
    every = np.arange(len(scenes))
    for slot in order.T:
        kinds, colours = scenes.kinds[every, slot], scenes.colours[every, slot]
        centres, scale = _project(scenes.positions[every, slot], camera)
        centres[:, 1] -= _height(camera) * scale
        for kind, name in enumerate(KINDS):
            chosen = np.flatnonzero(kinds == kind)
            inside = _inside(name, centres[chosen], RADIUS * scale[chosen])
            colour = _COLOUR_VALUES[colours[chosen]][:, :, None, None]
            image[chosen] = _blend(image[chosen], colour, inside[:, None])
    drawn: Pixels = image.round().astype(np.uint8)
    return drawn


def _inside(kind: str, centres: Floats, radius: Floats) -> Floats:
    """Return the distances in pixels from the edge of a shape, [N, H, W], positive inside."""
    grid = np.arange(SIZE, dtype=np.float32) + 0.5
    x = grid[None, None, :] - centres[:, 0, None, None]
    y = grid[None, :, None] - centres[:, 1, None, None]
    size = radius[:, None, None]
    inside: Floats
    if kind == "box":
        inside = 0.85 * size - np.maximum(np.abs(x), np.abs(y))
    elif kind == "cone":  # an upright triangle; (0.894, 0.447) is the unit normal of its sides
        inside = np.minimum(0.894 * (0.6 * size - np.abs(x)) + 0.447 * y, size - y)
    elif kind == "ring":
        inside = 0.32 * size - np.abs(np.sqrt(x * x + y * y) - 0.75 * size)
    else:
        inside = size - np.sqrt(x * x + y * y)
    return inside
