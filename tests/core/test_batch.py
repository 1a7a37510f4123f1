"""core.batch: what a step is split into, and what does not divide."""

from types import SimpleNamespace

import pytest

from core.app import Language, NoOptions
from core.batch import Batch
from core.config import ConfigError, resolve

APP = SimpleNamespace(name="toy", acts=Language(prompt=str), options=NoOptions, tasks={})


def of(prompts=8, group=8, micro=None, parts=1, passes=1):
    rollout = {"prompts_per_step": prompts, "group_size": group, "steps_per_batch": parts, "iterations": passes}
    return resolve(APP, {"rollout": rollout, "optim": {"micro_batch": micro}})


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("shape", [(8, 8, None, 1), (8, 8, 4, 2), (4, 6, 2, 3), (4, 2, 1, 1)])
def test_every_rank_gets_whole_groups_and_a_step_gets_all_its_rollouts(shape, ranks):
    (prompts, group, _, parts), made = shape, Batch.of(of(*shape), ranks)
    assert made.micro * made.accumulation * ranks == made.rollouts == prompts * group
    assert made.generation == made.rollouts * parts
    assert made.generation // ranks % group == 0


def test_the_line_says_the_derivation():
    assert Batch.of(of(8, 8, 16), 2).line() == (
        "8 prompts x 8 completions = 64 rollouts a step; 2 ranks x 2 micro-batches of 16; fresh rollouts every step"
    )
    assert (
        Batch.of(of(2, 4, None, 2, 3)).line().endswith("16 rollouts sampled at once for 6 steps (2 parts x 3 passes)")
    )


def test_an_extra_rollout_is_sampled_beside_every_group():
    made = Batch.of(of(4, 4, 10), extra_rollouts=1)
    assert (made.group, made.rollouts, made.accumulation) == (5, 20, 2)
    assert made.line().startswith("4 prompts x (4 + 1) completions, 4 of them trained on, = 20 rollouts a step")
    with pytest.raises(ConfigError, match=r"micro_batch=16 does not divide the 20 .*=4 x 5 completions"):
        Batch.of(of(4, 4, 16), extra_rollouts=1)
    with pytest.raises(ConfigError, match="group_size=3 and 1 more have no median"):
        Batch.of(of(4, 3, None), extra_rollouts=1)


@pytest.mark.parametrize(
    ("settings", "ranks", "sentence"),
    [
        (
            {"micro": 12},
            1,
            "=12 does not divide the 64 rollouts of a rank .*use one of 1, 2, 4, 8, 16, 32, 64",
        ),
        ({"micro": 64}, 2, "does not divide the 32 rollouts of a rank"),
        ({"micro": 0}, 1, "optim.micro_batch=0 does not divide"),
        ({"prompts": 3}, 2, "prompts_per_step=3 x steps_per_batch=1 does not divide over 2 ranks; .*multiple of 2"),
        ({"prompts": 1, "group": 3, "parts": 2}, 2, "3 rollouts a step do not divide over 2 ranks"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_what_would(settings, ranks, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Batch.of(of(**settings), ranks)
