import numpy as np
import pytest

from torchtitan_flux.data.sources.shapes import BACKGROUNDS, COLORS, POLYGONS, RADII, ShapesSource
from torchtitan_flux.latents import ImageSize

SIZE = ImageSize(72, 120)


def coverage(image, background):
    """Share of every pixel, 0..1, that is not background, from the summed colour distance."""
    distance = np.abs(np.asarray(image, float) - BACKGROUNDS[background]).sum(axis=2)
    return distance / distance.max()


@pytest.fixture(scope="module")
def measured():
    source = ShapesSource("train", SIZE)
    return [(source.scene(i), source[i]) for i in range(400)]


def test_place_word_is_where_the_color_is(measured):
    rows, columns = np.mgrid[: SIZE.height, : SIZE.width] + 0.5
    for scene, item in measured:
        weight = coverage(item.image, scene.background)
        y, x = (weight * rows).sum() / weight.sum(), (weight * columns).sum() / weight.sum()
        words = [("top", "", "bottom")[int(3 * y / SIZE.height)]]
        words.append(("left", "", "right")[int(3 * x / SIZE.width)])
        place = " ".join(w for w in words if w) or "center"
        where = "in the center" if place == "center" else f"at the {place}"
        for caption in item.captions:
            if "at the" in caption or "in the" in caption:
                assert where in caption
        # The centre itself is met to half a pixel.
        assert abs(x - scene.center[0] * SIZE.width) < 0.5
        assert abs(y - scene.center[1] * SIZE.height) < 0.5


def test_color_background_and_size_words_are_true(measured):
    areas = {}
    for scene, item in measured:
        pixels = np.asarray(item.image).reshape(-1, 3)
        assert tuple(pixels[0]) == BACKGROUNDS[scene.background]
        assert (pixels == COLORS[scene.color]).all(axis=1).any()
        for other in set(COLORS) - {scene.color}:
            assert not (pixels == COLORS[other]).all(axis=1).any()
        area = coverage(item.image, scene.background).sum()
        areas.setdefault((scene.shape, scene.size), []).append(area)
        canonical = item.captions[0]
        assert canonical.startswith(f"a {scene.size} {scene.color} {scene.shape} ")
        assert canonical.endswith(f"on a {scene.background} background")
        assert not any(f" a {vowel}" in f" {text}" for text in item.captions for vowel in "aeiou")
    assert {scene.color for scene, _ in measured} == set(COLORS)
    assert len({scene.place for scene, _ in measured}) == 9
    for shape in POLYGONS:
        small, medium, large = (areas[shape, size] for size in RADII)
        assert max(small) < min(medium)
        assert max(medium) < min(large)


def test_shapes_are_inside_the_image_with_soft_edges(measured):
    for scene, item in measured:
        inner = np.asarray(item.image).copy()
        inner[1:-1, 1:-1] = BACKGROUNDS[scene.background]
        assert (inner == BACKGROUNDS[scene.background]).all()
        assert len(item.image.getcolors()) > 2 or scene.shape == "square"


def test_is_a_pure_function_of_split_and_index():
    a, b = ShapesSource("train", SIZE), ShapesSource("train", SIZE)
    assert [b[i].image.tobytes() for i in (9, 2)] == [a[i].image.tobytes() for i in (9, 2)]
    other_size = ShapesSource("train", ImageSize(32, 32))
    assert other_size.scene(5) == a.scene(5)
    assert other_size[5].image.size == (32, 32)
    assert a[5].image.size == (120, 72)


def test_splits_are_disjoint():
    train, held_out = ShapesSource("train", SIZE, 30), ShapesSource("held_out", SIZE, 30)
    assert not {i.item_id for i in train} & {i.item_id for i in held_out}
    assert train.scene(0) != held_out.scene(0)
    lengths = [len(ShapesSource(split, SIZE)) for split in ("train", "held_out")]
    assert lengths == [100_000, 1000]
    with pytest.raises(IndexError):
        train[30]
