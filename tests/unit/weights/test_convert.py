"""From every format to every other without loss, and into what diffusers opens."""

import hashlib
import json
import math
import os
import shutil
import subprocess
from dataclasses import replace
from importlib import resources
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import made_weights as made
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from helpers import diffusers_forward, model_inputs, relative_l2
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel
from weight_files import scaled_float8

from torchtitan_flux import torchtitan_shim as engine
from torchtitan_flux.checkpoint.manifest import Manifest
from torchtitan_flux.checkpoint.storage import load_states
from torchtitan_flux.encoders.autoencoder import load_autoencoder
from torchtitan_flux.encoders.text import CaptionTokenizer, ClipEncoder, T5Encoder
from torchtitan_flux.latents import ImageSize, pack
from torchtitan_flux.model import FLAVORS, FluxModel, FluxModelArgs
from torchtitan_flux.model.inputs import TextConditioning, conditioned_velocity
from torchtitan_flux.sampling.euler import euler
from torchtitan_flux.sampling.generate import initial_noise
from torchtitan_flux.sampling.schedules import Schedule
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights
from torchtitan_flux.tensor_files.safetensors_writer import parse_size
from torchtitan_flux.weights import (
    compare,
    compare_command,
    convert_command,
    export_dcp,
    staging,
)
from torchtitan_flux.weights import convert as convert_module
from torchtitan_flux.weights.convert import convert
from torchtitan_flux.weights.convert_autoencoder import convert_autoencoder, open_autoencoder
from torchtitan_flux.weights.key_maps import foreign_shapes, layout_entries
from torchtitan_flux.weights.model_card import travelling_files
from torchtitan_flux.weights.open import open_weights
from torchtitan_flux.weights.staging import TargetRefused

TINY = Path(str(resources.files("torchtitan_flux"))) / "assets" / "tiny"
SINGLE = "diffusion_pytorch_model.safetensors"
NAMES = {"dcp": "step-0", "bfl": "flux1-a.safetensors", "comfyui": "b.safetensors"}
# widths of assets/tiny, so that a pipeline can be made
FOR_PIPELINE = replace(made.ARGS, in_channels=64, out_channels=64, vec_in_dim=32, context_in_dim=32)
PIPELINES = {"plain": FOR_PIPELINE, "guided": replace(FOR_PIPELINE, guidance_embed=True)}

# guided weights have every key that plain ones have; those are left to the slow run
GUIDED_FIRST = ["guided", pytest.param("plain", marks=pytest.mark.slow)]


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
        formats = ["dcp", "bfl", "comfyui", "diffusers"]
        for format in formats + ["pipeline"] * (args in PIPELINES.values()):
            made_here = target(folder, format)
            convert(now, made_here, format, max_shard_size="200KB")  # type: ignore[arg-type]
            found[format, args] = now = made_here
    return found


def assert_same(path: Path, states: dict[str, Tensor], args: FluxModelArgs) -> None:
    weights = open_weights(path)
    assert weights.args == args
    assert weights.shapes.keys() == states.keys()
    for name, tensor in states.items():
        assert weights.dtypes[name] == tensor.dtype
        assert torch.equal(weights.read(name), tensor), name


# ---- pairs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", GUIDED_FIRST)
@pytest.mark.parametrize("to", ["dcp", "bfl", "comfyui", "diffusers"])
@pytest.mark.parametrize("source", ["dcp", "bfl", "comfyui", "diffusers"])
def test_every_pair_of_formats(sources, models, tmp_path, source, to, variant):
    args = made.VARIANTS[variant]
    path = sources[source, args]
    if source == to:
        assert_same(path, models[args], args)
    convert(path, target(tmp_path, to), to, verify=source == to)
    assert_same(target(tmp_path, to), models[args], args)
    assert [one.name for one in tmp_path.iterdir() if one.name.endswith(".partial")] == []


@pytest.mark.parametrize("variant", GUIDED_FIRST)
@pytest.mark.parametrize("other", ["dcp", "bfl", "comfyui", "diffusers"])
def test_pipelines_and_back(sources, models, tmp_path, other, variant):
    args = PIPELINES[variant]
    convert(sources[other, args], tmp_path / "pipeline", "pipeline")
    assert_same(tmp_path / "pipeline", models[args], args)
    convert(tmp_path / "pipeline", target(tmp_path, other), other)
    assert_same(target(tmp_path, other), models[args], args)


def test_torchtitans_own_checkpoint_becomes_ours(tmp_path, models):
    import torch.distributed.checkpoint as dcp

    theirs = made.torchtitan_states(made.ARGS, models[made.ARGS])
    dcp.save(theirs, checkpoint_id=tmp_path / "step-9", no_dist=True)
    convert(tmp_path / "step-9", tmp_path / "ours", "dcp", args=made.ARGS)
    assert_same(tmp_path / "ours", models[made.ARGS], made.ARGS)
    assert "causal attention" in (tmp_path / "ours" / "README.md").read_text()


def test_what_was_written_is_what_others_read(sources, models):
    """The safetensors library and DCP's own loader see the same values."""
    from torchtitan_flux.weights import to_bfl

    states, args = models[made.GUIDED], made.GUIDED
    found = load_file(sources["comfyui", args])
    expected = {f"model.diffusion_model.{n}": t for n, t in to_bfl(states, args).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    loaded = {name: torch.zeros_like(t) for name, t in states.items()}
    load_states(loaded, set(loaded), sources["dcp", args])
    assert all(torch.equal(loaded[name], tensor) for name, tensor in states.items())


def test_element_types_and_values_that_do_not_fit(tmp_path, models):
    states, args = dict(models[made.ARGS]), made.ARGS
    path = made.make(tmp_path / "in", "bfl", args, states)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        convert(path, tmp_path / name, "diffusers", dtype=dtype, verify=True)
        assert_same(tmp_path / name, {n: t.to(dtype) for n, t in states.items()}, args)
    states["txt_in.bias"] = torch.full_like(states["txt_in.bias"], 1e6)
    path = made.make(tmp_path / "large", "bfl", args, states)
    with pytest.raises(ValueError, match=r"txt_in\.bias has values that torch\.float16 cannot"):
        convert(path, tmp_path / "no", "dcp", dtype=torch.float16)
    assert not (tmp_path / "no").exists()
    assert not (tmp_path / "no.partial").exists()


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


@pytest.mark.parametrize("variant", PIPELINES)
def test_the_pipeline_draws_what_our_sampler_draws(sources, models, variant):
    args, size, prompts, steps = PIPELINES[variant], ImageSize(48, 80), ["a red circle"], 4
    guidance = 3.5 if args.guidance_embed else None
    pipeline = FluxPipeline.from_pretrained(sources["pipeline", args], torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    noise = pack(initial_noise(args.geometry, size, seed=7, index=0)[None], args.patch_size)
    expected = pipeline(
        prompts,
        height=size.height,
        width=size.width,
        num_inference_steps=steps,
        guidance_scale=guidance or 0.0,
        latents=noise,  # type: ignore[arg-type]
        max_sequence_length=24,
        output_type="latent",
    ).images  # type: ignore[union-attr]

    model = FluxModel(args)
    model.load_state_dict(models[args])
    t5, clip = CaptionTokenizer(TINY / "t5", TINY / "clip", 24)(prompts[0])
    encoders = T5Encoder(TINY / "t5"), ClipEncoder(TINY / "clip")
    text = TextConditioning(encoders[0](t5[None]), encoders[1](clip[None]))
    velocity = conditioned_velocity(model, text, args.geometry, size, guidance)
    schedule = Schedule.of_flavor(args.guidance_embed)
    times = schedule.times(steps, args.geometry.grid(size).tokens)
    found = euler(velocity, noise, times)
    assert relative_l2(found, noise) > 0.1
    assert relative_l2(found, expected) <= 1e-5  # type: ignore[arg-type]


def test_a_pipelines_parts_must_fit(sources, tmp_path, models):
    def refused(path, message, **parts):
        with pytest.raises(ValueError, match=message):
            convert(path, tmp_path / "out", "pipeline", parts=convert_module.PipelineParts(**parts))
        assert not (tmp_path / "out").exists()

    path = sources["bfl", FOR_PIPELINE]
    narrow = sources["bfl", made.ARGS]
    refused(narrow, r"name it by --t5")
    parts = {"t5": TINY / "t5", "clip": TINY / "clip", "autoencoder": TINY / "vae"}
    refused(narrow, r"--t5 has 32 features, the transformer needs 22", **parts)
    refused(path, r"--clip: there is no .*absent", clip=tmp_path / "absent")
    shutil.copytree(TINY / "t5", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    refused(path, r"--t5: .* pytorch_model\.bin is not read, for it", t5=tmp_path / "pickled")
    shutil.copytree(TINY / "t5", tmp_path / "part")
    (tmp_path / "part" / "model.safetensors").rename(tmp_path / "part" / "model-1-of-2.safetensors")
    refused(path, r"--t5: .* named otherwise: model-1-of-2\.safetensors$", t5=tmp_path / "part")
    shards = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    index = tmp_path / "part" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    refused(path, r"--t5: .* names model-2-of-2\.safetensors, which", t5=tmp_path / "part")
    shutil.copytree(TINY / "t5", tmp_path / "scaled")
    weights = tmp_path / "scaled" / "model.safetensors"
    whole = load_file(weights)
    save_file(scaled_float8(whole, "weight_scale")[0], weights)
    refused(path, r"--t5: .*scaled holds scaled float8", t5=tmp_path / "scaled")
    save_file({**whole, "stray": torch.ones(1)}, weights)
    refused(path, r"--t5: .*scaled: it does not fit; 1 unknown: stray", t5=tmp_path / "scaled")
    digits = replace(FLAVORS["flux-digits"], depth=1, depth_single_blocks=1)
    pixels = made.make(tmp_path / "pixels", "bfl", digits, made.state_dict(digits))
    refused(pixels, r"works on pixels")


def test_a_pipeline_has_a_variant_of_an_encoder_under_its_plain_name(sources, tmp_path):
    state = {n: x.half() for n, x in load_file(TINY / "t5" / "model.safetensors").items()}
    shutil.copytree(TINY, tmp_path / "tiny")
    t5, clip = tmp_path / "tiny" / "t5", tmp_path / "tiny" / "clip"
    (t5 / "model.safetensors").unlink()
    table = {}
    for i in (1, 2):
        file = f"model.fp16-0000{i}-of-00002.safetensors"
        mine = {name: state[name] for name in list(state)[i - 1 :: 2]}
        save_file(mine, t5 / file, metadata={"format": "pt"})
        table |= dict.fromkeys(mine, file)
    (clip / "model.safetensors").rename(clip / "model.fp16.safetensors")
    parts = convert_module.PipelineParts(t5=t5, clip=clip)
    path, target = sources["bfl", FOR_PIPELINE], tmp_path / "out"
    with pytest.raises(UnreadableWeights, match=r"--t5: .* not their model\.safetensors\.index"):
        convert(path, target, "pipeline", parts=parts)
    index = {"metadata": {}, "weight_map": table}
    (t5 / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    convert(path, target, "pipeline", parts=parts)
    pipeline = FluxPipeline.from_pretrained(target, torch_dtype=torch.float16)
    for name, tensor in pipeline.text_encoder_2.state_dict().items():
        assert torch.equal(tensor, state[name.replace("encoder.embed_tokens", "shared")]), name
    for name, tensor in CLIPTextModel.from_pretrained(TINY / "clip").state_dict().items():
        found = pipeline.text_encoder.state_dict()[name]
        assert torch.equal(found.half(), tensor.half()), name


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", f"vae/{SINGLE}"])
def test_verification_covers_all_of_a_pipeline(sources, tmp_path, monkeypatch, name):
    real = convert_module._write_diffusers

    def flip(job, folder):
        part = folder.parent / name
        content = part.read_bytes()
        part.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        return real(job, folder)

    monkeypatch.setattr(convert_module, "_write_diffusers", flip)
    with pytest.raises(UnreadableWeights, match=r"the copy tokenizer|what was written differs"):
        convert(sources["bfl", FOR_PIPELINE], tmp_path / "out", "pipeline", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_is_not_made_in_place_of_its_own_parts(tmp_path, sources):
    there = tmp_path / "FLUX.1-dev"
    shutil.copytree(TINY, there)
    (there / "model_index.json").write_text("{}")
    before = sorted(there.rglob("*"))
    parts = convert_module.PipelineParts(autoencoder=there / "ae.safetensors")
    with pytest.raises(TargetRefused, match=r"holds what is read from.*ae\.safetensors"):
        convert(sources["bfl", FOR_PIPELINE], there, "pipeline", overwrite=True, parts=parts)
    assert sorted(there.rglob("*")) == before


def test_what_lies_beside_a_single_file(tmp_path, sources):
    """An earlier export's companions go with it; without --overwrite nothing is touched."""
    theirs = tmp_path / "theirs"
    shutil.copytree(sources["diffusers", made.ARGS], theirs)
    (theirs / "LICENSE.md").write_text("do no harm")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "flux1-a.README.md").write_text("written by hand")
    with pytest.raises(TargetRefused, match=r"flux1-a\.README\.md exists"):
        convert(theirs, folder / "flux1-a.safetensors", "bfl")
    assert [one.name for one in folder.iterdir()] == ["flux1-a.README.md"]
    convert(theirs, folder / "flux1-a.safetensors", "bfl", overwrite=True)
    (folder / "flux1-a.png").write_text("a picture")
    (folder / "flux1-a").mkdir()
    names = {"flux1-a", "flux1-a.README.md", "flux1-a.SHA256SUMS", "flux1-a.png"}
    names.add("flux1-a.safetensors")
    assert {one.name for one in folder.iterdir()} == names | {"flux1-a.LICENSE.md"}
    convert(sources["dcp", made.ARGS], folder / "flux1-a", "diffusers", overwrite=True)
    assert (folder / "flux1-a.LICENSE.md").exists(), "it belongs to the file, not to the folder"
    convert(sources["dcp", made.ARGS], folder / "flux1-a.safetensors", "bfl", overwrite=True)
    assert {one.name for one in folder.iterdir()} == names


def test_a_large_checkpoint_has_several_files(sources, models, tmp_path, monkeypatch):
    """So that ranks share the reading, when they verify it."""
    monkeypatch.setattr(export_dcp, "_FILE_BYTES", 200_000)
    convert(sources["bfl", made.ARGS], tmp_path / "out", "dcp", verify=True)
    names = {one.name for one in (tmp_path / "out").glob("*.distcp")}
    assert len(names) > 3
    assert names < set(Manifest.read(tmp_path / "out").files)
    assert_same(tmp_path / "out", models[made.ARGS], made.ARGS)
    loaded = {name: torch.zeros_like(t) for name, t in models[made.ARGS].items()}
    load_states(loaded, set(loaded), tmp_path / "out")
    assert all(torch.equal(loaded[name], t) for name, t in models[made.ARGS].items())


# ---- the autoencoder -----------------------------------------------------------------------


def test_the_autoencoder_there_and_back(tmp_path, capsys):
    folder, file = tmp_path / "vae", tmp_path / "ae.safetensors"
    for source, made_here, format in (
        (TINY / "ae.safetensors", folder, "diffusers"),
        (folder, file, "bfl"),
    ):
        convert_command.main([str(source), str(made_here), "--to", format, "--verify"])
    original, back = load_file(TINY / "ae.safetensors"), load_file(file)
    assert original.keys() == back.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())

    ours, theirs = load_autoencoder(TINY / "ae.safetensors"), AutoencoderKL.from_pretrained(folder)
    images = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        z = theirs.encode(images).latent_dist.mode()  # type: ignore[union-attr]
        expected = (z - theirs.config["shift_factor"]) * theirs.config["scaling_factor"]
    assert relative_l2(ours.encode(images), expected) <= 5e-6

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    with pytest.raises(ValueError, match=r"scaling_factor 0\.5.*BFL's layout has no place"):
        convert_autoencoder(folder, tmp_path / "b.safetensors", "bfl")
    for format in ("dcp", "comfyui", "pipeline"):
        with pytest.raises(SystemExit):
            convert_command.main([str(file), str(tmp_path / "x.safetensors"), "--to", format])
        assert "is an autoencoder; --to bfl or --to diffusers" in capsys.readouterr().err
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-8])
    with pytest.raises(UnreadableWeights, match="was cut off"):
        open_autoencoder(folder)


# ---- what travels along --------------------------------------------------------------------


def front_matter(card: Path) -> dict:
    return yaml.safe_load(card.read_text().split("---")[1])


def test_licence_and_card_travel(tmp_path, models):
    root = tmp_path / "theirs"
    made.make(root / "transformer", "diffusers", made.ARGS, models[made.ARGS])
    (root / "model_index.json").write_text("{}")
    (root / "LICENSE.md").write_text("do no harm")
    (root / "README.md").write_text("---\nlicense: other\nlicense_name: kind\n---\n# Theirs\n")
    convert(root, tmp_path / "ours", "dcp")
    convert(tmp_path / "ours", tmp_path / "flux1-a.safetensors", "bfl")
    convert(tmp_path / "flux1-a.safetensors", tmp_path / "last", "diffusers")
    last = tmp_path / "last"
    assert (last / "LICENSE.md").read_text() == "do no harm"
    assert "# Theirs" in (tmp_path / "ours" / "SOURCE_README.md").read_text()
    assert front_matter(last / "README.md") == {
        "license": "other",
        "license_name": "kind",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
    }
    story = (last / "README.md").read_text()
    for step in ("-> ours (dcp)", "-> flux1-a.safetensors (bfl)", "-> last (diffusers)"):
        assert story.count(step) == 1
    assert set(Manifest.read(tmp_path / "ours").files) >= {"README.md", "LICENSE.md"}


def test_a_card_says_how_the_run_trained(tmp_path):
    args = replace(FLAVORS["flux-tiny"], depth=1, depth_single_blocks=1)
    run = tmp_path / "run"
    step = made.save_checkpoint(run / "checkpoint" / "step-7", args, made.state_dict(args))
    config = {
        "model": {"flavor": "flux-tiny"},
        "training": {"dataset": "shapes", "steps": 7},
        "optimizer": {"lr": 8e-4},
        "checkpoint": {},
    }
    (run / "config.json").write_text(json.dumps(config))
    convert(step, tmp_path / "out", "diffusers", args=args)
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in ("7 steps of 8 images", "seed 5", "training.dataset = 'shapes'", "lr = 0.0008"):
        assert fact in card
    assert "license" not in front_matter(tmp_path / "out" / "README.md")


@pytest.mark.parametrize(("flavor", "named"), [("flux-dev", True), ("flux-schnell", False)])
def test_derivatives_of_dev_name_its_licence(tmp_path, flavor, named):
    args = FLAVORS[flavor]
    shapes = foreign_shapes(args, layout_entries("bfl", args))
    weights = open_weights(made.sparse(tmp_path / "flux1-x.safetensors", shapes))
    card = tmp_path / "README.md"
    card.write_bytes(travelling_files(weights, "diffusers", tmp_path / "out", None)["README.md"])
    matter = front_matter(card)
    assert matter.get("license_name") == ("flux-1-dev-non-commercial-license" if named else None)
    assert matter.get("license") == ("other" if named else None)


def test_checksums_are_those_of_the_files(sources):
    for path in (sources["diffusers", made.ARGS], sources["pipeline", FOR_PIPELINE]):
        lines = (path / "SHA256SUMS").read_text().splitlines()
        files = {str(one.relative_to(path)) for one in path.rglob("*") if one.is_file()}
        assert {line.split("  ")[1] for line in lines} == files - {"SHA256SUMS"}
        for line in lines:
            digest, name = line.split("  ")
            assert hashlib.sha256((path / name).read_bytes()).hexdigest() == digest


def test_shards_are_as_diffusers_makes_them(sources, tmp_path):
    folder = sources["diffusers", made.ARGS]
    index = json.loads((folder / f"{SINGLE}.index.json").read_text())
    shards = sorted(one.name for one in folder.glob("*.safetensors"))
    count = len(shards)
    assert count > 1
    expected = [
        f"diffusion_pytorch_model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    assert shards == expected
    tensors = {name: load_file(folder / name) for name in shards}
    assert index["weight_map"] == {n: shard for shard in shards for n in tensors[shard]}
    sizes = [sum(t.nbytes for t in one.values()) for one in tensors.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert max(sizes) <= 200_000
    convert(folder, tmp_path / "one", "diffusers")
    assert (tmp_path / "one" / SINGLE).is_file()
    assert not (tmp_path / "one" / f"{SINGLE}.index.json").exists()


def test_sizes():
    assert [parse_size(one) for one in ("10GB", "1.5 MiB", "7", 12)] == [10**10, 3 * 2**19, 7, 12]
    for wrong in ("ten", "-1GB", "0", "3 apples", ""):
        with pytest.raises(ValueError, match="is no size"):
            parse_size(wrong)


# ---- the target ----------------------------------------------------------------------------


def test_a_target_that_exists_is_kept(sources, models, tmp_path):
    source, there = sources["bfl", made.ARGS], tmp_path / "there"
    convert(source, there, "diffusers")
    before = {one: one.read_bytes() for one in there.iterdir()}
    with pytest.raises(TargetRefused, match=r"there exists; name another target, or pass --over"):
        convert(source, there, "diffusers")
    assert {one: one.read_bytes() for one in there.iterdir()} == before
    convert(sources["bfl", made.GUIDED], there, "diffusers", overwrite=True)
    assert_same(there, models[made.GUIDED], made.GUIDED)
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "monday.txt").write_text("dear diary")
    with pytest.raises(TargetRefused, match="no earlier export"):
        convert(source, tmp_path / "diary", "diffusers", overwrite=True)
    assert (tmp_path / "diary" / "monday.txt").exists()
    (tmp_path / "config.json").write_text("{}")
    for path in (there, tmp_path):
        with pytest.raises(TargetRefused, match="holds what is read from"):
            convert(there, path, "dcp", overwrite=True)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["config.json", "diary", "there"]


def test_no_space_and_wrong_kinds_of_target(sources, tmp_path, monkeypatch, capsys):
    source = sources["bfl", made.ARGS]
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(TargetRefused, match=r"needs 0\.02 GB, .* has 0\.01 GB free; make room"):
        convert(source, tmp_path / "new" / "out", "diffusers")
    monkeypatch.undo()
    with pytest.raises(TargetRefused, match=r"name it \*\.safetensors"):
        convert(source, tmp_path / "out", "bfl")
    with pytest.raises(TargetRefused, match="is to be a folder"):
        convert(source, tmp_path / "out.safetensors", "diffusers")
    (tmp_path / "file").write_text("")
    with pytest.raises(TargetRefused, match=r"file is a file"):
        convert(source, tmp_path / "file" / "out", "diffusers")
    with pytest.raises(SystemExit) as left:
        convert_command.main(
            [str(source), str(tmp_path / "o"), "--to", "dcp", "--max_shard_size", "x"]
        )
    assert (left.value.code, "is no size" in capsys.readouterr().err) == (2, True)
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
        convert(weights, target(tmp_path / "new", format), format)
    assert len(calls) == 20
    assert list(tmp_path.iterdir()) == []


def test_verification_finds_a_flipped_bit(sources, tmp_path, monkeypatch):
    real = convert_module.compare_written

    def flip(job, written):
        with (written / SINGLE).open("r+b") as file:
            file.seek(-9, os.SEEK_END)
            byte = file.read(1)
            file.seek(-9, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
        real(job, written)

    monkeypatch.setattr(convert_module, "compare_written", flip)
    with pytest.raises(UnreadableWeights, match=r"differs from .* in 1 parameters"):
        convert(sources["bfl", made.ARGS], tmp_path / "out", "diffusers", verify=True)
    assert list(tmp_path.iterdir()) == []


# ---- the commands --------------------------------------------------------------------------


def test_compare(sources, models, tmp_path, capsys):
    def run(*paths) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            compare_command.main([str(path) for path in paths])
        return left.value.code, capsys.readouterr().out  # type: ignore[return-value]

    code, told = run(sources["dcp", made.GUIDED], sources["comfyui", made.GUIDED])
    assert code == 0
    assert "same keys, shapes and element types" in told
    assert "relative difference 0.000e+00" in told

    changed = dict(models[made.GUIDED])
    name = "single_blocks.1.linear1_by_head.weight"
    changed[name] = changed[name].clone()
    changed[name][3, 4] += 0.5
    path = made.make(tmp_path, "diffusers", made.GUIDED, changed)
    code, told = run(sources["dcp", made.GUIDED], path)
    assert code == 1
    lines = {line.split()[0]: line.split()[1:] for line in told.splitlines() if "_blocks." in line}
    assert lines["single_blocks.1"][1:3] == ["1", "5.000e-01"]
    assert {line[1] for block, line in lines.items() if block != "single_blocks.1"} == {"0"}
    relative = float(told.strip().split()[-1])
    assert 0 < relative < 1

    code, told = run(sources["dcp", made.ARGS], sources["bfl", made.GUIDED])
    assert code == 1
    assert told.count("only in") == 4
    code, told = run(sources["dcp", made.ARGS], sources["bfl", FOR_PIPELINE])
    assert code == 1
    assert "not run: their inputs" in told
    assert run(sources["dcp", made.ARGS], tmp_path / "absent")[0] == 2


def test_a_difference_that_is_no_number(models, tmp_path, monkeypatch):
    states = dict(models[made.ARGS])
    states["img_in.bias"] = states["img_in.bias"].clone()
    states["img_in.bias"][0] = torch.nan
    first, second = (
        open_weights(made.make(tmp_path / name, "bfl", made.ARGS, one))
        for name, one in (("a", models[made.ARGS]), ("b", states))
    )
    largest = {one.block: one.largest for one in compare.differences(first, second)}
    assert [block for block, value in largest.items() if value != 0] == ["img_in"]
    assert math.isnan(largest["img_in"])
    # of a container, in a machine that has more
    monkeypatch.setattr(engine, "_physical_memory", lambda: 1_000_000)
    assert "not run: 0.0 GB in float32 is over half" in str(
        compare.forward_difference(first, second)
    )


@pytest.mark.slow
def test_scripts_from_another_folder(sources, tmp_path):
    """As a user starts them: one process, from anywhere; a mistake ends with 2 and one line."""
    root = Path(__file__).resolve().parents[3]
    command = ["python", str(root / "scripts" / "convert_checkpoint.py")]
    done = subprocess.run(
        [*command, "absent.pt", "out", "--to", "dcp"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "Cannot convert: absent.pt does not exist"
    assert "Traceback" not in done.stderr
