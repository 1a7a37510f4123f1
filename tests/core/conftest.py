"""What the tests of scoring share: their rewards, found by workers too, and one pool of warm workers a file."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # workers get the parent's sys.path

from scoring_rewards import TIMEOUT_S

from core.pool import Limits, Pool


@pytest.fixture(scope="module")
def workers():
    """For all tests that may share it."""
    shared = Pool(Limits(workers=2, timeout_s=TIMEOUT_S, memory_mb=512))
    yield shared
    shared.close()
