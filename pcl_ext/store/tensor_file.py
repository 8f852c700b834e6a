"""One safetensors file: written atomically, read with suspicion. Nothing is unpickled, nothing is mapped.

The format is written and read here, as any safetensors reader knows it: the library's own writer goes through a
temporary file under a name of its own, which a killed save would leave for good, and its reader maps the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pcl_ext.store.atomic import StoreError, damaged, publish, sweep_temporary, temporary

FORMAT = 1
_KEY = "pcl_ext"  # the one entry of safetensors' own metadata: JSON text
_MAX_HEADER = 100_000_000  # bytes, safetensors' own limit
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorFile:
    """What a file holds. sha256 is that of the whole file, hashes those of `hash_tensor`."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    hashes: dict[str, str]
    sha256: str
    size: int


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write tensors and JSON metadata as one safetensors file: `path` holds the old or the new content, never a mix.

    The hash of every tensor goes with them. StoreError for a dtype or metadata that cannot be kept, OSError where the
    disk refuses.
    """
    path = Path(path)
    sweep_temporary(path.parent)
    with temporary(path.parent) as file:
        write_tensors(file, tensors, metadata or {})
        publish(file, path)


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, metadata) of a file that `save_tensors` wrote; StoreError unless every byte checks out."""
    content = read_tensors(Path(path))
    return content.tensors, content.metadata


def hash_tensor(tensor: Tensor) -> str:
    """sha256 over dtype, shape and bytes, in hex. Strides and device do not matter, the sign of a zero does."""
    digest = _hash_start(dtype_name(tensor), list(tensor.shape))
    digest.update(_bytes(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


def dtype_name(tensor: Tensor) -> str:
    """safetensors' name of a dtype that can be stored."""
    if tensor.dtype not in _NAMES:
        raise StoreError(f"tensors must be of dtype {', '.join(_NAMES.values())}, got {tensor.dtype}; convert it first")
    return _NAMES[tensor.dtype]


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> tuple[str, int]:
    """Write header and data; the same content gives the same bytes. -> sha256 and size of what was written."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or name == "__metadata__":
            raise StoreError(f"tensors must map names to tensors, got {name!r}: {type(tensor).__name__}")
        dtype_name(tensor)
    # Wide dtypes first, so that every tensor is aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    kept = {name: tensors[name].detach().cpu().contiguous() for name in order}
    hashes = {name: hash_tensor(tensor) for name, tensor in kept.items()}
    body = sign({"format": FORMAT, "metadata": dict(metadata), "tensors": hashes}, "metadata")
    header: dict[str, Any] = {"__metadata__": {_KEY: canonical(body)}}
    end = 0
    for name, tensor in kept.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype_name(tensor), "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = canonical(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise StoreError(f"names and metadata must fit into {_MAX_HEADER} bytes, got {len(text)}")
    whole = hashlib.sha256()
    for part in (len(text).to_bytes(8, "little"), text, *map(_bytes, kept.values())):
        file.write(part)
        whole.update(part)
    return whole.hexdigest(), 8 + len(text) + end


def read_tensors(path: Path) -> TensorFile:
    """Read and check a whole file: layout, hash of every tensor and of the metadata. StoreError names the tensor."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise damaged(path, "is not a regular file")
        with path.open("rb") as file:
            return _read(path, file, os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        raise damaged(path, "is missing") from None
    except OSError as error:
        raise damaged(path, f"cannot be read ({error})") from error


def _read(path: Path, file: BinaryIO, size: int) -> TensorFile:
    whole = hashlib.sha256()
    layout, body = _read_header(path, file, size, whole)
    tensors: dict[str, Tensor] = {}
    for name, (dtype, shape) in layout.items():
        try:
            tensors[name] = tensor = torch.empty(shape, dtype=DTYPES[dtype])
        except RuntimeError as error:  # 0 x 2^62 numbers
            raise damaged(path, f"tensor {name!r} has shape {shape}") from error
        view, filled = _bytes(tensor), 0
        while filled < len(view):
            count = file.readinto(view[filled:])
            if not count:
                raise damaged(path, f"ends inside tensor {name!r}")
            filled += count
        digest = _hash_start(dtype, shape)
        digest.update(view)
        whole.update(view)
        if digest.hexdigest() != body["tensors"].get(name):
            raise damaged(path, f"tensor {name!r} is not what was saved: its sha256 differs")
        if dtype == "BOOL" and bool((tensor.view(torch.uint8) > 1).any()):
            raise damaged(path, f"tensor {name!r} holds bytes that are neither true nor false")
    if missing := sorted(set(body["tensors"]) - set(tensors)):
        raise damaged(path, f"tensor {missing[0]!r} is missing")
    return TensorFile(tensors, body["metadata"], body["tensors"], whole.hexdigest(), size)


def _read_header(path: Path, file: BinaryIO, size: int, whole: Any) -> tuple[dict[str, tuple[str, list[int]]], dict]:
    """({tensor: (dtype, shape)} in the order of the data, our part of the metadata)."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, _MAX_HEADER):
        raise damaged(path, f"is truncated or no safetensors file ({size} bytes)")
    text = file.read(length)
    whole.update(start + text)
    try:
        header = parse(text)
        note = header.pop("__metadata__", None)
        body = parse(note[_KEY].encode())
        check_signature(body)
        if body["format"] != FORMAT:
            raise damaged(path, f"has format {body['format']}, this pcl_ext reads {FORMAT}", mend="update pcl_ext")
        entries = sorted(header.items(), key=lambda entry: (entry[1]["data_offsets"], entry[0]))
        return _layout(path, entries, size - 8 - length), body
    except StoreError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"has a header that is not ours or damaged ({error!r:.200})") from error


def _layout(path: Path, entries: list[tuple[str, dict]], size: int) -> dict[str, tuple[str, list[int]]]:
    """Tensors must fill the data one after another: no gap, no overlap, nothing left, no byte missing."""
    layout, at = {}, 0
    for name, entry in entries:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if set(entry) != {"dtype", "shape", "data_offsets"} or dtype not in DTYPES:
            raise damaged(path, f"tensor {name!r} has dtype {dtype!r} or keys that are not known")
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise damaged(path, f"tensor {name!r} has shape {shape} at {begin}..{end}")
        length = DTYPES[dtype].itemsize
        for number in shape:
            length *= number
        if begin != at or end - begin != length:
            raise damaged(path, f"tensor {name!r} of {length} bytes lies at {begin}..{end}, not at {at}")
        layout[name], at = (dtype, shape), end
        if at > size:
            raise damaged(path, f"is truncated: it ends inside tensor {name!r}")
    if at != size:
        raise damaged(path, f"has {size - at} bytes that belong to no tensor")
    return layout


def _hash_start(dtype: str, shape: list[int]) -> Any:
    return hashlib.sha256(f"{dtype} {list(shape)} ".encode())


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def canonical(value: Any) -> str:
    """JSON text that depends on the value alone. ValueError for NaN, TypeError for what is not JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def parse(text: bytes) -> Any:
    """Strict JSON: UTF-8, no key twice, no NaN. ValueError or RecursionError otherwise."""
    return json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError(f"a key is there twice among {sorted(key for key, _ in pairs)}")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def sign(body: dict[str, Any], what: str) -> dict[str, Any]:
    """body with the sha256 of its own canonical JSON under "sha256"."""
    try:
        return {**body, "sha256": hashlib.sha256(canonical(body).encode()).hexdigest()}
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{what} must be JSON values with finite numbers, got {error}") from error


def check_signature(body: dict[str, Any]) -> None:
    """ValueError unless `body` is what `sign` returned."""
    rest = {key: value for key, value in body.items() if key != "sha256"}
    if hashlib.sha256(canonical(rest).encode()).hexdigest() != body.get("sha256"):
        raise ValueError("the content does not have the sha256 written beside it")
