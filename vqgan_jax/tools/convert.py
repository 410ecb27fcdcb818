"""Imports a checkpoint of the reference (CompVis/taming-transformers) as a working directory, or exports one back."""

import argparse
import sys
from collections.abc import Sequence

from etils import epath

from vqgan_jax import cli, pretrained, published, storage
from vqgan_jax.config import UserError
from vqgan_jax.convert import export, reference
from vqgan_jax.convert.stream import write_safetensors
from vqgan_jax.train import portable
from vqgan_jax.train.setup import COND_STAGE, FIRST_STAGE

USES = {
    "vqgan": "a VQGAN alone cannot sample; it reconstructs (pretrained.load_vqgan), is fine-tuned "
    "(train_vqgan.py --config.init_from={out}), and is a transformer's first stage (train_transformer.py "
    "--config.vqgan={out})",
    "transformer": "sample with: python sample.py --workdir={out} --out=samples",
}


def import_checkpoint(
    checkpoint: str, yaml: str | None, out: str, lpips_out: str | None = None, first_stage: str | None = None
) -> None:
    """Imports `checkpoint`, and the file of its first stage where that is another, into the folder `out`, and prints
    what went where.

    Raises:
      UserError: see `reference.open_checkpoint`.
    """
    if storage.path(checkpoint).is_dir():
        raise UserError(f"--checkpoint={checkpoint}: is a folder; to write it as a file for PyTorch add --to=torch")
    if first_stage:
        if lpips_out:
            raise UserError("--first_stage: takes no --lpips_out; import the first stage by itself")
        for opened in published.import_with_stage(checkpoint, first_stage, storage.path(out), yaml):
            print(opened.table())
        print(f"wrote {out}: {USES['transformer'].format(out=out)}")
        return
    with reference.open_checkpoint(checkpoint, yaml) as opened:
        pretrained.check_stages(opened)
        lpips = reference.lpips_entries(opened.tensors) if lpips_out else []
        opened.write(storage.path(out))
        print(opened.table())
        print(f"wrote {out}: {USES[opened.kind].format(out=out)}")
        if lpips_out:
            try:
                write_safetensors(storage.path(lpips_out), lpips)
            except OSError as error:
                raise UserError(f"--lpips_out={lpips_out}: cannot be written ({error.strerror or error})") from None
            print(f"wrote {lpips_out}: use it with --config.lpips.vgg={lpips_out} --config.lpips.heads={lpips_out}")


def export_workdir(workdir: str, out: str) -> None:
    """Writes a working directory or imported model as `out` (.safetensors) in the reference's terms, and its YAML.

    Raises:
      UserError: no model there, or one that the reference cannot express.
    """
    path, target = storage.path(workdir), storage.path(out)
    if path.is_file():
        raise UserError(f"--checkpoint={workdir}: is a file; --to=torch takes a working directory or an imported one")
    folders = {n: path / n for n in (FIRST_STAGE, COND_STAGE) if (path / n / portable.STAGE_RECORD).exists()}
    if folders:
        trained = pretrained.open_transformer(path, key="--checkpoint")
        stages = {name: _network(folder) for name, folder in folders.items()}
        export.export_transformer(target, trained.model, trained.params, stages)
    else:
        export.export_vqgan(target, _network(path))
    print(f"wrote {target} and {target.with_suffix('.yaml')}")


def _network(path: epath.Path) -> export.Network:
    """A VQGAN with its EMA parameters as the parameters, and its discriminator where it has one."""
    tokenizer, _, trained = pretrained.load_tokenizer(path, key="--checkpoint")
    arrays = {"params": {**trained.params, **trained.ema}, "collections": trained.collections}
    return export.Network(tokenizer.config, arrays)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vqgan_jax.tools.convert",
        description="Imports a checkpoint of CompVis/taming-transformers or LlamaGen (.ckpt, .pt, .safetensors) as a "
        "working directory that the trainers, sample.py and pretrained.py read. PyTorch is not needed, and nothing in "
        "the file is run.",
        epilog="example: python -m vqgan_jax.tools.convert --checkpoint=vqgan.ckpt --yaml=vqgan.yaml --out=runs/vqgan",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, help="the file; with --to=torch a working directory of ours")
    parser.add_argument("--yaml", help="the model's YAML; by default the file of the same stem beside it")
    parser.add_argument("--out", required=True, help="folder to write; with --to=torch a .safetensors file")
    parser.add_argument("--first_stage", help="of a LlamaGen transformer: the file of its tokenizer, vq_ds16_c2i.pt")
    parser.add_argument("--to", choices=["torch"], help="export in place of import")
    parser.add_argument("--lpips_out", metavar="FILE", help="take LPIPS out of the checkpoint into this .safetensors")
    args = parser.parse_args(argv)

    def work() -> None:
        if args.to:
            if args.yaml or args.lpips_out or args.first_stage:
                raise UserError("--to=torch: takes no --yaml, no --lpips_out and no --first_stage")
            export_workdir(args.checkpoint, args.out)
        else:
            import_checkpoint(args.checkpoint, args.yaml, args.out, args.lpips_out, args.first_stage)

    return cli.exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
