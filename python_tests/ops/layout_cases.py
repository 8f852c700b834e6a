"""Lengths, dtypes and numbers for the tests of to_padded and to_packed."""

import torch

LENGTHS = [[1], [3, 1, 2], [5, 0, 4], [0, 0], [], [7] * 9]  # one user, empty users, ties
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8]
DTYPES += [torch.bool, torch.complex64]


def numbers(*shape, dtype=torch.float32):
    return (torch.randn(*shape) * 50).abs().to(dtype)
