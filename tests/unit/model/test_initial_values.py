"""Initial values: addressed by (seed, name, block), with the statistics of DiT."""

import math
from dataclasses import replace

import pytest
import torch

from torchtitan_flux.model import FLAVORS, FluxModel
from torchtitan_flux.model.initial_values import BLOCK, canonical_name, initial_rows

ARGS = replace(FLAVORS["flux-digits"], guidance_embed=True)
XAVIER = "double_blocks.3.img_attn.qkv_by_head.weight"
NORMAL = "time_in.in_layer.weight"


@pytest.mark.parametrize("name", [XAVIER, NORMAL])
def test_parts_equal_slices_of_the_whole(name):
    """Rows of 3001 elements: block boundaries fall inside rows 349, 698 and 1048."""
    shape = (1100, 3001)
    assert 3 * BLOCK < math.prod(shape) < 4 * BLOCK
    whole = initial_rows(11, name, shape, 0, shape[0])
    assert whole.shape == shape
    for first, rows in ((0, 1), (349, 1), (340, 20), (349, 350), (698, 351), (1048, 52)):
        part = initial_rows(11, name, shape, first, rows)
        assert torch.equal(part, whole[first : first + rows]), (first, rows)


def test_no_block_repeats_another():
    whole = initial_rows(11, XAVIER, (3, BLOCK), 0, 3)
    assert not torch.equal(whole[0], whole[1])
    assert (whole @ whole.T).div(whole.square().mean() * BLOCK).fill_diagonal_(0).abs().max() < 0.01


def test_seed_and_name_decide_and_nothing_else():
    shape = (16, 24)
    base = initial_rows(11, XAVIER, shape, 0, 16)
    torch.manual_seed(0)
    assert torch.equal(initial_rows(11, XAVIER, shape, 0, 16), base)
    for seed, name in ((12, XAVIER), (11, XAVIER.replace(".3.", ".4.")), (2**40, XAVIER)):
        other = initial_rows(seed, name, shape, 0, 16)
        assert (other != base).all()
    # torch's own generator would keep 32 bits of a seed
    assert not torch.equal(initial_rows(11 + 2**32, XAVIER, shape, 0, 16), base)


def test_every_parameter_of_a_model_has_its_kind():
    state = FluxModel(ARGS).state_dict()
    for name, value in state.items():
        if name.endswith("_norm.weight"):
            kind = (value == 1).all()
        elif name.endswith(".bias") or "mod" in name.lower() or "final_layer" in name:
            kind = (value == 0).all()
        elif name.split(".")[0] in ("time_in", "vector_in", "guidance_in"):
            kind = abs(value.std() / 0.02 - 1) < 0.05
        else:
            bound = math.sqrt(6 / sum(value.shape))
            kind = 0.9 * bound < value.abs().max() <= bound
        assert kind, name


def test_a_model_is_ready_and_follows_torchs_seed():
    def build(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return FluxModel(ARGS).state_dict()

    first, again, other = build(1), build(1), build(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if first[name].std() > 0]
    assert len(drawn) > 20
    assert all(not torch.equal(first[name], other[name]) for name in drawn)


def test_on_the_meta_device_a_model_stays_empty():
    with torch.device("meta"):
        model = FluxModel(ARGS)
    assert all(p.is_meta for p in model.parameters())


def test_compiled_and_checkpointed_models_start_with_the_same_values():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain = FluxModel(ARGS)
    torch.manual_seed(3)
    plain.init_weights()
    expected = plain.state_dict()
    with torch.device("meta"):
        wrapped = FluxModel(ARGS)
    for blocks in (wrapped.double_blocks, wrapped.single_blocks):
        for name, block in blocks.items():
            blocks[name] = torch.compile(checkpoint_wrapper(block))
    wrapped.to_empty(device="cpu")
    torch.manual_seed(3)
    wrapped.init_weights()
    names = {canonical_name(name): value for name, value in wrapped.named_parameters()}
    assert names.keys() == expected.keys()
    assert any("_orig_mod." in name for name, _ in wrapped.named_parameters())
    for name, value in expected.items():
        assert torch.equal(names[name], value), name
