"""Every mode of activation checkpointing changes no gradient, and does what it says."""

from dataclasses import replace

import pytest
import torch
from helpers import model_inputs, nonzero_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan_flux.model import FLAVORS, FluxModel
from torchtitan_flux.parallel import activation_checkpoint
from torchtitan_flux.parallel.activation_checkpoint import apply_activation_checkpoint
from torchtitan_flux.parallel.context import apply_context_parallel
from torchtitan_flux.planning.dry_run import fake_ranks
from torchtitan_flux.startup.load_config import ConfigError, load_config

# two double and three single blocks: an even and an odd number
ARGS = replace(
    FLAVORS["flux-tiny"], hidden_size=64, num_heads=4, axes_dim=(4, 6, 6), depth_single_blocks=3
)
MODES = {
    "none": {"mode": "none"},
    "full": {"mode": "full"},
    "full, early": {"mode": "full", "early_stop": True, "determinism_check": "none"},
    "full, offloaded": {"mode": "full", "offload_inputs": True},
    "1": {"mode": "selective", "selective_ac_option": "1"},
    "2": {"mode": "selective", "selective_ac_option": "2"},
    "2, offloaded": {"mode": "selective", "selective_ac_option": "2", "offload_inputs": True},
    "op": {"mode": "selective", "selective_ac_option": "op"},
}
OPTIONS = {"preserve_rng_state": False, "early_stop": False}


def prepared(name: str, guidance: bool = False) -> tuple[FluxModel, dict[str, Tensor]]:
    args = replace(ARGS, guidance_embed=guidance)
    model = nonzero_model(args, seed=5)
    apply_activation_checkpoint(model, **OPTIONS | MODES[name])
    return model, model_inputs(args, 2, 6, 10, 13, seed=6)


class Runs(TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self):
        super().__init__()
        self.runs: dict[object, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.runs[func] = self.runs.get(func, 0) + 1
        return func(*args, **(kwargs or {}))


def measured(name: str) -> dict[object, int]:
    """Runs of each operation in a step."""
    model, inputs = prepared(name)
    with Runs() as counted:
        model(**inputs).square().mean().backward()
    return counted.runs


@pytest.mark.parametrize(
    ("name", "runs"),
    [("none", [1] * 5), ("full", [2] * 5), ("1", [2] * 5), ("2", [1, 2, 1, 2, 1]),
     ("2, offloaded", [1, 2, 1, 2, 1]), ("op", [2] * 5)],
)  # fmt: skip
def test_the_blocks_that_are_named_are_run_again(name, runs):
    """Counted from 1 over double and single blocks: of five, "2" takes the second and fourth."""
    model = nonzero_model(ARGS, seed=5)
    counts = [0] * 5
    for i, block in enumerate([*model.double_blocks.values(), *model.single_blocks.values()]):

        def count(*_, i=i):
            counts[i] += 1

        block.register_forward_pre_hook(count)
    apply_activation_checkpoint(model, **OPTIONS | MODES[name])
    model(**model_inputs(ARGS, 2, 6, 10, 13, seed=6)).square().mean().backward()
    assert counts == runs


PRODUCTS = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def test_by_operation_no_product_and_no_attention_runs_twice():
    none, full, op = (measured(name) for name in ("none", "full", "op"))
    for product in PRODUCTS:
        assert op.get(product, 0) == none.get(product, 0)
    assert op[ATTENTION] == none[ATTENTION] == 5
    assert full[ATTENTION] == 10
    assert op[torch.ops.aten.gelu.default] == 2 * none[torch.ops.aten.gelu.default]


def test_by_operation_nothing_is_sent_twice():
    op = torch.ops._c10d_functional.all_to_all_single.default
    runs = {}
    for mode in ("none", "full", "op"):
        with fake_ranks(2):
            model = nonzero_model(ARGS, seed=5)
            apply_context_parallel(model, init_device_mesh("cpu", (2,)))
            apply_activation_checkpoint(model, **OPTIONS | MODES[mode])
            with Runs() as counted:
                model(**model_inputs(ARGS, 2, 6, 12, 12, seed=6)).square().mean().backward()
        runs[mode] = counted.runs[op]
    assert runs["op"] == runs["none"] < runs["full"]


def test_only_block_inputs_are_offloaded(monkeypatch):
    """What is packed: the tensors that go into the blocks, each time a block takes them."""
    packed = []

    class Recorded(torch.autograd.graph.save_on_cpu):
        def __init__(self, pin_memory: bool):
            super().__init__(pin_memory)
            assert pin_memory == torch.cuda.is_available()
            pack = self.pack_hook
            self.pack_hook = lambda x: packed.append(tuple(x.shape)) or pack(x)

    monkeypatch.setattr(activation_checkpoint, "save_on_cpu", Recorded)
    model, inputs = prepared("full, offloaded")
    model(**inputs)
    img, txt, vec, table = (2, 60, 64), (2, 13, 64), (2, 64), (2, 1, 73, 8, 2)
    assert sorted(packed) == sorted([img, txt, vec, table] * 2 + [(2, 73, 64), vec, table] * 3)


def test_wrapped_models_are_saved_under_the_bare_names():
    bare = nonzero_model(ARGS, seed=5).state_dict()
    for name in MODES:
        model, _ = prepared(name)
        assert model.state_dict().keys() == bare.keys()


def test_the_compilers_budget_is_set_and_taken_back():
    settings = torch._functorch.config
    model = nonzero_model(ARGS, seed=5)
    apply_activation_checkpoint(model, "memory_budget", memory_budget=0.25)
    assert settings.activation_memory_budget == 0.25
    apply_activation_checkpoint(model, "none", memory_budget=0.25)
    assert settings.activation_memory_budget == 1.0


COMPILED = ("--compile.enable",)
SELECTIVE = ("--activation_checkpoint.mode", "selective")
BUDGET = ("--activation_checkpoint.mode", "memory_budget")
OPTION = "--activation_checkpoint.selective_ac_option"
OFFLOADED = "--activation_checkpoint.offload_inputs"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ((*SELECTIVE, OPTION, "0"), 'selective_ac_option = "0"'),
        ((*SELECTIVE, OPTION, "-2"), 'selective_ac_option = "-2"'),
        ((*BUDGET, *COMPILED, "--compile.components", "loss"), '"model" in compile.components'),
        ((*BUDGET, *COMPILED, "--activation_checkpoint.memory_budget", "1.5"), "budget = 1.5"),
        ((*BUDGET, *COMPILED, "--parallelism.tensor_parallel_degree", "2"),
         "parallelism.tensor_parallel_degree = 1"),
        ((OFFLOADED,), "activation_checkpoint.offload_inputs"),
        ((OFFLOADED, *SELECTIVE, OPTION, "op"), "activation_checkpoint.offload_inputs"),
        (("--activation_checkpoint.determinism_check", "strict"), "determinism_check strict"),
        ((*SELECTIVE, OPTION, "op", "--activation_checkpoint.debug"), "selective_ac_option"),
        (("--activation_checkpoint.visualize_memory_budget_pareto",), "remove the key"),
        (SELECTIVE, ""),
        ((*SELECTIVE, OPTION, "op"), ""),
        ((*SELECTIVE, OPTION, "3", OFFLOADED), ""),
        (("--activation_checkpoint.mode", "full", OFFLOADED), ""),
        ((*BUDGET, *COMPILED), ""),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_by_name(argv, named, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2" if "--parallelism.tensor_parallel_degree" in argv else "1")
    words = ["--job.config_file", "train_configs/flux_digits.toml", *argv]
    if not named:
        load_config(words)
        return
    with pytest.raises(ConfigError) as error:
        load_config(words)
    assert named in str(error.value)
    assert len(error.value.found) == 1
