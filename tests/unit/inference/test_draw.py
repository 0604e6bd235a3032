"""Who draws what: every picture once, and every rank as many."""

import pytest

from torchtitan_flux.inference.draw import batches_of, places


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 11, 30])
def test_every_picture_is_drawn_where_its_place_says(count, ranks, batch):
    where = places(count, ranks, batch)
    assert len(where) == len(set(where)) == count
    of_rank = [batches_of(rank, where) for rank in range(ranks)]
    for number, place in enumerate(where):
        assert of_rank[place.rank][place.round][place.row] == number
        assert len(of_rank[place.rank][place.round]) == place.batch <= batch
    shapes = [[len(one) for one in rounds] for rounds in of_rank]
    assert all(one == shapes[0] for one in shapes), "ranks that share a model work in step"
    assert len(shapes[0]) == -(-count // (ranks * batch)), "no round too many"
    assert {i for rounds in of_rank for one in rounds for i in one} == set(range(count))
