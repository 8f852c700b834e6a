"""One safetensors file: written atomically, read with suspicion. Nothing is unpickled, nothing stays mapped.

Neither way is a second copy of all tensors in memory.

Beside its tensors a file of ours holds JSON metadata and the sha256 of every tensor, as one text of safetensors' own
metadata. Any safetensors reader reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from pcl_ext.store.atomic import MEND, StoreError, damaged, hash_file, reading, sweep_temporary, write_file

FORMAT = 1
_KEY = "pcl_ext"  # the one entry of safetensors' own metadata: JSON text
_MOST_HEADER = 100_000_000  # bytes that safetensors reads
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


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write tensors and JSON metadata as one safetensors file: `path` holds the old or the new content, never a mix.

    The hash of every tensor goes with them. StoreError for a dtype or metadata that cannot be kept, OSError where the
    disk refuses.
    """
    path = Path(path)
    sweep_temporary(path.parent)
    write_file(path, *to_pieces(tensors, metadata or {}))


def load_tensors(path: str | Path, mend: str = MEND) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, metadata) of a file that `save_tensors` wrote; StoreError unless every byte checks out, with
    `mend`, what to do about it."""
    content = read_tensors(Path(path), mend)
    return content.tensors, content.metadata


def hash_tensor(tensor: Tensor) -> str:
    """sha256 over dtype, shape and bytes, in hex. Strides and device do not matter, the sign of a zero does."""
    digest = hashlib.sha256(f"{dtype_name(tensor)} {list(tensor.shape)} ".encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> np.ndarray:
    """[n] uint8, the tensor's own memory where that lies on the CPU without gaps."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _copy(tensor: Tensor) -> Tensor:
    """With the same bytes: torch's own copy makes every bool 0 or 1."""
    return tensor.view(torch.uint8).clone().view(torch.bool) if tensor.dtype == torch.bool else tensor.clone()


def dtype_name(tensor: Tensor) -> str:
    """safetensors' name of a dtype that can be stored."""
    if tensor.dtype not in _NAMES:
        raise StoreError(f"tensors must be of dtype {', '.join(_NAMES.values())}, got {tensor.dtype}; convert it first")
    return _NAMES[tensor.dtype]


def to_pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> list[bytes | np.ndarray]:
    """A whole file: its header, then the memory of each tensor. The same content gives the same bytes.

    safetensors' own writers copy all tensors once or twice: more memory than the training of a large table may leave.
    """
    for name, tensor in tensors.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor) and _is_name(name)):
            raise StoreError(f"tensors must map names to tensors, got {name!r}: {type(tensor).__name__}")
    hashes = {name: hash_tensor(tensor) for name, tensor in tensors.items()}
    body = sign({"format": FORMAT, "metadata": dict(metadata), "tensors": hashes}, "metadata")
    header, end = {"__metadata__": {_KEY: canonical(body)}}, 0
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # the widest first: all aligned
    for name in order:
        tensor, begin = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": dtype_name(tensor), "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = canonical(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MOST_HEADER:
        raise StoreError(f"metadata and names of tensors must take at most {_MOST_HEADER:,} bytes, got {len(text):,}")
    return [len(text).to_bytes(8, "little") + text, *(_bytes(tensors[name]) for name in order)]


def _is_name(name: str) -> bool:
    """Whether a tensor may be called so: UTF-8 holds no half of a surrogate pair."""
    return name != "__metadata__" and name.encode(errors="replace").decode() == name


def read_tensors(path: Path, mend: str = MEND) -> TensorFile:
    """Read and check a whole file, the hash of every tensor and of the metadata. StoreError names the tensor."""
    with reading(path):
        sha256 = hash_file(path)
    try:
        with safetensors.safe_open(path, "pt") as file:  # which maps it
            tensors = {name: _copy(file.get_tensor(name)) for name in file.keys()}
            text = (file.metadata() or {}).get(_KEY, "")
    except (safetensors.SafetensorError, RuntimeError, KeyError, TypeError, OSError) as error:
        raise damaged(path, f"is truncated, damaged or no safetensors file ({error!s:.200})", mend=mend) from error
    body = _read_metadata(path, text, mend)
    hashes = body["tensors"]
    if missing := sorted(set(hashes) - set(tensors)):
        raise damaged(path, f"lacks tensor {missing[0]!r}", mend=mend)
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES or hash_tensor(tensor) != hashes.get(name):
            raise damaged(path, f"tensor {name!r} is not what was saved: its sha256 differs", mend=mend)
        if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            raise damaged(path, f"tensor {name!r} holds bytes that are neither true nor false", mend=mend)
    return TensorFile(tensors, body["metadata"], hashes, sha256)


def _read_metadata(path: Path, text: str, mend: str) -> dict[str, Any]:
    """Our part of the metadata of a file that safetensors has read."""
    try:
        body = parse(text.encode())
        check_signature(body)
        if body["format"] != FORMAT:
            raise damaged(path, f"has format {body['format']}, this pcl_ext reads {FORMAT}", mend="update pcl_ext")
    except StoreError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"has a header that is not ours or damaged ({error!r:.200})", mend=mend) from error
    return body


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
