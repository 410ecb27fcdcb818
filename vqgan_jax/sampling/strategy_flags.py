"""The flags of every script that samples: how the next code is drawn, with and without guidance."""

from absl import flags

from vqgan_jax.config import UserError
from vqgan_jax.sampling.strategies import RAMPS, Strategy

flags.disclaim_key_flags()  # they are those of the script that defines them: its --help lists them


def define_strategy_flags() -> None:
    """Defines them, each with its default."""
    flags.DEFINE_float("temperature", 1.0, "Divides the logits: below 1 is safer, above 1 wilder.", lower_bound=1e-6)
    flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest codes only; 0 = from all.", lower_bound=0)
    flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest codes that hold this share; 1 = from all.", 0.0, 1.0)
    flags.DEFINE_float(
        "min_p", 0.0, "Draw from codes at least this share as likely as the likeliest; 0 = from all.", 0.0, 1.0
    )
    flags.DEFINE_bool("greedy", False, "Take the likeliest code always.")
    flags.DEFINE_float(
        "guidance",
        1.0,
        "Scale of classifier-free guidance: above 1 follows the condition more closely, with less variety; 1 = off. "
        "Needs a model trained with config.model.condition_dropout, and samples at half the speed.",
    )
    flags.DEFINE_enum(
        "schedule",
        "constant",
        sorted(RAMPS),
        "How guidance grows over the codes of a picture, from 1 to its scale; constant has it whole from the start.",
    )
    flags.DEFINE_float(
        "power", 1.0, "Of --schedule=power-cosine: the higher, the later guidance sets in.", lower_bound=0.0
    )
    flags.DEFINE_list("interval", ["0", "1"], "Share of the codes where guidance begins and where it ends: 0.1,0.8.")


def strategy_of(values: flags.FlagValues) -> Strategy:
    """The strategy that the flags ask for.

    Raises:
      UserError: an interval that is none.
    """
    try:
        first, last = (float(text) for text in values.interval)
    except ValueError:
        raise UserError(f"--interval={','.join(values.interval)}: write two shares such as 0.1,0.8") from None
    if not 0 <= first < last <= 1:
        raise UserError(f"--interval={first},{last}: the first is from 0 to below the second, the second at most 1")
    names = ("temperature", "top_k", "top_p", "min_p", "greedy", "guidance", "schedule", "power")
    return Strategy(**{name: values[name].value for name in names}, interval=(first, last))
