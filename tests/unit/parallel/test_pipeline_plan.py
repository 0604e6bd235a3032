"""Where a model is cut into stages, and the keys of [parallelism] that cannot work."""

import re

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
from torchtitan.config import Parallelism

from torchtitan_flux.model import FLAVORS, FluxModel
from torchtitan_flux.parallel.pipeline_plan import SCHEDULES, split_model
from torchtitan_flux.startup.load_config import ConfigError, load_config


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("degree", [2, 4, 8])
@pytest.mark.parametrize("flavor", ["flux-dev", "flux-schnell"])
def test_flux_is_cut_whole_and_in_order(schedule, degree, flavor):
    args = FLAVORS[flavor]
    keys = Parallelism(
        pipeline_parallel_degree=degree, pipeline_parallel_schedule=schedule.name.upper()
    )
    split = split_model(keys, args)
    with torch.device("meta"):
        names = [name for name, _ in FluxModel(args).named_modules()]
    modules = [
        name for name in names if "_blocks." in name or name.endswith(("_in", "final_layer"))
    ]
    assert [n for part in split for n in part] == [n for n in modules if n.count(".") < 2]
    assert len(split) == degree * (2 if schedule.several else 1)
    blocks = [sum("_blocks." in name for name in part) for part in split]
    assert blocks[0] == min(blocks) >= max(blocks) - 1
    held = [
        stage for rank in range(degree) for stage in schedule.stages_of(rank, degree, len(split))
    ]
    assert sorted(held) == list(range(len(split)))


P = "--parallelism.pipeline_parallel_"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((P + "schedule", "DualPipe"), "schedule = \"DualPipe\": is not available"),
        ((P + "schedule_csv", "a.csv"), "schedules are not read"),
        ((P + "first_stage_less_layers", "2"), "first_stage_less_layers = 2"),
        ((P + "microbatch_size", "3"), "does not divide training.local_batch_size = 4"),
        ((P + "microbatch_size", "4"), "'1F1B' needs a multiple"),
        ((P + "schedule", "Interleaved1F1B", "--training.local_batch_size", "5"),
         "'Interleaved1F1B' needs a multiple"),
        ((P + "layers_per_stage", "1"), "layers_per_stage = 1: is not available"),
        (("--parallelism.module_fqns_per_model_part", "a,b c"), "module_fqns_per_model_part"),
        ((P + "schedule", "ZBVZeroBubble", P + "degree", "4"), "makes 8 stages of 4 blocks"),
        ((P + "schedule", "ZBVZeroBubble", "--compile.enable"), "set compile.enable = false"),
        ((P + "schedule", "ZBVZeroBubble", "--activation_checkpoint.mode", "selective",
          "--activation_checkpoint.selective_ac_option", "op"),
         'set activation_checkpoint.mode = "full"'),
        ((P + "schedule", "zbvzerobubble", "--parallelism.fsdp_reshard_after_forward", "always"),
         "parallelism.fsdp_reshard_after_forward"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_by_name(monkeypatch, argv, said):
    monkeypatch.setenv("WORLD_SIZE", "4" if "4" in argv and P + "degree" in argv else "2")
    base = ["--job.config_file", "train_configs/debug_model.toml", "--model.flavor", "flux-tiny",
            "--training.img_size", "64", "--activation_checkpoint.mode", "none",
            P + "degree", "2"]  # fmt: skip
    assert load_config(base)
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config([*base, *argv])
