"""Counts the instructions of one message and of one call, and fails where they
are more than a bound: a guard against what creeps in unseen. Needs valgrind.

    cargo build --release --example instructions && python3 tests/bench/instructions.py
"""

import pathlib
import re
import subprocess
import sys

# What was counted when the bound was set last, and a sixth: a little depends
# on the processor, through the C library.
BOUNDS = {"wire": 4_000, "shared": 7_400, "request": 29_500}
COUNTS = {"wire": (2_000, 12_000), "shared": (1_000, 6_000), "request": (1_000, 6_000)}

root = pathlib.Path(__file__).resolve().parents[2]
program = root / "target/release/examples/instructions"


def count(what, times):
    """Instructions of the whole run, those of the guest among them."""
    valgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    run = subprocess.run(valgrind + [program, what, str(times)], capture_output=True, text=True)
    found = re.search(r"Collected : (\d+)", run.stderr)
    if run.returncode or not found:
        sys.exit(f"{what}: valgrind failed:\n{run.stderr[-2000:]}")
    return int(found.group(1))


failed = False
count("request", 1)  # so that the component is compiled
for what, (few, many) in COUNTS.items():
    each = (count(what, many) - count(what, few)) / (many - few)
    bound = BOUNDS[what]
    print(f"{what}: {each:.0f} instructions each, bound {bound}")
    failed |= each > bound
sys.exit(1 if failed else 0)
