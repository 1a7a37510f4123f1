"""LanguageTrainer against stock trl.GRPOTrainer, bit for bit; what it refuses; what it does that TRL does not.

All on a Qwen3 of two layers and width 32 over twenty words, where a step takes about 30 ms.
"""

import ast
import inspect
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).parent))  # workers get the parent's sys.path

import language_rewards

from core import config as configs
from core.config import Config, ConfigError, Optim, Rollout, Run
from core.objective.recipes import RECIPES, build
from core.objective.reduction import reduce_loss
from core.policy.tiny import build_model
from core.pool import Limits, Pool
from core.scoring import Scorer
from core.train import language
from core.train.language import LanguageTrainer

WORDS = [
    "red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps", "eats", "big",
    "small", "old", "new", "one", "two", "three", "on", "under", "and", "or",
]  # fmt: skip
PROMPTS = [f"{a} {b}" for a in WORDS[:4] for b in WORDS[4:7]]  # twelve: six batches of two in the first epoch
STEPS = 4


def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", padding_side="left"
    )


def model(seed=0):
    return build_model(tokenizer(), width=32, layers=2, heads=2, context=64, seed=seed)


def settings(steps=STEPS, prompts=2, group=4, micro=4, parts=1, passes=2, seed=0, control="none", **trainer):
    rollout = {"prompts_per_step": prompts, "group_size": group, "steps_per_batch": parts, "iterations": passes}
    return Config(
        task=None,
        rollout=Rollout(**rollout, max_completion_length=8),
        optim=Optim(steps=steps, lr=1e-2, micro_batch=micro),
        run=Run(seed=seed, control=control, save_every=1),
        trainer={"gradient_checkpointing": False, "save_strategy": "no"} | trainer,
    )


@pytest.fixture(scope="module")
def workers():
    """One warm worker for all tests."""
    pool = Pool(Limits(workers=1, timeout_s=10.0, memory_mb=1024))
    yield pool
    pool.close()


@pytest.fixture
def ours(workers, tmp_path):
    """A LanguageTrainer of the given recipe and settings on the prompts above."""

    def make(recipe=RECIPES["grpo"], config=None, rewards=("spread",), weights=None, policy=None, **more):
        config, prompts = config or settings(), more.pop("prompts", PROMPTS)
        return LanguageTrainer(
            model=policy or model(),
            tokenizer=tokenizer(),
            rows=[{"id": f"row-{i}", "prompt": prompt} for i, prompt in enumerate(prompts)],
            scorer=Scorer({name: getattr(language_rewards, name) for name in rewards}, pool=workers),
            weights=weights or [1.0] * len(rewards),
            outcome=rewards[0],
            recipe=recipe,
            config=config,
            batch=configs.batch(config),
            output=tmp_path / "ours",
            **more,
        )

    return make


def stock(tmp_path, config, rewards, weights, policy, **arguments):
    """trl.GRPOTrainer as anyone would write it, at the same batch arithmetic."""
    batch = configs.batch(config)

    def in_trl_s_form(name):
        def reward(completions, **_):
            return [getattr(language_rewards, name)(completion) for completion in completions]

        reward.__name__ = name
        return reward

    defaults = {
        "output_dir": str(tmp_path / "stock"), "max_steps": config.optim.steps, "learning_rate": config.optim.lr,
        "lr_scheduler_type": "constant", "per_device_train_batch_size": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
        "steps_per_generation": batch.accumulation * batch.steps_per_batch, "num_iterations": batch.iterations,
        "num_generations": batch.group, "max_completion_length": 8, "bf16": False, "use_cpu": True,
        "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "top_k": 0,
        "disable_tqdm": True, "seed": 0, "reward_weights": weights,
    }  # fmt: skip
    return GRPOTrainer(
        model=policy,
        reward_funcs=[in_trl_s_form(name) for name in rewards],
        args=GRPOConfig(**defaults | arguments),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer(),
    )


def train(trainer, **options):
    """Trains, and returns the weights."""
    torch.manual_seed(0)
    trainer.train(**options)
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


CASES = {
    "grpo": ({"recipe": "grpo"}, {"loss_type": "grpo"}),
    "grpo, two epsilons and delta": (
        {"recipe": "grpo", "epsilon_low": 0.001, "epsilon_high": 0.002, "delta": 1.05},
        {"loss_type": "grpo", "epsilon": 0.001, "epsilon_high": 0.002, "delta": 1.05},
    ),
    "dapo": ({"recipe": "dapo"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "bnpo": ({"recipe": "bnpo"}, {"loss_type": "bnpo"}),
    "dr_grpo": ({"recipe": "dr_grpo"}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "cispo": ({"recipe": "cispo", "epsilon_high": 1.01}, {"loss_type": "cispo", "epsilon_high": 1.01}),
    "gspo": (
        {"recipe": "gspo"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "gdpo": ({"recipe": "gdpo"}, {"loss_type": "grpo", "multi_objective_aggregation": "normalize_then_sum"}),
    "batch scale": ({"recipe": "grpo", "scale": "batch"}, {"loss_type": "grpo", "scale_rewards": "batch"}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_weights_after_four_steps_have_trl_s_bits(case, ours, tmp_path):
    """Two micro-batches a step and two passes over each batch, so that half of the steps are off-policy."""
    options, arguments = CASES[case]
    rewards, weights = ("spread", "shortness"), [1.0, 0.3]
    trainer = ours(build(options), rewards=rewards, weights=weights)
    other = stock(tmp_path, settings(), rewards, weights, model(), **arguments)
    got, expected = train(trainer), train(other)
    for name in ("loss", "grad_norm", "reward", "reward_std", "rewards/shortness/mean", "completions/mean_length"):
        assert logged(trainer, name) == logged(other, name)
    assert len(set(logged(trainer, "grad_norm"))) == STEPS
    assert same(got, expected)
    assert not same(got, model().state_dict())


EXTRAS = {
    "parts of a batch": ({"parts": 2, "passes": 1}, {}),
    "long completions masked": ({"mask_truncated_completions": True}, {"mask_truncated_completions": True}),
    "high-entropy tokens": ({"top_entropy_quantile": 0.5}, {"top_entropy_quantile": 0.5}),
    "entropy bonus": ({"entropy_coef": 0.05}, {"entropy_coef": 0.05}),
    "adaptive entropy": (
        {"use_adaptive_entropy": True, "entropy_target": 3.0, "entropy_coef_delta": 0.01},
        {"use_adaptive_entropy": True, "entropy_target": 3.0, "entropy_coef_delta": 0.01},
    ),
    "off-policy mask": ({"off_policy_mask_threshold": 1e-3}, {"off_policy_mask_threshold": 1e-3}),
}


@pytest.mark.parametrize("case", list(EXTRAS))
def test_what_trl_adds_around_the_loss_has_trl_s_bits(case, ours, tmp_path):
    changes, arguments = EXTRAS[case]
    config, rewards = settings(**changes), ("spread", "shortness")
    got = train(ours(config=config, rewards=rewards))
    assert same(got, train(stock(tmp_path, config, rewards, None, model(), loss_type="grpo", **arguments)))


@pytest.mark.parametrize(
    ("weight", "corrected", "recipe"), [("token", True, "grpo"), ("none", False, "grpo"), ("sequence", True, "gspo")]
)
def test_distance_to_a_reference_has_trl_s_bits(weight, corrected, recipe, ours, tmp_path):
    """TRL loads the reference from the model's own folder; a KL under a sequence ratio is weighted by that ratio."""
    model().save_pretrained(tmp_path / "start")
    trainer = ours(
        build({"recipe": recipe, "beta": 0.04, "kl_weight": weight}),
        policy=AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32),
    )
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32)
    arguments = {"beta": 0.04, "use_bias_correction_kl": corrected}
    if recipe == "gspo":
        arguments |= {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}
    other = stock(tmp_path, settings(), ["spread"], None, start, loss_type="grpo", **arguments)
    got, expected = train(trainer), train(other)
    assert logged(trainer, "loss") == logged(other, "loss")
    assert same(got, expected)
    assert logged(trainer, "kl")[-1] > 0


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


# -- what is refused, in words


def test_a_recipe_that_needs_what_the_trainer_cannot_give_is_refused(ours):
    with pytest.raises(ConfigError, match="recipe grpo needs a teacher, which the language trainer cannot give"):
        ours(replace(RECIPES["grpo"], needs=frozenset({"a teacher", "whole_rollouts"})))


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
}
CALLED = {  # method -> the parameters that are given by name or place
    "_get_per_token_logps_and_entropies": (
        "model", "input_ids", "attention_mask", "logits_to_keep", "compute_entropy", "compute_aux_loss",
        *language.MULTIMODAL,
    ),
    "get_off_policy_mask": (
        "advantages", "per_token_logps", "sampling_per_token_logps", "mask", "off_policy_threshold",
    ),
    "get_high_entropy_mask": ("entropies", "mask", "threshold"),
}  # fmt: skip
ATTRIBUTES = (  # read or written: self.<name> of the trainer
    "_buffered_inputs", "_entropy_bonus_enabled", "_entropy_window_stats", "_last_world_entropy", "_metrics", "_step",
    "accelerator", "args", "aux_loss_enabled", "current_gradient_accumulation_steps", "entropy_coef",
    "max_completion_length", "model", "num_generations", "num_iterations", "off_policy_mask_threshold", "reward_weights",
    "router_aux_loss_coef", "state", "top_entropy_quantile", "use_adaptive_entropy", "use_vllm",
    "vllm_importance_sampling_correction",
)  # fmt: skip
ARGUMENTS = (
    "seed", "steps_per_generation", "gradient_accumulation_steps", "entropy_target", "entropy_coef_delta", "entropy_coef_min", "entropy_coef_max",
)  # fmt: skip
OURS = {"rows", "scorer", "recipe", "outcome", "run_control", "on_rollouts", "weights", "_judged"}
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
    "training_step": ("self._step += 1",),
    "compute_loss": ("self._compute_loss(model, inputs)",),
    "_generate_and_score_completions": (
        "self._calculate_rewards(inputs, prompts, completions, completion_ids_list)",
        "self.accelerator.process_index * len(prompts)",
    ),
    "_get_train_sampler": ("RepeatSampler(", "repeat_count=self.num_iterations * self.args.steps_per_generation"),
    "_run_epoch": ("self._load_rng_state(resume_from_checkpoint)", "epoch_iterator = iter(train_dataloader)"),
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
