"""A run of weeks must not grow."""

import re

import pytest
from programs import run_program


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "mode"), [("1", "disabled"), ("2", "async")])
def test_memory_does_not_grow(ranks, mode):
    """Processes of their own: a forked one inherits the memory of the tests before it."""
    output = run_program("-m", "torch.distributed.run", "--nproc-per-node", ranks,
                         "benchmarks/memory.py", "--async-mode", mode)  # fmt: skip
    found = re.findall(r"after step (\d+), .* after step (\d+): ([+-][\d.]+) %", output)
    print(output[-400:])
    assert len(found) == int(ranks)
    for second, last, growth in found:
        assert int(last) - int(second) >= 300
        assert float(growth) < 3
