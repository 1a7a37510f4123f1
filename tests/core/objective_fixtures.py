"""What the tests of the objective share: groups as a trainer gives them, a policy that answers, and the rows of the loss."""

import torch

from core.objective.composition import LOSS_SLOTS
from core.objective.group import Group
from core.objective.modulation import token_influence
from core.objective.recipes import RECIPES
from core.objective.rows import Counts, Rows

# One recipe for each loss there is, by name: those that differ in credit alone need no second look.
LOSSES = {}
for recipe in RECIPES.values():
    LOSSES.setdefault(tuple(getattr(recipe, slot) for slot in (*LOSS_SLOTS, "loss_fn")), recipe)
LOSSES = {recipe.name: recipe for recipe in LOSSES.values()}
NAMES = ("execution", "quality", "safety", "answer")
WEIGHTS = (1.0, 0.5, 0.3, 0.0)
VOCABULARY, WIDTH = 7, 3


def fitted(recipe, **options):
    """The recipe with those of the options that it has; a preference's beta is not the weight of a term."""
    has = set(recipe.options) - ({"beta"} if recipe.loss_fn else set())
    return recipe(**{name: value for name, value in options.items() if name in has})


def flow_extras(moved, seed=5):
    """What a flow policy gives beside log-probabilities, with the gradient of how far these have moved, (B, T); D = 2."""
    rows, steps = moved.shape
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(moved.device, torch.promote_types(moved.dtype, torch.float32))

    clean, sigma, old = random(rows, 2), random(rows, steps).sigmoid(), 0.1 * random(rows, steps, 2)
    noised = clean.unsqueeze(1) + sigma.unsqueeze(2) * 0.2 * random(rows, steps, 2)
    return {
        "divergence": moved**2 / 2,
        "drift": 0.1 * moved**2,
        "std": 0.5 + random(rows, steps).sigmoid(),
        "dt": 0.05 + random(rows, steps).sigmoid(),
        "velocity": old + 0.01 * moved.unsqueeze(2),
        "old_velocity": old,
        "ref_velocity": old + 0.02 * random(rows, steps, 2),
        "clean": clean,
        "noised": noised,
        "sigma": sigma,
    }


class Policy:
    """Real logits over seven words at B x T tokens, and a teacher's: what Group.model answers, and the loss's distances."""

    def __init__(self, rows, steps, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.logits, self.teacher = random(rows, steps, VOCABULARY), random(rows, steps, VOCABULARY)
        self.hidden = random(rows, steps, WIDTH)
        self.ids = torch.randint(VOCABULARY, (rows, steps), generator=generator)
        self.asked = []
        self.mask = None

    def logps(self, logits):
        return logits.log_softmax(2).gather(2, self.ids.unsqueeze(2)).squeeze(2)

    def tempered_logps(self, temperature):
        self.asked.append(temperature)
        return self.logps(self.logits / temperature)

    def influence(self, right):
        gradient = torch.nn.functional.one_hot(self.ids, VOCABULARY) - self.logits.softmax(2)
        whole = [part.view(*right.shape, *part.shape[1:]) for part in (self.hidden, gradient, self.mask)]
        return tuple(part.flatten(0, 1) for part in torch.vmap(token_influence)(*whole, right))

    def teach(self, taught, right):
        self.asked.append((taught, right))
        teacher = self.teacher.log_softmax(2)
        return -(teacher.exp() * teacher).sum(2)

    def distance(self, logits):
        """(B, T): KL(policy || teacher), with the gradient of the logits."""
        policy = logits.log_softmax(2)
        return (policy.exp() * (policy - self.teacher.log_softmax(2))).sum(2)


def ragged_mask(rows, steps):
    """Completions of every length from 1 to `steps`, and an empty one; an observation interrupts the third one."""
    lengths = steps - torch.arange(rows) % steps
    mask = (torch.arange(steps) < lengths.unsqueeze(1)).long()
    mask[2::steps, 1] = 0
    mask[3] = 0
    return mask


def group(prompts=3, size=4, steps=5, aligned=None, constant=None, dtype=torch.float64, holes=None, seed=0):
    """Groups that are mixed, mixed with an unscored rollout and a component that does not apply, and all wrong.

    aligned: None (language), "rollout" (one reward each) or "decision" (T rewards each); its mask is all ones, or `holes`.
    constant: every reward is this number.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (prompts, size, len(NAMES), *([steps] if aligned == "decision" else []))
    rewards = torch.rand(shape, generator=generator, dtype=torch.float64)
    failed = torch.zeros(prompts, size, dtype=torch.bool)
    right = (torch.arange(size) % 2 == 0).expand(prompts, size) & (torch.arange(prompts) % 3 != 2).unsqueeze(1)
    answers = torch.arange(size).clamp(max=2).expand(prompts, size)
    for k, values in ((0, right), (3, answers)):
        rewards[:, :, k] = values.view(prompts, size, *[1] * (len(shape) - 3)).to(rewards.dtype)
    rewards[1::3, 0, 1] = torch.nan
    failed[1::3, 1] = True
    if constant is not None:
        rewards, failed = torch.full_like(rewards, constant), torch.zeros_like(failed)
    mask = ragged_mask(prompts * size, steps) if aligned is None else torch.ones(prompts * size, steps).long()
    if holes is not None:
        mask[:, holes] = 0
        if aligned == "decision":
            rewards[..., holes] = torch.nan
    policy = Policy(prompts * size, steps, seed, dtype)
    policy.mask = mask
    return Group(
        rewards=rewards.to(dtype),
        weights=torch.tensor(WEIGHTS),
        mask=mask,
        old_logps=policy.logps(policy.logits),
        aligned=aligned is not None,
        failed=failed,
        names=NAMES,
        outcome=0,
        task=torch.arange(prompts) % 2,
        model=policy,
    )


def group_for(*recipes, **fields):
    """The smallest group that all the recipes take: an odd size for a median, rewards per decision for values."""
    needs = frozenset().union(*(recipe.needs for recipe in recipes))
    fields = {
        "size": 5 if "extra_rollout" in needs else 4,
        "aligned": "decision" if "aligned" in needs else None,
    } | fields
    return group(**fields)


def rows_of(given, credit, logps, **fields):
    """All rows of the groups as one micro-batch; with a teacher, the distance is the one of these log-probabilities."""
    keep = credit.keep
    counts = Counts(
        rows=keep.sum().item(),
        tokens=(given.mask * keep.unsqueeze(1)).sum().item(),
        max_length=given.mask.shape[1],
    )
    extras = dict(credit.extras) | flow_extras(logps - given.old_logps)
    if "distillation_weight" in extras:
        extras["distillation"] = (logps - given.old_logps + 1) ** 2  # any distance that depends on the policy
    group_id = torch.arange(len(keep)) // given.rewards.shape[1]
    fields = {
        "mask": given.mask,
        "keep": keep,
        "counts": counts,
        "old_logps": given.old_logps,
        "group_id": group_id,
    } | fields
    return Rows(logps=logps, advantage=credit.advantage, extras=extras, **fields)
