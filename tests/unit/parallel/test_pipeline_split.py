"""Where a model is cut into stages, and the keys of [parallelism] that cannot work."""

import re
from dataclasses import replace
from itertools import combinations

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
from torchtitan.config import Parallelism

from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.parallel.pipeline_plan import SCHEDULES, module_names
from torchtitan_flux.parallel.pipeline_split import balanced, split_model
from torchtitan_flux.startup.load_config import ConfigError, load_config

DEV = FLAVORS["flux-dev"]
COSTS = [
    [1, 1, 1, 1, 1, 1, 1],
    [9, 1, 1, 1, 1, 1, 1, 1],
    [1, 1, 1, 1, 9],
    [3, 1, 4, 1, 5, 9, 2, 6, 5, 3],
    [7],
]


def keys(degree: int, schedule: str = "1F1B", **more) -> Parallelism:
    values = {
        "pipeline_parallel_degree": degree,
        "pipeline_parallel_schedule": schedule,
        "pipeline_parallel_layers_per_stage": None,
        "module_fqns_per_model_part": None,
    }
    return Parallelism(**{**values, **more})


@pytest.mark.parametrize("costs", COSTS)
def test_no_other_cut_has_a_cheaper_bottleneck(costs):
    for parts in range(1, len(costs) + 1):
        every = [[*cuts, len(costs)] for cuts in combinations(range(1, len(costs)), parts - 1)]

        def judged(ends):
            parts = zip([0, *ends], ends, strict=False)
            return sorted((sum(costs[begin:end]) for begin, end in parts), reverse=True)

        ends = balanced(costs, parts)
        assert ends in every
        assert judged(ends) == min(map(judged, every))


@pytest.mark.parametrize("schedule", [s.name for s in SCHEDULES.values()])
@pytest.mark.parametrize("degree", [2, 4, 8])
def test_flux_is_cut_whole_and_in_order(schedule, degree):
    split = split_model(keys(degree, schedule), DEV, ImageSize(256, 256), 512)
    assert [name for part in split for name in part] == module_names(DEV)
    several = SCHEDULES[schedule.lower()].several
    assert len(split) == degree * (2 if several else 1)
    blocks = [sum("_blocks." in name for name in part) for part in split]
    assert max(blocks) - min(blocks) <= 1
    assert sorted(
        stage
        for rank in range(degree)
        for stage in SCHEDULES[schedule.lower()].stages_of(rank, degree, len(split))
    ) == list(range(len(split)))


def test_embedders_are_counted():
    """8 pixels and 4096 text features: embedding costs more than a block."""
    args = replace(FLAVORS["flux-tiny"], context_in_dim=40_960, depth=4, depth_single_blocks=4)
    split = split_model(keys(2), args, ImageSize(64, 64), 512)
    assert len(split[0]) - 4 < 4 < len(split[1]) - 1


def test_layers_per_stage_makes_the_stages():
    split = split_model(
        keys(4, "Interleaved1F1B", pipeline_parallel_layers_per_stage=5), DEV,
        ImageSize(256, 256), 512,
    )  # fmt: skip
    assert len(split) == 12


EMBED = ["img_in", "txt_in", "time_in", "vector_in"]
NAMED = [[*EMBED, "double_blocks.0", "double_blocks.1"],
         ["single_blocks.0", "single_blocks.1", "final_layer"]]  # fmt: skip


def test_named_parts_are_taken():
    split = split_model(
        keys(2, module_fqns_per_model_part=NAMED), FLAVORS["flux-tiny"], ImageSize(64, 64), 32
    )
    assert split == NAMED


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([NAMED[0], ["single_blocks.0", "final_layer"]], "misses single_blocks.1"),
        ([NAMED[0], [*NAMED[1], "tok_embeddings"]], "does not know tok_embeddings"),
        ([NAMED[0], ["single_blocks.0", *NAMED[1]]], "names twice single_blocks.0"),
        ([["img_in", "double_blocks.0", "double_blocks.1"], [*EMBED[1:], *NAMED[1]]],
         "txt_in, time_in, vector_in must be in the first part"),
        ([NAMED[0], ["single_blocks.1", "single_blocks.0", "final_layer"]],
         "single_blocks.1 stands where single_blocks.0 runs"),
        ([EMBED, [*NAMED[0][4:], *NAMED[1]]], "part 0 has no block"),
        ([*NAMED, []], "makes 3 stages of 4 blocks"),
    ],
)  # fmt: skip
def test_named_parts_that_are_not_the_model_are_refused(parts, said):
    args, size = FLAVORS["flux-tiny"], ImageSize(64, 64)
    with pytest.raises(ValueError, match=rf"parallelism\.module_fqns_per_model_part.*{said}"):
        split_model(keys(2, module_fqns_per_model_part=parts), args, size, 32)


P = "--parallelism.pipeline_parallel_"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((P + "schedule", "DualPipe"), "schedule = \"DualPipe\": is not available"),
        ((P + "schedule_csv", "a.csv"), "schedules are not read"),
        ((P + "first_stage_less_layers", "2"), "first_stage_less_layers = 2"),
        ((P + "microbatch_size", "3"), "does not divide training.local_batch_size = 4"),
        ((P + "microbatch_size", "4"), "'1F1B' needs 2 or more"),
        ((P + "schedule", "Interleaved1F1B", "--training.local_batch_size", "5"),
         "needs a multiple of 2"),
        ((P + "layers_per_stage", "1"), "layers_per_stage = 1: makes 4 stages of 4 blocks"),
        ((P + "schedule", "ZBVZeroBubble", P + "layers_per_stage", "2"), "needs two for each"),
        ((P + "schedule", "ZBVZeroBubble", P + "degree", "4"), "needs a block for each"),
        ((P + "schedule", "ZBVZeroBubble", "--compile.enable"), "set compile.enable = false"),
        ((P + "schedule", "InterleavedZeroBubble", "--activation_checkpoint.mode", "selective",
          "--activation_checkpoint.selective_ac_option", "op"),
         'activation_checkpoint.selective_ac_option = "op"'),
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
