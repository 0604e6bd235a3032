"""Weights of FLUX from any format to any other.

python scripts/convert_checkpoint.py outputs/checkpoint/step-1000 flux-mine --to diffusers --verify

From: our checkpoints (DCP), torchtitan 0.2's own FLUX checkpoints, BFL's flux1-*.safetensors,
ComfyUI's single files, diffusers transformer folders and whole pipelines; an autoencoder as
ae.safetensors or a diffusers vae folder. docs/checkpoints.md goes through each journey.
"""

from torchtitan_flux.weights.convert_command import main

if __name__ == "__main__":
    main()
