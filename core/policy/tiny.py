"""A small causal language model and its tokenizer, built from nothing: the offline default's policy.

The architecture is Qwen3's (transformers' own class), so every line that runs on the tiny model runs on the real one. The
tokenizer is byte-level BPE over the app's own text: any string goes in and comes out unchanged (a tokenizer that decodes 45
as "4 5" fails every query with a number, silently).
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

PAD, END = "<|pad|>", "<|end|>"
CHAT = (  # an assistant's turn ends with the end token, so that imitating one teaches to end
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
)


def build_tokenizer(texts: Iterable[str], vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """Byte-level BPE with at most `vocabulary` tokens (at least 258: bytes, padding, end).

    Raises ValueError if the vocabulary cannot hold all bytes.
    """
    if vocabulary < 258:
        raise ValueError(f"model.vocabulary={vocabulary} cannot hold the 256 bytes and two markers; use 258 or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[PAD, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    context: int = 1024,
    seed: int = 0,
) -> Qwen3ForCausalLM:
    """A randomly initialised model; float32, tied embeddings, feed-forward of three widths, half as many key-value heads.

    Weights start at a standard deviation of 0.8 / sqrt(width): the 0.02 that suits wide models makes narrow ones learn
    more slowly.
    Raises ValueError if the width does not divide into heads of even size.
    """
    if width % heads or (width // heads) % 2:
        raise ValueError(f"model.width={width} must be an even multiple of model.heads={heads}")
    set_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2),
            head_dim=width // heads,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            initializer_range=0.8 / width**0.5,
        )
    )
