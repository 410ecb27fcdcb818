"""Encodes a data set once with a trained VQGAN, for train_transformer.py to read in place of pictures.

    python -m vqgan_jax.tools.encode --config=configs/demo_transformer.py --config.vqgan=runs/vqgan --out=codes
    python train_transformer.py --config=configs/demo_transformer.py --config.vqgan=runs/vqgan --config.codes=codes \
      --workdir=runs/gpt

The config is that of the transformer: it names the data, the grid and the condition, which is encoded too. Killed, the
same command goes on; --out may be gs://BUCKET/FOLDER. With --distributed every host encodes shards of its own.
With --config.remap=True the codes are those of the VQGAN without what the training pictures do not use, which is left
in OUT/first_stage: train with that as --config.vqgan.
"""

import functools

from absl import flags
from ml_collections import ConfigDict, config_flags

from vqgan_jax import cli, pretrained, storage
from vqgan_jax.data import records
from vqgan_jax.train import encoding, setup
from vqgan_jax.transformer import ImageTransformer, TransformerConfig

FLAGS = flags.FLAGS


def encode(config: ConfigDict, out: str, *, views: str = encoding.CENTER, batch: int = 64) -> None:
    """Encodes both splits of the config's data set into the folder `out`, or what is still missing of them.

    Args:
      config: of a transformer.
      out: local or gs://.
      views: of the training pictures: "center", "center_flip", or a number of random ones.
      batch: pictures encoded at once on each host.

    Raises:
      UserError: see `encoding.write_codes`, `pretrained.open_named_stages` and `setup.open_data`.
    """
    folder = cli.check_workdir(out, "--out")
    dtype = setup.dtype_of(config)
    open_stages = pretrained.open_named_stages
    if config.remap:  # the VQGAN of the codes in use stays beside its codes, for --config.vqgan
        open_stages = functools.partial(pretrained.adopt_stages, workdir=folder)
    stages = open_stages(config, dtype=dtype)
    model = ImageTransformer(TransformerConfig.from_config(config.model), stages.first, stages.cond, dtype)
    model.check_size(config.data.image_size)
    keys = (stages.first.config.input_key, *model.condition.keys)
    data = setup.open_data(config, keys, factor=stages.first.factor, classes=model.condition.labels)
    encoding.write_codes(
        folder,
        encoding.describe(config, model, stages.digest, data, views),
        model=model,
        frozen=stages.frozen,
        data=data,
        batch=batch,
        threads=config.data.threads,
        max_corrupt_share=config.data.max_corrupt_share,
    )
    splits = records.read_manifest(folder)["splits"]
    counts = ", ".join(f"{split} {content['count']}" for split, content in splits.items())
    print(f"{out}: codes of {counts} examples ({views}); train with --config.codes={storage.path(out)}", flush=True)


def define_flags() -> None:
    """The flags of this tool."""
    config_flags.DEFINE_config_file(
        "config", None, "Config of a transformer; --config.vqgan names the VQGAN.", lock_config=True
    )
    flags.DEFINE_string("out", None, "Folder to write, local or gs://.")
    flags.DEFINE_string(
        "views", encoding.CENTER, "Of training pictures: center, center_flip, or a number of random crops."
    )
    flags.DEFINE_integer("batch", 64, "Pictures encoded at once on each host.", lower_bound=1)
    cli.define_distributed_flag()


if __name__ == "__main__":
    define_flags()
    cli.run(lambda: encode(FLAGS.config, FLAGS.out, views=FLAGS.views, batch=FLAGS.batch), required=("config", "out"))
