"""What the tests of LanguageTrainer share: tiny policies over twenty words, and the two trainers at the same arithmetic.

A policy has two layers of width 32, where a step takes about 30 ms. Rewards are named: those of language_rewards, and those
below that need no worker.
"""

import gc
from pathlib import Path

import language_rewards
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed
from trl import GRPOConfig, GRPOTrainer

from core.batch import Batch
from core.config import Config, LanguageRollout, Optim, Run
from core.objective.recipes import RECIPES
from core.policy.tiny import build_model
from core.pool import Limits, Pool
from core.scoring import Scorer
from core.train.language import LanguageTrainer

gc.freeze()  # Trainer.train collects garbage twice, which takes 0.2 s over everything that was imported

WORDS = [
    "red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps", "eats", "big",
    "small", "old", "new", "one", "two", "three", "on", "under", "and", "or",
]  # fmt: skip
PROMPTS = [f"{a} {b}" for a in WORDS[:4] for b in WORDS[4:7]]  # twelve: six batches of two in the first epoch


def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", padding_side="left"
    )


def model(seed=0):
    return build_model(tokenizer(), width=32, layers=2, heads=2, context=64, seed=seed)


def mixture_of_experts(seed=0):
    """Four experts, two a token; the router's balance loss is for the trainer to switch on."""
    words = tokenizer()
    set_seed(seed)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_experts=4,
            num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            max_position_embeddings=64, initializer_range=0.1, pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id, bos_token_id=None,
        )
    )  # fmt: skip


def settings(steps=4, prompts=2, group=4, micro=4, parts=1, passes=2, lr=1e-2, seed=0, control="none", **trainer):
    rollout = {"prompts_per_step": prompts, "group_size": group, "steps_per_batch": parts, "iterations": passes}
    return Config(
        task=None,
        rollout=LanguageRollout(**rollout, max_completion_length=8),
        optim=Optim(steps=steps, lr=lr, micro_batch=micro),
        run=Run(seed=seed, control=control, save_every=1),
        trainer={"gradient_checkpointing": False, "save_strategy": "no"} | trainer,
    )


def no_colour_first(completions):
    """0.7 unless the first of the words is a colour, 0.3 then: many groups without spread."""
    return [0.3 if completion.split()[:1] in (["red"], ["green"], ["blue"]) else 0.7 for completion in completions]


def early_end(completions):
    """Does not apply to a completion of eight words."""
    return [1 / (1 + n) if (n := len(completion.split())) < 8 else None for completion in completions]


def has_colour(completions):
    """Right or wrong: whether a colour is in it."""
    return [float(any(word in completion.split() for word in ("red", "green", "blue"))) for completion in completions]


def constant(completions):
    return [0.7 for _ in completions]


no_colour_first.scope = early_end.scope = has_colour.scope = constant.scope = "batch"


def reward_named(name):
    return getattr(language_rewards, name, None) or globals()[name]


def one_worker():
    """A warm worker, for all tests of a module."""
    return Pool(Limits(workers=1, timeout_s=10.0, memory_mb=1024))


def language_trainer(
    workers, folder, recipe=RECIPES["grpo"], config=None, rewards=("spread",), weights=None, policy=None,
    prompts=PROMPTS, **more,
):  # fmt: skip
    config = config or settings()
    return LanguageTrainer(
        model=policy or model(),
        tokenizer=tokenizer(),
        rows=[{"id": f"row-{i}", "prompt": prompt} for i, prompt in enumerate(prompts)],
        scorer=Scorer({name: reward_named(name) for name in rewards}, pool=workers),
        weights=weights or [1.0] * len(rewards),
        outcome=rewards[0],
        recipe=recipe,
        config=config,
        batch=Batch.of(config, extra_rollouts=recipe.extra_rollouts),
        output=Path(folder) / "ours",
        **more,
    )


def stock_trainer(folder, config=None, rewards=("spread",), weights=None, policy=None, peft_config=None, **arguments):
    """trl.GRPOTrainer as anyone would write it, at the same batch arithmetic."""
    config = config or settings()
    batch = Batch.of(config)

    def in_trl_s_form(name):
        function = reward_named(name)

        def reward(completions, **_):
            return function(completions) if hasattr(function, "scope") else [function(text) for text in completions]

        reward.__name__ = name
        return reward

    defaults = {
        "output_dir": str(Path(folder) / "stock"), "max_steps": config.optim.steps, "learning_rate": config.optim.lr,
        "lr_scheduler_type": "constant", "per_device_train_batch_size": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
        "steps_per_generation": batch.accumulation * batch.steps_per_batch, "num_iterations": batch.iterations,
        "num_generations": batch.group, "max_completion_length": 8, "bf16": False, "use_cpu": True,
        "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "top_k": 0,
        "disable_tqdm": True, "seed": 0, "reward_weights": weights,
    }  # fmt: skip
    return GRPOTrainer(
        model=policy or model(),
        reward_funcs=[in_trl_s_form(name) for name in rewards],
        args=GRPOConfig(**defaults | arguments),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def train(trainer, **options):
    """Trains, and returns the weights."""
    torch.manual_seed(0)
    trainer.train(**options)
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(a, b):
    """Equal weights, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]
