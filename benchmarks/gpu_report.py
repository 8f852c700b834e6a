"""What a run of gpu_check says: what was asked for and whether it is met, the machine, every part, all rows."""

from datetime import date

from tables import as_markdown

COLUMNS = ["what", "ms", "% of roofline", "bound by", "best peer", "peer / ours"]
ASKED_AT = "bfloat16, H 4, d 64, 4,096 users, lengths lognormal of mean 100, at most 512, P 16"
ATTENTION, STEP = "prompt_attention, bfloat16, mean 100, d 64", "prompt-tuning step, D 256"
# What is asked for; the row that says; at least so many % of the roofline or, where a peer is named, times as fast.
# Of rows that are bound by copies the roofline is the bandwidth of a copy.
ASKED = [
    ("forward, share of the roofline", f"{ATTENTION}, forward", None, 75),
    ("forward and backward, share of the roofline", f"{ATTENTION}, forward and backward", None, 60),
    ("against varlen attention, forward", f"{ATTENTION}, forward", "varlen", 2),
    ("against varlen attention, forward and backward", f"{ATTENTION}, forward and backward", "varlen", 2),
    ("backward of the prefix alone, share of copy bandwidth", f"{ATTENTION}, backward of the prefix alone", None, 70),
    ("to_padded, share of copy bandwidth", "to_padded, D 256, bfloat16", None, 80),
    ("to_packed, share of copy bandwidth", "to_packed, D 256, bfloat16", None, 80),
    ("embed, share of copy bandwidth", "embed forward, D 256, bfloat16", None, 80),
    ("prompt-tuning step, items, against padded PyTorch, both compiled", f"{STEP}, items", "padded", 4),
    ("prompt-tuning step, label, against padded PyTorch, both compiled", f"{STEP}, label", "padded", 4),
]


def asked(rows: list[dict]) -> list[list]:
    """What was asked for, at least how much, what was measured, and whether that is enough."""
    by_name, lines = {row["what"]: row for row in rows}, []
    for what, name, peer, least in ASKED:
        row, unit = by_name.get(name), "x" if peer else "%"
        if row is None:
            got = None
        elif peer is None:
            got = row["% of roofline"]
        else:
            got = row["peers"][peer] / row["ms"] if peer in row["peers"] else None
        shown = "not measured" if got is None else f"{got:.3g} {unit}"
        lines.append([what, f"{least} {unit}", shown, "no" if got is None or got < least else "yes"])
    return lines


def ran(parts: dict) -> list[list]:
    """The same of what passes or fails, not measured in numbers."""
    lines = []
    for name, part in parts.items():
        if "rows" not in part and name != "compiling ahead":
            code = part["exit code"]
            shown = f"exit code {code}" if isinstance(code, int) else code
            lines.append([name, "passes", shown, "yes" if code == 0 else "no"])
    return lines


def markdown(report: dict) -> str:
    """The whole report, with what failed at the end."""
    parts = report["parts"]
    benchmarks = {name: part for name, part in parts.items() if "rows" in part}
    rows = [row for part in benchmarks.values() for row in part["rows"]]
    rates = next((part["rates"] for part in benchmarks.values() if part["rates"]), {})
    lines = [f"# CUDA kernels on {report['machine']['GPU']}", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    lines += [f"- {name}: {rate / 1e9:.4g} G{'B' if name == 'copy' else 'FLOP'}/s" for name, rate in rates.items()]
    lines += [
        f"- {name}: exit code {part['exit code']}, {part['seconds']} s. {_ending(part)}".rstrip()
        for name, part in parts.items()
    ]
    lines += ["", f"## What is asked for ({ASKED_AT})", ""]
    lines += [as_markdown(["what", "at least", "measured", "met"], [*asked(rows), *ran(parts)]), "", "## All rows", ""]
    lines += [as_markdown(COLUMNS, [[_shown(row[column]) for column in COLUMNS] for row in rows]), ""]
    for name, part in parts.items():
        if part["exit code"] not in (0, "not run"):
            lines += [f"{name} ended with", "", "```", part["output"][-1000:].strip(), "```", ""]
        for failure in part.get("failures", ()):
            lines += [f"{name} failed at {failure.splitlines()[0]}", "", "```", failure[-1500:].strip(), "```", ""]
    return "\n".join(lines) + "\n"


def _ending(part: dict) -> str:
    """What a part says of itself; else the last line of the output of one that has no rows."""
    if "says" in part:
        return part["says"]
    return "" if "rows" in part else (part["output"].strip().splitlines() or [""])[-1]


def _shown(value):
    return "" if value is None else value


def machine() -> dict:
    """What runs here: of this Python, this package and the device."""
    import platform

    import torch

    import pcl_ext
    from pcl_ext import ops

    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, of CUDA {torch.version.cuda}",
        "CUDA kernels": ops.native_status("cuda"),
        "kernels of the CPU": ops.native_status(),
        "pcl_ext": pcl_ext.__version__,
    }
