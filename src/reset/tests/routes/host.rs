//! Routes by way of what the host writes: shims, results of host functions, and
//! parameters of what the host calls.

use super::*;

/// Host functions by way of a shim. `$f` is what the guest calls.
struct Shim {
    /// Type of the host function, and of what lowers it.
    kind: &'static str,
    lowered: &'static str,
    /// Functions of the shim.
    shim: &'static str,
    /// What the guest has beside its memory, and what it does.
    inside: &'static str,
    run: String,
    /// How the table is filled, with the imported `$f` or `$extra` of the guest.
    fill: &'static str,
}

impl Shim {
    const FORWARDS: &str = "(func (export \"f\") (param i32 i32) (call_indirect (param i32 i32) (local.get 0) (local.get 1) (i32.const 0)))";

    fn new(run: impl Into<String>) -> Self {
        Self {
            kind: "(param \"n\" u32) (result string)",
            lowered: "(param i32 i32)",
            shim: Self::FORWARDS,
            inside: "",
            run: run.into(),
            fill: "(elem (i32.const 0) func $f)",
        }
    }

    fn text(&self) -> String {
        let Self {
            kind,
            lowered,
            shim,
            inside,
            run,
            fill,
        } = self;
        format!(
            "(component (import \"get\" (func $get {kind}))
               (core module $shim (table (export \"t\") 2 funcref) {shim}) (core instance $s (instantiate $shim))
               (core module $main (import \"s\" \"f\" (func $f {lowered})) (memory (export \"memory\") 2) {REALLOC} {SUM} {inside}
                 (func (export \"extra\") (param i32 i32) (i32.store (i32.const 19000) (local.get 0)))
                 (func (export \"run\") (param $x i32) (result i32) (local $old i32) {run}))
               (core instance $m (instantiate $main (with \"s\" (instance $s))))
               (alias core export $m \"memory\" (core memory $memory))
               (core func $low (canon lower (func $get) (memory $memory) (realloc (core func $m \"realloc\"))))
               (core module $fix (import \"t\" \"t\" (table 2 funcref)) (import \"f\" \"f\" (func $f {lowered}))
                 (import \"m\" \"extra\" (func $extra (param i32 i32))) {fill})
               (core instance (instantiate $fix (with \"t\" (instance $s)) (with \"f\" (instance (export \"f\" (func $low)))) (with \"m\" (instance $m))))
               {RUN})"
        )
    }
}

pub(super) fn shims() -> Vec<Row> {
    let sum = "(call $sum (i32.const 18000) (i32.const 24000))";
    let calls = |write: &str| old(sum, write);
    let call = calls("(call $f (local.get $x) (i32.const 18428))");
    let usual = || Shim::new(call.clone());
    let by_pointer = "(func (export \"f\") (param i32 i32) (call_indirect (param i32 i32)";
    let odd = Fresh("a table of it holds functions of the host");
    let by_table =
        calls("(call_indirect (param i32 i32) (local.get $x) (i32.const 18428) (i32.const 0))");
    let library = format!("(core module $l (import \"m\" \"memory\" (memory 1)) (import \"m\" \"own\" (table 1 funcref)) {SUM}
          (func (export \"run\") (param $x i32) (result i32) (local $old i32) {by_table}))
        (core instance $l (instantiate $l (with \"m\" (instance $m)))) {}", RUN.replace("$m", "$l"));
    let filler = format!("(core module $l (import \"m\" \"memory\" (memory 1)) (import \"m\" \"own\" (table 1 funcref)) (import \"s\" \"f\" (func $f (param i32 i32)))
          (elem (i32.const 0) $f) (func (export \"g\")))
        (core instance $l (instantiate $l (with \"m\" (instance $m)) (with \"s\" (instance $s)))) {RUN}");
    let mut rows = vec![
        row("a shim", usual().text(), Reset),
        row("a shim whose function is in a table", Shim {
            inside: "(table 1 funcref) (elem (i32.const 0) $f)",
            ..Shim::new(calls("(call_indirect (param i32 i32) (local.get $x) (i32.const 18428) (i32.const 0))"))
        }.text(), Reset),
        row("a shim that is called by a tail call", Shim {
            inside: "(func $tail (param i32 i32) (return_call $f (local.get 0) (local.get 1)))",
            ..Shim::new(calls("(call $tail (local.get $x) (i32.const 18428))"))
        }.text(), Reset),
        row("a shim whose function the guest exports", Shim { inside: "(export \"again\" (func $f))", ..usual() }.text(), Reset),
        row("a shim whose function is in a table that is called by a tail call", Shim {
            inside: "(table 1 funcref) (elem (i32.const 0) $f)
                     (func $tail (param i32 i32) (return_call_indirect (param i32 i32) (local.get 0) (local.get 1) (i32.const 0)))",
            ..Shim::new(calls("(call $tail (local.get $x) (i32.const 18428))"))
        }.text(), Reset),
        row("a shim that the start calls", Shim {
            inside: "(func $s (if (global.get $heap) (then (i32.store (i32.const 18000) (i32.const 1))))) (start $s)", ..usual() }.text(), Reset),
        row("a shim for the guest's own function", Shim { fill: "(elem (i32.const 0) func $extra)", ..usual() }.text(), Reset),
        row("a shim for the guest's own function, with a number that is no address", Shim {
            fill: "(elem (i32.const 0) func $extra)", ..Shim::new(calls("(call $f (local.get $x) (i32.const -1))")) }.text(), Reset),
        row("a shim for a number", Shim {
            kind: "(param \"n\" u32) (param \"m\" u32)",
            ..Shim::new(format!("(call $f (local.get $x) (i32.const -1)) {}", swap(18_428))) }.text(), Reset),
        row("a shim of 64 bits", Shim {
            kind: "(param \"n\" u64) (result string)", lowered: "(param i64 i32)",
            shim: "(func (export \"f\") (param i64 i32) (call_indirect (param i64 i32) (local.get 0) (local.get 1) (i32.const 0)))",
            ..Shim::new(calls("(call $f (i64.extend_i32_u (local.get $x)) (i32.const 18428))")) }.text(), Reset),
        row("a shim of two functions", Shim {
            shim: "(func (call_indirect (i32.const 1))) (func (export \"f\") (param i32 i32) (call_indirect (param i32 i32) (local.get 0) (local.get 1) (i32.const 0)))",
            ..usual() }.text(), Reset),
        row("a shim with the second place", Shim {
            shim: "(func (export \"f\") (param i32 i32) (call_indirect (param i32 i32) (local.get 0) (local.get 1) (i32.const 1)))",
            fill: "(elem (i32.const 0) func $extra $f)", ..usual() }.text(), Reset),
        row("a shim with equal types", Shim {
            shim: "(type $a (func (param i32 i32))) (type $b (func (param i32 i32))) (func (export \"f\") (type $a) (local i64) (call_indirect (type $b) (local.get 0) (local.get 1) (i32.const 0)))",
            ..usual() }.text(), Reset),
        row("a shim with another table", Shim {
            shim: "(table $u (export \"u\") 1 funcref) (func (export \"f\") (param i32 i32) (call_indirect $u (param i32 i32) (local.get 0) (local.get 1) (i32.const 0)))",
            fill: "(import \"t\" \"u\" (table 1 funcref)) (elem (table 1) (i32.const 0) func $f)", ..usual() }.text(), Reset),
        row("a shim whose table has two names", Shim {
            shim: "(export \"u\" (table 0)) (func (export \"f\") (param i32 i32) (call_indirect (param i32 i32) (local.get 0) (local.get 1) (i32.const 0)))",
            fill: "(import \"t\" \"u\" (table 1 funcref)) (elem (table 1) (i32.const 0) func $f)", ..usual() }.text(), Reset),
        row("a library that calls the host by the guest's table", Shim {
            inside: "(table (export \"own\") 1 funcref) (elem (i32.const 0) $f)", ..usual() }.text().replace(RUN, &library), Reset),
        row("a library that puts the host's function into the guest's table", Shim {
            inside: "(table (export \"own\") 1 funcref)", ..Shim::new(by_table.clone()) }.text().replace(RUN, &filler), Reset),
        row("a shim whose table is filled with what is computed", Shim { fill: "(elem (i32.const 0) funcref (ref.func $f))", ..usual() }.text(),
            Fresh("filled with what is computed")),
        row("fixups with code", Shim { fill: "(elem (i32.const 0) func $f) (func (export \"x\"))", ..usual() }.text(), Fresh("a table of another module")),
        row("fixups that start with the host", Shim {
            kind: "(param \"n\" u32) (param \"m\" u32)", fill: "(elem (i32.const 0) func $f) (func $s (call $f (i32.const 1) (i32.const 2))) (start $s)",
            ..Shim::new(swap(4000)) }.text(), Fresh("a table of another module")),
    ];
    for (name, shim, lowered, write) in [
        ("hides the address", "(func (export \"f\") (param i32 i32) (call_indirect (param i32 i32) (local.get 0) (i32.const 18428) (i32.const 0)))", "(param i32 i32)",
         "(call $f (local.get $x) (i32.const 0))"),
        ("does something before", "(func (export \"f\") (param i32 i32) (nop) (call_indirect (param i32 i32) (local.get 0) (local.get 1) (i32.const 0)))", "(param i32 i32)",
         "(call $f (local.get $x) (i32.const 18428))"),
        ("exchanges parameters", "(func (export \"f\") (param i32 i32) (call_indirect (param i32 i32) (local.get 1) (local.get 0) (i32.const 0)))", "(param i32 i32)",
         "(call $f (i32.const 18428) (local.get $x))"),
        ("calls twice", "(func (export \"f\") (param i32 i32) (call_indirect (param i32 i32) (local.get 0) (local.get 1) (i32.const 0))
            (call_indirect (param i32 i32) (local.get 0) (i32.const 19000) (i32.const 0)))", "(param i32 i32)", "(call $f (local.get $x) (i32.const 18428))"),
        ("calculates the address", "(func (export \"f\") (param i32 i32) (call_indirect (param i32 i32) (local.get 0) (i32.add (local.get 1) (i32.const 2048)) (i32.const 0)))",
         "(param i32 i32)", "(call $f (local.get $x) (i32.const 18428))"),
        ("calls by what it is given", "(func (export \"f\") (param i32 i32) (call_indirect (param i32 i32) (local.get 0) (local.get 1) (i32.eqz (local.get 0))))",
         "(param i32 i32)", "(call $f (local.get $x) (i32.const 18428))"),
        ("has a global", "(global (mut i32) (i32.const 0)) (func (export \"f\") (param i32 i32) (call_indirect (param i32 i32) (local.get 0) (local.get 1) (i32.const 0)))",
         "(param i32 i32)", "(call $f (local.get $x) (i32.const 18428))"),
        ("calls by a tail call", "(func (export \"f\") (param i32 i32) (return_call_indirect (param i32 i32) (local.get 0) (local.get 1) (i32.const 0)))",
         "(param i32 i32)", "(call $f (local.get $x) (i32.const 18428))"),
    ] {
        let text = Shim { shim, lowered, ..Shim::new(calls(write)) }.text();
        rows.push(row(format!("a shim that {name}"), text, odd));
    }
    // The type that the guest calls has fewer parameters than what is called.
    let hidden = "(func (export \"f\") (param i32) (call_indirect (param i32 i32) (local.get 0) (i32.const 18428) (i32.const 0)))";
    let text = Shim {
        shim: hidden,
        ..Shim::new(calls("(call $f (local.get $x))"))
    }
    .text();
    let text = text.replacen("(func $f (param i32 i32))", "(func $f (param i32))", 1);
    rows.push(row("a shim with fewer parameters", text, odd));
    let text = Shim {
        shim: "(func (export \"f\") (param i32 i32) (call_indirect (param i32 i32) (local.get 1) (local.get 0) (i32.const 0)))",
        fill: "(elem (i32.const 0) func $extra)",
        ..Shim::new(calls("(call $f (i32.const 4) (local.get $x))"))
    };
    rows.push(row(
        "an odd shim for the guest's own function",
        text.text(),
        Fresh("before its memory"),
    ));
    let swapped = format!("{by_pointer} (local.get 0) (local.get 1) (i32.const 0)))");
    let text = Shim {
        shim: Shim::FORWARDS,
        ..usual()
    }
    .text();
    let chained = text.replace("(core module $main (import \"s\"",
        &format!("(core module $shim2 (table (export \"t\") 2 funcref) {swapped}) (core instance $s2 (instantiate $shim2)) (core module $main (import \"s\""))
        .replace("(core instance (instantiate $fix ", "(core instance (instantiate $fix (with \"t\" (instance $s)) (with \"f\" (instance $s2)) (with \"m\" (instance $m))))
                 (core module $fix2 (import \"t\" \"t\" (table 2 funcref)) (import \"f\" \"f\" (func $f (param i32 i32))) (elem (i32.const 0) func $f))
                 (core instance (instantiate $fix2 ")
        .replace("(with \"t\" (instance $s)) (with \"f\" (instance (export", "(with \"t\" (instance $s2)) (with \"f\" (instance (export")
        .replace("(func $low)))) (with \"m\" (instance $m))))", "(func $low))))))");
    rows.push(row(
        "a shim before a shim",
        chained,
        Fresh("holds functions of the host"),
    ));
    // The host's function in the table by which the guest itself calls.
    let text = Shim {
        inside: "(table (export \"own\") 2 funcref)",
        ..Shim::new(calls(
            "(call_indirect (param i32 i32) (local.get $x) (i32.const 18428) (i32.const 0))",
        ))
    }
    .text();
    for (name, fix, words) in [
        (
            "fixups of the guest's table with the host's function",
            "",
            "holds functions of the host",
        ),
        (
            "a linker of the guest's table with the host's function",
            "(import \"m\" \"memory\" (memory 1))",
            "holds functions of the host",
        ),
    ] {
        let text = text.replace(
            "(import \"t\" \"t\" (table 2 funcref))",
            &format!("(import \"m\" \"own\" (table 2 funcref)) {fix}"),
        );
        rows.push(row(name, text, Fresh(words)));
    }
    let starts = usual().text().replace(
        "(core instance $m (instantiate $main (with \"s\" (instance $s))))",
        "(core instance $m (instantiate $main (with \"s\" (instance $s))))
         (core func $note (canon lower (func $note-it))) (core module $go (import \"h\" \"f\" (func $f)) (start $f))
         (core instance (instantiate $go (with \"h\" (instance (export \"f\" (func $note))))))")
        .replace("(component ", "(component (import \"note\" (func $note-it)) ");
    let linker = starts
        .replace(
            "(import \"h\" \"f\" (func $f)) (start $f)",
            "(import \"m\" \"memory\" (memory 1)) (import \"h\" \"f\" (func $f)) (start $f)",
        )
        .replace(
            "(export \"f\" (func $note)))))",
            "(export \"f\" (func $note)))) (with \"m\" (instance $m)))",
        );
    rows.push(row("a linker that calls the host", linker, Reset));
    rows.push(row(
        "a starter that calls the host",
        starts,
        Fresh("starts by calling the host"),
    ));
    rows
}

/// What host functions write, called by a library with no shim between.
pub(super) fn host_writes() -> Vec<Row> {
    let called = |kind: &str, encoding: &str, to: u32, more: &str| {
        format!(
            "(component (import \"get\" (func $get (param \"n\" u32) (result {kind}))) {}
               (core func $low (canon lower (func $get) (memory $o \"memory\") (realloc (core func $o \"realloc\")) {encoding}))
               (core module $lib (import \"o\" \"memory\" (memory 1)) (import \"h\" \"f\" (func $f (param i32 i32))) {SUM} {more}
                 (func (export \"run\") (param $x i32) (result i32) (local $old i32) {}))
               (core instance $m (instantiate $lib (with \"o\" (instance $o)) (with \"h\" (instance (export \"f\" (func $low)))))) {RUN})",
            owner("2", REALLOC, "unreachable").replace("$m ", "$o "),
            old(
                &format!("(i32.add (call $sum (i32.const 20000) (i32.const 60000)) (call $sum (i32.const {to}) (i32.const {})))", (to + 600).min(131_072)),
                &format!("(call $f (local.get $x) (i32.const {to}))"),
            )
        )
    };
    let many = format!("(tuple {})", "u64 ".repeat(60));
    let mut rows: Vec<_> = [
        ("a string", "string", ""),
        ("a string in UTF-16", "string", "string-encoding=utf16"),
        (
            "a string in Latin-1 or UTF-16",
            "string",
            "string-encoding=latin1+utf16",
        ),
        ("bytes", "(list u8)", ""),
        ("numbers", "(list u64)", ""),
        ("strings", "(list string)", ""),
        ("lists of strings", "(list (list string))", ""),
        ("an option", "(option u32)", ""),
        ("a result", "(result string (error u32))", ""),
        (
            "a result with nothing good",
            "(result (error (tuple u32 u32)))",
            "",
        ),
        (
            "a tuple of many sizes",
            "(tuple u8 u64 u16 float64 bool char)",
            "",
        ),
        ("a tuple of more than a mark covers", &many, ""),
        (
            "a tuple of strings in UTF-16",
            "(tuple string u8 string)",
            "string-encoding=utf16",
        ),
    ]
    .map(|(name, kind, encoding)| {
        let align = if kind.contains("u64") { 8 } else { 4 };
        let text = called(kind, encoding, 18_432 - align, "");
        row(format!("the host gives {name}"), text, Reset)
    })
    .into();
    for (place, to) in [
        ("at the end of a page", 65_532),
        ("at the end of memory", 131_064),
        ("at the start of memory", 0),
    ] {
        rows.push(row(
            format!("the host gives a string {place}"),
            called("string", "", to, ""),
            Reset,
        ));
    }
    let usual = called("string", "", 18_428, "");
    let realloc_of_library = usual
        .replace(REALLOC, "")
        .replace(SUM, &format!("{REALLOC} {SUM}"));
    let (before, after) = realloc_of_library.split_once("(core func $low").unwrap();
    let (lower, after) = after.split_once("(core module $lib").unwrap();
    rows.push(row("a function of a library that allocates", format!(
        "{before} (core module $a (import \"o\" \"memory\" (memory 1)) {REALLOC}) (core instance $a (instantiate $a (with \"o\" (instance $o))))
         (core func $low{} (core module $lib{}", lower.replace("$o \"realloc\"", "$a \"realloc\""), after.replace(REALLOC, "")), Reset));
    rows.push(row("a function that allocates and that a library passes on", usual.replace("(core func $low",
        "(core module $a (import \"o\" \"realloc\" (func $r (param i32 i32 i32 i32) (result i32))) (import \"o\" \"memory\" (memory 1)) (export \"pass\" (func $r)) (global (mut i32) (i32.const 1)))
         (core instance $a (instantiate $a (with \"o\" (instance $o)))) (core func $low").replace("(core func $o \"realloc\")", "(core func $a \"pass\")"), Reset));
    rows.push(row(
        "a function that allocates and that is referred to",
        usual.replace(
            REALLOC,
            &format!("{REALLOC} (func (drop (ref.is_null (ref.func $realloc))))"),
        ),
        Fresh("it can't be rewritten: undeclared function reference"),
    ));
    rows.push(row(
        "a host function that a library calls at last",
        called(
            "string",
            "",
            18_428,
            "(func $tail (param i32 i32) (return_call $f (local.get 0) (local.get 1)))",
        )
        .replace("(call $f (local.get $x)", "(call $tail (local.get $x)"),
        Reset,
    ));
    rows.push(row("a host function that gives little beside one that gives much", format!(
        "{} (import \"more\" (func $more (result (tuple {})))) (core func (canon lower (func $more) (memory $o \"memory\"))))",
        usual.strip_suffix(')').unwrap(), "u64 ".repeat(60)), Reset));
    let many = |to| called(&many, "", to, "");
    rows.push(row(
        "the host gives much at the end of memory",
        many(131_072 - 480),
        Reset,
    ));
    rows.push(row(
        "the host gives much that ends with a card",
        many(18_432 - 480),
        Reset,
    ));
    rows.push(row("the host gives much to an address that wraps around",
        many(18_432).replace("(call $f (local.get $x) (i32.const 18432))", "(call $f (local.get $x) (select (i32.const -16) (i32.const 18432) (i32.eq (local.get $x) (i32.const 300))))"), Reset));
    rows.push(row(
        "a library that starts by calling the host",
        called(
            "string",
            "",
            18_428,
            "(func $s (call $f (i32.const 9) (i32.const 18428))) (start $s)",
        ),
        Reset,
    ));
    rows.push(row(
        "a host function in a library's table",
        called(
            "string",
            "",
            18_428,
            "(table 1 funcref) (elem (i32.const 0) $f)",
        )
        .replace(
            "(call $f (local.get $x) (i32.const 18428))",
            "(call_indirect (param i32 i32) (local.get $x) (i32.const 18428) (i32.const 0))",
        ),
        Reset,
    ));
    rows.push(row("a host function that one library passes on to another", called("string", "", 18_428, "(export \"g\" (func $f))").replace(RUN, &format!(
        "(core module $two (import \"o\" \"memory\" (memory 1)) (import \"m\" \"g\" (func $g (param i32 i32))) {SUM}
           (func (export \"run\") (param $x i32) (result i32) (local $old i32) {}))
         (core instance $n (instantiate $two (with \"o\" (instance $o)) (with \"m\" (instance $m)))) {}",
        old("(call $sum (i32.const 18000) (i32.const 30000))", "(call $g (local.get $x) (i32.const 18428))"), RUN.replace("$m", "$n"))), Reset));
    rows.push(row(
        "a function that allocates and is in a table, too",
        called("string", "", 18_428, "").replace(
            REALLOC,
            &format!("(table 1 funcref) (elem (i32.const 0) $realloc) {REALLOC}"),
        ),
        Reset,
    ));
    rows.push(row(
        "a function that allocates under two names",
        called("string", "", 18_428, "")
            .replace(
                REALLOC,
                &format!("{REALLOC} (export \"realloc2\" (func $realloc))"),
            )
            .replace("(core func $o \"realloc\")", "(core func $o \"realloc2\")"),
        Reset,
    ));
    rows.push(row(
        "a function that allocates at one place",
        called("string", "", 18_428, "").replace("(local.get $p))", "(i32.const 40950))"),
        Reset,
    ));
    rows.push(row("a function that allocates by a tail call", called("string", "", 18_428, "").replace(REALLOC, &REALLOC
        .replace("(export \"realloc\")", "").replace("(global $heap", "(func (export \"realloc\") (param i32 i32 i32 i32) (result i32)
            (return_call $realloc (local.get 0) (local.get 1) (local.get 2) (local.get 3))) (global $heap")), Reset));
    rows.push(row(
        "the host writes no more than numbers",
        called("u32", "", 18_428, "")
            .replace(
                "(func $f (param i32 i32))",
                "(func $f (param i32) (result i32))",
            )
            .replace(
                "(call $f (local.get $x) (i32.const 18428))",
                "(i32.store (i32.const 18428) (call $f (local.get $x)))",
            ),
        Reset,
    ));
    rows
}

/// Parameters and results of what the host calls, and what it calls at last.
pub(super) fn lifted() -> Vec<Row> {
    let sum = "(call $sum (i32.const 18000) (i32.const 60000))";
    let flat = |kind: &str| match kind {
        "string" | "(list u8)" | "(list u64)" | "(list string)" | "(list (list string))" => {
            "(param i32 i32)"
        }
        "(option string)" => "(param i32 i32 i32)",
        "(result string (error u32))" => "(param i32 i32 i32)",
        "(tuple string u8 string)" => "(param i32 i32 i32 i32 i32)",
        _ => "(param i32)",
    };
    let spilled = format!("(tuple {} string)", "u64 ".repeat(16));
    let mut rows = Vec::new();
    for (name, kind, encoding) in [
        ("a string", "string", ""),
        ("a string in UTF-16", "string", "string-encoding=utf16"),
        (
            "a string in Latin-1 or UTF-16",
            "string",
            "string-encoding=latin1+utf16",
        ),
        ("bytes", "(list u8)", ""),
        ("numbers", "(list u64)", ""),
        ("strings", "(list string)", ""),
        ("lists of strings", "(list (list string))", ""),
        ("an option of a string", "(option string)", ""),
        ("a result of a string", "(result string (error u32))", ""),
        (
            "two strings",
            "(tuple string u8 string)",
            "string-encoding=utf16",
        ),
        ("more than fits in parameters", &spilled, ""),
    ] {
        rows.push(row(format!("the host passes {name}"), format!(
            "(component (core module $main (memory (export \"memory\") 2) {REALLOC} {SUM} (func (export \"run\") {} (result i32) {sum}))
               (core instance $m (instantiate $main)) (func (export \"run\") (param \"x\" {kind}) (result u32)
                 (canon lift (core func $m \"run\") (memory $m \"memory\") (realloc (core func $m \"realloc\")) {encoding})))", flat(kind)), Reset));
    }
    // A result that lies where the module puts it, and is eight bytes.
    let gives = |inside: &str, run: &str, kind: &str, options: &str| {
        format!(
        "(component (core module $main (memory (export \"memory\") 2 12) (data (i32.const 1000) \"\\f0\\03\\00\\00\\08\\00\\00\\00\")
             (table (export \"t\") 2 funcref) {REALLOC}
             {inside} (func $after (export \"after\") (param $p i32) (i32.store (i32.const 1012) (i32.add (i32.load (i32.const 1012)) (i32.const 0x01010101))))
             (func (export \"run\") (param $x i32) (result i32) (i32.store (i32.const 1008) (i32.and (i32.add (i32.load (i32.const 1008)) (local.get $x)) (i32.const 127))) {run} (i32.const 1000)))
           (core instance $m (instantiate $main)) (func (export \"run\") (param \"x\" u32) (result {kind}) (canon lift (core func $m \"run\") (memory $m \"memory\") {options})))")
    };
    let after = "(post-return (core func $m \"after\"))";
    let called = "(func $c (param i32) (i32.store (i32.const 1012) (i32.const 0x20202020)) (call $after (local.get 0)))";
    for (name, inside, run, kind, options) in [
        ("a result", "", "", "(list u8)", ""),
        ("a result of text", "", "", "string", after),
        (
            "a result of text in UTF-16",
            "",
            "(i32.store (i32.const 1004) (i32.const 4))",
            "string",
            "string-encoding=utf16",
        ),
        (
            "a post-return function that writes",
            "",
            "",
            "(list u8)",
            after,
        ),
        (
            "a post-return function in a table",
            "(elem (i32.const 1) $after)",
            "(call_indirect (param i32) (i32.const 0) (i32.const 1))",
            "(list u8)",
            after,
        ),
        (
            "a post-return function that is called",
            called,
            "(call $c (i32.const 0))",
            "(list u8)",
            after,
        ),
        (
            "a post-return function that calls another",
            "(func (export \"z\") (param i32) (call $after (local.get 0)))",
            "",
            "(list u8)",
            "(post-return (core func $m \"z\"))",
        ),
        (
            "a post-return function under two names",
            "(export \"again\" (func $after))",
            "",
            "(list u8)",
            after,
        ),
        (
            "a post-return function by another name",
            "(export \"again\" (func $after))",
            "",
            "(list u8)",
            "(post-return (core func $m \"again\"))",
        ),
        (
            "a post-return function that grows",
            "(func (export \"z\") (param i32) (drop (memory.grow (i32.const 1))))",
            "(i32.store8 (i32.const 1013) (memory.size))",
            "(list u8)",
            "(post-return (core func $m \"z\"))",
        ),
        (
            "a post-return function that grows beyond slack",
            "(func (export \"z\") (param i32) (drop (memory.grow (i32.const 5))))",
            "(i32.store8 (i32.const 1013) (memory.size))",
            "(list u8)",
            "(post-return (core func $m \"z\"))",
        ),
        (
            "a post-return function that traps",
            "(func (export \"z\") (param i32) (if (i32.eq (i32.load8_u (i32.const 1008)) (i32.const 44)) (then unreachable)))",
            "",
            "(list u8)",
            "(post-return (core func $m \"z\"))",
        ),
        (
            "a post-return function with a global",
            "(global $g (mut i32) (i32.const 1)) (func (export \"z\") (param i32) (global.set $g (i32.add (global.get $g) (i32.const 2))))",
            "(i32.store8 (i32.const 1013) (global.get $g))",
            "(list u8)",
            "(post-return (core func $m \"z\"))",
        ),
        (
            "a post-return function that is a tail call",
            "(func (export \"z\") (param i32) (return_call $after (local.get 0)))",
            "",
            "(list u8)",
            "(post-return (core func $m \"z\"))",
        ),
    ] {
        rows.push(row(name, gives(inside, run, kind, options), Reset));
    }
    let spoils = "(if (i32.eq (local.get $x) (i32.const 300)) (then (i32.store8 (i32.const 1011) (i32.const 0xff))))";
    rows.push(row(
        "a result that is no text",
        gives("", spoils, "string", after),
        Reset,
    ));
    let grown = "(func $s (drop (memory.grow (i32.const 6))) (i32.store (i32.const 300000) (i32.const 5))) (start $s)";
    rows.push(row("a post-return function where the start grows", gives(grown, "(i32.store8 (i32.const 1013) (i32.load8_u (i32.const 300000))) (i32.store (i32.const 300000) (local.get $x))", "(list u8)", after), Reset));
    let second = |options: &str| {
        format!(
            "(func (export \"second\") (param \"x\" u32) (result (list u8)) (canon lift (core func $m \"run\") (memory $m \"memory\") {options}))"
        )
    };
    for (name, more) in [
        ("a post-return function of two functions", second(after)),
        ("a post-return function of one function of two", second("")),
        ("a post-return function that the host calls otherwise", "(func (export \"second\") (param \"x\" u32) (canon lift (core func $m \"after\")))".into()),
        ("a post-return function that a library calls",
         "(core module $l (import \"m\" \"after\" (func $f (param i32))) (import \"m\" \"memory\" (memory 1)) (func (export \"f\") (param i32) (call $f (i32.const 1)) (i32.store (i32.const 1012) (local.get 0))))
          (core instance $l (instantiate $l (with \"m\" (instance $m)))) (func (export \"second\") (param \"x\" u32) (canon lift (core func $l \"f\")))".into()),
        ("a post-return function that a starter calls",
         "(core module $l (import \"m\" \"go\" (func $f)) (start $f)) (core instance (instantiate $l (with \"m\" (instance $m))))".into()),
    ] {
        let text = gives("(func (export \"go\") (call $after (i32.const 3)))", "", "(list u8)", after);
        rows.push(row(name, format!("{} {more})", text.strip_suffix(')').unwrap()), Reset));
    }
    let library = gives("", "", "(list u8)", after).replace(after, "(post-return (core func $l \"f\"))").replace(
        "(core instance $m (instantiate $main))",
        "(core instance $m (instantiate $main)) (core module $l (import \"m\" \"memory\" (memory 1)) (func (export \"f\") (param i32) (i32.store (i32.const 1012) (i32.const 0x41414141))))
         (core instance $l (instantiate $l (with \"m\" (instance $m))))");
    rows.push(row("a post-return function of a library", library, Reset));
    rows.push(row("a record that the host passes", format!(
        "(component (core module $main (memory (export \"memory\") 2) {REALLOC} {SUM} (func (export \"run\") (param i32 i32 i32) (result i32) {sum}))
           (core instance $m (instantiate $main)) (type $r' (record (field \"a\" u8) (field \"b\" string))) (export $r \"r\" (type $r'))
           (func (export \"run\") (param \"x\" $r) (result u32) (canon lift (core func $m \"run\") (memory $m \"memory\") (realloc (core func $m \"realloc\")))))"), Reset));
    rows.push(row("an allocator of the host's", format!(
        "(component (import \"get\" (func $get (param \"a\" u32) (param \"b\" u32) (param \"c\" u32) (param \"d\" u32) (result u32)))
           (core func $low (canon lower (func $get))) {SUM_MODULE}
           (func (export \"run\") (param \"x\" string) (result u32) (canon lift (core func $m \"run\") (memory $m \"memory\") (realloc $low))))"),
        Shape("the host does not allocate by a function of it")));
    rows
}
