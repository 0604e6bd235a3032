"""Key maps of the transformer: exact both ways, complete, and equal to what others read."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from helpers import nonzero_model
from weight_files import ARGS

from torchtitan_flux.model import FLAVORS, FluxModel, FluxModelArgs
from torchtitan_flux.tensor_files.state_dict_keys import KeyMismatch
from torchtitan_flux.weights.key_maps import Layout, from_layout, to_layout

TINY = replace(ARGS, mlp_ratio=3.0)
GUIDED = replace(TINY, guidance_embed=True)
NO_BIAS = replace(TINY, qkv_bias=False)
VARIANTS = {"plain": TINY, "guided": GUIDED, "no qkv bias": NO_BIAS}
LAYOUTS: tuple[Layout, ...] = ("bfl", "diffusers")


def meta_state_dict(args: FluxModelArgs) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return FluxModel(args).state_dict()


def assert_bit_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_bit_equal(layout, variant, dtype):
    args = VARIANTS[variant]
    to_theirs, to_ours = partial(to_layout, layout), partial(from_layout, layout)
    ours = nonzero_model(args).to(dtype).state_dict()
    theirs = to_theirs(ours, args)
    assert sum(t.numel() for t in theirs.values()) == sum(t.numel() for t in ours.values())
    assert all(t.is_contiguous() for t in theirs.values()), "safetensors refuses the others"
    back = to_ours(theirs, args)
    assert all(t.is_contiguous() for t in back.values())
    assert_bit_equal(back, ours)
    assert_bit_equal(to_theirs(to_ours(theirs, args), args), theirs)


@pytest.mark.parametrize(
    ("flavor", "bfl", "diffusers"), [("flux-schnell", 776, 1156), ("flux-dev", 780, 1160)]
)
def test_names_and_shapes_at_full_size(flavor, bfl, diffusers):
    args = FLAVORS[flavor]
    ours = meta_state_dict(args)
    theirs = to_layout("bfl", ours, args)
    assert len(theirs) == bfl
    assert theirs["double_blocks.18.txt_attn.norm.key_norm.scale"].shape == (128,)
    assert theirs["double_blocks.0.img_attn.qkv.weight"].shape == (9216, 3072)
    assert theirs["single_blocks.37.linear1.weight"].shape == (21504, 3072)
    assert theirs["single_blocks.37.linear2.weight"].shape == (3072, 15360)
    assert ("guidance_in.in_layer.weight" in theirs) == args.guidance_embed

    with torch.device("meta"):
        reference = FluxTransformer2DModel(guidance_embeds=args.guidance_embed).state_dict()
    converted = to_layout("diffusers", ours, args)
    assert len(converted) == diffusers
    assert {n: t.shape for n, t in converted.items()} == {n: t.shape for n, t in reference.items()}


def test_bfl_map_equals_diffusers_own_conversion():
    """diffusers converts BFL files only at FLUX.1's width; one block of each kind is enough."""
    args = replace(FLAVORS["flux-dev"], depth=1, depth_single_blocks=1)
    shapes = {name: t.shape for name, t in to_layout("bfl", meta_state_dict(args), args).items()}
    # tensors are windows of one pool of random bits (below infinity): no gigabyte to draw
    bits = torch.randint(
        0, 0x7F80, (2**27,), dtype=torch.int16, generator=torch.Generator().manual_seed(5)
    )
    pool = bits.view(torch.bfloat16)
    bfl = {
        name: pool[4099 * i : 4099 * i + shape.numel()].view(shape)
        for i, (name, shape) in enumerate(shapes.items())
    }
    reference = convert_flux_transformer_checkpoint_to_diffusers(dict(bfl))
    ours = from_layout("bfl", bfl, args)
    converted = to_layout("diffusers", ours, args)
    # diffusers drops a key that it does not know, so the names are compared as well
    assert_bit_equal(converted, reference)
    del converted
    assert_bit_equal(from_layout("diffusers", reference, args), ours)


# ---- every key is accounted for ------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_unknown_and_misshaped_keys_are_named(layout):
    to_theirs, to_ours = partial(to_layout, layout), partial(from_layout, layout)
    ours = nonzero_model(TINY).state_dict()
    theirs = to_theirs(ours, TINY)
    for state_dict, convert in ((ours, to_theirs), (theirs, to_ours)):
        names = list(state_dict)
        missing, mis_shaped = names[3], names[-1]
        broken = dict(state_dict)
        del broken[missing]
        broken["model.extra.weight"] = torch.zeros(3)
        broken[mis_shaped] = torch.zeros(7, 11)
        with pytest.raises(KeyMismatch) as caught:
            convert(broken, TINY)
        assert caught.value.missing == [missing]
        assert caught.value.unknown == ["model.extra.weight"]
        assert [line.split(":")[0] for line in caught.value.mis_shaped] == [mis_shaped]
        for fact in (missing, "model.extra.weight", mis_shaped, "(7, 11)"):
            assert fact in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("more", "part", "count"),
    [(GUIDED, "guidance", {"bfl": 4, "diffusers": 4}), (TINY, "bias", {"bfl": 4, "diffusers": 12})],
    ids=["guidance", "qkv bias"],
)
def test_optional_parts_are_neither_dropped_nor_invented(layout, more, part, count):
    to_theirs, to_ours = partial(to_layout, layout), partial(from_layout, layout)
    less = TINY if more is GUIDED else NO_BIAS
    full = to_theirs(nonzero_model(more).state_dict(), more)
    plain = to_theirs(nonzero_model(less).state_dict(), less)
    keys = sorted(full.keys() - plain.keys())
    assert len(keys) == count[layout]
    assert all(part in name for name in keys)
    with pytest.raises(KeyMismatch) as caught:
        to_ours(full, less)
    assert sorted(caught.value.unknown) == keys
    with pytest.raises(KeyMismatch) as caught:
        to_ours(plain, more)
    assert sorted(caught.value.missing) == keys


def test_layouts_do_not_pass_for_one_another():
    """Contract 3: a foreign layout cannot load by accident, even where every shape is equal."""
    ours = nonzero_model(TINY).state_dict()
    bfl = to_layout("bfl", ours, TINY)
    model = FluxModel(TINY)
    for foreign in (bfl, to_layout("diffusers", ours, TINY)):
        with pytest.raises(RuntimeError, match="qkv_by_head"):
            model.load_state_dict(foreign)
    with pytest.raises(KeyMismatch, match="qkv_by_head"):
        from_layout("bfl", ours, TINY)
    with pytest.raises(KeyMismatch, match="linear1_by_head"):
        to_layout("bfl", bfl, TINY)
