"""FluxModel as a library: two token sequences of any meaning, a vector, times; clear refusals."""

from dataclasses import replace

import jaxtyping
import pytest
import torch
from helpers import nonzero_model, randomize, relative_l2

from torchtitan_flux.model import FluxModel, FluxModelArgs

# Two sets of points with 2 and 4 features, each point with three integer coordinates.
POINTS = FluxModelArgs(
    in_channels=2,
    out_channels=2,
    vec_in_dim=4,
    context_in_dim=4,
    hidden_size=1024,
    num_heads=8,
    depth=2,
    depth_single_blocks=4,
    axes_dim=(16, 56, 56),
)
SMALL = replace(POINTS, hidden_size=48, num_heads=2, axes_dim=(8, 8, 8))
GUIDED = replace(SMALL, guidance_embed=True)


def point_inputs(args: FluxModelArgs, b: int, img: int, txt: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(7)
    ids = {
        name: torch.randint(1, 1000, (b, tokens, 3), generator=rng)
        for name, tokens in (("img_ids", img), ("txt_ids", txt))
    }
    return {
        "img": torch.randn(b, img, args.in_channels, generator=rng),
        "txt": torch.randn(b, txt, args.context_in_dim, generator=rng),
        "timesteps": 2 * torch.randn(b, generator=rng),  # outside [0, 1] as well
        "y": torch.randn(b, args.vec_in_dim, generator=rng),
        **ids,
    }


@pytest.fixture(scope="module")
def point_model() -> FluxModel:
    with torch.device("meta"):
        model = FluxModel(POINTS)
    return randomize(model.to_empty(device="cpu"), seed=1)  # type: ignore[return-value]


def test_two_sequences_of_1024_points(point_model):
    inputs = point_inputs(POINTS, b=1, img=1024, txt=1024)
    assert inputs["img_ids"].dtype == torch.int64
    with torch.no_grad():
        out = point_model(**inputs)
    assert out.shape == (1, 1024, 2)
    assert out.isfinite().all()
    assert out.std() > 0.1


def test_gradient_reaches_every_parameter_with_lengths_that_differ(point_model):
    inputs = point_inputs(POINTS, b=2, img=13, txt=29)
    assert ((inputs["timesteps"] < 0) | (inputs["timesteps"] > 1)).any()
    point_model.zero_grad()
    point_model(**inputs).square().sum().backward()
    for name, parameter in point_model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-6, name
    point_model.zero_grad()


def test_ids_of_both_sequences_place_their_tokens():
    """Moving everything by the same coordinates changes nothing; moving one side does."""
    model, inputs = nonzero_model(SMALL), point_inputs(SMALL, b=2, img=11, txt=7)

    def output(**changed):
        with torch.no_grad():
            return model(**{**inputs, **changed})

    base, shift = output(), torch.tensor([3, 5, 2])
    moved_img, moved_txt = inputs["img_ids"] + shift, inputs["txt_ids"] + shift
    assert relative_l2(output(img_ids=moved_img, txt_ids=moved_txt), base) < 1e-4
    assert relative_l2(output(img_ids=moved_img), base) > 1e-2
    assert relative_l2(output(txt_ids=moved_txt), base) > 1e-2


# ---- refusals ------------------------------------------------------------------------------


@pytest.fixture
def no_shape_annotations():
    """What a user sees: annotations are checked under pytest only, and would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


B, IMG, TXT = 2, 5, 3
WRONG_SHAPES = {
    "img": [(B, IMG, 3), (B, IMG), ()],
    "img_ids": [(B, IMG + 1, 3), (IMG, 3)],
    "txt": [(B, TXT, 2), (B + 1, TXT, 4)],
    "txt_ids": [(B, TXT, 4), (1, TXT, 3)],
    "timesteps": [(B + 1,), (B, 1)],
    "y": [(B, 5), (4,)],
    "guidance": [(B + 1,), ()],
}


@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name, shapes in WRONG_SHAPES.items() for shape in shapes]
)
@pytest.mark.usefixtures("no_shape_annotations")
def test_wrong_shape_is_refused_by_name(name, shape):
    model = FluxModel(GUIDED)
    inputs = point_inputs(GUIDED, B, IMG, TXT) | {"guidance": torch.ones(B)}
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=rf"^{name} has shape \({', '.join(map(str, shape))}"):
        model(**inputs)


def test_guidance_is_required_exactly_when_the_model_takes_it():
    inputs = point_inputs(GUIDED, B, IMG, TXT)
    with pytest.raises(ValueError, match="guidance is missing"):
        FluxModel(GUIDED)(**inputs)
    with pytest.raises(ValueError, match="guidance is given"):
        FluxModel(SMALL)(**inputs, guidance=torch.ones(B))


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_heads": 5},
        {"num_heads": 0},
        {"axes_dim": (8, 8, 4)},
        {"axes_dim": (9, 7, 8)},
        {"mlp_ratio": 4.01},
        {"mlp_ratio": 0.0},
        {"depth": -1},
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(SMALL, **wrong)


@pytest.mark.parametrize(("depth", "singles"), [(0, 2), (2, 0), (0, 0)])
def test_either_kind_of_block_may_be_absent(depth, singles):
    args = replace(SMALL, depth=depth, depth_single_blocks=singles)
    out = nonzero_model(args)(**point_inputs(args, B, IMG, TXT))
    assert out.shape == (B, IMG, 2)
    assert out.isfinite().all()


@pytest.mark.usefixtures("no_shape_annotations")
def test_one_axis_and_a_list_of_axes_serve():
    args = replace(SMALL, axes_dim=[24])  # as from TOML
    assert args.axes_dim == (24,)
    inputs = point_inputs(args, B, IMG, TXT)
    inputs |= {name: inputs[name][..., :1] for name in ("img_ids", "txt_ids")}
    assert nonzero_model(args)(**inputs).isfinite().all()
