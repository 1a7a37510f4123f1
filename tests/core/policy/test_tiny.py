"""core.policy.tiny: a tokenizer that loses nothing, and a model that a seed fixes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.policy.tiny import build_model, build_tokenizer

TEXTS = ["SELECT name FROM singer WHERE age > 45", "how many singers are older than 45 ?"] * 20
TOKENIZER = build_tokenizer(TEXTS, 300)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_goes_in_and_comes_out_unchanged(text):
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_numbers_decode_without_blanks():
    """A tokenizer that decodes 45 as "4 5" silently fails every query with a number."""
    for text in ("age > 45", " 1999.5", "x=10 007", "4 5"):
        assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_a_chat_s_answer_ends_with_the_end_token():
    question, answer = {"role": "user", "content": "name?"}, {"role": "assistant", "content": "Ann"}
    asked = TOKENIZER.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    told = TOKENIZER.apply_chat_template([question, answer], tokenize=False)
    assert (asked, told) == ("name?\n", "name?\nAnn<|end|>\n")


def test_vocabulary_markers_and_padding():
    assert len(TOKENIZER) <= 300
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id) == (0, 1)
    assert TOKENIZER.padding_side == "left"
    batch = TOKENIZER(["name", "name name name"], padding=True)
    assert batch["input_ids"][0][0] == 0
    assert len(build_tokenizer(TEXTS, 258)) == 258
    with pytest.raises(ValueError, match=r"model.vocabulary=257 cannot hold the 256 bytes .*use 258 or more"):
        build_tokenizer(TEXTS, 257)


def test_a_seed_fixes_tokenizer_and_weights():
    assert build_tokenizer(TEXTS, 300).get_vocab() == TOKENIZER.get_vocab()
    first, again, other = (build_model(TOKENIZER, width=32, layers=1, heads=2, seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_the_model_is_qwen3_with_tied_weights_of_the_stated_spread():
    model = build_model(TOKENIZER, width=64, layers=1, heads=4)
    assert (model.config.model_type, model.config.vocab_size) == ("qwen3", len(TOKENIZER))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.std().item() == pytest.approx(0.8 / 64**0.5, rel=0.05)


@pytest.mark.parametrize(("width", "heads"), [(30, 4), (36, 12)])
def test_a_width_that_does_not_divide_is_refused(width, heads):
    with pytest.raises(ValueError, match=rf"model.width={width} must be an even multiple of model.heads={heads}"):
        build_model(TOKENIZER, width=width, heads=heads)
