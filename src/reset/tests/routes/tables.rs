//! Routes by way of tables, and of modules that share a memory.

use super::*;

pub(super) fn tables_and_calls() -> Vec<Row> {
    const TABLE: &str = "(type $k (func (result i32))) (table $t (export \"t\") 4 funcref)
        (func $one (result i32) (i32.const 1)) (func $two (result i32) (i32.const 2))
        (elem (i32.const 0) $one $two) (elem $e func $two $two) (data $d \"four\")";
    const WRITES: &str = "(type $w (func (param i32))) (table $t (export \"t\") 4 funcref) (elem (i32.const 1) $w)
        (func $w (export \"w\") (param $x i32) (i32.store (i32.const 40000) (local.get $x)))
        (func $tail (param $x i32) (return_call $w (local.get $x)))
        (func $by-table (param $x i32) (return_call_indirect (type $w) (local.get $x) (i32.const 1)))";
    let first = "(call_indirect (type $k) (i32.const 0))";
    let changes = Fresh("it changes its tables");
    let mut rows: Vec<_> = [
        (
            "table.set",
            old(first, "(table.set (i32.const 0) (ref.func $two))"),
            changes,
        ),
        (
            "table.fill",
            old(
                first,
                "(table.fill (i32.const 0) (ref.func $two) (i32.const 3))",
            ),
            changes,
        ),
        (
            "table.copy",
            old(
                first,
                "(table.copy (i32.const 0) (i32.const 1) (i32.const 1))",
            ),
            changes,
        ),
        (
            "table.init",
            old(
                first,
                "(table.init $e (i32.const 0) (i32.const 0) (i32.const 2))",
            ),
            changes,
        ),
        (
            "table.grow",
            old(
                "(table.size $t)",
                "(drop (table.grow (ref.null func) (i32.const 1)))",
            ),
            changes,
        ),
        (
            "table.set to what is not there",
            old(
                "(call_indirect (type $k) (i32.const 1))",
                "(table.set (i32.const 1) (ref.null func))",
            ),
            changes,
        ),
        (
            "data.drop",
            old(
                "(i32.const 1)",
                "(memory.init $d (i32.const 0) (i32.const 0) (i32.const 4)) (data.drop $d)",
            ),
            Fresh("drops segments"),
        ),
        (
            "elem.drop",
            old(
                "(i32.const 1)",
                "(table.init $e (i32.const 0) (i32.const 0) (i32.const 1)) (elem.drop $e)",
            ),
            changes,
        ),
        (
            "elem.drop alone",
            old("(table.size $t)", "(elem.drop $e)"),
            Shape("drops segments"),
        ),
        (
            "reading tables",
            format!(
                "(drop (table.size $t)) (drop (ref.is_null (table.get $t (i32.const 0)))) {}",
                swap(4000)
            ),
            Reset,
        ),
        ("a table that stays", old(first, "(nop)"), Dead),
    ]
    .map(|(name, run, outcome)| row(name, alone(TABLE, &run), outcome))
    .into();
    let call = |write: &str| old("(i32.load (i32.const 40000))", write);
    for (name, write) in [
        ("a call", "(call $w (local.get $x))"),
        (
            "a call by a table",
            "(call_indirect (type $w) (local.get $x) (i32.const 1))",
        ),
        ("a tail call", "(call $tail (local.get $x))"),
        ("a tail call by a table", "(call $by-table (local.get $x))"),
    ] {
        rows.push(row(
            format!("{name} of what writes"),
            alone(WRITES, &call(write)),
            Reset,
        ));
    }
    for (name, segment) in [
        (
            "a segment of expressions",
            "(elem (i32.const 2) funcref (ref.func $w) (ref.null func))",
        ),
        ("a declared segment", "(elem declare func $w)"),
        ("a passive segment", "(elem func $w)"),
        (
            "a second table",
            "(table $u 3 funcref) (elem (table $u) (i32.const 1) func $w)",
        ),
        (
            "a table that begins with a function",
            "(table $u 3 funcref (ref.func $w))",
        ),
        (
            "a table whose place is a global's",
            "(global $at i32 (i32.const 3)) (elem (global.get $at) $w)",
        ),
    ] {
        let run = call("(call_indirect (type $w) (local.get $x) (i32.const 1))");
        let outcome = match name {
            "a table that begins with a function" => Fresh("function-references"),
            "a table whose place is a global's" => Fresh("global.get of locally defined global"),
            _ => Reset,
        };
        rows.push(row(
            name,
            alone(&format!("{WRITES} {segment}"), &run),
            outcome,
        ));
    }
    let run = call("(call_ref $w (local.get $x) (ref.func $w))");
    rows.push(row(
        "call_ref",
        alone(&format!("{WRITES} (elem declare func $w)"), &run),
        Fresh("function references"),
    ));
    let run = call("(call_ref $w (local.get $x) (ref.as_non_null (ref.null $w)))");
    rows.push(row(
        "call_ref of what is not there",
        alone(WRITES, &run),
        Shape("function references"),
    ));

    // What a library puts into the table, or is put there for it.
    let leaves = "(func $leave (export \"leave\") (param $x i32) (i32.store (i32.const 40000) (local.get $x)))";
    let library = |inside: &str| {
        with_library(
            WRITES,
            &format!("(type $w (func (param i32))) {leaves} {inside}"),
            &call("(call_indirect (type $w) (local.get $x) (i32.const 2))"),
        )
    };
    rows.push(row(
        "a library that fills the table",
        library("(import \"env\" \"t\" (table 4 funcref)) (elem (i32.const 2) $leave)").replace(
            &format!("{leaves} (import \"env\" \"t\" (table 4 funcref))"),
            &format!("(import \"env\" \"t\" (table 4 funcref)) {leaves}"),
        ),
        Reset,
    ));
    for (name, segment, outcome) in [
        ("fixups of the table", "(elem (i32.const 1) func $f)", Reset),
        (
            "fixups of the table, computed",
            "(elem (i32.const 1) funcref (ref.func $f))",
            Fresh("filled with what is computed"),
        ),
        (
            "a linker of the table",
            "(import \"m\" \"memory\" (memory 1)) (elem (i32.const 1) func $f)",
            Reset,
        ),
        (
            "a linker of the table, computed",
            "(import \"m\" \"memory\" (memory 1)) (elem (i32.const 1) funcref (ref.func $f))",
            Fresh("filled with what is computed"),
        ),
        (
            "a module that exports the table again",
            "(elem (i32.const 1) func $f) (export \"again\" (table 0))",
            Reset,
        ),
    ] {
        let main = owner(
            "2",
            &WRITES.replace("(elem (i32.const 1) $w)", ""),
            &call("(call_indirect (type $w) (local.get $x) (i32.const 1))"),
        );
        rows.push(row(name, format!(
            "(component {main} (core module $fix (import \"m\" \"t\" (table 4 funcref)) (import \"m\" \"w\" (func $f (param i32))) {segment})
               (core instance (instantiate $fix (with \"m\" (instance $m)))) {RUN})"), outcome));
    }
    for (name, inside, outcome) in [(
        "a table of a module before",
        "(call_indirect (param i32) (local.get $x) (i32.const 0))",
        "a table of another module",
    )]
    .map(|(name, inside, words)| (name, inside, Shape(words)))
    {
        rows.push(row(name, format!(
            "(component (core module $t (table (export \"t\") 2 funcref)) (core instance $t (instantiate $t))
               (core module $main (import \"t\" \"t\" (table 2 funcref)) (memory 2)
                 (func (export \"run\") (param $x i32) (result i32) {inside} (i32.const 1)))
               (core instance $m (instantiate $main (with \"t\" (instance $t)))) {RUN})"), outcome));
    }
    rows.push(row("a table of a module before, filled by the owner", format!(
        "(component (core module $t (table (export \"t\") 2 funcref)) (core instance $t (instantiate $t))
           (core module $main (import \"t\" \"t\" (table 2 funcref)) (memory 2) (elem (i32.const 0) $w)
             (func $w (param $x i32) (i32.store (i32.const 40000) (local.get $x)))
             (func (export \"run\") (param $x i32) (result i32) (local $old i32) {}))
           (core instance $m (instantiate $main (with \"t\" (instance $t)))) {RUN})",
        call("(call_indirect (param i32) (local.get $x) (i32.const 0))")), Fresh("a table of another module")));
    rows
}

/// Several modules that share a memory.
pub(super) fn shared() -> Vec<Row> {
    let byte = |at: u32| format!("(i32.load8_u (i32.const {at}))");
    let grows = "(import \"env\" \"grow\" (func $grow (result i32)))";
    let exports_grow = "(func (export \"grow\") (result i32) (memory.grow (i32.const 1)))";
    let mut rows: Vec<_> = [
        ("a library's store", "", "", swap(40_958), Reset),
        ("a library's elided store", "", "", old(&byte(41_214),
            "(local.set $b (i32.const 40959)) (i32.store8 (local.get $b) (i32.const 0)) (i32.store8 offset=255 (local.get $b) (local.get $x))"), Reset),
        ("a library's lane", "", "", old(&byte(40_965), "(v128.store64_lane 1 (i32.const 40958) (i8x16.splat (local.get $x)))"), Reset),
        ("a library's memory.fill", "", "", old(&byte(50_000), "(memory.fill (i32.const 40000) (local.get $x) (i32.const 20000))"), Reset),
        ("a library's memory.copy", "", "", old(&byte(50_100), "(i32.store8 (i32.const 100) (local.get $x)) (memory.copy (i32.const 50000) (i32.const 0) (i32.const 101))"), Reset),
        ("a library's memory.init", "", "(data $d \"abc\")", old(&byte(40_962), "(memory.init $d (i32.const 40960) (i32.const 0) (i32.const 3))"), Reset),
        ("a library's segment", "", "(data (i32.const 40957) \"beyond\")", swap(40_960), Reset),
        ("a library's segment over that of the owner", "(data (i32.const 40950) \"of the owner\")", "(data (i32.const 40957) \"beyond\")", swap(40_957), Reset),
        ("a library's segment whose place is a global's", "(global (export \"at\") i32 (i32.const 40000))",
         "(import \"env\" \"at\" (global $at i32)) (data (offset (i32.add (global.get $at) (i32.const 957))) \"beyond\")", swap(40_957), Reset),
        ("a library's start", "", "(func $s (i32.store (i32.const 40000) (i32.const 7))) (start $s)", swap(40_000), Reset),
        ("a library's global", "", "(global $g (mut i64) (i64.const 3))", old("(i32.wrap_i64 (global.get $g))", "(global.set $g (i64.extend_i32_u (local.get $x)))"), Reset),
        ("a library's table", "", "(table 2 funcref) (elem (i32.const 0) $w) (func $w (param $x i32) (i32.store (i32.const 40000) (local.get $x)))",
         old("(i32.load (i32.const 40000))", "(call_indirect (param i32) (local.get $x) (i32.const 0))"), Reset),
        ("a library's table that it changes", "", "(table 2 funcref) (elem declare func $lib-run)",
         old("(ref.is_null (table.get 0 (i32.const 1)))", "(table.set 0 (i32.const 1) (ref.func $lib-run))"), Fresh("it changes its tables")),
        ("a library's data.drop", "", "(data $d \"abc\")", old("(i32.const 1)", "(memory.init $d (i32.const 9) (i32.const 0) (i32.const 1)) (data.drop $d)"), Fresh("drops segments")),
        ("growth by a library", "", "", old("(memory.size)", "(drop (memory.grow (i32.const 1)))"), Reset),
        ("growth by the owner for a library", exports_grow, grows, old("(memory.size)", "(drop (call $grow))"), Reset),
        ("a page that a library adds", exports_grow, grows, format!("(drop (memory.grow (i32.const 1))) (drop (call $grow)) {}", swap(3 * 65_536)), Reset),
        ("a library's call of what writes", "(func (export \"w\") (param i32) (i32.store (i32.const 40000) (local.get 0)))",
         "(import \"env\" \"w\" (func $w (param i32)))", old("(i32.load (i32.const 40000))", "(call $w (local.get $x))"), Reset),
        ("a library with the memory twice", "", "(import \"env2\" \"memory\" (memory $again 1))",
         old("(i32.load $again (i32.const 9))", "(i32.store $again (i32.const 9) (local.get $x))"), Fresh("multiple memories")),
        ("a library with a memory of its own", "", "(memory $own 1)",
         old("(i32.load $own (i32.const 9))", "(i32.store $own (i32.const 9) (local.get $x))"), Fresh("multiple memories")),
        ("a library that grows before the owner knows", "", "(func $s (drop (memory.grow (i32.const 3))) (i32.store (i32.const 300000) (i32.const 4))) (start $s)",
         swap(300_000), Reset),
    ]
    .map(|(name, main, library, run, outcome)| {
        // Imports come first.
        row(name, with_library(main, library, &run), outcome)
    })
    .into();

    // A second library, and what stands between it and the memory.
    let library = |run: &str| {
        format!(
        "(core module $lib (import \"env\" \"memory\" (memory 1)) (func (export \"w\") (param $x i32) (i32.store (i32.const 40000) (local.get $x)))
           (func (export \"run\") (param $x i32) (result i32) (local $old i32) {run}))")
    };
    let main = owner(
        "2",
        "(func (export \"init\") (i32.store (i32.const 40000) (i32.const 4)))",
        "unreachable",
    )
    .replace("$m ", "$o ");
    let memory = "(alias core export $o \"memory\" (core memory $memory))";
    for (name, between, given, after, outcome) in [
        ("a library behind a set of items", format!("{memory} (core instance $i (export \"memory\" (memory $memory)))"), "$i", "", Reset),
        ("a library behind two sets of items",
         format!("{memory} (core instance $i (export \"x\" (memory $memory))) (alias core export $i \"x\" (core memory $again)) (core instance $j (export \"memory\" (memory $again)))"),
         "$j", "", Reset),
        ("a library behind a module that passes on",
         "(core module $on (import \"o\" \"memory\" (memory 1)) (export \"memory\" (memory 0))) (core instance $p (instantiate $on (with \"o\" (instance $o))))".into(),
         "$p", "", Reset),
        ("a library behind a library",
         "(core module $on (import \"o\" \"memory\" (memory 1)) (global (mut i32) (i32.const 1)) (export \"memory\" (memory 0)) (func $s (i32.store (i32.const 40000) (i32.const 3))) (start $s))
          (core instance $p (instantiate $on (with \"o\" (instance $o))))".into(), "$p", "", Reset),
        ("a library that is there twice", String::new(), "$o", "(core instance (instantiate $lib (with \"env\" (instance $o))))", Fresh("instantiated several times")),
        ("a library and a starter", String::new(), "$o",
         "(core module $go (import \"m\" \"init\" (func $init)) (start $init)) (core instance (instantiate $go (with \"m\" (instance $o))))", Reset),
        ("a library and a linker", String::new(), "$o",
         "(core module $go (import \"m\" \"init\" (func $init)) (import \"m\" \"memory\" (memory 1)) (data (i32.const 39998) \"linked\") (func $s (call $init)) (start $s))
          (core instance (instantiate $go (with \"m\" (instance $o))))", Reset),
        ("a library and a starter with a global", String::new(), "$o",
         "(core module $go (import \"m\" \"init\" (func $init)) (global (mut i32) (i32.const 4)) (start $init)) (core instance (instantiate $go (with \"m\" (instance $o))))", Reset),
        ("a library and a second memory", String::new(), "$o", "(core module $z (memory 1)) (core instance (instantiate $z))", Fresh("several of its modules have a memory")),
        ("a library and a memory without pages", String::new(), "$o", "(core module $z (memory 0 1)) (core instance (instantiate $z))", Fresh("several of its modules have a memory")),
    ] {
        rows.push(row(name, format!(
            "(component {main} {between} {} (core instance $m (instantiate $lib (with \"env\" (instance {given})))) {after} {RUN})",
            library(&swap(40_000))), outcome));
    }
    rows.push(row("two libraries that leave each other something", format!(
        "(component {main} {} (core instance $l (instantiate $lib (with \"env\" (instance $o))))
           (core module $two (import \"env\" \"memory\" (memory 1)) (import \"l\" \"w\" (func $w (param i32)))
             (func (export \"run\") (param $x i32) (result i32) (local $old i32) {}))
           (core instance $m (instantiate $two (with \"env\" (instance $o)) (with \"l\" (instance $l)))) {RUN})",
        library("unreachable"), old("(i32.load (i32.const 40000))", "(call $w (local.get $x))")), Reset));
    rows
}
