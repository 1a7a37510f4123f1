import math

import numpy as np
import pytest

from core.run.statistics import bootstrap_mean, paired_bootstrap, wilson


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
    mean, lo, hi = bootstrap_mean(values)
    error = values.std() / math.sqrt(values.size)
    assert mean == pytest.approx(values.mean())
    assert (lo, hi) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.1 * error)


def test_two_clusters_give_their_three_possible_means():
    # Resamples of {0, 1}: both 0 (1/4), mixed (1/2), both 1 (1/4); the mean weighs items, 3 against 1.
    mean, lo, hi = bootstrap_mean([0, 0, 0, 1], clusters=["a", "a", "a", "b"])
    assert (mean, lo, hi) == (0.25, 0.0, 1.0)


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
