"""A device that is not the CPU, made of the CPU: PyTorch takes its tensors for those of an accelerator, and every
operation on them computes on the same memory by the CPU. One that mixes devices raises, as on CUDA.

It draws other random numbers than the CPU does for the same seed, as a GPU would.

Importing this registers the device for the whole process: `other_device.py` is a process of its own.
"""

import ctypes
import itertools
from contextlib import contextmanager

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "stand_in"
_TYPES = {  # DLPack's kind of number and its bits
    torch.bool: (6, 8),
    torch.uint8: (1, 8),
    torch.int8: (0, 8),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
}
_INDEXING = ("aten::index.Tensor", "aten::index.Tensor_out", "aten::_index_put_impl_", "aten::index_put_")
_seeds = itertools.count(1000)


class _Device(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("number", ctypes.c_int32)]


class _Type(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("dims", ctypes.c_int32),
        ("type", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_alive = {}  # what the memory of a tensor belongs to, by the address that its deleter is called with
_forget = _DELETER(lambda address: _alive.pop(address, None) and None)
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def put(tensor, owners=()):
    """A tensor of the CPU -> one of the device, in the same memory; owners: whose memory it is, if not its own."""
    tensor, dims = tensor.detach(), max(1, tensor.dim())
    shape, strides = ((ctypes.c_int64 * dims)(*numbers) for numbers in (tensor.shape, tensor.stride()))
    described = _Tensor(tensor.data_ptr() or 1, _Device(12, 0), tensor.dim(), _Type(*_TYPES[tensor.dtype], 1))
    described.shape, described.strides = shape, strides
    managed = _Managed(described, None, ctypes.cast(_forget, ctypes.c_void_p))
    _alive[ctypes.addressof(managed)] = (tensor, managed, shape, strides, owners)
    return torch.utils.dlpack.from_dlpack(_capsule(ctypes.addressof(managed), b"dltensor", None))


def get(tensor):
    """A tensor of the device -> one of the CPU, in the same memory, for as long as the former lives."""
    storage, cpu = tensor.untyped_storage(), torch.device("cpu")
    storage = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), cpu, storage.nbytes())
    return torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _is_here(value):
    return isinstance(value, torch.Tensor) and value.device.type == NAME


def _run(op, *args, **options):
    """Any operation with a tensor of the device among its arguments, or made there."""
    if op.name() == "aten::_copy_from":
        source, target = (get(tensor) if _is_here(tensor) else tensor for tensor in args[:2])
        target.copy_(source)
        return args[1]
    # a Python number in a tensor's place comes as the number
    tensors = [str(argument.type) == "Tensor" for argument in op._schema.arguments]
    args = [torch.tensor(x) if t and isinstance(x, (int, float)) else x for x, t in zip(args, tensors)]
    _refuse_mixed(op, args, options)
    given = []  # (the tensor here, the one it is on the CPU)

    def on_cpu(value):
        if _is_here(value):
            given.append((value, get(value)))
            return given[-1][1]
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def back(value):
        if not isinstance(value, torch.Tensor):
            return value
        for here, there in given:
            if value is there:
                return here
        storage = value.untyped_storage().data_ptr()
        return put(value, [here for here, there in given if there.untyped_storage().data_ptr() == storage])

    outs = [
        argument.name for argument in op._schema.arguments if argument.is_out and _is_here(options.get(argument.name))
    ]
    fresh = {name: torch.empty(0, dtype=options[name].dtype) for name in outs}  # memory here cannot grow
    args, moved = tree_map(on_cpu, args), tree_map(on_cpu, {k: v for k, v in options.items() if k not in outs})
    given += [(options[name], out) for name, out in fresh.items()]
    with torch.no_grad(), _other_numbers(op):
        result = op(*args, **moved, **fresh)
    for name, out in fresh.items():
        if options[name].shape == out.shape:
            get(options[name]).copy_(out)
        else:
            options[name].data = put(out)
    return tree_map(back, result)


def _refuse_mixed(op, args, options):
    if op.name() in _INDEXING and _is_here(args[0]):
        args = (args[0], *args[2:])  # CUDA takes indices from the CPU
    tensors = [value for value in tree_leaves((args, options)) if isinstance(value, torch.Tensor)]
    if any(not _is_here(tensor) and tensor.dim() for tensor in tensors):
        raise RuntimeError(f"{op.name()}: tensors on {' and '.join(sorted({str(t.device) for t in tensors}))}")


@contextmanager
def _other_numbers(op):
    """Inside, an operation that draws leaves the CPU's generator alone."""
    draws = torch.Tag.nondeterministic_seeded in op.tags
    with torch.random.fork_rng(devices=[], enabled=draws):
        if draws:
            torch.default_generator.manual_seed(next(_seeds))
        yield


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(_run, "PrivateUse1")
