"""benchmarks/bench_recipes.py runs; what it times is the objective and nothing else."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_recipes
import torch
import written
from bench_recipes import Clock, Timed

from core.objective.group import Group


def test_quick_writes_a_well_formed_file(tmp_path):
    bench_recipes.main(["--quick", "--output", str(tmp_path)])
    cases = written.check(tmp_path / "recipe_cost.json")
    assert [case["case"] for case in cases] == ["grpo", "dr_grpo"]
    assert all(case["ratio"] < 0.5 for case in cases)
    assert all(case["asked"] == 0 for case in cases)


def test_what_is_asked_of_the_model_is_not_the_objective_s_time():
    class Slow:
        def tempered_logps(self, temperature):
            time.sleep(0.05)
            return torch.zeros(4, 2)

    class Asks:
        def credit(self, group):
            time.sleep(0.02)
            return group.model.tempered_logps(1.2)

    clock = Clock()
    group = Group(rewards=torch.zeros(2, 2, 1), weights=torch.ones(1), model=Slow())
    Timed(Asks(), clock).credit(group)
    assert 0.05 <= clock.asked < 0.5
    assert 0.02 <= clock.objective < clock.asked
