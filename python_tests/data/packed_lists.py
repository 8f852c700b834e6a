"""The histories of a dataset as lists, and those that `write_folder` of conftest.py writes."""

HISTORIES = [[3, 1, 2], [5, 4], [], [7, 1, 2, 3, 4, 5], [6]]


def histories(dataset):
    return [dataset.items[a:b].tolist() for a, b in zip(dataset.offsets[:-1], dataset.offsets[1:], strict=True)]
