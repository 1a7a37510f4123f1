"""What a recipe asks of a language policy beyond rewards and its own log-probabilities (core.objective.group.Model).

Each question is one more pass over the generation batch, without gradient, and each needs whole logits where TRL's fused
head gives log-probabilities alone: `Whole` stands in for the model in TRL's own pass and computes what is asked.

The teacher is the policy with averaged weights and a prompt that shows a right sibling, as in TRL's experimental
self-distillation (arXiv 2604.02288 routes wrong rollouts to it). It rates the tokens that the policy wrote; nothing is
sampled. Only the weights that are trained are averaged, so that of a LoRA policy it keeps the adapter's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback

from core.objective.modulation import token_influence

AVERAGING = 0.05  # share of the policy in the teacher's weights after each step; TRL's default for self-distillation
SHOWN = "{prompt}\n\nThis is a correct answer:\n\n{answer}\n\nNow answer the question yourself."

Look = Callable[[Tensor, Tensor, Any], None]  # (logits (b, T, V) float32, token ids (b, T), the model's output)


class Whole:
    """A model for TRL's pass over (prompt, completion): log-probabilities and entropies from whole logits.

    keep: T, completion tokens. temperature: divides the logits. look: called with each batch's logits.
    more: further arguments of the forward pass.
    """

    def __init__(self, model: Any, keep: int, temperature: float, look: Look | None = None, **more: Any):
        self.model, self.keep, self.temperature, self.look, self.more = model, keep, temperature, look, more

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **inputs: Tensor) -> SimpleNamespace:
        outputs = self.model(**inputs, **self.more)
        logits = outputs.logits[:, -self.keep - 1 : -1].float() / self.temperature
        ids = inputs["input_ids"][:, -self.keep :]
        if self.look:
            self.look(logits, ids, outputs)
        logs = logits.log_softmax(dim=-1)
        return SimpleNamespace(
            log_probs=logs.gather(2, ids.unsqueeze(2)).squeeze(2),
            entropy=-(logs.exp() * logs).sum(dim=-1),
            aux_loss=getattr(outputs, "aux_loss", None),
        )


class Asked:
    """The answers for one generation batch, of all ranks; each rank asks its own model about its own whole groups.

    forward(model, rows): TRL's pass over the rank's rows (a slice or indices), in micro-batches: (log-probs, entropies).
    gathered: (local B, T) -> (B, T) of all ranks. model, temperature: the policy and its sampler's.
    ids, mask: (local B, T), tokens and those that carry loss. size: G. micro: rows in one pass.
    teacher: None if the recipe needs none. siblings: (prompts, texts) of the rank's rows.
    After `teach`, `rows` holds `teacher_ids` and `teacher_mask`, (local B, its prompt's length), for the loss.
    """

    def __init__(
        self,
        *,
        forward: Callable[[Any, Any], tuple[Tensor, Tensor]],
        gathered: Callable[[Tensor], Tensor],
        mine: slice,
        model: Any,
        temperature: float,
        ids: Tensor,
        mask: Tensor,
        size: int,
        micro: int,
        teacher: Teacher | None,
        siblings: tuple[Sequence[Any], Sequence[str]],
    ):
        self.forward, self.gathered, self.mine, self.model = forward, gathered, mine, model
        self.temperature, self.ids, self.mask, self.size = temperature, ids, mask, size
        self.micro, self.teacher, self.siblings, self.rows = micro, teacher, siblings, {}

    def tempered_logps(self, temperature: float) -> Tensor:
        whole = Whole(self.model, self.ids.shape[1], self.temperature * temperature)
        return self.gathered(self.forward(whole, slice(None))[0])

    def influence(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """Group by group, so that only one group's hidden states and columns are there at a time."""
        mine = right.flatten()[self.mine]
        parts = []
        for first in range(0, len(self.ids), self.size):
            rows = slice(first, first + self.size)
            words = self.ids[rows][self.mask[rows].bool()].unique()
            hidden, gradients = [], []

            def look(logits: Tensor, ids: Tensor, outputs: Any) -> None:
                chosen = (ids.unsqueeze(2) == words).to(logits.dtype)  # noqa: B023 - called within this turn
                share = (logits[..., words] - logits.logsumexp(dim=-1, keepdim=True)).exp()  # noqa: B023
                gradients.append(chosen - share)  # noqa: B023
                hidden.append(outputs.hidden_states[-1][:, -ids.shape[1] - 1 : -1])  # noqa: B023

            self.forward(Whole(self.model, self.ids.shape[1], self.temperature, look, output_hidden_states=True), rows)
            parts.append(token_influence(torch.cat(hidden), torch.cat(gradients), self.mask[rows], mine[rows]))
        total, own = (torch.cat(part) for part in zip(*parts, strict=True))
        return self.gathered(total), self.gathered(own)

    def teach(self, taught: Tensor, right: Tensor) -> Tensor:
        prompts, texts = self.siblings
        right = right.flatten()[self.mine].view(-1, self.size)
        first = right.int().argmax(dim=1).repeat_interleave(self.size)
        first = (first + torch.arange(len(first), device=first.device) // self.size * self.size).tolist()
        chosen = taught.flatten()[self.mine].tolist()
        asked = [shown(prompts[i], texts[first[i]]) if chosen[i] else prompts[i] for i in range(len(prompts))]
        ids, mask = self.teacher.prompts(asked, self.ids)
        self.rows = {"teacher_ids": ids, "teacher_mask": mask}
        entropy = torch.zeros(self.ids.shape, device=self.ids.device)
        for rows in torch.tensor([i for i, one in enumerate(chosen) if one], device=self.ids.device).split(self.micro):
            if len(rows):
                logs = self.teacher.logs(ids[rows], mask[rows], self.ids[rows], self.mask[rows])
                entropy[rows] = -(logs.exp() * logs).sum(dim=-1)
        return self.gathered(entropy)


class Teacher(TrainerCallback):
    """Averaged weights of the policy, and what it says to a prompt that shows a right answer.

    model: the policy, not wrapped. temperature: of the sampler. longest: tokens that the model has positions for.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, temperature: float, longest: float):
        self.model, self.tokenizer, self.temperature, self.longest = model, tokenizer, temperature, longest
        self.average = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def on_step_end(self, args, state, control, **_: Any) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.average:
                    self.average[name].lerp_(parameter.detach(), AVERAGING)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.average.items():
            value.copy_(state[name])

    @contextlib.contextmanager
    def in_charge(self) -> Iterator[None]:
        """The model has the averaged weights for as long as the context lasts."""
        own = {name: p.data for name, p in self.model.named_parameters() if name in self.average}
        try:
            for name, parameter in self.model.named_parameters():
                if name in own:
                    parameter.data = self.average[name]
            yield
        finally:
            for name, parameter in self.model.named_parameters():
                if name in own:
                    parameter.data = own[name]

    def prompts(self, asked: Sequence[Any], completions: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) token ids, padded on the left, and their mask; cut on the left to what the model has positions for."""
        encode = self.tokenizer
        chat = partial(encode.apply_chat_template, add_generation_prompt=True, tokenize=False)
        texts = [p if isinstance(p, str) else chat(p) for p in asked]
        room = int(min(self.longest - completions.shape[1], 2**20))
        rows = [
            encode(text, add_special_tokens=isinstance(p, str))["input_ids"][-room:]
            for text, p in zip(texts, asked, strict=True)
        ]
        length = max(map(len, rows))
        ids = torch.tensor([[encode.pad_token_id] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        return ids.to(completions.device), mask.to(completions.device)

    def compare(self, extras: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Look:
        """A look at a micro-batch's logits that puts `distillation`, (B, T), into its extras: KL(policy || teacher).

        0 on rows without a distillation weight, whose teacher is not asked.
        """
        taught = (extras["distillation_weight"] > 0).any(dim=1).nonzero().squeeze(1)

        def look(logits: Tensor, _ids: Tensor, _outputs: Any) -> None:
            extras["distillation"] = logits.new_zeros(mask.shape)
            if len(taught):
                prompt, prompt_mask = extras["teacher_ids"][taught], extras["teacher_mask"][taught]
                theirs = self.logs(prompt, prompt_mask, ids[taught], mask[taught])
                ours = logits[taught].log_softmax(dim=-1)
                distance = (ours.exp() * (ours - theirs)).sum(dim=-1)
                extras["distillation"] = extras["distillation"].index_copy(0, taught, distance)

        return look

    @torch.no_grad()
    def logs(self, prompt: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T, V) float32: the teacher's log-probabilities of all that could have stood at each token of `ids`."""
        with self.in_charge():
            logits = self.model(
                input_ids=torch.cat([prompt, ids], dim=1),
                attention_mask=torch.cat([prompt_mask, mask], dim=1),
                use_cache=False,
            ).logits
        return (logits[:, -ids.shape[1] - 1 : -1].float() / self.temperature).log_softmax(dim=-1)


def shown(prompt: Any, answer: str) -> Any:
    """The prompt with a right answer in it: text, or chat messages of which the last one is the user's."""
    if isinstance(prompt, str):
        return SHOWN.format(prompt=prompt, answer=answer)
    content = SHOWN.format(prompt=prompt[-1]["content"], answer=answer)
    return [*prompt[:-1], {**prompt[-1], "content": content}]
