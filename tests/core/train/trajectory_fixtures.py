"""What the tests of TrajectoryTrainer share: a tiny flow over maps of 8x8, a tiny forecast, and rewards that need no worker."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from core import ranks
from core.batch import Batch
from core.config import Config, FlowRollout, ForecastRollout, Optim, Run
from core.objective.composition import GIVES
from core.objective.recipes import RECIPES, build
from core.policy.flow import FlowPolicy
from core.policy.tiny_flow import TinyFlow
from core.policy.trajectory import Decisions, Trajectory, TrajectoryModule, joined, slices
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


# -- a forecast: at each of L leads, one of three classes for each of four cells; T = 4 L, in C order of (lead, cell)

CELLS, CLASSES = 4, 3


class Table(nn.Module):
    """Logits of the classes: a bias of each lead, and a slope times the cell's own number."""

    def __init__(self, leads=3):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(leads, CLASSES))
        self.slope = nn.Parameter(torch.randn(CLASSES))

    def forward(self, x, leads):
        return self.bias[leads, None] + self.slope * x[:, None, :, None]

    def reference(self):
        raise ValueError("no adapter")

    def save(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "table.pt")

    def restore(self, folder):
        self.load_state_dict(torch.load(folder / "table.pt", weights_only=True))


class Cells(TrajectoryModule):
    """A condition is {"x": (cells,), "valid": (L, cells)}; an output the classes, float32 (leads of the batch, cells)."""

    provides = GIVES["forecast"] | {"entropy"}

    @property
    def units(self):
        return self.settings.leads

    def _logps(self, x, leads, net=None):
        return (net or self.net)(x, leads).log_softmax(-1)

    @torch.no_grad()
    def rollout(self, conditions, group_size, seeds, *, batch=0, batch_size=None, asks=frozenset()):
        every, parts = self.settings.leads_every, []
        leads = min(self.settings.leads, self.settings.first_leads + batch // every) if every else self.settings.leads
        draws = [torch.rand(group_size, leads, CELLS, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        x, valid = (
            torch.from_numpy(np.stack([c[name] for c in conditions])).repeat_interleave(group_size, dim=0)
            for name in ("x", "valid")
        )
        x, draws, where = x.to(self.net.slope), torch.cat(draws), torch.arange(leads)
        for rows in slices(len(x), batch_size):
            log = self._logps(x[rows], where)
            chosen = (log.exp().cumsum(-1) < draws[rows, ..., None]).sum(-1).clamp(max=CLASSES - 1)
            state = {"x": x[rows], "chosen": chosen}
            if "divergence" in asks:
                with self.reference() as net:
                    state["reference"] = self._logps(x[rows], where, net)
            parts.append(
                Trajectory(
                    log.gather(-1, chosen[..., None]).flatten(1),
                    valid[rows, :leads].flatten(1).to(log),
                    state,
                    list(chosen.float().numpy()),
                    unit=CELLS,
                    segments=where.repeat_interleave(CELLS).expand(len(chosen), -1),
                )
            )
        return joined(parts)

    def forward(self, trajectory, steps=slice(None)):
        state = trajectory.state
        first, last, _ = steps.indices(trajectory.logps.shape[1])
        assert first % CELLS == last % CELLS == 0, "whole leads"
        leads = slice(first // trajectory.unit, last // trajectory.unit)
        log = self._logps(state["x"], torch.arange(leads.start, leads.stop))
        extras = {}
        if "reference" in state:
            extras["divergence"] = (log.exp() * (log - state["reference"][:, leads])).sum(-1).flatten(1)
        logps = log.gather(-1, state["chosen"][:, leads, :, None]).flatten(1)
        return Decisions(logps, entropy=-(log.exp() * log).sum(-1).flatten(1), extras=extras)


def forecast_rows(count=12, leads=3):
    """Rows of which about a quarter of the truth was not observed."""
    chance = np.random.default_rng(5)
    return [
        {
            "id": f"row-{i}",
            "prompt": f"forecast {i}",
            "x": chance.normal(size=CELLS).astype(np.float32),
            "truth": chance.integers(CLASSES, size=(leads, CELLS)),
            "valid": (chance.random((leads, CELLS)) < 0.75).astype(np.float32),
        }
        for i in range(count)
    ]


def hit(completions, *, truth, valid):
    """1 where the class is right; NaN where the truth was not observed."""
    return [
        np.where(v[: len(made)] > 0, made == at[: len(made)], np.nan)
        for made, at, v in zip(completions, truth, valid, strict=True)
    ]


def near(completions, *, truth, valid):
    """One value a forecast: how near the classes are, over what was observed."""
    pairs = zip(completions, truth, valid, strict=True)
    return [float(1 - np.abs(made - at[: len(made)])[v[: len(made)] > 0].mean() / 2) for made, at, v in pairs]


hit.scope = near.scope = "batch"
FORECASTS = forecast_rows()


def forecast_of(**settings):
    return ForecastRollout(**{"prompts_per_step": 2, "group_size": 4, "leads": 3, "first_leads": 3} | settings)


def cells(seed=0, double=False, **rollout):
    torch.manual_seed(seed)
    net = Table()
    return Cells(net.double() if double else net, forecast_of(**rollout))


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


def trainer(options, config, output, acting=None, rewards=None, rows=None, **more):
    """A trainer of `options` (a config's objective section, or a recipe)."""
    recipe = build(options) if isinstance(options, dict) else options
    forecast = isinstance(config.rollout, ForecastRollout)
    rewards = rewards or ({"hit": hit, "near": near} if forecast else {"bright": bright, "smooth": smooth})
    return TrajectoryTrainer(
        policy=acting or (cells if forecast else policy)(**vars(config.rollout)),
        condition=(lambda row: row) if forecast else condition,
        rows=rows or (FORECASTS if forecast else ROWS),
        scorer=Scorer(rewards, workers=1),
        weights=[1.0, 2.0, 0.5][: len(rewards)],
        outcome=next(iter(rewards)),
        recipe=recipe,
        config=config,
        batch=Batch.of(config, ranks.count(), recipe.extra_rollouts),
        output=Path(output),
        **more,
    )


def weights(made) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.policy.net.named_parameters()}


def options(name, gate="bright", quality="smooth"):
    """A recipe with what it must be told, and a KL where it has one in closed form."""
    told = {
        "epsilon_low": 0.2, "epsilon_high": 0.2, "gate": gate, "quality": quality, "answers": quality, "success": 0.5,
        "correct": 0.5, "beta": 0.1,
    }  # fmt: skip
    known = RECIPES[name].options
    more = {key: value for key, value in told.items() if key in known}
    if "beta" in more and "ref_logps" in RECIPES[name](beta=0.1).all_needs:
        del more["beta"]
    if str(known.get("reduction", "")).endswith("_local"):
        more["reduction"] = "token_mean"
    return {"recipe": name, **more}


class Gradients(TrainerCallback):
    """The gradient of the last update, before the optimizer takes it."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradients(recipe, tmp_path, steps=2, double=True, rollout=None, rewards=None, **more):
    """Of the second update on one generation batch: off-policy, so that ratios, clips and guards count."""
    seen = Gradients()
    rollout = rollout or rollout_of(iterations=2)
    config = settings(steps=steps, lr=0.05, rollout=rollout, **more)
    acting = (cells if isinstance(rollout, ForecastRollout) else policy)(double=double, **vars(rollout))
    made = trainer(recipe, config, tmp_path, acting, rewards, callbacks=[seen])
    made.train()
    return seen.found


def largest(one, two):
    """The largest difference, relative to the largest entry of its tensor; before a norm a bias has none but for rounding."""
    least = 1e-6 * max(float(part.abs().max()) for part in one.values())
    return max(float((one[k] - two[k]).abs().max() / one[k].abs().max().clamp(min=least)) for k in one)
