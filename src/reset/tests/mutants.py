#!/usr/bin/env python3
"""Deliberate defects of the rewriter, each of which random modules must find.

    python3 src/reset/tests/mutants.py [NUMBER ...]

Copies the crate, plants one defect at a time, and runs the test
`differential` alone: with generated modules, without the tests written by
hand. Exits 1 where a defect is not found. Takes about ten seconds for each.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

CRATE = pathlib.Path(__file__).resolve().parents[1]
ROOT = CRATE.parents[1]

# File, text, what replaces it. Each text is there once, or the first
# is meant.
MUTANTS = [
    # A width forgotten.
    ("module.rs", "        | Operator::I32Store8 { memarg }\n", ""),
    ("module.rs", "        | Operator::I32Store16 { memarg } =>", "        =>"),
    ("module.rs", "        | Operator::I64Store32 { memarg } =>", "        =>"),
    ("module.rs", "        Operator::F32Store { memarg } => (*memarg, ValType::F32),\n", ""),
    ("module.rs", "        Operator::F64Store { memarg } => (*memarg, ValType::F64),\n", ""),
    ("module.rs", "        | Operator::V128Store8Lane { memarg, .. }\n", ""),
    ("module.rs", "        | Operator::V128Store64Lane { memarg, .. } =>", "        =>"),
    # A bulk instruction forgotten.
    ("module.rs", "            Operator::MemoryFill { .. }\n            |", "           "),
    ("module.rs", "            | Operator::MemoryCopy { .. }\n", ""),
    ("module.rs", "            | Operator::MemoryInit { .. } =>", "            =>"),
    # Marks that are too few, or at the wrong place.
    ("functions.rs", "        if offset > 0 {", "        if offset > 1 << 30 {"),
    ("functions.rs", "const OVERHANG: i32 = ELISION_RANGE as i32 - 1;", "const OVERHANG: i32 = 0;"),
    ("functions.rs", "            .memory_fill(self.cards);", "            .drop()\n            .drop()\n            .drop();"),
    ("functions.rs", "        for address in [ADDRESS, LAST] {", "        for address in [ADDRESS] {"),
    ("functions.rs", "            .i32_const(self.largest_result.cast_signed())", "            .i32_const(1)"),
    ("functions.rs", "            .local_get(LENGTH)\n            .call(self.write_barrier())", "            .i32_const(1)\n            .call(self.write_barrier())"),
    # Marks left out that are needed.
    ("elision.rs", "*first <= offset && offset + size <= first + ELISION_RANGE", "offset + size <= first + ELISION_RANGE"),
    ("elision.rs", "*first <= offset && offset + size <= first + ELISION_RANGE", "*first <= offset && offset + size <= first + 4 * ELISION_RANGE"),
    ("elision.rs", "                self.take(1);\n                self.changes(*local_index);\n            }\n            Operator::LocalTee", "                self.take(1);\n            }\n            Operator::LocalTee"),
    ("elision.rs", "                self.changes(*local_index);\n                self.stack.push(None);", "                self.stack.push(None);"),
    ("elision.rs", "                self.stack.clear();\n                self.marked.clear();", "                self.stack.clear();"),
    ("elision.rs", "            .checked_sub(2)", "            .checked_sub(1)"),
    # What is kept, and what is copied back.
    ("functions.rs", "        for (address, length) in &self.shape.data {", "        for (address, length) in self.shape.data.iter().skip(1) {"),
    ("functions.rs", "            body.global_get(self.kept(index)).global_set(global);", "            if index != 1 {\n                body.global_get(self.kept(index)).global_set(global);\n            }"),
    ("functions.rs", "            .chain(self.pages().map(|pages| (pages, ValType::I32)))", ""),
    ("functions.rs", "            .i32_const(8)\n            .i32_add()", "            .i32_const(16)\n            .i32_add()"),
    ("functions.rs", "        body.memory_size(OWN).memory_size(SAVED).i32_eq().i32_and();\n", ""),
    ("functions.rs", "        body.local_get(LENGTH)\n            .i32_eqz()\n            .if_(BlockType::Empty)\n            .return_()\n            .end();\n", ""),
    # What is put in front of others.
    ("functions.rs", "        after.map_or_else(|| self.in_front_of_import(function), |after| *after)", "        let _ = after;\n        self.in_front_of_import(function)"),
    ("functions.rs", "        *self.before.get(&function).unwrap_or(&function)", "        function"),
    ("functions.rs", "        body.local_get(BEFORE).end();\n        function", "        body.local_get(AFTER).end();\n        function"),
]


def main():
    wanted = [int(number) for number in sys.argv[1:]] or range(len(MUTANTS))
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        # With the time of now: what is built goes by that.
        shutil.copytree(CRATE, copy / "src/reset", copy_function=shutil.copyfile)
        shutil.copy(ROOT / "Cargo.lock", copy)
        (copy / "Cargo.toml").write_text(
            '[workspace]\nresolver = "3"\nmembers = ["src/reset"]\n[profile.release]\nlto = "off"\ndebug = false\n')
        environment = {**os.environ, "CARGO_TARGET_DIR": str(ROOT / "target/mutants"), "RUST_BACKTRACE": "0",
                       "MB_RESET_MODULES": "3000"}
        run = ["cargo", "test", "--quiet", "--release", "differential"]
        for number in [None, *wanted]:
            if number is not None:
                file, text, instead = MUTANTS[number]
                path = copy / "src/reset" / file
                original = path.read_text()
                if text not in original:
                    sys.exit(f"{number}: {file} does not hold {text!r} any more")
                path.write_text(original.replace(text, instead, 1))
            built = subprocess.run([*run, "--no-run"], cwd=copy, env=environment, capture_output=True, text=True)
            if built.returncode:
                sys.exit(f"{number}: it does not compile:\n{built.stderr[-3000:]}")
            tested = subprocess.run(run, cwd=copy, env=environment, capture_output=True, text=True)
            found = next((line for line in tested.stdout.splitlines() if line.startswith("seed")), "")
            if number is None:
                if tested.returncode:
                    sys.exit(f"it fails without a defect:\n{tested.stdout[-3000:]}")
                continue
            path.write_text(original)
            print(f"{number:3} {'found' if tested.returncode else 'SURVIVED'}  {file}: {text.strip().splitlines()[0]}  {found}",
                  flush=True)
            if not tested.returncode:
                survived.append(number)
    print(f"{len(list(wanted)) - len(survived)} of {len(list(wanted))} found")
    sys.exit(1 if survived else 0)


main()
