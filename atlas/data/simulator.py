"""A table top simulated with numpy: scenes, two cameras, a gripper and a demonstrator.

The table is the unit square, so lengths are in table widths and an action is a displacement of the
gripper in table widths per step. Every function takes arrays over scenes and loops over none of
them; only drawing a scene's random numbers is done one by one, so that scene `i` of a seed is the
same however many others are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Pixels = NDArray[np.uint8]

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
TOUCH = 0.08  # the gripper is on an object whose centre is nearer than this
STEP = 0.045  # the longest displacement of the demonstrator in one step
GAIN = 0.5  # share of the remaining way that it takes once that is below STEP
ARRIVED = 0.012  # a demonstration ends when this near to the target's centre
NOISE = 0.004  # standard deviation of what is executed beside what was commanded
LONGEST = 40  # steps at which a demonstration is cut in any case

_COLOUR_VALUES = np.array(list(COLOURS.values()), np.float32)
_SPRITE = 5  # half the window, in pixels, that the gripper is drawn in
_GRIPPER, _RIM = (25.0, 25.0, 30.0), (245.0, 245.0, 245.0)


@dataclass(frozen=True)
class Scenes:
    """`N` scenes, every field an array over them."""

    kinds: Ints  # [N, 3] into KINDS, distinct in a scene
    colours: Ints  # [N, 3] into COLOURS, distinct in a scene
    positions: Floats  # [N, 3, 2] centres of the objects
    verbs: Ints  # [N] into VERBS
    starts: Floats  # [N, 2] where the gripper begins
    tables: Floats  # [N, 3] colour of the table
    noise: Floats  # [N, LONGEST, 2] what a demonstration's execution adds to each command

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, index: Ints | list[int]) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @property
    def targets(self) -> Floats:
        """[N, 2] the centre of the object that is asked for: the first; it is drawn at random."""
        return self.positions[:, 0]

    def instructions(self) -> list[str]:
        """`touch the red ball`, one a scene."""
        names = list(COLOURS)
        return [
            f"{VERBS[verb]} the {names[colour]} {KINDS[kind]}"
            for verb, colour, kind in zip(
                self.verbs, self.colours[:, 0], self.kinds[:, 0], strict=True
            )
        ]


def draw_scenes(seed: int, stream: int, indices: list[int]) -> Scenes:
    """The scenes of these indices; each a function of (seed, stream, its index) alone."""
    drawn = [_draw_scene(np.random.default_rng([seed, stream, index])) for index in indices]
    return Scenes(**{f.name: np.stack([one[f.name] for one in drawn]) for f in fields(Scenes)})


def _draw_scene(rng: np.random.Generator) -> dict[str, NDArray[np.generic]]:
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
    """[4, 2] places for the objects and the gripper, pairwise at least `apart` from each other."""
    while True:
        points = rng.uniform(0.1, 0.9, (OBJECTS + 1, 2)).astype(np.float32)
        gaps = np.linalg.norm(points[:, None] - points[None], axis=-1)
        if gaps[np.triu_indices(OBJECTS + 1, 1)].min() >= apart:
            return points


def command(grippers: Floats, targets: Floats) -> Floats:
    """[N, 2] the demonstrator's displacement: straight to the target, slowing down before it."""
    way = targets - grippers
    distance = np.linalg.norm(way, axis=-1, keepdims=True)
    length = np.minimum(GAIN * distance, STEP)
    action: Floats = way * (length / np.maximum(distance, 1e-6))
    return action


def move(grippers: Floats, actions: Floats) -> Floats:
    """[N, 2] the grippers after these displacements; the edge of the table stops them."""
    stopped: Floats = np.clip(grippers + actions, 0.0, 1.0)
    return stopped


def demonstrate(scenes: Scenes) -> tuple[Floats, Floats, Ints]:
    """Positions [N, LONGEST, 2], commands [N, LONGEST, 2] and lengths [N], in steps.

    What is executed is the command and a little noise, so that demonstrations also show the way
    back from where a policy's own errors lead. Rows past an episode's length mean nothing.
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
    """[N] whether the gripper is on the object that is asked for."""
    touched: NDArray[np.bool_] = np.linalg.norm(grippers - scenes.targets, axis=-1) < TOUCH
    return touched


def draw_tables(scenes: Scenes) -> Pixels:
    """[N, V, 3, H, W] what the cameras see of the objects, without the gripper."""
    views = [_draw_objects(scenes, camera) for camera in CAMERAS]
    return np.stack(views, axis=1)


def draw_grippers(images: Pixels, grippers: Floats) -> None:
    """Draw the grippers [N, 2] into `images` [N, V, 3, H, W], in place.

    Only the window of pixels about each gripper is touched, which makes a frame cost about as much
    as copying it.
    """
    for view, camera in enumerate(CAMERAS):
        centres, scale = _project(grippers, camera)
        centres[:, 1] -= _height(camera) * scale
        offsets = np.arange(-_SPRITE, _SPRITE + 1)
        # Clipped indices repeat at the border and then write the same value twice.
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
    """Paint `colour` where `inside`, the distance from a shape's edge in pixels, is positive.

    The half pixel on each side of the edge is mixed, so that places finer than a pixel show.
    """
    cover = np.clip(inside + 0.5, 0.0, 1.0)
    painted: Floats = pixels + cover * (colour - pixels)
    return painted


def _project(points: Floats, camera: str) -> tuple[Floats, Floats]:
    """Pixels (column, row) of table points [N, 2], and there the pixels per table width [N]."""
    if camera == "overhead":
        scale = np.full(len(points), SIZE - 8.0, np.float32)
        return 4.0 + points * scale[:, None], scale
    depth = 1.0 + 0.7 * points[:, 1]
    column = SIZE / 2 + (points[:, 0] - 0.5) * (SIZE - 8.0) / depth
    row = 52.0 - 80.0 * points[:, 1] / depth
    return np.stack([column, row], axis=1), (SIZE - 8.0) / depth


def _height(camera: str) -> float:
    """How far above its foot a thing's middle is seen, in table widths."""
    return 0.0 if camera == "overhead" else 0.05


def _draw_objects(scenes: Scenes, camera: str) -> Pixels:
    """[N, 3, H, W] the table and its objects, the far ones first."""
    image = np.empty((len(scenes), 3, SIZE, SIZE), np.float32)
    image[:] = scenes.tables[:, :, None, None]
    order = np.argsort(-scenes.positions[:, :, 1], axis=1, kind="stable")
    everyone = np.arange(len(scenes))
    for slot in order.T:
        kinds, colours = scenes.kinds[everyone, slot], scenes.colours[everyone, slot]
        centres, scale = _project(scenes.positions[everyone, slot], camera)
        centres[:, 1] -= _height(camera) * scale
        for kind, name in enumerate(KINDS):
            chosen = np.flatnonzero(kinds == kind)
            inside = _inside(name, centres[chosen], RADIUS * scale[chosen])
            colour = _COLOUR_VALUES[colours[chosen]][:, :, None, None]
            image[chosen] = _blend(image[chosen], colour, inside[:, None])
    drawn: Pixels = image.round().astype(np.uint8)
    return drawn


def _inside(kind: str, centres: Floats, radius: Floats) -> Floats:
    """[N, H, W] distance in pixels from the edge of a shape, positive within."""
    grid = np.arange(SIZE, dtype=np.float32) + 0.5
    x = grid[None, None, :] - centres[:, 0, None, None]
    y = grid[None, :, None] - centres[:, 1, None, None]
    size = radius[:, None, None]
    inside: Floats
    if kind == "box":
        inside = 0.85 * size - np.maximum(np.abs(x), np.abs(y))
    elif kind == "cone":  # an upright triangle; 0.894 and 0.447 are its sides' unit normal
        inside = np.minimum(0.894 * (0.6 * size - np.abs(x)) + 0.447 * y, size - y)
    elif kind == "ring":
        inside = 0.32 * size - np.abs(np.sqrt(x * x + y * y) - 0.75 * size)
    else:
        inside = size - np.sqrt(x * x + y * y)
    return inside
