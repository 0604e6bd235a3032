"""Pictures in three formats hold what they were drawn with, and are whole or not there."""

import errno
import json

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from torchtitan_flux.image_file import FORMATS, read_facts, save_picture
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.sampling.generate import SampleSettings, to_pil
from torchtitan_flux.sampling.schedules import Schedule

SETTINGS = SampleSettings(
    ImageSize(48, 112), steps=4, cfg=1.5, guidance=None, schedule=Schedule(3.0), seed=42
)
FACTS = {**SETTINGS.facts(), "prompt": 'ein "großer"\nKreis — 円', "step": 17}
READ = {
    **{"size": "48x112", "steps": "4", "cfg": "1.5", "guidance": "None", "seed": "42"},
    **{"schedule": "shift=3.0", "prompt": 'ein "großer"\nKreis — 円', "step": "17"},
}
ASCII = b"ASCII\0\0\0"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [*FORMATS, ".JPG"])
def test_a_picture_and_its_facts_are_read_back(tmp_path, suffix, channels):
    path = tmp_path / "new" / f"a{suffix}"
    image = to_pil(torch.linspace(-1, 1, channels * 48 * 112).reshape(channels, 48, 112))
    save_picture(image, path, FACTS)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert read_facts(path) == READ
    with Image.open(path) as read:
        difference = np.asarray(read.convert("RGB"), int) - np.asarray(image.convert("RGB"), int)
        if not suffix.endswith("png"):  # ASCII that any viewer shows
            comment = read.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
            assert json.loads(comment.removeprefix(ASCII).decode("ascii")) == READ
    assert np.abs(difference).max() <= (4 if "j" in suffix.lower() else 0)


def test_what_cannot_be_saved_leaves_nothing(tmp_path, monkeypatch):
    image, taken = Image.new("L", (4, 4)), tmp_path / "a.png"
    taken.mkdir()
    with pytest.raises(OSError, match=r"a\.png"):
        save_picture(image, taken, FACTS)
    with pytest.raises(ValueError, match="too"):
        save_picture(image, tmp_path / "b.jpg", {"prompt": "x" * 66_000})

    def full(self, path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_picture(image, tmp_path / "b.png", FACTS)
    assert list(tmp_path.iterdir()) == [taken]


@pytest.mark.parametrize("comment", [ASCII + b"[1]", ASCII + b"{", b"UNICODE\0x", b"", "x"])
def test_somebody_elses_comment_is_no_facts(tmp_path, comment):
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
    Image.new("L", (4, 4)).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(ValueError, match="Error"):
        read_facts(tmp_path / "a.jpg")


def test_a_picture_too_large_to_be_safe_is_no_picture(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    with pytest.raises(ValueError, match="DecompressionBomb"):
        read_facts(tmp_path / "a.png")
