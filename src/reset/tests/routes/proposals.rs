//! Routes by way of what came after the first version of the canonical ABI, and
//! of proposals of WebAssembly.

use super::*;

/// What of the canonical ABI came after its first version.
pub(super) fn canonical_newer() -> Vec<Row> {
    let main = owner(
        "2",
        "(func (export \"f\")) (func (export \"begin\") (result i32) (i32.const 0)) (func (export \"cb\") (param i32 i32 i32) (result i32) (i32.const 0))",
        "unreachable",
    );
    [
        ("context.get", "(core func (canon context.get i32 0))"),
        ("context.set", "(core func (canon context.set i32 0))"),
        ("task.return", "(core func (canon task.return (result u32)))"),
        ("task.cancel", "(core func (canon task.cancel))"),
        ("subtask.drop", "(core func (canon subtask.drop))"),
        ("subtask.cancel", "(core func (canon subtask.cancel))"),
        ("waitable-set.new", "(core func (canon waitable-set.new))"),
        ("waitable.join", "(core func (canon waitable.join))"),
        ("backpressure.inc", "(core func (canon backpressure.inc))"),
        ("stream.new", "(type $s (stream u8)) (core func (canon stream.new $s))"),
        ("future.new", "(type $s (future u8)) (core func (canon future.new $s))"),
        ("error-context.new", "(core func (canon error-context.new (memory (core memory $m \"memory\"))))"),
        ("thread.index", "(core func (canon thread.index))"),
        ("thread.yield", "(core func (canon thread.yield))"),
        ("thread.available_parallelism", "(core func (canon thread.available_parallelism))"),
        ("thread.spawn-ref", "(core type $t (shared (func (param i32)))) (core func (canon thread.spawn-ref $t))"),
        ("an asynchronous lift", "(func async (canon lift (core func $m \"f\") async))"),
        ("an asynchronous lift with a callback", "(func async (result u32) (canon lift (core func $m \"begin\") async (callback (core func $m \"cb\"))))"),
        ("an asynchronous lower", "(import \"get\" (func $g async)) (core func (canon lower (func $g) async))"),
        ("an asynchronous type", "(import \"get\" (func $g async))"),
        ("a stream as a parameter", "(import \"get\" (func $g (param \"x\" (stream u8))))"),
        ("a map as a parameter", "(import \"get\" (func $g (param \"x\" (map string u8))))"),
        ("a list of a fixed length", "(import \"get\" (func $g (param \"x\" (list u8 4))))"),
    ]
    .into_iter()
    .map(|(name, inside)| row(name, format!("(component {main} {inside})"), Refused("require")))
    .collect()
}

/// Proposals of WebAssembly that the engine may take or not.
pub(super) fn proposals() -> Vec<Row> {
    let shared = "(memory $s 1 1 shared)";
    let mut rows: Vec<_> = [
        ("a shared memory", shared, "(i32.const 1)", "threads"),
        ("an atomic store", "", "(i32.atomic.store (i32.const 8) (local.get $x)) (i32.const 1)", "threads"),
        ("an atomic store of a byte", "", "(i64.atomic.store8 (i32.const 8) (i64.const 1)) (i32.const 1)", "threads"),
        ("an atomic addition", "", "(i32.atomic.rmw.add (i32.const 8) (local.get $x))", "threads"),
        ("an atomic exchange", "", "(i32.atomic.rmw.xchg (i32.const 8) (local.get $x))", "threads"),
        ("an atomic comparison", "", "(i32.atomic.rmw.cmpxchg (i32.const 8) (i32.const 0) (local.get $x))", "threads"),
        ("an atomic notification", "", "(memory.atomic.notify (i32.const 8) (local.get $x))", "threads"),
        ("an atomic wait", "", "(memory.atomic.wait32 (i32.const 8) (local.get $x) (i64.const 1))", "threads"),
        ("a memory of 64 bits", "(memory $s i64 1)", "(i32.const 1)", "memory64"),
        ("a table of 64 bits", "(table $s i64 1 funcref)", "(i32.const 1)", "memory64"),
        ("pages of a byte", "(memory $s 1 2 (pagesize 1))", "(i32.const 1)", "custom page sizes"),
        ("a structure", "(type $p (struct (field (mut i32))))", "(struct.get $p 0 (struct.new $p (local.get $x)))", "gc types"),
        ("an array", "(type $p (array (mut i32)))", "(array.len (array.new $p (local.get $x) (local.get $x)))", "gc types"),
        ("a table of externref", "(table $s 1 externref)", "(i32.const 1)", "gc types"),
        ("an exception", "(tag $e (param i32)) (func $f (throw $e (i32.const 1)))", "(i32.const 1)", "exceptions"),
        ("catching an exception", "(tag $e)", "(block $b (try_table (catch $e $b))) (i32.const 1)", "exceptions"),
        ("catching an exception as before", "(tag $e)", "try catch $e end (i32.const 1)", "exceptions"),
        ("a continuation", "(type $f (func)) (type $c (cont $f)) (func $g) (elem declare func $g)", "(drop (cont.new $c (ref.func $g))) (i32.const 1)", "stack switching"),
        ("wide arithmetic", "", "(i64.add128 (i64.const 1) (i64.const 2) (i64.const 3) (i64.const 4)) drop drop (i32.const 1)", "wide arithmetic"),
        ("relaxed lanes", "", "(i32x4.extract_lane 0 (i32x4.relaxed_trunc_f32x4_s (v128.const i32x4 1 2 3 4)))", "relaxed SIMD"),
    ]
    .map(|(name, inside, run, words)| row(name, alone(inside, run), Refused(words)))
    .into();
    let small = "(i32.store (i32.const 8) (i31.get_s (ref.i31 (local.get $x))))";
    rows.push(row(
        "a small number as a reference",
        alone("", &old("(i32.load (i32.const 8))", small)),
        Fresh("gc support is not enabled"),
    ));
    let second = "(memory $s 1)";
    for (name, inside, run) in [
        (
            "a second memory",
            second,
            old(
                "(i32.load $s (i32.const 8))",
                "(i32.store $s (i32.const 8) (local.get $x))",
            ),
        ),
        (
            "a second memory that is copied to",
            second,
            old(
                "(i32.load $s (i32.const 8))",
                "(i32.store (i32.const 8) (local.get $x)) (memory.copy $s 0 (i32.const 8) (i32.const 8) (i32.const 4))",
            ),
        ),
        (
            "a second memory that grows",
            "(memory $s 1 4)",
            "(memory.grow $s (i32.const 1))".into(),
        ),
    ] {
        rows.push(row(name, alone(inside, &run), Fresh("multiple memories")));
    }
    for (name, run) in [
        (
            "numbers that saturate",
            "(i32.trunc_sat_f32_u (f32.convert_i32_u (local.get $x)))",
        ),
        ("the sign of a byte", "(i32.extend8_s (local.get $x))"),
        (
            "several results of a block",
            "(block (result i32 i32) (local.get $x) (local.get $x)) i32.add",
        ),
    ] {
        rows.push(row(
            name,
            alone(
                "",
                &old(
                    "(i32.load (i32.const 8))",
                    &format!("(i32.store (i32.const 8) {run})"),
                ),
            ),
            Reset,
        ));
    }
    rows
}
