"""One corpus stored as a folder, as tar shards and as a table: the same items by content."""

import io
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from torchtitan_flux.data.sources.registry import build_source
from torchtitan_flux.data.sources.source import SourceOptions
from torchtitan_flux.data.transforms import to_training_image
from torchtitan_flux.latents import ImageSize

SIZE = ImageSize(24, 24)
COUNT = 42

KINDS = [
    ("jpg", "RGB", {"quality": 90}),
    ("jpg", "L", {"quality": 80, "progressive": True}),
    ("jpg", "CMYK", {}),
    ("png", "RGB", {}),
    ("png", "RGBA", {}),
    ("png", "P", {}),
    ("png", "LA", {}),
    ("png", "1", {}),
    ("png", "I;16", {}),
    ("webp", "RGB", {"quality": 90}),
    ("webp", "RGBA", {"lossless": True}),
    ("gif", "P", {}),
    ("bmp", "RGB", {}),
    ("tiff", "RGB", {"compression": "tiff_lzw"}),
]


def corpus() -> dict[str, tuple[str, bytes, list[str]]]:
    """stem -> (suffix, file, captions); every kind in three sizes."""
    rng = np.random.default_rng(7)
    files = {}
    for i in range(COUNT):
        suffix, mode, options = KINDS[i % len(KINDS)]
        width, height = (int(n) for n in rng.integers(20, 160, 2))
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 4), np.uint8), "RGBA")
        image = small.resize((width, height), Image.Resampling.BICUBIC)
        if mode == "I;16":
            deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
            image = Image.fromarray(deep)
        elif mode in ("LA", "RGBA"):
            image = image.convert(mode)
        else:
            image = image.convert("RGB").convert(mode)
        if i % 5 == 0 and suffix == "jpg":
            exif = Image.Exif()
            exif[0x0112] = 6
            options = options | {"exif": exif}
        file = io.BytesIO()
        image.save(file, {"jpg": "JPEG"}.get(suffix, suffix.upper()), **options)
        captions = [f"picture {i}", *(f"also № {i}, {n}" for n in range(i % 3))]
        files[f"picture-{i:02d}"] = (suffix, file.getvalue(), captions)
    return files


def as_folder(path):
    for i, (stem, (suffix, data, captions)) in enumerate(corpus().items()):
        place = path / ("a" if i % 2 else "b")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{stem}.{suffix}").write_bytes(data)
        (place / f"{stem}.txt").write_text("\n".join(captions), encoding="utf-8")


def as_tars(path):
    path.mkdir()
    files = list(corpus().items())
    for shard in range(3):
        with tarfile.open(path / f"shard-{shard}.tar", "w") as tar:
            for stem, (suffix, data, captions) in files[shard::3]:
                members = (suffix, data), ("txt", "\n".join(captions).encode())
                for end, content in members:
                    info = tarfile.TarInfo(f"{stem}.{end}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def as_table(path):
    path.mkdir()
    files = list(corpus().values())
    for part in range(2):
        table = {
            "image": [{"bytes": data, "path": None} for _, data, _ in files[part::2]],
            "captions": [captions for _, _, captions in files[part::2]],
        }
        pq.write_table(pa.table(table), path / f"{part}.parquet")


WRITERS = {"folder": as_folder, "webdataset": as_tars, "parquet": as_table}


def contents(name, path) -> dict[tuple[str, ...], bytes]:
    """captions -> pixels as trained on."""
    source = build_source(name, "train", SourceOptions(path=str(path), captions_by_line=True))
    found = {}
    for i in range(len(source)):
        item = source[i]
        pixels = to_training_image(item.image, SIZE, 3)
        found[item.captions] = pixels.tobytes()
    return found


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, ...], tuple[str, bytes]]:
    """captions -> suffix, pixels as trained on."""
    wanted = {}
    for suffix, data, captions in corpus().values():
        image = Image.open(io.BytesIO(data))
        wanted[tuple(captions)] = suffix, to_training_image(image, SIZE, 3).tobytes()
    return wanted


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_items_in_every_format(tmp_path, name, expected):
    datasets.disable_progress_bars()
    WRITERS[name](tmp_path / "data")
    wanted = {captions: pixels for captions, (_, pixels) in expected.items()}
    assert len(wanted) == COUNT
    assert contents(name, tmp_path / "data") == wanted
