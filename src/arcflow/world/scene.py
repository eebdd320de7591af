"""Scenes and the captions that describe them.

A scene is a plain background with one to three objects that do not touch, three only of one kind. A caption names some
of what is in it and leaves the rest open, so one caption has many images. The six skills are those of GenEval (arXiv
2310.11513):

    single_object       a ring                              colors     a small red ring on gray
    two_objects         a ring and a square                 counting   three green squares
    color_attribution   a red ring and a blue square        position   a red ring left of a square

Train and held-out captions are disjoint *combinations*: everything a caption says of its objects and their relation,
backgrounds aside and relations put in one direction, is hashed, and one combination in five is held out. Paraphrases
therefore fall on the same side. Units: pixels, x to the right, y downwards, the origin in the upper left corner.
"""

import hashlib
import random
from dataclasses import dataclass
from itertools import permutations
from math import ceil
from typing import Literal

SIZE = 64
COLORS = {
    "red": (220, 30, 40),
    "yellow": (245, 210, 40),
    "green": (30, 160, 70),
    "blue": (40, 70, 220),
}
BACKGROUNDS = {"white": (245, 245, 245), "gray": (128, 128, 128), "black": (15, 15, 15)}
SHAPES = ("circle", "square", "triangle", "ring")
RADII = {"small": 6.5, "large": 11.5}
COUNTS = {"a": 1, "two": 2, "three": 3}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SKILLS = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution")
GAP = 3.0
"""Least free pixels between two objects, and between an object and the border."""
LATTICE = 8
"""Centers lie on multiples of this, in pixels: 25 places for an object."""

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Noun:
    """One noun phrase: what a caption says of one kind of object; `None` where it says nothing."""

    shape: str
    count: int = 1
    color: str | None = None
    size: str | None = None

    def text(self) -> str:
        number = next(word for word, count in COUNTS.items() if count == self.count)
        shape = self.shape if self.count == 1 else self.shape + "s"
        return " ".join(word for word in (number, self.size, self.color, shape) if word)


@dataclass(frozen=True)
class Prompt:
    """A caption together with what it means."""

    nouns: tuple[Noun, ...]
    relation: str | None = None
    background: str | None = None

    @property
    def text(self) -> str:
        *head, last = [noun.text() for noun in self.nouns]
        if self.relation:
            text = f"{head[0]} {self.relation} {last}"
        else:
            text = f"{', '.join(head)} and {last}" if head else last
        return text + (f" on {self.background}" if self.background else "")

    @property
    def skill(self) -> str:
        first = self.nouns[0]
        if self.relation:
            return "position"
        if len(self.nouns) > 1:
            return "color_attribution" if all(noun.color for noun in self.nouns) else "two_objects"
        if first.count > 1:
            return "counting"
        return "colors" if first.color else "single_object"

    @property
    def split(self) -> Split:
        """Which side of the train / held-out cut the combination falls on."""
        nouns, relation = list(self.nouns), self.relation
        if relation in ("right of", "below"):
            nouns, relation = nouns[::-1], OPPOSITE[relation]
        named = [repr(noun) for noun in nouns]
        key = "|".join([relation or "", *(named if relation else sorted(named))])
        return "test" if hashlib.sha256(key.encode()).digest()[0] % 5 == 0 else "train"


@dataclass(frozen=True)
class Object:
    """One object of a scene: its center and radius in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float

    @property
    def size(self) -> str:
        return "small" if self.radius < (RADII["small"] + RADII["large"]) / 2 else "large"


@dataclass(frozen=True)
class Scene:
    background: str
    objects: tuple[Object, ...]


def holds(prompt: Prompt, scene: Scene) -> bool:
    """Whether the scene is exactly what the caption says: these objects and no others, in this relation."""
    wanted = [noun for noun in prompt.nouns for _ in range(noun.count)]
    if len(wanted) != len(scene.objects) or prompt.background not in (None, scene.background):
        return False
    return any(
        all(_fits(noun, thing) for noun, thing in zip(wanted, order, strict=True))
        and (prompt.relation is None or related(order[0], order[1], prompt.relation))
        for order in permutations(scene.objects)
    )


def _fits(noun: Noun, thing: Object) -> bool:
    return noun.shape == thing.shape and noun.color in (None, thing.color) and noun.size in (None, thing.size)


def related(first: Object, second: Object, relation: str) -> bool:
    """The offset from `second` to `first` points along the relation more than across it."""
    dx, dy = first.x - second.x, first.y - second.y
    ux, uy = RELATIONS[relation]
    along = dx * ux + dy * uy
    across = abs(dx * uy) + abs(dy * ux)
    return along > across


def sample_prompt(rng: random.Random, skill: str | None = None, split: Split | None = None) -> Prompt:
    """A random caption of one skill (any when `None`), from one side of the cut (both when `None`)."""
    skill = skill or rng.choice(SKILLS)
    if skill not in SKILLS:
        raise ValueError(f"unknown skill {skill!r}; expected one of {', '.join(SKILLS)}")
    while True:
        prompt = _draw(rng, skill)
        if split in (None, prompt.split):
            return prompt


def _draw(rng: random.Random, skill: str) -> Prompt:
    def noun(color: bool, count: int = 1) -> Noun:
        return Noun(
            shape=rng.choice(SHAPES),
            count=count,
            color=rng.choice(list(COLORS)) if color else None,
            size=rng.choice(list(RADII)) if rng.random() < 0.4 else None,
        )

    background = rng.choice(list(BACKGROUNDS)) if rng.random() < 0.5 else None
    relation = None
    if skill in ("single_object", "colors"):
        nouns = [noun(color=skill == "colors")]
    elif skill == "counting":
        nouns = [noun(color=rng.random() < 0.5, count=rng.choice((2, 3)))]
    else:
        color = skill == "color_attribution" or (skill == "position" and rng.random() < 0.5)
        while True:  # tell the two nouns apart by what both name: the shape, else the color
            nouns = [noun(color=color) for _ in range(2)]
            if len({(n.shape, n.color) for n in nouns}) == 2:
                break
        relation = rng.choice(list(RELATIONS)) if skill == "position" else None
    return Prompt(tuple(nouns), relation, background)


def sample_prompts(count: int, seed: int, split: Split | None = None, skill: str | None = None) -> list[Prompt]:
    """`count` captions, the skills in turn so that each has its equal share."""
    rng = random.Random(f"prompts-{seed}-{split}-{skill}")
    return [sample_prompt(rng, skill or SKILLS[i % len(SKILLS)], split) for i in range(count)]


def sample_scene(prompt: Prompt, rng: random.Random) -> Scene:
    """A random scene of which the caption holds; what the caption leaves open is drawn uniformly."""
    background = prompt.background or rng.choice(list(BACKGROUNDS))
    kinds = []
    for noun in prompt.nouns:  # the objects of a plural are alike
        color = noun.color or rng.choice(list(COLORS))
        size = noun.size or rng.choice(list(RADII))
        kinds += [(noun.shape, color, RADII[size])] * noun.count
    while True:
        objects = _place(kinds, rng)
        if objects and (prompt.relation is None or _clearly_related(objects, prompt.relation)):
            return Scene(background, tuple(objects))


def _place(kinds: list[tuple[str, str, float]], rng: random.Random) -> list[Object] | None:
    objects: list[Object] = []
    for shape, color, radius in kinds:
        places = range(LATTICE * ceil((radius + GAP) / LATTICE), int(SIZE - radius - GAP) + 1, LATTICE)
        x, y = float(rng.choice(places)), float(rng.choice(places))
        if any(max(abs(o.x - x), abs(o.y - y)) < o.radius + radius + GAP for o in objects):
            return None
        objects.append(Object(shape, color, x, y, radius))
    return objects


def _clearly_related(objects: list[Object], relation: str) -> bool:
    dx = abs(objects[0].x - objects[1].x)
    dy = abs(objects[0].y - objects[1].y)
    return abs(dx - dy) >= GAP and related(objects[0], objects[1], relation)


def parse(text: str) -> Prompt:
    """Read a caption of this world back.

    Raises:
        ValueError: the text is not in the grammar; the message says which part and gives an example.
    """
    words = text.lower().replace(",", " ,").split()
    background = None
    if len(words) > 2 and words[-2] == "on":
        background = words[-1]
        words = words[:-2]
    body = " ".join(words)
    relation = next((r for r in RELATIONS if f" {r} " in body), None)
    parts = body.split(f" {relation} ") if relation else body.replace(" and ", " , ").split(" , ")
    known = background is None or background in BACKGROUNDS
    if not known or not 1 <= len(parts) <= 3 or (relation and len(parts) != 2):
        raise _not_a_caption(text, body if known else str(background))
    return Prompt(tuple(_parse_noun(part, text) for part in parts), relation, background)


def _parse_noun(part: str, text: str) -> Noun:
    words = part.split()
    if len(words) < 2 or words[0] not in COUNTS:
        raise _not_a_caption(text, part)
    count = COUNTS[words.pop(0)]
    size = words.pop(0) if words[0] in RADII else None
    color = words.pop(0) if words and words[0] in COLORS else None
    for shape in SHAPES:
        noun = Noun(shape, count, color, size)
        if noun.text() == " ".join(part.split()):
            return noun
    raise _not_a_caption(text, part)


def _not_a_caption(text: str, part: str) -> ValueError:
    return ValueError(
        f"cannot read {part!r} in {text!r}: expected captions such as 'a small red ring left of a square on gray', "
        f"from counts {list(COUNTS)}, sizes {list(RADII)}, colors {list(COLORS)}, shapes {list(SHAPES)}, "
        f"relations {list(RELATIONS)}, backgrounds {list(BACKGROUNDS)}"
    )


HELD_OUT = 384
"""Held-out captions that an evaluation takes, unless told."""

FIRST_SEED = 10_000
"""Noise of the first held-out image; the others follow."""


def held_out(count: int) -> list[str]:
    """The captions that every figure is measured on."""
    from arcflow.world.scene import sample_prompts

    return [prompt.text for prompt in sample_prompts(count, seed=7, split="test")]
