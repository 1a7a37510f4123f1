import numpy as np
import pytest

from rewards.forecast import fields
from rewards.forecast.schemes import SCHEMES

EDGES = SCHEMES["korea"].of(("pm2p5", "pm10"))
PLAIN = np.array([[[[10.0, 35.0]], [[10.0, 150.0]]]], dtype=np.float32)  # (1, 2, 1, 2)


def test_a_plain_forecast_is_read_by_the_edges():
    assert fields.values(PLAIN) is PLAIN
    np.testing.assert_array_equal(fields.levels(PLAIN, EDGES)[0, :, 0], [[0, 2], [0, 3]])
    np.testing.assert_array_equal(fields.exceedance(PLAIN, EDGES)[0, :, 0, 1], [[1, 1, 0], [1, 1, 1]])
    np.testing.assert_array_equal(fields.members(PLAIN), PLAIN[..., None])
    assert fields.values(PLAIN.astype(float)).dtype == np.float32


def test_a_structured_forecast_is_read_as_it_says():
    made = np.zeros((1, 2, 1, 2), dtype=fields.dtype(3))
    made["value"], made["level"] = 80.0, 1
    made["exceed"], made["members"] = (0.75, 0.5, 0.25), np.arange(8)
    np.testing.assert_array_equal(fields.values(made), np.full(PLAIN.shape, 80))
    np.testing.assert_array_equal(fields.levels(made, EDGES), np.ones(PLAIN.shape))
    np.testing.assert_array_equal(fields.exceedance(made, EDGES)[0, 1, 0, 1], [0.75, 0.5, 0.25])
    np.testing.assert_array_equal(fields.members(made)[0, 0, 0, 0], np.arange(8))
    for part in (fields.values(made), fields.exceedance(made, EDGES), fields.members(made)):
        assert part.dtype == np.float32


def test_a_sure_forecast_of_its_own_classes_reads_as_the_plain_one():
    made = fields.deterministic(PLAIN, fields.levels(PLAIN, EDGES), EDGES)
    for read in (fields.levels, fields.exceedance):
        np.testing.assert_array_equal(read(made, EDGES), read(PLAIN, EDGES))
    np.testing.assert_array_equal(fields.values(made), PLAIN)
    np.testing.assert_array_equal(fields.members(made), np.repeat(PLAIN[..., None], 8, axis=-1))
    assert fields.content_faults(made[None], EDGES, "members") == [None]


def test_a_sure_forecast_may_announce_another_class_than_its_value():
    made = fields.deterministic(PLAIN, np.full(PLAIN.shape, 2), EDGES)
    np.testing.assert_array_equal(fields.exceedance(made, EDGES)[..., :], np.broadcast_to([1, 1, 0], (1, 2, 1, 2, 3)))
    assert np.isfinite(fields.members(fields.deterministic(PLAIN * 1e6, PLAIN, EDGES))).all()


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("good air", "not_a_field"),
        (None, "not_a_field"),
        (PLAIN.astype(int), "wrong_dtype"),
        (np.zeros(PLAIN.shape, dtype=fields.dtype(5)), "wrong_dtype"),
        (PLAIN[:0], "wrong_shape"),
        (np.repeat(PLAIN, 2, axis=0), "wrong_shape"),
        (PLAIN[..., :1], "wrong_shape"),
        (PLAIN[0], "wrong_shape"),
        (np.array(3.0), "wrong_shape"),
    ],
)
def test_what_is_no_forecast_says_so(completion, reason):
    assert fields.form_fault(completion, PLAIN.shape, EDGES)[0] == reason


def test_fewer_leads_half_and_double_precision_and_structured_are_forecasts():
    for completion in (PLAIN, PLAIN.astype(np.float16), PLAIN.astype(float), np.zeros((1, 2, 1, 2), fields.dtype(3))):
        assert fields.form_fault(completion, (20, 2, 1, 2), EDGES) is None


def test_what_cannot_be_is_found_in_the_rollout_that_holds_it():
    stack = np.repeat(PLAIN[None], 5, axis=0)
    stack[1, 0, 0, 0, 0], stack[2, 0, 1, 0, 1], stack[3, 0, 0, 0, 1] = np.nan, -0.1, np.inf
    faults = fields.content_faults(stack, EDGES)
    assert [fault and fault[0] for fault in faults] == [None, "not_finite", "negative", "not_finite", None]


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("value", np.nan, "not_finite"),
        ("value", -1.0, "negative"),
        ("level", 4, "bad_level"),
        ("level", -1, "bad_level"),
        ("exceed", 1.5, "bad_probability"),
        ("exceed", np.inf, "not_finite"),
        ("members", -1.0, "negative"),
        ("members", np.arange(8)[::-1], "bad_members"),
    ],
)
def test_each_part_of_a_structured_forecast_is_checked_by_who_reads_it(part, value, reason):
    stack = np.zeros((2, *PLAIN.shape), dtype=fields.dtype(3))
    stack[part][1, 0, 1, 0, 1] = value
    for read in ("value", "level", "exceed", "members"):
        faults = fields.content_faults(stack, EDGES, read)
        assert [fault and fault[0] for fault in faults] == [None, reason if read == part else None]
