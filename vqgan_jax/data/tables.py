"""Names of the ids of published data sets, in order, and how `config.data.classes` chooses among the classes of one."""

import re
from collections.abc import Mapping, Sequence

from vqgan_jax.config import UserError, suggest


def select(text: str, classes: Sequence[str], groups: Mapping[str, Sequence[int]]) -> list[int]:
    """The ranks among `classes` that a text names, in rising order; all of them where it is empty.

    Args:
      text: names of classes or of groups, ranks ("151"), ranges of ranks that include their end ("30-32") and
        half-open ones ("30:33"), with commas between them.
      classes: every class, in order.
      groups: ranks by the name of a group, such as {"restricted": ...}.

    Raises:
      UserError: a name, rank or range that is not there.
    """
    ranks = {name: rank for rank, name in enumerate(classes)}
    chosen: set[int] = set()
    for item in filter(None, (part.strip() for part in text.split(","))):
        found = re.fullmatch(r"(\d+)(?:\s*([-:])\s*(\d+))?", item)
        if item in groups:
            new = groups[item]
        elif item in ranks:
            new = [ranks[item]]
        elif found:
            first, kind, last = found.groups()
            new = range(int(first), int(last) + (kind == "-") if last else int(first) + 1)
        else:
            raise UserError(f"config.data.classes: unknown name '{item}'{suggest(item, [*groups, *_shown(classes)])}")
        if not len(new) or max(new) >= len(classes):
            raise UserError(
                f"config.data.classes: '{item}' is not within the ranks 0 to {len(classes) - 1} of its classes"
            )
        chosen.update(new)
    return sorted(chosen) if text.strip() else list(range(len(classes)))


def _shown(classes: Sequence[str]) -> Sequence[str]:
    """All of a short table, so that an error's list stays readable."""
    return classes if len(classes) <= 30 else ()


def _ranks(ranges: str, *, end: int) -> tuple[int, ...]:
    """The ranks in "30-32, 151-268"; `end` is 1 where the ranges include their end, 0 where not."""
    bounds = [tuple(map(int, item.split("-"))) for item in ranges.split(",")]
    return tuple(rank for low, high in bounds for rank in range(low, high + end))


# Restricted ImageNet: nine groups of animals. The reference reads the ranges without their last class.
_RESTRICTED = "30-32, 33-37, 80-100, 118-121, 151-268, 281-285, 300-319, 365-382, 389-397"
IMAGENET_GROUPS = {
    "restricted": _ranks(_RESTRICTED, end=1),
    "restricted_reference": _ranks(_RESTRICTED, end=0),
}


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(","))


# The 150 classes of the scene parsing challenge, after 0 for what is none of them.
ADE20K = _names(
    """
    unknown, wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person,
    earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug,
    field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column,
    signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs,
    runway, case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet,
    flower, book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade
    machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver,
    airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van,
    ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent,
    bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake,
    dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen,
    plate, monitor, bulletin board, shower, radiator, glass, clock, flag
    """
)

# COCO's 91 things and 91 stuffs, by their category ids less 1.
COCO_STUFF = _names(
    """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, street sign,
    stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, hat,
    backpack, umbrella, shoe, eye glasses, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
    baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife,
    spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch,
    potted plant, bed, mirror, dining table, window, desk, toilet, door, tv, laptop, mouse, remote, keyboard, cell
    phone, microwave, oven, toaster, sink, refrigerator, blender, book, clock, vase, scissors, teddy bear, hair
    drier, toothbrush, hair brush, banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard,
    carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt,
    door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other,
    fruit, furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss,
    mountain, mud, napkin, net, paper, pavement, pillow, plant-other, plastic, platform, playingfield, railing,
    railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other,
    stairs, stone, straw, structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick,
    wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind,
    window-other, wood
    """
)

# In the order of batches.meta.
CIFAR10 = _names(
    """
    airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck
    """
)
