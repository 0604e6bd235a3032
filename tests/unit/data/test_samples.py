import io
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from data_files import tensors
from PIL import Image

import torchtitan_flux.data.samples as samples_module
from torchtitan_flux.data.batch import Batch, stack
from torchtitan_flux.flow_matching import TimeDensity
from torchtitan_flux.latents import Geometry
from torchtitan_flux.randomness import Stream, generator

STREAMS = ("TIME", "NOISE", "POSTERIOR", "CROP", "FLIP", "CAPTION", "DROPOUT")


def equal(a: Batch, b: Batch) -> bool:
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def same_item_positions(samples, epochs: int) -> list[list[int]]:
    """For every item, the positions in the first epochs at which it stands."""
    length = samples.order.length
    positions = [[] for _ in range(length)]
    for p in range(epochs * length):
        positions[samples.order.item(p)].append(p)
    return positions


def check_fresh_in_every_epoch(samples, epochs: int = 12) -> None:
    """Contract 1: the same item meets new randomness whenever it comes again.

    Continuous draws must differ between any two epochs; of the discrete ones every item must
    have met more than one outcome in `epochs` epochs.
    """
    empty = samples.tokenize("")[0]
    for positions in same_item_positions(samples, epochs):
        met = [samples[p] for p in positions]
        for stream, key in ("TIME", "t"), ("NOISE", "noise"), ("POSTERIOR", "posterior_noise"):
            assert len({tensors(m)[key].numpy().tobytes() for m in met}) == epochs, stream
        dropped = [torch.equal(m.text.t5, empty) for m in met]
        assert len(set(dropped)) == 2, "DROPOUT"
        captions = {tuple(m.text.t5.tolist()) for m in met} - {tuple(empty.tolist())}
        assert len(captions) == 2, "CAPTION"
        # Rows are a rising ramp, so falling means flipped, and the lowest value tells the crop.
        rows = [m.picture.image[0, 0] for m in met]
        assert len({bool(r[0] > r[-1]) for r in rows}) == 2, "FLIP"
        assert len({float(r.min()) for r in rows}) > epochs // 2, "CROP"


def test_an_item_meets_fresh_randomness_in_every_epoch(make_samples):
    check_fresh_in_every_epoch(make_samples(length=3))


@pytest.mark.parametrize("stream", [Stream[name] for name in STREAMS], ids=STREAMS)
def test_the_check_rejects_randomness_keyed_on_the_item(make_samples, monkeypatch, stream):
    samples = make_samples(length=3)

    def keyed_on_item(seed, asked, index):
        return generator(seed, asked, samples.order.item(index) if asked == stream else index)

    monkeypatch.setattr(samples_module, "generator", keyed_on_item)
    with pytest.raises(AssertionError, match=f"^{stream.name}"):
        check_fresh_in_every_epoch(samples)


def test_is_a_pure_function_of_the_position(make_samples):
    a, b = make_samples(), pickle.loads(pickle.dumps(make_samples()))  # as in a worker
    forward = [a[p] for p in range(20)]
    for p in reversed(range(20)):
        assert equal(b[p], forward[p])
    assert not equal(make_samples(seed=6)[3], forward[3])


def test_no_stream_depends_on_the_item(make_samples):
    # Two data sets at the same position: other pictures, the same draws.
    a, b = make_samples(length=7), make_samples(length=11)
    for key in ("t", "noise", "posterior_noise"):
        assert torch.equal(tensors(a[5])[key], tensors(b[5])[key])


TYPES = {
    "image": ((3, 6, 10), torch.float32),
    "posterior_noise": ((3, 6, 10), torch.float32),
    "t5": ((11,), torch.int64),
    "clip": ((77,), torch.int64),
    "noise": ((3, 6, 10), torch.float32),
    "position": ((), torch.int64),
}


def types(sample: Batch) -> dict:
    return {k: (tuple(v.shape), v.dtype) for k, v in tensors(sample).items()}


def test_shapes_and_types(make_samples):
    sample = make_samples()[4]
    assert types(sample) == TYPES | {"t": ((), torch.float32)}
    assert sample.position == 4
    latent = make_samples(
        geometry=Geometry(16, 2, 1), time_density=TimeDensity("logit_normal"), stochastic=False
    )[4]
    assert latent.noise.shape == (16, 3, 5)
    assert latent.picture.posterior_noise is None
    assert 0 < latent.t < 1


def test_draws_have_the_right_distributions(make_samples):
    samples = make_samples(length=50)
    drawn = [samples[p] for p in range(1000)]
    t = np.sort([s.t.item() for s in drawn])
    assert np.abs(t - (np.arange(1000) + 0.5) / 1000).max() < 1.63 / np.sqrt(1000)  # KS, 1 %
    noise = torch.stack([s.noise for s in drawn])
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
    assert abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5
    posterior = torch.stack([s.picture.posterior_noise for s in drawn])
    assert abs((noise * posterior).mean()) < 4 / noise.numel() ** 0.5
    flipped = np.mean([bool(s.picture.image[0, 0, 0] > s.picture.image[0, 0, -1]) for s in drawn])
    assert abs(flipped - 0.5) < 4 * 0.5 / np.sqrt(1000)


@pytest.mark.parametrize("prob", [0.1, 0.447, 1.0])
@pytest.mark.parametrize("mode", ["joint", "independent"])
def test_dropout_rates(make_samples, prob, mode):
    count = 2000
    samples = make_samples(dropout_prob=prob, dropout_mode=mode, stochastic=False, flip_prob=0.0)
    texts = [samples.tokens(samples.source[p % 7], p) for p in range(count)]
    t5, clip = (np.array([not getattr(t, name).any() for t in texts]) for name in ("t5", "clip"))

    def close(share, expected):
        return abs(share - expected) <= 4 * np.sqrt(expected * (1 - expected) / count)

    assert close(t5.mean(), prob)
    assert close(clip.mean(), prob)
    assert close((t5 & clip).mean(), prob if mode == "joint" else prob**2)
    if mode == "joint":
        assert (t5 == clip).all()


def test_without_dropout_every_caption_is_kept_and_all_are_used(make_samples):
    samples = make_samples(dropout_prob=0.0, length=1)
    seen = [bytes(samples[p].text.t5.tolist()).rstrip(b"\0").decode() for p in range(200)]
    assert set(seen) == {"gray 0", "no. 0"}
    assert abs(seen.count("no. 0") - 100) < 4 * np.sqrt(200 / 4)


def test_unreadable_items_are_replaced_and_listed(make_samples, make_source):
    samples = make_samples(source=make_source(10, unreadable=frozenset({2, 3})), stochastic=False)
    clean = make_samples(length=10, stochastic=False)
    for p in range(20):
        sample = samples[p]
        choices = [samples.order.item(p, k) for k in range(10)]
        bad = [c for c in choices[: next(i for i, c in enumerate(choices) if c not in (2, 3))]]
        assert sample.replaced == [(p, f"grays/{c}", "made so") for c in bad]
        for key in ("t", "noise", "position"):
            assert torch.equal(getattr(sample, key), getattr(clean[p], key))
        if not bad:
            assert equal(sample, clean[p])


def test_a_source_without_readable_items_stops_the_run(make_samples, make_source):
    samples = make_samples(source=make_source(5, unreadable=frozenset(range(5))))
    with pytest.raises(RuntimeError, match=r"none of 16 items of 'grays' tried for position 3"):
        samples[3]


def cut_off() -> Image.Image:
    """A file that opens and cannot be decoded."""
    file = io.BytesIO()
    Image.effect_noise((40, 40), 50).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:200]))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (cut_off, ".*Error.*"),
        (lambda: Image.new("L", (3, 40)), "too small: 3 x 40 pixels, data.min_image_size = 7"),
    ],
)
def test_pictures_that_turn_out_unreadable(
    make_samples, make_validation, make_source, image, reason
):
    options = {"source": make_source(5, images={1: image}), "min_size": 7}
    samples, validation = make_samples(**options), make_validation(**options)
    of_run, of_set = (stack([of[p] for p in range(5)]) for of in (samples, validation))
    for batch in of_run, of_set:
        (replaced,) = batch.replaced
        assert replaced.item_id == "grays/1"
        assert re.fullmatch(reason, replaced.reason)
    assert of_set.weight.tolist() == [1, 0, 1, 1, 1]
    assert not of_set.picture.image[1].any()


def test_validation_belongs_to_the_item(make_validation, make_source):
    class Reversed(type(make_source(1))):
        def __getitem__(self, index):
            return super().__getitem__(self.length - 1 - index)

    plain, backwards = make_validation(7), make_validation(source=Reversed(7))
    for i in range(7):
        a, b = plain[i], backwards[6 - i]
        assert (a.position, b.position) == (i, 6 - i)
        assert equal(a, replace(b, position=a.position))
    assert not torch.equal(plain[0].noise, plain[1].noise)
    assert not torch.equal(plain[0].noise, make_validation(7, seed=6)[0].noise)


def test_validation_shapes_and_plainness(make_validation):
    sample = make_validation()[3]
    assert types(sample) == TYPES | {"weight": ((), torch.float32)}
    assert bytes(sample.text.t5.tolist()).rstrip(b"\0") == b"gray 3"
    row = sample.picture.image[0, 0]
    assert (row.diff() > 0).all()  # not flipped
    middle = 3 + 104 / 2  # item 3 is the ramp 3 .. 107
    assert ((row.mean() + 1) * 127.5).item() == pytest.approx(middle, abs=0.6)
    assert sample.weight == 1
