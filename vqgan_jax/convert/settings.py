"""The reference's YAML files: what a checkpoint's tensors cannot say is asked for by name, what they say is checked."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import yaml
from etils import epath

from vqgan_jax.config import UserError

_MISSING = object()


@dataclasses.dataclass(frozen=True)
class Settings:
    """One section of a YAML file; empty where there is no file.

    Attributes:
      source: the YAML file, or None.
      checkpoint: the file it belongs to, for errors' texts.
      path: where the section stands: "model.params".
      values: its entries.
    """

    source: epath.Path | None
    checkpoint: epath.Path
    path: str
    values: Mapping[str, Any]

    def section(self, *names: str) -> "Settings":
        """A section further down; empty where it is absent."""
        values: Any = self.values
        for name in names:
            values = values.get(name) if isinstance(values, Mapping) else None
        path = ".".join((*filter(None, (self.path,)), *names))
        return dataclasses.replace(self, path=path, values=values if isinstance(values, Mapping) else {})

    def get(self, name: str, default: Any = None) -> Any:
        """An entry, or the reference's own default."""
        return self.values.get(name, default)

    def need(self, name: str, kind: type = int) -> Any:
        """An entry that the tensors cannot settle.

        Raises:
          UserError: it is absent (the error names it and where to write it), or of another type.
        """
        value = self.values.get(name, _MISSING)
        if value is _MISSING:
            where = f"add it to {self.source}" if self.source else "name the model's YAML file with --yaml"
            raise UserError(
                f"{self.checkpoint}: {self.path}.{name} cannot be read off the tensors and is needed; {where}"
            )
        if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
            raise UserError(f"{self.source}: {self.path}.{name}: takes a value of type {kind.__name__}, got {value!r}")
        return value

    def number(self, name: str, default: float) -> float:
        """A number with the reference's own default. YAML takes 1e-8 for a text, so texts are read as numbers too."""
        value = self.values.get(name, default)
        try:
            return float(value)
        except (TypeError, ValueError):
            raise UserError(f"{self.source}: {self.path}.{name}: takes a number, got {value!r}") from None

    def text(self, name: str, default: str) -> str:
        """A text with the reference's own default."""
        return self.need(name, str) if name in self.values else default

    def check(self, **found: Any) -> None:
        """Raises UserError unless every entry that is there says what was found in the tensors."""
        for name, value in found.items():
            said = self.values.get(name, _MISSING)
            if said is not _MISSING and said != value:
                raise UserError(
                    f"{self.source}: {self.path}.{name} is {said!r}, but the tensors of {self.checkpoint} say "
                    f"{value!r}; mend the YAML, or name the one that belongs to the checkpoint with --yaml"
                )

    @property
    def target(self) -> str:
        """The class that the section names, without its module; "" for none."""
        return str(self.values.get("target", "")).rpartition(".")[2]


def read_settings(checkpoint: epath.Path, path: epath.Path | None = None) -> Settings:
    """Reads the YAML of a checkpoint: `path`, or else the file of the same stem beside it, or else nothing.

    Raises:
      UserError: a file that is absent or is no YAML.
    """
    if path is None:
        beside = (checkpoint.with_suffix(suffix) for suffix in (".yaml", ".yml"))
        path = next((candidate for candidate in beside if candidate.is_file()), None)
        if path is None:
            return Settings(None, checkpoint, "", {})
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--yaml={path}: cannot be read ({error.strerror or error})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no YAML file ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(values, Mapping) or not isinstance(values.get("model"), Mapping):
        raise UserError(f"{path}: has no section 'model'; name the model's own YAML (...-project.yaml) with --yaml")
    return Settings(path, checkpoint, "", values)
