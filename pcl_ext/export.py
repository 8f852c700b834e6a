"""One task of a run as files that need nothing of this package: torch.export, AOTInductor, ONNX."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcl_ext.batch import PackedBatch
from pcl_ext.model import Task, UserModel
from pcl_ext.model.catalogue import SEEN_SCORE
from pcl_ext.model.memories import ItemMemory, LastState, LearnedPool, MeanStates, Memory
from pcl_ext.store.atomic import sweep_temporary, write_file

_LOG = logging.getLogger(__name__)

FORMATS = ("program", "package", "onnx")
RTOL, ATOL = 1.3e-6, 1e-5  # what torch.testing allows float32
_ONNX_PACKAGES = ("onnx", "onnxscript")


class PlainModel(nn.Module):
    """A closed task in plain PyTorch on padded histories: what is exported, and what `model(batch, task)` gives.

    items [B, L] int64, oldest first -> output [B, C] (items: a column per item of the catalogue; classes: logits) or
    [B] (binary: logit; regression: value), float32. An id outside 1..V is no event, wherever it stands: pad with 0.
    The newest max_len events count, all of them for an item memory and for what an items task ranks last. ValueError
    for a backbone or a readout that has no plain form.
    """

    def __init__(self, model: UserModel, task: str):
        super().__init__()
        part = model.task(task)
        if not part.closed or not model.backbone_frozen:
            raise ValueError(f"task {task!r} must be closed to be exported: freeze_backbone(), freeze_task({task!r})")
        config = model.backbone.config
        if not config.counts_from_end:
            raise ValueError(
                "a backbone of kind='transformer' with positions='learned_from_end' can be exported, got "
                f"kind={config.kind!r} with positions={config.positions!r}"
            )
        self.backbone, self.part, self.readouts = model.backbone, part, _readouts(part)
        self.register_buffer("tail", part.tail())
        self.has_prefix = part.has_prefix
        if self.has_prefix:
            kept = part.layer_prefix(model.backbone)
            self.register_buffer("keys", torch.stack(list(kept.keys)).transpose(1, 2).contiguous())  # [layers, H, M, d]
            self.register_buffer("values", torch.stack(list(kept.values)).transpose(1, 2).contiguous())

    def forward(self, items: Tensor) -> Tensor:
        config, table = self.backbone.config, self.backbone.table
        # a column that is no event: a block of length 0, of new users alone, ends a compiled package's process
        items = torch.cat([items.new_zeros(items.shape[0], 1), items], 1)
        known = (items >= 1) & (items <= config.num_items)
        newer = known.long().flip(1).cumsum(1).flip(1) - known.long()  # events between each and the history's end
        used = known & (newer < config.max_len)
        held, items = torch.where(known, items, 0), torch.where(used, items, 0)
        states = self._states(items, newer, used)
        newest = (states[-1] * (used & (newer == 0))[:, :, None]).sum(1)
        features = torch.cat([read(states, items, used, newest, held) for read in self.readouts], 1)
        features = (features - self.part.shift) * self.part.scale
        if self.part.spec.kind == "items":
            return self._item_scores(features, newest, states[-1], held if self.part.repeats is None else items, table)
        output, unit = self.part.head(features), self.part.head.unit
        return output if self.part.spec.kind == "classes" else output[:, 0] * unit[1] + unit[0]

    def _states(self, items: Tensor, newer: Tensor, used: Tensor) -> list[Tensor]:
        """num_layers + 1 tensors [B, L, D]; rows that are no event hold numbers that nothing reads."""
        backbone = self.backbone
        x = F.embedding(items, backbone.table) + F.embedding(torch.where(used, newer, 0), backbone.position)
        if self.tail is not None:
            length = len(self.tail)
            row = torch.where(used & (newer < length), length - 1 - newer, length)
            x = x + F.embedding(row, torch.cat([self.tail, torch.zeros_like(self.tail[:1])]))
        place = torch.arange(items.shape[1], device=items.device)
        mask = used[:, None, :] & (place[:, None] >= place) | (place[:, None] == place)  # itself: never no key at all
        if self.has_prefix:
            mask = F.pad(mask, (self.keys.shape[2], 0), value=True)
        states = [x]
        for depth, layer in enumerate(backbone.layers):
            q, k, v = layer.qkv(layer.norm_attention(x)).unflatten(2, (3, *layer.heads)).permute(2, 0, 3, 1, 4)
            if self.has_prefix:
                k, v = (
                    torch.cat([shared[depth][None].expand(items.shape[0], -1, -1, -1), own], 2)
                    for shared, own in ((self.keys, k), (self.values, v))
                )
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
            x = x + layer.out(attended.transpose(1, 2).flatten(2))
            x = x + layer.ffn_out(F.gelu(layer.ffn_in(layer.norm_ffn(x))))
            states.append(x)
        states[-1] = backbone.norm(x)
        return states

    def _item_scores(self, features, newest, last, items, table) -> Tensor:
        part = self.part
        rows = table[part.catalogue] if part.tied else part.head.rows
        scores = F.linear(part.head.queries(features, newest), rows, part.head.bias)
        columns = part.ranked.column_of[items]
        columns = torch.where(columns < 0, len(part.catalogue), columns)  # one more, for what is not listed
        scores = F.pad(scores, (0, 1))
        if part.repeats is None:
            scores = scores.scatter(1, columns, SEEN_SCORE)
        else:
            scores = scores.scatter_add(1, columns, part.repeats.vote(last)[:, :, 0])
        return scores[:, :-1]


def _read_last(memory: Memory) -> Callable:
    return lambda states, items, used, newest, held: newest


def _read_mean(memory: Memory) -> Callable:
    def read(states, items, used, newest, held):
        count = used.sum(1, keepdim=True).to(newest.dtype)
        means = [(states[depth] * used[:, :, None]).sum(1) / count.clamp_min(1) for depth in memory.depths]
        return torch.cat([*means, count.log1p()], 1)

    return read


def _read_pooled(memory: Memory) -> Callable:
    def read(states, items, used, newest, held):
        count = used.sum(1, keepdim=True).to(newest.dtype)
        units = F.gelu(memory.linear(torch.cat(states[:2], 2)))
        return (units * used[:, :, None]).sum(1) / count.clamp_min(1)

    return read


def _read_item_memory(memory: Memory) -> Callable:
    table = memory.item_table()

    def read(states, items, used, newest, held):
        events = held if memory.whole else items
        count = (events > 0).sum(1, keepdim=True).to(newest.dtype)
        return (F.embedding(events, table) * (events > 0)[:, :, None]).sum(1) * count.clamp_min(1).rsqrt()

    return read


_READOUTS = {
    LastState: _read_last,
    MeanStates: _read_mean,
    LearnedPool: _read_pooled,
    ItemMemory: _read_item_memory,
}


def _readouts(part: Task) -> list[Callable]:
    read = {name: memory for name, memory in part.memories.items() if memory.num_features}
    for name, memory in part.memories.items():
        if type(memory) not in _READOUTS and name not in ("tail", "prefix", "layers"):
            raise ValueError(f"task {part.spec.name!r} reads {name}, which cannot be exported yet")
    return [_READOUTS[type(memory)](memory) for memory in read.values()]


def export(
    model: UserModel, task: str, out: str | Path, formats: Sequence[str] | None = None
) -> tuple[dict[str, Path], dict[str, str]]:
    """Write a task of a model into the folder `out`; -> the file of each format, and why others were left out.

    program  <task>.program.pt2, for torch.export.load
    package  <task>.pt2, compiled by AOTInductor for this processor, for Python and C++; needs a C++ compiler
    onnx     <task>.onnx; needs the extra `export`
    <task>.json beside them says what goes in and what comes out. Left out, `formats` is all that can be made here; one
    that is named and cannot be raises ImportError or ValueError. Each file is compared with the model before it stays.
    ValueError where torch fails to make one, or the model is not on the CPU, OSError where the disk refuses.
    """
    if model.device.type != "cpu":
        raise ValueError(f"a model is exported from the CPU, this one is on {model.device}; model.cpu() moves it there")
    unknown = [name for name in formats or () if name not in FORMATS]
    if unknown:
        raise ValueError(f"formats must be among {', '.join(FORMATS)}, got {', '.join(unknown)}")
    missing = {name: why for name in FORMATS if (why := _why_not(name))}
    for name in formats or ():
        if name in missing:
            raise ImportError(missing[name])
    plain, out, files = PlainModel(model, task).eval(), Path(out), {}
    out.mkdir(parents=True, exist_ok=True)
    sweep_temporary(out)
    with _quiet(), torch.no_grad():
        for name in formats or [name for name in FORMATS if name not in missing]:
            suffix, write = _WRITERS[name]
            _LOG.info("writing the %s of task %s", name, task)
            try:
                data, run = write(plain)
            except RuntimeError as error:
                raise ValueError(f"the {name} of task {task!r} cannot be made: {error!s:.1000}") from error
            _check(model, task, name, run)
            files[name] = out / f"{task}{suffix}"
            write_file(files[name], data)
        write_file(out / f"{task}.json", (json.dumps(_facts(model, task), indent=1) + "\n").encode())
    return files, {} if formats else missing


def _why_not(name: str) -> str | None:
    from importlib.util import find_spec
    from shutil import which

    if name == "package" and not (which("g++") or which("clang++")):
        return "the format package needs a C++ compiler, g++ or clang++"
    absent = [package for package in _ONNX_PACKAGES if find_spec(package) is None]
    if name == "onnx" and absent:
        return f"the format onnx needs {', '.join(absent)}: pip install '.[export]' in the sources of pcl_ext"
    return None


def _example() -> Tensor:
    return torch.tensor([[1, 1, 1], [1, 0, 0]])


def _program(plain: PlainModel) -> torch.export.ExportedProgram:
    shapes = {"items": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    return torch.export.export(plain, (_example(),), dynamic_shapes=shapes)


# Each gives a file's content, and what runs it. Made in memory: on a full disk torch's own writer ends the process.


def _write_program(plain: PlainModel) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    buffer = io.BytesIO()
    torch.export.save(_program(plain), buffer)
    return buffer.getvalue(), torch.export.load(buffer).module()


def _write_package(plain: PlainModel) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    buffer = io.BytesIO()
    torch._inductor.aoti_compile_and_package(_program(plain), package_path=buffer)
    return buffer.getvalue(), torch._inductor.aoti_load_package(buffer)


def _write_onnx(plain: PlainModel) -> tuple[bytes, Callable[[Tensor], Tensor] | None]:
    shapes = {"items": {0: "batch", 1: "length"}}
    names = {"input_names": ["items"], "output_names": ["output"], "dynamic_shapes": shapes}
    program = torch.onnx.export(plain, (_example(),), dynamo=True, external_data=False, verbose=False, **names)
    data = program.model_proto.SerializeToString()
    try:
        import onnxruntime
    except ImportError:  # it runs elsewhere
        return data, None
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda items: torch.from_numpy(session.run(None, {"items": items.numpy()})[0])


_WRITERS = {
    "program": (".program.pt2", _write_program),
    "package": (".pt2", _write_package),
    "onnx": (".onnx", _write_onnx),
}


def _check(model: UserModel, task: str, name: str, run: Callable[[Tensor], Tensor] | None) -> None:
    """What was written answers as the model does: empty, short and long histories, unknown ids among them."""
    config, generator = model.backbone.config, torch.Generator().manual_seed(0)
    lengths = [0, 1, 2, config.max_len // 2, config.max_len, config.max_len + 3]
    histories = [torch.randint(0, config.num_items + 2, (n,), generator=generator) for n in lengths]
    blocks = [histories, [histories[0]] * 2, [histories[1]]]  # of length 0, and a single event
    try:
        for block in blocks if run is not None else []:
            batch = PackedBatch.from_lists(block, num_items=config.num_items, max_len=config.max_len)
            got, want = run(nn.utils.rnn.pad_sequence(block, batch_first=True)), model(batch.to(model.device), task)
            torch.testing.assert_close(got, want, rtol=RTOL, atol=ATOL * _unit(model.task(task)))
    except AssertionError as error:
        raise ValueError(f"the {name} of task {task!r} does not answer as the run and is not kept: {error}") from error


def _unit(part: Task) -> float:
    """What a step of 1 in the head's output is in the task's: the deviation of a regression's targets."""
    return float(part.head.unit[1]) if part.spec.kind == "regression" else 1.0


def _facts(model: UserModel, task: str) -> dict[str, Any]:
    config, spec = model.backbone.config, model.task(task).spec
    shape = "[batch]" if spec.kind in ("binary", "regression") else f"[batch, {spec.num_outputs(config.num_items)}]"
    meaning = {
        "items": "scores, a column per item of the catalogue (all items: column c is item c + 1)",
        "classes": "logits of the classes, softmax gives probabilities",
        "binary": "logits, sigmoid gives probabilities",
        "regression": "values",
    }
    return {
        "task": spec.to_json(),
        "input": f"items [batch, length] int64: ids 1..{config.num_items}, oldest first; anything else is no event",
        "output": f"{shape} float32: {meaning[spec.kind]}",
        "max_len": config.max_len,
        "torch": torch.__version__,
    }


@contextmanager
def _quiet():
    """Without what the exporters say of packages that have no part in this."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
