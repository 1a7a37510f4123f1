"""A 3 GB archive on the 27 km grid is evaluated in under 1 GB of memory, and by two workers with the same numbers."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import xarray as xr
import yaml

ROOT = Path(__file__).parents[3]
ROWS, COLUMNS, FRAMES, STATIONS = 128, 174, 4840, 400
FORCING = {"u10": "m s-1", "v10": "m s-1", "pblh": "m", "precip": "mm h-1", "t2m": "K"}
UNITS = {"pm2p5": "ug m-3", "pm10": "ug m-3", **FORCING}
SCRIPT = textwrap.dedent(
    """
    import json, sys
    from pathlib import Path
    import numpy as np
    from distributed import Client, LocalCluster
    from apps.air_quality import baselines, counts, verification
    from data.air_quality import load

    def forecast(rows):
        "Damped by the maps known at the initial time, so that every store of the archive is read."
        return [
            row["window"].history()[-1:] * np.exp(0.01 * row["window"].given().mean()) * np.ones((20, 1, 1, 1), np.float32)
            for row in rows
        ]

    def peak():
        "MB. Not ru_maxrss, which a process inherits from the one that started it."
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024

    if __name__ == "__main__":
        splits = load(sys.argv[1])
        rows = [row | {"scheme": "korea", "costs": "agency"} for row in splits["test"]]
        train = [row | {"scheme": "korea", "costs": "agency"} for row in splits["train"]]
        mine = counts.reduce_blocks(rows, forecast)
        found = {"rows": len(rows), "confusion": mine.confusion.sum((0, 1)).tolist()}
        past = counts.reduce(rows, baselines.climatology(train, rows))
        arms = {"model": mine, "climatology": past}
        found["tables"] = len(verification.tables(rows, arms)) + len(verification.plots(rows, arms))
        found["peak_mb"] = peak()
        with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
            with Client(cluster) as client:
                theirs = counts.reduce_blocks(rows, forecast, client=client)
                found["worker_peak_mb"] = list(client.run(peak).values())
        found["equal"] = all(np.array_equal(getattr(mine, name), getattr(theirs, name)) for name in vars(mine))
        print(json.dumps(found))
    """
)


def write(folder: Path, frames: int, rows: int, columns: int, stations: int) -> None:
    """An archive of noise, uncompressed, every six hours from 2020-01-01; stations report two thirds of the time."""
    times = np.datetime64("2020-01-01T00", "ns") + np.timedelta64(6, "h") * np.arange(frames)
    lat, lon = np.meshgrid(20 + 0.25 * np.arange(rows), 95 + 0.3 * np.arange(columns), indexing="ij")
    grid = {"lat": (("y", "x"), lat), "lon": (("y", "x"), lon)}
    for store, names in (("analysis", ("pm2p5", "pm10")), ("forcing", FORCING)):
        noise = da.random.default_rng(0).integers(
            1, 100, (len(names), frames, rows, columns), chunks=(1, 40, rows, columns)
        )
        maps = {
            name: (("time", "y", "x"), noise[i].astype(np.float32), {"units": UNITS[name]})
            for i, name in enumerate(names)
        }
        plain = {name: {"compressors": None} for name in names}
        xr.Dataset(maps, grid | {"time": times}).to_zarr(folder / f"{store}.zarr", encoding=plain, consolidated=False)
    rng = np.random.default_rng(0)
    place = rng.permutation(rows * columns)[:stations]
    reports = rng.gamma(2.0, 18.0, (2, frames, stations)).astype(np.float32)
    reports[rng.random(reports.shape) < 1 / 3] = np.nan
    obs = {
        name: (("time", "station"), part, {"units": "ug m-3"})
        for name, part in zip(("pm2p5", "pm10"), reports, strict=True)
    }
    there = {"time": times, "lat": ("station", lat.ravel()[place]), "lon": ("station", lon.ravel()[place])}
    xr.Dataset(obs, there | {"station_id": ("station", np.arange(stations))}).to_zarr(
        folder / "obs.zarr", consolidated=False
    )
    static = {"land": (lon > 110).astype(np.float32), "region": np.where(lat > 36, 1, 2).astype(np.int16)}
    xr.Dataset({name: (("y", "x"), part) for name, part in static.items()}, grid).to_netcdf(folder / "static.nc")
    ends = [
        times[round(share * frames)].astype("datetime64[h]") for share in (0.7, 0.8)
    ]  # of train, and where test begins
    splits = {
        "train": {"from": "2020-01-01T00", "to": str(ends[0]), "every_h": 24},
        "test": {"from": str(ends[1]), "to": str(times[-1].astype("datetime64[h]")), "every_h": 72},
    }
    settings = {
        "step_h": 6,
        "history": 2,
        "leads": 20,
        "coarsen": 1,
        "splits": splits,
        "regions": {1: "north", 2: "south"},
    }
    (folder / "archive.yaml").write_text(yaml.safe_dump(settings))


def evaluate(tmp_path: Path) -> dict:
    script = tmp_path / "evaluate.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(script), str(tmp_path / "archive")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_a_3_gb_archive_is_evaluated_in_under_1_gb_and_by_two_workers_with_equal_numbers(tmp_path):
    folder = tmp_path / "archive"
    folder.mkdir()
    try:
        write(folder, FRAMES, ROWS, COLUMNS, STATIONS)
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) > 3e9
        found = evaluate(tmp_path)
    finally:
        shutil.rmtree(folder)
    assert found["rows"] > 70
    assert found["equal"]
    assert sum(map(sum, found["confusion"][0])) > 70 * 20 * STATIONS / 2
    assert found["peak_mb"] < 1000, found
    assert len(found["worker_peak_mb"]) == 2
    assert max(found["worker_peak_mb"]) < 1000, found
