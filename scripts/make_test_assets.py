"""Write the small data set and the tokenizer that torchtitan's FLUX files name.

    python scripts/make_test_assets.py

writes tests/assets/ (or the folder given as argument):

    cc12m_test/cc12m-train-0000.tar  32 drawn pictures of several sizes as WebDataset samples
    tokenizer/                       tokenizer.json and tokenizer_config.json, a T5-like vocabulary

Every run writes the same bytes.
"""

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from tiny_tokenizers import t5_tokenizer

from torchtitan_flux.data.sources.shapes import ShapesSource
from torchtitan_flux.latents import ImageSize

FOLDER = Path(__file__).parent.parent / "tests" / "assets"
SAMPLES = 32
SIZES = (ImageSize(64, 64), ImageSize(48, 80), ImageSize(80, 48), ImageSize(96, 64))
"""Taken in turn: those who read the data set meet several aspect ratios."""
TIME = 1_722_470_400  # of every member, 2024-08-01


def members() -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files of each sample, as in CC12M: .jpg, .json and .txt."""
    sources = [ShapesSource("train", size) for size in SIZES]
    for number in range(SAMPLES):
        item = sources[number % len(sources)][number]
        key = f"{number:09d}"
        picture = io.BytesIO()
        item.image.save(picture, "JPEG", quality=90)
        caption, *others = item.captions
        width, height = item.image.size
        record = {"key": key, "caption": caption, "width": width, "height": height}
        record["captions"] = [caption, *others]
        yield f"{key}.jpg", picture.getvalue()
        yield f"{key}.json", json.dumps(record).encode()
        yield f"{key}.txt", caption.encode()


def write_shard(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members():
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.mode = len(content), TIME, 0o644
            tar.addfile(member, io.BytesIO(content))


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = t5_tokenizer().files
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(files[name], encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the test data set and tokenizer.")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    write_shard(folder / "cc12m_test" / "cc12m-train-0000.tar")
    write_tokenizer(folder / "tokenizer")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
