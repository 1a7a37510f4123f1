"""A small archive in memory: windows with the methods of data.air_quality.Window, drawn from a seeded generator."""

from types import SimpleNamespace

import numpy as np
import pytest

from rewards.forecast import fields
from rewards.forecast.schemes import SCHEMES

VARIABLES = ("pm2p5", "pm10")


class FakeWindow:
    """Concentrations with a daily cycle; a share of cells has no station, and a share of hours is missing."""

    variables, step_h, region_names = VARIABLES, 6, {1: "north", 2: "south", 7: "sea"}

    def __init__(self, init, seed, leads=4, shape=(5, 6), stations=0.6):
        self.init, self.leads, self.shape = np.datetime64(init, "ns"), leads, shape
        rng = np.random.default_rng(seed)
        size = (leads, 2, *shape)
        self._analysis = rng.gamma(2.0, 15.0, size).astype(np.float32) * np.float32([1, 2])[:, None, None]
        place = np.random.default_rng(5).random(shape) < stations
        place[0, 0] = stations > 0  # in no region
        self._observed = np.where(place & (rng.random(size) > 0.1), self._analysis * 1.1, np.nan).astype(np.float32)
        self._history = rng.gamma(2.0, 15.0, (2, 2, *shape)).astype(np.float32)
        self._model = (self._analysis * rng.lognormal(0, 0.3, size)).astype(np.float32)

    def observed(self):
        return self._observed

    def analysis(self):
        return self._analysis

    def history(self):
        return self._history

    def model(self):
        return self._model

    def region(self):
        region = np.ones(self.shape, dtype=np.int16)
        region[: self.shape[0] // 2], region[0, 0] = 2, -1
        return region

    def land(self):
        return (np.mgrid[: self.shape[0], : self.shape[1]][1] > self.shape[1] / 3).astype(np.float32)

    def lat(self):
        return np.linspace(30, 42, self.shape[0])[:, None] + np.zeros(self.shape)

    def lon(self):
        return np.linspace(118, 134, self.shape[1])[None, :] + np.zeros(self.shape)


def make_rows(count, first="2023-01-02T00", every_h=18, scheme="korea", costs="agency", **window):
    inits = np.datetime64(first, "h") + every_h * np.arange(count)
    rows = []
    for i, init in enumerate(inits):
        date = init.astype(object)
        year, week, _ = date.isocalendar()
        season = ("DJF", "MAM", "JJA", "SON")[date.month % 12 // 3]
        rows.append(
            {
                "id": str(init),
                "window": FakeWindow(init, i, **window),
                "week": f"{year}-W{week:02d}",
                "season": season,
                "month": date.month,
                "scheme": scheme,
                "costs": costs,
            }
        )
    return rows


def make_forecast(row, seed, skill=0.5, leads=None):
    """A structured forecast around the truth, with probabilities and members of a log-normal distribution."""
    rng = np.random.default_rng(seed)
    window, scheme = row["window"], SCHEMES[row["scheme"]]
    edges = np.array(scheme.of(window.variables))
    centre = window.analysis()[:leads].astype(np.float64)
    centre *= rng.lognormal(0, skill, centre.shape)
    members = np.sort(centre[..., None] * rng.lognormal(0, skill, (*centre.shape, fields.MEMBERS)), axis=-1)
    made = np.empty(centre.shape, fields.dtype(edges.shape[1]))
    made["value"], made["members"] = centre, np.minimum(members, 60_000)
    made["exceed"] = (members[..., None, :] >= edges[:, None, None, :, None]).mean(axis=-1)
    made["level"] = fields.levels(made["value"], edges)
    return made


class FakeActor:
    """Forecasts a row from a generator that the row seeds, with a bias; `asked` counts the rows."""

    def __init__(self, skill, bias=1.0):
        self.skill, self.bias, self.asked = skill, bias, 0

    def complete(self, rows, places):
        assert list(places) == list(range(len(rows)))
        self.asked += len(rows)
        return [self.forecast(row) for row in rows], [False] * len(rows)

    def forecast(self, row):
        seed = int(row["window"].init.astype("datetime64[h]").astype(int))
        made = make_forecast(row, seed, self.skill)
        made["value"] *= self.bias
        return made


class FakeRivals:
    """With the fields of core.run.rivals.Rivals that baselines use; starts are known by the changes that make them."""

    def __init__(self, train, validation, test):
        self.train, self.validation, self.test = train, validation, test
        self.start, self.kept = FakeActor(0.5), {}
        self.actors = {
            "none": self.start,
            "gaussian mean none": FakeActor(0.4, bias=0.7),
            "gaussian mean class": FakeActor(0.4, bias=2.0),
        }

    def shared(self, key, make):
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def fit(self, **changes):
        return self.actors[" ".join(changes.values())]


@pytest.fixture
def air():
    """Makers of rows and forecasts."""
    return SimpleNamespace(rows=make_rows, forecast=make_forecast, Rivals=FakeRivals)
