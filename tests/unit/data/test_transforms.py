"""A decoded picture as an array: modes, transparency, crops, resizing."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from torchtitan_flux.data.transforms import to_training_image
from torchtitan_flux.latents import ImageSize


def ramp(width, height):
    """Gray image whose pixel (x, y) has the value 10 x + y."""
    values = 10 * np.arange(width)[None] + np.arange(height)[:, None]
    return Image.fromarray(values.astype(np.uint8))


def bytes_of(image, size, channels=1, *arguments, **more):
    """The training image [channels, H, W] in whole numbers 0 to 255."""
    result = to_training_image(image, size, channels, *arguments, **more)
    return np.round((result + 1) * 127.5).astype(int)


def test_pixels_are_kept_when_the_size_matches():
    image = ramp(7, 5)
    result = to_training_image(image, ImageSize(5, 7), 1)
    assert (result.shape, result.dtype, result.flags.c_contiguous) == ((1, 5, 7), np.float32, True)
    np.testing.assert_array_equal(bytes_of(image, ImageSize(5, 7))[0], np.asarray(image))
    ends = Image.fromarray(np.array([[0, 255]], np.uint8))
    np.testing.assert_array_equal(to_training_image(ends, ImageSize(1, 2), 1), [[[-1, 1]]])


def test_rgb_channels_come_first():
    result = bytes_of(Image.new("RGB", (3, 2), (255, 0, 51)), ImageSize(2, 3), 3)
    assert result.shape == (3, 2, 3)
    assert result[:, 0, 0].tolist() == [255, 0, 51]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "I", "F"]
)
def test_any_mode(mode, channels):
    if mode == "RGBa":
        image = Image.new("RGBA", (6, 4), "white").convert(mode)
    elif mode == "PA":
        image = Image.new("P", (6, 4), 0).convert("PA")
    else:
        image = Image.new(mode, (6, 4))
    result = to_training_image(image, ImageSize(4, 6), channels)
    assert result.shape == (channels, 4, 6)
    assert np.isfinite(result).all()


def test_half_transparent_parts_show_half_of_the_background():
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    np.testing.assert_allclose(to_training_image(half, ImageSize(4, 4), 1), -4e-3, atol=8e-3)


def test_crop_follows_the_draw_in_whole_pixels():
    image, size = ramp(9, 4), ImageSize(4, 6)
    draws = np.arange(0, 1, 0.01)
    lefts = [bytes_of(image, size, 1, (u, 0.3))[0, 0, 0] // 10 for u in draws]
    assert np.bincount(lefts).tolist() == [25, 25, 25, 25]
    assert bytes_of(ramp(8, 4), size)[0, 0, 0] == 10  # centre by default


def test_resize_covers_and_crops_the_longer_side():
    image = Image.new("L", (40, 10), 0)
    image.paste(255, (30, 0, 40, 10))  # the right quarter
    size = ImageSize(5, 5)
    assert (to_training_image(image, size, 1, (0.0, 0.5)) == -1).all()
    assert (to_training_image(image, size, 1, (0.999999, 0.5))[:, :, 1:] == 1).all()
    tall = image.transpose(Image.Transpose.ROTATE_270)  # the bottom quarter
    assert (to_training_image(tall, size, 1, (0.5, 0.999999))[:, 1:] == 1).all()


def test_resize_keeps_the_whole_image_when_the_ratio_matches():
    image, size = Image.new("L", (12, 8), 40), ImageSize(4, 6)
    assert (bytes_of(image, size, 1, (0.9, 0.9)) == 40).all()
    assert to_training_image(ramp(4, 3), ImageSize(16, 16), 3, (0.7, 0.2)).shape == (3, 16, 16)


def test_shrinking_is_antialiased():
    checker = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    assert np.abs(to_training_image(checker, ImageSize(8, 8), 1)).max() < 0.05


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_large_pictures_are_shrunk_as_pil_does_between_whole_pixels(mode):
    small = Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 60, 3), np.uint8))
    image = small.resize((600, 401), Image.Resampling.BICUBIC).convert(mode)
    size, channels = ImageSize(150, 170), len(image.getbands())
    for draw in ((0.0, 0.0), (0.999999, 0.999999), (0.5, 0.5)):
        result = bytes_of(image, size, channels, draw)
        left, width = round(draw[0] * (600 - 401 * 170 / 150)), 454  # 454.5, to even
        box = (left, 0, left + width, 401)
        expected = np.asarray(image.resize((170, 150), Image.Resampling.BICUBIC, box=box))
        expected = expected.reshape(150, 170, channels).transpose(2, 0, 1).astype(int)
        assert np.abs(result - expected).max() <= 3
        assert np.abs(result - expected).mean() < 0.05


@pytest.mark.parametrize("channels", [1, 3])
def test_flip(channels):
    image, size = ramp(7, 5).convert("RGB"), ImageSize(5, 7)
    flipped = to_training_image(image, size, channels, flip=True)
    assert flipped.flags.c_contiguous
    plain = to_training_image(image, size, channels)
    np.testing.assert_array_equal(flipped, plain[:, :, ::-1])
    assert not np.array_equal(flipped, plain)


def profile(exponent: float, tags: tuple[bytes, ...]) -> bytes:
    """sRGB's ICC profile with another exponent in place of its curves."""
    icc = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * exponent))
    for tag in tags:
        entry = icc.index(tag, 128)
        at = struct.unpack_from(">I", icc, entry + 4)[0]
        icc[at : at + len(curve)] = curve
        struct.pack_into(">I", icc, entry + 8, len(curve))
    return bytes(icc)


LINEAR = profile(1.0, (b"rTRC", b"gTRC", b"bTRC"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_profile_is_applied_where_that_is_asked_for(mode):
    colour, size = np.array([10, 200, 128]), ImageSize(4, 4)
    image = Image.new("RGB", (4, 4), tuple(colour.tolist()))
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    image.info["icc_profile"] = LINEAR
    assert np.abs(bytes_of(image, size, 3)[:, 1, 1] - colour).max() <= 1
    low, high = 12.92 * colour / 255, 1.055 * (colour / 255) ** (1 / 2.4) - 0.055
    expected = 255 * np.where(colour / 255 <= 0.0031308, low, high)  # IEC 61966-2-1
    found = bytes_of(image, size, 3, srgb=True)[:, 1, 1]
    np.testing.assert_allclose(found, expected, atol=2.5)
    if mode == "RGBA":
        image.putalpha(0)
        assert (bytes_of(image, size, 3, srgb=True) == 255).all()


@pytest.mark.parametrize(
    ("mode", "icc"), [("RGB", b"junk"), ("RGB", LINEAR[:200]), ("L", LINEAR), ("CMYK", LINEAR)]
)
def test_profiles_that_do_not_fit_change_nothing(mode, icc):
    image = Image.new(mode, (4, 4), 77 if mode == "L" else "teal")
    plain = bytes_of(image, ImageSize(4, 4), 3)
    image.info["icc_profile"] = icc
    np.testing.assert_array_equal(bytes_of(image, ImageSize(4, 4), 3, srgb=True), plain)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.arange(16) * 273, "up to 4095, nearly black where 65535 is white"),
        (np.arange(16) * 10_000, "from 0 to 150000, not in 0 to 65535"),
        (-np.arange(16), "from -15 to 0, not in 0 to 65535"),
        (np.arange(16) / 10, "nearly black"),
        (np.arange(16) / 1000, "nearly black"),
        (np.arange(16) * 20.0, "not in 0 to 255"),
        (np.arange(16) + np.nan, "not in 0 to 255"),
    ],
)
def test_deep_pixels_outside_of_the_usual_ranges_are_named(values, message):
    kind = np.float32 if values.dtype == float else np.int32
    with pytest.raises(ValueError, match=message):
        to_training_image(Image.fromarray(values.reshape(4, 4).astype(kind)), ImageSize(4, 4), 3)
