"""What the tests of training share."""

import pytest

from tests.train.toy import run


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    run(workdir)
    return workdir
