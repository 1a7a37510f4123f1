"""LanguageTrainer: what it does that TRL does not, what it refuses, and what it relies on. TRL's bits: test_parity.py.

All on a Qwen3 of two layers and width 32 over twenty words, where a step takes about 30 ms.
"""

import ast
import inspect
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

sys.path.insert(0, str(Path(__file__).parent))  # workers get the parent's sys.path

import language_rewards
from language_fixtures import PROMPTS, language_trainer, logged, model, same, settings, train

from core.config import ConfigError, Launch
from core.objective.recipes import RECIPES, build
from core.objective.reduction import reduce_loss
from core.train import language
from core.train.language import LanguageTrainer


@pytest.fixture
def ours(workers, tmp_path):
    """A LanguageTrainer of the given recipe and settings."""
    return partial(language_trainer, workers, tmp_path)


# -- learning


def mean_reward(trainer):
    rewards = logged(trainer, "reward")
    return sum(rewards[:3]) / 3, sum(rewards[-5:]) / 5


def test_counting_a_word_is_learnt_in_thirty_steps(ours):
    trainer = ours(config=settings(steps=30, group=8, micro=16, passes=1), rewards=("counts_red",))
    train(trainer)
    before, after = mean_reward(trainer)
    assert after > 3 * before > 0
    assert logged(trainer, "ratio_deviation_max")[0] < 1e-6


@pytest.mark.parametrize("control", ["shuffled_advantages", "random_rewards"])
def test_a_control_does_not_learn_but_moves_as_far(control, ours):
    config = settings(steps=30, group=8, micro=16, passes=1, control=control)
    trainer = ours(config=config, rewards=("counts_red",))
    train(trainer)
    before, after = mean_reward(trainer)
    assert after < 3 * before
    assert sum(logged(trainer, "grad_norm")) > 1


# -- what could not be judged


def test_a_failed_check_leaves_its_row_out_and_the_rest_of_its_group_as_if_it_had_not_been(ours):
    batches, counted = [], []

    def counting(per_decision, rows):
        counted.append((float(rows.keep.sum()), rows.counts.rows, rows.counts.tokens, int(rows.loss_mask.sum())))
        return reduce_loss(per_decision, rows)

    trainer = ours(
        replace(RECIPES["grpo"], reduce=counting),
        settings(steps=2, group=8, micro=8, passes=1),
        rewards=("spread", "unsure_of_some"),
        weights=[1.0, 2.0],
        on_rollouts=lambda step, columns: batches.append(columns),
    )
    train(trainer)
    assert len(batches) == 2
    for n, columns in enumerate(batches):
        texts = columns["completion"]
        values = [
            language_rewards.spread(text) + 2 * language_rewards.unsure_of_some(text) for text in texts
        ]  # nan where the second could not judge
        total = torch.tensor(values, dtype=torch.float64).view(2, 8)
        failed = total.isnan()
        assert 0 < failed.sum() < 8
        expected = torch.zeros(2, 8, dtype=torch.float64)
        for p in range(2):
            judged = total[p][~failed[p]]
            expected[p][~failed[p]] = (judged - judged.mean()) / (judged.std() + 1e-4)
        assert columns["keep"] == (~failed).flatten().double().tolist()
        assert columns["advantage"] == pytest.approx(expected.flatten().tolist(), abs=1e-5)
        assert [a for a, bad in zip(columns["advantage"], failed.flatten().tolist(), strict=True) if bad] == [
            0.0
        ] * int(failed.sum())
        parts = counted[2 * n : 2 * n + 2]
        assert sum(kept for kept, *_ in parts) == (~failed).sum() == parts[0][1] == parts[1][1]
        assert sum(tokens for *_, tokens in parts) == parts[0][2] == parts[1][2]
    assert logged(trainer, "reward_failures/unsure_of_some")[0] == batches[0]["keep"].count(0.0)


def test_counts_are_the_generation_batch_s_shared_evenly_over_its_steps(ours):
    """Two steps from one generation batch, two micro-batches each: every token of the batch weighs the same."""
    seen = []

    def counting(per_decision, rows):
        seen.append((float(rows.counts.tokens), float(rows.counts.rows), int(rows.loss_mask.sum()), len(rows.mask)))
        return reduce_loss(per_decision, rows, reduction="token_mean")

    train(ours(replace(RECIPES["dapo"], reduce=counting), settings(parts=2, passes=1)))
    for parts in (seen[:4], seen[4:]):
        tokens, rows = (sum(part[i] for part in parts) / 2 for i in (2, 3))
        assert {part[:2] for part in parts} == {(tokens, rows)}
        assert parts[0][2] + parts[1][2] != tokens


def test_rollouts_come_grouped_by_prompt_with_scores_and_row_ids(ours):
    batches = []
    train(ours(on_rollouts=lambda step, columns: batches.append((step, columns))))
    assert [step for step, _ in batches] == [1, 3]
    columns = batches[0][1]
    assert len(set(columns["prompt_id"][:4])) == len(set(columns["prompt_id"][4:])) == 1
    assert columns["prompt"] == [PROMPTS[int(row.removeprefix("row-"))] for row in columns["prompt_id"]]
    assert columns["reward/spread"] == pytest.approx([language_rewards.spread(text) for text in columns["completion"]])


# -- going on


GOING_ON = {  # of twelve prompts, two a step: (settings, steps, the checkpoint gone on from)
    "in the first epoch": ({"passes": 1}, 8, 2),
    "at the end of an epoch": ({"passes": 1}, 8, 6),
    "in the second epoch": ({"passes": 1}, 10, 7),
    "in the third epoch": ({"passes": 1}, 15, 13),
    "with one accumulation step": ({"passes": 1, "micro": 8}, 8, 7),
    "between two passes over a batch": ({"passes": 2}, 4, 3),
    "between two passes, in the second epoch": ({"passes": 2}, 16, 13),
    "between two parts of a batch": ({"parts": 2, "passes": 1}, 8, 7),
    "between parts and passes": ({"parts": 2, "passes": 2}, 16, 14),
    "with shuffled advantages": ({"passes": 1, "control": "shuffled_advantages"}, 8, 7),
    "with the old log-probs of a KL": ({"passes": 2}, 4, 3),
}


@pytest.mark.parametrize("case", list(GOING_ON))
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(case, ours, tmp_path):
    changes, steps, at = GOING_ON[case]
    config = settings(steps=steps, **changes, save_strategy="steps", save_total_limit=None)
    recipe = build({"recipe": "grpo", "beta": 0.04}) if "KL" in case else RECIPES["grpo"]
    whole = train(ours(recipe, config))
    checkpoint = tmp_path / "ours" / f"checkpoint-{at}"
    halfway = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
    assert not same(halfway, whole)
    resumed = ours(recipe, config, policy=model(seed=1))
    assert same(train(resumed, resume_from_checkpoint=str(checkpoint)), whole)
    assert resumed.state.global_step == steps


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(ours):
    first, again, other = (train(ours(config=settings(seed=seed))) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


# -- what vLLM is given


def test_merged_lora_weights_have_trl_s_names_and_bits_and_leave_the_base_as_it_was():
    """TRL merges in place and takes the product off again, which in bfloat16 does not give the same weights back."""
    adapted = get_peft_model(
        model().bfloat16(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.05)
    sampler = VLLMGeneration.__new__(VLLMGeneration)
    sampler.model = adapted
    sampler._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda _: nullcontext())
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda model: model), model=adapted, vllm_generation=sampler
    )
    before = {name: weight.clone() for name, weight in adapted.named_parameters()}
    ours = [(name, weight.clone()) for name, weight in LanguageTrainer._merged_weights(trainer)]
    assert all(torch.equal(before[name], weight) for name, weight in adapted.named_parameters())
    theirs = [(name, weight.clone()) for name, weight in sampler._iter_named_params()]
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True))
    assert not all(torch.equal(before[name], weight) for name, weight in adapted.named_parameters())


# -- what is refused, in words


def test_a_recipe_that_needs_what_the_trainer_cannot_give_is_refused(ours):
    with pytest.raises(
        ConfigError, match=r"recipe grpo needs a reward per decision .*: the language trainer cannot give"
    ):
        ours(replace(RECIPES["grpo"], needs=frozenset({"aligned", "whole_rollouts"})))
    config = replace(settings(), launch=Launch(strategy="fsdp"))
    with pytest.raises(ConfigError, match=r"sample_routed has a teacher .* use launch.strategy=ddp"):
        ours(RECIPES["sample_routed"], config=config, rewards=("has_colour",))


def test_fewer_prompts_than_a_generation_batch_are_refused(ours):
    with pytest.raises(ConfigError, match=r"3 training prompts are fewer than the 4 .*_step=2 x steps_per_batch=2"):
        ours(config=settings(parts=2), prompts=PROMPTS[:3])
    ours(config=settings(parts=2), prompts=PROMPTS[:4])


def test_an_unknown_field_of_the_trainer_is_refused_with_the_nearest_name(ours):
    with pytest.raises(ConfigError, match="did you mean 'max_grad_norm'"):
        ours(config=settings(max_grad_norms=0.1))


def test_a_value_that_trl_refuses_is_a_sentence(ours):
    with pytest.raises(ConfigError, match="trl refuses"):
        ours(config=settings(eval_strategy="sometimes"))


def test_two_entropy_bonuses_are_refused(ours):
    with pytest.raises(ConfigError, match="both add an entropy bonus"):
        ours(build({"recipe": "grpo", "entropy_coef": 0.1}), settings(entropy_coef=0.1))


# -- the contract with the installed TRL

OVERRIDDEN = {  # method -> the parameters it is called with
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_and_score_completions": ("self", "inputs"),
    "_compute_loss": ("self", "model", "inputs"),
    "_get_train_sampler": ("self", "dataset"),
    "_save_rng_state": ("self", "output_dir"),
    "_load_rng_state": ("self", "checkpoint"),
    "_save_checkpoint": ("self", "model", "trial"),
    "_get_grad_norm": ("self", "model", "grad_norm"),
    "log": ("self", "logs", "start_time"),
}
CALLED = {  # method -> the parameters that are given by name or place
    "_get_per_token_logps_and_entropies": (
        "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy", "compute_aux_loss",
        *language.MULTIMODAL,
    ),
    "get_off_policy_mask": (
        "advantages", "per_token_logps", "sampling_per_token_logps", "mask", "off_policy_threshold",
    ),
    "get_high_entropy_mask": ("entropies", "mask", "threshold"),
    "add_callback": ("callback",),
}  # fmt: skip
ATTRIBUTES = (  # read or written: self.<name> of the trainer
    "_buffered_inputs", "_entropy_bonus_enabled", "_entropy_window_stats", "_last_world_entropy", "_metrics", "_step",
    "accelerator", "args", "aux_loss_enabled", "chat_template", "chat_template_kwargs",
    "current_gradient_accumulation_steps", "entropy_coef",
    "max_completion_length", "model", "num_generations", "num_iterations", "off_policy_mask_threshold",
    "processing_class", "reward_weights", "temperature",
    "router_aux_loss_coef", "state", "top_entropy_quantile", "use_adaptive_entropy", "use_vllm", "vllm_generation",
    "vllm_importance_sampling_correction",
)  # fmt: skip
ARGUMENTS = (
    "seed", "generation_batch_size", "steps_per_generation", "gradient_accumulation_steps", "entropy_target",
    "entropy_coef_delta", "entropy_coef_min", "entropy_coef_max",
)  # fmt: skip
OURS = {"guard", "rows", "teacher", "scorer", "recipe", "outcome", "run_control", "on_rollouts", "weights", "_judged"}
ROWS = (  # keys of what _generate_and_score_completions returns
    "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "old_per_token_logps",
    "ref_per_token_logps", "sampling_per_token_logps", "importance_sampling_ratio", "tool_mask",
)  # fmt: skip
LINES = {  # method -> text that must stand in its source, because ours relies on what it does
    "_prepare_inputs": (
        "self._step % self.args.steps_per_generation",
        "shuffle_sequence_dict(generation_batch)",
        "self._buffered_inputs = [",
    ),
    "_get_per_token_logps_and_entropies": (  # core.train.asked.Whole stands in for the model
        "outputs = model(**model_inputs, labels=labels, fused_lm_head=True)",
        "all_logps.append(outputs.log_probs[:, -logits_to_keep:])",
        "all_entropies.append(outputs.entropy[:, -logits_to_keep:])",
    ),
    "training_step": ("self._step += 1",),
    "compute_loss": ("self._compute_loss(model, inputs)",),
    "_generate_and_score_completions": (
        "self._calculate_rewards(inputs, prompts, completions, completion_ids_list)",
        "self.accelerator.process_index * len(prompts)",
    ),
    "_get_train_sampler": ("RepeatSampler(", "repeat_count=self.num_iterations * self.args.steps_per_generation"),
    "_run_epoch": (
        "self._load_rng_state(resume_from_checkpoint)",
        "epoch_iterator = iter(train_dataloader)",
        "grad_norm = self._get_grad_norm(model, grad_norm=grad_norm)",
    ),
}


def moved():
    """What core/train/language.py relies on and the installed TRL no longer has."""
    found = []
    for name, parameters in OVERRIDDEN.items():
        method = getattr(GRPOTrainer, name, None)
        if method is None or tuple(inspect.signature(method).parameters) != parameters:
            found.append(f"method {name}{parameters}")
    for name, parameters in CALLED.items():
        method = getattr(GRPOTrainer, name, None)
        there = inspect.signature(method).parameters if method else ()
        found += [f"parameter {parameter} of {name}" for parameter in parameters if parameter not in there]
    assigned = set(re.findall(r"self\.(\w+)(?:: [^=\n]+)? = ", trl_source()))
    found += [f"attribute {name}" for name in ATTRIBUTES if name not in assigned]
    found += [f"argument {name}" for name in ARGUMENTS if name not in GRPOConfig.__dataclass_fields__]
    made = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    found += [f"row tensor {name}" for name in ROWS if f'"{name}"' not in made]
    for name, lines in LINES.items():
        text = inspect.getsource(getattr(GRPOTrainer, name))
        found += [f"in {name}: {line}" for line in lines if line not in text]
    return found


def trl_source():
    return "".join(inspect.getsource(kind) for kind in GRPOTrainer.__mro__ if issubclass(kind, Trainer))


def test_trl_still_has_everything_that_the_language_trainer_relies_on():
    assert moved() == [], "TRL moved these; read its grpo_trainer.py before changing core/train/language.py"


def test_the_contract_lists_every_attribute_of_trl_that_is_used():
    tree = ast.parse(inspect.getsource(LanguageTrainer))
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    own |= OURS
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    assert used - own - set(CALLED) <= set(ATTRIBUTES)
    assert set(OVERRIDDEN) <= own


def test_no_attribute_of_ours_is_one_of_trl_s():
    """transformers.Trainer has a `control` of its own: a control of that name was silently never run."""
    assert {name for name in OURS if re.search(rf"self\.{name}\b", trl_source())} == set()
