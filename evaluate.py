"""Scores models and sets of images; every result is a JSON that says what defines it.

    python evaluate.py --workdir=runs/vqgan --out=evaluation.json
    python evaluate.py --workdir=runs/gpt --out=evaluation.json --samples=256
    python evaluate.py --workdir=runs/gpt --out=fid.json --samples=50000 --preset=adm --reference=VIRTUAL.npz
    python evaluate.py --workdir=runs/gpt --out=sweep.json --samples=10000 --sweep="temperature=0.9,1;top_k=0,100"
    python evaluate.py --workdir=runs/gpt --out=follow.json --samples=10000 --follow --follow_timeout=3600
    python evaluate.py --reference=DIR_A --samples=DIR_B --out=result.json --preset=pytorch-fid

A workdir is scored on the held-out images of its own data set: reconstructions (PSNR, SSIM, L1, LPIPS where there are
weights, codebook), and for a transformer likelihood and whether samples show the class or condition asked for. With
--preset, --reference, --inception_weights, --sweep or --follow also by features: rFID, and FID, sFID, Inception Score,
precision, recall and KID of samples. An imported model names no data: add --config=configs/finetune.py:DIR
--config.data.path=/photos. Pictures (reconstructions.png, nearest.png, NAME.png of a sweep) lie next to the JSON.
"""

import dataclasses
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from vqgan_jax import cli, pretrained, storage
from vqgan_jax.config import UserError
from vqgan_jax.data.sources import open_source
from vqgan_jax.evals.features import PRESETS, FeatureNet
from vqgan_jax.evals.references import KEEP, open_reference
from vqgan_jax.sampling.strategies import Strategy
from vqgan_jax.sampling.strategy_flags import define_strategy_flags, strategy_of
from vqgan_jax.scoring import follow, result, sweeps
from vqgan_jax.scoring.bench import SPLITS, Bench, open_bench, statistics_cache
from vqgan_jax.scoring.generation import Generation, figures
from vqgan_jax.scoring.workdir import ScoredTransformer, ScoredVQGAN, recorded_config
from vqgan_jax.train import setup

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked for beyond the scores that need no weights; the flags say what each field is."""

    preset: str = ""
    inception_weights: str = ""
    reference: str = ""
    lpips_vgg: str = ""
    lpips_heads: str = ""
    memorisation: int = 0
    strategy: Strategy = Strategy()
    acceptance: float = 1.0
    dtype: str = "float32"
    sweep: str = ""
    classifier: str = ""
    classifier_weights: str = ""
    follow: bool = False
    follow_timeout: float = 0.0
    net: FeatureNet | None = None  # in place of Inception

    @property
    def features(self) -> bool:
        """Whether feature scores are asked for."""
        named = self.preset, self.inception_weights, self.reference, self.sweep, self.follow, self.memorisation
        return any(named)

    def open_bench(self, batch: int, seed: int, features: bool) -> Bench:
        """Loads the networks."""
        return open_bench(
            batch=batch,
            seed=seed,
            features=features,
            preset=self.preset,
            inception_weights=self.inception_weights,
            net=self.net,
            lpips={"vgg": self.lpips_vgg, "heads": self.lpips_heads},
            cache=statistics_cache(),
        )

    def settings(self) -> list[sweeps.Setting]:
        """The sampler's settings: those of the sweep, on top of the fixed ones."""
        fixed = sweeps.setting_of(self.strategy, self.acceptance)
        return [fixed | setting for setting in (sweeps.parse(self.sweep) if self.sweep else [{}])]


def evaluate(
    workdir: str,
    out: str,
    *,
    batch: int,
    examples: int,
    samples: int,
    seed: int,
    config: ConfigDict | None = None,
    asked: Asked | None = None,
) -> dict[str, Any]:
    """Scores the workdir, writes and returns the result; `config` names the data where the workdir does not."""
    asked = asked or Asked()
    path, out_path = storage.path(workdir), result.check_out(out)
    kind = pretrained.kind_of(path, key="--workdir")
    config = config or recorded_config(path)
    settings = asked.settings()
    if kind == "vqgan" and (asked.sweep or settings != [{}] or asked.memorisation):
        raise UserError(f"--workdir={workdir}: holds a vqgan, which has no sampler; its reconstructions are scored")
    if asked.follow and asked.sweep:
        raise UserError("--follow: scores each checkpoint under one setting; leave out --sweep")
    if asked.memorisation and (asked.sweep or asked.follow or asked.memorisation > samples):
        raise UserError(f"--memorisation={asked.memorisation}: is of at most --samples={samples}, not with a sweep")
    if kind == "transformer" and (asked.sweep or asked.follow) and samples < 2:
        raise UserError(f"--samples={samples}: --sweep and --follow score samples; draw some thousands")
    bench = asked.open_bench(batch, seed, asked.features)
    classifier = dict(classifier=asked.classifier, classifier_weights=asked.classifier_weights)
    reference = asked.reference or "train"
    followed: list[Generation] = []

    def open_checkpoint(step: int) -> follow.Opened:
        """What --follow asks of each checkpoint: read now, scored and saved later."""
        if kind == "vqgan":
            scored = ScoredVQGAN(path, config, bench, step)
            return lambda: scored.score(examples, reference=asked.reference), scored.save
        scored = ScoredTransformer(path, config, bench, step, asked.dtype)

        def score() -> dict[str, Any]:
            if not followed:
                followed.append(scored.generation(samples, reference, settings, **classifier))
            followed[0].update(scored.trained.params)  # reference, judges and programs stay
            return scored.score_samples(followed[0], settings[0])

        return score, scored.save

    with jax.set_mesh(bench.mesh):
        if asked.follow:
            total = setup.Durations(config, len(open_source(config.data, "train"))).total
            definition = result.define(
                **result.describe_features(bench.extract),
                workdir=str(storage.absolute(path)),
                **result.describe_data(config, "val", examples),
                samples=samples,
                reference=reference if reference in SPLITS else str(storage.absolute(reference)),
                sampler=settings[0],
                dtype=asked.dtype,
                seed=seed,
                **classifier,
            )
            return follow.follow(
                path, open_checkpoint, out_path, definition=definition, total=total, timeout=asked.follow_timeout
            )
        if kind == "vqgan":
            found = ScoredVQGAN(path, config, bench).score(examples, out_path.parent, asked.reference)
        else:
            scored = ScoredTransformer(path, config, bench, dtype=asked.dtype)
            generation = scored.generation(samples, reference, settings, **classifier)
            if asked.sweep:
                found = scored.sweep(generation, settings, out_path)
            else:
                found = scored.score(generation, settings[0], examples, asked.memorisation, out_path.parent)
    return result.publish(found | {"workdir": workdir, "seed": seed}, out_path)


def compare_sets(
    reference: str,
    samples: str,
    out: str,
    *,
    batch: int,
    seed: int,
    workdir: str = "",
    config: ConfigDict | None = None,
    asked: Asked | None = None,
) -> dict[str, Any]:
    """Scores finished pictures (a folder, an archive, an .npz) or statistics against a reference set.

    Args:
      reference: what `open_reference` takes, or "train" or "val" of the data that `config` or `workdir` names.
      samples: what `open_reference` takes.
      out: JSON file to write.
      batch: pictures at once.
      seed: recorded.
      workdir: a run whose config names the data.
      config: names the data.
      asked: preset, weights.
    """
    asked, out_path = asked or Asked(), result.check_out(out)
    if asked.sweep or asked.settings() != [{}] or asked.follow or asked.memorisation:
        raise UserError(f"--samples={samples}: are drawn already; --samples=NUMBER with --workdir draws new ones")
    if config is None and workdir:
        config = recorded_config(storage.path(workdir))
    data = setup.open_data(config, ("image",), factor=1) if reference in SPLITS and config is not None else None
    bench = asked.open_bench(batch, seed, features=True)
    theirs = bench.reference(reference, data, config)
    ours = open_reference(
        samples, bench.extract, cache=None, preset_stated=bench.preset_stated, keep=KEEP, key="--samples"
    )
    found = figures(ours, theirs)
    found["definition"] = result.define(
        **result.describe_features(bench.extract),
        reference={**theirs.source, "images": theirs.count},
        samples={**ours.source, "images": ours.count},
    )
    return result.publish(found | {"seed": seed}, out_path)


def define_flags() -> None:
    """The flags of this script."""
    config_flags.DEFINE_config_file("config", None, "Names the data (config.data) where --workdir does not.")
    flags.DEFINE_string("workdir", None, "Workdir of either trainer, or an imported model.")
    flags.DEFINE_string("out", None, "JSON file to write.")
    flags.DEFINE_integer("batch", 32, "Images at once, over all devices and hosts.", lower_bound=1)
    flags.DEFINE_integer("examples", 0, "Held-out images to score; 0 = all.", lower_bound=0)
    flags.DEFINE_string("samples", "256", "How many to draw (0 = none); or finished ones: a folder, archive or .npz.")
    flags.DEFINE_integer("seed", 0, "Of the samples and the classifier.")
    flags.DEFINE_string(
        "reference", "", "train (default), val; a folder, archive, or .npz (pictures, ADM, pytorch-fid)."
    )
    flags.DEFINE_string("preset", "", f"Whose conventions: {', '.join(PRESETS)}; adm by default.")
    flags.DEFINE_string("inception_weights", "", "Inception of the FID (pytorch-fid's .pth, or .safetensors).")
    flags.DEFINE_string("lpips_vgg", "", "torchvision's VGG16; LPIPS is left out where it is not at hand.")
    flags.DEFINE_string("lpips_heads", "", "LPIPS's linear heads (vgg.pth).")
    flags.DEFINE_integer("memorisation", 0, "Compare so many samples with the whole training set.", lower_bound=0)
    define_strategy_flags()
    flags.DEFINE_float("acceptance", 1.0, "Share of the samples of a class that a classifier keeps.", 0.0, 1.0)
    flags.DEFINE_enum("dtype", "float32", sorted(setup.DTYPES), "Of the transformer's computation.")
    flags.DEFINE_string("sweep", "", f"NAME=VALUE,VALUE;NAME=...: every combination of {', '.join(sweeps.SETTINGS)}.")
    flags.DEFINE_string("classifier", "", "That rejects where acceptance < 1: resnet101, resnet50, small (made here).")
    flags.DEFINE_string("classifier_weights", "", "Its file (torchvision's .pth).")
    flags.DEFINE_bool("follow", False, "Score each new checkpoint of the run, keep the best in WORKDIR/best_fid.")
    flags.DEFINE_float("follow_timeout", 3600, "Seconds without a new one after which to end; 0: score what is there.")
    cli.define_distributed_flag()


def main() -> None:
    """Reads the flags."""
    fields = [field.name for field in dataclasses.fields(Asked) if field.name not in ("net", "strategy")]
    asked = Asked(strategy=strategy_of(FLAGS), **{name: FLAGS[name].value for name in fields})
    shared = dict(batch=FLAGS.batch, seed=FLAGS.seed, config=FLAGS.config, asked=asked)
    if FLAGS.samples.isdecimal():
        if not FLAGS.workdir:
            raise UserError("--workdir is missing: name a trained model, or finished pictures with --samples=FOLDER")
        evaluate(FLAGS.workdir, FLAGS.out, examples=FLAGS.examples, samples=int(FLAGS.samples), **shared)
    else:
        compare_sets(FLAGS.reference or "train", FLAGS.samples, FLAGS.out, workdir=FLAGS.workdir or "", **shared)


if __name__ == "__main__":
    define_flags()
    cli.run(main, required=("out",))
