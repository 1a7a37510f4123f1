"""PublicLoop: the public flow loop, which benchmarks/bench_flow_loop.py holds the trajectory trainer against.

It does, operation for operation, what one process of Flow-GRPO's public code does in an iteration (arXiv
2505.05470, scripts/train_sd3.py as of July 2025; read, not copied):

    1  per sampling batch: the condition of every row is encoded, so a prompt's G times; fresh noise for every row
    2  every step, the last one too: one forward pass of the batch, with guidance of twice the batch (the empty prompt
       first); an SDE step with noise; the log-probability of every element, then its mean; all states are kept
    3  rewards run in a pool of threads beside the next batch's sampling and are awaited after the last
    4  states are stacked, split into before and after, joined over batches; the reward is repeated along the steps
    5  advantages in numpy, prompt by prompt keyed by text: mean per prompt, deviation of the whole batch; group statistics
       again for the log
    6  rows whose advantages are all 0 are dropped; the others shuffled and cut into as many batches as were sampled
    7  per batch and step, all but the last step: one forward pass with gradient (with guidance of twice the batch, the
       empty prompt's half detached afterwards); with a KL one more of the reference; the step's place is looked up by its
       timestep row by row; clipped loss, five metrics; loss / (batches x steps) backward
    8  after half of the batches: gradients clipped, AdamW, metrics averaged; two updates an iteration
    9  EMA with decay 0.9 every 8 updates

Left out, in its favour: accelerate's wrappers, progress bars, pictures for the tracker, text encoder and image decoder.
"""

from __future__ import annotations

import copy
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from bench_trainer import SEED
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from trainer_rewards import left_brighter

from core.policy.kernel import Schedule
from core.policy.tiny_flow import TinyFlow

UPDATES = 2  # of a sampled batch, in their loop a fixed choice
LR, WEIGHT_DECAY, CLIP_NORM, EMA, NOISE_LEVEL, CLIP, LIMIT = 3e-4, 1e-4, 1.0, 0.9, 0.7, 1e-4, 5.0


@dataclass(frozen=True)
class Size:
    """A net and a batch; prompts: of one update."""

    width: int
    levels: int
    pixels: int
    prompts: int
    group: int
    steps: int
    rounds: int

    @property
    def rows(self) -> list[dict[str, Any]]:
        chance = np.random.default_rng(SEED)
        return [
            {
                "id": f"row-{i}",
                "prompt": f"move the square {word} by 4",
                "image": chance.random((self.pixels,) * 2 + (3,), "f"),
            }
            for i, word in enumerate(["left", "right", "up", "down"] * self.prompts)
        ]

    def net(self, double: bool = False) -> TinyFlow:
        torch.manual_seed(SEED)
        net = TinyFlow(width=self.width, levels=self.levels)
        nn.init.normal_(net.leave[-1].weight, std=0.05)  # as it starts, no gradient would pass its last layer
        return net.double() if double else net


@dataclass(frozen=True)
class Setting:
    """What both sides are asked to do."""

    name: str
    guidance: float
    beta: float


def condition(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": row["prompt"], "image": row["image"]}


class PublicLoop:
    """The public loop; the module docstring lists its operations. plain: bare SGD at lr 1, to compare gradients."""

    def __init__(self, size: Size, setting: Setting, net: TinyFlow, pool: Executor | None = None, plain: bool = False):
        self.size, self.setting, self.net, self.pool = size, setting, net, pool
        self.batch = size.prompts * size.group
        self.reference = copy.deepcopy(net).requires_grad_(False)
        self.weights = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = (
            torch.optim.SGD(self.weights, lr=1.0)
            if plain
            else torch.optim.AdamW(self.weights, lr=LR, weight_decay=WEIGHT_DECAY)
        )
        self.max_norm = math.inf if plain else CLIP_NORM
        self.averaged = [p.detach().clone() for p in self.weights]
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.scheduler.set_timesteps(sigmas=list(Schedule.uniform(size.steps).sigmas[:-1]))
        self.sigmas = self.scheduler.sigmas.to(self.weights[0].dtype)
        self.chance = random.Random(SEED)
        self.updates = 0

    def iteration(self, _: Any = None) -> int:
        before = self.updates
        self.learn(self.credited(self.sample()))
        return self.updates - before

    # Operations 1 to 4.

    @torch.no_grad()
    def sample(self) -> dict[str, Any]:
        parts = []
        chosen = self.chance.sample(self.size.rows, self.size.prompts * UPDATES)
        for at in range(UPDATES):
            share = chosen[at * self.size.prompts : (at + 1) * self.size.prompts]
            rows = self.chance.sample(share * self.size.group, self.batch)
            given = self.net.encode([condition(row) for row in rows])
            x = torch.randn(self.batch, *self.net.noise_shape(given), dtype=self.sigmas.dtype)
            states, logps = [x], []
            for timestep in self.scheduler.timesteps:
                many = timestep.expand(self.batch)
                v = self._velocity(self.net, x, many, given)
                x, logp, _, _ = self._step(v, timestep[None], x)
                states.append(x)
                logps.append(logp)
            pictures = self.net.decode(x, given)
            whole = torch.stack(states, dim=1)
            parts.append(
                {
                    "prompts": [row["prompt"] + row["id"] for row in rows],
                    "given": given,
                    "timesteps": self.scheduler.timesteps.repeat(self.batch, 1),
                    "latents": whole[:, :-1],
                    "next_latents": whole[:, 1:],
                    "logps": torch.stack(logps, dim=1),
                    "rewards": self.pool.submit(left_brighter, pictures),
                }
            )
        for part in parts:
            part["rewards"] = torch.as_tensor(part["rewards"].result()).float()
        return joined(parts)

    def _velocity(self, net: TinyFlow, x: Tensor, timestep: Tensor, given: dict[str, Tensor]) -> Tensor:
        sigma = (timestep / 1000).to(x.dtype)
        if self.setting.guidance == 1.0:
            return net.velocity(x, sigma, given)
        empty = net.unconditional(given)
        twice = {name: torch.cat([empty[name], part]) for name, part in given.items()}
        free, told = net.velocity(torch.cat([x] * 2), torch.cat([sigma] * 2), twice).chunk(2)
        free = free.detach()
        return free + self.setting.guidance * (told - free)

    def _step(self, v: Tensor, timestep: Tensor, x: Tensor, after: Tensor | None = None) -> tuple[Tensor, ...]:
        """Next state (drawn unless given), log-probability, mean and sd, computed element by element."""
        at = [self.scheduler.index_for_timestep(one) for one in timestep]
        sigma, sigma_next = (self.sigmas[[i + step for i in at]].view(-1, *[1] * (x.dim() - 1)) for step in (0, 1))
        dt = sigma_next - sigma
        sd = NOISE_LEVEL * torch.sqrt(sigma / (1 - torch.where(sigma == 1, self.sigmas[1].item(), sigma)))
        mean = x * (1 + sd**2 / (2 * sigma) * dt) + v * (1 + sd**2 * (1 - sigma) / (2 * sigma)) * dt
        std = sd * torch.sqrt(-dt)
        if after is None:
            after = mean + std * torch.randn_like(mean)
        logp = -((after.detach() - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
        return after, logp.mean(dim=tuple(range(1, x.dim()))), mean, sd

    # Operations 5 and 6.

    def credited(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        """Adds advantages (B, T), and drops what only they need."""
        prompts = np.array(samples.pop("prompts"))
        steps = samples["logps"].shape[1]
        rewards = samples.pop("rewards").unsqueeze(1).repeat(1, steps).numpy().astype(np.float64)
        advantages, deviations = np.zeros_like(rewards), []
        spread = np.std(rewards, axis=0, keepdims=True) + 1e-4
        for prompt in np.unique(prompts):
            own = rewards[prompts == prompt]
            advantages[prompts == prompt] = (own - np.mean(own, axis=0, keepdims=True)) / spread
        for group in np.unique(prompts):
            deviations.append(np.std(rewards[prompts == group]))
        self.info = {"zero_std_ratio": np.mean(np.array(deviations) == 0), "reward": rewards.mean()}
        samples["advantages"] = torch.as_tensor(advantages)
        told = samples["advantages"].abs().sum(dim=1) != 0
        if missing := -int(told.sum()) % UPDATES:
            told[(~told).nonzero().flatten()[:missing]] = True
        return taken(samples, told)

    # Operations 7 to 9.

    def learn(self, samples: dict[str, Any], shuffle: bool = True) -> None:
        count = len(samples["logps"])
        if shuffle:
            samples = taken(samples, torch.randperm(count))
        trained = samples["logps"].shape[1] - 1
        share = count // UPDATES
        for first in range(0, count, share):
            batch = taken(samples, torch.arange(first, first + share))
            info = defaultdict(list)
            for j in range(trained):
                loss = self._loss(batch, j, info)
                (loss / trained).backward()
            nn.utils.clip_grad_norm_(self.weights, self.max_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.info |= {name: torch.mean(torch.stack(values)).item() for name, values in info.items()}
            self.updates += 1
            self._average()

    def _loss(self, batch: dict[str, Any], j: int, info: dict[str, list[Tensor]]) -> Tensor:
        x, timestep, given = batch["latents"][:, j], batch["timesteps"][:, j], batch["given"]
        after, old = batch["next_latents"][:, j], batch["logps"][:, j]
        _, logp, mean, sd = self._step(self._velocity(self.net, x, timestep, given), timestep, x, after)
        advantages = torch.clamp(batch["advantages"][:, j], -LIMIT, LIMIT)
        ratio = torch.exp(logp - old)
        policy = torch.mean(torch.maximum(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - CLIP, 1 + CLIP)))
        loss = policy
        if self.setting.beta:
            with torch.no_grad():
                v = self._velocity(self.reference, x, timestep, given)
                _, _, anchor, _ = self._step(v, timestep, x, after)
            divergence = torch.mean(((mean - anchor) ** 2).mean(dim=(1, 2, 3), keepdim=True) / (2 * sd**2))
            loss = policy + self.setting.beta * divergence
            info["kl"].append(divergence.detach())
        info["approx_kl"].append(0.5 * torch.mean((logp - old).detach() ** 2))
        info["clipped"].append(torch.mean((torch.abs(ratio - 1.0) > CLIP).float()))
        info["clipped_high"].append(torch.mean((ratio - 1.0 > CLIP).float()))
        info["clipped_low"].append(torch.mean((1.0 - ratio > CLIP).float()))
        info["loss"].append(loss.detach())
        return loss

    @torch.no_grad()
    def _average(self) -> None:
        if (self.updates + 1) % 8 == 0:
            decay = min((1 + self.updates) / (10 + self.updates), EMA)
            for mean, now in zip(self.averaged, self.weights, strict=True):
                mean.add_((1 - decay) * (now - mean))


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Samples of several batches as one."""
    first = parts[0]
    whole = {name: torch.cat([part[name] for part in parts]) for name, value in first.items() if torch.is_tensor(value)}
    given = {name: torch.cat([part["given"][name] for part in parts]) for name in first["given"]}
    return {**whole, "given": given, "prompts": [prompt for part in parts for prompt in part["prompts"]]}


def taken(samples: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Some rows of all tensors, copied."""
    return {
        name: {key: part[rows] for key, part in value.items()} if isinstance(value, dict) else value[rows]
        for name, value in samples.items()
    }
