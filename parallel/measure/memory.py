"""Memory: the peak of live tensor storages during a step, and what they were."""

import contextlib
import gc
import itertools
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from parallel.measure.record import CATEGORIES
from parallel.measure.traffic import tensors_in
from parallel.mesh import local_part
from parallel.torch_private import shapes_apart, wrapped_storages

WRAPPERS = (DTensor, AsyncCollectiveTensor)  # their operators work on the tensors inside, which hold the memory

# A thread of gloo's keeps a message for a moment after it was waited for. Without time to let go of it, one step in ten
# has a peak that is too high by a message. The step that is tracked is not one of those that are timed.
LETTING_GO_SECONDS = 0.0002


class _Storage(weakref.ref[torch.UntypedStorage]):
    """Memory that tensors share, held weakly: its size now, and what it is."""

    category: str
    key: int
    nbytes: int


class MemoryTracker(TorchDispatchMode):
    """Follows the tensor storages of this rank on `device`, from entry to exit, and finds the peak of their bytes.

        with MemoryTracker(parameters, optimizer, device=device) as tracker:
            ...  # a step
        tracker.peak()  # {"peak_bytes": ..., "parameters_bytes": ..., ...}

    A storage belongs to one part of docs/measures.md for the whole of its life. It is of the parameters, gradients or
    optimizer if it is found there at entry, when the optimizer steps, or at exit. Else it is other if it is older than
    the region, made while the optimizer steps, resized by hand as FSDP does, or seen where FSDP copies, a gradient is
    added into .grad or a message arrives in place; and if none of these, of the activations. Where a pipeline splits
    backward, those are also gradients of weights not yet added.

    A storage older than the region is counted from entry on if it belongs to a parameter, a gradient or the optimizer,
    or if an operator of the region uses it; others are nobody's business here.

    holds: more of what belongs to a category, by its name (an engine's copies in other types, or of parts).

    Works on real tensors and on FakeTensors, with the same figures. Enter it after a FakeTensorMode.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        optimizer: torch.optim.Optimizer | None,
        *,
        device: torch.device,
        holds: Callable[[], Mapping[str, Sequence[Tensor]]] = dict,
    ) -> None:
        super().__init__()
        self._holds = holds
        self._parameters, self._optimizer, self._device = list(parameters), optimizer, device
        self._live: dict[int, _Storage] = {}
        self._freed: deque[_Storage] = deque()  # a storage may die on any thread, and append is atomic
        self._at_entry: list[tuple[_Storage, int]] = []
        self._changes: list[tuple[_Storage, int]] = []  # in time: bytes that a storage gained or lost
        self._watching = contextlib.ExitStack()
        self._on_gloo = dist.is_initialized() and dist.get_backend() == "gloo"
        self._after_message = False

    def peak(self) -> dict[str, int]:
        """peak_bytes, and parameters_bytes, gradients_bytes, ... at the moment of the first peak. After exit."""
        at_entry = sum(nbytes for _, nbytes in self._at_entry)
        totals = [*itertools.accumulate((nbytes for _, nbytes in self._changes), initial=at_entry)]
        n_changes = totals.index(max(totals))
        split = dict.fromkeys(CATEGORIES, 0)
        for storage, nbytes in (*self._at_entry, *self._changes[:n_changes]):
            split[storage.category] += nbytes
        return {"peak_bytes": totals[n_changes]} | {f"{category}_bytes": nbytes for category, nbytes in split.items()}

    def __enter__(self) -> "MemoryTracker":
        self._older = weakref.WeakSet(_storages_of_python())
        self._identify()
        if self._optimizer is not None:
            before = self._optimizer.register_step_pre_hook(lambda *_: self._identify(made="other"))
            after = self._optimizer.register_step_post_hook(lambda *_: self._identify())
            self._watching.callback(before.remove)
            self._watching.callback(after.remove)
        self._watching.enter_context(wrapped_storages(self._resizing))
        self._of_shapes = self._watching.enter_context(shapes_apart())
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._watching.close()
        self._identify()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, WRAPPERS) for kind in types):
            return NotImplemented
        if func is torch.ops.prim.device.default:
            return func(*args)  # of a FakeTensor autograd asks it, to check gradients; it allocates nothing
        if func is torch.ops._c10d_functional.wait_tensor.default and isinstance(args[0], FakeTensor):
            return args[0]  # on FakeTensors it would make a new one; on real ones it gives back what it was given
        kwargs = kwargs or {}
        if self._after_message:
            time.sleep(LETTING_GO_SECONDS)
        self._after_message = self._on_gloo and func.namespace in ("c10d", "_c10d_functional")
        result = func(*args, **kwargs)
        if self._of_shapes():
            return result
        self._bury()
        # torch.tensor makes its storage out of sight, and then shows it to lift_fresh.
        made = func in (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default)
        inputs = [self._see(tensor, made=made) for tensor in tensors_in((args, kwargs))]
        outputs = [self._see(tensor, made=True) for tensor in tensors_in(result)]
        node = torch._C._current_autograd_node()
        if func.namespace == "fsdp" or (node is not None and node.name() == "torch::autograd::AccumulateGrad"):
            _make_other([*inputs, *outputs])
        elif func.namespace == "c10d" and func._opname != "send":
            _make_other(inputs)
        return result

    # ---- storages and what they are ----

    def _see(self, tensor: Tensor, *, made: bool) -> _Storage | None:
        """Notes the storage of `tensor`, and its size if that has changed. None if it is not one to follow.

        made: if it is not known, it was made just now. Else, if it is not older than the region either, it belongs to
        the communication library, which lets operators work on it.
        """
        if tensor.device.type != self._device.type or tensor.layout != torch.strided or isinstance(tensor, WRAPPERS):
            return None
        storage = tensor.untyped_storage()
        known = self._live.get(storage._cdata)
        if known is None:
            known = self._add(storage, self._made if made else "foreign", existed=storage in self._older)
        self._set_size(known, storage.nbytes())
        return known

    def _add(self, storage: torch.UntypedStorage, category: str, *, existed: bool) -> _Storage:
        new = _Storage(storage, self._freed.append)
        new.key, new.nbytes, new.category = storage._cdata, 0, category
        self._live[new.key] = new
        if existed:
            new.nbytes, new.category = storage.nbytes(), "other"
            self._at_entry.append((new, new.nbytes))
        return new

    def _set_size(self, storage: _Storage, nbytes: int) -> None:
        if nbytes != storage.nbytes and storage.category != "foreign":
            self._changes.append((storage, nbytes - storage.nbytes))
            storage.nbytes = nbytes

    def _bury(self) -> None:
        """Takes the bytes of storages that died since the last call off the account."""
        while self._freed:
            storage = self._freed.popleft()
            self._set_size(storage, 0)
            del self._live[storage.key]

    @torch.no_grad()  # then a DTensor's local part is its own, not a view that an operator makes
    def _identify(self, made: str = "activations") -> None:
        """Finds the category of what has one for good. made: that of what is made from here on, until it shows."""
        self._made = made
        self._bury()
        states = self._optimizer.state.values() if self._optimizer is not None else ()
        tensors: dict[str, Sequence[Tensor]] = {
            "parameters": self._parameters,
            "gradients": [parameter.grad for parameter in self._parameters if parameter.grad is not None],
            "optimizer": [value for state in states for value in state.values() if isinstance(value, Tensor)],
        }
        for category, members in (*tensors.items(), *self._holds().items()):
            for tensor in members:
                storage = self._see(local_part(tensor), made=True)
                if storage is not None:
                    storage.category = category

    # ---- what no dispatch mode sees ----

    def _resizing(self, resize_: Callable[..., Any]) -> Callable[..., Any]:
        def resize(storage: torch.UntypedStorage, nbytes: int) -> Any:
            self._bury()
            known = self._live.get(storage._cdata) or self._add(storage, "other", existed=True)
            result = resize_(storage, nbytes)
            self._set_size(known, storage.nbytes())
            _make_other([known])
            return result

        return resize


def _make_other(storages: Sequence[_Storage | None]) -> None:
    for storage in storages:
        if storage is not None and storage.category == "activations":
            storage.category = "other"


def _storages_of_python() -> Iterator[torch.UntypedStorage]:
    """The storages of all tensors that Python objects hold: those of DTensors are their local parts'."""
    for thing in gc.get_objects():
        is_tensor = issubclass(type(thing), Tensor) and not is_traceable_wrapper_subclass(thing)
        if is_tensor and thing.layout == torch.strided and thing.device.type != "meta":
            yield thing.untyped_storage()


def reset_allocator_peaks(device: torch.device) -> None:
    """Makes `allocator_peaks` speak of what comes from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def allocator_peaks(device: torch.device) -> dict[str, int | None]:
    """The CUDA allocator's own peaks since `reset_allocator_peaks`; null on a CPU, which has no such allocator.

    allocator_peak_bytes: held by tensors, each rounded up to 512 bytes, and by workspaces inside kernels.
    allocator_reserved_peak_bytes: taken from the device: that, and what fragmentation leaves unused.
    """
    cuda = device.type == "cuda"
    return {
        "allocator_peak_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "allocator_reserved_peak_bytes": torch.cuda.max_memory_reserved(device) if cuda else None,
    }
