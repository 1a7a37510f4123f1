"""core.policy.language: what cannot be loaded gets a sentence; completions depend on their prompt alone."""

import pytest
import torch

from core.config import ConfigError, Model
from core.policy.language import Sampling, complete, load, render
from core.policy.tiny import build_model, build_tokenizer

PROMPTS = ["one two three", "one", "two three", "three three three three", "four"]
TOKENIZER = build_tokenizer(PROMPTS * 20, 270)


@pytest.fixture(scope="module")
def model():
    return build_model(TOKENIZER, width=32, layers=2, heads=2).train()


def test_greedy_completions_are_those_of_each_prompt_alone(model):
    """In a batch, left-padded and sorted by length, as one by one without padding."""
    together, cut = complete(model, TOKENIZER, PROMPTS, Sampling(6, batch_size=2))
    for prompt, text, truncated in zip(PROMPTS, together, cut, strict=True):
        ids = TOKENIZER(prompt, return_tensors="pt", return_token_type_ids=False)["input_ids"]
        answer = []
        for _ in range(6):
            answer.append(
                model.eval()(torch.cat([ids, torch.tensor([answer], dtype=int)], 1)).logits[0, -1].argmax().item()
            )
            if answer[-1] == TOKENIZER.eos_token_id:
                break
        assert text == TOKENIZER.decode(answer, skip_special_tokens=True)
        assert truncated == (TOKENIZER.eos_token_id not in answer)


def test_sampling_is_fixed_by_its_seed_and_leaves_the_caller_s_randomness_and_mode(model):
    model.train()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = complete(model, TOKENIZER, PROMPTS, Sampling(6, temperature=1.0))
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert first == complete(model, TOKENIZER, PROMPTS, Sampling(6, temperature=1.0))
    assert first != complete(model, TOKENIZER, PROMPTS, Sampling(6, temperature=1.0, seed=1))


def test_the_end_token_counts_and_ends(model):
    """A model that only ever says the end is empty and not truncated."""
    always = build_model(TOKENIZER, width=32, layers=1, heads=2)
    always.generation_config.eos_token_id = [TOKENIZER.eos_token_id, 5]
    always.lm_head = torch.nn.Linear(32, len(TOKENIZER))
    with torch.no_grad():
        always.lm_head.weight.zero_()
        always.lm_head.bias.zero_()
        always.lm_head.bias[TOKENIZER.eos_token_id] = 9.0
        assert complete(always, TOKENIZER, PROMPTS[:2], Sampling(1)) == (["", ""], [False, False])
        always.lm_head.bias[5] = 99.0
        assert complete(always, TOKENIZER, PROMPTS[:2], Sampling(3))[1] == [False, False]
        always.lm_head.bias[6] = 999.0
        assert complete(always, TOKENIZER, PROMPTS[:2], Sampling(3))[1] == [True, True]


def test_prompts_are_text_or_chat():
    assert render(TOKENIZER, "as it is") == "as it is"
    assert render(TOKENIZER, [{"role": "user", "content": "hello"}]) == "hello\n"


def test_a_saved_model_loads_with_its_weights_and_completes_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    loaded, tokenizer = load(Model(), tmp_path)
    assert loaded.dtype == torch.float32
    assert tokenizer.padding_side == "left"
    assert complete(loaded, tokenizer, PROMPTS, Sampling(6)) == complete(model, TOKENIZER, PROMPTS, Sampling(6))
    assert load(Model(dtype="bfloat16"), tmp_path)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("what", ["nothing", "empty", "no weights", "pickled weights"])
def test_a_model_that_cannot_be_loaded_is_a_sentence(model, tmp_path, what):
    folder = tmp_path / "model"
    if what != "nothing":
        folder.mkdir()
    if what in ("no weights", "pickled weights"):
        model.config.save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
    if what == "pickled weights":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=rf"MODEL={folder} cannot be loaded"):
        load(Model(), folder)
