"""What recipes ask of a language policy: each answer against plain forward passes of the model; every recipe trains."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

sys.path.insert(0, str(Path(__file__).parent))

from language_fixtures import (
    PROMPTS,
    language_trainer,
    logged,
    model,
    one_worker,
    same,
    settings,
    tokenizer,
    train,
)

from core.config import ConfigError
from core.objective.modulation import token_influence
from core.objective.recipes import RECIPES, build
from core.train import asked

COMPONENTS = {"gate": "early_end", "quality": "early_end", "answers": "early_end"}
REWARDS = ("has_colour", "early_end")
TRAINED = [name for name in RECIPES if "aligned" not in RECIPES[name].needs]


@pytest.fixture(scope="module")
def workers():
    pool = one_worker()
    yield pool
    pool.close()


@pytest.fixture
def ours(workers, tmp_path):
    return partial(language_trainer, workers, tmp_path, rewards=REWARDS)


def recipe(name, **options):
    known = RECIPES[name].options
    return RECIPES[name](**{key: value for key, value in COMPONENTS.items() if key in known}, **options)


def setting(name, **more):
    return settings(micro=10 if RECIPES[name].extra_rollouts else 4, **more)


class Watched:
    """Keeps the groups, credits and rows of a run, by standing in for Recipe.credit and Recipe.loss."""

    def __init__(self, of):
        self.groups, self.credits, self.rows, self.of = [], [], [], type(of)

    def __enter__(self):
        credit, loss = self.of.credit, self.of.loss

        def watched_credit(recipe, group):
            result = credit(recipe, group)
            self.groups.append(group)
            self.credits.append(result)
            return result

        def watched_loss(recipe, rows):
            self.rows.append(rows)
            return loss(recipe, rows)

        self.before = credit, loss
        self.of.credit, self.of.loss = watched_credit, watched_loss
        return self

    def __exit__(self, *_):
        self.of.credit, self.of.loss = self.before


@pytest.mark.parametrize("name", TRAINED)
def test_every_recipe_trains(name, ours):
    trainer = ours(recipe=recipe(name), config=setting(name, steps=4))
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    weights = train(trainer)
    assert all(value.isfinite().all() for value in weights.values())
    assert not same(before, weights)
    assert logged(trainer, "ratio_deviation_max")[0] < 1e-6
    assert max(logged(trainer, "ratio_deviation_max")) > 1e-4  # the second pass is off-policy, or nothing is tested


def test_what_an_unaligned_policy_cannot_give_is_refused_before_work(ours):
    with pytest.raises(ConfigError, match="value_anchored needs a reward per decision of an aligned policy"):
        ours(recipe=RECIPES["value_anchored"])


def test_an_unknown_component_is_refused_before_work_with_those_there_are(ours):
    with pytest.raises(ConfigError, match="'earlyend'; did you mean 'early_end'"):
        ours(recipe=RECIPES["seed_grpo"](answers="earlyend"))


# -- one rollout more


def test_the_median_is_sampled_beside_the_group_and_not_trained_on(ours):
    with Watched(RECIPES["mc_grpo"]) as seen:
        train(ours(recipe=RECIPES["mc_grpo"], config=setting("mc_grpo", steps=2, group=4, prompts=2)))
    assert seen.groups[0].rewards.shape[:2] == (2, 5)
    assert seen.credits[0].keep.view(2, 5).sum(1).tolist() == [4, 4]
    for rows in seen.rows:
        assert len(rows.keep) == 10
        assert rows.counts.rows == 8


def test_an_odd_group_is_refused_where_the_median_has_to_be_one_of_it(ours):
    with pytest.raises(ConfigError, match="group_size=3 and 1 more have no median among them; use an even group_size"):
        ours(recipe=RECIPES["mc_grpo"], config=settings(group=3, micro=2))


# -- log-probabilities


def captured(ours, name, config=None, **options):
    """A run of one step whose recipe keeps (group, TRL's row tensors); and the policy as it was."""
    kept = {}
    trainer = ours(recipe=recipe(name, **options), config=config or setting(name, steps=1, passes=1))
    original = trainer._group

    def group(output, mine):
        kept["output"] = dict(output)
        kept["group"], kept["asked"] = original(output, mine)
        return kept["group"], kept["asked"]

    trainer._group = group
    kept["policy"] = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    train(trainer)
    policy = model()
    policy.load_state_dict(kept["policy"])
    output = kept["output"]
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    width = output["completion_ids"].size(1)
    with torch.no_grad():
        out = policy(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    kept["logits"] = out.logits[:, -width - 1 : -1]
    kept["hidden"] = out.hidden_states[-1][:, -width - 1 : -1]
    kept["ids"], kept["mask"], kept["trainer"] = output["completion_ids"], output["completion_mask"], trainer
    return kept


def chosen(logits, ids):
    return logits.log_softmax(-1).gather(2, ids.unsqueeze(2)).squeeze(2)


def close(a, b, mask, atol=2e-5):
    torch.testing.assert_close(a * mask, b * mask, rtol=0, atol=atol)


def test_old_log_probabilities_are_there_before_the_advantage(ours):
    kept = captured(ours, "unlikeliness")
    close(kept["group"].old_logps, chosen(kept["logits"], kept["ids"]), kept["mask"])


@pytest.mark.parametrize("sampler", [1.0, 0.7])
def test_tempered_log_probabilities_are_those_of_logits_divided_twice(ours, sampler):
    config = settings(steps=1, passes=1)
    config = replace(config, rollout=replace(config.rollout, temperature=sampler))
    kept = captured(ours, "distribution_centric", config)
    for temperature in (1.2, 0.8):
        with torch.no_grad():
            kept["trainer"].model.load_state_dict(kept["policy"])
            answer = kept["asked"].tempered_logps(temperature)
        close(answer, chosen(kept["logits"] / (sampler * temperature), kept["ids"]), kept["mask"])


def test_influence_is_that_of_the_plain_hidden_states_over_the_group_s_vocabulary(ours):
    kept = captured(ours, "token_hidden_reward")
    kept["trainer"].model.load_state_dict(kept["policy"])
    right = kept["group"].right(1.0)
    right[0, 0], right[0, 1] = True, False
    with torch.no_grad():
        total, own = kept["asked"].influence(right)
    for first, size in ((0, 4), (4, 4)):
        rows = slice(first, first + size)
        mask = kept["mask"][rows]
        columns = sorted(set(kept["ids"][rows][mask.bool()].tolist()))
        shares = kept["logits"][rows].softmax(-1)[..., columns]
        hot = torch.stack([(kept["ids"][rows] == column).float() for column in columns], -1)
        expected = token_influence(kept["hidden"][rows], hot - shares, mask, right[first // size])
        close(total[rows], expected[0], mask, atol=1e-4)
        close(own[rows], expected[1], mask, atol=1e-4)
    assert total.abs().max() > 1e-3


# -- the teacher


def test_the_teacher_sees_the_first_right_sibling_and_rates_the_tokens_of_the_wrong_one(ours):
    kept = captured(ours, "sample_routed", settings(steps=1, passes=1, group=8, micro=16))
    output, group, encode = kept["output"], kept["group"], tokenizer()
    right = group.right(1.0)
    assert right.any()
    assert not right.all()
    rows, texts = kept["asked"].rows, kept["asked"].siblings[1]
    assert logged(kept["trainer"], "taught")[0] > 0
    policy = model()
    policy.load_state_dict(kept["policy"])
    for i in range(16):
        p, wrong = i // 8, not right[i // 8, i % 8]
        if not (wrong and right[p].any()):
            continue
        sibling = p * 8 + right[p].int().argmax()
        prompt = kept["asked"].siblings[0][i]
        text = asked.SHOWN.format(prompt=prompt, answer=texts[sibling])
        expected = encode(text)["input_ids"]
        shown = rows["teacher_ids"][i][rows["teacher_mask"][i].bool()].tolist()
        assert shown == expected
        ids = torch.tensor([expected + output["completion_ids"][i].tolist()])
        with torch.no_grad():
            theirs = policy(input_ids=ids).logits[0, len(expected) - 1 : -1].log_softmax(-1)
        entropy = -(theirs.exp() * theirs).sum(-1)
        with torch.no_grad():
            kept["trainer"].model.load_state_dict(kept["policy"])
            kept["trainer"].teacher.load_state_dict(kept["policy"])
            answer = kept["asked"].teach(~right & right.any(1, keepdim=True), right)
        mask = output["completion_mask"][i]
        close(answer[i], entropy, mask)
        ours_logs = kept["logits"][i].log_softmax(-1)
        distance = (ours_logs.exp() * (ours_logs - theirs)).sum(-1)
        extras = {"distillation_weight": torch.ones(output["completion_ids"].shape), **rows}
        compared = kept["trainer"].teacher.compare(extras, output["completion_ids"], output["completion_mask"])
        compared(kept["logits"], output["completion_ids"], None)
        close(extras["distillation"][i], distance, mask)


def test_the_teacher_s_weights_follow_the_policy_s_and_leave_them_as_they_are(ours):
    trainer = ours(recipe=RECIPES["sample_routed"], config=settings(steps=3, passes=1))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    path = []

    class Note(asked.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            path.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})

    trainer.add_callback(Note())
    train(trainer)
    expected = before
    for weights in path:
        expected = {name: expected[name] + asked.AVERAGING * (weights[name] - expected[name]) for name in expected}
    for name, value in trainer.teacher.average.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
    with trainer.teacher.in_charge():
        assert torch.equal(dict(trainer.model.named_parameters())[name], trainer.teacher.average[name])
    assert torch.equal(dict(trainer.model.named_parameters())[name], path[-1][name])


def test_the_teacher_of_an_adapter_averages_the_adapter_alone(ours):
    trainer = ours(
        recipe=RECIPES["sample_routed"],
        config=settings(steps=2, passes=1),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )
    train(trainer)
    assert trainer.teacher.average
    assert all("lora_" in name for name in trainer.teacher.average)


def test_a_run_with_a_teacher_goes_on_to_the_same_bits(ours, workers, tmp_path):
    config = settings(steps=4, passes=2, save_strategy="steps")
    make = partial(language_trainer, workers, rewards=REWARDS, recipe=RECIPES["sample_routed"], config=config)
    through = make(tmp_path / "a")
    whole = train(through)
    resumed = make(tmp_path / "b")
    checkpoint = tmp_path / "a" / "ours" / "checkpoint-3"
    weights = train(resumed, resume_from_checkpoint=str(checkpoint))
    assert same(whole, weights)
    assert same(through.teacher.average, resumed.teacher.average)


def test_a_teacher_s_prompt_is_cut_to_what_the_model_has_positions_for():
    teacher = asked.Teacher(model(), tokenizer(), 1.0, longest=20)
    ids, mask = teacher.prompts([PROMPTS[0], asked.shown(PROMPTS[0], "red " * 40)], torch.zeros(2, 8, dtype=torch.long))
    assert ids.shape == mask.shape == (2, 12)
    assert mask[0].sum() == 2


def test_messages_show_the_answer_in_the_user_s_last_turn():
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "{q}"}]
    messages = asked.shown(prompt, "{a}")
    assert messages[0] == prompt[0]
    assert messages[1]["role"] == "user"
    assert "{q}" in messages[1]["content"]
    assert "{a}" in messages[1]["content"]
    assert prompt[1]["content"] == "{q}"


def test_several_ways_of_asking_combine(ours):
    both = build({"recipe": ["unlikeliness", "token_hidden_reward", "dhpo"]})
    weights = train(ours(recipe=both, config=settings(steps=2)))
    assert all(value.isfinite().all() for value in weights.values())
