"""Parts of one forward pass that do not wait for each other, side by side on the CPU.

A pyramid is made of small matrix products, and two threads that share such a product win little: 65 tokens through a layer of
768 x 3072 take nearly as long on two threads as on one. So two lanes with half of torch's threads each take whole parts instead. What
comes out is equal, bit for bit, to the parts one after another on half of the threads.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mmkit.adapters.context import current_context


def can_part(model: nn.Module, x: Tensor) -> bool:
    """Whether lanes are free of side effects: no gradients, no dropout, nothing that is known to the calling thread only."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or x.device.type != "cpu"
        or torch.get_num_threads() < 2
        or current_context() is not None  # adapters read it
        or torch.is_autocast_enabled("cpu")
        or torch.jit.is_tracing()
        or is_in_torch_dispatch_mode()
        or torch._C._len_torch_function_stack()
        or any(module.training for module in model.modules())
    )


def in_lanes(tasks: Sequence[tuple[set[int], Callable[[], Any]]]) -> None:
    """Make all calls, without gradients; those that touch a common part one after another, in their order.

    Args:
        tasks: numbers of the parts that a call touches, and the call.
    """
    waiting, busy, changed = list(tasks), set[int](), threading.Condition()
    inference = torch.is_inference_mode_enabled()

    def ready() -> tuple[set[int], Callable[[], Any]] | None:
        """The first call that touches no part of a call that is running or before it."""
        taken = set(busy)
        for task in waiting:
            if not taken & task[0]:
                return task
            taken |= task[0]
        return None

    def lane() -> None:
        parts = set[int]()
        try:
            while True:
                with changed:
                    busy.difference_update(parts)
                    changed.notify_all()
                    changed.wait_for(lambda: ready() or not waiting)
                    task = ready()
                    if task is None:
                        return
                    waiting.remove(task)
                    parts = task[0]
                    busy.update(parts)
                with torch.inference_mode(inference), torch.no_grad():
                    task[1]()
        finally:  # after an error the other lane begins nothing new
            with changed:
                waiting.clear()
                changed.notify_all()

    pool = _pool(torch.get_num_threads())
    lanes = [pool.submit(lane), pool.submit(lane)]
    wait(lanes)  # also after an error: nothing goes on behind the caller's back
    for done in lanes:
        done.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Two lanes for a caller that has `threads`."""
    both = threading.Barrier(2)

    def begin() -> None:
        torch.get_num_threads()  # a thread's first question, even one of torch's own, sets it to what all threads begin with
        torch.set_num_threads(threads // 2)

    pool = ThreadPoolExecutor(2, "mmkit-piip", begin)
    list(pool.map(lambda _: both.wait(), range(2)))
    torch.set_num_threads(threads)  # what the lanes set is also what threads that come later begin with
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # the child has the pools but not their threads
