"""Save and load: runs, and single files of tensors. safetensors and JSON, written atomically, checked on every load."""

from pcl_ext.store.atomic import StoreError
from pcl_ext.store.manifest import read_manifest
from pcl_ext.store.run import from_pretrained, lock, save_pretrained, verify
from pcl_ext.store.tensor_file import hash_tensor, load_tensors, save_tensors

__all__ = [
    "StoreError",
    "from_pretrained",
    "hash_tensor",
    "load_tensors",
    "lock",
    "read_manifest",
    "save_pretrained",
    "save_tensors",
    "verify",
]
