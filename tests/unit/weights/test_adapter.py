"""torchtitan's adapter: the key maps on whole state dicts, plain or sharded."""

from dataclasses import replace

import torchtitan_flux.torchtitan_shim

import pytest
import torch
from helpers import nonzero_model
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torchtitan.protocols import BaseStateDictAdapter
from torchtitan.protocols.train_spec import get_train_spec

import torchtitan_flux.training.train_spec  # noqa: F401  (registers "flux")
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.tensor_files.state_dict_keys import KeyMismatch
from torchtitan_flux.weights.adapter import FluxStateDictAdapter
from torchtitan_flux.weights.key_maps import to_diffusers

ARGS = replace(FLAVORS["flux-tiny"], guidance_embed=True)


@pytest.fixture(scope="module")
def adapter() -> FluxStateDictAdapter:
    found = get_train_spec("flux").state_dict_adapter
    assert found is not None
    adapter = found(ARGS, "nowhere/to/be/read")  # type: ignore[arg-type]
    assert isinstance(adapter, BaseStateDictAdapter)
    assert isinstance(adapter, FluxStateDictAdapter)
    return adapter


def test_guidance_and_unknown_keys_are_not_dropped(adapter):
    """torchtitan's own adapter loses both silently."""
    theirs = adapter.to_hf(nonzero_model(ARGS).state_dict())
    guidance = "time_text_embed.guidance_embedder.linear_1.weight"
    assert guidance in theirs
    stray = {**theirs, "stray.weight": torch.zeros(1)}
    del stray[guidance]
    with pytest.raises(KeyMismatch) as error:
        adapter.from_hf(stray)
    assert error.value.missing == [guidance]
    assert error.value.unknown == ["stray.weight"]


def test_there_and_back_is_the_same_bits_of_shards_too():
    def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    def shard_and_map() -> bool:
        mesh = init_device_mesh("cpu", (2,))
        adapter = FluxStateDictAdapter(ARGS)
        ours = nonzero_model(ARGS).state_dict()
        sharded = {name: distribute_tensor(x, mesh, [Shard(0)]) for name, x in ours.items()}
        theirs = adapter.to_hf(sharded)
        return equal(theirs, to_diffusers(ours, ARGS)) and equal(adapter.from_hf(theirs), ours)

    assert all(run_ranks(2, shard_and_map))


def test_quantized_weights_and_folders(adapter, tmp_path):
    with pytest.raises(ValueError, match="initial_load_in_hf_quantized"):
        adapter.get_hf_storage_reader("anywhere", from_quantized=True)
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "transformer").mkdir()
    assert str(adapter.get_hf_storage_reader(str(tmp_path)).path).endswith("transformer")
