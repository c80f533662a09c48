//! Routes by way of memory and globals: stores of every width, bulk instructions,
//! data, growth.

use super::*;

/// Every width across the end of a card, and as far as a mark before it holds.
pub(super) fn stores() -> Vec<Row> {
    let mut rows = Vec::new();
    for (name, kind) in STORES {
        let bits = ["8", "16", "32", "64"]
            .into_iter()
            .find(|bits| name.trim_end_matches("_lane").ends_with(bits));
        let width = match (bits, kind) {
            (Some(bits), _) if name.contains("store") && !name.ends_with("store") => {
                bits.parse::<u32>().unwrap() / 8
            }
            (_, "v128") => 16,
            (_, "i64" | "f64") => 8,
            _ => 4,
        };
        let lane = if name.ends_with("_lane") { " 1" } else { "" };
        let value = of_number(kind);
        let at = 40_960 - width.div_ceil(2);
        let last = |at: u32| format!("(i32.load8_u (i32.const {}))", at + width - 1);
        rows.push(row(
            format!("{name} across the end of a card"),
            alone(
                "",
                &old(
                    &last(at),
                    &format!("({name}{lane} (i32.const {at}) {value})"),
                ),
            ),
            Reset,
        ));
        rows.push(row(
            format!("{name} behind a mark at the end of a card"),
            alone(
                "",
                &old(
                    &last(40_959 + 240),
                    &format!(
                        "(local.set $b (i32.const 40959)) (i32.store8 (local.get $b) (i32.const 0))
                         ({name} offset=240{lane} (local.get $b) {value})"
                    ),
                ),
            ),
            Reset,
        ));
    }
    let word = |at: u32| format!("(i32.load (i32.const {at}))");
    let store = "(i32.store8 (local.get $b) (i32.const 0))";
    for (name, read, write) in [
        ("a store across the end of a page", word(65_534), "(i32.store (i32.const 65534) (local.get $x))".to_owned()),
        ("a store at the end of memory", word(131_068), "(i32.store (i32.const 131068) (local.get $x))".into()),
        ("a store at address 0", word(0), "(i32.store (i32.const 0) (local.get $x))".into()),
        ("a store with a large offset", word(100_001), "(i32.store offset=100000 (i32.const 1) (local.get $x))".into()),
        ("a store beside one whose base changes", word(60_000),
         format!("(local.set $b (i32.const 50000)) {store} (local.set $b (i32.const 60000)) (i32.store (local.get $b) (local.get $x))")),
        ("a store whose value changes the base", word(60_000),
         format!("(local.set $b (i32.const 50000)) {store} (i32.store (local.get $b) (i32.const 1))
                  (i32.store (local.tee $b (i32.const 60000)) (local.get $x))")),
        ("a store whose base changes as its value is computed", word(50_000),
         format!("(local.set $b (i32.const 60000)) {store} (local.set $b (i32.const 50000))
                  (i32.store (local.get $b) (local.tee $b (local.get $x)))")),
        ("a store behind a mark that is jumped over", word(50_000),
         format!("(local.set $b (i32.const 50000)) (block (br_if 0 (local.get $x)) {store}) (i32.store (local.get $b) (local.get $x))")),
        ("a store behind a mark in a branch", word(50_000),
         format!("(local.set $b (i32.const 50000)) (if (i32.eqz (local.get $x)) (then {store})) (i32.store (local.get $b) (local.get $x))")),
        ("a store behind a mark in the other branch", word(50_000),
         format!("(local.set $b (i32.const 50000)) (if (local.get $x) (then (nop) (i32.store (local.get $b) (local.get $x))) (else {store}))")),
        ("a store in a loop with a moving base", word(52_000),
         "(local.set $b (i32.const 50000)) (loop (i32.store (local.get $b) (local.get $x))
            (br_if 0 (i32.lt_u (local.tee $b (i32.add (local.get $b) (i32.const 1000))) (i32.const 53000))))".into()),
        ("a store below a mark", word(50_000),
         "(local.set $b (i32.const 50000)) (i32.store8 offset=2000 (local.get $b) (i32.const 0)) (i32.store (local.get $b) (local.get $x))".into()),
        ("a store with a value of select", word(50_000),
         format!("(local.set $b (i32.const 60000)) {store} (i32.store (select (i32.const 50000) (local.get $b) (local.get $x)) (local.get $x))")),
        ("a store with an address of br_table", word(50_000),
         format!("(local.set $b (i32.const 60000)) {store} (i32.store (block (result i32) (br_table 0 0 (i32.const 50000) (local.get $x))) (local.get $x))")),
        ("a call that traps after it wrote", word(50_000),
         "(i32.store (i32.const 50000) (local.get $x)) (if (i32.eq (local.get $x) (i32.const 300)) (then unreachable))".into()),
        ("an address that wraps around", word(50_000),
         "(i32.store (i32.const 50000) (local.get $x)) (if (i32.eq (local.get $x) (i32.const 300)) (then (i32.store offset=8 (i32.const -4) (local.get $x))))".into()),
    ] {
        rows.push(row(name, alone("", &old(&read, &write)), Reset));
    }
    rows
}

/// Bulk instructions, and what is there from the start.
pub(super) fn bulk_and_data() -> Vec<Row> {
    let byte = |at: u32| format!("(i32.load8_u (i32.const {at}))");
    let fill =
        |at, length| format!("(memory.fill (i32.const {at}) (local.get $x) (i32.const {length}))");
    let copy = |to, from, length| {
        format!(
            "(i32.store8 (i32.const {from}) (local.get $x))
             (memory.copy (i32.const {to}) (i32.const {from}) (i32.const {length}))"
        )
    };
    let passive = "(data $d \"passive\")";
    let mut rows: Vec<_> = [
        ("memory.fill within a card, its first byte", fill(41_000, 20), byte(41_000)),
        ("memory.fill that ends with a card", fill(40_000, 960), byte(40_959)),
        ("memory.fill one byte into a card", fill(40_000, 961), byte(40_960)),
        ("memory.fill in the midst of many cards", fill(40_000, 30_000), byte(55_000)),
        ("memory.fill to the end of memory", fill(131_000, 72), byte(131_071)),
        ("memory.fill of everything", fill(0, 131_072), byte(70_000)),
        ("memory.copy to a higher address", copy(60_000, 40_000, 3000), byte(60_000)),
        ("memory.copy that overlaps upwards", copy(40_500, 40_000, 2000), byte(40_500)),
        ("memory.copy that overlaps downwards", copy(40_000, 40_500, 2000), byte(40_000)),
        ("memory.init", "(memory.init $d (local.get $x) (i32.const 0) (i32.const 7))".into(), byte(3)),
        ("memory.init across the end of a card",
         "(memory.init $d (i32.const 40957) (i32.const 0) (i32.const 7))".into(), byte(40_963)),
        ("bulk instructions of length 0, and a store",
         "(memory.fill (i32.const 131072) (i32.const 1) (i32.const 0)) (memory.copy (i32.const 7) (i32.const 9) (i32.const 0))
          (memory.init $d (i32.const 0) (i32.const 7) (i32.const 0)) (i32.store8 (i32.const 9000) (local.get $x))".into(), byte(9000)),
    ]
    .map(|(name, write, read)| row(name, alone(passive, &old(&read, &write)), Reset))
    .into();
    for (name, data, at, outcome) in [
        ("a segment", "(data (i32.const 41000) \"four\")", 41_000, Reset),
        ("a segment at the end of a card", "(data (i32.const 40957) \"beyond it\")", 40_962, Reset),
        ("a segment at the end of memory", "(data (i32.const 131068) \"four\")", 131_068, Reset),
        ("segments that overlap", "(data (i32.const 41000) \"first one\") (data (i32.const 41002) \"second\")", 41_002, Reset),
        ("a segment of nothing", "(data (i32.const 131072) \"\")", 41_000, Reset),
        ("a segment whose place is a sum", "(data (offset (i32.add (i32.const 40000) (i32.const 1000))) \"four\")", 41_000, Reset),
        ("a segment whose place is a global's", "(global $at i32 (i32.const 41000)) (data (global.get $at) \"four\")", 41_000,
         Fresh("global.get of locally defined global")),
        ("a segment whose place is a product", "(data (offset (i32.mul (i32.const 41) (i32.const 1000))) \"four\")", 41_000,
         Fresh("where its data lies is computed")),
        ("a segment whose place is a difference", "(data (offset (i32.sub (i32.const 41001) (i32.const 1))) \"four\")", 41_000,
         Fresh("where its data lies is computed")),
        ("a start function that stores", "(func $s (i32.store (i32.const 41000) (i32.const 77))) (start $s)", 41_000, Reset),
        ("a start function that fills over segments",
         "(data (i32.const 41000) \"four\") (func $s (memory.fill (i32.const 40000) (i32.const 7) (i32.const 4000))) (start $s)", 41_002, Reset),
        ("a start function that copies a passive segment",
         "(data $d \"four\") (func $s (memory.init $d (i32.const 41000) (i32.const 0) (i32.const 4))) (start $s)", 41_000, Reset),
        ("a start function that calls by a table",
         "(table 1 funcref) (elem (i32.const 0) $w) (func $w (i32.store (i32.const 41000) (i32.const 77)))
          (func $s (call_indirect (i32.const 0))) (start $s)", 41_000, Reset),
        ("a start function that drops a segment", "(data $d \"four\") (func $s (data.drop $d)) (start $s)", 41_000, Fresh("drops segments")),
    ] {
        rows.push(row(name, alone(data, &swap(at)), outcome));
    }
    rows
}

pub(super) fn growth() -> Vec<Row> {
    let grow = |pages: &str| format!("(drop (memory.grow {pages}))");
    let one = grow("(i32.const 1)");
    let mut rows: Vec<_> = [
        ("the size after growth into slack", "1 12", "", old("(memory.size)", &one), Reset),
        ("the size after growth beyond slack", "1 12", "", old("(memory.size)", &grow("(i32.const 6)")), Reset),
        ("the size where growth is refused", "1 12", "",
         old("(memory.size)", &format!("(drop (memory.grow (i32.const 1000))) {one}")), Reset),
        ("what growth gives", "1 12", "", "(memory.grow (i32.const 1))".into(), Reset),
        ("growth by nothing", "1 12", "", format!("{one} (memory.grow (i32.const 0))"), Reset),
        ("growth to the utmost", "1", "", old("(memory.size)", &format!("{} {one}", grow("(i32.const -1)"))), Reset),
        ("growth of a memory that may not", "2 2", "", format!("{one} {}", swap(41_000)), Reset),
        ("growth of a memory that may by one page", "1 2", "", old("(memory.size)", &one), Reset),
        ("what lies in a page that was added", "1 12", "", format!("{one} {}", swap(70_000)), Reset),
        ("what lies at the end of slack", "1 12", "", format!("{} {}", grow("(i32.const 4)"), swap(5 * 65_536 - 4)), Reset),
        ("what lies beyond slack", "1 12", "", format!("{} {}", grow("(i32.const 6)"), swap(7 * 65_536 - 4)), Reset),
        ("a memory without pages that grows", "0 12", "", format!("{one} {}", swap(4000)), Reset),
        ("a memory of up to 4 GiB", "1 65536", "", old("(memory.size)", &one), Reset),
        ("growth in the start", "1 12", "(func $s (drop (memory.grow (i32.const 1)))) (start $s)", swap(70_000), Reset),
        ("growth in the start beyond slack", "1 12",
         "(func $s (drop (memory.grow (i32.const 6))) (i32.store (i32.const 400000) (i32.const 9))) (start $s)", swap(400_000), Reset),
        ("growth in the start, and again", "1 12", "(func $s (drop (memory.grow (i32.const 2)))) (start $s)", old("(memory.size)", &one), Reset),
        ("growth in the start beyond 1 GiB", "1", "(func $s (drop (memory.grow (i32.const 16384)))) (start $s)", swap(4000), Reset),
        ("growth by a tail call", "1 12", "(func $g (result i32) (memory.grow (i32.const 1)))", "(return_call $g)".into(), Reset),
        ("a memory of 1 GiB and a page", "16385", "", swap(4000), Fresh("its memory is too large")),
        ("a memory of 1 GiB that may grow", "16384 16386", "", format!("{one} {}", swap(4000)), Fresh("its memory is too large")),
        ("a memory of 4 GiB", "65536", "", swap(4000), Fresh("its memory is too large")),
        ("slack that nobody asked for", "1 12", "(func (drop (memory.grow (i32.const 1))))", swap(70_000), Slack),
        ("slack that is filled to its end", "1 12", "(func (drop (memory.grow (i32.const 1))))",
         old("(i32.load8_u (i32.const 327679))", "(memory.fill (i32.const 60000) (local.get $x) (i32.const 267680))"), Slack),
        ("slack that is asked for later", "1 12", "",
         format!("(if (i32.and (local.get $x) (i32.const 2)) (then (i32.store (i32.const 70000) (local.get $x)) (return (i32.const 1)))) {one} (i32.load (i32.const 70000))"),
         Slack),
    ]
    .map(|(name, memory, inside, run, outcome)| row(name, sized(memory, inside, &run), outcome))
    .into();
    rows.push(row(
        "a memory without pages that another module grows",
        "(component (core module $z (memory (export \"memory\") 0 12)) (core instance $z (instantiate $z))
           (core module $main (import \"z\" \"memory\" (memory 0)) (func (export \"run\") (param i32) (result i32)
             (memory.grow (i32.const 1))))
           (core instance $m (instantiate $main (with \"z\" (instance $z))))
           (func (export \"run\") (param \"x\" u32) (result u32) (canon lift (core func $m \"run\"))))",
        Fresh("begins with a memory without pages"),
    ));
    rows
}

pub(super) fn globals() -> Vec<Row> {
    let mut rows = Vec::new();
    for (kind, zero, read) in [
        ("i32", "i32.const 9", "(global.get $g)"),
        (
            "i64",
            "i64.const 9",
            "(i32.wrap_i64 (i64.shr_u (global.get $g) (i64.const 32)))",
        ),
        (
            "f32",
            "f32.const 9",
            "(i32.reinterpret_f32 (global.get $g))",
        ),
        (
            "f64",
            "f64.const 9",
            "(i32.wrap_i64 (i64.reinterpret_f64 (global.get $g)))",
        ),
        (
            "v128",
            "v128.const i64x2 9 9",
            "(i32x4.extract_lane 3 (global.get $g))",
        ),
    ] {
        let inside = format!("(global $g (mut {kind}) ({zero}))");
        let write = format!("(global.set $g {})", of_number(kind));
        rows.push(row(
            format!("a global of {kind}"),
            alone(&inside, &old(read, &write)),
            Reset,
        ));
    }
    let set = old("(global.get $g)", "(global.set $g (local.get $x))");
    let is_null = |write: &str| old("(ref.is_null (global.get $g))", write);
    for (name, inside, run, outcome) in [
        (
            "a global that begins with another one's value",
            "(global $a i32 (i32.const 7)) (global $g (mut i32) (global.get $a))",
            set.clone(),
            Fresh("global.get of locally defined global"),
        ),
        (
            "a global that begins with a product",
            "(global $g (mut i32) (i32.mul (i32.const 7) (i32.const 9)))",
            set.clone(),
            Reset,
        ),
        (
            "a global that the start sets",
            "(global $g (mut i32) (i32.const 7)) (func $s (global.set $g (i32.const 8))) (start $s)",
            set.clone(),
            Reset,
        ),
        (
            "a global under two names",
            "(global $g (export \"a\") (export \"b\") (mut i32) (i32.const 7))",
            set.clone(),
            Reset,
        ),
        (
            "a global between constant ones",
            "(global i64 (i64.const 1)) (global $g (mut i32) (i32.const 7)) (global f32 (f32.const 1))",
            set.clone(),
            Reset,
        ),
        (
            "a global of funcref",
            "(global $g (mut funcref) (ref.null func)) (elem declare func $run)",
            is_null("(global.set $g (ref.func $run))"),
            Fresh("holds a reference"),
        ),
        (
            "a global of a typed reference",
            "(type $t (func)) (func $f) (global $g (mut (ref null $t)) (ref.null $t)) (elem declare func $f)",
            is_null("(global.set $g (ref.func $f))"),
            Fresh("function references"),
        ),
        (
            "a constant reference",
            "(global $g funcref (ref.func $run))",
            swap(4000),
            Reset,
        ),
        (
            "a global of externref",
            "(global $g (mut externref) (ref.null extern))",
            swap(4000),
            Refused("gc types"),
        ),
    ] {
        rows.push(row(name, alone(inside, &run), outcome));
    }
    for (name, main, library, outcome) in [
        (
            "a global of another module",
            "(global $g (export \"g\") (mut i32) (i32.const 7))",
            "",
            Reset,
        ),
        (
            "a global of the library",
            "(global (export \"g\") (mut i32) (i32.const 7))",
            "(global $own (mut i32) (i32.const 5))",
            Reset,
        ),
    ] {
        let run = if library.is_empty() {
            set.clone()
        } else {
            old("(global.get $own)", "(global.set $own (local.get $x))")
        };
        let inside = format!("(import \"env\" \"g\" (global $g (mut i32))) {library}");
        rows.push(row(name, with_library(main, &inside, &run), outcome));
    }
    rows.push(row(
        "a global in a module before the memory",
        format!(
            "(component (core module $g (global (export \"g\") (mut i32) (i32.const 7))) (core instance $g (instantiate $g))
               (core module $main (import \"g\" \"g\" (global $g (mut i32))) (memory 1)
                 (func (export \"run\") (param $x i32) (result i32) (local $old i32) {set}))
               (core instance $m (instantiate $main (with \"g\" (instance $g)))) {RUN})"
        ),
        Fresh("before its memory"),
    ));
    rows.push(row(
        "a global that is passed on twice",
        format!(
            "(component {} (core module $on (import \"m\" \"g\" (global $g (mut i32))) (export \"h\" (global $g)))
               (core instance $o (instantiate $on (with \"m\" (instance $m0)))) (alias core export $o \"h\" (core global $h))
               (core instance $i (export \"i\" (global $h)))
               (core module $lib (import \"i\" \"i\" (global $g (mut i32)))
                 (func (export \"run\") (param $x i32) (result i32) (local $old i32) {set}))
               (core instance $m (instantiate $lib (with \"i\" (instance $i)))) {RUN})",
            owner("1", "(global (export \"g\") (mut i32) (i32.const 7))", "unreachable").replace("$m ", "$m0 ")
        ),
        Reset,
    ));
    rows
}
