"""What the tests of TrajectoryTrainer share: a tiny flow over maps of 8x8, and rewards that need no worker."""

from pathlib import Path

import numpy as np
import torch

from core import config as configs
from core import ranks
from core.config import Config, FlowRollout, Optim, Run
from core.objective.recipes import build
from core.policy.flow import FlowPolicy
from core.policy.tiny_flow import TinyFlow
from core.scoring import Scorer
from core.train.trajectory import TrajectoryTrainer

ROWS = [{"id": f"row-{i}", "prompt": f"map {i}", "level": i / 12} for i in range(12)]


def condition(row):
    return {"image": np.full((8, 8, 1), row["level"], np.float32)}


def bright(completions):
    """The mean of the left half."""
    return [float(map[:, :4].mean()) for map in completions]


def smooth(completions, *, level):
    """Near the row's own level on the right half."""
    return [float(1 - abs(map[:, 4:].mean() - at)) for map, at in zip(completions, level, strict=True)]


def unsure(completions, *, id):
    """Could not judge two rollouts of one row, and does not apply to another row."""
    seen, found = {}, []
    for row, map in zip(id, completions, strict=True):
        seen[row] = seen.get(row, 0) + 1
        value = None if row == "row-3" else float("nan") if row == "row-5" and seen[row] <= 2 else float(map[0, 0, 0])
        found.append(value)
    return found


def constant(completions):
    return [0.5] * len(completions)


broken_at = []  # a call each


def first_fails(completions):
    """Could not judge the first completion of the first call."""
    broken_at.append(len(completions))
    return [float("nan") if len(broken_at) == 1 and i == 0 else 0.5 for i in range(len(completions))]


bright.scope = smooth.scope = unsure.scope = constant.scope = first_fails.scope = "batch"


def policy(seed=0, lora=0, double=False, half=False, **rollout):
    torch.manual_seed(seed)
    net = TinyFlow(channels=1, text=False, width=8, levels=1)
    with torch.no_grad():  # its last layer starts at 0, through which nothing is learned at first
        net.leave[-1].weight.normal_(0, 0.3)
    if lora:
        from peft import LoraConfig

        net.add_adapter(LoraConfig(r=lora, lora_alpha=lora, target_modules=["query", "keys", "out", "film"]))
    return FlowPolicy(net.double() if double else net, rollout_of(**rollout), half=half)


def rollout_of(**settings):
    plain = {"prompts_per_step": 2, "group_size": 4, "steps": 5, "eval_steps": 5, "shared_noise": False}
    return FlowRollout(**plain | settings)


def settings(steps=2, lr=0.1, micro=None, micro_steps=None, ema=0.0, seed=0, control="none", rollout=None, **trainer):
    return Config(
        task=None,
        rollout=rollout or rollout_of(),
        optim=Optim(steps=steps, lr=lr, micro_batch=micro, micro_steps=micro_steps, ema=ema, max_grad_norm=0.0),
        run=Run(seed=seed, control=control, save_every=1),
        trainer={"optim": "sgd", "save_strategy": "no"} | trainer,
    )


def trainer(options, config, output, acting=None, rewards=None, rows=ROWS, **more):
    """A trainer of `options` (a config's objective section, or a recipe)."""
    recipe = build(options) if isinstance(options, dict) else options
    rewards = rewards or {"bright": bright, "smooth": smooth}
    return TrajectoryTrainer(
        policy=acting or policy(**{f: getattr(config.rollout, f) for f in config.rollout.__dataclass_fields__}),
        condition=condition,
        rows=rows,
        scorer=Scorer(rewards, workers=1),
        weights=[1.0, 2.0, 0.5][: len(rewards)],
        outcome=next(iter(rewards)),
        recipe=recipe,
        config=config,
        batch=configs.batch(config, ranks.count(), recipe.extra_rollouts),
        output=Path(output),
        **more,
    )


def weights(made) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.policy.net.named_parameters()}
