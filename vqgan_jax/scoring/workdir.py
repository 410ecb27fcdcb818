"""A checkpoint of a workdir on its data set, and all that can be scored of it: one class a kind of model."""

import json
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from vqgan_jax import images, pretrained
from vqgan_jax.config import UserError, plain, upgrade_config
from vqgan_jax.evals.references import Statistics
from vqgan_jax.scoring import likelihood, memorisation, reconstruction, result, sweeps
from vqgan_jax.scoring.bench import Bench
from vqgan_jax.scoring.generation import Generation
from vqgan_jax.train import portable, setup


class ScoredVQGAN:
    """A VQGAN: its reconstructions."""

    def __init__(self, path: epath.Path, config: ConfigDict, bench: Bench, step: int | None = None):
        """Opens the workdir's newest checkpoint, or that after `step` steps, on the data that `config` names."""
        self.config, self.bench = config, bench
        tokenizer, self.variables, self._trained = pretrained.load_tokenizer(path, key="--workdir", step=step)
        self.model, self.record = tokenizer.model, self._trained.record
        if bench.extract is not None and tokenizer.config.input_key != "image":
            raise UserError(f"--workdir={path}: a model of '{tokenizer.config.input_key}' has no FID")
        self.data = setup.open_data(config, (tokenizer.config.input_key,), factor=tokenizer.factor)

    def score(self, examples: int, folder: epath.Path | None = None, reference: str = "") -> dict[str, Any]:
        """Every score of `examples` held-out images (0: all), `rfid_reference` among them where another set is named;
        pictures of them go to `folder`."""
        theirs = self.bench.reference(reference, self.data, self.config) if reference else None
        found = score_stage(self.model, self.variables, self.data, self.bench, examples, folder, theirs)
        against = {**theirs.source, "images": theirs.count} if theirs else None
        return found | {result.DEFINITION: _define(self, self.variables, examples=examples, reference=against)}

    def save(self, folder: epath.Path) -> None:
        """Writes the VQGAN, EMA parameters as the parameters."""
        pretrained.write_stage(folder, self._trained, "generator")


class ScoredTransformer:
    """A transformer: its first stage's reconstructions, likelihood, samples, and what it repeats of its training."""

    def __init__(
        self, path: epath.Path, config: ConfigDict, bench: Bench, step: int | None = None, dtype: str = "float32"
    ):
        """Opens the workdir's best checkpoint, or that after `step` steps, on the data that `config` names; `dtype` is
        that of the computation."""
        self.path, self.config, self.bench = path, config, bench
        self.dtype = dtype
        self.trained = pretrained.open_transformer(path, key="--workdir", step=step, dtype=setup.DTYPES[dtype])
        self.record, model = self.trained.record, self.trained.model
        keys = (model.first_stage.config.input_key, *model.condition.keys)
        classes = model.condition.labels
        self.data = setup.open_data(config, keys, factor=model.first_stage.factor, classes=classes)

    def generation(self, samples: int, reference: str, settings: list[sweeps.Setting], **classifier: str) -> Generation:
        """The sampler on the bench; features are compared with `reference` where the bench has a feature network.

        Raises:
          UserError: one of the settings cannot be; before anything slow begins.
        """
        generation = Generation(self.trained, self.data, self.bench, count=samples, **classifier)
        for setting in settings:
            generation.check(setting)
        if self.bench.extract is not None and samples:
            generation.reference = self.bench.reference(reference, self.data, self.config)
        return generation

    def score(
        self, generation: Generation, setting: sweeps.Setting, examples: int, memorised: int, folder: epath.Path
    ) -> dict[str, Any]:
        """Every score.

        Args:
          generation: from `generation`.
          setting: of the sampler.
          examples: held-out images, 0 for all.
          memorised: samples that are compared with the training set.
          folder: pictures go there.
        """
        first = self.trained.model.first_stage.model
        found = score_stage(first, self.trained.frozen["first_stage"], self.data, self.bench, examples, folder)
        found |= likelihood.score(self.trained, self.path, self.data, self.config, self.bench, examples)
        drawn = {}
        if generation.count and generation.has_scores:
            figures, kept = generation.score(setting, keep=min(memorised, generation.count))
            found |= figures
            drawn = generation.define(setting)
            if len(kept):
                memory, sheet = memorisation.score(kept, self.data, self.bench)
                found |= memory
                save_first(folder / "nearest.png", sheet)
        return found | {result.DEFINITION: self._define(examples=examples, **drawn)}

    def sweep(self, generation: Generation, settings: list[sweeps.Setting], out: epath.Path) -> dict[str, Any]:
        """The scores of samples under each setting."""
        shared = self._define()  # hashes the parameters, once
        define = lambda setting: shared | generation.define(setting)  # noqa: E731
        return sweeps.run(settings, lambda setting: generation.score(setting)[0], out, define)

    def score_samples(self, generation: Generation, setting: sweeps.Setting) -> dict[str, Any]:
        """The scores of samples alone."""
        return generation.score(setting)[0] | {result.DEFINITION: self._define(**generation.define(setting))}

    def _define(self, **parts: Any) -> dict[str, Any]:
        return _define(self, self.trained.params, stages=self.trained.stages.digest, dtype=self.dtype, **parts)

    def save(self, folder: epath.Path) -> None:
        """Writes the transformer, EMA parameters as the parameters, and its frozen stages."""
        for name in self.trained.stages.digest:  # before the transformer, whose record says that the folder is whole
            if (self.path / name).is_dir() and not (folder / name / portable.STAGE_RECORD).exists():
                stage = pretrained.load_trained(self.path / name, key="--workdir", kind="vqgan")
                pretrained.write_stage(folder / name, stage, "generator")
        portable.write_stage(folder, {"params": {"transformer": self.trained.params}}, self.record)


def recorded_config(workdir: epath.Path) -> ConfigDict:
    """The config of a run. Raises UserError for an imported model."""
    recorded = workdir / "config.json"
    if not recorded.exists():
        raise UserError(
            f"--workdir={workdir}: an imported model names no data; give --config=configs/finetune.py:{workdir}"
        )
    return ConfigDict(upgrade_config(json.loads(recorded.read_text())))


def score_stage(
    model: Any,
    variables: Any,
    data: setup.Data,
    bench: Bench,
    examples: int,
    folder: epath.Path | None,
    reference: Statistics | None = None,
) -> dict[str, Any]:
    """Reconstruction scores, and a sheet of pictures above their reconstructions."""
    found = reconstruction.score(model, variables, data, bench, examples, reference)
    if folder is not None:
        save_first(folder / "reconstructions.png", reconstruction.sheet(model, variables, data, bench))
    return found


def save_first(path: epath.Path, picture: np.ndarray | None) -> None:
    """Writes a picture, on the first host alone."""
    if picture is not None and jax.process_index() == 0:
        images.save_png(path, picture)


def _define(scored: ScoredVQGAN | ScoredTransformer, params: Any, **parts: Any) -> dict[str, Any]:
    """The definition of a checkpoint's scores."""
    bench = scored.bench
    features = result.describe_features(bench.extract) if bench.extract else {}
    checkpoint = result.describe_checkpoint(scored.record, params)
    data, config = plain(scored.config.data), scored.record["config"]
    data = None if data == config.get("data") else data  # said once
    lpips = dict(bench.perceptual_sha256) or None
    return result.define(
        **(features | parts), lpips_sha256=lpips, seed=bench.seed, checkpoint=checkpoint, data=data, config=config
    )
