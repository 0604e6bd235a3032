"""tests/integration_tests: its rows are what they seem, and the four 8-rank meshes run."""

import pytest
from integration_tests.run_tests import arguments, run_row
from integration_tests.table import GLOBAL_BATCH, REFERENCE, build_flux_tests_list

from torchtitan_flux.startup.load_config import ConfigError, load_config

TABLE = {row.test_name: row for row in build_flux_tests_list()}
MESHES = [
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("hsdp_cp", "pp_fsdp")),
    *(pytest.param(name, marks=pytest.mark.long) for name in ("fsdp_tp", "fsdp_cp_tp")),
]


def test_names_are_unique_and_the_reference_comes_first():
    rows = build_flux_tests_list()
    assert len(TABLE) == len(rows)
    assert rows[0].test_name == REFERENCE
    assert len(rows[0].starts) == 1


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_every_row_is_a_configuration_that_can_run(row, monkeypatch, tmp_path):
    for start in row.starts:
        if start.command == "infer":
            continue  # its own options are not the configuration's
        monkeypatch.setenv("WORLD_SIZE", str(row.ranks(start)))
        config = load_config(arguments(row, start, tmp_path))
        assert config.training.global_batch_size == GLOBAL_BATCH
        assert config.model.flavor == "flux-tiny"


def test_a_key_that_does_not_exist_is_not_accepted(monkeypatch, tmp_path):
    row = TABLE[REFERENCE]
    with pytest.raises((ConfigError, SystemExit)):
        load_config([*arguments(row, row.starts[0], tmp_path), "--training.stepps", "3"])


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[int, float]:
    """Losses of one rank."""
    folder = tmp_path_factory.mktemp("reference")
    result = run_row(TABLE[REFERENCE], folder, None)
    assert result.wrong == []
    return result.losses


@pytest.mark.parametrize("name", MESHES)
def test_eight_ranks_train_as_one_does(name, reference, tmp_path):
    assert run_row(TABLE[name], tmp_path, reference).wrong == []
