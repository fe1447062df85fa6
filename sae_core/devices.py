"""Which device to compute on."""

import torch


def torch_device(device: str) -> str:
    """The device by its name; `auto` takes a CUDA device when there is one."""
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
