"""The trajectory is the same on any number of ranks, with accumulation, and when continued."""

import shutil
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny_run import GLOBAL_BATCH, STEPS, arguments, loss_series, refusal, worst
from transformers import T5Config, T5EncoderModel


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> tuple[dict[int, float], Path]:
    dump = tmp_path_factory.mktemp("one")
    series = loss_series(1, arguments(dump, GLOBAL_BATCH))
    assert list(series) == list(range(1, STEPS + 1))
    assert series[STEPS] < 0.98 * series[1], "nothing was learnt: the comparison would be empty"
    return series, dump


DDP = ("--parallelism.data_parallel_replicate_degree", "2")
KEPT = ("--parallelism.fsdp_reshard_after_forward", "never")
CP = ("--parallelism.context_parallel_degree", "2")
TP = ("--parallelism.tensor_parallel_degree", "2")


@pytest.mark.parametrize(("ranks", "local_batch", "more"), [
    pytest.param(1, 2, (), id="1 rank, 4 microbatches"),
    pytest.param(2, 4, (), id="FSDP 2", marks=pytest.mark.long),
    pytest.param(2, 2, (), id="FSDP 2, 2 microbatches", marks=pytest.mark.slow),
    pytest.param(2, 4, KEPT, id="FSDP 2, weights kept"),
    pytest.param(2, 4, DDP, id="DDP 2"),
    pytest.param(4, 2, (), id="FSDP 4", marks=pytest.mark.long),
    pytest.param(4, 1, DDP, id="HSDP 2x2, 2 microbatches"),
    pytest.param(4, 8, (*CP, *TP), id="CP 2 x TP 2"),
    pytest.param(2, 8, CP, id="CP 2", marks=pytest.mark.slow),
    pytest.param(4, 4, TP, id="FSDP 2 x TP 2", marks=pytest.mark.slow),
])  # fmt: skip
def test_same_losses_on_any_mesh(one_rank, tmp_path, ranks, local_batch, more):
    reference, _ = one_rank
    series = loss_series(ranks, arguments(tmp_path, local_batch, *more))
    assert series.keys() == reference.keys()
    assert worst(series, reference) <= 1e-5
    if CP[0] in more or TP[0] in more:  # and back
        shutil.rmtree(tmp_path / "checkpoint" / "step-20")
        series = loss_series(1, arguments(tmp_path, GLOBAL_BATCH))
        assert list(series) == list(range(11, STEPS + 1))
        assert worst(series, reference) <= 1e-5


@pytest.mark.parametrize(("ranks", "local_batch", "more"), [
    (1, GLOBAL_BATCH, ()), pytest.param(2, 2, (), marks=pytest.mark.long), (4, 2, DDP),
    pytest.param(4, 8, (*CP, *TP), marks=pytest.mark.slow),
])  # fmt: skip
def test_continued_from_step_10(one_rank, tmp_path, ranks, local_batch, more):
    reference, dump = one_rank
    shutil.copytree(dump / "checkpoint" / "step-10", tmp_path / "checkpoint" / "step-10")
    series = loss_series(ranks, arguments(tmp_path, local_batch, *more))
    assert list(series) == list(range(11, STEPS + 1))
    if (ranks, local_batch) == (1, GLOBAL_BATCH):
        assert series == {s: reference[s] for s in series}, "the same mesh continues bit by bit"
    assert worst(series, reference) <= 1e-5


def test_another_run_is_refused_by_name(one_rank, tmp_path):
    _, dump = one_rank
    wider = shutil.copytree("assets/tiny/t5", tmp_path / "t5")
    config = T5Config.from_pretrained(wider, d_model=48)
    T5EncoderModel(config).save_pretrained(wider)
    for changes, fragments in {
        ("--debug.seed", "8"): ("debug.seed",),
        ("--training.global_batch_size", "-1"): ("training.global_batch_size",),
        ("--encoder.t5_encoder", str(wider)): ("context_in_dim is 48", "encoder.t5_encoder"),
    }.items():
        (message,) = run_ranks(1, refusal, arguments(dump, 4, *changes))
        assert all(fragment in message for fragment in (*fragments, str(dump))), message


def test_an_unset_seed_is_kept_when_the_run_is_continued(tmp_path):
    argv = [a for a in arguments(tmp_path, GLOBAL_BATCH) if a not in ("--debug.seed", "7")]
    first = loss_series(2, [*argv, "--training.local_batch_size", "4", *DDP])
    shutil.rmtree(tmp_path / "checkpoint" / "step-20")
    second = loss_series(1, argv)
    assert list(second) == list(range(11, STEPS + 1))
    assert worst(second, first) <= 1e-5
