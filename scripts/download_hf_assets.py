"""Fetch FLUX.1's encoders and weights from the Hugging Face hub: size first, resumable, verified.

    python scripts/download_hf_assets.py --repo_id black-forest-labs/FLUX.1-dev \\
        --additional_patterns ae.safetensors --hf_token hf_...
    python scripts/download_hf_assets.py --repo_id black-forest-labs/FLUX.1-schnell \\
        --assets text_encoder text_encoder_2 tokenizer tokenizer_2 --dry_run

docs/downloads.md has more, and what each error means.
"""

from torchtitan_flux.downloads import main

if __name__ == "__main__":
    main()
