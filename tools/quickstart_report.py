#!/usr/bin/env python
"""What examples/quickstart.sh shows at its end: the before/after table and the reward curve. The logic is in megatron_dlm/evaluation/report.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_dlm.config.errors import UserError
from megatron_dlm.evaluation.report import minutes_of, quickstart_table, reward_curve


def main(argv: list[str]) -> int:
    try:
        if argv[:1] == ["minutes"] and len(argv) == 2:
            print(f"{minutes_of(Path(argv[1])):.3f}")
        elif argv[:1] == ["report"] and len(argv) == 2:
            print(quickstart_table(Path(argv[1])))
            print(f"Reward curve: {reward_curve(Path(argv[1]) / 'tracerl.jsonl', Path(argv[1]) / 'reward.png')}")
        else:
            print("usage: quickstart_report.py minutes METRICS.jsonl | report FOLDER", file=sys.stderr)
            return 2
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
