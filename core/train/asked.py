"""What a recipe asks of a language policy beyond rewards and its own log-probabilities (core.objective.group.Model).

Each question is one more pass over the generation batch, without gradient, and each needs whole logits where TRL's fused
head gives log-probabilities alone: `Whole` stands in for the model in TRL's own pass and computes what is asked.

The teacher is the policy with averaged weights and a prompt that shows a right sibling, as in TRL's experimental
self-distillation (arXiv 2604.02288 routes wrong rollouts to it). It rates the tokens that the policy wrote; nothing is
sampled. Only the weights that are trained are averaged, so that of a LoRA policy it keeps the adapter's.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback

from core.config import ConfigError
from core.objective.modulation import token_influence

AVERAGING = 0.05  # share of the policy in the teacher's weights after each step; TRL's default for self-distillation
SHOWN = "{prompt}\n\nThis is a correct answer:\n\n{answer}\n\nNow answer the question yourself."
SLOT = "\ue000"  # of Unicode's private use: where the answer's tokens go

Look = Callable[[Tensor, Tensor, Any], None]  # (log-probabilities (b, T, V), token ids (b, T), the model's output)


class Whole:
    """A model for TRL's pass over (prompt, completion): log-probabilities and entropies from whole logits.

    keep: T, completion tokens. temperature: divides the logits. look: called with each batch's log-probabilities.
    more: further arguments of the forward pass.
    """

    def __init__(self, model: Any, keep: int, temperature: float, look: Look | None = None, **more: Any):
        self.model, self.keep, self.temperature, self.look, self.more = model, keep, temperature, look, more

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **inputs: Tensor) -> SimpleNamespace:
        logs, outputs = whole_logs(self.model, self.keep, self.temperature, **inputs, **self.more)
        ids = inputs["input_ids"][:, -self.keep :]
        if self.look:
            self.look(logs, ids, outputs)
        return SimpleNamespace(
            log_probs=logs.gather(2, ids.unsqueeze(2)).squeeze(2),
            entropy=-(logs.exp() * logs).sum(dim=-1),
            aux_loss=getattr(outputs, "aux_loss", None),
        )


def whole_logs(model: Any, keep: int, temperature: float, **inputs: Any) -> tuple[Tensor, Any]:
    """(b, T, V) float32 log-probabilities of all that could stand at the last T = keep places; and the model's output."""
    inner = getattr(model, "module", model)  # of a wrapper that spreads gradients
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if "logits_to_keep" in inspect.signature(type(inner).forward).parameters:
        inputs["logits_to_keep"] = keep + 1  # a prompt's logits may take more memory than all the rest
    outputs = model(**inputs, use_cache=False)
    logits = outputs.logits[:, -keep - 1 : -1]
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(dim=-1), outputs


class Asked:
    """The answers for one generation batch, of all ranks; each rank asks its own model about its own whole groups.

    forward(model, rows): TRL's pass over the rank's rows (a slice or indices), in micro-batches: (log-probs, entropies).
    gathered: (local B, T) -> (B, T) of all ranks. model, temperature: the policy and its sampler's.
    ids, mask: (local B, T), tokens and those that carry loss. size: G. micro: rows in one pass.
    teacher: None if the recipe needs none. prompts: of the rank's rows.
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
        prompts: Sequence[Any],
    ):
        self.forward, self.gathered, self.mine, self.model = forward, gathered, mine, model
        self.temperature, self.ids, self.mask, self.size = temperature, ids, mask, size
        self.micro, self.teacher, self.prompts, self.rows = micro, teacher, prompts, {}

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

            def look(logs: Tensor, ids: Tensor, outputs: Any) -> None:
                chosen = (ids.unsqueeze(2) == words).to(logs.dtype)  # noqa: B023 - called within this turn
                gradients.append(chosen - logs[..., words].exp())  # noqa: B023
                hidden.append(outputs.hidden_states[-1][:, -ids.shape[1] - 1 : -1])  # noqa: B023

            self.forward(Whole(self.model, self.ids.shape[1], self.temperature, look, output_hidden_states=True), rows)
            parts.append(token_influence(torch.cat(hidden), torch.cat(gradients), self.mask[rows], mine[rows]))
        total, own = (torch.cat(part) for part in zip(*parts, strict=True))
        return self.gathered(total), self.gathered(own)

    def teach(self, taught: Tensor, right: Tensor) -> Tensor:
        right = right.flatten()[self.mine].view(-1, self.size)
        first = right.int().argmax(dim=1).repeat_interleave(self.size)
        first = (first + torch.arange(len(first), device=first.device) // self.size * self.size).tolist()
        chosen = taught.flatten()[self.mine].tolist()
        marks = torch.tensor(self.teacher.tokenizer.all_special_ids, device=self.ids.device)
        plain = ~torch.isin(self.ids, marks)
        answers = [self.ids[i][plain[i]].tolist() if shows else None for i, shows in zip(first, chosen, strict=True)]
        ids, mask = self.teacher.prompts(self.prompts, answers, self.ids)
        self.rows = {"teacher_ids": ids, "teacher_mask": mask}
        entropy = torch.zeros(self.ids.shape, device=self.ids.device)
        for rows in torch.tensor([i for i, one in enumerate(chosen) if one], device=self.ids.device).split(self.micro):
            if len(rows):
                logs = self.teacher.logs(ids[rows], mask[rows], self.ids[rows], self.mask[rows])
                entropy[rows] = -(logs.exp() * logs).sum(dim=-1).to(entropy.dtype)
        return self.gathered(entropy)


class Teacher(TrainerCallback):
    """Averaged weights of the policy, and what it says to a prompt that shows a right answer.

    model: the policy, not wrapped. temperature: of the sampler. longest: tokens that the model has positions for.
    template: the trainer's own arguments of the chat template. Averages are float32, one more copy of what is trained:
    in half precision a step of AVERAGING towards a policy that moved little would round to nothing.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        temperature: float,
        longest: float,
        template: Mapping[str, Any] | None = None,
    ):
        self.model, self.tokenizer, self.temperature, self.longest = model, tokenizer, temperature, longest
        self.template = template or {}
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().to(torch.float32, copy=True) for name, p in trained.items()}

    def on_step_end(self, args, state, control, **_: Any) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.average:
                    self.average[name].lerp_(parameter.detach().float(), AVERAGING)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.average.items():
            value.copy_(state[name])

    @contextlib.contextmanager
    def in_charge(self) -> Iterator[None]:
        """The model has the averaged weights and no dropout for as long as the context lasts."""
        own = {name: (p, p.data) for name, p in self.model.named_parameters() if name in self.average}
        training = self.model.training
        try:
            self.model.eval()
            for name, (parameter, data) in own.items():
                parameter.data = self.average[name].to(data.dtype)
            yield
        finally:
            for parameter, data in own.values():
                parameter.data = data
            self.model.train(training)

    def prompts(
        self, prompts: Sequence[Any], answers: Sequence[list[int] | None], completions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, L) token ids of prompts that show an answer, padded on the left, and their mask; all padding without one.

        answers: token ids, put in as they are: text would be read anew, and what spells a mark of the chat template would
        become one. Where the model has too few positions, the answer loses its beginning, and then the prompt.
        """
        room = max(1, int(min(self.longest - completions.shape[1], 2**20)))
        rows = [[] if a is None else self._around(p, a, room) for p, a in zip(prompts, answers, strict=True)]
        length = max(map(len, rows))
        ids = [[self.tokenizer.pad_token_id] * (length - len(row)) + row for row in rows]
        mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
        return tuple(torch.tensor(part, dtype=torch.long, device=completions.device) for part in (ids, mask))

    def _around(self, prompt: Any, answer: list[int], room: int) -> list[int]:
        text, plain = shown(prompt, SLOT), isinstance(prompt, str)
        if not plain:
            text = self.tokenizer.apply_chat_template(text, add_generation_prompt=True, tokenize=False, **self.template)
        before, _, after = text.rpartition(SLOT)
        before = self.tokenizer(before, add_special_tokens=plain)["input_ids"]
        after = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        cut = max(0, len(before) + len(answer) + len(after) - room)
        return [*before, *answer[cut:], *after][-room:]

    def compare(self, extras: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Look:
        """A look at a micro-batch that puts `distillation`, (B, T), into its extras: KL(policy || teacher).

        0 on rows without a distillation weight, whose teacher is not asked.
        """
        taught = (extras["distillation_weight"] > 0).any(dim=1).nonzero().squeeze(1)

        def look(logs: Tensor, _ids: Tensor, _outputs: Any) -> None:
            extras["distillation"] = logs.new_zeros(mask.shape)
            if len(taught):
                prompt, prompt_mask = extras["teacher_ids"][taught], extras["teacher_mask"][taught]
                theirs = self.logs(prompt, prompt_mask, ids[taught], mask[taught])
                ours = logs[taught]
                distance = (ours.exp() * (ours - theirs)).sum(dim=-1)
                extras["distillation"] = extras["distillation"].index_copy(0, taught, distance)

        return look

    @torch.no_grad()
    def logs(self, prompt: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T, V) float32: the teacher's log-probabilities of all that could have stood at each token of `ids`.

        mask: (B, T), 1 on tokens that carry loss. Those before a row's last such token are seen, whoever wrote them.
        """
        start = int(prompt_mask.any(dim=0).int().argmax())  # the longest prompt may be of a row that is not here
        seen = mask.flip(1).cummax(dim=1).values.flip(1)
        with self.in_charge():
            logs, _ = whole_logs(
                self.model,
                ids.shape[1],
                self.temperature,
                input_ids=torch.cat([prompt[:, start:], ids], dim=1),
                attention_mask=torch.cat([prompt_mask[:, start:], seen], dim=1),
            )
        return logs


def shown(prompt: Any, answer: str) -> Any:
    """The prompt with a right answer in it: text, or chat messages of which the last one is the user's.

    Raises ConfigError for a chat that ends otherwise.
    """
    if isinstance(prompt, str):
        return SHOWN.format(prompt=prompt, answer=answer)
    role, content = prompt[-1]["role"], prompt[-1]["content"]
    if role != "user" or not isinstance(content, str):
        raise ConfigError(
            f"a teacher's prompt must end with the user's text, to which a right answer is added; the last message here "
            f"is of role {role!r} and {type(content).__name__}. Use a recipe without a teacher"
        )
    return [*prompt[:-1], {**prompt[-1], "content": SHOWN.format(prompt=content, answer=answer)}]
