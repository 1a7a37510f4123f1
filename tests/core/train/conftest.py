"""What the tests of LanguageTrainer share beside language_fixtures: one warm worker a file."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # workers get the parent's sys.path

from language_fixtures import one_worker


@pytest.fixture(scope="module")
def workers():
    pool = one_worker()
    yield pool
    pool.close()
