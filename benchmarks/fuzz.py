"""Damaged and hostile inputs for every reader: how many were read, refused with an error of ours, or anything else.

python benchmarks/fuzz.py                 # the 10,400 inputs of tests/fuzz, and their counts into results/fuzz.json
python benchmarks/fuzz.py --seed 1        # other inputs
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mmkit.storage import write_json

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "fuzz"))

import harness  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", help="only these readers; the counts of the others stay")
    args = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if args.targets else {"targets": {}, "failures": []}
    table: dict[str, dict[str, object]] = kept["targets"]
    failures: list[str] = kept["failures"]
    for target in harness.TARGETS:
        if args.targets and target.name not in args.targets:
            continue
        count = round(args.inputs * target.share)
        outcome = harness.run(target, count, args.seed)
        failures += outcome.failures
        table[target.name] = {
            "inputs": count,
            **{k: outcome.counts[k] for k in ("read", "refused", "failed")},
            "left_behind_or_beyond_limits": len(outcome.failures) - outcome.counts["failed"],
            "slowest_cpu_seconds": round(outcome.slowest, 2),
            "memory_grown_mb": round(outcome.grown / 1e6),
        }
        print(target.name, json.dumps(table[target.name]), flush=True)
    print("\n".join(failures))
    total = sum(int(row["inputs"]) for row in table.values())  # type: ignore[call-overload]
    write_json(RESULTS, {"inputs": total, "seed": args.seed, "failures": failures, "targets": table})


if __name__ == "__main__":
    main()
