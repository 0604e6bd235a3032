"""From every format to every other without loss, and into what diffusers opens."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
import weight_files as made
from diffusers import AutoencoderKL, FluxTransformer2DModel
from helpers import diffusers_forward, model_inputs, relative_l2
from safetensors.torch import load_file
from torch import Tensor

from torchtitan_flux.checkpoint.manifest import Manifest
from torchtitan_flux.checkpoint.storage import load_states
from torchtitan_flux.encoders.autoencoder import load_autoencoder
from torchtitan_flux.model import FluxModel, FluxModelArgs
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights
from torchtitan_flux.weights import compare, convert_command, staging
from torchtitan_flux.weights import convert as convert_module
from torchtitan_flux.weights.convert import convert
from torchtitan_flux.weights.convert_autoencoder import convert_autoencoder, open_autoencoder
from torchtitan_flux.weights.key_maps import to_layout
from torchtitan_flux.weights.open import open_weights
from torchtitan_flux.weights.staging import TargetRefused

TINY = made.TINY
SINGLE = "diffusion_pytorch_model.safetensors"
NAMES = {"dcp": "step-0", "bfl": "flux1-a.safetensors", "comfyui": "b.safetensors"}
FORMATS = ("dcp", "bfl", "comfyui", "diffusers")
PAIRS = [
    *product(FORMATS, FORMATS),
    *product(FORMATS, ["pipeline"]),
    *product(["pipeline"], FORMATS),
]
PIPELINES = {
    "plain": made.FOR_PIPELINE,
    "guided": replace(made.FOR_PIPELINE, guidance_embed=True),
}


def target(folder: Path, format: str) -> Path:
    return folder / NAMES.get(format, format)


@pytest.fixture(scope="module")
def models() -> dict[FluxModelArgs, dict[str, Tensor]]:
    return {args: made.state_dict(args) for args in (*made.VARIANTS.values(), *PIPELINES.values())}


@pytest.fixture(scope="module")
def sources(tmp_path_factory, models) -> dict[tuple[str, FluxModelArgs], Path]:
    """Every format that is written, for each architecture, by way of the one before."""
    found = {}
    for i, (args, states) in enumerate(models.items()):
        folder = tmp_path_factory.mktemp(f"sources-{i}")
        now = made.make(folder / "first", "bfl", args, states)
        for format in FORMATS:
            made_here = target(folder, format)
            convert(now, made_here, format, max_shard_size="200KB")  # type: ignore[arg-type]
            found[format, args] = now = made_here
        if args in PIPELINES.values():
            found["base", args] = made.pipeline(folder / "base", args)
            found["pipeline", args] = folder / "pipeline"
            convert(now, folder / "pipeline", "pipeline", base=found["base", args])
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def assert_same(path: Path, states: dict[str, Tensor], args: FluxModelArgs) -> None:
    weights = open_weights(path)
    assert weights.args == args
    assert_equal({name: weights.read(name) for name in weights.shapes}, states)


# ---- pairs ---------------------------------------------------------------------------------


# guided weights have every key that plain ones have; those are left to the slow run
@pytest.mark.parametrize("variant", ["guided", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("source", "to"), PAIRS)
def test_every_pair_of_formats(sources, models, tmp_path, source, to, variant):
    args = (PIPELINES if "pipeline" in (source, to) else made.VARIANTS)[variant]
    path = sources[source, args]
    assert_same(path, models[args], args)
    base = sources["base", args] if to == "pipeline" else None
    convert(path, target(tmp_path, to), to, verify=source == to, base=base)
    assert_same(target(tmp_path, to), models[args], args)
    assert [one.name for one in tmp_path.iterdir() if one.name.endswith(".partial")] == []


def test_torchtitans_own_checkpoint_becomes_ours(tmp_path, models, caplog):
    theirs = made.torchtitan_checkpoint(tmp_path / "step-9", models[made.ARGS], made.ARGS)
    convert(theirs, tmp_path / "ours", "dcp", args=made.ARGS)
    assert_same(tmp_path / "ours", models[made.ARGS], made.ARGS)
    assert "causal attention" in caplog.text
    assert "causal attention" in (tmp_path / "ours" / "README.md").read_text()


def test_what_was_written_is_what_others_read(sources, models):
    """The safetensors library and DCP's own loader see the same values."""
    states, args = models[made.GUIDED], made.GUIDED
    expected = {f"model.diffusion_model.{n}": t for n, t in to_layout("bfl", states, args).items()}
    assert_equal(load_file(sources["comfyui", args]), expected)
    path = sources["dcp", args]
    files = {one.name for one in path.glob("*.distcp")}
    assert len(files) == len(states), "so that ranks share the reading when they verify it"
    assert files < set(Manifest.read(path).files)
    loaded = {name: torch.zeros_like(t) for name, t in states.items()}
    load_states(loaded, set(loaded), path)
    assert_equal(loaded, states)


def test_element_types_and_values_that_do_not_fit(tmp_path, models):
    states, args = dict(models[made.ARGS]), made.ARGS
    path = made.make(tmp_path / "in", "bfl", args, states)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        convert(path, tmp_path / name, "diffusers", dtype=dtype, verify=True)
        assert_same(tmp_path / name, {n: t.to(dtype) for n, t in states.items()}, args)
    states["txt_in.bias"] = torch.full_like(states["txt_in.bias"], 1e6)
    path = made.make(tmp_path / "large", "bfl", args, states)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"txt_in\.bias has values that torch\.float16 cannot"):
        convert(path, tmp_path / "no", "dcp", dtype=torch.float16)
    assert sorted(tmp_path.iterdir()) == before


# ---- in diffusers --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", made.VARIANTS)
def test_forward_in_diffusers(sources, models, variant):
    args = made.VARIANTS[variant]
    # diffusers' output is as wide as its input is told; both are read from config.json
    theirs = FluxTransformer2DModel.from_pretrained(sources["diffusers", args])
    ours = FluxModel(args)
    ours.load_state_dict(models[args])
    inputs = model_inputs(args, 2, 3, 5, 7, seed=2)
    with torch.no_grad():
        found = diffusers_forward(theirs, inputs)
        assert relative_l2(found, ours(**inputs)) <= 2e-6


def test_a_pipelines_parts_must_fit(sources, tmp_path):
    base = sources["base", made.FOR_PIPELINE]
    spoilt = shutil.copytree(base, tmp_path / "spoilt")
    config = json.loads((base / "vae" / "config.json").read_text())
    (spoilt / "vae" / "config.json").write_text(json.dumps({**config, "latent_channels": 4}))
    for path, given, message in (
        (sources["bfl", made.ARGS], None, r"is no pipeline: name one by --base"),
        (sources["bfl", made.ARGS], base, r"text_encoder_2/config\.json: d_model is 32, .* 22"),
        (sources["bfl", made.FOR_PIPELINE], spoilt, r"vae/config\.json: latent_channels is 4"),
    ):
        with pytest.raises(UnreadableWeights, match=message):
            convert(path, tmp_path / "out", "pipeline", base=given)
    assert [one.name for one in tmp_path.iterdir()] == ["spoilt"]


# ---- the autoencoder -----------------------------------------------------------------------


def test_the_autoencoder_there_and_back(tmp_path, capsys):
    folder, file = tmp_path / "vae", tmp_path / "ae.safetensors"
    for source, made_here, format in (
        (TINY / "ae.safetensors", folder, "diffusers"),
        (folder, file, "bfl"),
    ):
        convert_command.main([str(source), str(made_here), "--to", format, "--verify"])
    assert_equal(load_file(file), load_file(TINY / "ae.safetensors"))

    ours, theirs = load_autoencoder(TINY / "ae.safetensors"), AutoencoderKL.from_pretrained(folder)
    images = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        z = theirs.encode(images).latent_dist.mode()  # type: ignore[union-attr]
        expected = (z - theirs.config["shift_factor"]) * theirs.config["scaling_factor"]
    assert relative_l2(ours.encode(images), expected) <= 5e-6

    for format in ("dcp", "comfyui", "pipeline"):
        with pytest.raises(SystemExit):
            convert_command.main([str(file), str(tmp_path / "x.safetensors"), "--to", format])
        assert "is an autoencoder; --to bfl or --to diffusers" in capsys.readouterr().err
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    with pytest.raises(ValueError, match=r"scaling_factor 0\.5.*BFL's layout has no place"):
        convert_autoencoder(folder, tmp_path / "b.safetensors", "bfl")
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-8])
    with pytest.raises(UnreadableWeights, match="was cut off"):
        open_autoencoder(folder)


# ---- the files -----------------------------------------------------------------------------


def test_shards_are_as_diffusers_makes_them(sources, tmp_path):
    folder = sources["diffusers", made.ARGS]
    index = json.loads((folder / f"{SINGLE}.index.json").read_text())
    shards = sorted(one.name for one in folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert shards[0] == f"diffusion_pytorch_model-00001-of-{len(shards):05d}.safetensors"
    tensors = {name: load_file(folder / name) for name in shards}
    assert index["weight_map"] == {n: shard for shard in shards for n in tensors[shard]}
    sizes = [sum(t.nbytes for t in one.values()) for one in tensors.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert max(sizes) <= 200_000
    convert(folder, tmp_path / "one", "diffusers")
    assert (tmp_path / "one" / SINGLE).is_file()
    assert not (tmp_path / "one" / f"{SINGLE}.index.json").exists()


def test_targets_that_are_refused(sources, tmp_path, monkeypatch, capsys):
    source, out = sources["bfl", made.ARGS], tmp_path / "out"
    (tmp_path / "file").write_text("")
    for path, format, message in (
        (out, "bfl", r"name it \*\.safetensors"),
        (tmp_path / "out.safetensors", "diffusers", "leave the suffix out"),
        (tmp_path / "file", "diffusers", "file exists"),
    ):
        with pytest.raises(TargetRefused, match=message):
            convert(source, path, format)  # type: ignore[arg-type]
    for path, more, message in (
        (source, ["--max_shard_size", "x"], "Cannot convert: --max_shard_size"),
        ("absent.pt", [], "Cannot convert: absent.pt does not exist"),
    ):
        with pytest.raises(SystemExit) as left:
            convert_command.main([str(path), str(out), "--to", "diffusers", *more])
        assert (left.value.code, message in capsys.readouterr().err) == (2, True)
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(TargetRefused, match=r"needs .* MiB, .* has 9\.5 MiB free; make room"):
        convert(source, out, "diffusers")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("format", ["dcp", "bfl", "diffusers"])
@pytest.mark.parametrize("error", [OSError("the disk broke"), KeyboardInterrupt()], ids=repr)
def test_whatever_goes_wrong_nothing_is_left(sources, tmp_path, monkeypatch, format, error):
    weights = open_weights(sources["bfl", made.ARGS])
    real, calls = weights.read, []

    def read(name, *more, **named):
        calls.append(name)
        if len(calls) == 20:
            raise error
        return real(name, *more, **named)

    monkeypatch.setattr(weights, "read", read)
    with pytest.raises(type(error)):
        convert(weights, target(tmp_path, format), format)
    assert len(calls) == 20
    assert list(tmp_path.iterdir()) == []


def test_verification_finds_a_flipped_bit(sources, tmp_path, monkeypatch):
    write = convert_module._WRITERS["diffusers"]

    def flip(job, folder):
        write(job, folder)
        content = bytearray((folder / SINGLE).read_bytes())
        content[-9] ^= 1
        (folder / SINGLE).write_bytes(content)

    monkeypatch.setitem(convert_module._WRITERS, "diffusers", flip)
    with pytest.raises(UnreadableWeights, match=r"differs from .* in 1 parameters: "):
        convert(sources["bfl", made.ARGS], tmp_path / "out", "diffusers", verify=True)
    assert list(tmp_path.iterdir()) == []


# ---- the commands --------------------------------------------------------------------------


def test_compare(sources, models, tmp_path, capsys):
    def run(*paths) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            compare.main([str(path) for path in paths])
        return left.value.code, capsys.readouterr().out  # type: ignore[return-value]

    ours = sources["dcp", made.GUIDED]
    code, printed = run(ours, sources["comfyui", made.GUIDED])
    assert (code, "same names, shapes and element types" in printed) == (0, True)

    changed = {name: tensor.clone() for name, tensor in models[made.GUIDED].items()}
    changed["single_blocks.1.linear1_by_head.weight"][3, 4] += 0.5
    changed["img_in.bias"][0] = torch.nan
    code, printed = run(ours, made.make(tmp_path, "diffusers", made.GUIDED, changed))
    assert code == 1
    rows = (line.split() for line in printed.splitlines() if " 0 " not in line)
    rows = {block: row for block, *row in rows}
    assert rows["single_blocks.1"][1:3] == ["1", "5.000e-01"]
    assert rows["img_in"][1:] == ["1", "nan", "nan"]
    assert not any("double_blocks" in block for block in rows)

    code, printed = run(sources["dcp", made.ARGS], sources["bfl", made.GUIDED])
    assert (code, printed.count(": none and (")) == (1, 4)
    assert run(ours, tmp_path / "absent")[0] == 2


@pytest.mark.slow
def test_memory_stays_below_three_tensors(tmp_path):
    """300 MB of weights, the largest tensor 9 MB: the bound here leaves 60 MB for all else."""
    command = [sys.executable, "benchmarks/convert.py", "--size", "0.3", "--slack", "0.06"]
    command += ["--folder", str(tmp_path), "--to", "diffusers", "dcp"]
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("within the bound") == 2
    assert list(tmp_path.iterdir()) == [], "the benchmark tidies up"
