"""The flags that say what a sampling job is asked for, and their values as one object."""

import dataclasses

from absl import flags

flags.disclaim_key_flags()  # they are those of the script that defines them: its --help lists them


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked for; the flags say what each field is."""

    number: int = 0
    each: int = 1
    classes: tuple[str, ...] = ()
    condition: tuple[str, ...] = ()
    derive: bool = False
    data: str = ""
    given: str = ""
    mask: str = ""
    paste: bool = False


def define_request_flags() -> None:
    """Defines one flag a field of `Asked`, with its default."""
    default = Asked()
    flags.DEFINE_integer(
        "number", default.number, "How many images; 0: --each of every file of --condition or --given, else 16.", 0
    )
    flags.DEFINE_integer("each", default.each, "Images a condition: image i is under condition i // each.", 1)
    flags.DEFINE_list("classes", list(default.classes), "Class names or numbers to sample, in turn; all by default.")
    flags.DEFINE_multi_string(
        "condition",
        list(default.condition),
        "Where conditions come from: 'val' or 'train', examples of the run's data set in a fixed shuffled order "
        "('val:3,17' names some); or a file, a folder or a glob. A condition of several parts has a flag for each: "
        "--condition=segmentation=masks/ --condition=depth=val. Files: PNG of ids (segmentation), grey pictures "
        "(depth), white lines on black (edges), small pictures (low_res), pictures or JSON [[x, y], null, ...] "
        '(keypoints), JSON [{"class": "sun", "box": [x, y, width, height], "flags": ["group"]}, ...] or a list of such '
        "layouts (boxes), in shares of the picture. A picture of another size is resized to cover the model's, and its "
        "middle cut out. By default 'val'; but classes in turn, and for coordinates the place in the picture.",
    )
    flags.DEFINE_bool(
        "derive", default.derive, "The files for edges or low_res are photographs: derive the condition from them."
    )
    flags.DEFINE_string("data", default.data, "Where the run's data set lies now, if it was moved.")
    flags.DEFINE_string(
        "given", default.given, "Pictures to complete: 'val' or 'train', a file, a folder or a glob, as --condition."
    )
    flags.DEFINE_string(
        "mask",
        default.mask,
        "What of --given is made anew: lower, the default, upper, left, right or center, of which lower:0.25 is a "
        "quarter; or pictures, white there and black where --given is kept. A code is kept if all its pixels are.",
    )
    flags.DEFINE_bool("paste", default.paste, "Put the pixels that --mask keeps back over the results.")


def asked_of(values: flags.FlagValues) -> Asked:
    """What the flags ask for."""
    found = {field.name: values[field.name].value for field in dataclasses.fields(Asked)}
    return Asked(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})
