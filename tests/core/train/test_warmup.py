"""core.train.warmup: imitation learns what it is shown, on the tokens it is told to, the same way each time."""

import logging

import pytest
import torch

from core.policy.language import Sampling, complete
from core.policy.tiny import build_model, build_tokenizer
from core.train import warmup
from core.train.warmup import cache_key, imitate, quiet

PROMPTS = ["red ->", "green ->", "blue ->", "old ->"] * 4
ANSWERS = [" apple", " grass", " sky", " stone"] * 4
TOKENIZER = build_tokenizer([p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)] * 5, 290)


def model():
    return build_model(TOKENIZER, width=32, layers=1, heads=2)


def started(tmp_path, steps=5, answers=ANSWERS, prompts=PROMPTS, **options):
    made = model()
    settings = {"batch_size": 8, "lr": 1e-2, "seed": 0, "output": tmp_path} | options
    return imitate(made, TOKENIZER, prompts, answers, steps=steps, **settings)


def test_demonstrations_are_imitated_to_the_end_token(tmp_path):
    logs = []
    made = started(tmp_path, 60, on_log=lambda step, metrics: logs.append((step, metrics["loss"])))
    assert complete(made, TOKENIZER, PROMPTS[:4], Sampling(12)) == (ANSWERS[:4], [False] * 4)
    assert logs[-1][0] == 60
    assert logs[-1][1] < 0.1 * logs[0][1]


def test_one_process_may_make_it_though_it_sees_several_gpus(tmp_path, monkeypatch):
    """GPUS=n: the launcher makes the warm start, and TRL refuses a trainer that sees more than one GPU."""

    class TwoGpus(warmup.SFTConfig):
        def __post_init__(self):
            super().__post_init__()
            assert self.n_gpu <= 1  # sets it
            self._n_gpu = 2

    monkeypatch.setattr(warmup, "SFTConfig", TwoGpus)
    started(tmp_path, 1)


def test_chat_prompts_work_too(tmp_path):
    chat = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    made = started(tmp_path, 60, prompts=chat)
    assert [text.strip() for text in complete(made, TOKENIZER, chat[:4], Sampling(12))[0]] == [
        answer.strip() for answer in ANSWERS[:4]
    ]


@pytest.mark.parametrize("prompt_loss", [False, True])
def test_the_prompt_carries_loss_only_if_asked(tmp_path, prompt_loss):
    """The model learns to say the prompt's own words only when they are in the loss."""
    made = started(tmp_path, 40, prompt_loss=prompt_loss).eval()
    ids = TOKENIZER("red", return_tensors="pt")["input_ids"]
    arrow = TOKENIZER(" ->")["input_ids"][0]
    assert (made(ids).logits[0, -1].softmax(-1)[arrow] > 0.5) == prompt_loss


def test_the_same_seed_gives_the_same_bits(tmp_path):
    first, again, other = (started(tmp_path, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_time_limit_stops_it(tmp_path):
    steps = []
    started(tmp_path, 100_000, seconds=0.3, on_log=lambda step, _: steps.append(step))
    assert steps == [] or steps[-1] < 10_000


@pytest.mark.parametrize(("prompts", "answers"), [(PROMPTS, ANSWERS[:-1]), ([], [])])
def test_unequal_or_no_demonstrations_are_refused(tmp_path, prompts, answers):
    with pytest.raises(ValueError, match=f"{len(prompts)} prompts and {len(answers)} completions"):
        started(tmp_path, prompts=prompts, answers=answers)


def test_the_cache_key_depends_on_every_part_and_on_nothing_else():
    key = cache_key("app", {"a": 1, "b": 2}, 0)
    assert key == cache_key("app", {"b": 2, "a": 1}, 0)
    assert len({key, cache_key("app", {"a": 1, "b": 3}, 0), cache_key("app", {"a": 1, "b": 2}, 1)}) == 3


def test_other_libraries_are_quiet_only_inside():
    before = logging.getLogger("trl").level
    with quiet():
        assert logging.getLogger("trl").level == logging.ERROR
    assert logging.getLogger("trl").level == before
