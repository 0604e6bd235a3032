"""What libraries print of their own accord, and why we do not pass it on."""

import logging
import warnings


def quieten_libraries() -> None:
    """Called by the entry points. torchtitan logs through the root logger, as others then do."""
    for name in ("httpx", "transformers", "torch.distributed.checkpoint", "PIL"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # FSDP2 warns that an in-place operation on a linear's output would skip its hooks; none is
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
