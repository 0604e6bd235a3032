"""Between host and device without waiting: through pinned memory, in the order of the stream."""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device`; a GPU copies it while the host goes on.

    From ordinary memory the host would wait for everything that the GPU has still to do.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory() if tensor.device.type == "cpu" else tensor
    return tensor.to(device, non_blocking=True)


class Returning:
    """Numbers on their way from a device to the host, sent off when this is made; `values` of one
    dimension are not to be changed afterwards."""

    def __init__(self, values: Tensor):
        self._values, self._arrived = values, None
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """The numbers, once they are here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()
