"""Small tensors that are made once on each device."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Table:
    """What `make` returns for a device, kept there until it is forgotten; a decorator."""

    def __init__(self, make: Callable[[torch.device], torch.Tensor]) -> None:
        self._make = make
        self._kept: dict[torch.device, torch.Tensor] = {}
        self.__doc__ = make.__doc__

    def __call__(self, device: torch.device) -> torch.Tensor:
        if device not in self._kept:
            self._kept[device] = self._make(device)
        return self._kept[device]

    def forget(self, device: torch.device) -> None:
        """Drop that of a device, so that the next use makes it again."""
        self._kept.pop(device, None)
