"""The arena's task: two-digit additions under an annotator who slips, with a known optimum and an exact measure.

Prompts are all of `40+10=` .. `79+49=`; answers have two or three digits and an end token. The warm start imitates an
annotator who is right less often the more carries a sum has, and who otherwise forgets a carry or is one off in a digit.
So the policy's mistakes are those of a rule, differ in frequency from prompt to prompt, and can be unlearned. It also
imitates copying an answer that it is shown, whatever it is worth: a recipe with a teacher that sees one needs a policy that
can read it.

Probabilities are the policy's own (temperature 1, nothing cut off), every prompt is asked, and the prompt's one right
answer is teacher-forced: the measured accuracy is an expectation without sampling noise. Its optimum is 1.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from core.train.asked import shown
from rewards.score import batched

Row = dict[str, Any]
END, CHARACTERS = "<end>", "0123456789+=|"  # the last stands for any other text
LONGEST = 4  # tokens of an answer, the end token among them
RIGHT = (0.55, 0.30, 0.15)  # share of right labels of sums with 0, 1 and 2 carries
FORGETS = 0.7  # share of the wrong labels of sums with a carry in which one is forgotten; the rest are one off


def problems() -> list[Row]:
    """All 1600 prompts, in a fixed random order: id, prompt, answer, carries, held_out (every fourth)."""
    pairs = [(a, b) for a in range(40, 80) for b in range(10, 50)]
    random.Random(0).shuffle(pairs)
    return [
        {
            "id": f"{a}+{b}",
            "prompt": f"{a}+{b}=",
            "answer": str(a + b),
            "carries": (a % 10 + b % 10 > 9) + (a + b > 99),
            "held_out": i % 4 == 0,
        }
        for i, (a, b) in enumerate(pairs)
    ]


def label(row: Row, draw: random.Random) -> str:
    """What the annotator writes: the answer, the sum without one of its carries, or one off in its units or tens."""
    answer = int(row["answer"])
    if draw.random() < RIGHT[row["carries"]]:
        return str(answer)
    if row["carries"] and draw.random() < FORGETS:
        units = sum(int(number) % 10 for number in row["id"].split("+"))
        return str(answer - draw.choice([10] * (units > 9) + [100] * (answer > 99)))
    return str(answer + draw.choice((-1, 1)) * draw.choice((1, 10)))


def demonstrations(seed: int, labels: int) -> tuple[list[str], list[str]]:
    """(prompts, completions) to imitate: `labels` labels of each prompt not held out, every second one also to copy."""
    draw, prompts, completions = random.Random(seed), [], []
    for row in problems():
        if not row["held_out"]:
            written = [label(row, draw) for _ in range(labels)]
            prompts += [row["prompt"]] * labels + [shown(row["prompt"], text) for text in written[::2]]
            completions += written + written[::2]
    return prompts, completions


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character. Padding is the end token, so no token but the end vanishes from a completion's text."""
    characters = Tokenizer(models.WordLevel({text: i for i, text in enumerate([END, *CHARACTERS])}))
    characters.normalizer = normalizers.Replace(Regex(f"[^{CHARACTERS}]+"), CHARACTERS[-1])
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token=END, eos_token=END, padding_side="left")


# -- rewards: all in [0, 1] --------------------------------------------------------------------------------------------


@batched
def exact(completions: Sequence[str], *, answer: Sequence[str]) -> list[float]:
    """1 for the right answer and nothing else. One cut off by the length limit is longer than any answer."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


@batched
def digits(completions: Sequence[str], *, answer: Sequence[str]) -> list[float]:
    """Share of characters that stand where the right answer has them; of the longer of the two."""
    return [
        sum(a == b for a, b in zip(text, right, strict=False)) / max(len(text), len(right))
        for text, right in zip(completions, answer, strict=True)
    ]


@batched
def identity(completions: Sequence[str]) -> list[float]:
    """Equal exactly where the answers are: their characters as the decimals of a number, in base 14."""
    base = len(CHARACTERS) + 1
    return [sum((CHARACTERS.index(c) + 1) / base ** (i + 1) for i, c in enumerate(text)) for text in completions]


# -- the measure -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """Of N prompts: log-probability (N,) of the right answer, nats; whether greedy decoding gives it (N,) bool; and the
    policy's entropy (N,), nats, averaged over the decisions along the right answer."""

    logps: torch.Tensor
    greedy: torch.Tensor
    entropy: torch.Tensor


@torch.no_grad()
def right_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> Answers:
    """In one forward pass. Greedy decoding gives the answer if and only if each of its tokens is the likeliest."""
    prompts = torch.tensor(tokenizer([row["prompt"] for row in rows])["input_ids"], device=model.device)
    answers = tokenizer([row["answer"] + END for row in rows], padding=True, padding_side="right", return_tensors="pt")
    ids, mask = answers["input_ids"].to(model.device), answers["attention_mask"].to(model.device).bool()
    training = model.training
    model.eval()
    logits = model(input_ids=torch.cat([prompts, ids], dim=1), logits_to_keep=ids.shape[1] + 1).logits[:, :-1]
    model.train(training)
    logps = logits.log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    return Answers(
        logps=(logps.gather(2, ids.unsqueeze(2)).squeeze(2) * mask).sum(1),
        greedy=((logits.argmax(2) == ids) | ~mask).all(1),
        entropy=(entropy * mask).sum(1) / mask.sum(1),
    )
