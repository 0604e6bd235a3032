"""Colour profiles, and pixels of fewer bits than their files say."""

import io
import struct
import zlib

import numpy as np
import pytest
from data_files import png_of, to_training_image
from PIL import Image, ImageCms

from torchtitan_flux.data.colours import in_srgb
from torchtitan_flux.data.transforms import load_picture
from torchtitan_flux.latents import ImageSize

SIZE = ImageSize(4, 4)
D50 = np.array([0.9642, 1.0, 0.8249])
# Red, green and blue of a display P3 profile as it stores them, adapted to D50 (XYZ, ICC's own
# numbers), and those of sRGB.
P3 = [(0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)]
SRGB = np.array([(0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)])


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile (version 2) of a display."""
    tags = {b"wtpt": xyz(D50), b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0"} | tags
    tags[b"desc"] += bytes(4 + 4 + 2 + 1 + 67)
    offset = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, offset + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    size = offset + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, b"mntr", space, b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + xyz(D50)[8:]
    return header.ljust(128, b"\0") + table + body


def xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * value) for value in values))


def gamma(exponent: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * exponent))


def display(primaries, exponent: float) -> bytes:
    red, green, blue = map(xyz, primaries)
    curves = {name: gamma(exponent) for name in (b"rTRC", b"gTRC", b"bTRC")}
    return profile(b"RGB ", {b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue, **curves})


def encoded(linear: np.ndarray) -> np.ndarray:
    """sRGB's curve (IEC 61966-2-1), 0 to 255."""
    linear = linear.clip(0, 1)
    low, high = 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055
    return 255 * np.where(linear <= 0.0031308, low, high)


def with_profile(image: Image.Image, icc: bytes, format: str = "PNG", **options) -> Image.Image:
    file = io.BytesIO()
    image.save(file, format, icc_profile=icc, **options)
    return load_picture(Image.open(io.BytesIO(file.getvalue())), SIZE).image


@pytest.mark.parametrize("colour", [(10, 200, 30), (255, 0, 0), (128, 128, 128), (90, 60, 200)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_wide_profile_is_converted_to_srgb(colour, mode):
    image = Image.new("RGB", (4, 4), colour)
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    linear = (np.array(colour) / 255) ** 1.8 @ np.array(P3) @ np.linalg.inv(SRGB)
    found = in_srgb(with_profile(image, display(P3, 1.8)))
    np.testing.assert_allclose(found.convert("RGB").getpixel((1, 1)), encoded(linear), atol=2.5)


def test_what_is_transparent_stays_so():
    image = Image.new("RGBA", (4, 4), (10, 200, 30, 77))
    assert in_srgb(with_profile(image, display(P3, 1.8))).getpixel((0, 0))[3] == 77
    keyed = with_profile(
        Image.new("RGB", (4, 4), (9, 8, 7)), display(P3, 1.8), transparency=(9, 8, 7)
    )
    assert (to_training_image(in_srgb(keyed), SIZE, 3) == 1).all()


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16"])
def test_gray_profiles(mode):
    icc = profile(b"GRAY", {b"kTRC": gamma(1.0)})
    values = np.full((4, 4), 255 if mode == "1" else 64, np.uint8)
    image = Image.fromarray(values).convert(mode if mode != "I;16" else "L")
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16) * 257)
    found = in_srgb(with_profile(image, icc)).convert("RGB").getpixel((0, 0))
    expected = encoded(values[0, 0] / np.array([255.0]))[0]
    np.testing.assert_allclose(found, [expected] * 3, atol=2)


def test_srgb_itself_changes_nothing_to_speak_of():
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    found = in_srgb(with_profile(Image.fromarray(pixels), icc))
    assert np.abs(np.asarray(found).astype(int) - pixels).max() <= 1


@pytest.mark.parametrize(
    ("image", "icc"),
    [
        (Image.new("RGB", (4, 4), (10, 200, 30)), b"junk"),
        (Image.new("RGB", (4, 4), (10, 200, 30)), display(P3, 1.8)[:200]),
        (Image.new("L", (4, 4), 77), display(P3, 1.8)),
        (Image.new("RGB", (4, 4), (1, 2, 3)), profile(b"GRAY", {b"kTRC": gamma(1.0)})),
        (Image.new("CMYK", (4, 4), (9, 99, 9, 9)), display(P3, 1.8)),
    ],
)
def test_profiles_that_do_not_fit_change_nothing(image, icc):
    image = with_profile(image, icc, "TIFF")
    assert in_srgb(image) is image


def test_cmyk_profiles(monkeypatch):
    """Nothing here can make one: only that the inks are handed to LittleCMS as they are."""
    asked = []

    def transform(image, _):
        asked.append(image.mode)
        return Image.new("RGB", image.size, (1, 2, 3))

    monkeypatch.setattr("torchtitan_flux.data.colours._to_srgb", lambda profile, mode: mode)
    monkeypatch.setattr(ImageCms, "applyTransform", transform)
    found = in_srgb(with_profile(Image.new("CMYK", (16, 16)), b"icc", "JPEG"))
    assert (asked, found.mode, found.getpixel((0, 0))) == (["CMYK"], "RGB", (1, 2, 3))


def png_of_16_bits(pixels: np.ndarray) -> Image.Image:
    """As PIL reads it: it cannot write RGB of 16 bits."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    kind = {3: 2, 4: 6}[channels]
    data = png_of(width, height, (b"IDAT", zlib.compress(rows)), depth=16, kind=kind)
    return Image.open(io.BytesIO(data))


def refusal(image: Image.Image) -> str:
    with pytest.raises(ValueError, match=r"pixels|colours") as caught:
        to_training_image(image, SIZE, 3)
    return str(caught.value)


def test_twelve_bits_in_sixteen_are_named():
    ramp = np.linspace(0, 4095, 16).astype(np.uint16).reshape(4, 4)
    says = "from 0 to 4095, nearly black where 65535 is white; multiply them by 16 or so"
    for image in (Image.fromarray(ramp), Image.fromarray(ramp.astype(np.int32))):
        assert says in refusal(image)
    for channels in (3, 4):
        deep = png_of_16_bits(np.repeat(ramp[:, :, None], channels, 2))
        assert "nearly black where 65535 is white" in refusal(deep)
    full = np.repeat((16 * ramp)[:, :, None], 3, 2)
    found = to_training_image(png_of_16_bits(full), SIZE, 3)
    np.testing.assert_allclose((found[0] + 1) * 127.5, full[:, :, 0] / 257, atol=1)
    assert (to_training_image(png_of_16_bits(0 * full), SIZE, 3) == -1).all()


def test_integers_and_floats_outside_of_the_usual_ranges_are_named():
    ramp = np.arange(16).reshape(4, 4)
    assert "gray pixels from 0 to 150000, not in 0 to 65535" in refusal(
        Image.fromarray((10_000 * ramp).astype(np.int32))
    )
    assert "from -15 to 0, not in 0 to 65535" in refusal(Image.fromarray(-ramp.astype(np.int32)))
    for values in (ramp / 10, ramp / 1000):
        image = Image.fromarray(values.astype(np.float32))
        assert "nearly black" in refusal(image)
        assert f"from 0 to {values.max():g}" in refusal(image)
    assert (to_training_image(Image.new("F", (4, 4)), SIZE, 1) == -1).all()
