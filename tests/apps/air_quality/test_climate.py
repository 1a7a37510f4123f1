import numpy as np

from apps.air_quality.climate import Climate

HOUR = np.timedelta64(1, "h")


def times(row):
    window = row["window"]
    return np.datetime64(window.init, "h") + window.step_h * HOUR * np.arange(1, window.leads + 1)


def observe(rows, value):
    """value(time, y, x) at every cell of both variables."""
    for row in rows:
        window = row["window"]
        y, x = np.mgrid[: window.shape[0], : window.shape[1]]
        window._observed = np.stack([[value(time, y, x) + 0.0 * y] * 2 for time in times(row)]).astype(np.float32)


def parts(time):
    return time.astype("datetime64[M]").astype(int) % 12, time.astype(int) % 24


def test_a_field_that_repeats_every_day_of_a_month_is_forecast_exactly(air):
    def value(time, y, x):
        month, hour = parts(time)
        return 5 + month + hour / 2 + 3 * y + x

    rows = air.rows(200, first="2021-01-01T00", every_h=30)
    test = air.rows(9, first="2023-03-28T12")
    observe(rows, value)
    observe(test, value)
    climate = Climate(rows)
    for row in test:
        forecast = climate.forecast(row)
        np.testing.assert_allclose(forecast["value"], row["window"].observed(), rtol=1e-5)
        expected = np.digitize(row["window"].observed()[:, 0], [15, 35, 75])
        np.testing.assert_array_equal(forecast["level"][:, 0], expected)
        np.testing.assert_array_equal(forecast["exceed"][:, 0], (expected[..., None] > np.arange(3)))


def test_a_valid_time_counts_once_however_many_windows_hold_it(air):
    rows = air.rows(20, first="2021-01-01T00", every_h=6)  # of four leads each: most times are in four windows
    seen = {}

    def value(time, y, x):
        seen[time] = 10.0 + time.astype(int) % 97
        return seen[time]

    observe(rows, value)
    forecast = Climate(rows[::-1]).forecast(rows[0])
    for lead, time in enumerate(times(rows[0])):
        alike = [seen[other] for other in seen if parts(other) == parts(time)]
        np.testing.assert_allclose(forecast["value"][lead], np.mean(alike), rtol=1e-5)


def test_exceedance_and_members_are_the_frequencies_and_quantiles_of_the_past(air):
    rng = np.random.default_rng(0)
    rows = air.rows(200, first="2021-01-01T00", every_h=24, leads=1)
    drawn = {}

    def value(time, y, x):
        return drawn.setdefault(time, rng.gamma(2.0, 20.0, y.shape))

    observe(rows, value)
    (row,) = air.rows(1, first="2022-01-10T00", leads=1)
    forecast = Climate(rows).forecast(row)
    past = np.stack([field for time, field in drawn.items() if parts(time) == parts(times(row)[0])]).astype(np.float32)
    assert len(past) == 31
    for e, edge in enumerate((15, 35, 75)):
        np.testing.assert_allclose(forecast["exceed"][0, 0, ..., e], (past >= edge).mean(axis=0), atol=1e-3)
    members = np.moveaxis(forecast["members"][0, 0].astype(float), -1, 0)
    assert (np.diff(members, axis=0) >= 0).all()
    below = (past[None] < members[:, None]).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(below, (np.arange(8) + 0.5) / 8, atol=0.02)


def test_a_cell_without_a_history_has_that_of_its_region_or_of_all(air):
    rows = air.rows(60, first="2021-01-01T00", every_h=24)
    observe(rows, lambda time, y, x: np.where(y < 2, 20.0, 60.0))  # region 2 is the rows below 2, region 1 the others
    for row in rows:
        row["window"]._observed[:, :, 4, 5] = np.nan
        row["window"]._observed[:, 0, :2] = np.nan
    forecast = Climate(rows).forecast(rows[0])
    np.testing.assert_allclose(forecast["value"][:, :, 4, 5], 60, rtol=1e-5)
    np.testing.assert_allclose(forecast["value"][:, 0, 0, 3], 60, rtol=1e-5)  # nowhere in its region: all cells
    np.testing.assert_allclose(forecast["value"][:, 1, 0, 3], 20, rtol=1e-5)
    assert (forecast["exceed"][:, 0, 4, 5, 1] == 1).all()


def test_a_month_without_a_history_has_that_of_all_months(air):
    rows = air.rows(30, first="2021-01-01T00", every_h=24)
    observe(rows, lambda time, y, x: 20.0 + 40.0 * (parts(time)[0] == 0))
    (row,) = air.rows(1, first="2021-07-01T00")
    forecast = Climate(rows).forecast(row)
    np.testing.assert_allclose(forecast["value"], 60, rtol=1e-5)
    assert np.isfinite(forecast["members"].astype(float)).all()


def test_a_variable_that_was_never_observed_is_forecast_as_zero(air):
    rows = air.rows(5)
    observe(rows, lambda time, y, x: 60.0)
    for row in rows:
        row["window"]._observed[:, 1] = np.nan
    forecast = Climate(rows).forecast(rows[0])
    for name in ("value", "level", "exceed"):
        assert not forecast[name][:, 1].any()
    assert forecast["members"][:, 1].max() < 1
    np.testing.assert_allclose(forecast["value"][:, 0], 60, rtol=1e-5)
