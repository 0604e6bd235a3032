"""What is said of a disk that is full."""

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch

from torchtitan_flux.files import DiskFull, disk_full


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_torchs_own_error_on_a_full_disk_is_one_of_a_full_disk(tmp_path):
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(Exception) as raised:  # noqa: PT011
        torch.save(torch.zeros(100_000), file)
    full = disk_full(raised.value, tmp_path / "not/there/yet")
    assert full is not None
    disk = str(full).removeprefix("no space left on ").split(": ")[0]
    assert os.path.ismount(disk)
    assert tmp_path.is_relative_to(disk)
    assert "are free" in str(full)
    again = pickle.loads(pickle.dumps(full))  # from rank to rank
    assert (type(again), str(again)) == (DiskFull, str(full))


def test_behind_another_error_and_a_quota(tmp_path):
    try:
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")
    except RuntimeError as error:
        full = disk_full(error, tmp_path)
    assert full is not None


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "Permission denied"), RuntimeError("enforce fail")]
)
def test_another_error_is_none(error, tmp_path):
    assert disk_full(error, tmp_path) is None
