"""core/policy/tiny_flow.py against conditional Gaussians, pictures edited by hand and scipy, and hashes written out."""

import copy
import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from core.config import FlowRollout, Model
from core.policy import adapter
from core.policy.flow import FlowPolicy
from core.policy.kernel import STANDARD
from core.policy.tiny_flow import Carry, TinyFlow

HARD = 100.0  # a logit whose sigmoid or softmax is exactly 0 or 1 in float32
LORA = Model(lora_rank=2, lora_alpha=4)


def tiny(seed=0, spoken=True, **config):
    """A net whose last layer is not 0; `spoken=False` keeps it at 0."""
    torch.manual_seed(seed)
    net = TinyFlow(**{"channels": 1, "text": True, "width": 8, "levels": 1, "words": 6, "buckets": 64} | config).eval()
    if spoken:
        with torch.no_grad():
            net.leave[-1].weight.normal_(0, 0.3)
    return net


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(height=8, width=8, channels=1, seed=0):
    return np.random.default_rng(seed).random((height, width, channels), dtype=np.float32)


def told(net, *texts):
    """A condition of one picture and several texts."""
    side = 4 * 2**net.config.levels
    return net.encode([{"image": picture(side, side, net.config.channels), "text": text} for text in texts])


def answer(net, condition, sigma=0.6, seed=3):
    """The velocity at one x for every row of the condition."""
    rows = len(condition["image"])
    x = normal(*net.noise_shape(condition), seed=seed).expand(rows, -1, -1, -1)
    with torch.no_grad():
        return net.velocity(x, torch.full((rows,), sigma), condition)


# ---- the guess that the net starts from


def joint(sigma, deviation, scale, start):
    """Moments of (v, x) of one value whose map is 0.4: x0 = 0.4 + deviation d, x1 = start + scale n; d, n standard normal.

    Each of v and x is a constant plus a row of weights over (d, n).
    """
    v = np.array([-deviation, scale])
    x = np.array([(1 - sigma) * deviation, sigma * scale])
    return start - 0.4, (1 - sigma) * 0.4 + sigma * start, v @ v, v @ x, x @ x


@pytest.mark.parametrize("centre_scale", [0.0, 0.4, 1.7])
@pytest.mark.parametrize("sigma", [0.0, 0.03, 0.5, 0.9, 1.0])
def test_the_untrained_net_gives_the_conditional_mean_and_paints_in_units_of_the_conditional_deviation(
    sigma, centre_scale
):
    net = tiny(spoken=False, text=False, centre_scale=centre_scale, spread=0.3)
    image, x = torch.full((2, 1, 8, 8), 0.4), normal(2, 1, 8, 8)
    start, scale = (0.4, centre_scale) if centre_scale else (0.0, 1.0)
    mean_v, mean_x, var_v, cov, var_x = joint(sigma, 0.3, scale, start)
    expected = mean_v + cov / var_x * (x - mean_x)
    with torch.no_grad():
        guess = net(x, torch.full((2,), sigma), image)
        net.leave[-1].bias.fill_(1.0)
        painted = net(x, torch.full((2,), sigma), image)
    torch.testing.assert_close(guess, expected, atol=1e-5, rtol=1e-5)
    left = math.sqrt(max(var_v - cov**2 / var_x, 0))
    torch.testing.assert_close(painted - guess, torch.full_like(x, left), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("centre_scale", [0.0, 0.4])
def test_no_other_line_fits_draws_of_the_path_better_than_the_guess(centre_scale):
    """Least squares over 200 000 drawn pairs finds the slope, the intercept and the residual of the untrained net."""
    net = tiny(spoken=False, text=False, centre_scale=centre_scale)
    draws = np.random.default_rng(0).standard_normal((2, 200_000))
    start, scale = (0.4, centre_scale) if centre_scale else (0.0, 1.0)
    x0, x1 = 0.4 + 0.3 * draws[0], start + scale * draws[1]
    ends = torch.tensor([[[[-1.0]]], [[[1.0]]]]).expand(-1, 1, 8, 8)
    for sigma in (0.2, 0.7):
        x, v = (1 - sigma) * x0 + sigma * x1, x1 - x0
        slope, intercept = np.polyfit(x, v, 1)
        residual = np.std(v - slope * x - intercept)
        with torch.no_grad():
            net.leave[-1].bias.zero_()
            low, high = net(ends, torch.full((2,), sigma), torch.full((2, 1, 8, 8), 0.4))[:, 0, 0, 0].tolist()
            net.leave[-1].bias.fill_(1.0)
            painted = net(ends, torch.full((2,), sigma), torch.full((2, 1, 8, 8), 0.4))[0, 0, 0, 0].item()
        assert (high - low) / 2 == pytest.approx(slope, abs=0.01)
        assert (high + low) / 2 == pytest.approx(intercept, abs=0.01)
        assert painted - low == pytest.approx(residual, rel=0.01)


@pytest.mark.parametrize("centre_scale", [0.0, 0.4])
def test_with_text_the_guess_is_about_the_edited_map(centre_scale):
    """Everything is cut, moved 3 right and 1 up, and the rest filled with 0.7: the map that is known is that picture."""
    net = tiny(spoken=False, centre_scale=centre_scale, spread=0.3, doubt=0.15)
    with torch.no_grad():
        net.leave[-1].bias[4:8], net.leave[-1].bias[8:] = 0.7, HARD
        steer(net.carry, right=3, down=-1)
    given = told(net, "move it", "make it big")
    known = torch.full((2, 1, 8, 8), 0.7)
    known[..., :-1, 3:] = given["image"][..., 1:, :-3]
    x = normal(2, 1, 8, 8)
    for sigma in (0.0, 0.3, 1.0):
        start, scale = (given["image"], centre_scale) if centre_scale else (0.0, 1.0)
        _, _, _, cov, var_x = joint(sigma, 0.15, scale, 0.0)
        expected = start - known + cov / var_x * (x - (1 - sigma) * known - sigma * start)
        with torch.no_grad():
            torch.testing.assert_close(net.velocity(x, torch.full((2,), sigma), given), expected, atol=1e-5, rtol=1e-5)


def test_paths_start_where_the_config_says():
    given = told(tiny(), "move it")
    assert tiny().prior(given) is STANDARD
    prior = tiny(centre_scale=0.4).prior(given)
    assert prior.scale == 0.4
    assert torch.equal(prior.centre, given["image"])


# ---- Carry


def steer(carry, right=0, down=0, turn=0):
    """The plan of every map: shifts in pixels, the number of a turn; or a list of weights for any of them."""
    reach = carry.reach
    parts = []
    for size, choice, offset in zip(carry.sizes, (right, down, turn), (reach, reach, 0), strict=True):
        weights = torch.zeros(size)
        if isinstance(choice, dict):
            for at, weight in choice.items():
                weights[offset + at] = weight
        else:
            weights[offset + choice] = 1.0
        parts.append(weights.log().clamp(min=-HARD) / carry.SHARPNESS)
    with torch.no_grad():
        carry.plan[-1].weight.zero_()
        carry.plan[-1].bias.copy_(torch.cat(parts))


def carried(image, mask, fill=-0.5, **plan):
    """The picture that a Carry with this plan makes. image (C, H, W), mask (H, W) of 0 and 1: what is cut out."""
    torch.manual_seed(0)
    carry = Carry(known=3, width=4, reach=5)
    steer(carry, **plan)
    image, mask = torch.as_tensor(image)[None], torch.as_tensor(mask, dtype=torch.float32)[None, None]
    with torch.no_grad():
        return carry(image, (2 * mask - 1) * HARD, torch.full_like(image, fill), normal(1, 3))[0]


def square(top, left, height=13, width=16, side=4):
    """(2, H, W) on a coloured ground, and its mask; no two pixels of the square are alike."""
    image = torch.tensor([0.2, -0.3])[:, None, None].repeat(1, height, width)
    image[:, top : top + side, left : left + side] = torch.linspace(0.4, 1, 2 * side * side).view(2, side, side)
    mask = torch.zeros(height, width)
    mask[top : top + side, left : left + side] = 1
    return image, mask


@pytest.mark.parametrize(("right", "down"), [(0, 0), (5, 0), (-3, 0), (0, 4), (0, -2), (2, 3), (-5, -5), (1, -1)])
def test_a_part_moves_by_whole_pixels_and_its_hole_is_filled(right, down):
    image, mask = square(5, 6)
    expected = image.clone()
    expected[:, 5:9, 6:10] = -0.5
    expected[:, 5 + down : 9 + down, 6 + right : 10 + right] = image[:, 5:9, 6:10]
    assert torch.equal(carried(image, mask, right=right, down=down), expected)


def test_what_leaves_the_map_is_gone():
    image, mask = square(4, 11)
    part = carried(image, mask, right=3)
    expected = image.clone()
    expected[:, 4:8, 11:15] = -0.5
    expected[:, 4:8, 14:16] = image[:, 4:8, 11:13]
    assert torch.equal(part, expected)
    image, mask = square(0, 6)
    gone = carried(image, mask, down=-4)
    expected = image.clone()
    expected[:, 0:4, 6:10] = -0.5
    assert torch.equal(gone, expected)


def test_nothing_is_cut_out_where_the_mask_is_0():
    image, mask = square(5, 6)
    assert torch.equal(carried(image, 0 * mask, right=3, turn=8), image)


def test_shifts_mix_linearly():
    """On a black ground, where nothing was cut but the part, the picture is the mixture of the pictures of each shift."""
    image, mask = square(4, 6)
    image = image * mask
    mixed = carried(image, mask, fill=0, right={2: 0.25, -3: 0.75}, down={0: 0.4, 1: 0.6})
    alone = [
        weight * high * carried(image, mask, fill=0, right=right, down=down)
        for right, weight in ((2, 0.25), (-3, 0.75))
        for down, high in ((0, 0.4), (1, 0.6))
    ]
    torch.testing.assert_close(mixed, sum(alone), atol=1e-6, rtol=1e-5)


def test_turns_mix_linearly():
    image, mask = square(4, 6)
    image = image * mask
    mixed = carried(image, mask, fill=0, turn={0: 0.3, 3: 0.2, 8: 0.5})
    alone = [weight * carried(image, mask, fill=0, turn=turn) for turn, weight in ((0, 0.3), (3, 0.2), (8, 0.5))]
    torch.testing.assert_close(mixed, sum(alone), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("turn", "quarters"), [(8, -1), (5, 1)])
@pytest.mark.parametrize("width", [13, 20])
def test_a_quarter_turn_is_that_of_the_pixels(turn, quarters, width):
    """About the middle of a square of odd side, also in an oblong map. +90 degrees is clockwise, as rows grow downwards."""
    image, mask = square(3, 4, width=width, side=5)
    expected = image.clone()
    expected[:, 3:8, 4:9] = torch.rot90(image[:, 3:8, 4:9], quarters, (1, 2))
    torch.testing.assert_close(carried(image, mask, turn=turn), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("turn", range(9))
@pytest.mark.parametrize("shape", [(14, 14), (12, 18)])
def test_turns_and_scales_are_those_of_scipy_about_the_centre_of_what_is_cut(turn, shape):
    size, angle = Carry.TURNS[turn][0], math.radians(Carry.TURNS[turn][1])
    mask = np.zeros(shape, np.float32)
    mask[4:8, 5:8] = mask[6:8, 5:11] = 1  # an L: its centre is none of its box
    image = normal(1, *shape).numpy() * mask
    # In (row, column): a clockwise turn takes a column's direction (right) to a row's (down).
    matrix = size * np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    centre = np.argwhere(mask).mean(0)
    back = np.linalg.inv(matrix)
    expected, over = (
        ndimage.affine_transform(part, back, centre - back @ centre, order=1, mode="grid-constant")
        for part in (image[0], mask)
    )
    got = carried(image, mask, fill=0.8, turn=turn)[0].numpy()
    np.testing.assert_allclose(got, (1 - over.clip(0, 1)) * 0.8 * mask + expected, atol=2e-4)


def test_an_undecided_mask_mixes_the_map_the_fill_and_the_part():
    """A logit of 0 cuts 1/(1 + e^1.5) = 0.18 of every pixel; a logit of 0.75 half of it."""
    carry = Carry(known=3, width=4, reach=2)
    steer(carry)
    image, fill = torch.full((1, 1, 6, 6), 0.9), torch.full((1, 1, 6, 6), -0.4)
    for logit, cut in ((0.0, 1 / (1 + math.exp(1.5))), (0.75, 0.5)):
        made = carry(image, torch.full((1, 1, 6, 6), logit), fill, normal(1, 3))
        expected = (1 - cut) * ((1 - cut) * 0.9 + cut * -0.4) + cut * 0.9
        torch.testing.assert_close(made, torch.full_like(image, expected), atol=1e-6, rtol=1e-5)


def test_each_map_follows_its_own_plan():
    carry = Carry(known=3, width=4, reach=2)
    image, cut, fill, known = normal(2, 2, 8, 8), normal(2, 1, 8, 8, seed=1), normal(2, 2, 8, 8, seed=2), normal(2, 3)
    with torch.no_grad():
        carry.plan[-1].weight.normal_(0, 1)
        both = carry(image, cut, fill, known)
        for row in range(2):
            one = slice(row, row + 1)
            torch.testing.assert_close(carry(image[one], cut[one], fill[one], known[one]), both[one])


def test_gradient_reaches_the_plan_the_cut_the_fill_and_every_turn_but_none():
    torch.manual_seed(0)
    carry = Carry(known=3, width=4, reach=2)
    image, known = normal(2, 1, 8, 8), normal(2, 3)
    cut, fill = normal(2, 1, 8, 8, seed=1).requires_grad_(), normal(2, 1, 8, 8, seed=2).requires_grad_()
    (carry(image, cut, fill, known) * normal(2, 1, 8, 8, seed=3)).sum().backward()
    for gradient in (cut.grad, fill.grad, carry.turns.grad[1:], *(p.grad for p in carry.plan.parameters())):
        assert gradient.isfinite().all()
        assert gradient.abs().min() > 0
    assert not carry.turns.grad[0].any()


# ---- text


def bucket(word, buckets=64):
    return zlib.crc32(word.encode()) % buckets + 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Move the RED", ["move", "the", "red"]),
        ("4px, then 2.5 left-hand!", ["4", "px", "then", "2.5", "left", "hand"]),
        ("größer 更大 🙂 É", ["größer", "更大", "é"]),
        ("one two three four five six seven eight", ["one", "two", "three", "four", "five", "six"]),
        ("3. 10 . 5", ["3", "10", "5"]),
        ("", []),
        (" \n?! ", []),
    ],
)
def test_words_and_numbers_are_crc32_buckets(text, words):
    expected = [bucket(word) for word in words] + [0] * (6 - len(words))
    assert told(tiny(), text)["words"].tolist() == [expected]


def test_the_buckets_start_at_1():
    """0 is kept for no word: a word with hash 0 modulo the buckets is a word all the same."""
    zero = next(word for word in map(chr, range(97, 123)) if zlib.crc32(word.encode()) % 8 == 0)
    assert told(tiny(buckets=8), zero)["words"][0, 0] == 1


def test_word_order_matters():
    net = tiny()
    left, right = answer(net, told(net, "left of the red", "red of the left"))
    assert (left - right).abs().max() > 1e-3


def test_words_past_the_limit_say_nothing():
    net = tiny()
    short, long = answer(net, told(net, "a b c d e f", "a b c d e f g"))
    assert torch.equal(short, long)


def test_places_without_a_word_are_not_read_and_no_text_is_read_as_nothing():
    net = tiny()
    given = told(net, "", "left", "left of the red one here")
    before = answer(net, given)
    assert before.isfinite().all()
    with torch.no_grad():
        net.reader.word.weight[0] += 3
    after = answer(net, given)
    assert torch.equal(before[1:], after[1:])
    assert (before[0] - after[0]).abs().max() > 1e-3
    with torch.no_grad():
        net.reader.place[1:] += 3  # the words of "left" end at the first place
    assert torch.equal(answer(net, given)[:2], after[:2])


def test_without_the_instruction_it_is_as_if_the_text_were_empty():
    net = tiny()
    given, empty = told(net, "left of the red", "up"), told(net, "", "")
    without = net.unconditional(given)
    assert without.keys() == given.keys()
    assert torch.equal(without["image"], given["image"])
    assert torch.equal(without["words"], empty["words"])
    assert given["words"].any()  # not emptied in place
    wordless = tiny(text=False)
    given = wordless.encode([{"image": picture()}])
    assert torch.equal(wordless.unconditional(given)["image"], given["image"])


# ---- the net


def test_a_row_does_not_depend_on_the_others():
    net = tiny(levels=2)
    given, x, sigma = told(net, "left", "", "turn it by 45"), normal(3, 1, 16, 16), torch.tensor([0.1, 0.5, 1.0])
    with torch.no_grad():
        whole = net.velocity(x, sigma, given)
        for row in range(3):
            one = slice(row, row + 1)
            alone = net.velocity(x[one], sigma[one], {name: part[one] for name, part in given.items()})
            torch.testing.assert_close(alone, whole[one], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [{"levels": 2, "channels": 3}, {"levels": 0}, {"text": False, "centre_scale": 0.3}])
def test_gradient_reaches_every_weight(config):
    net = tiny(**config)
    given = told(net, "left of the red", "up")
    x = normal(2, *net.noise_shape(given)).requires_grad_()
    (net.velocity(x, torch.tensor([0.3, 0.8]), given) ** 2).sum().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead
    assert x.grad.isfinite().all()


def test_what_is_painted_depends_on_x_sigma_picture_and_text():
    net = tiny(centre_scale=0.0)
    given, x, sigma = told(net, "left"), normal(1, 1, 8, 8), torch.tensor([0.5])

    def painted(x, sigma, image, words):
        with torch.no_grad():
            return net._unet(x, sigma, image, words)[0]

    base = painted(x, sigma, **given)
    for changed in (
        painted(x + 0.5, sigma, **given),
        painted(x, sigma + 0.2, **given),
        painted(x, sigma, given["image"].flip(3), given["words"]),
        painted(x, sigma, given["image"], given["words"] + 1),
        painted(x.roll(2, 3), sigma, given["image"].roll(2, 3), given["words"]).roll(-2, 3),  # places are told apart
    ):
        assert (changed - base).abs().max() > 1e-3


# ---- pictures in and out


def test_pictures_survive_the_round_trip():
    net = tiny(channels=3)
    pictures = [picture(8, 12, 3, seed) for seed in range(2)]
    given = net.encode([{"image": image, "text": "x"} for image in pictures])
    assert net.noise_shape(given) == (3, 8, 12)
    x0 = net.encode_target(pictures, given)
    assert x0[1, 2, 3, 4].item() == pytest.approx(2 * pictures[1][3, 4, 2] - 1)
    assert torch.equal(x0, given["image"])
    for made, image in zip(net.decode(x0, given), pictures, strict=True):
        assert made.dtype == np.float32
        np.testing.assert_allclose(made, image, atol=1e-6)


def test_what_lies_outside_of_black_and_white_is_clipped():
    made = tiny().decode(torch.tensor([-3.0, -1.0, 0.0, 7.0]).view(1, 1, 2, 2), {})
    assert made[0][..., 0].tolist() == [[0.0, 0.0], [0.5, 1.0]]


def test_the_map_of_super_resolution_is_the_small_picture_enlarged():
    net = tiny(text=False, scale=2)
    flat = net.encode([{"image": np.full((4, 6, 1), 0.3, np.float32)}])
    assert net.noise_shape(flat) == (1, 8, 12)
    torch.testing.assert_close(flat["image"], torch.full((1, 1, 8, 12), -0.4))
    # Bicubic with a = -0.75 (Keys 1981): a pixel at a quarter between two of a ramp's inner pixels stays on the ramp.
    ramp = np.tile(np.linspace(0, 0.9, 10, dtype=np.float32)[:, None], (1, 4))[..., None]
    column = (net.encode([{"image": ramp}])["image"][0, 0, :, 0].numpy() + 1) / 2
    keys = [(-0.75 * (t**3 - 5 * t**2 + 8 * t - 4)) if t > 1 else 1.25 * t**3 - 2.25 * t**2 + 1 for t in (0.25, 0.75)]
    keys += [-0.75 * (t**3 - 5 * t**2 + 8 * t - 4) for t in (1.25, 1.75)]
    taps = np.array([keys[2], keys[0], keys[1], keys[3]])  # weights of the pixels at -1, 0, 1, 2 from the left one
    assert column[9] == pytest.approx(taps @ ramp[3:7, 0, 0], abs=1e-6)
    edge = np.zeros((8, 8, 1), np.float32)
    edge[:, 4:] = 1
    enlarged = net.encode([{"image": edge}])["image"]
    assert enlarged.min() == -1
    assert enlarged.max() == 1  # bicubic overshoots at an edge
    target = picture(16, 16)
    assert net.encode_target([target], {"image": enlarged}).shape == (1, 1, 16, 16)


@pytest.mark.parametrize(
    ("config", "size", "step"), [({}, 6, 4), ({"levels": 2}, 12, 8), ({"text": False, "scale": 2}, 5, 4)]
)
def test_sizes_that_do_not_divide_are_refused(config, size, step):
    net = tiny(**config)
    for height, width in ((8, size), (size, 8)):
        found = f"{height * net.config.scale}x{width * net.config.scale}"
        with pytest.raises(ValueError, match=f"images of {found} do not divide by {step}: .*use fewer levels"):
            net.encode([{"image": picture(height, width), "text": ""}])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([picture(8, 8), picture(8, 12)], r"one shape, not \[\(8, 8, 1\), \(8, 12, 1\)\]; crop or resize"),
        ([picture(8, 8, 3)], r"shape \(8, 8, 3\); the net needs \(height, width, 1\)"),
        ([picture(8, 8)[..., 0]], r"shape \(8, 8\); the net needs"),
        ([picture(8, 8)[None]], r"shape \(1, 8, 8, 1\); the net needs"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        tiny().encode([{"image": image, "text": ""} for image in images])


def test_a_target_of_another_shape_than_x_is_refused():
    net = tiny(text=False, scale=2)
    given = net.encode([{"image": picture(4, 4)}])
    message = r"targets are \(1, 4, 4\), but their conditions give \(1, 8, 8\) .*scale 2"
    with pytest.raises(ValueError, match=message):
        net.encode_target([picture(4, 4)], given)


# ---- saved, taken back, and as it was


def adapted(seed=0, moved=True):
    net = tiny(seed)
    adapter.add(net, LORA)
    if moved:
        stir(net, seed)
    return net


def stir(net, seed=0):
    """As if the adapter had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator))


def same_weights(net, other):
    """Bit for bit. Velocities may differ in the last bits: loaded weights lie elsewhere in memory, and sums are cut otherwise."""
    ours, others = net.state_dict(), other.state_dict()
    return ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)


def test_a_saved_net_is_the_same_net(tmp_path):
    net = tiny(centre_scale=0.2, words=4)
    net.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    again, other = TinyFlow.load(tmp_path, Model()), tiny(1, centre_scale=0.2, words=4)
    given = told(net, "left of the red", "")
    assert again.config.centre_scale == 0.2
    assert not same_weights(other, net)
    other.restore(tmp_path)
    for copied in (again, other):
        assert same_weights(copied, net)
        assert all(p.requires_grad for p in copied.parameters())
        torch.testing.assert_close(answer(copied, given), answer(net, given), atol=1e-5, rtol=1e-5)


def test_a_saved_adapter_is_taken_back_bit_for_bit(tmp_path):
    net, other = adapted(), adapted(moved=False)
    net.save(tmp_path)
    names = ["config.json", "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert same_weights(TinyFlow.from_pretrained(tmp_path), tiny())  # beside the adapter: the net without it
    stir(other, 1)
    other.restore(tmp_path)
    assert same_weights(other, net)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_loaded_adapter_becomes_part_of_the_net(tmp_path, rank):
    """So the settings say what is trained from now on, and the reference is what was loaded."""
    net, given = adapted(), told(tiny(), "left of the red", "")
    net.save(tmp_path)
    again = TinyFlow.load(tmp_path, replace(LORA, lora_rank=rank))
    torch.testing.assert_close(answer(again, given), answer(net, given), atol=1e-4, rtol=1e-4)
    assert {p.shape[0] for name, p in again.named_parameters() if "lora_A" in name} == ({rank} if rank else set())
    assert all(p.requires_grad == ("lora_" in name or not rank) for name, p in again.named_parameters())
    policy = FlowPolicy(again, FlowRollout())
    policy.keep_reference()
    start, x, sigma = answer(again, given), normal(1, 1, 8, 8, seed=3).expand(2, -1, -1, -1), torch.full((2,), 0.6)
    with torch.no_grad():
        for p in again.parameters():
            p.add_(0.05 * p.requires_grad)
    assert (answer(again, given) - start).abs().max() > 1e-3
    torch.testing.assert_close(policy.reference_velocity(x, sigma, given), start)


def test_saving_leaves_the_net_and_the_random_numbers_alone(tmp_path):
    net = adapted()
    before, state = copy.deepcopy(net), torch.get_rng_state()
    net.save(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_weights(net, before)
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {
        name for name in net.state_dict() if "lora_" in name
    }


def test_a_net_without_adapter_gets_a_new_one_that_changes_nothing(tmp_path):
    net, given = tiny(), told(tiny(), "left")
    net.save(tmp_path)
    again = TinyFlow.load(tmp_path, LORA)
    assert all(("lora_" in name) == p.requires_grad for name, p in again.named_parameters())
    before = answer(TinyFlow.load(tmp_path, Model()), given)
    assert torch.equal(answer(again, given), before)


def test_the_reference_is_the_net_before_training():
    net, given = adapted(moved=False), told(tiny(), "left")
    start, trained = answer(net, given), [p.requires_grad for p in net.parameters()]
    stir(net)
    now = answer(net, given)
    assert (now - start).abs().max() > 1e-3
    with net.reference():
        assert torch.equal(answer(net, given), start)
    with pytest.raises(RuntimeError, match="inside"), net.reference():
        raise RuntimeError("inside")
    assert torch.equal(answer(net, given), now)
    assert [p.requires_grad for p in net.parameters()] == trained


def test_a_net_without_adapter_has_no_reference():
    with pytest.raises(ValueError, match=r"no adapter to turn off.*keep a frozen copy"), tiny().reference():
        pass
