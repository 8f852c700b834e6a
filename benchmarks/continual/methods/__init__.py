"""The methods by name, one small file each."""

from benchmarks.continual.methods.coda import Coda
from benchmarks.continual.methods.conure import Conure
from benchmarks.continual.methods.copies import Copy, Single
from benchmarks.continual.methods.dualprompt import DualPrompt
from benchmarks.continual.methods.ewc import Ewc
from benchmarks.continual.methods.fine import Fine
from benchmarks.continual.methods.hat import Hat
from benchmarks.continual.methods.joint import Joint, JointScratch, Mmoe, MmoeScratch
from benchmarks.continual.methods.l2p import L2p
from benchmarks.continual.methods.lwf import Lwf
from benchmarks.continual.methods.pcl import Pcl, PclEq1, PclNoBackbone
from benchmarks.continual.methods.peterrec import PeterRec
from benchmarks.continual.methods.piggyback import Piggyback
from benchmarks.continual.methods.probe import Probe
from benchmarks.continual.methods.references import REFERENCES
from benchmarks.continual.methods.teracon import Teracon

LEARNERS = {
    "probe": Probe,
    "pooled-probe": Probe,
    "single": Single,
    "copy": Copy,
    "fine": Fine,
    "mtl": Joint,
    "mtl-scratch": JointScratch,
    "mmoe": Mmoe,
    "mmoe-scratch": MmoeScratch,
    "ewc": Ewc,
    "lwf": Lwf,
    "hat": Hat,
    "piggyback": Piggyback,
    "peterrec": PeterRec,
    "conure": Conure,
    "teracon": Teracon,
    "l2p": L2p,
    "dualprompt": DualPrompt,
    "coda": Coda,
    "pcl-eq1": PclEq1,
    "pcl": Pcl,
    "pcl-no-backbone": PclNoBackbone,
}
NAMES = (*REFERENCES, *LEARNERS)
MULTI_TASK = ("mtl", "mtl-scratch", "mmoe", "mmoe-scratch")
CONTINUAL = ("fine", "ewc", "lwf", "hat", "piggyback", "peterrec", "conure", "teracon", "l2p", "dualprompt", "coda")

__all__ = ["CONTINUAL", "LEARNERS", "MULTI_TASK", "NAMES", "REFERENCES"]
