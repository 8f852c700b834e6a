"""One file of tensors: there and back, every flipped or missing byte found, hostile headers refused."""

import errno
import fcntl
import json
import os
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pcl_ext.store import StoreError, atomic, hash_tensor, load_tensors, save_tensors, tensor_file
from pcl_ext.store.atomic import sweep_temporary, temporary
from pcl_ext.store.tensor_file import DTYPES, canonical, sign

SHAPES = [[], [0], [1], [3, 0, 2], [2, 3]]
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
METADATA = {"epoch": 3, "best": 0.1, "names": ["ä", None, True], "nested": {"seed": -1}}


def example():
    return {
        "w": torch.arange(6.0).view(2, 3),
        "step": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "mask": torch.ones(3) > 0,
    }


def header_of(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rebuild(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, example(), METADATA)
    return path


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
def test_there_and_back(tmp_path, dtype, shape):
    tensor = torch.randint(0, 2, shape).to(dtype) if dtype == torch.bool else (torch.randn(shape) * 50).to(dtype)
    save_tensors(tmp_path / "a", {"x": tensor, "other": torch.ones(3)}, METADATA)
    tensors, metadata = load_tensors(tmp_path / "a")
    assert metadata == METADATA
    assert tensors["x"].dtype == dtype
    assert torch.equal(tensors["x"], tensor)
    assert torch.equal(load_file(tmp_path / "a")["x"], tensor)  # any safetensors reader reads it


def test_keeps_nan_and_the_sign_of_zero(tmp_path):
    save_tensors(tmp_path / "a", {"x": torch.tensor([torch.nan, -0.0, torch.inf])})
    got = load_tensors(tmp_path / "a")[0]["x"]
    assert got.view(torch.int32).tolist() == torch.tensor([torch.nan, -0.0, torch.inf]).view(torch.int32).tolist()


def test_strided_shared_and_grad_tensors(tmp_path):
    base = torch.randn(4, 6, requires_grad=True)
    tensors = {"a": base, "b": base, "t": base.t(), "part": base[1:3, ::2]}
    save_tensors(tmp_path / "a", tensors)
    got, _ = load_tensors(tmp_path / "a")
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())
    assert not any(tensor.requires_grad for tensor in got.values())


def test_the_same_content_gives_the_same_bytes(tmp_path):
    save_tensors(tmp_path / "a", example(), METADATA)
    save_tensors(tmp_path / "b", dict(reversed(example().items())), dict(reversed(METADATA.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_hash_knows_dtype_shape_and_bytes_and_nothing_else():
    x = torch.arange(6.0).view(2, 3)
    same = [x.clone(), x.t().contiguous().t(), torch.nn.Parameter(x)]
    other = [x.view(3, 2), x.double(), x.view(torch.int32), -x, x + 1, torch.tensor(0.0), torch.tensor([0.0])]
    assert {hash_tensor(t) for t in same} == {hash_tensor(x)}
    assert len({hash_tensor(t) for t in [x, *other]}) == len(other) + 1
    assert hash_tensor(torch.tensor(0.0)) != hash_tensor(torch.tensor(-0.0))


def test_a_flipped_bit_in_any_byte_is_found(file):
    data = file.read_bytes()
    survived = 0
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        try:
            tensors, metadata = load_tensors(file)
        except StoreError:
            continue
        survived += 1
        assert metadata == METADATA
        assert {n: hash_tensor(t) for n, t in tensors.items()} == {n: hash_tensor(t) for n, t in example().items()}
    assert survived < 8  # blanks that pad the header to eight bytes, turned into another kind of blank


def test_a_flipped_bit_names_its_tensor(file):
    data = bytearray(file.read_bytes())
    data[-4] ^= 1  # bool is the narrowest dtype and comes last, w before it
    file.write_bytes(data)
    with pytest.raises(StoreError, match=r"a\.safetensors tensor 'w' .*sha256 differs; restore"):
        load_tensors(file)


def test_any_missing_end_is_found(file):
    data = file.read_bytes()
    for length in [*range(0, len(data) - 50, 7), *range(len(data) - 50, len(data))]:
        file.write_bytes(data[:length])
        with pytest.raises(StoreError, match=r"a\.safetensors"):
            load_tensors(file)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=400), length=st.integers(0, 400))
def test_noise_is_refused(tmp_path_factory, data, length):
    path = tmp_path_factory.getbasetemp() / "noise"
    path.write_bytes(length.to_bytes(8, "little") + data)
    with pytest.raises(StoreError, match="noise"):
        load_tensors(path)


def altered(name, **changes):
    def change(header, data):
        header[name].update(changes)
        return header, data

    return change


def twice(header, data):
    text = json.dumps(header)
    return text.replace('"w"', '"step"').encode(), data


LAYOUT = "is truncated, damaged or no safetensors file"
HOSTILE = {
    "key twice": (twice, LAYOUT),
    "negative shape": (altered("w", shape=[-2, -3]), LAYOUT),
    "bool in shape": (altered("w", shape=[True, 6]), LAYOUT),
    "shape too large": (altered("w", shape=[2**40, 2**40]), LAYOUT),
    "empty, but too large": (altered("empty", shape=[0, 2**62, 2**62]), "tensor 'empty'.*sha256"),
    "unknown dtype": (altered("w", dtype="F8"), LAYOUT),
    "dtype without a torch one": (altered("empty", dtype="F4"), LAYOUT),
    "dtype we do not write": (altered("step", dtype="U64"), "tensor 'step'.*sha256"),
    "other dtype": (altered("w", dtype="I32"), "tensor 'w'.*sha256"),
    "other shape": (altered("w", shape=[3, 2]), "tensor 'w'.*sha256"),
    "overlap": (altered("w", data_offsets=[0, 24]), LAYOUT),
    "gap": (altered("step", data_offsets=[8, 16]), LAYOUT),
    "offsets not integers": (altered("w", data_offsets=[8.0, 32.0]), LAYOUT),
    "offsets text": (altered("w", data_offsets="ab"), LAYOUT),
    "entry no object": (lambda h, d: (h | {"w": 3}, d), LAYOUT),
    "renamed": (lambda h, d: ({("v" if k == "w" else k): v for k, v in h.items()}, d), "lacks tensor 'w'"),
    "tensor too many": (lambda h, d: (h | {"v": EMPTY}, d), "tensor 'v'"),
    "tensor left out": (lambda h, d: ({k: v for k, v in h.items() if k != "empty"}, d), "lacks tensor 'empty'"),
    "no metadata": (lambda h, d: ({k: v for k, v in h.items() if k != "__metadata__"}, d), "header"),
    "metadata of others": (lambda h, d: (h | {"__metadata__": {"format": "pt"}}, d), "header"),
    "metadata no text": (lambda h, d: (h | {"__metadata__": {"pcl_ext": 3}}, d), LAYOUT),
    "metadata no JSON": (lambda h, d: (h | {"__metadata__": {"pcl_ext": "x"}}, d), "header"),
    "header no object": (lambda h, d: (b"[1, 2]", d), LAYOUT),
    "header not JSON": (lambda h, d: (b"{", d), LAYOUT),
    "header not UTF-8": (lambda h, d: (b"\xff\xfe", d), LAYOUT),
    "header deep": (lambda h, d: (b"[" * 200_000, d), LAYOUT),
    "header NaN": (lambda h, d: (b'{"w": NaN}', d), LAYOUT),
    "bytes left": (lambda h, d: (h, d + b"x"), LAYOUT),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refuses_hostile_files(file, case):
    change, message = HOSTILE[case]
    rebuild(file, *change(*header_of(file)))
    with pytest.raises(StoreError, match=rf"a\.safetensors.*{message}"):
        load_tensors(file)


def test_refuses_bools_that_are_neither(file):
    header, data = header_of(file)
    data = data[:-1] + b"\x02"
    body = json.loads(header["__metadata__"]["pcl_ext"])
    mask = torch.frombuffer(bytearray(data[-3:]), dtype=torch.bool)
    body["tensors"]["mask"] = hash_tensor(mask)
    del body["sha256"]
    header["__metadata__"]["pcl_ext"] = canonical(sign(body, ""))
    rebuild(file, header, data)
    with pytest.raises(StoreError, match="tensor 'mask' holds bytes that are neither"):
        load_tensors(file)


def test_refuses_another_format(file):
    header, data = header_of(file)
    body = json.loads(header["__metadata__"]["pcl_ext"]) | {"format": 2}
    del body["sha256"]
    header["__metadata__"]["pcl_ext"] = canonical(sign(body, ""))
    rebuild(file, header, data)
    with pytest.raises(StoreError, match="has format 2, this pcl_ext reads 1; update pcl_ext"):
        load_tensors(file)


def test_refuses_what_is_no_file_of_ours(tmp_path):
    save_file({"x": torch.zeros(3)}, tmp_path / "plain")
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        "plain": "not ours",
        "pipe": "not a regular",
        "none": "is missing",
        ".": "not a regular",
    }.items():
        with pytest.raises(StoreError, match=message):
            load_tensors(tmp_path / name)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"x": torch.zeros(2, dtype=torch.complex64)}, {}, "got torch.complex64; convert it"),
        ({"x": 3}, {}, "must map names to tensors, got 'x': int"),
        ({3: torch.zeros(1)}, {}, "must map names to tensors, got 3"),
        ({"__metadata__": torch.zeros(1)}, {}, "must map names"),
        ({"\ud800": torch.zeros(1)}, {}, "must map names"),
        ({}, {"loss": float("nan")}, "metadata must be JSON"),
        ({}, {"path": object()}, "metadata must be JSON"),
    ],
)
def test_refuses_to_save(file, tensors, metadata, message):
    before = file.read_bytes()
    with pytest.raises(StoreError, match=message):
        save_tensors(file, tensors, metadata)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_a_header_that_no_reader_takes_is_not_written(file, monkeypatch):
    most, before = tensor_file._MOST_HEADER, file.read_bytes()
    for length, said in ((most, "(?i)invalid ?header ?length"), (most + 1, "(?i)header ?too ?large")):
        file.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(StoreError, match=said):
            load_tensors(file)
    file.write_bytes(before)
    monkeypatch.setattr(tensor_file, "_MOST_HEADER", 1000)
    with pytest.raises(StoreError, match="names of tensors must take at most 1,000 bytes, got 1,"):
        save_tensors(file, example(), {"text": "x" * 1000})
    assert file.read_bytes() == before


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file(file, step, monkeypatch):
    before = file.read_bytes()

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="no space"):
        save_tensors(file, {"x": torch.ones(3)})
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_a_draft_that_is_swept_before_it_is_locked_is_made_again(file, monkeypatch):
    lock, swept = atomic._try_lock, []

    def late(draft):
        if not swept:  # another process sweeps between open and lock
            swept.append(draft.name)
            os.unlink(draft.name)
        return lock(draft)

    monkeypatch.setattr(atomic, "_try_lock", late)
    with temporary(file.parent) as draft:
        assert os.path.exists(draft.name)
        assert draft.name not in swept
    assert os.listdir(file.parent) == [file.name]


def test_a_draft_in_use_stays_where_only_what_can_be_written_can_be_locked(file, monkeypatch):
    lock = fcntl.flock

    def network_lock(handle, how):
        if not handle.writable():
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", network_lock)
    with temporary(file.parent) as busy:
        sweep_temporary(file.parent)
        assert os.path.exists(busy.name)


def test_neither_way_is_a_second_copy_in_memory(tmp_path):
    tensors = {"a": torch.zeros(1 << 20), "b": torch.zeros(1 << 20)}
    tracemalloc.start()
    try:
        save_tensors(tmp_path / "a", tensors)
        load_tensors(tmp_path / "a")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 22  # bytes of one of the two


def test_leftovers_go_and_the_files_of_others_stay(file):
    ours = file.parent / ".pcl-0123456789abcdef.tmp"
    others = [
        file.parent / name for name in ("x.tmp", ".pcl-notes.tmp", ".pcl-0123456789abcdef.tmp.bak", "y.safetensors")
    ]
    for path in [ours, *others]:
        path.write_text("mine")
    with temporary(file.parent) as busy:  # another process, in the middle of a save
        save_tensors(file, example())
        assert os.path.exists(busy.name)
    assert not ours.exists()
    assert all(path.exists() for path in others)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
        save_tensors(tmp_path / "a", example())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError("it says all"), OSError(errno.ENOSPC, "full", "there")], ids=str)
def test_an_error_that_names_a_file_or_has_a_text_of_its_own_keeps_it(tmp_path, error):
    text = str(error)
    with pytest.raises(OSError, match=text.replace("[", r"\[")), temporary(tmp_path):
        raise error
    assert str(error) == text


def test_what_cannot_be_read_says_so(file, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(type(file), "open", refuse)
    with pytest.raises(StoreError, match=r"cannot be read \(.*Permission denied.*\); give this user permission"):
        load_tensors(file)
