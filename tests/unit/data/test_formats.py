"""One corpus stored as a folder, as tar shards and as a table: the same items by content."""

import io
import multiprocessing
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
from data_files import indexed, to_training_image, write_parquet, write_tar
from PIL import Image

from torchtitan_flux.latents import ImageSize

COUNT = 42
KINDS = [
    ("jpg", "RGB", {"quality": 90}),
    ("jpg", "L", {"quality": 80, "progressive": True}),
    ("jpg", "CMYK", {}),
    *(("png", mode, {}) for mode in ("RGB", "RGBA", "P", "LA", "1", "I;16")),
    ("webp", "RGB", {"quality": 90}),
    ("webp", "RGBA", {"lossless": True}),
    ("gif", "P", {}),
    ("bmp", "RGB", {}),
    ("tiff", "RGB", {"compression": "tiff_lzw"}),
]


def corpus() -> list[tuple[str, bytes, list[str]]]:
    """(name, file, captions); every kind in three sizes."""
    rng = np.random.default_rng(7)
    files = []
    for i in range(COUNT):
        suffix, mode, options = KINDS[i % len(KINDS)]
        width, height = (int(n) for n in rng.integers(20, 160, 2))
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 4), np.uint8), "RGBA")
        image = small.resize((width, height), Image.Resampling.BICUBIC)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        else:
            image = image if mode in ("LA", "RGBA") else image.convert("RGB")
            image = image.convert(mode)
        if i % 5 == 0 and suffix == "jpg":
            exif = Image.Exif()
            exif[0x0112] = 6
            options = options | {"exif": exif}
        file = io.BytesIO()
        image.save(file, {"jpg": "JPEG"}.get(suffix, suffix.upper()), **options)
        captions = [f"picture {i}", *(f"also № {i}, {n}" for n in range(i % 3))]
        files.append((f"picture-{i:02d}.{suffix}", file.getvalue(), captions))
    return files


def write(kind: str, root: Path) -> None:
    for part in range(2):
        files = corpus()[part::2]
        members = [(name, data) for name, data, _ in files]
        texts = [(f"{name.partition('.')[0]}.txt", "\n".join(texts)) for name, _, texts in files]
        if kind == "webdataset":
            write_tar(root / f"{part}.tar", members + texts)
        elif kind == "parquet":
            pictures = [{"bytes": data, "path": None} for _, data in members]
            table = {"image": pictures, "captions": [texts for *_, texts in files]}
            write_parquet(root / f"{part}.parquet", table)
        else:
            (root / str(part)).mkdir(parents=True)
            for name, content in members + texts:
                data = content.encode() if isinstance(content, str) else content
                (root / str(part) / name).write_bytes(data)


def trained_on(image: Image.Image) -> bytes:
    return to_training_image(image, ImageSize(24, 24), 3).tobytes()


@pytest.mark.parametrize("kind", ["folder", "webdataset", "parquet"])
def test_the_same_items_in_every_format(tmp_path, kind):
    datasets.disable_progress_bars()
    write(kind, tmp_path / "data")
    source = indexed(kind, tmp_path / "data", captions_by_line=True)
    items = (source[i] for i in range(len(source)))
    assert {item.captions: trained_on(item.image) for item in items} == {
        tuple(texts): trained_on(Image.open(io.BytesIO(data))) for _, data, texts in corpus()
    }
    assert len(source) == COUNT


@pytest.mark.parametrize("kind", ["folder", "webdataset", "parquet"])
def test_crosses_to_workers(tmp_path, kind):
    datasets.disable_progress_bars()
    write(kind, tmp_path / "data")
    source = indexed(kind, tmp_path / "data")
    expected = [source[i].captions for i in range(COUNT)]
    sent = pickle.dumps(source)
    assert len(sent) < 20_000  # no rows are in it
    assert [pickle.loads(sent)[i].captions for i in range(COUNT)] == expected
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:  # both read at once
            found = pool.map(source.__getitem__, range(COUNT), chunksize=1)
        assert [item.captions for item in found] == expected
