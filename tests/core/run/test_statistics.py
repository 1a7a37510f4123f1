import math

import numpy as np
import pytest

from core.run.statistics import bootstrap_mean, mean, paired_bootstrap, wilson


@pytest.mark.parametrize(
    ("k", "expected"), [(183, (0.470565746129, 0.574652245153)), (207, (0.539207626843, 0.641664338283))]
)
def test_wilson_interval_equals_known_values(k, expected):
    assert wilson(k, 350) == pytest.approx(expected, abs=1e-12)


def test_wilson_interval_stays_within_zero_and_one_and_knows_nothing_without_trials():
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-12)
    assert wilson(10, 10)[1] == pytest.approx(1, abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="k=5"):
        wilson(5, 4)


def test_bootstrap_of_independent_items_agrees_with_the_normal_interval():
    values = np.random.default_rng(3).normal(2.0, 1.0, 2000)
    value, lo, hi = bootstrap_mean(values)
    error = values.std() / math.sqrt(values.size)
    assert value == pytest.approx(values.mean())
    assert (lo, hi) == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=0.1 * error)


def test_two_clusters_give_their_three_possible_means():
    # Resamples of {0, 1}: both 0 (1/4), mixed (1/2), both 1 (1/4); the mean weighs items, 3 against 1.
    value, lo, hi = bootstrap_mean([0, 0, 0, 1], clusters=["a", "a", "a", "b"])
    assert (value, lo, hi) == (0.25, 0.0, 1.0)


def test_copies_of_one_item_do_not_narrow_the_clustered_interval():
    values = np.random.default_rng(0).normal(size=40)
    plain = bootstrap_mean(values)
    copied = bootstrap_mean(np.repeat(values, 25), clusters=np.repeat(np.arange(40), 25))
    naive = bootstrap_mean(np.repeat(values, 25))
    assert copied == pytest.approx(plain)
    assert naive[2] - naive[1] < 0.3 * (plain[2] - plain[1])


def test_pairs_with_an_unscored_side_are_left_out():
    nan = math.nan
    assert paired_bootstrap([0, nan, 1, 0], [1, 1, nan, 1]) == (1.0, 1.0, 1.0)
    assert all(map(math.isnan, paired_bootstrap([nan, None], [1, 1])))


def test_pairing_removes_the_differences_between_items():
    before = np.random.default_rng(1).normal(size=500) * 100
    assert paired_bootstrap(before, before + 1) == pytest.approx((1, 1, 1))


def test_one_cluster_gives_a_mean_but_no_interval():
    change, lo, hi = paired_bootstrap([0, 0], [1, 0], clusters=["db", "db"])
    assert change == 0.5
    assert math.isnan(lo)
    assert math.isnan(hi)


def test_one_seed_gives_one_interval_and_lengths_must_agree():
    values = np.arange(30.0)
    assert bootstrap_mean(values, seed=5) == bootstrap_mean(values, seed=5) != bootstrap_mean(values, seed=6)
    with pytest.raises(ValueError, match="2 items and after 3"):
        paired_bootstrap([0, 1], [0, 1, 2])
    with pytest.raises(ValueError, match="30 values but 2"):
        bootstrap_mean(values, clusters=[0, 1])


# -- weights ---------------------------------------------------------------------------------------------------------------


def test_a_weighted_mean_is_the_rate_of_all_cases():
    # 1 of 4 and 3 of 4 hits, and 6 of 8; an item without cases and one that was not scored have no say.
    values, weights = [0.25, 0.75, 0.75, math.nan, math.nan], [4, 4, 8, 0, math.nan]
    assert mean(values, weights) == pytest.approx(10 / 16)
    assert bootstrap_mean(values, weights=weights)[0] == pytest.approx(10 / 16)
    assert mean([1.0, math.nan, 3.0]) == 2.0
    assert math.isnan(mean([math.nan], [0]))
    assert math.isnan(mean([math.nan]))


def test_two_weighted_clusters_give_their_three_possible_means():
    value, lo, hi = bootstrap_mean([0, 1], clusters=["a", "b"], weights=[1, 3])
    assert (value, lo, hi) == (0.75, 0.0, 1.0)


def test_equal_weights_say_what_no_weights_say():
    chance = np.random.default_rng(4)
    before, after, clusters = chance.random(60), chance.random(60), chance.integers(0, 12, 60)
    ones = np.full(60, 7.0)
    assert bootstrap_mean(before, clusters, weights=ones) == pytest.approx(bootstrap_mean(before, clusters))
    plain = paired_bootstrap(before, after, clusters)
    assert paired_bootstrap(before, after, clusters, weights=(ones, ones)) == pytest.approx(plain)


def test_each_arm_of_a_pair_has_its_own_weights_within_a_resample():
    # Every cluster has before 1 of 4 and 3 of 4 and after 2 of 2 and 0 of 6: whatever is drawn, 4/8 and 2/8.
    before, after = [0.25, 0.75] * 5, [1.0, 0.0] * 5
    weights = [4, 4] * 5, [2, 6] * 5
    change = paired_bootstrap(before, after, np.repeat(np.arange(5), 2), weights=weights)
    assert change == pytest.approx((-0.25, -0.25, -0.25))


def test_a_pair_s_interval_is_that_of_a_slow_bootstrap():
    chance = np.random.default_rng(1)
    values, weights, clusters = chance.random((2, 30)), chance.integers(0, 9, (2, 30)), np.arange(30) // 5
    values[weights == 0] = np.nan
    made, rng = [], np.random.default_rng(7)
    for drawn in rng.integers(0, 6, size=(2000, 6)):
        items = np.concatenate([np.flatnonzero(clusters == cluster) for cluster in drawn])
        rates = [np.nansum(v[items] * w[items]) / w[items].sum() for v, w in zip(values, weights, strict=True)]
        made.append(rates[1] - rates[0])
    _, lo, hi = paired_bootstrap(*values, clusters, n=2000, seed=7, weights=weights)
    assert (lo, hi) == pytest.approx(tuple(np.percentile(made, [2.5, 97.5])))


def test_an_item_without_cases_keeps_its_partner_and_one_that_was_not_scored_does_not():
    nan = math.nan
    before, after = [0.5, 1.0, nan, 0.0], [nan, 0.5, 0.75, nan]
    # After has no cases of the first item; before has none of the third; after's fourth was not scored.
    change = paired_bootstrap(before, after, weights=([2, 2, 0, 2], [0, 2, 2, nan]))
    assert change[0] == pytest.approx((0.5 * 2 + 0.75 * 2) / 4 - (0.5 * 2 + 1.0 * 2) / 4)


def test_a_resample_without_cases_is_left_out_and_one_cluster_with_cases_gives_no_interval():
    nan = math.nan
    assert bootstrap_mean([nan, nan, 0.5, 0.5], weights=[0, 0, 1, 3]) == (0.5, 0.5, 0.5)
    value, lo, hi = bootstrap_mean([nan, 0.5], weights=[0, 2])
    assert (value, math.isnan(lo), math.isnan(hi)) == (0.5, True, True)
    assert all(map(math.isnan, paired_bootstrap([nan], [nan], weights=([nan], [nan]))))
    with pytest.raises(ValueError, match="give one weight per value"):
        bootstrap_mean([1.0, 2.0], weights=[1.0])
