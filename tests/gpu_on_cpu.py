"""A GPU for machines without one: code that asks for `cuda` runs, on the CPU, under the rules of a GPU.

A tensor that is created on `cuda` or sent there is an `OnGpu`: it says that it is on `cuda:0`, it has no `numpy()`, and an
operation on it and on a tensor of the CPU raises RuntimeError, as on a GPU. Triton kernels run in Triton's interpreter, NCCL
is replaced by gloo, and what a GPU measures by the clock and the memory of this process. So every line for GPUs runs, but
nothing is asynchronous, and no time means anything.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch._tensor import _convert
from torch.overrides import TorchFunctionMode, get_default_nowrap_functions
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
GETTERS = {
    torch.Tensor.device.__get__: (GPU, "device"),
    torch.Tensor.is_cuda.__get__: (True, "is_cuda"),
    torch.Tensor.is_cpu.__get__: (False, "is_cpu"),
}
"""What an OnGpu answers."""
MIXES = frozenset(
    "copy_ set_ __setitem__ __getitem__ _has_compatible_shallow_copy_type _set_grad is_same_size __set__".split()  # noqa: SIM905
)
"""Operations that take tensors of several devices."""
WAITS = frozenset(["item", "cpu", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "equal", "allclose"])
"""Operations after which a CPU has waited for a GPU."""


class OnGpu(torch.Tensor):
    """A tensor in the memory of the GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch; what it returns is on the GPU, too."""
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        return found if func in get_default_nowrap_functions() else _convert(found, OnGpu)

    def __deepcopy__(self, memo: dict[int, Any]) -> OnGpu:
        """Return a copy with a memory of its own."""
        copy = self.as_subclass(torch.Tensor).detach().clone()
        made: OnGpu = torch.Tensor._make_subclass(type(self), copy, self.requires_grad)
        return memo.setdefault(id(self), made)


class ParameterOnGpu(OnGpu, torch.nn.Parameter):
    """A parameter in the memory of the GPU."""


class Gpu(TorchFunctionMode):
    """What torch does while a GPU is there."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0
        """How often the CPU has waited for the GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_gpu = any(isinstance(tensor, OnGpu) for tensor in tensors)
        name = getattr(func, "__name__", "")
        if func in GETTERS and on_gpu:
            return GETTERS[func][0]
        if name in ("numpy", "__array__") and on_gpu:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")
        self.waits += on_gpu and name in WAITS
        if name == "pin_memory":
            assert not on_gpu, "cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned"
            return args[0].clone()
        if func == torch.Tensor.grad.__get__ and on_gpu:
            found = func(*args)
            if type(found) is torch.Tensor:  # made by the engine
                found.__class__ = OnGpu
            return found
        if name == "backward":  # its hooks run with this mode: see `gpu`
            args, kwargs = tree_map_only(OnGpu, lambda tensor: tensor.as_subclass(torch.Tensor), (args, kwargs))
            return func(*args, **kwargs)
        if name in ("cpu", "cuda"):
            return sent(args[0], GPU if name == "cuda" else torch.device("cpu"))
        if name == "to":
            return self._to(*args, **kwargs)
        if func == torch.Tensor.data.__set__ and isinstance(args[1], OnGpu):
            func(*args)
            args[0].__class__ = ParameterOnGpu if isinstance(args[0], torch.nn.Parameter) else OnGpu
            return None
        if kwargs.get("device") is not None:
            return self._made(func, args, kwargs)
        inside_backward = torch._C._current_graph_task_id() != -1  # what the engine makes has no class
        strict = on_gpu and name not in MIXES and not inside_backward
        if strict and any(tensor.dim() and not isinstance(tensor, OnGpu) for tensor in tensors):
            raise RuntimeError(f"Expected all tensors to be on the same device, found cuda:0 and cpu, in {name}")
        return func(*args, **kwargs)

    def _to(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run `Tensor.to`."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(
            *(arg.dtype if isinstance(arg, torch.Tensor) else arg for arg in args if not isinstance(arg, OnGpu)),
            **{key: value for key, value in kwargs.items() if key in ("device", "dtype", "non_blocking")},
        )
        if any(isinstance(arg, OnGpu) for arg in args):
            device = GPU
        if device is not None and device.type == "cpu" and isinstance(tensor, OnGpu):
            assert not non_blocking, "A copy to the CPU that nobody waits for"
            self.waits += 1
        found = tensor if device is None else sent(tensor, device)
        return found if dtype is None or dtype == found.dtype else found.to(dtype)

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a function that makes a tensor on a device."""
        device = torch.device(kwargs.pop("device"))
        if device.type == "meta":
            return func(*args, **kwargs, device=device)
        found = func(*args, **kwargs, device="cpu")
        grad = kwargs.get("requires_grad", False)
        return torch.Tensor._make_subclass(OnGpu if device.type == "cuda" else torch.Tensor, found.detach(), grad)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device: itself if it is there, otherwise a copy."""
    here = isinstance(tensor, OnGpu)
    if here == (device.type == "cuda") or device.type == "meta":
        return tensor if device.type != "meta" else tensor.to("meta")
    copy = tensor.as_subclass(torch.Tensor).clone()
    return copy.as_subclass(OnGpu) if device.type == "cuda" else copy


class Autocast(torch.autocast):
    """Passes in bfloat16, which are those of the CPU."""

    def __init__(self, device_type: str, *arguments: Any, **options: Any) -> None:
        super().__init__(device_type.replace("cuda", "cpu"), *arguments, **options)


class Event:
    """An event in the work of the GPU."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        """Happen now."""
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        """Wait until it has happened."""
        assert self.at

    def elapsed_time(self, end: Event) -> float:
        """Return the milliseconds until another event."""
        return 1000 * (end.at - self.at)


def peak_bytes() -> int:
    """Return the most memory that this process has taken."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def gpu() -> Iterator[Gpu]:
    """Let this process have a GPU."""
    mode, submit, init = Gpu(), ThreadPoolExecutor.submit, dist.init_process_group
    engine = torch.autograd._engine_run_backward

    def submitted(pool: ThreadPoolExecutor, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def with_gpu() -> Any:
            with mode:  # a mode is that of one thread
                return work(*args, **kwargs)

        return submit(pool, with_gpu)

    def joined(backend: str, **options: Any) -> None:
        assert backend == "cpu:gloo,cuda:nccl"
        init("gloo", **options)

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return engine(*args, **kwargs)

    properties = SimpleNamespace(total_memory=8 << 30, name="CPU that stands in for a GPU", multi_processor_count=1)
    with contextlib.ExitStack() as stack:
        for name, value in {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 1,
            "synchronize": lambda *_: None,
            "empty_cache": lambda: None,
            "is_bf16_supported": lambda **_: True,
            "reset_peak_memory_stats": lambda *_: None,
            "max_memory_allocated": lambda *_: peak_bytes(),
            "get_device_name": lambda *_: properties.name,
            "get_device_properties": lambda *_: properties,
            "Event": Event,
        }.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # newer, older
            if hasattr(torch.optim.Optimizer, name):
                stack.enter_context(patch.object(torch.optim.Optimizer, name, lambda _: None))
        stack.enter_context(patch.object(ThreadPoolExecutor, "submit", submitted))
        stack.enter_context(patch.object(torch.autograd, "_engine_run_backward", run_backward))
        checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns  # what autograd keeps has no class
        stack.enter_context(patch.dict(checks, {"default": lambda tensor: {"shape": tensor.shape, "dtype": tensor.dtype}}))
        stack.enter_context(patch.object(dist, "init_process_group", joined))
        stack.enter_context(patch.object(torch, "autocast", Autocast))
        stack.enter_context(mode)
        yield mode
