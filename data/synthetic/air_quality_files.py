"""CF-1.x files of gridded fields and station series, as Zarr (v3) or NetCDF, written a part at a time along `time`."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from .air_quality_grid import Grid

Format = Literal["zarr", "netcdf"]
PM = {  # standard names
    "pm2p5": "mass_concentration_of_pm2p5_ambient_aerosol_particles_in_air",
    "pm10": "mass_concentration_of_pm10_ambient_aerosol_particles_in_air",
}
ATTRIBUTES = {name: {"units": "ug m-3", "standard_name": standard} for name, standard in PM.items()} | {
    "u10": {"units": "m s-1", "standard_name": "x_wind", "role": "analysis"},
    "v10": {"units": "m s-1", "standard_name": "y_wind", "role": "analysis"},
    "pblh": {"units": "m", "standard_name": "atmosphere_boundary_layer_thickness", "role": "analysis"},
    "precip": {"units": "mm h-1", "standard_name": "lwe_precipitation_rate", "role": "analysis"},
    "t2m": {"units": "K", "standard_name": "air_temperature", "role": "analysis"},
    "emission": {"units": "ug m-2 s-1", "long_name": "emission inventory of primary fine particles"},
    "land": {"units": "1", "standard_name": "land_area_fraction"},
    "height": {"units": "m", "standard_name": "surface_altitude"},
    "region": {"long_name": "number of the region in archive.yaml, 0 is none"},
    "lat": {"units": "degrees_north", "standard_name": "latitude"},
    "lon": {"units": "degrees_east", "standard_name": "longitude"},
    "alt": {"units": "m", "standard_name": "surface_altitude"},
    "station_id": {"cf_role": "timeseries_id"},
    "prediction_timedelta": {"standard_name": "forecast_period"},
}
CLOCK = {"units": "hours since 1970-01-01", "dtype": "i8"}


class Fields:
    """A file of maps that grows along time, `frames` of them in a chunk, so that no more is ever held in memory.

    leads: of forecasts, timedelta64[h]; their dimensions are time (of the init), prediction_timedelta, y, x.
    """

    def __init__(self, path: Path, format: Format, grid: Grid, frames: int, leads: np.ndarray | None = None):
        self.path, self.format, self.grid, self.frames, self.leads = path, format, grid, frames, leads
        self._parts: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
        self._begun = False

    def add(self, hours: np.ndarray, fields: Mapping[str, np.ndarray]) -> None:
        """hours since 1970 (N,); fields (N, [lead,] P) on the flat cells of the grid and its ring."""
        self._parts.append((hours, {name: self.grid.without_ring(field) for name, field in fields.items()}))
        if sum(len(hours) for hours, _ in self._parts) >= self.frames:
            self._flush()

    def close(self) -> None:
        """Writes what is left."""
        if self._parts:
            self._flush()
        if self.format == "zarr":
            _consolidate(self.path)

    def _flush(self) -> None:
        hours = np.concatenate([hours for hours, _ in self._parts])
        fields = {name: np.concatenate([part[name] for _, part in self._parts]) for name in self._parts[0][1]}
        self._parts = []
        if self._begun and self.format == "netcdf":
            import netCDF4

            with netCDF4.Dataset(f"{self.path}.nc", "a") as file:
                done = len(file["time"])
                file["time"][done:] = hours
                for name, values in fields.items():
                    file[name][done:] = values
            return
        lead = {} if self.leads is None else {"prediction_timedelta": self.leads.astype("timedelta64[ns]")}
        dims = ("time", *lead, "y", "x")
        data = gridded(self.grid, {name: (dims, values) for name, values in fields.items()}, hours=hours, **lead)
        if self._begun:
            data = data.drop_vars([name for name, one in data.variables.items() if "time" not in one.dims])
            data.to_zarr(f"{self.path}.zarr", append_dim="time", zarr_format=3, consolidated=False)
        else:
            _create(data, self.path, self.format, self.frames)
        self._begun = True


def gridded(grid: Grid, fields: Mapping[str, tuple[Sequence[str], np.ndarray]], hours=None, **coordinates: np.ndarray):
    """An xarray Dataset with 2-D lat and lon, the projection as `crs`, and the attributes of ATTRIBUTES."""
    import xarray as xr

    data = xr.Dataset(dict(fields), coordinates if hours is None else {"time": as_times(hours), **coordinates})
    data = data.assign_coords(
        y=("y", grid.y, grid.axes["y"]),
        x=("x", grid.x, grid.axes["x"]),
        lat=(("y", "x"), grid.without_ring(grid.lat)),
        lon=(("y", "x"), grid.without_ring(grid.lon)),
    )
    for name in data.data_vars:
        data[name].attrs["grid_mapping"] = "crs"
    data["crs"] = ((), np.int32(0), grid.mapping)
    return _described(data)


def save_stations(path: Path, format: Format, hours: np.ndarray, values: Mapping, places: Mapping, frames: int) -> None:
    """A CF timeSeries file: values {name: (time, station)}, places {lat, lon, alt, station_id: (station,)}."""
    import xarray as xr

    data = xr.Dataset(
        {name: (("time", "station"), field) for name, field in values.items()},
        {"time": as_times(hours), **{name: ("station", field) for name, field in places.items()}},
        {"featureType": "timeSeries"},
    )
    _create(_described(data), path, format, frames)
    if format == "zarr":
        _consolidate(path)


def as_times(hours: np.ndarray) -> np.ndarray:
    """datetime64[ns] of hours since 1970."""
    return hours.astype("datetime64[h]").astype("datetime64[ns]")


def _described(data):
    for name in data.variables:
        data[name].attrs |= ATTRIBUTES.get(name, {})
    data.attrs |= {"Conventions": "CF-1.11", "source": "synthetic world, no observation in it"}
    return data


def _create(data, path: Path, format: Format, frames: int) -> None:
    key, packed = "chunksizes", {}
    if format == "zarr":
        from zarr.codecs import BloscCodec

        key = "chunks"  # a third of the time of the default compression, and smaller
        packed = {"compressors": [BloscCodec(cname="lz4", clevel=3, shuffle="shuffle", typesize=4)]}
    encoding = {
        name: {key: tuple(min(frames, size) if dim == "time" else size for dim, size in one.sizes.items()), **packed}
        for name, one in data.data_vars.items()
        if "time" in one.dims
    }
    if format == "zarr":
        data.to_zarr(f"{path}.zarr", zarr_format=3, consolidated=False, encoding=encoding | {"time": CLOCK})
    else:
        data.to_netcdf(f"{path}.nc", engine="netcdf4", unlimited_dims=["time"], encoding=encoding | {"time": CLOCK})


def _consolidate(path: Path) -> None:
    import zarr

    with warnings.catch_warnings():  # of its place in the specification; readers that know it not read on without it
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(f"{path}.zarr")
