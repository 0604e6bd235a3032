"""Image files of every sort, whole and damaged, through `open_image` and the transform."""

import errno
import io
import os
import re
import zlib

import numpy as np
import pytest
from data_files import png_of
from PIL import Image, ImageOps, PngImagePlugin

from torchtitan_flux.data import formats as formats_module
from torchtitan_flux.data import transforms
from torchtitan_flux.data.decode import damage_is_unreadable, header_size, open_image
from torchtitan_flux.data.sources.source import UnreadableItem
from torchtitan_flux.data.transforms import CENTER, load_picture, to_training_image
from torchtitan_flux.latents import ImageSize

MAX_PIXELS = 2**20


def saved(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth noise, mostly of brightness: amplitudes fall with frequency, as in photographs."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    spectrum = (
        np.fft.rfft2(rng.normal(size=(4, height, width))) / np.maximum(frequency, 0.01) ** 1.4
    )
    noise = np.fft.irfft2(spectrum, s=(height, width))
    noise /= noise.std(axis=(1, 2), keepdims=True)
    colours = 128 + 40 * noise[0, :, :, None] + 12 * noise[1:].transpose(1, 2, 0)
    return Image.fromarray(colours.clip(0, 255).astype(np.uint8))


SQUARE = ImageSize(16, 16)


def read(data: bytes, size=SQUARE, channels: int = 3, crop=CENTER, **options):
    """[channels, H, W] in whole numbers 0 to 255."""
    with damage_is_unreadable("item"):
        image = open_image(data, "item", MAX_PIXELS)
        result = to_training_image(image, size, channels, crop, **options)
    return np.round((result + 1) * 127.5).astype(int)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.maximum(((a - b) ** 2.0).mean(), 1e-9))


@pytest.mark.parametrize(
    ("format", "options", "error"),
    [
        *((format, {}, 0) for format in ("PNG", "BMP", "PPM", "TIFF")),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 12),
        ("JPEG", {"quality": 95}, 12),
        ("JPEG", {"quality": 95, "progressive": True}, 12),
        ("GIF", {}, 25),
    ],
)
def test_formats(format, options, error):
    image = photo(20, 16)
    pixels = np.asarray(image).transpose(2, 0, 1).astype(int)
    read_back = read(saved(image, format, **options), ImageSize(16, 20))
    assert np.abs(read_back - pixels).mean() <= error


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animations_show_their_first_frame(format):
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(red, format, save_all=True, append_images=[blue], **options)
    assert (read(data)[:, 5, 5] == [255, 0, 0]).all()


def test_cmyk_jpegs():
    # PIL writes Adobe's inverted CMYK: ink (10, 200, 60, 20) shows as (1 - ink) (1 - black).
    data = saved(Image.new("CMYK", (16, 16), (10, 200, 60, 20)), "JPEG", quality=100, subsampling=0)
    expected = [(255 - ink) * (255 - 20) / 255 for ink in (10, 200, 60)]
    np.testing.assert_allclose(read(data)[:, 3, 3], expected, atol=3)


def test_deep_gray_and_float_files():
    ramp = np.arange(256).reshape(16, 16)
    deep, floats = (ramp * 257).astype(np.uint16), ramp.astype(np.float32)
    big_endian = Image.frombytes("I;16B", (16, 16), deep.astype(">u2").tobytes())
    for image, format in (
        (Image.fromarray(deep), "PNG"),
        (Image.fromarray(deep), "TIFF"),
        (Image.fromarray(deep.astype(np.int32)), "TIFF"),
        (big_endian, "TIFF"),
        (Image.fromarray(floats), "TIFF"),
        (Image.fromarray(floats / 255), "TIFF"),
    ):
        np.testing.assert_array_equal(read(saved(image, format), channels=1)[0], ramp)


def transparent_files() -> dict[str, bytes]:
    """Files whose left half is black and whose right half is transparent."""
    shown = np.zeros((16, 16), np.uint8)
    shown[:, :8] = 255
    rgba, gray = (Image.new(mode, (16, 16)) for mode in ("RGBA", "LA"))
    for image in (rgba, gray):
        image.putalpha(Image.fromarray(shown))
    index = Image.fromarray(255 - shown)  # 0 is shown, 255 is not
    palette = Image.frombytes("P", (16, 16), index.tobytes())
    palette.putpalette([0] * 768)
    rgb = Image.merge("RGB", [index] * 3)
    return {
        "RGBA": saved(rgba, "PNG"),
        "RGBA webp": saved(rgba, "WEBP", lossless=True),
        "LA": saved(gray, "PNG"),
        "P": saved(palette, "PNG", transparency=255),
        "P gif": saved(palette, "GIF", transparency=255),
        "P bytes": saved(palette, "PNG", transparency=bytes([255] * 255 + [0])),
        "L tRNS": saved(index, "PNG", transparency=255),
        "RGB tRNS": saved(rgb, "PNG", transparency=(255, 255, 255)),
        "1 tRNS": saved(index.convert("1"), "PNG", transparency=255),
    }


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", transparent_files())
def test_transparency_shows_the_background(name, channels):
    colour = (200, 100, 50)
    result = read(transparent_files()[name], channels=channels, background=colour)
    assert not result[:, :, :8].any()
    luma = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    expected = colour if channels == 3 else (luma,)
    np.testing.assert_allclose(result[:, 4, 12], expected, atol=1)


@pytest.fixture
def exact_crops(monkeypatch):
    """Crops that begin within a pixel: a picture decoded small and the full one show the same."""
    monkeypatch.setattr(transforms, "_WHOLE_PIXELS", 10**9)


def looks_as_decoded_whole(data: bytes, size: ImageSize) -> bool:
    image = open_image(data, "item", MAX_PIXELS)
    image.load()
    for crop in (0.0, 0.0), (0.999, 0.999), CENTER:
        whole = np.round((to_training_image(image, size, 3, crop) + 1) * 127.5).astype(int)
        if psnr(read(data, size, crop=crop), whole) <= 40:
            return False
    return True


@pytest.mark.usefixtures("exact_crops")
@pytest.mark.parametrize("width", [203, 400, 401, 407])
def test_jpegs_are_decoded_near_the_size_they_are_wanted_at(width):
    data = saved(photo(width, 299), "JPEG", quality=90)
    for size in (ImageSize(96, 96), ImageSize(31, 52), ImageSize(60, 17)):
        _, extent = load_picture(open_image(data, "item", MAX_PIXELS), size)
        shrunk = round(width / extent[0])
        assert extent == (width / shrunk, 299 / shrunk)
        assert min(extent[0] / size.width, extent[1] / size.height) >= 1.5 or shrunk == 1
        assert shrunk == 8 or 2 * min(extent[0] / size.width, extent[1] / size.height) < 6.1
        assert looks_as_decoded_whole(data, size)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_pictures_are_turned_upright(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(photo(13, 5), format, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).transpose(2, 0, 1)
    height, width = upright.shape[1:]
    np.testing.assert_array_equal(read(data, ImageSize(height, width)), upright)
    assert header_size(io.BytesIO(data)) == (width, height, "")
    assert header_size(io.BytesIO(data[:5]))[:2] == (0, 0)


def test_a_jpeg_of_the_wanted_size_is_not_touched():
    data = saved(photo(64, 48), "JPEG")
    image = np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)
    np.testing.assert_array_equal(read(data, ImageSize(48, 64)), image)


def test_damaged_exif_is_ignored():
    data = saved(photo(20, 16), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\2\3")
    assert read(data).shape == (3, 16, 16)


def refusal(data: bytes, max_pixels: int = MAX_PIXELS) -> str:
    """Why a file is unreadable; the same at every try."""
    reasons = set()
    for _ in range(2):
        with pytest.raises(UnreadableItem) as caught, damage_is_unreadable("item"):
            to_training_image(open_image(data, "item", max_pixels), ImageSize(16, 16), 3)
        assert caught.value.item_id == "item"
        reasons.add(caught.value.reason)
    (reason,) = reasons
    assert "0x" not in reason
    assert len(reason) <= 250
    return reason


def test_bombs():
    big = saved(Image.new("1", (2048, 1024)), "PNG")
    assert re.match("decompression bomb: 2048 x 1024 .* data.max_image_pixels = 1", refusal(big))
    text = zlib.compress(bytes(PngImagePlugin.MAX_TEXT_CHUNK + 1))
    assert "ValueError" in refusal(png_of(16, 16, (b"zTXt", b"key\0\0" + text)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [12_000, 30_000])  # PIL warns of the one and refuses the other
def test_the_limit_of_pixels_is_ours_alone(side):
    assert open_image(png_of(side, side), "item", 2**40).size == (side, side)
    assert header_size(io.BytesIO(png_of(side, side))) == (side, side, "")


def test_formats_of_plug_ins_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(formats_module, "formats", lambda: ("JPEG",))
    for data, package in (
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "pillow-heif"),
        (b"\xff\x0a\xfa\x1f", "pillow-jxl-plugin"),
    ):
        assert f"which `pip install {package}` reads" in formats_module.unread_format(data)


def test_what_the_system_refuses_is_no_property_of_the_picture():
    class Stale(io.BytesIO):
        def read(self, *args):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with pytest.raises(OSError, match="Stale") as caught:
        header_size(Stale(saved(photo(8, 8), "PNG")))
    assert caught.value.errno == errno.ESTALE


VALID = {
    "progressive": saved(photo(41, 37), "JPEG", progressive=True),
    "palette": saved(photo(41, 37).convert("P"), "PNG", transparency=3),
    "lzw": saved(photo(41, 37), "TIFF", compression="tiff_lzw"),
} | {kind: saved(photo(41, 37), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", VALID)
def test_damaged_files_are_read_or_refused_alike(kind):
    rng = np.random.default_rng(len(VALID[kind]))
    outcomes = []
    for case in range(60):
        data = bytearray(VALID[kind])
        # Most damage near the beginning, where the structure is.
        reach = len(data) if case % 2 else min(len(data), 200)
        for place in rng.integers(0, reach, 1 + case % 4):
            data[place] = rng.integers(256)
        if case % 3 == 0:
            del data[int(rng.integers(len(data))) :]
        results = set()
        for _ in range(2):
            try:
                results.add(read(bytes(data)).tobytes())
            except UnreadableItem as error:
                results.add(error.reason)
        (result,) = results
        outcomes.append(result)
    reasons = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert 10 < len(reasons) <= 60
    assert not any("0x" in reason for reason in reasons)
