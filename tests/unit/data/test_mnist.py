import gzip
import io
import pickle
import struct

import datasets
import numpy as np
import pytest
from PIL import Image

from torchtitan_flux.data.sources.digits import digit_captions
from torchtitan_flux.data.sources.registry import build_source
from torchtitan_flux.data.sources.source import SourceOptions, UnreadableItem


def arrays(split):
    rng = np.random.default_rng(len(split))
    count = 7 if split == "train" else 5
    return rng.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


def write_idx(folder, packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    for split, prefix in ("train", "train"), ("held_out", "t10k"):
        images, labels = arrays(split)
        for kind, array in ("images-idx3", images), ("labels-idx1", labels):
            data = idx(array)
            name = f"{prefix}-{kind}-ubyte" + (".gz" if packed else "")
            (folder / name).write_bytes(gzip.compress(data) if packed else data)


def write_parquet(folder):
    for split, part in ("train", "train"), ("held_out", "test"):
        images, labels = arrays(split)
        encoded = []
        for image in images:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            encoded.append({"bytes": file.getvalue(), "path": None})
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)]),
            }
        )
        columns = {"image": encoded, "label": [int(label) for label in labels]}
        table = datasets.Dataset.from_dict(columns, features)
        table.to_parquet(folder / "mnist" / f"{part}-00000-of-00001.parquet")


def source_of(path, split="train"):
    return build_source("mnist", split, SourceOptions(path=path and str(path)))


@pytest.mark.parametrize("layout", ["idx", "gzip", "torchvision", "parquet"])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_layouts(tmp_path, layout, split):
    datasets.disable_progress_bars()
    if layout == "parquet":
        write_parquet(tmp_path)
    else:
        write_idx(tmp_path / "MNIST/raw" if layout == "torchvision" else tmp_path, layout == "gzip")
    source = source_of(tmp_path, split)
    images, labels = arrays(split)
    assert source.name == "mnist"
    assert len(source) == len(images)
    for reader in source, pickle.loads(pickle.dumps(source)):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            item = reader[i]
            np.testing.assert_array_equal(np.asarray(item.image), image)
            assert item.captions == digit_captions(int(label))
    ids = {source_of(tmp_path, s)[i].item_id for s in ("train", "held_out") for i in range(5)}
    assert len(ids) == 10


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-images-idx3-ubyte", lambda d: d[:-1], "do not hold the"),
        ("train-images-idx3-ubyte", lambda d: d + b"0", "do not hold the"),
        ("train-images-idx3-ubyte", lambda d: b"", "begins with , not as IDX"),
        ("train-images-idx3-ubyte", lambda d: d[:9], "ends within"),
        ("train-labels-idx1-ubyte", lambda d: b"\0\0\x0d" + d[3:], "begins with 00000d01"),
        ("train-labels-idx1-ubyte", lambda d: d[:-1] + b"\x0a", "label 10 is not in 0 to 9"),
        ("train-labels-idx1-ubyte", lambda d: idx(np.zeros(6, np.uint8)), "6 labels for the 7"),
    ],
)
def test_damaged_files(tmp_path, name, damage, message):
    write_idx(tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        source_of(tmp_path)


@pytest.mark.parametrize("place", [5, 40, -4])
def test_damaged_gzip_files(tmp_path, place):
    write_idx(tmp_path, packed=True)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    data = bytearray(file.read_bytes())
    data[place] ^= 0xFF
    file.write_bytes(data[: -1 if place == 5 else None])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: damaged gzip"):
        source_of(tmp_path)


def test_without_data(tmp_path, monkeypatch):
    def unreachable(name):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ValueError,
        match=r"training\.dataset_path: ylecun/mnist .*\(offline\).*`hf download ylecun/mnist",
    ):
        source_of(None)
    with pytest.raises(ValueError, match=r"validation\.dataset_path: .*holds no \.parquet"):
        source_of(tmp_path, "held_out")


def test_labels_are_checked(tmp_path, monkeypatch):
    one = datasets.Dataset.from_dict({"image": [b"x"], "label": [11]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(train=one))
    with pytest.raises(UnreadableItem, match="train/0: label 11 is not in 0 to 9"):
        source_of(None)[0]
    with pytest.raises(ValueError, match="no test part"):
        source_of(None, "held_out")
