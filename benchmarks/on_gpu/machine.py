"""What the machine itself can do, and how long and how large a step is on it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

MATRIX = {"cuda": 8192, "cpu": 256}
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 22}  # several times any cache of a GPU
REPEATS = 10


@dataclass(frozen=True, slots=True)
class Machine:
    device: torch.device

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.is_cuda else "CPU"

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def seconds(self, step: Callable[[], object]) -> float:
        """From an idle device to an idle device: by the device's own events, so that waiting for the host counts and
        the host's way here does not."""
        if not self.is_cuda:
            began = time.perf_counter()
            step()
            return time.perf_counter() - began
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        began.record()
        step()
        ended.record()
        torch.cuda.synchronize(self.device)
        return began.elapsed_time(ended) / 1000.0

    def peak_bytes(self, step: Callable[[], object]) -> int | None:
        """Largest sum of tensors while `step` runs, weights included; None where torch does not count."""
        if not self.is_cuda:
            step()
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        step()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """Operations a second of large products of random matrices, now. Zeros draw less power and would be faster."""
        n = MATRIX[self.device.type]
        a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        return REPEATS * 2 * n**3 / self._repeated(lambda: torch.mm(a, b, out=out))

    def copy_rate(self) -> float:
        """Bytes a second, read and written ones counted, of a large copy on the device, now."""
        a = torch.ones(COPY_BYTES[self.device.type], dtype=torch.uint8, device=self.device)
        b = torch.empty_like(a)
        return REPEATS * 2 * a.numel() / self._repeated(lambda: b.copy_(a))

    def _repeated(self, what: Callable[[], object]) -> float:
        for _ in range(3):
            what()

        def all_of_them() -> None:
            for _ in range(REPEATS):
                what()

        return self.seconds(all_of_them)

    def forget(self) -> None:
        """Give back what is no longer referenced, so that one case cannot crowd out the next."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
