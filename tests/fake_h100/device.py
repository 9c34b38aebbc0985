"""A CUDA device that is not there: tensors on it have shapes and no values."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.fake_h100.record import Collective, Copy, Record, Sync

aten = torch.ops.aten

# The values of a tensor on the device, where what reads them needs others than zeros.
Reads = Callable[[Tensor], Tensor | None]


class FakeH100(TorchDispatchMode):
    """Within it tensors on CUDA are fakes, those on the CPU are real as ever.

    For a process that was started with ``driver.environment``. Kernels are checked as far as their
    shapes, dtypes and devices go. Process groups must be of the backend "fake".

    Args:
        reads: what is found when values are fetched; zeros when None.
    """

    def __init__(self, reads: Reads = lambda tensor: None) -> None:
        super().__init__()
        self._reads = reads
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._record = Record()
        self._stand_ins = ExitStack()

    def record(self, function: Callable[[], Any]) -> Record:
        """What ``function()`` does on the device; called within the mode."""
        before, self._record = self._record, Record()
        try:
            function()
            return self._record
        finally:
            self._record = before

    def launched(self, name: str) -> None:
        """Note a kernel that no operator stands for."""
        self._record.kernels.append(name)

    @contextmanager
    def one_kernel(self, name: str) -> Iterator[None]:
        """Whatever runs within is one kernel."""
        num_before = len(self._record.kernels)
        yield
        self._record.kernels[num_before:] = [name]

    def __enter__(self) -> FakeH100:
        for owner, name in (
            (torch.cuda, "synchronize"),
            (torch.cuda.Stream, "synchronize"),
            (torch.cuda.Event, "synchronize"),
        ):
            self._replace(owner, name, self._waits(f"{owner.__name__}.{name}", owner, name))
        self._replace(FakeTensor, "tolist", lambda x: self._fetch(x, "tolist", True).tolist())
        self._replace(torch.nn.Module, "_apply", _apply)
        for kernel_type in _triton_kernels():
            self._replace(kernel_type, "run", _launch)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stand_ins.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        leaves = tree_leaves((args, kwargs))
        if not any(_is_cuda(leaf) for leaf in leaves):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self._fetch(args[0], "item", True).item()
        is_copy = func in (aten._to_copy.default, aten.copy_.default)
        waits = not is_copy or not _argument(func, "non_blocking", args, kwargs)
        if func is aten.copy_.default and not _is_cuda(args[0]):
            return args[0].copy_(self._fetch(args[1], str(func), waits))
        # A number of the host travels as argument of a kernel, unless it is what is copied.
        sent = [x for x in leaves if isinstance(x, Tensor) and not _is_cuda(x)]
        sent = [x for x in sent if x.dim() or is_copy]
        if func is aten.lift_fresh.default and not isinstance(args[0], FakeTensor):
            # Made of Python's numbers, and copied below the dispatcher.
            sent = [args[0]]
        _check_dtypes(func, args)
        with self._fakes:
            out = func(*args, **kwargs)
        if is_copy and not _is_cuda(out):
            return self._fetch(args[0], str(func), waits).to(out.dtype)
        for tensor in sent:
            self._send(tensor, str(func), waits)
        if not (sent and is_copy) and not func.is_view and func not in _WITHOUT_KERNEL:
            self.launched(str(func))
        return out

    def _send(self, tensor: Tensor, what: str, waits: bool) -> None:
        if tensor.numel():
            is_pinned = not _is_cuda(tensor) and tensor.is_pinned()
            self._note_copy(tensor, what, waits, is_to_device=True, is_pinned=is_pinned)

    def _fetch(self, tensor: Tensor, what: str, waits: bool) -> Tensor:
        """Values of a fake, on the host."""
        self._note_copy(tensor, what, waits, is_to_device=False, is_pinned=False)
        values = self._reads(tensor)
        if values is None:
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        return values.to(tensor.dtype).reshape(tensor.shape)

    def _note_copy(
        self, tensor: Tensor, what: str, waits: bool, *, is_to_device: bool, is_pinned: bool
    ) -> None:
        place, num_bytes = _place(), tensor.numel() * tensor.element_size()
        copy = Copy(what, num_bytes, is_to_device, is_pinned, waits, place)
        self._record.copies.append(copy)
        if waits:
            self._record.syncs.append(Sync(what, place))

    def _collective(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        leaves = tree_leaves((args, kwargs))
        group = next(g for g in map(_as_group, leaves) if g is not None)
        name = func._schema.name.partition("::")[2].strip("_").removesuffix("_base")
        # Those that have both name their outputs first.
        given = [x for x in leaves if isinstance(x, Tensor)][-1]
        self._record.collectives.append(
            Collective(
                _NAMES.get(name, name),
                group.group_desc,
                group.size(),
                tuple(given.shape),
                given.dtype,
                _place(),
            )
        )
        # The group sends nothing, but looks at sizes.
        args, kwargs = tree_map_only(
            Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype), (args, kwargs)
        )
        return func(*args, **kwargs)

    def _waits(self, what: str, owner: Any, name: str) -> Callable[..., Any]:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._record.syncs.append(Sync(what, _place()))
            return original(*args, **kwargs)

        return call

    def _replace(self, owner: Any, name: str, stand_in: Any) -> None:
        self._stand_ins.enter_context(mock.patch.object(owner, name, stand_in))


def active() -> FakeH100 | None:
    """The device of the running code."""
    modes = _get_current_dispatch_mode_stack()
    return next((mode for mode in modes if isinstance(mode, FakeH100)), None)


@contextmanager
def compiled_is_one_kernel() -> Iterator[None]:
    """Within, whatever is given to ``torch.compile`` runs as it is, and counts as one kernel."""

    def compiled(function: Any = None, **settings: Any) -> Any:
        if function is None:
            return compiled

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            device = active()
            if device is None:
                return function(*args, **kwargs)
            with device.one_kernel(f"compiled.{function.__name__}"):
                return function(*args, **kwargs)

        return call

    with mock.patch.object(torch, "compile", compiled):
        yield


def _launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """``run`` of a Triton kernel: it gets what it names, and tensors of the device."""
    device = active()
    assert device is not None and not warmup
    own = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    bound = kernel.signature.bind(*args, **own) if hasattr(kernel, "signature") else None
    given = args if bound is None else tuple(bound.arguments.values())
    assert all(_is_cuda(x) for x in given if isinstance(x, Tensor)), kernel
    device.launched(f"triton.{kernel.base_fn.__name__ if bound is None else kernel.fn.__name__}")


def _triton_kernels() -> list[Any]:
    try:
        from triton.runtime import Autotuner, JITFunction
    except ImportError:
        return []
    return [Autotuner, JITFunction]


def _apply(module: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
    """``Module._apply``: no parameter can go from the CPU to a fake and stay the same object."""
    moved: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is None:
                continue
            data = function(parameter.data)
            new = torch.nn.Parameter(data, requires_grad=parameter.requires_grad)
            new.__dict__.update(parameter.__dict__)
            owner._parameters[name] = moved[parameter] = new
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                owner._buffers[name] = function(buffer)
    # What a module keeps beside its parameters may name them, too.
    for owner in module.modules():
        for held in vars(owner).values():
            if type(held).__module__.startswith("megatron."):
                for name, value in vars(held).items():
                    if isinstance(value, torch.nn.Parameter):
                        setattr(held, name, moved.get(value, value))
    return module


def _check_dtypes(func: Any, args: Sequence[Any]) -> None:
    """Refuse matrices of two dtypes, as a device does and fakes do not."""
    if func.overloadpacket in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
        left, right = [x for x in args if isinstance(x, Tensor)][-2:]
        if left.dtype != right.dtype:
            raise RuntimeError(f"{func} of {left.dtype} and {right.dtype}, at {_place()}")


def _is_cuda(leaf: Any) -> bool:
    device = leaf.device if isinstance(leaf, Tensor) else leaf
    return isinstance(device, torch.device) and device.type == "cuda"


def _as_group(leaf: Any) -> dist.ProcessGroup | None:
    is_group = isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type())
    return dist.ProcessGroup.unbox(leaf) if is_group else None


def _argument(func: Any, name: str, args: tuple[Any, ...], kwargs: Any) -> Any:
    place = [argument.name for argument in func._schema.arguments].index(name)
    return args[place] if len(args) > place else kwargs.get(name)


def _place() -> str:
    """Up to three lines of this project and of Megatron-Core, innermost first."""
    lines = []
    for frame in reversed(traceback.extract_stack(limit=60)):
        path = frame.filename
        begin = max(path.rfind("/megatron_pg/"), path.rfind("/megatron/core/"))
        if begin >= 0:
            lines.append(f"{path[begin + 1 :]}:{frame.lineno}")
    return " < ".join(lines[:3])


# As ``torch.distributed`` has them.
_NAMES = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "alltoall": "all_to_all",
}
_WITHOUT_KERNEL = {
    aten._unsafe_view.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.lift_fresh.default,
    aten.record_stream.default,
    aten.set_.source_Tensor,
    torch.ops.prim.device.default,
}
