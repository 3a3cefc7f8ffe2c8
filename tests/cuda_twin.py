"""A CUDA device for machines without one.

    with cuda_twin() as record:
        x = torch.randn(4, device="cuda")
        x.sum().item()
    record.syncs        # Counter of (kind, place), a place being "file.py:line(function)" in dddm

Its tensors say cuda:0, hold their values on the CPU, and tell when the host waits for them. What it shows
of CUDA: which device a tensor is on; that tensors of two devices do not mix; where the host waits (a sync);
where values travel (a transfer); which operations autocast runs in bfloat16. What it does not show: time,
memory, kernels, several devices, the order of streams, and how CUDA rounds. Values and random numbers are
the CPU's.

A tensor of the device is a `Twin`: a wrapper that torch takes for one of the meta device, around a CPU
tensor with the values. Two modes see every call while the context is open. `Calls` sees it as it is
written: it puts meta in the place of cuda, and does what autocast does. `Operations` sees the operation
below autograd: it checks devices, counts, and runs the operation on the values. So the meta device itself
cannot be used inside.
"""

import contextlib
import copy
import functools
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import safetensors.torch
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dddm

CUDA, CPU, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")
LIBRARY = str(Path(dddm.__file__).parent)
REAL_GENERATOR = torch.Generator


# ---- the record


class Record:
    """What happened on the device since the start or the last `reset`.

    syncs: how often the host waited, a Counter of (kind, place). Kinds: "item" (item(), bool(), float() of
    a tensor); an operation whose result has a size that only the device knows ("nonzero",
    "masked_select", "_unique2", …); "mask index"; "index copy" (a CPU tensor as index); "device to
    host" and "host to device" (a copy without non_blocking); "synchronize". transfers: all copies, a
    Counter of (direction, place).
    """

    def __init__(self):
        self.syncs, self.transfers = Counter(), Counter()

    def reset(self) -> None:
        self.syncs.clear()
        self.transfers.clear()

    def sync(self, kind: str) -> None:
        self.syncs[kind, place()] += 1

    def transfer(self, direction: str, blocking: bool) -> None:
        self.transfers[direction, place()] += 1
        if blocking:
            self.sync(direction)


def table(syncs: Counter) -> str:
    "The syncs of a record as text, the most frequent first."
    return "\n".join(f"{count:5d} x {kind:15s} {where}" for (kind, where), count in syncs.most_common())


def place() -> str:
    'The innermost line of dddm that is running, as file.py:line(function); "outside" where there is none.'
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(LIBRARY):
        frame = frame.f_back
    if frame is None:
        return "outside"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}({frame.f_code.co_name})"


# ---- tensors


class Twin(torch.Tensor):
    "A tensor of the simulated device; `values` is the CPU tensor that it stands for."

    @staticmethod
    def __new__(cls, values):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=META,
        )
        self.values = values
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if not OPEN:
            raise RuntimeError("a tensor of the simulated CUDA device is used outside its cuda_twin()")
        return run(OPEN[0], func, args, kwargs or {})

    # nn.Module moves tensors that can be taken apart in place: a parameter stays the same object, as on CUDA
    def __tensor_flatten__(self):
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Twin(inner["values"])

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def get_device(self):
        return 0

    def __repr__(self):
        return f"Twin({tuple(self.shape)}, {self.dtype})"

    def data_ptr(self):
        return self.values.data_ptr()

    def untyped_storage(self):
        return self.values.untyped_storage()

    def is_pinned(self, *args):
        return False

    def record_stream(self, stream):
        pass

    def pin_memory(self, *args):
        raise RuntimeError("cannot pin a tensor of cuda:0, only dense CPU tensors can be pinned")

    def numpy(self, *args, **kwargs):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    __array__ = numpy

    def tolist(self):
        return self.item() if self.ndim == 0 else self.cpu().tolist()

    def __deepcopy__(self, memo):
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("Only Tensors created explicitly by the user support the deepcopy protocol")
        out = as_kind(self.detach().clone(), self)
        memo[id(self)] = out
        if self.grad is not None:
            out.grad = copy.deepcopy(self.grad, memo)
        return out

    def __reduce_ex__(self, protocol):
        "As torch.save writes it: its values, copied to the host, with a storage that says cuda:0."
        OPEN[0].transfer("device to host", blocking=True)
        DEVICE_STORAGES.add(self.values.untyped_storage().data_ptr())
        return as_kind(self.values.detach(), self).__reduce_ex__(protocol)


OPEN = []  # the record of the open context
DEVICE_STORAGES = set()  # addresses of the storages that the current torch.save writes as cuda:0


def as_kind(x, model):
    "x as a parameter where `model` is one, with a gradient where it has one."
    if isinstance(model, nn.Parameter):
        return nn.Parameter(x, model.requires_grad)
    return x.requires_grad_(model.requires_grad)


def is_device(device) -> bool:
    "Whether a device, or its name, is the simulated one: cuda for callers, meta within torch."
    return (device if isinstance(device, torch.device) else torch.device(device)).type in ("cuda", "meta")


def tensors_in(x, found: list | None = None) -> list:
    "The tensors in lists, tuples and dicts; faster than torch's own search, which knows more kinds."
    found = [] if found is None else found
    if isinstance(x, torch.Tensor):
        found.append(x)
    elif isinstance(x, (list, tuple)):
        for item in x:
            tensors_in(item, found)
    elif isinstance(x, dict):
        for item in x.values():
            tensors_in(item, found)
    return found


def change(f, x):
    "The same lists, tuples and dicts with f(leaf) in the place of each leaf."
    if type(x) in (list, tuple):
        return type(x)([change(f, item) for item in x])
    if isinstance(x, tuple):
        return type(x)(*(change(f, item) for item in x))  # a named tuple
    if isinstance(x, dict):
        return type(x)((key, change(f, item)) for key, item in x.items())
    return f(x)


def values(x):
    return x.values if isinstance(x, Twin) else x


def wrap(x):
    return Twin(x) if isinstance(x, torch.Tensor) else x


# ---- operations, below autograd

SYNCING = frozenset(
    """
    nonzero masked_select _unique _unique2 unique_dim unique_consecutive equal bincount _linalg_eigh
    _linalg_svd _linalg_check_errors
""".split()
)
# a 0-dim CPU tensor mixes with elementwise operations alone
NO_SCALARS = frozenset(
    """
    cat stack index_select gather scatter embedding mm bmm addmm searchsorted
""".split()
)
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
FREE = {"lift_fresh", "_pin_memory", "is_pinned"}


@functools.cache
def facts(func) -> SimpleNamespace:
    """What `run` asks about an operation: its name, and whether it is made of other operations.

    written: for one that works in place or with out=, the (position, name) of the argument of each result.
    """
    schema, written = func._schema, []
    for result in schema.returns:
        if not (result.alias_info and result.alias_info.is_write):
            continue
        for i, argument in enumerate(schema.arguments):
            if argument.alias_info and argument.alias_info.before_set == result.alias_info.before_set:
                written.append((i, argument.name))
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return SimpleNamespace(
        name=schema.name.removeprefix("aten::"),
        overload=schema.overload_name,
        written=written,
        composite=composite,
    )


def mixed(name: str, device_tensors, cpu_tensors) -> RuntimeError:
    shapes = [[tuple(t.shape) for t in some][:3] for some in (device_tensors, cpu_tensors)]
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
        f"(in {name}, at {place()}; cuda:0 has {shapes[0]}, cpu {shapes[1]})"
    )


def check_index(record: Record, args) -> None:
    "Devices and syncs of `x[index]` and `x[index] = value`."
    x, indices = args[0], [i for i in args[1] if i is not None]
    if not isinstance(x, Twin):
        raise RuntimeError(
            f"indices should be either on cpu or on the same device as the indexed tensor (cpu), at {place()}"
        )
    value = args[2] if len(args) > 2 and isinstance(args[2], torch.Tensor) else None
    if value is not None and value.ndim and not isinstance(value, Twin):
        raise mixed("index_put_", [x], [value])
    masks = [i for i in indices if i.dtype in (torch.bool, torch.uint8) and isinstance(i, Twin)]
    # CUDA fills under a mask with a number without reading the mask
    filled = value is not None and value.ndim == 0 and not isinstance(value, Twin) and len(indices) == 1
    for _ in masks if not filled else ():
        record.sync("mask index")
    for i in indices:
        if not isinstance(i, Twin):
            record.transfer("host to device", blocking=False)
            record.sync("index copy")


def check(record: Record, about, args, kwargs, device_tensors, cpu_tensors) -> None:
    "Raise where CUDA refuses, and note where the host waits."
    if about.name in ("_to_copy", "copy_"):
        if about.name == "copy_":
            here, there = isinstance(args[1], Twin), isinstance(args[0], Twin)
        else:
            here = isinstance(args[0], Twin)
            there = here if kwargs.get("device") is None else is_device(kwargs["device"])
        blocking = not (kwargs.get("non_blocking") or (about.name == "copy_" and len(args) > 2 and args[2]))
        if here != there:
            record.transfer("host to device" if there else "device to host", blocking)
        return
    if about.name in FREE:
        return
    if about.name in INDEXING:
        return check_index(record, args)
    if device_tensors and any(t.ndim or about.name in NO_SCALARS for t in cpu_tensors):
        raise mixed(about.name, device_tensors, cpu_tensors)
    if not device_tensors:
        return
    if about.name == "_local_scalar_dense":
        record.sync("item")
    elif about.name in SYNCING:
        record.sync(about.name)
    elif about.name == "repeat_interleave" and about.overload == "Tensor":
        if kwargs.get("output_size") is None:
            record.sync(about.name)


def run(record: Record, func, args, kwargs):
    "An operation that touches the device: checked, counted, run on the values, its results wrapped."
    about = facts(func)
    tensors = tensors_in((args, kwargs))
    device_tensors = [x for x in tensors if isinstance(x, Twin)]
    cpu_tensors = [x for x in tensors if not isinstance(x, Twin)]
    check(record, about, args, kwargs, device_tensors, cpu_tensors)
    wanted = kwargs.get("device")
    on_device = bool(device_tensors) if wanted is None else is_device(wanted)
    args_v, kwargs_v = change(values, args), change(values, kwargs)
    if wanted is not None:
        kwargs_v["device"] = CPU
    if kwargs_v.get("pin_memory"):
        kwargs_v["pin_memory"] = False
    out = func(*args_v, **kwargs_v)
    if about.written:
        results = [args[i] if i < len(args) else kwargs[name] for i, name in about.written]
        for result in results:
            if isinstance(result, Twin) and result.shape != result.values.shape:
                raise NotImplementedError(
                    f"{about.name} changes a tensor's shape in place: the simulated device cannot"
                )
        return results[0] if len(results) == 1 else tuple(results)
    if not on_device:
        return out
    return change(wrap, out)


class Operations(TorchDispatchMode):
    "Runs what touches the device by `run`, and leaves the rest alone."

    def __init__(self, record: Record):
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        named = any(isinstance(x, torch.device) and is_device(x) for x in (*args, *kwargs.values()))
        if Twin not in types and not named:
            return func(*args, **kwargs)
        if facts(func).composite:  # inference mode hands these on whole
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        return run(self.record, func, args, kwargs)


# ---- calls, above autograd

# What CUDA's autocast runs in the lower precision, in float32, and in the widest type among the inputs:
# https://docs.pytorch.org/docs/stable/amp.html
LOWER = frozenset(
    """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul __matmul__
    __rmatmul__ mm mv bmm addmm addmv addbmm baddbmm chain_matmul multi_dot einsum
    scaled_dot_product_attention prelu
""".split()
)
FLOAT32 = frozenset(
    """
    __pow__ __rpow__ pow __rdiv__ __rtruediv__ acos asin cosh sinh tan erfinv exp expm1 log log2
    log10 log1p reciprocal rsqrt cumsum cumprod sum prod norm dist cdist renorm layer_norm
    group_norm softmax softmin log_softmax softplus cosine_similarity mse_loss l1_loss
    smooth_l1_loss cross_entropy nll_loss kl_div binary_cross_entropy_with_logits normalize
""".split()
)
WIDEST = {"addcmul", "addcdiv", "cross", "dot", "tensordot", "grid_sample", "scatter_add", "stack", "cat"}


def casts(x) -> bool:
    return isinstance(x, Twin) and x.is_floating_point() and x.dtype != torch.float64


def autocast(name: str, args, kwargs):
    "The arguments as autocast on CUDA would hand them to the function `name`."
    if name in LOWER:
        dtype = torch.get_autocast_dtype("cuda")
    elif name in FLOAT32:
        dtype = torch.float32
    elif name in WIDEST:
        found = {x.dtype for x in tensors_in((args, kwargs)) if casts(x)}
        if len(found) < 2:
            return args, kwargs
        dtype = torch.float32
    else:
        return args, kwargs
    return change(lambda x: x.to(dtype) if casts(x) else x, (args, kwargs))


class Calls(TorchFunctionMode):
    "Puts meta in the place of cuda, casts under autocast, and does what torch omits for meta tensors."

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            self.check_generator(args, kwargs)
        if name == "pin_memory" and not isinstance(args[0], Twin):
            return args[0]
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if name in ("tensor", "as_tensor") and self.redirect(kwargs.get("device")) is META:
            if not isinstance(args[0], Twin):  # torch gives a meta tensor no values
                return func(*args, **{**kwargs, "device": CPU}).to(META)
        if name == "cuda" and isinstance(args[0], torch.Tensor):
            return args[0].to(META, non_blocking=kwargs.get("non_blocking", False))
        if name == "__setitem__" and isinstance(args[0], Twin) and isinstance(args[2], (bool, int, float)):
            # on CUDA, a number becomes a CPU scalar
            args = (*args[:2], torch.tensor(args[2], dtype=args[0].dtype))
        if torch.is_autocast_enabled("cuda"):
            args, kwargs = autocast(name, args, kwargs)
        return func(*map(self.redirect, args), **{k: self.redirect(v) for k, v in kwargs.items()})

    @staticmethod
    def redirect(x):
        if (
            isinstance(x, torch.device)
            and x.type == "cuda"
            or isinstance(x, str)
            and x.split(":")[0] == "cuda"
        ):
            return META
        return x

    @staticmethod
    def check_generator(args, kwargs) -> None:
        place = kwargs.get("device") or (
            args[0].device if args and isinstance(args[0], torch.Tensor) else CPU
        )
        wanted, found = torch.device(place).type, kwargs["generator"].device.type
        if wanted != found:
            raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{found}'")


# ---- what torch.cuda and others say


class AnyGenerator(type(REAL_GENERATOR)):
    def __instancecheck__(cls, x):
        return isinstance(x, REAL_GENERATOR)


class Generator(REAL_GENERATOR, metaclass=AnyGenerator):
    "torch.Generator in the context: one of the device draws as one of the CPU."

    def __new__(cls, device="cpu"):
        if torch.device(device).type != "cuda":
            return REAL_GENERATOR(device)
        return super().__new__(cls, "cpu")

    def __init__(self, device="cpu"):
        pass

    device = property(lambda self: CUDA)


class Event:
    "A CUDA event: all work is done when it is recorded."

    def __init__(self, *args, **kwargs):
        self.time = 0.0

    def record(self, stream=None):
        self.time = time.perf_counter()

    def wait(self, stream=None):
        pass

    def query(self):
        return True

    def synchronize(self):
        OPEN[0].sync("synchronize")

    def elapsed_time(self, end):
        return 1000 * (end.time - self.time)


class Stream(contextlib.nullcontext):
    "A CUDA stream: there is but one order."

    def __init__(self, *args, **kwargs):
        super().__init__()

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or Event()

    def query(self):
        return True

    def is_capturing(self):
        return False

    def synchronize(self):
        OPEN[0].sync("synchronize")


def cuda_functions(record: Record, free: int, total: int, capability: tuple) -> dict:
    "What stands in the place of the functions of torch.cuda."
    answer = lambda value: lambda *args, **kwargs: value
    major, minor = capability
    properties = SimpleNamespace(name="simulated", total_memory=total, major=major, minor=minor)
    zero = "max_memory_allocated memory_allocated max_memory_reserved memory_reserved current_device"
    nothing = "_lazy_init init empty_cache reset_peak_memory_stats set_device manual_seed manual_seed_all"
    return dict(
        **dict.fromkeys(zero.split(), answer(0)),
        **dict.fromkeys(nothing.split(), answer(None)),
        is_available=answer(True),
        is_initialized=answer(True),
        device_count=answer(1),
        get_device_name=answer("simulated"),
        get_device_capability=answer(capability),
        get_device_properties=answer(properties),
        is_bf16_supported=answer(True),
        is_current_stream_capturing=answer(False),
        mem_get_info=answer((free, total)),
        synchronize=lambda device=None: record.sync("synchronize"),
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
        Event=Event,
        Stream=Stream,
        current_stream=lambda device=None: Stream(),
        stream=lambda stream: contextlib.nullcontext(),
    )


def accelerator_functions(record: Record) -> dict:
    "What stands in the place of the functions of torch.accelerator."
    answer = lambda value: lambda *args, **kwargs: value
    return dict(
        is_available=answer(True),
        device_count=answer(1),
        current_device_index=answer(0),
        current_accelerator=answer(torch.device("cuda")),
        current_stream=lambda device=None: Stream(),
        synchronize=lambda device=None: record.sync("synchronize"),
    )


def load_with(load):
    "torch.load that can put tensors on the device."

    def load_to_device(f, map_location=None, *args, **kwargs):
        onto_device = set()  # addresses of storages

        def target(storage, location: str):
            if callable(map_location):
                return map_location(storage, location)
            if isinstance(map_location, dict):
                return map_location.get(location, location)
            return location if map_location is None else map_location

        def keep(storage, location: str):
            wanted = target(storage, location)
            if isinstance(wanted, (str, torch.device)) and torch.device(wanted).type == "cuda":
                onto_device.add(storage.data_ptr())
            return storage

        def place_tensor(x):
            if not isinstance(x, torch.Tensor) or x.untyped_storage().data_ptr() not in onto_device:
                return x
            return as_kind(x.detach().to(META), x)

        return change(place_tensor, load(f, keep, *args, **kwargs))

    return load_to_device


def save_with(save):
    "torch.save that says cuda:0 of the device's tensors."

    def save_from_device(*args, **kwargs):
        try:
            return save(*args, **kwargs)
        finally:
            DEVICE_STORAGES.clear()

    return save_from_device


def tag_with(location_tag):
    def tag(storage):
        return "cuda:0" if storage.data_ptr() in DEVICE_STORAGES else location_tag(storage)

    return tag


class SafeOpen:
    "safetensors' reader, which can give its tensors on the device."

    def __init__(self, real, filename, framework, device="cpu", **options):
        self.there = is_device(device)
        self.file = real(filename, framework=framework, device="cpu" if self.there else device, **options)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *args):
        return self.file.__exit__(*args)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def get_tensor(self, name):
        found = self.file.get_tensor(name)
        return found.to(META) if self.there else found

    def get_tensors(self):
        return {name: self.get_tensor(name) for name in self.file.keys()}


@contextlib.contextmanager
def cuda_twin(capability: tuple = (9, 0), free: int = 140_000_000_000, total: int = 150_000_000_000):
    """Within, there is a CUDA device, cuda:0, as this module describes it; gives its `Record`.

    capability: what torch.cuda.get_device_capability says; free, total: bytes that mem_get_info says. On
    leaving, also by an error, everything is as it was; tensors of the device raise `RuntimeError` from
    then on. Threads that are started within see the device, too. Contexts do not nest (`RuntimeError`).
    """
    if OPEN:
        raise RuntimeError("cuda_twin() is open already")
    record, run_thread = Record(), threading.Thread.run

    def run_with_device(thread):
        with Calls(), Operations(record):
            run_thread(thread)

    with contextlib.ExitStack() as stack:
        patched = lambda owner, **names: stack.enter_context(mock.patch.multiple(owner, create=True, **names))
        patched(torch.cuda, **cuda_functions(record, free, total, capability))
        patched(torch.accelerator, **accelerator_functions(record))
        patched(torch, Generator=Generator, load=load_with(torch.load), save=save_with(torch.save))
        patched(torch.serialization, location_tag=tag_with(torch.serialization.location_tag))
        patched(safetensors.torch, safe_open=functools.partial(SafeOpen, safetensors.torch.safe_open))
        patched(threading.Thread, run=run_with_device)
        OPEN.append(record)
        stack.callback(OPEN.clear)
        stack.enter_context(Calls())
        stack.enter_context(Operations(record))
        yield record
