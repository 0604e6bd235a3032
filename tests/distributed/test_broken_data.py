"""Real files, 3 % of them broken: the same run and the same list on any number of ranks."""

import io
import json
import math
import zlib
from pathlib import Path

import pytest
from data_files import png_of, write_samples
from ranks import run_ranks
from tiny_run import Run, arguments, refusal, train, worst

from torchtitan_flux.data.sources.shapes import ShapesSource
from torchtitan_flux.latents import ImageSize

ITEMS, STEPS, GLOBAL_BATCH = 200, 25, 8  # every item is wanted once


def jpeg(index: int, size: tuple[int, int] = (80, 72)) -> tuple[bytes, str]:
    item = ShapesSource("train", ImageSize(72, 80))[index]
    buffer = io.BytesIO()
    item.image.resize(size).save(buffer, "JPEG", quality=85)
    return buffer.getvalue(), item.captions[0]


def samples(*indices: int) -> list[tuple[str, bytes, str]]:
    return [(f"{index:03d}.jpg", *jpeg(index)) for index in indices]


BROKEN = {
    "011.jpg": (jpeg(11)[0][:800], "a caption", "truncated"),
    "042.jpg": (b"this is no picture at all\n" * 40, "a caption", "no image"),
    "077.jpg": (b"", "a caption", "empty"),
    "101.png": (
        png_of(60_000, 60_000, (b"IDAT", zlib.compress(bytes(1000)))),
        "a caption",
        "decompression bomb",
    ),
    "150.jpg": (jpeg(150)[0], "", "has no caption"),
    "199.jpg": (jpeg(199, (3, 4))[0], "a caption", "too small: 3 x 4 pixels"),
}


@pytest.fixture(scope="module")
def broken_set(tmp_path_factory) -> Path:
    """200 pictures in a folder; six are broken, each in another way."""
    found = {name: (name, data, caption) for name, data, caption in samples(*range(ITEMS))}
    del found["101.jpg"]
    found |= {name: (name, data, caption) for name, (data, caption, _) in BROKEN.items()}
    return write_samples("folder", tmp_path_factory.mktemp("pictures"), found.values())


def run(ranks: int, data: Path, dump: Path, *more: str) -> Run:
    argv = arguments(
        dump,
        GLOBAL_BATCH // ranks,
        *("--training.dataset", "folder", "--training.dataset_path", str(data)),
        *("--training.steps", str(STEPS), "--checkpoint.interval", "100"),
        *("--training.dataloader.num_workers", "1", "--validation.no-enable"),
        *more,
    )
    return run_ranks(ranks, train, argv)[0]


def listed(dump: Path) -> list[dict]:
    return [json.loads(line) for line in (dump / "quarantine.jsonl").read_text().splitlines()]


def test_pictures_without_any_caption_are_trained_on_when_that_is_said(tmp_path):
    """With the empty caption the run trains, on every picture; without the key it is refused."""
    files = [(f"{index}.jpg", jpeg(index)[0], "") for index in range(GLOBAL_BATCH)]
    pictures = write_samples("folder", tmp_path / "pictures", files)
    argv = ("--training.steps", "2", "--checkpoint.no-enable")
    told = run(1, pictures, tmp_path / "told", *argv, "--data.default_caption", "")
    assert told.error == ""
    assert list(told.losses) == [1, 2]
    assert all(map(math.isfinite, told.losses.values()))
    assert not (tmp_path / "told/quarantine.jsonl").exists()
    keys = ("--training.dataset", "folder", "--training.dataset_path", str(pictures))
    (said,) = run_ranks(1, refusal, arguments(tmp_path / "not", GLOBAL_BATCH, *keys, *argv))
    assert "has no caption" in said


def test_broken_files_change_nothing_between_ranks(broken_set, tmp_path):
    runs = {ranks: run(ranks, broken_set, tmp_path / str(ranks)) for ranks in (1, 4)}
    lists = {ranks: listed(tmp_path / str(ranks)) for ranks in runs}
    assert lists[1] == lists[4]
    reasons = {entry["item"]: entry["reason"] for entry in lists[1]}
    assert reasons.keys() == BROKEN.keys()
    for item, (_, _, reason) in BROKEN.items():
        assert reason in reasons[item].lower(), item
    for one in runs.values():
        assert f"{broken_set}: 200 items" in one.log
        assert "          1  cannot be read: has no caption (150.jpg)" in one.log.splitlines()
        assert one.error == ""
        assert len(one.losses) == STEPS
        assert worst(one.losses, runs[1].losses) <= 1e-5


def test_past_the_share_the_run_stops_with_the_list(tmp_path):
    files = samples(*range(40))
    files[::4] = [(name, data[:-200], caption) for name, data, caption in files[::4]]  # not headers
    folder = write_samples("folder", tmp_path / "pictures", files)
    stopped = run(2, folder, tmp_path, "--data.max_unreadable_share", "0.01")
    assert stopped.error.startswith("TooManyUnreadable")
    assert "data.max_unreadable_share = 0.01" in stopped.error
    for entry in listed(tmp_path):
        assert entry["item"] in stopped.error


def test_other_items_of_the_same_number_are_noticed_on_resume(tmp_path):
    data = write_samples("folder", tmp_path / "pictures", samples(*range(10)))

    def continued(steps: int) -> str:
        keys = ("--training.steps", str(steps), "--checkpoint.interval", "1")
        return run(1, data, tmp_path, *keys).log

    assert "are other ones" not in continued(1) + continued(2)
    (data / "003.jpg").rename(data / "3b.jpg")
    (data / "003.txt").rename(data / "3b.txt")
    assert "The data set has 10 items as before, but" in continued(3)
    (data / "3b.jpg").unlink()
    assert "The data set had 10 items and now has 9" in continued(4)
