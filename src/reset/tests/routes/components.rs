//! Routes by way of the component around the modules: handles, components within
//! components, names and indices.

use super::*;

/// Handles of the host's and of the component's own resources.
pub(super) fn handles() -> Vec<Row> {
    let import = "(import \"i\" (instance $i (export \"r\" (type $r (sub resource))) (export \"make\" (func (param \"n\" u32) (result (own $r))))))
        (alias export $i \"r\" (type $r)) (core func $drop (canon resource.drop $r)) (core func $make (canon lower (func $i \"make\")))
        (core instance $h (export \"drop\" (func $drop)) (export \"make\" (func $make)))";
    let text = |run: &str, kind: &str, signature: &str| {
        format!(
        "(component {import} (core module $main (import \"h\" \"drop\" (func $drop (param i32))) (import \"h\" \"make\" (func $make (param i32) (result i32)))
             (memory 1) (global $g (mut i32) (i32.const 0)) (func (export \"run\") {signature} (local $old i32) {run}))
           (core instance $m (instantiate $main (with \"h\" (instance $h)))) (func (export \"run\") {kind} (canon lift (core func $m \"run\"))))")
    };
    let (number, own, borrow) = (
        "(param \"x\" u32) (result u32)",
        "(param \"x\" (own $r)) (result u32)",
        "(param \"x\" (borrow $r)) (result u32)",
    );
    let signature = "(param $x i32) (result i32)";
    let keeps = "(resource (rep i32))";
    let mine = |core: &str, run: &str| {
        alone("", "unreachable").replace(RUN, "").replacen("(component ", &format!(
        "(component (type $t {keeps}) (core func $new (canon resource.new $t)) (core func $rep (canon resource.rep $t)) (core func $drop (canon resource.drop $t)) "), 1)
        .replace("(core instance $m (instantiate $main))", &format!(
            "(core instance $m (instantiate $main)) (core module $k (import \"h\" \"new\" (func $new (param i32) (result i32))) (import \"h\" \"rep\" (func $rep (param i32) (result i32))) (import \"h\" \"drop\" (func $drop (param i32)))
               {core} (func (export \"run\") (param $x i32) (result i32) {run}))
             (core instance $k (instantiate $k (with \"h\" (instance (export \"new\" (func $new)) (export \"rep\" (func $rep)) (export \"drop\" (func $drop))))))
             (func (export \"run\") (param \"x\" u32) (result u32) (canon lift (core func $k \"run\")))"))
    };
    vec![
        row(
            "a handle that is dropped",
            text(
                "(local.set $old (call $make (local.get $x))) (call $drop (local.get $old)) (local.get $old)",
                number,
                signature,
            ),
            Dead,
        ),
        row(
            "a handle that is kept",
            text("(call $make (local.get $x))", number, signature),
            Reset,
        ),
        row(
            "handles that are kept in an odd order",
            text(
                "(local.set $old (call $make (local.get $x))) (call $make (local.get $x)) (call $drop (local.get $old))",
                number,
                signature,
            ),
            Reset,
        ),
        row(
            "the number of a handle in a global",
            text(
                "(global.get $g) (global.set $g (call $make (local.get $x))) (call $drop (global.get $g))",
                number,
                signature,
            ),
            Reset,
        ),
        row(
            "a handle that the host passes",
            text(
                "(i32.load (i32.const 8)) (i32.store (i32.const 8) (local.get $x)) (call $drop (local.get $x))",
                own,
                signature,
            ),
            Reset,
        ),
        row(
            "a handle that the host passes and that is kept",
            text("(local.get $x)", own, signature),
            Reset,
        ),
        row(
            "a handle that the host lends",
            text(
                "(i32.load (i32.const 8)) (i32.store (i32.const 8) (local.get $x)) (call $drop (local.get $x))",
                borrow,
                signature,
            ),
            Reset,
        ),
        row(
            "a handle of its own",
            mine("", "(call $new (local.get $x))"),
            Fresh("it defines resources"),
        ),
        row(
            "what a handle of its own stands for",
            mine(
                "",
                "(drop (call $new (local.get $x))) (call $rep (i32.const 1))",
            ),
            Fresh("it defines resources"),
        ),
        row(
            "a resource of its own that is only dropped",
            format!(
                "(component (type $t {keeps}) (core func $drop (canon resource.drop $t)) {} {RUN})",
                owner("2", "", &swap(4000))
            ),
            Reset,
        ),
        row(
            "a resource of its own with a destructor of the guest",
            format!(
                "(component {} (type $t (resource (rep i32) (dtor (func $m \"after\")))) (core func $new (canon resource.new $t)) {RUN})",
                owner("2", "(func (export \"after\") (param i32))", &swap(4000))
            ),
            Fresh("it defines resources"),
        ),
    ]
}

/// Components within components.
pub(super) fn nested() -> Vec<Row> {
    let inner = |run: &str| format!("(component $c {} {RUN})", owner("2", "", run));
    let writes = inner(&swap(4000));
    let out = "(instance $i (instantiate $c)) (export \"run\" (func $i \"run\"))";
    let keeper =
        "(component $k (type $t (resource (rep i32))) (core func $new (canon resource.new $t))
        (func (export \"keep\") (param \"x\" u32) (result u32) (canon lift (core func $new))))";
    let stub = |memory: &str| {
        format!(
            "(component $s (core module $t {memory} (func (export \"r\") unreachable)) (core instance $t (instantiate $t)) (func (export \"r\") (canon lift (core func $t \"r\"))))"
        )
    };
    let module = "(core module $main (memory 1) (func (export \"run\") (param $x i32) (result i32) (i32.load (i32.const 8)) (i32.store (i32.const 8) (local.get $x))))
        (core instance $m (instantiate $main))";
    let given = |kind: &str| {
        format!(
            "(component $c {kind} {} {RUN})",
            owner("2", "", &swap(4000))
        )
    };
    let rows = [
        ("a component within it", format!("{writes} {out}"), Reset),
        ("a component whose instance is exported", format!("{writes} (instance $i (instantiate $c)) (export \"all\" (instance $i))"), Reset),
        ("a component whose function passes through another", format!(
            "{writes} (instance $i (instantiate $c)) (component $p (import \"f\" (func $f (param \"x\" u32) (result u32))) (export \"run\" (func $f)))
             (instance $j (instantiate $p (with \"f\" (func $i \"run\")))) (export \"run\" (func $j \"run\"))"), Reset),
        ("a component whose instance passes through another", format!(
            "{writes} (instance $i (instantiate $c)) (component $p (import \"i\" (instance $x (export \"run\" (func (param \"x\" u32) (result u32))))) (export \"run\" (func $x \"run\")))
             (instance $j (instantiate $p (with \"i\" (instance $i)))) (export \"run\" (func $j \"run\"))"), Reset),
        ("a component beside one that traps", format!("{} {writes} (instance (instantiate $s)) {out}", stub("")), Fresh("several components within it")),
        ("a component beside one that traps and has a memory", format!("{} {writes} (instance (instantiate $s)) {out}", stub("(memory (export \"m\") 0)")), Reset),
        ("a component beside one with a page", format!("{} {writes} (instance (instantiate $s)) {out}", stub("(memory 1)")), Fresh("several components within it")),
        ("a component beside one with a global", format!("{} {writes} (instance (instantiate $s)) {out}", stub("(global (mut i32) (i32.const 1))")), Fresh("several components within it")),
        ("a component beside two that trap", format!("{} {writes} (instance (instantiate $s)) (instance (instantiate $s)) {out}", stub("(memory 0)")), Reset),
        ("a component behind other instances", format!(
            "(import \"i\" (instance $x (export \"f\" (func)))) {writes} {} (instance $s (instantiate $s)) (instance $w (export \"in\" (instance $s))) (alias export $w \"in\" (instance $y))
             (export $s2 \"first\" (instance $s)) (instance $j (export \"r\" (func $s2 \"r\"))) (export \"second\" (instance $j)) {out}", stub("(memory 0)").replace(" unreachable", "")), Reset),
        ("a component whose instance has two names", format!("{writes} {out} (export $i2 \"one\" (instance $i)) (export \"two\" (instance $i2))"), Reset),
        ("a component beside one that starts", format!("(component $s (core module $a (memory 0) (func (export \"f\"))) (core instance $a (instantiate $a))
            (core module $b (import \"a\" \"f\" (func $f)) (start $f)) (core instance (instantiate $b (with \"a\" (instance $a))))) {writes} (instance (instantiate $s)) {out}"), Reset),
        ("a component with an imported function", format!("(import \"note\" (func $n (param \"x\" u32))) {} (instance $i (instantiate $c (with \"note\" (func $n)))) (export \"run\" (func $i \"run\"))",
            given("(import \"note\" (func (param \"x\" u32)))")), Reset),
        ("a component with an imported instance", format!("(import \"i\" (instance $x (export \"f\" (func)))) {} (instance $i (instantiate $c (with \"i\" (instance $x)))) (export \"run\" (func $i \"run\"))",
            given("(import \"i\" (instance (export \"f\" (func))))")), Reset),
        ("a component with a type from outside", format!("(type $u u32) {} {out}", given("(alias outer 1 $u (type $v))")), Fresh("invalid outer alias count")),
        ("a component with a resource from outside", format!("(import \"r\" (type $r (sub resource))) {} (instance $i (instantiate $c (with \"r\" (type $r)))) (export \"run\" (func $i \"run\"))",
            given("(import \"r\" (type $r (sub resource))) (core func (canon resource.drop $r))")), Reset),
        ("a component that is there twice", format!("{writes} {out} (instance (instantiate $c))"), Fresh("instantiated several times")),
        ("a component that is there twice, and both are called", format!("{writes} {out} (instance $j (instantiate $c)) (export \"run2\" (func $j \"run\"))"), Fresh("instantiated several times")),
        ("a component that is not there", writes.clone(), Shape("instantiated several times")),
        ("two components", format!("{writes} {out} {} (instance (instantiate $d))", writes.replace("$c", "$d")), Fresh("several components within it")),
        ("a component beside one that keeps handles", format!("{writes} {keeper} {out} (instance $k (instantiate $k)) (export \"keep\" (func $k \"keep\"))"), Fresh("several components within it")),
        ("a component and a module", format!("{writes} {out} {module}"), Fresh("has state of its own")),
        ("a module and a component that keeps handles", format!("{keeper} (instance $k (instantiate $k)) {module} (export \"keep\" (func $k \"keep\"))"), Fresh("has state of its own")),
        ("a module and a component without anything", format!("(component) {module} {RUN}"), Reset),
        ("a component in a component in a component", format!("(component $b {writes} {out}) (instance $j (instantiate $b)) (export \"run\" (func $j \"run\"))"), Fresh("has state of its own")),
        ("a component from outside", format!("{writes} (component $b (alias outer 1 $c (component $d)) (instance $i (instantiate $d)) (export \"run\" (func $i \"run\")))
            (instance $j (instantiate $b)) (export \"run\" (func $j \"run\"))"), Fresh("hands on code")),
        ("a module from outside", format!("(core module $m (memory 1) (func (export \"run\") (param $x i32) (result i32) (i32.load (i32.const 8)) (i32.store (i32.const 8) (local.get $x))))
            (component $b (alias outer 1 $m (core module $n)) (core instance $m (instantiate $n)) {RUN}) (instance $j (instantiate $b)) (export \"run\" (func $j \"run\"))"),
            Fresh("hands on code")),
        ("a component as an argument", format!("{writes} (component $b (import \"c\" (component $d (export \"run\" (func (param \"x\" u32) (result u32))))) (instance $i (instantiate $d)) (export \"run\" (func $i \"run\")))
            (instance $j (instantiate $b (with \"c\" (component $c)))) (export \"run\" (func $j \"run\"))"), Fresh("hands on code")),
        ("a component that is exported", format!("{writes} {out} (export \"c\" (component $c))"), Refused("exporting a component")),
        ("a component that exports its module", format!("{} {out}", inner(&swap(4000)).replace(RUN, &format!("{RUN} (export \"code\" (core module $main))"))), Fresh("hands on code")),
        ("a module that is exported", format!("{module} {RUN} (export \"code\" (core module $main))"), Fresh("hands on code")),
        ("a module that is imported", format!("(import \"code\" (core module)) {module} {RUN}"), Shape("imports code")),
        ("a component that is imported", format!("(import \"code\" (component)) {module} {RUN}"), Refused("component imports")),
        ("a module in an imported instance", format!("(import \"i\" (instance $x (export \"code\" (core module)))) (alias export $x \"code\" (core module $y)) {module} {RUN}"), Shape("hands on code")),
        ("a module of an instance of a component", format!(
            "(component $b (core module $main (memory 1) (func (export \"run\") (param $x i32) (result i32) (i32.load (i32.const 8)) (i32.store (i32.const 8) (local.get $x)))) (export \"code\" (core module $main)))
             (instance $i (instantiate $b)) (alias export $i \"code\" (core module $n)) (core instance $m (instantiate $n)) {RUN}"), Fresh("hands on code")),
        ("an import that is exported again", format!("(import \"get\" (func $get (result u32))) {module} {RUN} (export \"again\" (func $get))"), Refused("reexport")),
        ("an imported instance that is exported again", format!("(import \"i\" (instance $x (export \"f\" (func (result u32))))) {module} {RUN} (export \"again\" (instance $x))"), Refused("reexport")),
        ("an instance of items that is exported", format!("{module} (func $run (param \"x\" u32) (result u32) (canon lift (core func $m \"run\"))) (instance $j (export \"run\" (func $run))) (export \"all\" (instance $j))"), Reset),
        ("its own function as its import", format!("{module} (func $run (param \"x\" u32) (result u32) (canon lift (core func $m \"run\"))) (core func $low (canon lower (func $run)))
            (core module $n (import \"h\" \"f\" (func $f (param i32) (result i32))) (func (export \"run\") (param i32) (result i32) (call $f (local.get 0))))
            (core instance $n (instantiate $n (with \"h\" (instance (export \"f\" (func $low)))))) (func (export \"run\") (param \"x\" u32) (result u32) (canon lift (core func $n \"run\")))"),
            Dead),
        ("a component that defines values", format!("{module} {RUN} (import \"v\" (value $v u32)) (export \"w\" (value $v))"), Refused("value")),
        ("a start of the component", format!("{module} (func $f (param \"x\" u32) (result u32) (canon lift (core func $m \"run\"))) (import \"v\" (value $v u32)) (start $f (value $v) (result (value $w))) (export \"w\" (value $w))"), Refused("value")),
    ];
    rows.into_iter()
        .map(|(name, text, outcome)| row(name, format!("(component {text})"), outcome))
        .collect()
}

/// Names that are added, too, and what shifts an index.
pub(super) fn names_and_indices() -> Vec<Row> {
    let main = |inside: &str| owner("2", inside, &swap(4000));
    let own = Fresh("of its own");
    let lift = "(param \"x\" u32) (result u32) (canon lift (core func $m \"run\"))";
    let more = "(core module $n (func (export \"other\") (param i32) (result i32) (i32.const 1)) (global (export \"g\") i32 (i32.const 1)) (table (export \"t\") 1 funcref))
        (core instance $n (instantiate $n)) (alias core export $n \"other\" (core func $other)) (alias core export $n \"g\" (core global)) (alias core export $n \"t\" (core table))";
    let rows = [
        ("an export mb-reset of the module", format!("{} {RUN}", main("(export \"mb-reset\" (func $run))")), own),
        ("an export mb-checkpoint of the module", format!("{} {RUN}", main("(export \"mb-checkpoint\" (func $run))")), own),
        ("an export mb-cards of the module", format!("{} {RUN}", main("(export \"mb-cards\" (memory 0))")), own),
        ("an export mb-reset of the component", format!("{} {RUN} (func (export \"mb-reset\") {lift})", main("")), own),
        ("an export mb-checkpoint of the component", format!("{} {RUN} (func (export \"mb-checkpoint\") {lift})", main("")), own),
        ("an export mb-cards of the component", format!("{} {RUN} (func (export \"mb-cards\") {lift})", main("")), own),
        ("an export mb-reset of an instance", format!("{} {RUN} (func $f {lift}) (instance $j (export \"mb-reset\" (func $f))) (export \"all\" (instance $j))", main("")), Reset),
        ("an import mb-reset of the component", format!("(import \"mb-reset\" (func)) {} {RUN}", main("")), Reset),
        ("an import mb-checkpoint of the component", format!("(import \"mb-checkpoint\" (func (result u32))) {} {RUN}", main("")), Reset),
        ("an import of a library from mb-reset", format!("{} {RUN}", with_library("", "", &swap(4000))
            .replace("\"env\"", "\"mb-reset\"").trim_start_matches("(component ").strip_suffix(')').unwrap().replace("\"run\")))", "\"lib-run\")))").replace("(func (export \"run\") (param \"x\"", "(func (export \"lib\") (param \"x\"").replace("$l \"lib-run\"", "$l \"run\"")),
            Shape("it can't be rewritten")),
        ("an import of the owner from mb-reset", format!("(import \"note\" (func $f (param \"x\" u32))) (core func $low (canon lower (func $f)))
            {} {RUN}", main("").replacen("(core module $main", "(core module $main (import \"mb-reset\" \"mb-cards\" (func (param i32)))", 1)
                .replace("(instantiate $main)", "(instantiate $main (with \"mb-reset\" (instance (export \"mb-cards\" (func $low)))))")), Reset),
        ("names that are odd", format!("{} {RUN}", main("(export \"\" (func $run)) (export \"mb-reset \" (func $run)) (export \"⊥\" (memory 0))")), Reset),
        ("custom sections", format!("(@custom \"mb-reset\" \"x\") {} {RUN}", main("(@custom \"producers\" \"\\00\") (@custom \"mb-cards\" (before code) \"x\")")), Reset),
        ("imports between sections", format!("(import \"get\" (func (result u32))) {} (import \"note\" (func $f (param \"x\" u32))) {RUN} (import \"see\" (func))", main("")), Reset),
        ("an export between sections", format!("{} (func $f {lift}) (export $g \"first\" (func $f)) (export \"run\" (func $g))", main("")), Reset),
        ("types between sections", format!("(type (list u8)) {} (type (func)) (core type (func)) {RUN} (type (option u8))", main("")), Reset),
        ("core functions of another module between", format!("{} {more} {RUN} (func (export \"other\") (param \"x\" u32) (result u32) (canon lift (core func $other)))", main("")), Reset),
        ("lowered functions between", format!("(import \"get\" (func $g (result u32))) (core func (canon lower (func $g))) {} (core func (canon lower (func $g))) {RUN}", main("")), Reset),
        ("imported instances between", format!("(import \"i\" (instance $x (export \"f\" (func $f (result u32))))) (alias export $x \"f\" (func $f)) {} (core func (canon lower (func $f))) {RUN}", main("")), Reset),
        ("a module that is not there", format!("(core module (memory 1)) {} (core module (memory 1)) {RUN}", main("")), Reset),
        ("a module with an odd part that is not there", format!("(core module (table 1 funcref) (func (table.set (i32.const 0) (ref.null func)))) {} {RUN}", main("")), Reset),
        ("core instances of items between", format!("(core instance $e) {} (core instance $f (export \"r\" (func $m \"run\"))) (func (export \"run\") (param \"x\" u32) (result u32) (canon lift (core func $f \"r\")))", main("")), Reset),
        ("a function by a chain of items", format!(
            "{} (core instance $a (export \"1\" (func $m \"run\"))) (core instance $b (export \"2\" (func $a \"1\"))) (core instance $c (export \"3\" (func $b \"2\")))
             (func (export \"run\") (param \"x\" u32) (result u32) (canon lift (core func $c \"3\")))", main("")), Reset),
        ("a function that a module passes on", format!(
            "{} (core module $on (import \"m\" \"run\" (func (param i32) (result i32))) (export \"r\" (func 0))) (core instance $o (instantiate $on (with \"m\" (instance $m))))
             (func (export \"run\") (param \"x\" u32) (result u32) (canon lift (core func $o \"r\")))", main("")), Reset),
        ("a function that two modules pass on", format!(
            "{} (core module $on (import \"m\" \"run\" (func (param i32) (result i32))) (export \"run\" (func 0))) (core instance $o (instantiate $on (with \"m\" (instance $m))))
             (core module $off (import \"m\" \"run\" (func (param i32) (result i32))) (export \"run\" (func 0))) (core instance $p (instantiate $off (with \"m\" (instance $o))))
             (func (export \"run\") (param \"x\" u32) (result u32) (canon lift (core func $p \"run\")))", main("")), Reset),
        ("the host's function as the component's", format!("(import \"get\" (func $g (param \"x\" u32) (result u32))) (core func $low (canon lower (func $g))) {} {RUN}
            (func (export \"again\") (param \"x\" u32) (result u32) (canon lift (core func $low)))", main("")), Fresh("the host calls a function that is the host's")),
        ("a function of a module that forwards", format!("{} {RUN} (core module $s (table (export \"t\") 1 funcref) (func (export \"f\") (param i32) (result i32) (call_indirect (param i32) (result i32) (local.get 0) (i32.const 0))))
            (core instance $s (instantiate $s)) (core module $fix (import \"t\" \"t\" (table 1 funcref)) (import \"m\" \"run\" (func $f (param i32) (result i32))) (elem (i32.const 0) func $f))
            (core instance (instantiate $fix (with \"t\" (instance $s)) (with \"m\" (instance $m)))) (func (export \"again\") (param \"x\" u32) (result u32) (canon lift (core func $s \"f\")))", main("")), Fresh("the host calls a function that is the host's")),
        ("nothing at all", String::new(), Shape("none of its modules has a memory")),
        ("no memory", format!("(core module $main (global $g (mut i32) (i32.const 1)) (func (export \"run\") (param $x i32) (result i32) (global.get $g) (global.set $g (local.get $x))))
            (core instance $m (instantiate $main)) {RUN}"), Fresh("none of its modules has a memory")),
    ];
    rows.into_iter()
        .map(|(name, text, outcome)| row(name, format!("(component {text})"), outcome))
        .collect()
}
