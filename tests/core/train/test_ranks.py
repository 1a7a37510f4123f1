"""Two ranks on the CPU against one process, on the same rollouts, some of which could not be judged."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ALONE = [sys.executable, "-P"]
TWO = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
       "--rdzv-endpoint=localhost:0", "--local-addr=localhost"]  # fmt: skip


@pytest.fixture(scope="module", params=["two_ranks.py", "trajectory_ranks.py"])
def gradients(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    paths = os.pathsep.join([str(HERE), str(HERE.parents[2])])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "0"}
    made = []
    for name, start in (("one", ALONE), ("two", TWO)):
        out = folder / f"{name}.pt"
        done = subprocess.run(
            [*start, str(HERE / request.param), str(out)], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        made.append(torch.load(out, weights_only=True))
    return made


def test_two_ranks_have_the_gradients_of_one_process_for_every_exact_reduction(gradients):
    one, two = gradients
    assert len(one) in (29, 6)  # language, trajectories
    for case in one:
        largest = max(part.abs().max() for part in one[case].values())
        assert largest > 0
        for name, expected in one[case].items():
            scale = expected.abs().max().clamp(min=1e-6 * largest)  # a bias before a norm has no gradient
            difference = (two[case][name] - expected).abs().max() / scale
            assert difference < 1e-6, f"{case}: {name} is {difference:.1e} off"


def test_the_recipes_differ_so_that_equality_means_something(gradients):
    one, _ = gradients
    first = {case: next(iter(parts.values())) for case, parts in one.items()}
    for i, a in enumerate(first):
        for b in list(first)[i + 1 :]:
            alike = first[a].shape == first[b].shape and torch.allclose(first[a], first[b], rtol=1e-3, atol=0)
            assert not alike, f"{a} and {b}"
