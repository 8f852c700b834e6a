"""Every test: seeded, new buffers full of NaN, threads and denormals as they were; devices and the module by marker."""

from importlib.util import find_spec

import pytest
import torch

from pcl_ext import ops
from pcl_ext.ops import _gpu


def pytest_configure(config):
    config.addinivalue_line("markers", "needs_ext: needs the compiled module")
    torch.set_float32_matmul_precision("highest")  # some systems' settings ask for less
    torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every length anew, and the references have many


def pytest_runtest_setup(item):
    if item.get_closest_marker("needs_ext") and not ops.has_fused():
        pytest.skip("the compiled module pcl_ext._C is not built")
    if item.get_closest_marker("gpu"):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if _gpu.CUDA is None:
            pytest.skip("the compiled module pcl_ext._cuda is not built")


CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
EMULATED = [] if find_spec("pcl_ext._cuda_emulated") is None else ["emulated"]


@pytest.fixture(params=["cpu", CUDA, *EMULATED])
def device(request):
    """Each device in turn; where the emulation is built, also the CUDA kernels on CPU tensors."""
    yield from _on(request.param)


@pytest.fixture(params=[CUDA, *EMULATED])
def cuda(request):
    """Where the CUDA kernels run: "cuda", and where the emulation is built "cpu", by it."""
    yield from _on(request.param)


def _on(device):
    if device != "emulated":
        yield device
        return
    with _gpu.emulated():
        yield "cpu"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """200 synthetic users, of each test module's own."""
    from runs import write_dataset  # tests of the ops run where the extra `cli` is missing

    from pcl_ext.data import Dataset

    return Dataset(write_dataset(tmp_path_factory.mktemp("shop") / "dataset"))


@pytest.fixture(scope="module")
def pretrained(dataset):
    """A model of one epoch on them; what changes it takes a copy."""
    from runs import pretrain_in_memory

    return pretrain_in_memory(dataset)


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def _nan_in_new_buffers():
    """torch.empty fills with NaN (the largest value for integers): what a kernel forgets to write is seen."""
    mode, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_deterministic_debug_mode(mode)
