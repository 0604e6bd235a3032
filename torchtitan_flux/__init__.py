"""torchtitan-flux: pretrain and fine-tune FLUX text-to-image models on torchtitan.

Importing the package alone stays light (no torchtitan, no transformers): the model, the
flow-matching step and the sampler are a library. `torchtitan_flux.training.train_spec` is what
`experimental.custom_import` of torchtitan names.
"""

__version__ = "0.1.0"
