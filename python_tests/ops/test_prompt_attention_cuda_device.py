"""What prompt_attention on CUDA asks of a device, and what follows: it fits or takes the twin, or an error says why."""

import pytest
import torch
from attention_cases import make
from cuda_cases import DTYPES, compare

from pcl_ext.ops import _gpu


@pytest.fixture
def _small_blocks():
    """Shared memory as sm_86, sm_89 and sm_120 have it."""
    emulated = pytest.importorskip("pcl_ext._cuda_emulated")
    emulated.set_shared_bytes(99 * 1024)
    yield
    emulated.set_shared_bytes(163 * 1024)


FIT = [
    (dim, dtype) for dtype in DTYPES for dim in (64, 80, 96, 112, 128) if dim <= (80 if dtype.itemsize == 4 else 112)
]


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("prefix", [([7, 70], [0, 1]), ([9], None)], ids=["two long prefixes", "one short"])
@pytest.mark.parametrize(("dim", "dtype"), FIT, ids=str)
def test_what_fits_runs_where_blocks_have_less_shared_memory(dim, dtype, prefix):
    with _gpu.emulated():
        compare(make([5, 40], *prefix, dim=dim, heads=1, dtype=dtype), "cpu")


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize(("dim", "dtype"), [(128, torch.bfloat16), (128, torch.float16), (96, torch.float32)], ids=str)
def test_what_does_not_fit_takes_the_twin_there(dim, dtype):
    with _gpu.emulated():
        case = make([5, 40], [9], dim=dim, dtype=dtype)
        assert torch.equal(case.run(), case.run(impl="reference"))
        with pytest.raises(ValueError, match=f"takes a head width d of {dim} in .* more shared memory"):
            case.run(impl="fused")


@pytest.fixture
def silent():
    """A device that answers nothing it is asked."""
    emulated = pytest.importorskip("pcl_ext._cuda_emulated")
    emulated.set_answer(999)
    yield emulated
    emulated.set_answer(0)


SILENT = "the CUDA device does not say what it has: CUDA error 999, "


@pytest.mark.parametrize("impl", ["auto", "fused"])
def test_a_device_that_does_not_say_what_it_has_is_an_error(impl, silent):
    case = make([5, 40], [9, 20], [0, 1], dtype=torch.bfloat16)
    with _gpu.emulated():
        with pytest.raises(RuntimeError, match=SILENT):
            case.run(impl=impl)
        silent.set_answer(0)
        out = case.run(impl=impl)
        silent.set_answer(999)
        with pytest.raises(RuntimeError, match=SILENT):
            out.sum().backward()


def test_what_a_device_does_not_say_is_not_remembered(silent, monkeypatch):
    monkeypatch.setattr(_gpu, "CUDA", silent)
    here = -1  # no device of torch's
    with pytest.raises(RuntimeError, match=SILENT):
        _gpu._fits_there(here, 16, 2)
    silent.set_answer(0)
    assert _gpu._fits_there(here, 16, 2)


@pytest.mark.parametrize("prefixes", [[9, 16, 3, 12], [7, 70, 0, 3], [3, 5, 1, 0]], ids=str)
def test_room_for_prefixes_is_that_of_one_of_mean_length(prefixes):
    """Keys and values, beside the four slots of queries and two stages of four of both."""
    emulated = pytest.importorskip("pcl_ext._cuda_emulated")
    tile = 16 * 16 * 2
    with _gpu.emulated():
        case = make([5, 40, 2, 9], prefixes, dtype=torch.bfloat16)
        want = case.run(impl="fused")
        asked = emulated.last_shared_bytes()
        assert (asked - 640) / tile - 4 * 5 == 2 * -(-sum(prefixes) // len(prefixes) // 16)
        alone = make([5], prefixes[:1], dtype=torch.bfloat16)
        for name, rows in alone.rows.items():
            rows.data = case.rows[name].data[: len(rows)]
        assert torch.equal(alone.run(impl="fused"), want[:5])
