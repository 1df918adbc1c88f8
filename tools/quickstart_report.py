#!/usr/bin/env python
"""What examples/quickstart.sh shows at its end: a table of its three models on held-out problems, and the reward curve.

quickstart_report.py minutes FOLDER     how long TraceRL trained
quickstart_report.py report FOLDER      the table; reward.png
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from megatron_dlm.config.errors import UserError
from megatron_dlm.evaluation.report import minutes_of, read_metrics, reward_curve, table

STAGES = {"sft": "SFT", "sft-continued": "SFT, as long as TraceRL", "tracerl": "SFT, then TraceRL"}


def report(folder: Path) -> str:
    """The table of the three models, and what each gained over the first, in points."""
    metrics = {stage: read_metrics(folder / f"eval-{stage}.jsonl")[-1] for stage in STAGES}
    ways = sorted({key.split("/")[1] for key in metrics["sft"] if key.startswith("eval/")})
    lines = [table([(title, metrics[stage]) for stage, title in STAGES.items()], ways), ""]
    minutes = minutes_of(folder / "tracerl.jsonl")
    for way in ways:
        gain = {
            name: 100 * (metrics[name][f"eval/{way}/accuracy"] - metrics["sft"][f"eval/{way}/accuracy"])
            for name in STAGES
        }
        lines.append(
            f"{way}: {minutes:.1f} minutes of TraceRL {gain['tracerl']:+.1f} points, of more SFT "
            f"{gain['sft-continued']:+.1f} points"
        )
    count = int(metrics["sft"][f"eval/{ways[0]}/responses"])
    lines.append(f"{count} held-out problems, temperature 1.0")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    if len(argv) != 2 or argv[0] not in ("minutes", "report"):
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(argv[1])
    try:
        if argv[0] == "minutes":
            print(f"{minutes_of(folder / 'tracerl.jsonl'):.3f}")
        else:
            print(report(folder))
            print(f"Reward curve: {reward_curve(folder / 'tracerl.jsonl', folder / 'reward.png')}")
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
