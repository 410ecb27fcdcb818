"""The plan of a sweep: a config's overrides as trials, each a chain of commands, those that are the same run once.

A config file that is swept defines `sweep()` or `sweep_NAME()`, which yield dicts of dotted overrides. It may define
`chain(arg)`: the stages of a trial by name, each the words behind `python`, where {out} is the stage's own place and
{NAME} that of an earlier one; overrides are then called STAGE.KEY. Without it a trial is one run of the trainer.
"""

import ast
import dataclasses
import importlib.util
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from vqgan_jax import storage
from vqgan_jax.config import UserError, plain, suggest
from vqgan_jax.tools.steps import ROOT

ARGUMENT = "arg"  # the override that is a config's argument, the text behind the colon of --config=FILE:
OUT = "out"
Overrides = Mapping[str, Any]
Chain = Mapping[str, Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command: `python WORDS`. Its results lie at `out` (a folder, or a file of that name with a suffix)."""

    name: str
    digest: str  # SHA-256 of all that defines what it makes, places aside
    job: str  # a short name, as clusters want it; another one in every sweep's folder
    words: tuple[str, ...]
    needs: tuple[str, ...]  # names of stages
    out: str


@dataclasses.dataclass(frozen=True)
class Trial:
    """One combination of overrides, and the names of its stages in the order of the chain."""

    name: str
    overrides: Overrides
    stages: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All trials, and their stages by name, each after those that it needs."""

    trials: tuple[Trial, ...]
    stages: Mapping[str, Stage]
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # arguments of `make_plan` that made it

    def to_json(self) -> dict[str, Any]:
        """Plain data, of which `from_json` makes the same plan."""
        return {
            "trials": [dataclasses.asdict(trial) for trial in self.trials],
            "stages": [dataclasses.asdict(stage) for stage in self.stages.values()],
            "source": dict(self.source),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Plan":
        """The plan that `to_json` wrote."""

        def read(kind: type, fields: Mapping[str, Any]) -> Any:
            return kind(**{name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()})

        stages = [read(Stage, fields) for fields in data["stages"]]
        trials = tuple(read(Trial, fields) for fields in data["trials"])
        return cls(trials, {stage.name: stage for stage in stages}, data["source"])


def make_plan(
    config: str,
    out: str,
    *,
    sweeps: Sequence[str] = (),
    settings: Sequence[str] = (),
    check: Callable[..., None] | None,
) -> Plan:
    """Makes and validates the plan: every override is applied to the locked config of its stage.

    Args:
      config: a config file, with an argument after a colon.
      out: the sweep's folder, in which the stages' results lie.
      sweeps: names of sweeps of the file, "" for `sweep()`; of several the product. () is `sweep()`.
      settings: "KEY=TEXT", overrides of every trial.
      check: called with the words of each stage that has no config, to validate its flags; None validates none.

    Raises:
      UserError: no such sweep, stage, key or type, two sweeps that set one key, or no trials.
    """
    path, _, arg = config.partition(":")
    module = _load(path)
    chain = _chain_of(module, config, arg)
    fixed = dict(_pair(text) for text in settings)
    trials = _product([_trials_of(module, path, name) for name in sweeps or ("",)])
    labels = _labels(trials)
    stages: dict[str, Stage] = {}  # by digest
    planned: dict[str, Trial] = {}
    for overrides in trials:
        name = " ".join(dict.fromkeys(_titles(overrides, labels))) or "default"
        try:
            found = _stages(chain, overrides, fixed, labels, out)
        except UserError as error:
            raise UserError(f"{path}: trial '{name}': {error}") from None
        for digest, stage in found.items():
            if digest not in stages:
                _check(check, stage)
            stages.setdefault(digest, stage)
        names = tuple(stages[digest].name for digest in found)
        if planned.setdefault(name, Trial(name, dict(overrides), names)).stages != names:
            raise UserError(f"{path}: two trials are called '{name}'; give one more override to tell them apart")
    if not planned:
        raise UserError(f"{path}: the sweep yields no trials")
    source = {"config": config, "sweeps": list(sweeps), "settings": list(settings)}
    return Plan(tuple(planned.values()), {stage.name: stage for stage in stages.values()}, source)


def check_unchanged(plan: Plan, stages: Iterable[Stage]) -> None:
    """Checks that these stages of a plan, which was made earlier, are still what its config files say.

    Raises:
      UserError: one of them would be something else by now; or what `make_plan` raises.
    """
    if not plan.source:
        return
    now = {stage.digest for stage in make_plan(out="", check=None, **plan.source).stages.values()}
    if other := [stage.name for stage in stages if stage.digest not in now]:
        raise UserError(
            f"{other[0]}: is not what {plan.source['config']} says by now; begin anew with "
            f"--config={plan.source['config']}, which keeps all stages that are still the same, or restore the file"
        )


def sweep_names(module: ModuleType) -> list[str]:
    """The sweeps of a config file: "" for `sweep`, NAME for `sweep_NAME`."""
    found = [name for name, value in vars(module).items() if name.startswith("sweep") and callable(value)]
    return [name.removeprefix("sweep").removeprefix("_") for name in found if name == "sweep" or name[5] == "_"]


def _load(path: str) -> ModuleType:
    """Runs a config file as a module. Raises UserError."""
    file = Path(path) if Path(path).is_absolute() else ROOT / path
    if not file.is_file():
        raise UserError(f"--config={path}: no such file")
    spec = importlib.util.spec_from_file_location(f"swept_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _trials_of(module: ModuleType, path: str, name: str) -> list[dict[str, Any]]:
    names = sweep_names(module)
    if name not in names:
        if not name:
            others = f"; name one with --sweep={','.join(names)}" if names else "; write one that yields dicts"
            raise UserError(f"--config={path}: has no sweep(){others}")
        raise UserError(f"--sweep={name}: no sweep_{name}() in {path}{suggest(name, filter(None, names))}")
    trials = list(getattr(module, f"sweep_{name}" if name else "sweep")())
    for trial in trials:
        if not isinstance(trial, Mapping):
            raise UserError(f"{path}: a sweep yields dicts of dotted overrides, not {trial!r}")
    return trials


def _product(sweeps: Sequence[Sequence[Overrides]]) -> list[dict[str, Any]]:
    trials: list[dict[str, Any]] = [{}]
    for sweep in sweeps:
        for trial, overrides in ((a, b) for a in trials for b in sweep):
            if both := set(trial) & set(overrides):
                raise UserError(f"--sweep: two of the sweeps set '{min(both)}'")
        trials = [{**trial, **overrides} for trial in trials for overrides in sweep]
    return trials


def _chain_of(module: ModuleType, config: str, arg: str) -> Chain:
    if hasattr(module, "chain"):
        return module.chain(arg or None)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={config}: defines neither get_config() nor chain()")
    script = "train_transformer.py" if "transformer" in module.get_config(arg or None).model else "train_vqgan.py"
    return {"train": (script, f"--config={config}", "--workdir={out}")}


def _pair(text: str) -> tuple[str, "_Text"]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set={text}: write KEY=VALUE")
    return key, _Text(value)


class _Text(str):
    """A value that was typed: it is read as the type of the field that it is for."""


def _stages(
    chain: Chain, overrides: Overrides, fixed: Overrides, labels: Mapping[str, str], out: str
) -> dict[str, Stage]:
    """The stages of a trial by digest, in the order of the chain."""
    owned: dict[str, dict[str, Any]] = {kind: {} for kind in chain}
    titles: dict[str, list[str]] = {}
    for key, value in {**fixed, **overrides}.items():
        kind, dot, rest = key.partition(".")
        if kind in chain and dot:
            owned[kind][rest] = value
        elif len(chain) == 1:
            owned[next(iter(chain))][key] = value
        else:
            raise UserError(f"{key}: begins with none of the stages{suggest(kind, chain)}")
    made: dict[str, Stage] = {}
    digests: dict[str, str] = {}
    for kind, template in chain.items():
        needs = _references(kind, template, digests)
        places = {need: made[digests[need]].out for need in needs}
        own = {key: value for key, value in overrides.items() if key.startswith(f"{kind}.") or len(chain) == 1}
        inherited = [title for need in needs for title in titles[need]]
        titles[kind] = list(dict.fromkeys([*inherited, *_titles(own, labels)]))
        words, digest = _command(kind, template, owned[kind], {need: digests[need] for need in needs})
        digests[kind] = digest
        name = "-".join([kind, *map(_safe, titles[kind]), digest[:6]])
        here = f"{out.rstrip('/')}/{name}"
        filled = tuple(word.format_map({**places, OUT: here}) for word in words)
        needed = tuple(made[digests[need]].name for need in needs)
        made[digest] = Stage(name, digest, _job(kind, digest, here), filled, needed, here)
    return made


def _references(kind: str, template: Sequence[str], earlier: Iterable[str]) -> list[str]:
    """The earlier stages that a template names."""
    fields = [field for word in template for _, field, _, _ in string.Formatter().parse(word) if field is not None]
    for field in fields:
        if field != OUT and field not in earlier:
            raise UserError(f"{kind}: {{{field}}} is no earlier stage{suggest(field, [*earlier, OUT])}")
    return list(dict.fromkeys(field for field in fields if field != OUT))


def _command(
    kind: str, template: Sequence[str], overrides: Overrides, digests: Mapping[str, str]
) -> tuple[list[str], str]:
    """A template with its overrides, placeholders still in it; and the digest of all that defines what it makes.

    Places are no part of the digest, stages that it builds on are, by theirs.
    """
    words = list(template)
    defined = {**{need: f"<{digest}>" for need, digest in digests.items()}, OUT: ""}
    at = next((k for k, word in enumerate(words) if word.startswith("--config=")), None)
    if at is None:
        words += [f"--{key}={_escaped(value)}" for key, value in overrides.items()]
        definition: Any = [word.format_map(defined) for word in words]
        return words, storage.digest(definition)
    overrides = dict(overrides)
    if argument := overrides.pop(ARGUMENT, ""):
        words[at] += ("," if ":" in words[at] else ":") + _escaped(argument)
    path, _, arg = words[at].removeprefix("--config=").partition(":")
    config = _load(path).get_config(arg or None)
    config.lock()
    prefix = "--config."
    for word in words:
        if word.startswith(prefix):
            key, _, text = word.removeprefix(prefix).partition("=")
            _override(config, key, _Text(text.format_map(defined)), f"{kind}.{key}")
    for key, value in overrides.items():
        _override(config, key, value, f"{kind}.{key}")
        words.append(f"{prefix}{key}={_escaped(value)}")
    others = [word.format_map(defined) for word in words if not word.startswith((prefix, "--config="))]
    return words, storage.digest([others, plain(config)])


def _override(config: ConfigDict, key: str, value: Any, named: str) -> None:
    """Sets a dotted key of a locked config as the command line would. Raises UserError."""
    *sections, field = key.split(".")
    for part in (*sections, field):
        if not isinstance(config, ConfigDict) or part not in config:
            options = config if isinstance(config, ConfigDict) else ()
            raise UserError(f"{named}: unknown key '{part}'{suggest(part, options)}")
        section, config = config, config[part]
    config = section
    current = config[field]
    if isinstance(current, ConfigDict) or isinstance(value, Mapping):
        raise UserError(f"{named}: is a section; override its fields one by one")
    if isinstance(value, _Text) and not isinstance(current, str):
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(value, str(value)))
        except (ValueError, SyntaxError):
            raise UserError(f"{named}: takes a value of type {type(current).__name__}, got '{value}'") from None
    try:
        config[field] = str(value) if isinstance(value, _Text) else value
    except (TypeError, ValueError):
        raise UserError(f"{named}: takes a value of type {type(current).__name__}, got {value!r}") from None


def _escaped(value: Any) -> str:
    """A value as the command line takes it, in a template."""
    return str(value).replace("{", "{{").replace("}", "}}")


def _labels(trials: Sequence[Overrides]) -> dict[str, str]:
    """What each key is called in names: its last part, where that says which key or all such keys go together."""
    keys = dict.fromkeys(key for trial in trials for key in trial)
    by_end: dict[str, list[str]] = {}
    for key in keys:
        by_end.setdefault(key.rpartition(".")[2], []).append(key)
    labels = {}
    for end, group in by_end.items():
        together = all(len({repr(trial.get(key)) for key in group}) == 1 for trial in trials)
        labels |= {key: end if together else key for key in group}
    return labels


def _titles(overrides: Overrides, labels: Mapping[str, str]) -> list[str]:
    return [f"{labels[key]}={_shown(value)}" for key, value in overrides.items()]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "x".join(map(_shown, value)) if isinstance(value, list | tuple) else str(value)


def _job(kind: str, digest: str, out: str) -> str:
    """A name for clusters: small letters, digits and hyphens, a letter first, at most 40. Sweeps in two folders may
    share a cluster, and hold the same stages."""
    start = re.sub("[^a-z0-9]+", "-", kind.lower()).strip("-")[:24].strip("-")
    start = start if start[:1].isalpha() else f"stage-{start}".strip("-")
    return f"{start}-{storage.digest([digest, out])[:8]}"


def _safe(title: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._=+" else "_" for letter in title)


def _check(check: Callable[..., None] | None, stage: Stage) -> None:
    if check is not None and not any(word.startswith("--config=") for word in stage.words):
        check(stage.words)
