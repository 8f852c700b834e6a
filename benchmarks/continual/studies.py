"""The paper's studies on the same harness: `python -m benchmarks.continual.studies STUDY ... --data DIR --out DIR`.

Results go to OUT/studies.jsonl, a line per study, variant, task, fold and seed, apart from those of the comparison.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.continual import records
from benchmarks.continual.__main__ import add_options, asked
from benchmarks.continual.picture import write_growth
from benchmarks.continual.settings import EQ1, GRID
from benchmarks.continual.trial import Trial, make_learner, measure_one, prepare_process, pretrained, teach
from benchmarks.continual.unseen import WAYS, held_out, learn_unseen
from pcl_ext import store
from pcl_ext.model import MemoryConfig
from pcl_ext.model.config import CONTEXTS, PLACEMENTS
from pcl_ext.task import TaskSpec

LENGTHS = (0, 1, 5, 10, 20, 50)
NEWEST = (1, 3, 5, 10)
LABELS = (10, 50, 200)
WIDTHS = (64, 128, 256)
SHARES = (0.1, 0.3, 1.0)
PERMUTATIONS = 6
CHOICE = "none: the first point of the grid, and what the study varies"
READERS = ("copy", "mtl", "mmoe", "ewc", "hat", "conure", "l2p", "dualprompt", "coda")
COMPARED = ("probe", "pooled-probe", "copy", "mtl", "dualprompt", "pcl-eq1", "pcl")


@dataclass(frozen=True)
class Variant:
    """One thing to learn and measure: a trial, and how it is measured.

    kind  teach: the tasks in order; cold: then with short histories; unseen: each task held out in turn
    """

    study: str
    name: str
    trial: Trial
    kind: str = "teach"


def placement(base: Trial) -> Iterator[Variant]:
    """Where the prompt of Eq. (1) goes, and how long it is; its readout is the newest state."""
    for where in PLACEMENTS:
        for length in LENGTHS if where != "none" else ():
            yield _memory("placement", f"{where}-{length}", base, replace(EQ1, placement=where, prompt_len=length))


def contextual(base: Trial) -> Iterator[Variant]:
    """What a task takes from the others, for Eq. (1) and for the package's default beside a tail prompt."""
    for context in CONTEXTS:
        yield _memory("contextual", f"eq1-{context}", base, replace(EQ1, contextual=context))
        memory = replace(MemoryConfig(), placement="tail", contextual=context)
        yield _memory("contextual", f"pcl-{context}", base, memory)


def off(base: Trial) -> Iterator[Variant]:
    """Prompts off: readout and head alone."""
    for name, memory in (("eq1", EQ1), ("pcl", MemoryConfig())):
        yield _memory("off", f"{name}-on", base, memory)
        yield _memory("off", f"{name}-off", base, replace(memory, placement="none", contextual="none"))


def readout(base: Trial) -> Iterator[Variant]:
    """What baselines' heads read: the newest state alone, as published, or means of states too; beside PCL as it is."""
    yield from _methods("readout", base, ("pcl",))
    for name, method in product(("last", "pooled"), READERS):
        setting = replace(GRID[method][0], readout=name)
        yield _variant("readout", f"{method}-{name}", replace(base, method=method, setting=setting))


def order(base: Trial) -> Iterator[Variant]:
    """The tasks in another order: prompts that read earlier ones depend on it, and baselines that share weights."""
    tasks = list(base.order(base.dataset()))
    orders = [tuple(tasks)] + [tuple(random.Random(n).sample(tasks, len(tasks))) for n in range(1, PERMUTATIONS)]
    for number, tasks in enumerate(orders):
        other = replace(base, tasks=tasks)
        yield _memory("order", f"eq1-prompts-{number}", other, replace(EQ1, contextual="prompts"))
        yield from _methods("order", other, ("pcl", "fine", "conure"), f"-{number}")


def cold(base: Trial) -> Iterator[Variant]:
    """Test users of whom only the newest events are known."""
    yield from _methods("cold", base, kind="cold")


def unseen(base: Trial) -> Iterator[Variant]:
    """Each task held out; its prompt is made from the others', its head learns from few labels."""
    yield _variant("unseen", "eq1", replace(base, method="pcl-eq1", setting=GRID["pcl-eq1"][0]), "unseen")


def backbone(base: Trial) -> Iterator[Variant]:
    """The backbone's width."""
    for dim in WIDTHS:
        yield from _methods("backbone", replace(base, budget=replace(base.budget, dim=dim)), suffix=f"-{dim}")


def data(base: Trial) -> Iterator[Variant]:
    """A share of the train users' labels."""
    for share in SHARES:
        other = replace(base, budget=replace(base.budget, label_share=share))
        yield from _methods("data", other, suffix=f"-{share:g}")


STUDIES = {f.__name__: f for f in (placement, contextual, off, readout, order, cold, unseen, backbone, data)}


def _methods(
    study: str, base: Trial, methods: tuple[str, ...] = COMPARED, suffix: str = "", kind: str = "teach"
) -> Iterator[Variant]:
    """Each at the first point of its grid."""
    for method in methods:
        yield _variant(study, method + suffix, replace(base, method=method, setting=GRID[method][0]), kind)


def _memory(study: str, name: str, base: Trial, memory: MemoryConfig) -> Variant:
    setting = replace(GRID["pcl"][0], memory=memory)
    return _variant(study, name, replace(base, method="pcl", setting=setting))


def _variant(study: str, name: str, trial: Trial, kind: str = "teach") -> Variant:
    return Variant(study, name, replace(trial, label=f"{study}-{name}"), kind)


def conduct(variant: Variant, out: Path) -> dict[str, Any]:
    """-> {"identity", "lines"}: the variant's results."""
    trial, found = variant.trial, {}
    dataset = trial.dataset()
    if variant.kind == "unseen" and len(trial.order(dataset)) < 2:
        raise ValueError(f"the study of an unseen task needs two tasks after next, {trial.data} has one")
    learner, identity = make_learner(trial, out), trial.identity()
    how = records.protocol(trial, identity, dataset.name, CHOICE)

    def spec_of(task: str) -> TaskSpec:
        return dataset.task(task).spec

    answer, _ = teach(learner)
    if variant.kind == "unseen":
        for name in trial.order(dataset):
            with held_out(learner.model, name):
                for way, labels in product(WAYS, LABELS):
                    found[f"{variant.name}-{way}-{labels}", name] = learn_unseen(learner, name, way, labels)
        rows = [_line(variant, name, spec_of(task), value, how) for (name, task), value in found.items()]
        return {"identity": identity, "lines": rows}
    rows = [
        {"study": variant.study, "variant": variant.name} | line
        for line in records.lines(trial, answer | {"identity": identity}, dataset.name, CHOICE)
    ]
    if variant.kind == "cold":
        for newest in NEWEST:
            for task in ("next", *trial.order(dataset)):
                value = measure_one(learner, task, newest=newest)
                rows.append(_line(variant, f"{variant.name}-{newest}", spec_of(task), value, how))
    return {"identity": identity, "lines": rows}


def _line(variant: Variant, name: str, spec: TaskSpec, value: float, how: dict[str, Any]) -> dict[str, Any]:
    trial = variant.trial
    line = {"study": variant.study, "variant": name, "method": trial.method, "task": spec.name, "fold": trial.fold}
    return line | {"seed": trial.seed, "metric": spec.metric, "value": value, "protocol": how}


def _work(variant: Variant, out: Path) -> dict[str, Any] | None:
    prepare_process()
    if variant.kind == "pretrain":
        pretrained(variant.trial, out)
        return None
    records.save_trial(out, variant.trial, conduct(variant, out), {})
    return None


def collect(variants: list[Variant], out: Path) -> None:
    """What is done of these variants into studies.jsonl, in place of what it had of the same studies, folds and
    seeds; where nothing is done yet it keeps what it had."""
    path = out / "studies.jsonl"
    answers = [(variant, records.load_trial(out, variant.trial)) for variant in variants]
    done = [(variant, answer) for variant, answer in answers if answer is not None]
    ours = {(variant.study, variant.trial.fold, variant.trial.seed) for variant, _ in done}
    others = [line for line in records.read_lines(path) if (line["study"], line["fold"], line["seed"]) not in ours]
    found = [line for _, answer in done for line in answer["lines"]]
    records.write(path, "".join(json.dumps(line) + "\n" for line in others + found).encode())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.continual.studies", description=__doc__)
    parser.add_argument("studies", nargs="+", choices=STUDIES, metavar="STUDY", help=", ".join(STUDIES))
    add_options(parser)
    options = parser.parse_args(arguments)
    folds, seeds, budget = asked(options)
    variants = [
        variant
        for fold, path in folds.items()
        for seed in range(seeds)
        for study in options.studies
        for variant in STUDIES[study](Trial("pcl", path, fold, seed, 0, budget))
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    with store.lock(options.out):
        run(variants, options.out, options.jobs)
        print(*filter(None, (options.out / "studies.jsonl", write_growth(options.out))), sep="\n")


def run(variants: list[Variant], out: Path, jobs: int) -> None:
    """Do what is missing, then write studies.jsonl; a variant that fails stops the run, and what is done stays."""
    missing = [variant for variant in variants if records.load_trial(out, variant.trial) is None]
    backbones = {variant.trial.backbone(out): replace(variant, kind="pretrain") for variant in missing}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for stage in (list(backbones.values()), missing):
                futures = [pool.submit(_work, variant, out) for variant in stage]
                for future in tqdm(as_completed(futures), total=len(futures), unit="variant"):
                    future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            collect(variants, out)


if __name__ == "__main__":
    main()
