"""Runs on disk."""


class StoreError(ValueError):
    """A file of a run is missing, damaged, or not what the manifest says."""


def save_pretrained(model, path, record=None):
    raise NotImplementedError


def from_pretrained(path):
    raise NotImplementedError


def verify(path):
    raise NotImplementedError
