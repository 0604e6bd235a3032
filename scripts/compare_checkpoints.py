"""How far two sets of FLUX weights are apart, whatever their formats.

python scripts/compare_checkpoints.py flux1-dev.safetensors flux-mine

Exit status: 0 bit-equal, 1 they differ, 2 one of them cannot be read.
"""

from torchtitan_flux.weights.compare import main

if __name__ == "__main__":
    main()
