"""Weights of every format: what they are is found out, any part is read as it is in the whole."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
import torch.distributed.checkpoint as dcp
import weight_files as made
from helpers import model_inputs
from ranks import run_ranks
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from torchtitan_flux.checkpoint.storage import SafeReader
from torchtitan_flux.model import FLAVORS, FluxModel, FluxModelArgs
from torchtitan_flux.tensor_files.safetensors_file import TensorsFile
from torchtitan_flux.weights import architecture
from torchtitan_flux.weights.dcp_source import DcpSource
from torchtitan_flux.weights.key_maps import foreign_shapes, layout_entries, our_shapes, to_layout
from torchtitan_flux.weights.open import open_weights


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, torch.Tensor]]:
    return {name: made.state_dict(args) for name, args in made.VARIANTS.items()}


@pytest.fixture(scope="module")
def paths(tmp_path_factory, states) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("weights")
    return {
        (source, variant): made.make(folder / variant / source, source, args, states[variant])
        for source in made.SOURCES
        for variant, args in made.VARIANTS.items()
    }


def boxes(shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """The whole, a part that begins and ends within heads, a single row, nothing."""
    return [
        tuple(slice(None) for _ in shape),
        tuple(slice(size // 3, size - size // 4) for size in shape),
        (slice(shape[0] - 1, shape[0]), *(slice(0, size) for size in shape[1:])),
        (slice(2, 2), *(slice(None) for _ in shape[1:])),
    ]


@pytest.mark.parametrize("variant", made.VARIANTS)
@pytest.mark.parametrize("source", made.SOURCES)
def test_every_part_of_every_parameter(paths, states, source, variant):
    args, expected = made.VARIANTS[variant], states[variant]
    # our own checkpoint of a run without a configuration does not say how heads are divided
    weights = open_weights(paths[source, variant], args if source == "dcp" else None)
    assert weights.args == args
    assert weights.format == {"sharded": "diffusers"}.get(source, source)
    assert weights.shapes == {name: tuple(t.shape) for name, t in expected.items()}
    assert set(weights.dtypes.values()) == {torch.float32}
    for name, tensor in expected.items():
        for box in boxes(tuple(tensor.shape)):
            found = weights.read(name, box)
            assert torch.equal(found, tensor[box]), (name, box)
        assert found.untyped_storage().nbytes() == 0, "the part has memory of its own"


def test_element_types_are_kept_and_mixed_pieces_joined(tmp_path, states):
    theirs = {
        name: t.bfloat16() for name, t in to_layout("bfl", states["plain"], made.ARGS).items()
    }
    theirs["img_in.weight"] = states["plain"]["img_in.weight"].to(torch.float8_e4m3fn)
    path = tmp_path / "flux1-a.safetensors"
    save_file(theirs, path, metadata=architecture.to_metadata(made.ARGS))
    weights = open_weights(path)
    assert weights.dtypes["txt_in.weight"] == torch.bfloat16
    assert weights.dtypes["img_in.weight"] == torch.float8_e4m3fn
    found = weights.read("img_in.weight", dtype=torch.float32)
    assert torch.equal(found, theirs["img_in.weight"].float())

    folder = made.make(tmp_path / "mixed", "diffusers", made.ARGS, states["plain"])
    file = folder / "diffusion_pytorch_model.safetensors"
    opened = TensorsFile.open(file)
    mixed = {name: opened.tensor(name).clone() for name in opened.shapes}
    rounded = "single_transformer_blocks.1.attn.to_k.bias"
    mixed[rounded] = mixed[rounded].bfloat16()
    save_file(mixed, file)
    weights, name = open_weights(folder), "single_blocks.1.linear1_by_head.bias"
    assert weights.dtypes[name] == torch.float32
    differ = (weights.read(name) != states["plain"][name]).sum()
    assert 0 < differ <= made.ARGS.hidden_size, "only what was rounded"


# ---- guidance ------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["diffusers", "dcp"])
def test_guidance_is_dropped_or_initialised_on_purpose_only(paths, states, source):
    guided, plain = paths[source, "guided"], paths[source, "plain"]
    with pytest.raises(ValueError, match=r'guidance_weights = "drop".*--guidance_weights drop'):
        open_weights(guided, made.ARGS)
    with pytest.raises(ValueError, match=r'guidance_weights = "initialize".*initialize\)'):
        open_weights(plain, made.GUIDED)
    dropped = open_weights(guided, made.ARGS, "drop")
    assert dropped.args == made.ARGS
    assert dropped.shapes.keys() == states["plain"].keys()
    fresh = open_weights(plain, made.GUIDED, "initialize")
    assert fresh.args == made.GUIDED
    assert fresh.shapes.keys() == states["guided"].keys()
    assert fresh.read("guidance_in.in_layer.weight").std() == pytest.approx(0.02, rel=0.1)


def test_initialised_guidance_changes_nothing_until_it_is_trained(paths):
    weights = open_weights(paths["bfl", "plain"], guidance="initialize")
    assert weights.args == made.GUIDED
    models = []
    for args in (made.ARGS, made.GUIDED):
        model = FluxModel(args)
        model.load_state_dict({name: weights.read(name) for name in our_shapes(args)})
        models.append(model)
    inputs = model_inputs(made.GUIDED, 2, 3, 5, 7, seed=1)
    found = models[1](**inputs)
    guidance = inputs.pop("guidance")
    assert torch.equal(found, models[0](**inputs))
    # and it can be trained: the layer that is zero gets a gradient
    found.square().sum().backward()
    assert models[1].guidance_in.out_layer.weight.grad.abs().max() > 0
    assert guidance.unique().numel() > 1


# ---- checkpoints ---------------------------------------------------------------------------


def save_sharded(folder: str) -> None:
    """Every parameter cut over a mesh of 2 x 2 in another way."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    ways = ([Shard(0), Shard(0)], [Replicate(), Shard(0)], [Shard(0), Shard(1)])
    parts = {}
    for i, (name, tensor) in enumerate(made.state_dict(made.ARGS).items()):
        way = ways[i % 3] if tensor.ndim > 1 else ways[i % 2]
        parts[name] = distribute_tensor(tensor, mesh, way)
    dcp.save(parts, checkpoint_id=folder)


def test_a_sharded_checkpoint_is_put_together(tmp_path, states):
    run_ranks(4, save_sharded, str(tmp_path / "saved"))
    source = DcpSource(tmp_path / "saved")
    pieces = {name: len(one.chunks) for name, one in source._tensors.items()}
    assert set(pieces.values()) >= {2, 4}
    for name, tensor in states["plain"].items():
        for box in boxes(tuple(tensor.shape)):
            assert torch.equal(source.part(name, box), tensor[box]), (name, box)


@pytest.mark.slow
def test_names_of_torchtitans_own_model():
    """The names are those of the installed torchtitan."""
    from torchtitan.models.flux.model.args import FluxModelArgs as TheirArgs
    from torchtitan.models.flux.model.model import FluxModel as Theirs

    with torch.device("meta"):
        reference = Theirs(TheirArgs(context_in_dim=4096, depth=1, depth_single_blocks=1))
    args = replace(FLAVORS["flux-schnell"], depth=1, depth_single_blocks=1)
    shapes = {name: tuple(t.shape) for name, t in reference.state_dict().items()}
    assert foreign_shapes(args, layout_entries("torchtitan", args)) == shapes


def test_a_runs_checkpoint_takes_its_flavor_from_the_configuration_beside_it(tmp_path):
    args = replace(FLAVORS["flux-digits"], depth=2, context_in_dim=24)
    folder = made.save_checkpoint(
        tmp_path / "run" / "checkpoint" / "step-7", args, made.state_dict(args)
    )
    with pytest.raises(ValueError, match=r"rotary axes.*--flavor"):
        open_weights(folder)
    config = {"model": {"flavor": "flux-digits"}, "training": {}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert open_weights(folder).args == args
    assert open_weights(folder, flavor=FLAVORS["flux-digits"]).args == args
    with pytest.raises(ValueError, match=r"hidden_size is 128, the flavor's 384"):
        open_weights(folder, flavor=FLAVORS["flux-mnist"])


# ---- full size -----------------------------------------------------------------------------


@pytest.mark.parametrize("flavor", ["flux-schnell", "flux-dev"])
def test_full_size_files_open_without_help(tmp_path, flavor):
    args = FLAVORS[flavor]
    theirs = foreign_shapes(args, layout_entries("bfl", args))
    file = open_weights(made.sparse(tmp_path / "flux1-x.safetensors", theirs))
    assert (file.args, file.format) == (args, "bfl")

    theirs = foreign_shapes(args, layout_entries("diffusers", args))
    folder = tmp_path / "transformer"
    folder.mkdir()
    names = list(theirs)
    table = {}
    for i, part in enumerate((names[:400], names[400:])):
        name = f"diffusion_pytorch_model-{i + 1:05d}-of-00002.safetensors"
        made.sparse(folder / name, {n: theirs[n] for n in part})
        table |= dict.fromkeys(part, name)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 2}, "weight_map": table})
    )
    (folder / "config.json").write_text(json.dumps(architecture.to_diffusers_config(args)))
    found = open_weights(tmp_path / "transformer")
    assert found.args == args
    assert found.shapes == file.shapes
    assert found.read("double_blocks.3.img_mod.lin.bias", (slice(5, 9),)).tolist() == [0.0] * 4


def test_the_published_configuration_is_the_flavor(tmp_path):
    """What diffusers itself writes for FLUX.1 is understood, and ours is what it understands."""
    from diffusers import FluxTransformer2DModel

    for flavor in ("flux-schnell", "flux-dev"):
        args = FLAVORS[flavor]
        with torch.device("meta"):
            theirs = FluxTransformer2DModel.from_config(
                architecture.to_diffusers_config(replace(args, depth=1, depth_single_blocks=1))
            )
        theirs.save_config(tmp_path)  # type: ignore[union-attr]
        found = architecture.from_diffusers_config(tmp_path / "config.json")
        assert found == replace(args, depth=1, depth_single_blocks=1)


def test_a_file_larger_than_the_memory(tmp_path):
    """Read where it lies: nothing of it counts as memory of this process."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = {line.split()[0]: int(line.split()[1]) for line in lines}
    there = (kilobytes["MemTotal:"] + kilobytes["SwapTotal:"]) * 1024
    path = made.sparse(tmp_path / "large.safetensors", {"x": (there // 2 + 2**29,), "last": (3,)})
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x80\x3f")
    file = TensorsFile.open(path)
    assert file.tensor("last").tolist() == [0, 0, 1]
    file.release("x")
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert {line.split()[1] for line in maps if str(path) in line} == {"r--s"}, "no private copy"


def test_a_checkpoint_of_another_python_version(tmp_path, states):
    """Python 3.13 stores paths as of a module that others lack."""
    folder = made.make(tmp_path, "dcp", made.ARGS, states["plain"])
    metadata = SafeReader(folder).read_metadata()
    metadata.storage_meta = StorageMeta(Path("/some/where"))
    text = pickle.dumps(metadata, protocol=2)  # names are plain text there
    for module in (b"cpathlib", b"cpathlib._local"):
        assert b"\nPosixPath\n" in text
        older = text.replace(b"cpathlib._local\n", b"cpathlib\n")
        (folder / ".metadata").write_bytes(older.replace(b"cpathlib\n", module + b"\n"))
        found = SafeReader(folder).read_metadata().storage_meta
        assert found is not None
        assert str(found.checkpoint_id) == "/some/where"


@pytest.mark.parametrize(
    "change", [{"mlp_ratio": 2.0}, {"theta": 500}, {"qkv_bias": False}], ids=str
)
def test_what_diffusers_cannot_hold_is_refused_for_it_alone(tmp_path, change):
    args: FluxModelArgs = replace(made.ARGS, **change)
    with pytest.raises(ValueError, match=next(iter(change))):
        architecture.to_diffusers_config(args)
    path = made.make(tmp_path, "bfl", args, made.state_dict(args))
    assert open_weights(path).args == args
