"""What gridded files of air quality call things: names, units, axes, and which way is up. One form for all readers.

The form: dims `time`, `y`, `x`; coordinates `lat`, `lon` (y, x) in degrees, row 0 in the south, longitude in [-180, 180);
`pm2p5` and `pm10` in ug m-3. It follows the CF conventions (two-dimensional auxiliary coordinates, standard names).
Latitudes that fall with the row, longitudes from 0 to 360, one-dimensional axes, other spellings and kg m-3 are brought
into it; what cannot be (no units, no coordinates) is a ValueError that says what to write. Nothing is regridded.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

import numpy as np
import xarray as xr

VARIABLES = ("pm2p5", "pm10")
STANDARD = "mass_concentration_of_{}_ambient_aerosol_particles_in_air"
# ours: spellings elsewhere, lower case and without . _ -
SPELLINGS = {
    "pm2p5": ("pm2p5", "pm25", "pm25tot", "88101"),
    "pm10": ("pm10", "pm10tot", "85101"),
    "u10": ("u10", "10u"),
    "v10": ("v10", "10v"),
    "pblh": ("pblh", "pbl", "blh"),
    "precip": ("precip",),
    "t2m": ("t2m", "2t", "temp2"),
    "height": ("height", "ht", "altitude", "orography"),
    "land": ("land", "lwmask", "lsm", "landfraction"),
}
MASS = {"ug": 1.0, "microgram": 1.0, "micrograms": 1.0, "mg": 1e3, "g": 1e6, "kg": 1e9, "ng": 1e-3}
UNITS = {  # of the forcing that has a name of its own, the usual spelling first; any other forcing may have any unit
    "u10": ("m s-1", "m/s", "meters/sec"),
    "v10": ("m s-1", "m/s", "meters/sec"),
    "pblh": ("m", "meters"),
    "precip": ("mm h-1", "mm/h", "mm hr-1", "mm/hr"),
    "t2m": ("K", "kelvin"),
}
LATITUDES, LONGITUDES = ("lat", "latitude", "xlat"), ("lon", "longitude", "xlong", "lng")
EAST = {"x", "west_east", "col", "i"}


def plain(name: str) -> str:
    """A name without case, dots, dashes, underscores and blanks."""
    return "".join(letter for letter in str(name).lower() if letter not in "._- ")


def ours(name: str) -> str | None:
    """Our name of a variable or species as others spell it ("PM2.5", "PM25_TOT" -> "pm2p5"), or None."""
    return next((known for known, names in SPELLINGS.items() if plain(name) in names), None)


def find(ds: xr.Dataset, name: str, place: str, names: Mapping[str, str]) -> str | None:
    """What the file calls our variable `name`: by `names` ({ours: theirs}), then standard_name, then spelling; or None."""
    if names.get(name) in ds.data_vars:
        return names[name]
    for theirs, variable in ds.data_vars.items():
        if name in VARIABLES and variable.attrs.get("standard_name") == STANDARD.format(name):
            return str(theirs)
    spelled = [str(theirs) for theirs in ds.data_vars if str(theirs) == name or ours(theirs) == name]
    if len(spelled) > 1 and name not in spelled:
        raise ValueError(f"{place}: {' and '.join(spelled)} could both be {name}; write names: {{{name}: ...}}")
    return name if name in spelled else next(iter(spelled), None)


def micrograms(units: str | None, place: str) -> float:
    """The factor that brings concentrations of these units to ug m-3.

    Raises ValueError naming `place` where units are absent or no mass per volume of air (ppb needs a temperature).
    """
    mass, _, volume = _spelling(units).partition("/")
    if not volume and mass.endswith("m-3"):
        mass, volume = mass.removesuffix("m-3"), "m3"
    if mass in MASS and volume == "m3":
        return MASS[mass]
    got = "no units" if units is None else f"units {units!r}"
    raise ValueError(f"{place} has {got}; a concentration must say ug m-3 or kg m-3")


def check_units(name: str, units: str | None, place: str) -> None:
    """Raises ValueError unless a forcing says its units, and those that we know by name say the right ones."""
    if units is None:
        raise ValueError(f"{place} has no units; write the attribute units ({UNITS.get(name, ('any text',))[0]})")
    if name in UNITS and _spelling(units) not in map(_spelling, UNITS[name]):
        raise ValueError(f"{place} has units {units!r}; {name} must be in {UNITS[name][0]}; convert it")


def gridded(ds: xr.Dataset, place: str, upside_down: bool = False) -> xr.Dataset:
    """The Dataset with dims time, y, x and, where it has coordinates, lat and lon (y, x) from south to north.

    upside_down: whether row 0 of a file without coordinates of its own is in the north. Other dims stay as they are.
    Raises ValueError where only one of the two coordinates is there, or none and no dims named y and x.
    """
    for theirs in ("valid_time", "Time", "date"):
        if "time" not in ds.variables and theirs in ds.dims:
            ds = ds.rename({theirs: "time"})
    lat, lon = coordinates(ds, place)
    if lat is None:
        if {"y", "x"} - set(ds.dims):
            raise ValueError(
                f"{place} has dims {tuple(ds.dims)} and no lat and lon; name them time, y, x or add lat and lon"
            )
        return southward(ds) if upside_down else ds
    north, east = ds[lat].values, ds[lon].values
    if north.ndim == 1 and east.ndim == 1:
        dims = (ds[lat].dims[0], ds[lon].dims[0])
        north, east = np.meshgrid(north, east, indexing="ij")
    elif north.ndim == 2 and north.shape == east.shape:
        dims = ds[lat].dims
    else:
        raise ValueError(
            f"{place}: lat has shape {north.shape} and lon {east.shape}; both must be (y, x), or (y) and (x)"
        )
    if str(dims[0]).lower() in EAST:  # (x, y)
        north, east, dims = north.T, east.T, dims[::-1]
    bad = ~(np.isfinite(north) & np.isfinite(east) & (np.abs(north) <= 90))
    if bad.any():
        raise ValueError(f"{place}: lat or lon is missing or no degree in {bad.sum()} of {bad.size} cells")
    ds = ds.drop_vars({lat, lon, *dims} & set(ds.variables))
    ds = ds.rename({theirs: mine for theirs, mine in zip(dims, ("y", "x"), strict=True) if theirs != mine})
    ds = ds.assign_coords(
        lat=(("y", "x"), north.astype(float)), lon=(("y", "x"), (east.astype(float) + 180) % 360 - 180)
    )
    return southward(ds) if is_upside_down(ds) else ds


def coordinates(ds: xr.Dataset, place: str) -> tuple[str | None, str | None]:
    """What the file calls latitude and longitude; ValueError if it has only one of them."""
    names = {plain(name): str(name) for name in ds.variables}
    lat, lon = (next((names[name] for name in some if name in names), None) for some in (LATITUDES, LONGITUDES))
    if (lat is None) != (lon is None):
        raise ValueError(f"{place} has {lat or lon} and not the other; it must have both lat and lon, or neither")
    return lat, lon


def is_upside_down(ds: xr.Dataset) -> bool:
    """Whether row 0 is in the north; False for a Dataset without latitudes."""
    lat, _ = coordinates(ds, "")
    if lat is None:
        return False
    north = ds[lat].values
    first, last = (north[0], north[-1]) if str(ds[lat].dims[0]).lower() not in EAST else (north[:, 0], north[:, -1])
    return bool(np.mean(first) > np.mean(last))


def southward(ds: xr.Dataset) -> xr.Dataset:
    """The rows in the opposite order."""
    return ds.isel(y=slice(None, None, -1))


def coarse(values: np.ndarray, k: int) -> np.ndarray:
    """Means of k x k blocks of the last two axes; NaN is left out, a block of NaN is NaN."""
    if k == 1:
        return values
    sums = np.zeros((*values.shape[:-2], values.shape[-2] // k, values.shape[-1] // k), values.dtype)
    counts = np.zeros(sums.shape, np.int16)
    for row in range(k):
        for column in range(k):
            part = values[..., row::k, column::k]
            there = np.isfinite(part)
            sums += np.where(there, part, 0)
            counts += there
    return np.where(counts > 0, sums / np.maximum(counts, 1, dtype=values.dtype), np.nan).astype(values.dtype)


def coarse_lon(lon: np.ndarray, k: int) -> np.ndarray:
    """Longitudes (y, x) of the centres of k x k blocks, also where a block lies across 180 degrees."""
    blocks = _blocks(lon, k)
    first = blocks[..., :1]
    mean = (first + ((blocks - first + 180) % 360 - 180)).mean(-1)
    return (mean + 180) % 360 - 180


def coarse_region(region: np.ndarray, k: int) -> np.ndarray:
    """The most frequent whole number of each k x k block; of several the smallest."""
    blocks = _blocks(region, k)
    ids = np.unique(region)
    return ids[np.argmax([(blocks == one).sum(-1) for one in ids], axis=0)].astype(region.dtype)


def same_grid(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], atol: float = 0.01) -> bool:
    """Whether two pairs (lat, lon) are the same cells within `atol` degrees."""
    if a[0].shape != b[0].shape:
        return False
    east = (np.asarray(a[1]) - b[1] + 180) % 360 - 180
    return bool(np.all(np.abs(np.asarray(a[0]) - b[0]) <= atol) and np.all(np.abs(east) <= atol))


def unknown(got: str, known: Sequence[str]) -> str:
    """The end of a sentence about a name that is not known: the nearest that is, and all of them."""
    return f"{_near(got, known)} (known: {', '.join(known)})"


def _near(got: str, known) -> str:
    near = get_close_matches(str(got), [str(name) for name in known], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _blocks(values: np.ndarray, k: int) -> np.ndarray:
    """(..., y, x) -> (..., y / k, x / k, k * k)."""
    y, x = values.shape[-2:]
    split = values.reshape(*values.shape[:-2], y // k, k, x // k, k)
    return np.moveaxis(split, -3, -2).reshape(*values.shape[:-2], y // k, x // k, k * k)


def _spelling(units: str | None) -> str:
    text = (units or "").strip().lower()
    for theirs, mine in (("µ", "u"), ("μ", "u"), ("³", "3"), ("⁻", "-"), ("**", ""), ("^", ""), (" ", ""), ("·", "")):
        text = text.replace(theirs, mine)
    return text
