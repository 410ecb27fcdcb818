"""Trains and scores whole recipes on a fixed budget, so that they can be compared over the project's life.

    python -m benchmarks.speedrun --data=/data/tiny_imagenet_40.zip --recipes=reference,modern --record
    python -m benchmarks.speedrun --data=scenes --pieces=reference,vq8,fsq,modern --equal_flops
    python -m benchmarks.speedrun --data=/data/tiny_imagenet_40.zip --form=gpu --recipes=reference,modern --record
    python -m benchmarks.speedrun --data=scenes --steps=400,500 --recipes=fsq/llama

A recipe (benchmarks/speedrun_recipes.py) is a tokenizer and a transformer on its codes. --form says how large both are:
`cpu` takes some forty minutes on two cores for the first recipe, `gpu` as long on an H200 (an estimate). --budget=0.1
scales the steps of both stages, --steps=A,B sets them. All recipes have the same data, seeds, steps and held-out
pictures. --pieces trains stage 1 (--transformer_pieces: stage 2, on the codes of --tokenizer) piece by piece at equal
steps; --equal_flops adds each that has other FLOPs a step than the first one again, at as many in all.

rFID-proxy and gFID-proxy are Frechet distances in the features of a small classifier of the same data set, trained once
(its accuracy on held-out pictures is printed): of reconstructions to their held-out originals, and of samples, classes
in turn, to all held-out pictures. They compare with each other at equal data, form and classifier, whose hash a line
names (with another number of threads it trains to another), and with nothing else. What is done is kept in --out by the
digest of its config and data and not done again, which is said where it was done by another revision of the source;
killed, the same command goes on. FLOPs are those of matrix products and convolutions (vqgan_jax/train/roofline.py).
"""

import argparse
import functools
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import train_transformer
import train_vqgan
from benchmarks.speedrun_recipes import FORMS, PIECES, SCENES_SHARE, Piece, find
from benchmarks.speedrun_record import (
    SECONDS,
    WHEN,
    digest,
    minutes,
    read_json,
    say_if_older,
    shown_command,
    speed,
    stamp,
    trained_by,
    without_places,
)
from benchmarks.speedrun_table import COLUMNS, RESULTS, STAGE_COLUMNS, line_of, record, table
from configs import speedrun_transformer, speedrun_vqgan
from vqgan_jax import cli, images, parallel, storage
from vqgan_jax.config import UserError, choose, plain
from vqgan_jax.data.sources import open_source
from vqgan_jax.evals.classifier import Classifier, train_classifier
from vqgan_jax.evals.references import Statistics, collect, compare
from vqgan_jax.scoring import judges, likelihood
from vqgan_jax.scoring.bench import Bench, open_bench
from vqgan_jax.scoring.generation import Generation
from vqgan_jax.scoring.workdir import ScoredTransformer, ScoredVQGAN
from vqgan_jax.tools import encode, programs
from vqgan_jax.train import code_cache, roofline, setup

SEED, BATCH = 0, 64
CLASSIFIER = (24, 48, 96)  # widths; fewer features than pictures, or a covariance has no full rank
CLASSIFIER_IMAGES = 20_000
PRESET = "pytorch-fid"  # takes [-1, 1], as the classifier does
SHOWN = 32  # samples on a sheet


class Speedrun:
    """One data set under one form: trains and scores stages, each once."""

    def __init__(
        self, data: str, out: Path, *, form: str, budget: float, steps: Sequence[int], lpips: str, seed: int = SEED
    ):
        """Opens the data and the classifier, which is trained where there is none.

        Args:
          data: "scenes", or a folder or archive with the folders train and val, in them one a class.
          out: where all is kept.
          form: a name in FORMS.
          budget: scales the steps of both stages.
          steps: of both stages; () for the configs', scaled.
          lpips: "VGG,HEADS", the files of LPIPS; "" leaves it out.
          seed: of both trainings; the classifier, and what scores are drawn from, stay the same.

        Raises:
          UserError: no such form or data.
        """
        self._form, self.size = form, choose("--form", form, FORMS)
        self._budget, self._steps, self._lpips, self._seed = budget, steps, lpips, seed
        self.out, self.name = out, "scenes" if data == "scenes" else Path(data).stem
        self._data = {"source": "scenes"}
        if data != "scenes":
            root = storage.path(data)
            self._data = {"source": "folder" if root.is_dir() else "archive", "path": str(storage.absolute(data))}
        self._config = self._with_data(speedrun_vqgan.get_config(f"form={form}"))
        self.classes = len(open_source(self._config.data, "train").classes)
        if not self.classes:
            raise UserError(f"--data={data}: has no classes; put the pictures into train/CLASS and val/CLASS")
        self.data = setup.open_data(self._config, ("image", "label"), factor=1, classes=self.classes)
        self.classifier, self.accuracy = self._open_classifier()

    def _with_data(self, config: ConfigDict) -> ConfigDict:
        config.data.update(self._data)
        config.seed = self._seed
        return config

    def _open_classifier(self) -> tuple[Classifier, float]:
        share = SCENES_SHARE if self._data["source"] == "scenes" else 1
        steps = max(1, round(self.size.classifier_steps * share))
        key = digest({"data": self._identity(), "steps": steps, "seed": SEED, "widths": CLASSIFIER})
        file = self.out / f"classifier-{key}.npz"
        if not file.exists():
            print(f"training the classifier ({steps} steps)", flush=True)
            start = time.monotonic()
            read = functools.partial(judges.read_examples, transform=self.data.val_transform)
            train = read(self.data.train, most=CLASSIFIER_IMAGES)
            val = read(self.data.val, most=len(self.data.val))
            shape = dict(classes=self.classes, seed=SEED, steps=steps, augment=True, widths=CLASSIFIER)
            made = train_classifier(train["image"], train["label"], **shape)
            accuracy = made.accuracy(val["image"], val["label"])
            made.save(file, accuracy=accuracy, seconds=time.monotonic() - start)
        classifier, facts = Classifier.load(file, self.classes, CLASSIFIER)
        print(f"classifier: {100 * facts['accuracy']:.1f} % of {len(self.data.val)} held-out pictures right, "
              f"of {self.classes} classes ({facts['seconds']:.0f} s)", flush=True)  # fmt: skip
        return classifier, facts["accuracy"]

    def _identity(self) -> dict[str, Any]:
        """The data as it defines a stage: where it lies, and whether in an archive, does not."""
        counts = [len(self.data.train), len(self.data.val)]
        return without_places(plain(self._config.data)) | {"name": self.name, "counts": counts}

    @functools.cached_property
    def bench(self) -> Bench:
        """The devices and the classifier's features."""
        net = self.classifier.feature_net("speedrun's classifier", self._config.data.image_size)
        return open_bench(batch=BATCH, seed=SEED, features=True, preset=PRESET, net=net)

    @functools.cached_property
    def held_out(self) -> Statistics:
        """Of all held-out pictures: what samples are compared with."""
        with jax.set_mesh(self.bench.mesh):
            return self.bench.of_split(self.data, self._config, "val")

    # Configs

    def _config_of(self, stage: int, piece: Piece, steps: int) -> ConfigDict:
        module = (speedrun_vqgan, speedrun_transformer)[stage]
        config = self._with_data(piece.config(module, self._form))
        asked = self._steps[stage] if self._steps else max(1, round(int(config.steps) * self._budget))
        config.steps = str(steps or asked)
        return config

    def tokenizer_config(self, name: str, steps: int = 0) -> ConfigDict:
        """Of stage 1; `steps` in place of the form's."""
        config = self._config_of(0, PIECES["tokenizer"][name], steps)
        if self._lpips:
            config.lpips.vgg, config.lpips.heads = self._lpips.split(",")
            config.loss.perceptual_weight = 1.0
        return config

    def transformer_config(self, name: str, tokenizer: Path, steps: int = 0) -> ConfigDict:
        """Of stage 2, on the codes of the tokenizer in this folder."""
        config = self._config_of(1, PIECES["transformer"][name], steps)
        config.model.condition.classes = self.classes
        codes = tokenizer / f"codes-{digest(without_places(plain(config.data)))}"
        config.vqgan, config.codes = str(tokenizer), str(codes)
        return config

    # Stages

    def folder_of(self, kind: str, config: ConfigDict, *more: str) -> Path:
        """Where a stage is kept, by the digest of its config, its data and what it builds on."""
        fields = plain(config)
        defined = {name: x for name, x in fields.items() if name not in ("vqgan", "codes", "lpips")}
        defined["data"] = without_places(fields["data"])
        lpips = [storage.sha256(storage.path(file)) for file in filter(None, fields.get("lpips", {}).values())]
        return self.out / f"{kind}-{digest({'config': defined, 'data': self._identity(), 'on': more + tuple(lpips)})}"

    def train_tokenizer(self, config: ConfigDict) -> Path:
        """Trains stage 1 where it is not trained yet; returns its folder."""
        folder = self.folder_of("tokenizer", config)
        self._once(folder, "trained", lambda: train_vqgan.train(config, str(folder)))
        return folder

    def train_transformer(self, config: ConfigDict) -> Path:
        """Encodes the data where they are not encoded, and trains stage 2 where it is not trained yet."""
        tokenizer = Path(config.vqgan)
        folder = self.folder_of("transformer", config, tokenizer.name)
        self._once(tokenizer, Path(config.codes).name, lambda: encode.encode(config, config.codes))
        self._once(folder, "trained", lambda: train_transformer.train(config, str(folder)))
        return folder

    def _once(self, folder: Path, what: str, run: Callable[[], Any]) -> None:
        """Runs what has not ended well before, and adds to the seconds that it took, in all starts together."""
        folder.mkdir(parents=True, exist_ok=True)
        done = read_json(folder / SECONDS)
        if done.get(what, {}).get("done"):
            say_if_older(folder, done[what])
            return
        start, finished = time.monotonic(), False
        try:
            run()
            finished = True
        finally:
            seconds = done.get(what, {}).get("seconds", 0.0) + time.monotonic() - start
            storage.write_json(folder / SECONDS, done | {what: {"seconds": seconds, "done": finished} | stamp()})
            jax.clear_caches()  # a table has many programs, of which none is needed again
            gc.collect()

    def _scored(self, folder: Path, key: str, score: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures that `score` gives, or gave before."""
        defined = [self.bench.extract.net.sha256, self.size.examples, self.size.samples, key]
        file = folder / f"scores-{digest(defined)}.json"
        if not file.exists():
            storage.write_json(file, score() | stamp())
            jax.clear_caches()
            gc.collect()
        found = read_json(file)
        say_if_older(folder, found)
        return found

    def tokenizer_figures(self, config: ConfigDict) -> dict[str, Any]:
        """Trains and scores stage 1."""
        folder = self.train_tokenizer(config)

        def score() -> dict[str, Any]:
            scored = ScoredVQGAN(storage.path(folder), config, self.bench)
            with jax.set_mesh(self.bench.mesh):
                found = scored.score(self.size.examples, storage.path(folder))
            names = ("val_psnr", "val_l1", "codebook_usage", "codebook_perplexity")
            figures = {name.removeprefix("val_"): found[name] for name in names}
            return figures | {"rfid_proxy": found["rfid"], "flops": self._flops(config), **speed(folder)}

        spent = {"minutes": minutes(folder, "trained"), "steps": int(config.steps)}
        return self._scored(folder, "", score) | spent | trained_by(folder)

    def transformer_figures(self, config: ConfigDict, sampler: dict[str, Any]) -> dict[str, Any]:
        """Trains and scores stage 2, sampled so."""
        folder = self.train_transformer(config)
        tokenizer = Path(config.vqgan)

        def score() -> dict[str, Any]:
            scored = ScoredTransformer(storage.path(folder), config, self.bench)
            trained = scored.trained
            codes = code_cache.open_ready(config, storage.path(folder), trained.model, trained.stages.digest)
            first = ConfigDict(json.loads((tokenizer / "config.json").read_text()))
            count = sum(x.size for x in jax.tree.leaves(trained.params))
            with jax.set_mesh(self.bench.mesh):
                found = likelihood.score(trained, scored.path, codes, config, self.bench, 0)
            names = ("nll", "bits")
            figures = {name: found[f"val_{name}"] for name in names} | {"table_nll": found["table_nll"]}
            figures |= {"flops": self._flops(config, first), "parameters": count, **speed(folder)}
            return figures | self._samples(scored, sampler, folder / f"samples-{digest(sampler)}.png")

        both = minutes(tokenizer, Path(config.codes).name) + minutes(folder, "trained")
        spent = {"minutes": both, "steps": int(config.steps)}
        return self._scored(folder, digest(sampler), score) | spent | trained_by(folder)

    def _samples(self, scored: ScoredTransformer, sampler: dict[str, Any], sheet: Path) -> dict[str, Any]:
        """gFID-proxy and class agreement of samples, classes in turn; some of them go to `sheet`."""
        count = self.size.samples
        generation = Generation(scored.trained, self.data, self.bench, count=count, judged=False)
        judge = judges.ClassJudge(self.classifier, self.accuracy, generation.conditions.classes)
        kept = judges.Kept(SHOWN)
        held_out = self.held_out
        with jax.set_mesh(self.bench.mesh.local_mesh):
            drawn = judges.shown_to([judge, kept], generation.draw(dict(sampler)))
            samples = collect(drawn, self.bench.extract, count=count, source={}, keep=0, what="samples")
        images.save_png(storage.path(sheet), images.grid(kept.pictures(), columns=8))
        return {"gfid_proxy": compare(samples, held_out)["fid"], "agreement": judge.result()["class_agreement"]}

    def _flops(self, config: ConfigDict, first: ConfigDict | None = None) -> float:
        """Of a train step."""
        mesh = parallel.make_mesh(config.mesh)
        stages = [first.model] if first is not None else []
        with jax.set_mesh(mesh):
            program = programs.train_program(config, mesh, examples=len(self.data.train), stages=stages)
            return roofline.count_flops(program.needed())

    # What is asked for

    def pieces(self, kind: str, names: Sequence[str], tokenizer: str, equal_flops: bool) -> list[dict[str, Any]]:
        """Figures of stages of one kind: at equal steps, and where asked for at as many FLOPs as the first one."""
        figures_of = self._figures_of(kind, tokenizer)
        found: list[dict[str, Any]] = []
        for name in names:
            row = figures_of(name, 0)
            found.append({"name": name} | row)
            print(table(STAGE_COLUMNS[kind], found[-1:], header=len(found) == 1), flush=True)
            if equal_flops and abs(row["flops"] / found[0]["flops"] - 1) > 0.05:
                steps = max(1, round(row["steps"] * found[0]["flops"] / row["flops"]))
                found.append({"name": f"{name}, equal FLOPs"} | figures_of(name, steps))
                print(table(STAGE_COLUMNS[kind], found[-1:], header=False), flush=True)
        return found

    def _figures_of(self, kind: str, tokenizer: str) -> Callable[[str, int], dict[str, Any]]:
        """(piece, steps or 0 for the form's) -> its figures."""
        if kind == "tokenizer":
            return lambda name, steps: self.tokenizer_figures(self.tokenizer_config(name, steps))
        folder = self.train_tokenizer(self.tokenizer_config(tokenizer))

        def figures(name: str, steps: int) -> dict[str, Any]:
            sampler = dict(PIECES["transformer"][name].sampler)
            return self.transformer_figures(self.transformer_config(name, folder, steps), sampler)

        return figures

    def recipe(self, name: str) -> dict[str, Any]:
        """Figures of both stages of a recipe; those that both have under STAGE_NAME."""
        first, second = find(name)
        stage_1 = self.tokenizer_config(first)
        figures = self.tokenizer_figures(stage_1)
        stage_2 = self.transformer_config(second, self.folder_of("tokenizer", stage_1))
        found = self.transformer_figures(stage_2, dict(PIECES["transformer"][second].sampler))
        both = {f"{name}_{k}": x[name] for k, x in enumerate((figures, found), 1) for name in ("flops", "ms", "steps")}
        total = {"minutes": figures["minutes"] + found["minutes"], "accuracy": self.accuracy}
        when = {name: "; ".join(dict.fromkeys([figures[name], found[name]])) for name in WHEN}
        judge = self.bench.extract.net.sha256[:8]
        return {"name": name} | figures | found | both | total | when | {"classifier": judge}


def names_of(text: str, known: dict[str, Piece], flag: str) -> list[str]:
    """The pieces that a flag names, "all" for all."""
    names = list(known) if text == "all" else [name for name in text.split(",") if name]
    for name in names:
        choose(flag, name, known)
    return names


def run(args: argparse.Namespace, command: str) -> None:
    """All that is asked for."""
    if bool(args.lpips) and args.lpips.count(",") != 1:
        raise UserError("--lpips: names two files, VGG,HEADS")
    for file in filter(None, args.lpips.split(",")):
        if not storage.path(file).is_file():
            raise UserError(f"--lpips: there is no file {file}")
    recipes = [name for name in args.recipes.split(",") if name]
    for name in recipes:
        find(name)
    pieces = {"tokenizer": names_of(args.pieces, PIECES["tokenizer"], "--pieces")}
    pieces["transformer"] = names_of(args.transformer_pieces, PIECES["transformer"], "--transformer_pieces")
    choose("--tokenizer", args.tokenizer, PIECES["tokenizer"])
    words = args.steps.split(",") if args.steps else []
    steps = [int(x) for x in words if x.isdecimal()]
    if len(words) not in (0, 2) or len(steps) != len(words) or 0 in steps:
        raise UserError("--steps: are those of both stages, such as 400,500")
    out = cli.check_workdir(args.out, "--out")
    speedrun = Speedrun(
        args.data, Path(out), form=args.form, budget=args.budget, steps=steps, lpips=args.lpips, seed=args.seed
    )
    for kind, names in pieces.items():
        if names:
            rows = speedrun.pieces(kind, names, args.tokenizer, args.equal_flops)
            when = "; ".join(dict.fromkeys(f"{row['date']}, {row['machine']}" for row in rows))
            print(f"\n{when}; `{command}`\n\n{table(STAGE_COLUMNS[kind], rows)}\n", flush=True)
    lines = []
    for name in recipes:
        found = speedrun.recipe(name) | {"data": speedrun.name, "command": command}
        lines.append(line_of(found))
        print(table(COLUMNS, [found]), flush=True)
    if args.record and lines:
        record(RESULTS, lines)
        print(f"{RESULTS}: {len(lines)} lines added", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speedrun", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--data", required=True, help="scenes; or a folder or archive with train/CLASS and val/CLASS")
    parser.add_argument("--out", default="runs/speedrun", help="folder of all that is trained and scored")
    parser.add_argument("--form", default="cpu", help=f"one of {', '.join(FORMS)}")
    parser.add_argument("--budget", type=float, default=1.0, help="share of the form's steps")
    parser.add_argument("--steps", default="", help="of both stages, in place of the form's: 400,500")
    parser.add_argument("--recipes", default="", help="reference,modern,fsq/llama: both stages, a line of results each")
    parser.add_argument("--pieces", default="", help="of stage 1, a table: reference,vq8,fsq; or all")
    parser.add_argument("--transformer_pieces", default="", help="of stage 2, a table: reference,llama; or all")
    parser.add_argument("--tokenizer", default="reference", help="whose codes --transformer_pieces are trained on")
    parser.add_argument("--equal_flops", action="store_true", help="add rows at as many FLOPs as the first piece")
    parser.add_argument("--seed", type=int, default=SEED, help="of both trainings: how far apart do two seeds lie?")
    parser.add_argument("--lpips", default="", help="VGG,HEADS: files of LPIPS, which is left out without them")
    parser.add_argument("--record", action="store_true", help=f"add the lines of --recipes to {RESULTS.name}")
    args = parser.parse_args(argv)
    cli.spread_cpu()
    command = shown_command(args, parser.parse_args(["--data="]))
    return cli.exit_code(lambda: run(args, command))


if __name__ == "__main__":
    sys.exit(main())
