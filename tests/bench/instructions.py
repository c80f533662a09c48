"""Counts the instructions and the allocations of one message and of one call,
and fails where they are more than a bound: a guard against what creeps in
unseen. Needs valgrind.

    cargo build --release --example measure && python3 tests/bench/instructions.py
"""

import pathlib
import re
import subprocess
import sys

# Of instructions what was counted when the bound was set last, and a sixth: a
# little depends on the processor, through the C library. Allocations are
# exact. A call allocates its answer, and twice what the server has once for a
# connection.
BOUNDS = {"wire": (2_500, 0), "shared": (7_600, 3), "request": (10_800, 3)}
COUNTS = {"wire": (2_000, 12_000), "shared": (1_000, 6_000), "request": (1_000, 6_000)}

root = pathlib.Path(__file__).resolve().parents[2]
program = root / "target/release/examples/measure"

INSTRUCTIONS = (["--tool=callgrind", "--callgrind-out-file=/dev/null"], r"Collected : (\d+)")
ALLOCATIONS = (["--tool=dhat", "--dhat-out-file=/dev/null"], r"Total: .* in ([\d,]+) blocks")


def count(counter, what, times):
    """Of the whole run, what the guest does included."""
    arguments, pattern = counter
    run = subprocess.run(["valgrind", *arguments, program, "instructions", what, str(times)], capture_output=True, text=True)
    found = re.search(pattern, run.stderr)
    if run.returncode or not found:
        sys.exit(f"{what}: valgrind failed:\n{run.stderr[-2000:]}")
    return int(found.group(1).replace(",", ""))


failed = False
for what in ("request", "shared"):
    count(INSTRUCTIONS, what, 1)  # so that the component is compiled
for what, (few, many) in COUNTS.items():
    for counter, name, bound in zip((INSTRUCTIONS, ALLOCATIONS), ("instructions", "allocations"), BOUNDS[what]):
        each = (count(counter, what, many) - count(counter, what, few)) / (many - few)
        print(f"{what}: {each:.0f} {name} each, bound {bound}")
        failed |= round(each) > bound
sys.exit(1 if failed else 0)
