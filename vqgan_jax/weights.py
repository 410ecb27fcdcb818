"""The one registry of weights that can be downloaded (address, licence, SHA-256), and `fetch`, which keeps them."""

import hashlib
import http.client
import os
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from absl import logging
from etils import epath
from tqdm import tqdm

from vqgan_jax import storage
from vqgan_jax.config import UserError, choose

_TIMEOUT_S = 30


@dataclass(frozen=True)
class Weights:
    """One file.

    Attributes:
      name: its key in REGISTRY.
      what: what it is, for people.
      url: its official address.
      sha256: hexadecimal digest, in full or only its start where no more was published, "" where nothing was.
      licence: of the file, as its publishers state it.
      filename: its name in the cache folder.
    """

    name: str
    what: str
    url: str
    sha256: str
    licence: str
    filename: str


_TORCHVISION = "https://download.pytorch.org/models"
_DINO = "https://dl.fbaipublicfiles.com/dino"
_LLAMAGEN = "https://huggingface.co/FoundationVision/LlamaGen/resolve/main"
_HEIBOX = "https://heibox.uni-heidelberg.de/f"

REGISTRY: dict[str, Weights] = {
    weights.name: weights
    for weights in (
        Weights(
            name="lpips_vgg",
            what="LPIPS v0.1 linear heads on VGG16 (arXiv 1801.03924)",
            url="https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
            sha256="a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
            licence="BSD-2-Clause",
            filename="lpips_vgg_v0.1.pth",
        ),
        Weights(
            name="vgg16",
            what="VGG16 trained on ImageNet (torchvision)",
            url=f"{_TORCHVISION}/vgg16-397923af.pth",
            sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
            licence="BSD-3-Clause, ImageNet terms",
            filename="vgg16-397923af.pth",
        ),
        Weights(
            name="inception",
            what="the Inception network of the FID, ported from TensorFlow (pytorch-fid)",
            url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
            "pt_inception-2015-12-05-6726825d.pth",
            sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            licence="Apache-2.0",
            filename="pt_inception-2015-12-05-6726825d.pth",
        ),
        Weights(
            name="resnet50",
            what="ResNet-50 trained on ImageNet (torchvision, IMAGENET1K_V1)",
            url=f"{_TORCHVISION}/resnet50-0676ba61.pth",
            sha256="0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
            licence="BSD-3-Clause, ImageNet terms",
            filename="resnet50-0676ba61.pth",
        ),
        Weights(
            name="resnet101",
            what="ResNet-101 trained on ImageNet (torchvision, IMAGENET1K_V1)",
            url=f"{_TORCHVISION}/resnet101-63fe2227.pth",
            sha256="63fe2227",
            licence="BSD-3-Clause, ImageNet terms",
            filename="resnet101-63fe2227.pth",
        ),
        Weights(
            name="dino_vits8",
            what="DINO ViT-S/8 trained on ImageNet (Facebook Research)",
            url=f"{_DINO}/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
            sha256="",
            licence="Apache-2.0",
            filename="dino_deitsmall8_pretrain.pth",
        ),
        Weights(
            name="dino_vits16",
            what="DINO ViT-S/16 trained on ImageNet (Facebook Research)",
            url=f"{_DINO}/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
            sha256="",
            licence="Apache-2.0",
            filename="dino_deitsmall16_pretrain.pth",
        ),
        Weights(
            name="vqgan_imagenet_f16_1024",
            what="VQGAN on ImageNet, f 16, 1024 codes (CompVis)",
            url=f"{_HEIBOX}/140747ba53464f49b476/?dl=1",
            sha256="",
            licence="MIT",
            filename="vqgan_imagenet_f16_1024.ckpt",
        ),
        Weights(
            name="vqgan_imagenet_f16_16384",
            what="VQGAN on ImageNet, f 16, 16384 codes (CompVis)",
            url=f"{_HEIBOX}/867b05fc8c4841768640/?dl=1",
            sha256="",
            licence="MIT",
            filename="vqgan_imagenet_f16_16384.ckpt",
        ),
        Weights(
            name="vqgan_gumbel_f8",
            what="Gumbel VQGAN on OpenImages, f 8, 8192 codes (CompVis)",
            url=f"{_HEIBOX}/34a747d5765840b5a99d/?dl=1",
            sha256="",
            licence="MIT",
            filename="vqgan_gumbel_f8.ckpt",
        ),
        Weights(
            name="llamagen_vq16",
            what="LlamaGen's tokenizer on ImageNet, f 16, 16384 codes of 8 numbers (FoundationVision)",
            url=f"{_LLAMAGEN}/vq_ds16_c2i.pt",
            sha256="",
            licence="MIT",
            filename="vq_ds16_c2i.pt",
        ),
        Weights(
            name="llamagen_vq8",
            what="LlamaGen's tokenizer on ImageNet, f 8, 16384 codes of 8 numbers (FoundationVision)",
            url=f"{_LLAMAGEN}/vq_ds8_c2i.pt",
            sha256="",
            licence="MIT",
            filename="vq_ds8_c2i.pt",
        ),
        *(
            Weights(
                name=f"llamagen_{size.lower()}_{pixels}",
                what=f"LlamaGen-{size}, class-conditional ImageNet at {pixels} pixels (arXiv 2406.06525)",
                url=f"{_LLAMAGEN}/c2i_{size}_{pixels}.pt",
                sha256="",
                licence="MIT",
                filename=f"c2i_{size}_{pixels}.pt",
            )
            for size, pixels in (
                *(("B", 256), ("B", 384), ("L", 256), ("L", 384)),
                *(("XL", 384), ("XXL", 384), ("3B", 384)),
            )
        ),
    )
}


def cache_folder() -> Path:
    """Where downloads are kept: $VQGAN_JAX_CACHE, else ~/.cache/vqgan_jax."""
    return Path(os.environ.get("VQGAN_JAX_CACHE") or Path.home() / ".cache" / "vqgan_jax").expanduser()


def fetch(name: str, local: str | None = None, *, flag: str) -> epath.Path:
    """Finds a file of weights: the local file if one is given, else the cached one, else a download.

    Args:
      name: a key of REGISTRY.
      local: a file the user has, local or in a bucket; None or "" for none. It is taken as it is, whatever its digest.
      flag: the flag or config key that `local` comes from, for the error's text ("--config.loss.lpips_weights"); ""
        where there is none.

    Raises:
      UserError: no such local file, no connection, or another digest than the registry's; a failed file is not kept.
    """
    weights = choose("weights", name, REGISTRY)
    if local:
        if not (path := storage.path(local)).is_file():
            raise UserError(f"{flag}: no such file: {local}")
        return path
    target = cache_folder() / weights.filename
    if not target.is_file():
        try:
            _download(weights, target)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"{weights.what}: cannot be downloaded ({' '.join(str(error).split())}). "
                f"Get it from {weights.url} ({_digest(weights)}, licence {weights.licence}), "
                f"then put it at {target}{f' or name the file with {flag}=FILE' if flag else ''}"
            ) from None
    return epath.Path(target)


def _digest(weights: Weights) -> str:
    if not weights.sha256:
        return "no published SHA-256"
    return f"SHA-256 {'' if len(weights.sha256) == 64 else 'starts with '}{weights.sha256}"


def _download(weights: Weights, target: Path) -> None:
    """Downloads beside the target, checks, then renames, so that no reader ever sees half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, done = hashlib.sha256(), 0
    # A name of its own, because the hosts of a job may share one cache folder.
    handle, part = tempfile.mkstemp(prefix=f"{weights.filename}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(weights.url, timeout=_TIMEOUT_S) as reply:
            if reply.headers.get_content_type() == "text/html":
                raise OSError("the address answers with a web page")
            total = int(reply.headers.get("Content-Length") or 0)
            with tqdm(total=total or None, unit="B", unit_scale=True, desc=weights.filename) as bar:
                while piece := reply.read(1 << 20):
                    file.write(piece)
                    digest.update(piece)
                    done += len(piece)
                    bar.update(len(piece))
        if total and done != total:
            raise OSError(f"the connection ended after {done} of {total} bytes")
        if not digest.hexdigest().startswith(weights.sha256):
            raise OSError(f"what arrived has the SHA-256 {digest.hexdigest()}")
        if not weights.sha256:
            logging.warning("%s: no digest was published; SHA-256 %s", weights.url, digest.hexdigest())
        # mkstemp makes private files; a shared cache is for everyone.
        os.chmod(part, 0o644)
        os.replace(part, target)
    finally:
        Path(part).unlink(missing_ok=True)
