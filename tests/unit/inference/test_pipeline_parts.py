"""Encoders and autoencoder beside the transformer that pictures are drawn with."""

import shutil

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan_flux.inference.command import with_parts_of


def test_a_pipeline_in_the_hubs_cache_brings_its_encoders(tmp_path):
    """As any pipeline folder does; a cache without it brings nothing and is refused later."""
    root = tmp_path / "models--black-forest-labs--FLUX.1-dev"
    snapshot = root / "snapshots" / "abc"
    (snapshot / "vae").mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    assert with_parts_of(str(root), []) == ["--encoder.autoencoder_path", str(snapshot / "vae")]
    (snapshot / "model_index.json").unlink()
    assert with_parts_of(str(root), ["--a", "b"]) == ["--a", "b"]
    shutil.rmtree(root / "snapshots")
    assert with_parts_of(str(root), []) == []
