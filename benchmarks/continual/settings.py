"""Every choice of the comparison in one place: budget, readouts, and the tuning grid of each method.

A grid is searched on the valid users of each fold, with the first seed; what wins is used for every seed of that fold.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from pcl_ext.model import MemoryConfig
from pcl_ext.train import LearnConfig, PretrainConfig

STOPS = ("mixed", "metric", "loss")


@dataclass(frozen=True)
class Budget:
    """What every method has of training, the same for all.

    Args:
        pretrain_epochs, epochs: at most this many passes over the train users, for T1 and for each later task
        retrain_epochs: of T1 for a method that has to mark its part of the pretrained backbone (HAT, CONURE, TERACON),
            and of a task after pruning
        patience: epochs without a better value before training ends; the best epoch is kept
        stop: what is watched on the valid users: the reported metric, the loss, or mixed: the metric of items tasks and
            the loss of label tasks, as `learn_task` has it, but that it goes by the loss where metrics tie only
        dim, num_layers, max_len: of the backbone
        label_share: share of the train users whose labels are known
    """

    pretrain_epochs: int = PretrainConfig.epochs
    epochs: int = LearnConfig.epochs
    retrain_epochs: int = 10
    patience: int = LearnConfig.patience
    stop: str = "mixed"
    dim: int = 64
    num_layers: int = 2
    max_len: int = 200
    label_share: float = 1.0

    def __post_init__(self):
        if self.stop not in STOPS:
            raise ValueError(f"stop must be one of {', '.join(STOPS)}, got {self.stop!r}")


QUICK = Budget(pretrain_epochs=8, epochs=3, retrain_epochs=2, patience=2)


@dataclass(frozen=True)
class Setting:
    """One point of a grid; a method reads the fields that concern it.

    Args:
        readout: what the heads read, a key of READOUTS
        rate: learning rate of what the method trains besides readout and head
        memory_rate, head_rate: of readout and head, as `LearnConfig` has them
        strength: weight of the method's own penalty; of joint training, of the tasks after T1
        dropout: on what the head reads of the backbone's states; None is the package's default
        keep: share of the free weights a task keeps (CONURE)
        memory: what a task of PCL stores; None is the package's default (pcl-eq1: Eq. 1)
    """

    readout: str = "pcl"
    rate: float = 1e-3
    memory_rate: float = LearnConfig.learning_rate
    head_rate: float = LearnConfig.head_rate
    strength: float = 1.0
    dropout: float | None = None
    keep: float = 0.3
    memory: MemoryConfig | None = None


READOUTS = {"last": ("last",), "pooled": ("last", "mean"), "pcl": None}  # None: what the package's default reads
EQ1 = MemoryConfig(placement="tail", prompt_len=20, readout=("last",))


# of a task's memory, what is no readout; a package without one of these parts has nothing to turn off
NO_READOUT = {"placement": "none", "contextual": "none", "low_rank": 0, "members": 1}


def readout_of(setting: Setting) -> MemoryConfig:
    """The memory of a method without prompts: a readout alone."""
    known = {field.name for field in fields(MemoryConfig)}
    config = replace(MemoryConfig(), **{name: off for name, off in NO_READOUT.items() if name in known})
    if READOUTS[setting.readout] is not None:
        config = replace(config, readout=READOUTS[setting.readout])
    return config if setting.dropout is None else replace(config, dropout=setting.dropout)


def _product(**choices: tuple) -> list[Setting]:
    settings = [Setting()]
    for field, values in choices.items():
        settings = [replace(setting, **{field: value}) for setting in settings for value in values]
    return settings


MEMORY_RATES = (LearnConfig.learning_rate, 2e-3)  # the package's own first, as the baselines' memories have it
# A run with one point, and a study, takes the first of each: of the baselines what was the best on the valid users of
# most of online-retail's five folds when the whole grid was searched.
GRID: dict[str, list[Setting]] = {
    "popularity": [Setting()],
    "cheap": [Setting()],
    "probe": _product(readout=("last",), head_rate=(2e-3, 1e-2)),
    "pooled-probe": _product(readout=("pooled",), head_rate=(2e-3, 1e-2)),
    "single": _product(rate=(1e-4, 1e-3)),
    "copy": _product(rate=(3e-5, 3e-4)),
    "fine": _product(rate=(1e-4, 1e-3)),
    "mtl": _product(rate=(1e-4, 1e-3)),
    "mtl-scratch": _product(rate=(PretrainConfig.learning_rate,), strength=(0.1, 0.3)),
    "mmoe": _product(rate=(1e-4, 1e-3)),
    "mmoe-scratch": _product(rate=(PretrainConfig.learning_rate,), strength=(0.1, 0.3)),
    "ewc": _product(rate=(3e-4,), strength=(1e4, 1e2)),
    "lwf": _product(rate=(3e-4,), strength=(4.0, 1.0)),
    "hat": _product(rate=(3e-4, 1e-3), strength=(0.75,)),
    "piggyback": _product(rate=(1e-3, 3e-4)),
    "peterrec": _product(rate=(1e-3, 3e-3)),
    "conure": _product(rate=(1e-3,), keep=(0.6, 0.3)),
    "teracon": _product(rate=(3e-4, 1e-3), strength=(0.7,)),
    "l2p": _product(rate=(3e-3, 1e-2), strength=(0.5,)),
    "dualprompt": _product(rate=(3e-3, 1e-2)),
    "coda": _product(rate=(1e-2, 3e-3), strength=(0.1,)),
    "pcl-eq1": _product(readout=("last",), memory_rate=MEMORY_RATES),
    "pcl": _product(memory_rate=MEMORY_RATES),
    "pcl-no-backbone": _product(memory_rate=MEMORY_RATES),
}
