"""Diverse prompts from a grammar of our own: subject, what it does, place, light, style, view; and text to be drawn.

A distillation needs prompts and no images, and asks of them only that they lead the teacher to all that it can draw:
people, animals, things, rooms, landscapes, counts, colors, places side by side, letters; short ones and long ones.
"""

import random
from collections.abc import Iterator

MOST = 1_000_000
"""Prompts of a list, of which the grammar has many more."""

COLORS = "red orange yellow green turquoise blue purple pink white black gray golden silver brown beige".split()
NUMBERS = "two three four five six".split()
PEOPLE = (
    "a woman, a man, an old man, an old woman, a child, a girl, a boy, a nurse, a farmer, a chef, an "
    "astronaut, a firefighter, a violinist, a ballet dancer, a blacksmith, a fisherman, a teacher, a "
    "welder, a monk, a surfer, a gardener, a pilot, a potter, a street musician, a mechanic, a bride, a "
    "knight, a scientist, a runner, a painter"
).split(", ")
DOING = (
    "reading a letter, laughing, looking out of a window, drinking coffee, carrying a basket of apples, "
    "waiting for a train, playing chess, riding a bicycle, repairing a clock, holding an umbrella, "
    "feeding pigeons, writing on a blackboard, tying a shoe, dancing, sleeping in a chair, kneading "
    "dough, singing, climbing a ladder"
).split(", ")
ANIMALS = (
    "cat, dog, horse, owl, fox, elephant, whale, hedgehog, parrot, tiger, rabbit, octopus, bee, frog, "
    "swan, giraffe, penguin, goat, lizard, butterfly, bear, crab, squirrel, raven, sheep, jellyfish, "
    "camel, snail, wolf, koala"
).split(", ")
MOVING = (
    "asleep, running, jumping over a fence, hiding behind a plant, drinking from a pond, looking at the "
    "camera, wearing a scarf, standing on a rock, chasing a ball, seen from behind"
).split(", ")
THINGS = (
    "teapot, chair, lamp, bicycle, guitar, clock, suitcase, candle, book, bottle, pair of shoes, vase, "
    "umbrella, camera, loaf of bread, bowl of cherries, typewriter, kite, key, backpack, pocket watch, "
    "toy robot, cake, microscope, sewing machine, sailing boat, steam engine, fire truck, tent, piano, "
    "telescope, drum, mailbox, anchor"
).split(", ")
STUFF = "wood, glass, copper, paper, wool, marble, ice, porcelain, leather, clay, chrome, straw".split(", ")
PLACES = (
    "in a kitchen, on a beach, in a forest, on a mountain pass, in a library, at a market, in a train "
    "station, on a rooftop, in a desert, in a greenhouse, beside a lake, in a narrow street, on a wooden "
    "table, in a workshop, on the moon, in a flooded city, in a field of sunflowers, on a frozen river, "
    "in a cave, in an empty theater, under water, on a bridge, in a small cafe, at a harbor, in a "
    "laboratory, on a snowy roof"
).split(", ")
SCENES = (
    "a lighthouse, a village of stone houses, a waterfall, a terraced rice field, a subway platform, a "
    "castle ruin, a bamboo grove, an abandoned factory, a salt flat, a canal, a ski slope, a bookshop, a "
    "football stadium, a volcano, an orchard, a cathedral, a coral reef, a night market, a vineyard, a "
    "wind farm, a living room, a barn, a dam"
).split(", ")
LIGHTS = (
    "at dawn, at dusk, at night, at noon, in heavy rain, in fog, in snow, under a full moon, by "
    "candlelight, in neon light, in soft window light, against the sun, in a thunderstorm, under a clear "
    "sky, in autumn, in spring"
).split(", ")
STYLES = (
    "a photograph of, a close-up photograph of, an oil painting of, a watercolor of, a pencil drawing of, "
    "a woodcut of, a 3D rendering of, a pixel art image of, a children's book illustration of, a poster "
    "of, a black and white photograph of, a collage of, an ink drawing of, a stained glass window of, an "
    "embroidery of, a comic panel of, a low-poly model of, a charcoal sketch of, a film still of, a "
    "studio photograph of"
).split(", ")
VIEWS = (
    "wide angle, shallow depth of field, seen from above, seen from below, symmetrical, highly detailed, "
    "minimalist, pastel colors, strong contrast, muted colors, long exposure, macro, with a lot of empty "
    "space, grainy film"
).split(", ")
WORDS = (
    "OPEN, HELLO, COFFEE, Good morning, Platform 9, FRESH BREAD, Do not enter, Lost cat, 50 cents, Thank "
    "you, SALE, Room 12, Welcome home, SLOW, Happy birthday, Library, 1984, North, Ferry, Please ring"
).split(", ")
SIGNS = "a wooden sign, a neon sign, a handwritten note, a shop window, a book cover, a mug, a blackboard".split(", ")
BESIDE = "left of, right of, on top of, beside, in front of, behind, under".split(", ")


def prompts(count: int, seed: int = 0) -> Iterator[str]:
    """`count` prompts, no two alike; a longer list of the same seed begins with the shorter one."""
    rng = random.Random(f"prompts {seed}")
    seen = set[str]()
    while len(seen) < count:
        text = _prompt(rng)
        if text not in seen:
            seen.add(text)
            yield text


def _prompt(rng: random.Random) -> str:
    """One prompt; a third of them short, a third with a style, a third long."""
    pick = rng.choice
    kinds = (_person, _animal, _thing, _scene, _pair, _several, _lettering)
    text = pick(kinds)(rng)
    if rng.random() < 0.67:
        text = f"{text} {pick(LIGHTS)}"
    if rng.random() < 0.6:
        text = f"{pick(STYLES)} {text}"
    return ", ".join([text, *rng.sample(VIEWS, pick((0, 0, 1, 2)))])


def _person(rng: random.Random) -> str:
    return f"{rng.choice(PEOPLE)} {rng.choice(DOING)} {rng.choice(PLACES)}"


def _animal(rng: random.Random) -> str:
    return f"{_a(rng.choice(ANIMALS))} {rng.choice(MOVING)} {rng.choice(PLACES)}"


def _thing(rng: random.Random) -> str:
    return f"{_a(f'{rng.choice(COLORS)} {rng.choice(THINGS)}')} made of {rng.choice(STUFF)} {rng.choice(PLACES)}"


def _scene(rng: random.Random) -> str:
    return f"{rng.choice(SCENES)} with {_a(f'{rng.choice(COLORS)} {rng.choice(THINGS)}')} in the foreground"


def _pair(rng: random.Random) -> str:
    first, second = (f"{rng.choice(COLORS)} {thing}" for thing in rng.sample(THINGS, 2))
    return f"{_a(first)} {rng.choice(BESIDE)} {_a(second)} {rng.choice(PLACES)}"


def _several(rng: random.Random) -> str:
    plural = {"fox": "foxes", "butterfly": "butterflies", "octopus": "octopuses", "wolf": "wolves", "sheep": "sheep"}
    animal = rng.choice(ANIMALS)
    return f"{rng.choice(NUMBERS)} {rng.choice(COLORS)} {plural.get(animal, f'{animal}s')} {rng.choice(PLACES)}"


def _lettering(rng: random.Random) -> str:
    return f'{rng.choice(SIGNS)} {rng.choice(PLACES)} that says "{rng.choice(WORDS)}" in {rng.choice(COLORS)} letters'


def _a(noun: str) -> str:
    """The noun with its article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
