"""Two updates of TrajectoryTrainer for some recipes; the second's gradients go to the file argv[1].

Run alone or under a launcher, as two_ranks.py is. Weights are float64.
"""

import sys
import tempfile

import torch
from trajectory_fixtures import bright, forecast_of, gradients, options, rollout_of, smooth, unsure

from core import ranks

# One pass, whole rollouts in two, whole groups, rewards of each decision, forward process.
CASES = ["flow_grpo", "gspo", "mc_grpo", "group_preference", "value_anchored"]

if __name__ == "__main__":
    torch.set_num_threads(1)
    rollout = rollout_of(prompts_per_step=4, steps_per_batch=2)
    rewards = {"bright": bright, "smooth": smooth, "unsure": unsure}
    made = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            made[name] = gradients(options(name), folder, rollout=rollout, rewards=rewards, micro_steps=3)
    with tempfile.TemporaryDirectory() as folder:  # rewards of single decisions, of which a part is masked
        rollout = forecast_of(prompts_per_step=4, steps_per_batch=2)
        made["forecast"] = gradients(options("forecast_grpo"), folder, rollout=rollout, micro_steps=2)
    made = {name: {key.removeprefix("module."): g for key, g in found.items()} for name, found in made.items()}
    if ranks.is_main():
        torch.save(made, sys.argv[1])
