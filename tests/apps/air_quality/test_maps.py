import socket
import warnings

import numpy as np
import pytest

from apps.air_quality import maps
from rewards.forecast import fields
from rewards.forecast.schemes import SCHEMES

EDGES = np.array(SCHEMES["korea"].of(("pm2p5", "pm10")))
MAPS = (maps.class_map, maps.chance_map)


@pytest.fixture
def forecast(air, monkeypatch):
    """A window on a 12 x 16 map and a forecast of it, with the network cut."""

    def refuse(*args, **kwargs):
        raise AssertionError("a map must not use the network")

    monkeypatch.setattr(socket, "socket", refuse)
    (row,) = air.rows(1, shape=(12, 16), stations=0.2)
    return row["window"], air.forecast(row, 0)


def pixels(picture, colour):
    """(420, 640) bool: where a picture has this colour."""
    return (np.abs(picture - np.asarray(colour)) < 0.003).all(axis=-1)


def flat(window, value):
    return np.full(window.observed().shape, value, dtype=np.float32)


@pytest.mark.parametrize("draw", MAPS)
def test_a_map_is_a_picture_and_the_same_each_time(forecast, draw):
    window, completion = forecast
    picture = draw(window, completion, 2)
    assert picture.shape == (420, 640, 3)
    assert picture.dtype == np.float32
    assert 0 <= picture.min() < picture.max() <= 1
    np.testing.assert_array_equal(picture, draw(window, completion, 2))
    assert (picture != draw(window, completion, 1)).any()
    assert (picture != draw(window, completion, 2, variable=1)).any()


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_every_class_covers_the_cells_that_announce_it(air, scheme):
    (row,) = air.rows(1, shape=(12, 16), scheme=scheme, stations=0.0)
    known = SCHEMES[scheme]
    value, count = flat(row["window"], 1.0), len(known.classes)
    value[0, 0] = np.array([1.0, *known.edges["pm2p5"]])[np.arange(16) * count // 16]  # bands from west to east
    picture = maps.class_map(row["window"], value, 0, scheme)[:, :435]
    columns = np.bincount(np.arange(16) * count // 16, minlength=count)
    middles = []
    for k, colour in enumerate(maps.colours(count)):
        found = pixels(picture, colour)
        share = found.sum() / (columns[k] / 16 * 435 * 365)
        assert 0.6 < share < 1.1, (known.classes[k], share)
        middles.append(np.nonzero(found)[1].mean())
    assert (np.diff(middles) > 0).all()


@pytest.mark.parametrize("count", range(2, 9))
def test_classes_differ_in_lightness_so_that_colour_need_not_be_seen(count):
    linear = np.where((c := maps.colours(count)) <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    lightness = 116 * np.cbrt(luminance) - 16
    assert (np.diff(lightness) < -5).all()


def test_each_variable_has_a_map_by_its_own_edges(forecast):
    window, _ = forecast
    value = flat(window, 1.0)
    value[:, 1] = 140.0  # PM10 is bad up to 150, PM2.5 very bad from 75
    picture = maps.class_map(window, value, 0, variable=1)[:, :435]
    assert pixels(picture, maps.colours(4)[2]).sum() > 80_000


def test_the_south_is_at_the_bottom_and_the_west_at_the_left(forecast):
    window, _ = forecast
    value = flat(window, 1.0)
    value[0, 0, 0, 0] = 500
    window._observed = np.full_like(window._observed, np.nan)
    row, column = np.nonzero(pixels(maps.class_map(window, value, 0)[:, :435], maps.colours(4)[3]))
    assert row.min() > 300
    assert column.max() < 100


def test_stations_are_dots_of_the_class_that_they_observed(forecast):
    window, _ = forecast
    window._observed = np.full_like(window._observed, np.nan)
    bare = maps.class_map(window, flat(window, 1.0), 0)
    window._observed[0, 0, 6, 8] = 80.0
    dotted = maps.class_map(window, flat(window, 1.0), 0)
    extra = pixels(dotted, maps.colours(4)[3]) & ~pixels(bare, maps.colours(4)[3])
    assert 15 < extra.sum() < 200
    row, column = np.nonzero(extra)
    assert np.ptp(row) < 12
    assert np.ptp(column) < 12
    event = maps.chance_map(window, flat(window, 1.0), 0)
    assert pixels(event, maps.colours(5)[-1])[:, :435].sum() > 15


def test_a_cell_without_a_forecast_is_grey_and_no_class(forecast):
    window, _ = forecast
    value = flat(window, 1.0)
    value[0, 0, 4:8] = np.nan
    grey = [int(maps.MISSING[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    for draw in MAPS:
        assert pixels(draw(window, value, 0), grey).sum() > 10_000
        assert pixels(draw(window, flat(window, 1.0), 0), grey).sum() < 50


def test_probabilities_are_shaded_in_fifths(forecast):
    window, completion = forecast
    window._observed = np.full_like(window._observed, np.nan)
    for fifth, chance in enumerate((0.0, 0.2, 0.5, 0.79, 1.0)):
        completion["exceed"][..., 1] = chance + 1e-3 * (fifth == 1)
        picture = maps.chance_map(window, completion, 0)[:, :435]
        assert pixels(picture, maps.colours(5)[fifth]).sum() > 80_000


def test_a_forecast_without_probabilities_is_sure_of_itself(forecast):
    window, _ = forecast
    value = flat(window, 36.0)
    made = fields.deterministic(value, fields.levels(value, EDGES), EDGES)
    np.testing.assert_array_equal(maps.chance_map(window, value, 0), maps.chance_map(window, made, 0))


@pytest.mark.parametrize("south", [-11.0, -60.0])
def test_southern_and_equatorial_maps_are_drawn(forecast, south, monkeypatch):
    window, completion = forecast
    lat = np.linspace(south, south + 22, 12)[:, None] + np.zeros((12, 16))
    monkeypatch.setattr(window, "lat", lambda: lat)
    assert maps.class_map(window, completion, 0).std() > 0.1


def test_an_archive_that_knows_no_land_has_a_map_without_a_coast(forecast, monkeypatch):
    window, completion = forecast
    for land in (np.nan, 1.0):
        monkeypatch.setattr(window, "land", lambda land=land: np.full((12, 16), land))
        warnings.simplefilter("error")  # as of a contour that is nowhere
        assert maps.class_map(window, completion, 0).std() > 0.1


def test_a_lead_that_the_forecast_does_not_have_is_an_error(forecast):
    window, completion = forecast
    with pytest.raises(IndexError):
        maps.class_map(window, completion[:2], 2)
