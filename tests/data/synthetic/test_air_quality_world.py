"""The synthetic air-quality world: transport, chemistry and loss against closed forms; grid, weather and drivers."""

from dataclasses import replace

import numpy as np
import pytest

from data.synthetic import air_quality_world
from data.synthetic.air_quality_grid import HOT_SPOTS, REGIONS, lambert, lat_lon
from data.synthetic.air_quality_weather import DRIVERS, MEMORY_H, PBLH_MIN, WIND_MAX, Climate, Weather, ar1, drivers
from data.synthetic.air_quality_world import LOSS, VENT, YIELD, Air, World, particles

SUMMER_NIGHT = 18 + 24 * 200  # 1970-07-20 18 UTC, a Monday: no heating, 2 h in China, no rush hour


@pytest.fixture(scope="module")
def degrees():
    return lat_lon()


@pytest.fixture(scope="module")
def square():
    return lambert(30, 40, 100.0)


def weather(grid, hours=1, u=0.0, v=0.0, pblh=500.0, precip=0.0, oxidation=0.0):
    shape = (hours, grid.lat.size)
    fields = (np.broadcast_to(np.asarray(field, np.float32), shape) for field in (u, v, pblh, precip, 290.0, oxidation))
    return Weather(*fields)


def moved_only(grid, now, diffusion=air_quality_world.DIFFUSION, wind=(1.0, 1.0)):
    """What the hours of a weather do to tracers that have neither source nor loss."""
    hours = np.full(len(now.u), SUMMER_NIGHT)
    done = Air(grid, diffusion).hours(now, hours, np.zeros(len(hours)), (World(np.zeros(grid.lat.shape), wind),))
    return replace(done, decay=np.ones_like(done.decay), source=0 * done.source, formed=0 * done.formed)


def mass(grid, states):
    return (states.astype(float) * grid.area.reshape(-1)).sum(-1)


def wild(grid, hours, top, seed=0):
    """Random winds, 0 at the edge of the grid, so that nothing passes it."""
    closed = np.pad(np.ones((grid.lat.shape[0] - 4, grid.lat.shape[1] - 4)), 2).reshape(-1)
    u, v = np.random.default_rng(seed).uniform(-top, top, (2, hours, grid.lat.size)) * closed
    return weather(grid, hours, u, v)


@pytest.mark.parametrize("top", [5.0, 90.0])
def test_closed_box_keeps_its_mass_whatever_the_wind(degrees, top):
    state = np.random.default_rng(1).uniform(0, 100, (1, 4, degrees.lat.size)).astype(np.float32)
    states = moved_only(degrees, wild(degrees, 30, top), diffusion=0.0).run(state)
    assert mass(degrees, states[-1]) == pytest.approx(mass(degrees, states[0]), rel=2e-6)
    assert not np.allclose(states[-1], states[0], rtol=0.1)


def test_a_cloud_that_stays_inside_keeps_its_mass_in_the_real_weather_with_diffusion(degrees):
    state = np.zeros((1, 4, *degrees.lat.shape), np.float32)
    state[:, :, 15:18, 24:27] = 1000
    now = Climate(degrees).weather(np.arange(10), drivers(10, np.random.default_rng(0)))
    hours = moved_only(degrees, now)
    states = hours.run(state.reshape(1, 4, -1))
    assert hours.substeps == 1
    assert mass(degrees, states[-1]) == pytest.approx(mass(degrees, states[0]), rel=1e-5)


@pytest.mark.parametrize("top", [5.0, 30.0, 90.0])
def test_nothing_falls_below_zero_and_the_courant_number_is_at_most_one(degrees, top):
    hours = moved_only(degrees, wild(degrees, 20, top, seed=2))
    spikes = np.random.default_rng(3).random((1, 4, degrees.lat.size)) < 0.05
    assert hours.run(1000 * spikes.astype(np.float32)).min() >= 0
    assert hours.stencil[0].min() >= 0
    assert (hours.substeps > 1) == (top > 5)


def test_a_pulse_moves_with_the_wind_and_spreads_as_first_order_upwind_does(square):
    speed, hours, cell = 7.0, 40, 100e3
    state = np.zeros((1, 4, *square.lat.shape), np.float32)
    state[..., 15, 5] = 1000
    states = moved_only(square, weather(square, hours, u=speed), diffusion=0.0).run(state.reshape(1, 4, -1))
    row = states[-1].astype(float).reshape(4, *square.lat.shape)[0]
    place = np.arange(square.lat.shape[1])
    centre = (row.sum(0) * place).sum() / row.sum()
    courant = speed * 3600 / cell
    assert centre == pytest.approx(5 + hours * courant, abs=1e-4)
    assert (row.sum(0) * (place - centre) ** 2).sum() / row.sum() == pytest.approx(
        hours * courant * (1 - courant), rel=1e-4
    )
    assert row[15].sum() == pytest.approx(1000, rel=1e-5)


@pytest.mark.parametrize(("u", "v"), [(-6.0, 0.0), (0.0, 6.0), (0.0, -6.0), (4.0, -5.0)])
@pytest.mark.parametrize("wind", [(1.0, 1.0), (1.06, 0.5)])
def test_the_centre_of_a_pulse_moves_with_any_wind_times_the_factors_of_its_world(square, u, v, wind):
    state = np.zeros((1, 4, *square.lat.shape), np.float32)
    state[..., 15, 20] = 1000
    states = moved_only(square, weather(square, 20, u=u, v=v), wind=wind).run(state.reshape(1, 4, -1))
    field = states[-1].astype(float).reshape(4, *square.lat.shape)[0]
    rows, columns = np.indices(field.shape)
    assert (field * rows).sum() / field.sum() == pytest.approx(15 + 20 * v * wind[1] * 0.036, abs=2e-3)
    assert (field * columns).sum() / field.sum() == pytest.approx(20 + 20 * u * wind[0] * 0.036, abs=2e-3)


def test_diffusion_spreads_a_pulse_by_2_k_t(square):
    state = np.zeros((1, 4, *square.lat.shape), np.float32)
    state[..., 15, 20] = 1000
    states = moved_only(square, weather(square, 30), diffusion=2e4).run(state.reshape(1, 4, -1))
    field = states[-1].astype(float).reshape(4, *square.lat.shape)[0]
    rows, columns = np.indices(field.shape)
    for axis, middle in ((rows, 15), (columns, 20)):
        spread = (field * (axis - middle) ** 2).sum() / field.sum() * 100e3**2
        assert spread == pytest.approx(2 * 2e4 * 30 * 3600, rel=1e-3)


def test_even_air_stays_even_in_the_real_weather(degrees):
    now = Climate(degrees).weather(np.arange(48), drivers(48, np.random.default_rng(4)))
    states = moved_only(degrees, now).run(np.full((1, 4, degrees.lat.size), 10, np.float32))
    assert states.min() > 8
    assert states.max() < 12


@pytest.mark.parametrize("precip", [0.0, 0.5])
def test_without_wind_and_chemistry_the_air_settles_at_emission_over_depth_and_loss(square, precip):
    depth, emission = 500.0, 200.0
    air = Air(square, diffusion=0.0)
    now = weather(square, pblh=depth, precip=precip)
    world = World(emission * square.inner)
    state = np.zeros((1, 4, square.lat.size), np.float32)
    hour = air.hours(now, np.array([SUMMER_NIGHT]), np.zeros(1), (world,))
    for _ in range(2000):
        state = hour.run(state)[-1]
    inside = square.without_ring(state)
    rush = 1 + 0.3 * (np.exp(-36 / 4.5) + np.exp(-289 / 4.5))
    for tracer, share in ((0, 1.0), (1, air_quality_world.GAS)):
        k = LOSS[tracer][0] + LOSS[tracer][1] * precip + VENT * depth / 1000
        assert inside[0, tracer] == pytest.approx(share * emission * rush / (depth * k), rel=2e-5)
    assert not inside[0, 2:].any()


def test_gas_becomes_particles_by_the_yield(square, monkeypatch):
    monkeypatch.setattr(air_quality_world, "LOSS", ((1e-7, 0.0),) * 3)
    monkeypatch.setattr(air_quality_world, "VENT", 0.0)
    air = Air(square, diffusion=0.0)
    now = weather(square, hours=30, oxidation=0.05)
    hours = air.hours(now, np.full(30, SUMMER_NIGHT), np.zeros(30), (World(np.zeros(square.lat.shape)),))
    state = np.zeros((1, 4, square.lat.size), np.float32)
    state[:, 1] = 100
    _, gas, _, secondary = square.without_ring(hours.run(state)[-1])[0]
    assert gas == pytest.approx(100 * np.exp(-0.05 * 30), rel=1e-4)
    assert secondary == pytest.approx(YIELD * (100 - gas), rel=1e-4)


def test_the_ring_keeps_its_air(degrees):
    now = Climate(degrees).weather(np.arange(24) + 24 * 105, drivers(24, np.random.default_rng(0)))
    hours = Air(degrees).hours(now, np.arange(24), np.zeros(24), (World(1000 * degrees.emission),))
    state = np.random.default_rng(0).uniform(1, 9, (1, 4, degrees.lat.size)).astype(np.float32)
    ring = degrees.inner.reshape(-1) == 0
    assert np.array_equal(hours.run(state)[-1][..., ring], state[..., ring])


def test_hours_of_several_worlds_are_those_of_each(degrees):
    rng = np.random.default_rng(5)
    now, series = np.arange(6) + 24 * 100, drivers(6, rng)
    worlds = [World(500 * degrees.emission), World(300 * degrees.emission, (1.1, 0.9))]
    air, state = Air(degrees), rng.uniform(0, 50, (2, 4, degrees.lat.size)).astype(np.float32)
    sky = Climate(degrees).weather(now, series)
    both = air.hours(sky, now, series[:, -1], worlds).run(state)
    for number, world in enumerate(worlds):
        alone = air.hours(sky, now, series[:, -1], (world,)).run(state[number : number + 1])
        np.testing.assert_allclose(both[:, number], alone[:, 0], rtol=1e-6)


def test_regrouped_hours_take_each_world_its_own_weather(degrees):
    rng = np.random.default_rng(6)
    air, climate, world = Air(degrees), Climate(degrees), World(500 * degrees.emission)
    now, series = np.arange(3)[:, None] + np.array([2400, 5000]), rng.standard_normal((3, 2, DRIVERS))
    state = rng.uniform(0, 50, (2, 4, degrees.lat.size)).astype(np.float32)
    flat, hours = series.reshape(6, DRIVERS), now.reshape(6)
    together = air.hours(climate.weather(hours, flat), hours, flat[:, -1], (world,)).regrouped(2).run(state)
    for number in range(2):
        sky = climate.weather(now[:, number], series[:, number])
        alone = air.hours(sky, now[:, number], series[:, number, -1], (world,)).run(state[number : number + 1])
        np.testing.assert_allclose(together[:, number], alone[:, 0], rtol=1e-5)


def test_particles_are_sums_of_tracers():
    fine, coarse = particles(np.array([[[10.0], [99.0], [50.0], [20.0]]]))
    assert fine.item() == pytest.approx(36)
    assert coarse.item() == pytest.approx(95)


def test_weather_is_within_its_bounds_and_single_precision(degrees):
    hours = np.arange(0, 24 * 365, 5)
    sky = Climate(degrees).weather(hours, drivers(len(hours), np.random.default_rng(0)))
    assert all(field.dtype == np.float32 and np.isfinite(field).all() for field in vars(sky).values())
    assert np.hypot(sky.u, sky.v).max() <= WIND_MAX * 1.00001
    assert sky.pblh.min() >= PBLH_MIN
    assert 0 == sky.precip.min() < sky.precip.max() < 20
    assert 230 < sky.t2m.min() < sky.t2m.max() < 320
    summer, winter = sky.t2m[hours // 24 % 365 // 30 == 6].mean(), sky.t2m[hours // 24 % 365 // 30 == 0].mean()
    assert 10 < summer - winter < 40


def test_wind_is_of_the_waves_and_turns_with_the_seasons(degrees):
    climate, calm = Climate(degrees), np.zeros((2, DRIVERS))
    sky = climate.weather(np.array([24 * 14, 24 * 197]), calm)  # middle of January and of July
    coast = np.flatnonzero((abs(degrees.lat - 34) < 0.1) & (abs(degrees.lon - 123) < 0.1)).item()
    assert sky.v[0, coast] < -1 < 1 < sky.v[1, coast]  # from the north in winter, from the south in summer


def test_wind_is_weaker_on_high_ground(degrees):
    hours = np.arange(0, 24 * 365, 31)
    sky = Climate(degrees).weather(hours, drivers(len(hours), np.random.default_rng(0)))
    speed = np.hypot(sky.u, sky.v).mean(0).reshape(degrees.lat.shape)
    low = (degrees.height < 300) & (degrees.lat > 24) & (degrees.lat < 45)
    assert speed[degrees.height > 1500].mean() < 0.9 * speed[low].mean()


def test_drivers_are_ar1_series_of_variance_one():
    noise = np.random.default_rng(0).standard_normal((400, 500, DRIVERS))
    series = ar1(noise)
    assert series[-1].var(0) == pytest.approx(1, abs=0.25)
    lagged = (series[-25] * series[-1]).mean(0)
    assert lagged == pytest.approx(np.exp(-24 / MEMORY_H), abs=0.2)
    assert series.var((0, 1)) == pytest.approx(1, abs=0.1)


def test_cmaq_grid_has_the_published_corners():
    grid = lambert(128, 174, 27.0)
    lat, lon = grid.without_ring(grid.lat), grid.without_ring(grid.lon)
    assert grid.shape == (128, 174)
    assert (lat.min(), lat.max()) == pytest.approx((19.9, 53.9), abs=0.06)
    assert (lon.min(), lon.max()) == pytest.approx((91.7, 160.3), abs=0.06)
    assert lat[0, 87] < lat[-1, 87]
    assert grid.x[0] == -2349e3 + 13.5e3
    assert grid.y[0] == -1728e3 + 13.5e3


def test_degree_grid_begins_in_the_south_and_covers_its_part_of_the_sphere(degrees):
    lat, lon = degrees.without_ring(degrees.lat), degrees.without_ring(degrees.lon)
    assert degrees.shape == lat.shape == (32, 48)
    assert (lat[0, 0], lon[0, 0], lat[-1, -1], lon[-1, -1]) == (20, 100, 51, 147)
    sphere = 6.37e6**2 * np.radians(48) * (np.sin(np.radians(51.5)) - np.sin(np.radians(19.5)))
    assert degrees.without_ring(degrees.area).sum() == pytest.approx(sphere, rel=1e-4)


@pytest.mark.parametrize(
    ("place", "lat", "lon", "on_land"),
    [
        ("Beijing", 40, 116, True),
        ("Seoul", 37, 127, True),
        ("Chengdu", 30, 105, True),
        ("Nagoya", 36, 137, True),
        ("Yellow Sea", 35, 123, False),
        ("East Sea", 40, 134, False),
        ("Pacific", 25, 140, False),
        ("Bohai", 39, 120, False),
    ],
)
def test_land_is_where_it_is(degrees, place, lat, lon, on_land):
    there = degrees.land[(degrees.lat == lat) & (degrees.lon == lon)].item()
    assert (there >= 0.5) == on_land, place


def test_emission_is_on_land_and_highest_at_the_hot_spots(degrees):
    assert not degrees.emission[(degrees.land == 0) | (degrees.inner == 0)].any()
    for lat, lon, *_ in HOT_SPOTS.values():
        near = degrees.distance(lat, lon) < 150
        assert degrees.emission[near].max() > 2 * np.median(degrees.emission[degrees.land >= 0.5])


@pytest.mark.parametrize("grid", [lat_lon(), lambert(128, 174, 27.0)], ids=["1 degree", "27 km"])
def test_regions_are_connected_blocks_of_land(grid):
    assert not grid.region[grid.without_ring(grid.land) < 0.5].any()
    assert set(np.unique(grid.region)) == {0, *range(1, len(REGIONS) + 1)}
    if grid.shape == (32, 48):
        for number, name in enumerate(REGIONS, start=1):
            cells = {tuple(cell) for cell in np.argwhere(grid.region == number)}
            assert len(cells) >= 8, name
            reached, edge = set(), [next(iter(cells))]
            while edge:
                y, x = edge.pop()
                reached.add((y, x))
                around = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
                edge += [cell for cell in around & cells if cell not in reached]
            assert reached == cells, name
