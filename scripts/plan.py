"""Memory and communication of a mesh, or the meshes that fit, before anything is rented.

python scripts/plan.py --job.config_file train_configs/flux_dev_model.toml --gpus 64 --memory 80
python scripts/plan.py --job.config_file train_configs/flux_dev_model.toml --mesh shard=8,cp=8
"""

from torchtitan_flux.planning.command import main

if __name__ == "__main__":
    main()
