"""What the launcher adds to the environment of its ranks."""

import pytest

from torchtitan_flux.launching.job import ALLOCATOR, unset

QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def test_what_is_unset_is_added():
    assert unset({}, 1, "linux") == {**QUIET, **EXPANDABLE}
    assert unset({}, 2, "linux") == {**QUIET, **EXPANDABLE, "OMP_NUM_THREADS": "1"}
    assert unset({}, 1, "darwin") == QUIET, "it has no such memory"


@pytest.mark.parametrize("name", ALLOCATOR)
def test_whoever_sets_the_allocator_under_any_name_is_left_alone(name):
    assert unset({name: "max_split_size_mb:512"}, 1, "linux") == QUIET
    assert unset({name: ""}, 1, "linux") == QUIET, "set to torch's own choice"


def test_what_is_set_stays():
    given = {"OMP_NUM_THREADS": "8", "TORCH_CPP_LOG_LEVEL": "INFO"}
    assert unset(given, 4, "linux") == EXPANDABLE
