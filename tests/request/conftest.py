"""What the tests of requests share."""

import numpy as np
import pytest
from PIL import Image

from tests.request.models import SIZE


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Rendered scenes go to a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VQGAN_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def masks(tmp_path):
    """Three segmentation masks of one id each."""
    (tmp_path / "masks").mkdir()
    for k in range(3):
        Image.fromarray(np.full((SIZE, SIZE), k, np.uint8)).save(tmp_path / "masks" / f"{k}.png")
    return tmp_path / "masks"
