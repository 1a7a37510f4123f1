"""Windows made by hand, and the columns that a row of them has."""

from dataclasses import dataclass, field

import numpy as np
import pytest

COLUMNS = {"scheme": "korea", "costs": "agency", "alert_share": 0.3}


@dataclass(frozen=True)
class Window:
    """Equal by name, as windows of an archive are: what they hold is read each time."""

    name: str
    frames: np.ndarray = field(compare=False, repr=False)  # (L, V, Y, X), NaN = not observed
    places: np.ndarray = field(compare=False, repr=False)  # (Y, X)
    past: np.ndarray = field(compare=False, repr=False)
    variables: tuple[str, ...] = ("pm2p5", "pm10")
    region_names: tuple | dict = field(default=None, compare=False, repr=False)
    step_h: int = 6

    def observed(self):
        return self.frames

    def history(self):
        return self.past

    def region(self):
        return self.places


def random_field(rng, *shape):
    """Concentrations of every class of every scheme, float32."""
    return rng.gamma(0.9, 60.0, shape).astype(np.float32)


@pytest.fixture
def make():
    """make(frames or None, seed=..., shape=..., missing=..., places=..., variables=...) -> window"""

    def made(frames=None, *, seed=0, shape=(4, 2, 5, 6), missing=0.4, places=None, **fields):
        rng = np.random.default_rng(seed)
        if frames is None:
            frames = random_field(rng, *shape)
            frames[rng.random(shape) < missing] = np.nan
        frames = np.asarray(frames, dtype=np.float32)
        y, x = frames.shape[2:]
        places = rng.choice([0, 3, 7], (y, x)) if places is None else np.asarray(places)
        fields = {"region_names": {3: "west", 7: "east"}} | fields
        return Window(f"{seed}-{frames.shape}", frames, places, random_field(rng, 2, *frames.shape[1:]), **fields)

    return made


@pytest.fixture
def score():
    """score(reward, completions, windows, **columns) -> scores, given the columns that the reward names."""
    from core.reward import Reward

    def scored(reward, completions, windows, **columns):
        windows = list(windows) if isinstance(windows, list | tuple) else [windows] * len(completions)
        known = Reward.of(reward.__name__, reward)
        row = COLUMNS | columns
        names = [name for name in known.required if name != "window"]
        return reward(list(completions), window=windows, **{name: [row[name]] * len(windows) for name in names})

    return scored


@pytest.fixture
def rng():
    return np.random.default_rng(7)
