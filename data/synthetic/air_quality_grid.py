"""The ground of the synthetic air-quality world: a map grid, East Asia's coasts and heights, emissions and regions.

Coasts are hand-drawn polygons of about half a degree and heights a few Gaussian hills, enough for a 1 degree grid and a
recognisable map; nothing is downloaded. Row 0 is the southernmost. A grid carries a ring of one cell around the cells
of the archive: there the air is background air, which the wind brings in.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

EARTH_M = 6_370_000.0

# (longitude, latitude), degrees
COASTS = {
    "mainland": """138 54.5 141 53.5 140.5 50 140 48 138 46 135.5 44 133 42.7 131 42.5 129.8 41 127.6 39.8 127.5 39.2
        128.4 38.5 129.4 37 129.5 35.6 128.8 35 127.5 34.6 126.4 34.5 126.4 36 126.6 37.3 125 37.8 125 39.3 124.4 39.9
        122.8 39.6 121.3 38.8 121.5 39.6 122 40.6 121 40.8 119.5 39.8 118.5 39.1 117.7 38.8 118 38.2 119 37.4 120 37.6
        121 37.7 122.5 37.3 122.4 36.9 120.8 36.5 119.8 35.5 119.3 34.9 120.3 34.2 120.9 33 121.8 31.9 121.8 31
        120.8 30.3 121.9 29.8 121.7 28.5 120.8 27.8 119.8 26.3 118.9 25 117.8 24.2 116.6 23.2 114.5 22.6 113.5 22.1
        111.8 21.6 110.5 21.2 110.3 20.3 109.8 20.4 109.7 21.5 108.3 21.6 107 20.8 106.3 20 105.7 18.8 108 16 109.3 13
        107 10.4 105 8.7 104.8 10 102 12.5 100.5 13.5 99.5 10 98.5 12 97.5 16 94.3 16 94.3 18 92 21.5 90 22 85 20 80 15
        77 8 72 20 60 25 60 80 150 80 155 60 142 59""",
    "Kyushu": "129.8 33.3 131 33.9 132 33 131.4 31.4 130.2 31.2 129.8 32.7",
    "Shikoku": "132.3 33.9 134.4 34.3 134.6 33.8 133.8 33.4 133 32.8 132.4 33.3",
    "Honshu": """130.9 34 132.5 35.4 135.5 35.7 136.8 36.8 137.3 37.4 138.8 37.8 139.8 39 140 40.5 140.3 41.2 141.4 41.4
        142 39.6 141 38.2 141 37 140.8 35.7 139.8 35 138.5 34.7 137 34.6 135.8 33.5 135 34.3 133 34.2""",
    "Hokkaido": "140.1 41.5 140.5 43.2 141.6 43.4 141.7 45.4 143 44.5 145.3 44 145.3 43.2 143.3 42 141 42.4",
    "Sakhalin": "142 46 142 54 143.2 53 143 49 143.6 46.5",
    "Taiwan": "120.1 23 121.5 25.3 122 25 120.9 22",
    "Hainan": "108.7 19.3 110 20.1 111 19.7 109.5 18.2",
}
# latitude, longitude, height (m), half-widths in degrees of latitude and longitude
HILLS = {
    "Tibet": (33, 92, 4500, 4.5, 8.5),
    "Yunnan": (26, 102, 1900, 3.0, 3.0),
    "Mongolia": (46, 102, 1600, 5.0, 9.0),
    "Ordos": (39, 109, 1000, 2.5, 4.0),
    "Taihang": (38.5, 112.5, 700, 3.0, 1.2),
    "Qinling": (33.6, 107.5, 1300, 0.8, 3.0),
    "Khingan": (47.5, 120, 800, 4.0, 2.0),
    "Changbai": (42.0, 128, 1100, 1.5, 1.5),
    "Wuyi": (27.0, 117, 600, 2.0, 1.5),
    "Taebaek": (37.5, 128.7, 600, 1.2, 0.6),
    "Japanese Alps": (36.2, 137.8, 1300, 1.0, 1.0),
    "Taiwan": (23.6, 121, 1500, 0.9, 0.5),
}
# latitude, longitude, strength, half-width in km
HOT_SPOTS = {
    "Beijing-Tianjin": (39.5, 116.8, 1.00, 110),
    "Shijiazhuang": (37.8, 114.8, 1.00, 110),
    "Jinan": (36.4, 117.5, 0.90, 130),
    "Zhengzhou": (34.6, 113.8, 0.90, 120),
    "Xi'an": (34.3, 108.9, 0.75, 90),
    "Shanghai": (31.6, 120.2, 0.85, 140),
    "Wuhan": (30.5, 114.3, 0.75, 120),
    "Chengdu": (30.0, 105.0, 0.80, 130),
    "Guangzhou": (23.1, 113.3, 0.60, 110),
    "Shenyang": (41.7, 123.3, 0.70, 110),
    "Harbin": (45.6, 126.6, 0.60, 110),
    "Seoul": (37.3, 127.0, 0.65, 80),
    "Tokyo": (35.7, 139.5, 0.40, 80),
}
RURAL = 0.12  # of a hot spot's strength, on all land
GOBI = (38.0, 45.0, 98.0, 113.0)  # south, north, west, east: where dust rises
# south, north, west, east: land cells between them, first that holds
REGIONS = {
    "Korea": (34.0, 40.0, 124.9, 130.0),
    "Honshu": (33.5, 41.3, 130.6, 143.0),
    "Northeast China": (40.5, 50.0, 119.8, 131.0),
    "Beijing-Tianjin-Hebei": (37.0, 42.5, 113.5, 119.8),
    "Shandong": (34.5, 37.0, 115.0, 122.6),
    "Central Plains": (32.0, 37.0, 110.6, 115.0),
    "Guanzhong": (33.0, 37.6, 104.0, 110.6),
    "Yangtze Delta": (28.5, 34.5, 115.0, 122.4),
    "Central Yangtze": (26.0, 32.0, 109.5, 115.0),
    "Sichuan Basin": (27.5, 33.0, 102.5, 109.5),
    "Pearl River Delta": (21.0, 26.0, 108.5, 117.0),
    "Gobi": (39.0, 46.0, 100.0, 112.0),
}


@dataclass(frozen=True, eq=False)
class Grid:
    """Cells with a ring of one cell around: lat, lon (Y + 2, X + 2) in degrees; width (Y + 2, 1), depth in metres.

    x, y (X,), (Y,): map coordinates without the ring, in the units of `mapping`, the CF attributes of the projection.
    """

    lat: np.ndarray
    lon: np.ndarray
    width: np.ndarray
    depth: float
    x: np.ndarray
    y: np.ndarray
    mapping: dict

    @property
    def shape(self) -> tuple[int, int]:
        """(Y, X), without the ring."""
        return len(self.y), len(self.x)

    @cached_property
    def inner(self) -> np.ndarray:
        """(Y + 2, X + 2) float32: 0 on the ring, 1 elsewhere."""
        return np.pad(np.ones(self.shape, np.float32), 1)

    @cached_property
    def area(self) -> np.ndarray:
        """(Y + 2, X + 2) square metres."""
        return np.broadcast_to(self.width * self.depth, self.lat.shape)

    @cached_property
    def land(self) -> np.ndarray:
        """(Y + 2, X + 2): share of nine points of a cell that lie on land."""
        shares = []
        slopes = [np.gradient(field) for field in (self.lat, self.lon)]
        for up in (-1 / 3, 0, 1 / 3):
            for right in (-1 / 3, 0, 1 / 3):
                lat, lon = (
                    field + up * north + right * east
                    for field, (north, east) in zip((self.lat, self.lon), slopes, strict=True)
                )
                shares.append(np.any([_inside(lat, lon, np.array(text.split(), float)) for text in COASTS.values()], 0))
        return np.mean(shares, 0)

    @cached_property
    def height(self) -> np.ndarray:
        """(Y + 2, X + 2) metres above the sea, 0 on the sea."""
        hills = sum(
            top * np.exp(-(((self.lat - lat) / high) ** 2) - ((self.lon - lon) / wide) ** 2)
            for lat, lon, top, high, wide in HILLS.values()
        )
        return self.land * (30 + hills)

    @cached_property
    def emission(self) -> np.ndarray:
        """(Y + 2, X + 2): emission in units of a hot spot's peak; 0 on the ring."""
        spots = sum(
            strength * np.exp(-(self.distance(lat, lon) ** 2) / (2 * width**2))
            for lat, lon, strength, width in HOT_SPOTS.values()
        )
        rural = RURAL * np.exp(-self.height / 1500) * np.clip((44 - self.lat) / 8, 0.2, 1)
        return self.land * (spots + rural) * self.inner

    @cached_property
    def region(self) -> np.ndarray:
        """(Y, X) int16: 1 + place in REGIONS of a land cell; 0 on the sea and where no region is."""
        lat, lon, land = (field[1:-1, 1:-1] for field in (self.lat, self.lon, self.land))
        region = np.zeros(self.shape, np.int16)
        for number, (south, north, west, east) in enumerate(REGIONS.values(), start=1):
            there = (lat >= south) & (lat < north) & (lon >= west) & (lon < east) & (land >= 0.5)
            region[there & (region == 0)] = number
        return region

    def distance(self, lat: float, lon: float) -> np.ndarray:
        """(Y + 2, X + 2) km to a point, on a plane tangent there."""
        north = np.radians(self.lat - lat) * EARTH_M
        east = np.radians(self.lon - lon) * EARTH_M * np.cos(np.radians(lat))
        return np.hypot(north, east) / 1000

    @cached_property
    def axes(self) -> dict[str, dict[str, str]]:
        """CF attributes of the coordinates y and x."""
        if self.mapping["grid_mapping_name"] == "latitude_longitude":
            names = {"y": ("degrees_north", "latitude"), "x": ("degrees_east", "longitude")}
        else:
            names = {"y": ("m", "projection_y_coordinate"), "x": ("m", "projection_x_coordinate")}
        return {axis: {"units": units, "standard_name": standard} for axis, (units, standard) in names.items()}

    def without_ring(self, field: np.ndarray) -> np.ndarray:
        """(..., Y, X) of fields (..., P) or (..., Y + 2, X + 2)."""
        leading = field.shape[:-1] if field.shape[-1] == self.lat.size else field.shape[:-2]
        return field.reshape(*leading, *self.lat.shape)[..., 1:-1, 1:-1]

    def smooth_field(self, generator: np.random.Generator, scale_km: float) -> np.ndarray:
        """(Y + 2, X + 2): a Gaussian random field of variance 1 whose correlation falls over about scale_km."""
        waves = generator.standard_normal((200, 2)) / scale_km
        phases = generator.uniform(0, 2 * np.pi, 200)
        north = np.radians(self.lat - 36) * EARTH_M / 1000
        east = np.radians(self.lon - 120) * EARTH_M / 1000 * np.cos(np.radians(36))
        angle = waves[:, 0, None, None] * north + waves[:, 1, None, None] * east + phases[:, None, None]
        return np.sqrt(2 / 200) * np.cos(angle).sum(0)


def lat_lon(south: float = 20, north: float = 51, west: float = 100, east: float = 147, step: float = 1.0) -> Grid:
    """Cells whose centres lie at every `step` degrees from south to north and from west to east, both included."""
    rows, columns = round((north - south) / step) + 1, round((east - west) / step) + 1
    y, x = south + step * np.arange(-1.0, rows + 1), west + step * np.arange(-1.0, columns + 1)
    lat, lon = np.meshgrid(y, x, indexing="ij")
    depth = float(np.radians(step) * EARTH_M)
    mapping = {"grid_mapping_name": "latitude_longitude", "earth_radius": EARTH_M}
    return Grid(lat, lon, depth * np.cos(np.radians(y))[:, None], depth, x[1:-1], y[1:-1], mapping)


def lambert(rows: int, columns: int, km: float) -> Grid:
    """Square cells around 38 N 126 E on a Lambert conformal map (parallels 30 and 60): (128, 174, 27) is CMAQ's East Asia.

    The map's scale factor (1 +- 0.06) is taken for 1 in the transport.
    """
    import pyproj

    y, x = (km * 1000 * (np.arange(-1, count + 1) + 0.5 - count / 2) for count in (rows, columns))
    mapping = {
        "grid_mapping_name": "lambert_conformal_conic",
        "standard_parallel": [30.0, 60.0],
        "longitude_of_central_meridian": 126.0,
        "latitude_of_projection_origin": 38.0,
        "earth_radius": EARTH_M,
    }
    project = pyproj.Proj(proj="lcc", lat_1=30, lat_2=60, lon_0=126, lat_0=38, R=EARTH_M)
    lon, lat = project(*np.meshgrid(x, y), inverse=True)
    return Grid(lat, lon, np.full((rows + 2, 1), km * 1000.0), km * 1000.0, x[1:-1], y[1:-1], mapping)


def _inside(lat: np.ndarray, lon: np.ndarray, coast: np.ndarray) -> np.ndarray:
    """Whether points lie in a closed polygon given as longitude, latitude, longitude, ... (even-odd rule)."""
    east, north = coast[::2], coast[1::2]
    inside = np.zeros(lat.shape, bool)
    for x1, y1, x2, y2 in zip(east, north, np.roll(east, 1), np.roll(north, 1), strict=True):
        if y1 != y2:
            crosses = (y1 > lat) != (y2 > lat)
            inside ^= crosses & (lon < (x2 - x1) * (lat - y1) / (y2 - y1) + x1)
    return inside
