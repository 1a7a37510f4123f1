"""Two updates of LanguageTrainer on stored rollouts, for each recipe; the second's gradients go to the file argv[1].

The second is off-policy, so that ratios, clips and guards count. Plain SGD: Adam would make steps of rounding errors.
Weights are float64; TRL's fused head computes in float32 all the same.

Run alone or under a launcher: `python two_ranks.py out.pt`, `python -m torch.distributed.run --nproc-per-node 2 ...`.
"""

import random
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import language_rewards
import torch
from language_fixtures import PROMPTS, WORDS, model, settings, tokenizer
from transformers import TrainerCallback

from core import ranks
from core.batch import Batch
from core.objective.recipes import RECIPES, build
from core.scoring import Scorer
from core.train.arguments import PROVIDES
from core.train.language import LanguageTrainer

OPTIONS = {
    "gate": "unsure_of_some",
    "quality": "unsure_of_some",
    "answers": "unsure_of_some",
    "success": 0.5,
    "correct": 0.5,
}
CASES = {  # every recipe of language policies whose reduction is exact
    name: {"recipe": name, **{key: value for key, value in OPTIONS.items() if key in recipe.options}}
    for name, recipe in RECIPES.items()
    if recipe.all_needs <= PROVIDES and not recipe.options["reduction"].endswith("_local")
} | {
    "gspo, token mean": {"recipe": "gspo", "reduction": "token_mean"},
    "dapo, batch scale": {"recipe": "dapo", "scale": "batch"},
}


def stored(prompt: tuple[int, ...], n: int) -> list[int]:
    """The n-th completion of a prompt: 1 to 8 tokens, some without an end."""
    draw = random.Random(hash((prompt, n)))
    return [draw.randrange(3, 3 + len(WORDS)) for _ in range(draw.randrange(1, 8))] + [1] * draw.randrange(2)


class Stored(LanguageTrainer):
    """A trainer that is given its rollouts."""

    def _generate_single_turn(self, prompt_ids, *args, **options):
        seen = Counter()
        completions = []
        for prompt in map(tuple, prompt_ids):
            completions.append(stored(prompt, seen[prompt]))
            seen[prompt] += 1
        return completions, None


class Keep(TrainerCallback):
    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters()}


def gradients(options: dict, micro: int) -> dict[str, torch.Tensor]:
    recipe = build(options)
    micro = 5 if recipe.extra_rollouts else micro
    config = settings(steps=2, prompts=4, group=4, micro=micro, passes=2, lr=0.3, optim="sgd")
    config = replace(config, optim=replace(config.optim, max_grad_norm=0.0))
    keep = Keep()
    rewards = {name: getattr(language_rewards, name) for name in ("spread", "unsure_of_some")}
    with tempfile.TemporaryDirectory() as folder, Scorer(rewards, workers=1) as scorer:
        trainer = Stored(
            model=model().double(),
            tokenizer=tokenizer(),
            rows=[{"id": prompt, "prompt": prompt} for prompt in PROMPTS],
            scorer=scorer,
            weights=[1.0, 2.0],
            outcome="spread",
            recipe=recipe,
            config=config,
            batch=Batch.of(config, ranks.count(), recipe.extra_rollouts),
            output=Path(folder),
            callbacks=[keep],
        )
        trainer.train()
    return keep.gradients


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = {name: gradients(options, micro=4) for name, options in CASES.items()}
    if ranks.is_main():
        torch.save(made, sys.argv[1])
