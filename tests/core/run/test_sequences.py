import numpy as np
import pytest

from core.run.sequences import Lazy, Spool

PAIR = np.dtype([("value", "f4"), ("members", "f2", (3,))])


def test_items_are_made_when_asked_for_and_anew_each_time():
    made = []

    def square(n):
        made.append(n)
        return n * n

    lazy = Lazy(square, [1, 2, 3, 4])
    assert (len(lazy), made) == (4, [])
    assert [lazy[-1], lazy[0], lazy[0]] == [16, 1, 1]
    assert made == [4, 1, 1]
    part = lazy[1::2]
    assert (len(part), len(made)) == (2, 3)
    assert list(part) == [4, 16]
    with pytest.raises(IndexError):
        lazy[4]


def test_a_spool_gives_back_the_bits_dtype_and_shape_of_what_it_was_given():
    chance = np.random.default_rng(0)
    pairs = np.zeros((2, 2), PAIR)
    pairs["value"], pairs["members"] = chance.random((2, 2)), chance.random((2, 2, 3))
    arrays = [pairs, chance.random((3, 4)).T, np.array([np.nan, -0.0], np.float32), np.zeros((0, 2)), np.int8(3)]
    spool = Spool(arrays[:2])
    spool.extend(arrays[2:])
    for _ in range(2):
        for got, given in zip(spool, map(np.asarray, arrays), strict=True):
            assert (got.dtype, got.shape, got.tobytes()) == (given.dtype, given.shape, given.tobytes())
    assert [part.shape for part in spool[1:3]] == [(4, 3), (2,)]
    assert spool[-1] == 3
    with pytest.raises(IndexError):
        spool[5]


def test_a_spool_can_grow_while_it_is_read_and_its_items_are_copies():
    spool = Spool([np.zeros(2)])
    spool[0][:] = 5
    spool.extend(spool[0] + i for i in (1.0, 2.0))
    assert [array.tolist() for array in spool] == [[0, 0], [1, 1], [2, 2]]
