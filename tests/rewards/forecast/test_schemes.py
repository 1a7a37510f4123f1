import re

import numpy as np
import pytest

from rewards.forecast.schemes import SCHEMES, classes, scheme_named

VARIABLES = ("pm2p5", "pm10")
PAIRS = [(name, variable) for name in SCHEMES for variable in VARIABLES]


@pytest.mark.parametrize(("name", "variable"), PAIRS)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_value_on_an_edge_is_of_the_upper_class_in_numpy_torch_and_xarray(name, variable, kind):
    import torch
    import xarray

    edges = np.array(SCHEMES[name].edges[variable], dtype=kind)
    values = np.concatenate([np.nextafter(edges, kind(0)), edges, np.nextafter(edges, kind(1e9))])
    expected = np.concatenate([np.arange(len(edges)), *[np.arange(1, len(edges) + 1)] * 2])
    found = classes(values, SCHEMES[name].edges[variable])
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.digitize(values, edges), expected)
    np.testing.assert_array_equal(torch.bucketize(torch.tensor(values), torch.tensor(edges), right=True), expected)
    labelled = xarray.DataArray(values, dims="cell")
    np.testing.assert_array_equal(sum((labelled >= edge).astype(int) for edge in edges), expected)
    lazily = xarray.apply_ufunc(
        classes, labelled.chunk(cell=4), kwargs={"edges": edges}, dask="parallelized", output_dtypes=[np.int8]
    )
    np.testing.assert_array_equal(lazily.compute(), expected)


def test_classes_of_the_worked_cells():
    values = np.array([14.9, 15.0, 34.9, 35.0, 75.0])  # arXiv 2511.22169's reward has 15, 35 and 75 one class lower
    np.testing.assert_array_equal(classes(values, SCHEMES["korea"].edges["pm2p5"]), [0, 1, 1, 2, 3])


def test_an_edge_that_float32_rounds_down_is_reached_by_the_same_number():
    assert float(np.float32(0.7)) < 0.7
    assert classes(np.array([0.7], dtype=np.float32), (0.7,))[0] == 1


def test_a_us_class_ends_after_truncation():
    assert list(classes(np.array([9.0, 9.05, 9.1, 35.4, 35.5]), SCHEMES["us"].edges["pm2p5"])) == [0, 0, 1, 1, 2]
    assert list(classes(np.array([54.9, 55.0, 154.0, 155.0]), SCHEMES["us"].edges["pm10"])) == [0, 1, 1, 2]


def test_missing_has_no_class_and_each_variable_its_own_edges():
    values = np.full((1, 2, 1, 2), 40, dtype=np.float32)
    values[..., 1] = np.nan
    edges = np.array(SCHEMES["korea"].of(VARIABLES))[:, None, None, :]
    np.testing.assert_array_equal(classes(values, edges)[0, :, 0], [[2, -1], [1, -1]])


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_a_scheme_is_whole(scheme):
    edges = np.array(scheme.of(VARIABLES))
    assert edges.shape == (2, len(scheme.classes) - 1)
    assert (np.diff(edges) > 0).all()
    assert 0 < scheme.alert < len(scheme.classes)
    assert scheme.of(("pm10",)) == (scheme.edges["pm10"],)


def test_an_unknown_scheme_or_variable_is_named():
    with pytest.raises(ValueError, match=re.escape("unknown scheme 'Korea'; did you mean 'korea'? (known: korea, us")):
        scheme_named("Korea")
    with pytest.raises(ValueError, match="korea has no edges for 'o3'; it has: pm2p5, pm10"):
        SCHEMES["korea"].of(("pm2p5", "o3"))
