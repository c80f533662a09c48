//! Random graphs of modules, reset against fresh: a value that passes from one
//! call to the next makes the results differ. Most graphs are of shapes that
//! tool chains make, some have one thing that is odd. Those that are not
//! accepted prove nothing and are counted apart.
//!
//! ```text
//! MB_RESET_GRAPHS=100000 MB_RESET_SEED=1 cargo test --release --lib graphs -- --nocapture
//! ```

use std::{cell::Cell, collections::BTreeMap};

use wasmtime::{
    Config, Engine, OptLevel, Store,
    component::{Component, Instance, Linker, TypedFunc},
};

use super::{differential::setting, generator::Random};
use crate::{CHECKPOINT, RESET, VERIFY, rewrite};

/// Graphs of a plain `cargo test`.
const GRAPHS: u64 = 600;
const CALLS: u32 = 4;

/// What there is beside the main module.
#[derive(Debug, Default)]
struct Parts {
    shim: bool,
    holder: bool,
    fixups: bool,
    linker: bool,
    starter: bool,
    stub: bool,
    /// Something that no tool chain makes.
    odd: bool,
}

impl Parts {
    fn names(&self) -> Vec<&'static str> {
        let Self {
            shim,
            holder,
            fixups,
            linker,
            starter,
            stub,
            odd,
        } = *self;
        let all = [
            ("shim", shim),
            ("holder", holder),
            ("fixups", fixups),
            ("linker", linker),
            ("starter", starter),
            ("stub", stub),
            ("odd", odd),
        ];
        all.into_iter()
            .filter(|(_, there)| *there)
            .map(|(name, _)| name)
            .collect()
    }
}

/// A component with one function `run: u32 -> u32`, which mixes what it finds
/// into its result, and leaves its argument wherever it can.
fn graph(random: &mut Random) -> (String, Parts) {
    let mut parts = Parts {
        shim: random.one_in(2),
        holder: random.one_in(2),
        starter: random.one_in(3),
        stub: random.one_in(4),
        ..Parts::default()
    };
    let fills = parts.shim || random.one_in(2);
    parts.linker = fills && parts.holder && random.one_in(2);
    parts.fixups = fills && !parts.linker;
    let is_odd = Cell::new(false);
    let odd = |random: &mut Random, one_in: u32| {
        let chosen = random.one_in(one_in);
        is_odd.set(is_odd.get() || chosen);
        chosen
    };
    let pages = 1 + random.below(2);
    let grows = random.one_in(3);

    let mut before = String::new();
    if parts.shim {
        let (signature, body) = match random.below(3) {
            _ if !odd(random, 6) => (
                "(param i32)",
                "(call_indirect (param i32) (local.get 0) (i32.const 0))",
            ),
            0 => (
                "(param i32)",
                "(call_indirect (param i32) (i32.const 40000) (i32.const 0))",
            ),
            1 => (
                "(param i32)",
                "(call_indirect (param i32) (local.get 0) (i32.const 0)) (call_indirect (param i32) (local.get 0) (i32.const 1))",
            ),
            _ => (
                "(param i32)",
                "(nop) (call_indirect (param i32) (local.get 0) (i32.and (local.get 0) (i32.const 1)))",
            ),
        };
        let global = if odd(random, 20) {
            "(global (mut i32) (i32.const 0))"
        } else {
            ""
        };
        before += &format!(
            "(core module $shim (table (export \"t\") 2 funcref) {global} (func (export \"f\") {signature} {body}))
             (core instance $s (instantiate $shim))\n"
        );
    }

    let mut run = String::new();
    for _ in 0..2 + random.below(5) {
        let at = random.of(&[40_000, 40_004, 41_000, 43_000, 43_004, 50_000, 65_532]);
        let slot = random.below(4);
        run += &match random.below(9) {
            0..3 => format!(
                "(call $mix (i32.load (i32.const {at}))) (i32.store (i32.const {at}) (local.get 0))"
            ),
            3 => "(call $mix (global.get $g)) (global.set $g (local.get 0))".into(),
            4 | 5 if parts.shim => format!(
                "(call $f (i32.const {at})) (call $mix (i32.load (i32.const {at}))) (call $mix (i32.load (i32.const 41000)))"
            ),
            6 if parts.shim => format!(
                "(local.set $at (i32.const {at})) (call $mix (i32.load offset=4 (local.get $at)))
                 (i32.store (local.get $at) (i32.const 1)) (call $f (i32.const 50000))
                 (i32.store offset=4 (local.get $at) (local.get 0))"
            ),
            7 if grows => "(drop (memory.grow (i32.const 1)))".into(),
            _ => format!(
                "(call_indirect (param i32) (local.get 0) (i32.const {slot})) (call $mix (i32.load (i32.const 41000)))"
            ),
        };
        run.push('\n');
    }
    let import = if parts.shim {
        "(import \"s\" \"f\" (func $f (param i32)))"
    } else {
        ""
    };
    let with = if parts.shim {
        "(with \"s\" (instance $s))"
    } else {
        ""
    };
    let start = if random.one_in(3) {
        "(start $init)"
    } else {
        ""
    };
    let mut text = format!(
        "(core module $main {import}
           (memory (export \"memory\") {pages} 12) (table (export \"table\") 4 funcref)
           (global $g (export \"g\") (mut i32) (i32.const 3)) (global $mixed (mut i32) (i32.const 0))
           (global $heap (mut i32) (i32.const 20000))
           (data (i32.const 43000) \"from the start\") (elem (i32.const 0) $extra $other)
           (func (export \"cabi_realloc\") (param i32 i32 i32 i32) (result i32)
             (global.get $heap) (global.set $heap (i32.add (global.get $heap) (i32.add (local.get 3) (i32.const 8)))))
           (func $mix (param i32)
             (global.set $mixed (i32.add (i32.mul (global.get $mixed) (i32.const 31)) (local.get 0))))
           (func $extra (export \"extra\") (param i32) (i32.store (i32.const 41000) (local.get 0)))
           (func $other (param i32) (i32.store16 (i32.const 50001) (local.get 0)))
           (func $init (export \"init\") (i32.store (i32.const 1000) (i32.const 5)))
           (func (export \"post\") (param i32) (i32.store (i32.const 41004) (local.get 0)))
           (func (export \"run\") (param i32) (result i32) (local $at i32)
             {run} (call $mix (i32.load (i32.const 41004))) (global.get $mixed)) {start})
         (core instance $m (instantiate $main {with}))
         (alias core export $m \"memory\" (core memory $memory))
         (alias core export $m \"table\" (core table $table))
         (alias core export $m \"cabi_realloc\" (core func $realloc))
         (core func $lowered (canon lower (func $get) (memory $memory) (realloc $realloc)))
         (core instance $h (export \"f\" (func $lowered)))\n"
    );

    if odd(random, 20) {
        text += "(export \"code\" (core module $main))\n";
    }
    // By which of several names a library gets what is the main module's.
    let env = match random.below(3) {
        0 => "(instance $m)",
        1 => {
            text += "(core instance $items (export \"memory\" (memory $memory)) (export \"table\" (table $table)))\n";
            "(instance $items)"
        }
        _ => {
            text += "(core module $again (import \"m\" \"memory\" (memory $x 1)) (import \"m\" \"table\" (table $y 1 funcref))
                       (func) (export \"memory\" (memory $x)) (export \"table\" (table $y)))
                     (core instance $a (instantiate $again (with \"m\" (instance $m))))\n";
            "(instance $a)"
        }
    };
    if parts.holder {
        let second = if odd(random, 20) {
            "(core instance (instantiate $lib (with \"env\" (instance $m))))"
        } else {
            ""
        };
        text += &format!(
            "(core module $lib (import \"env\" \"memory\" (memory 1)) (import \"env\" \"table\" (table 1 funcref))
               (global $own (mut i32) (i32.const 9)) (elem (i32.const 2) $leave)
               (data (i32.const 50000) \"of the library\")
               (func $leave (export \"leave\") (param i32)
                 (i32.store (i32.const 41000) (i32.add (global.get $own) (i32.load (i32.const 50008))))
                 (global.set $own (local.get 0)) (i32.store offset=8 (i32.const 50000) (local.get 0)))
               (func (export \"setup\") (i32.store (i32.const 2000) (i32.const 7))))
             (core instance $l (instantiate $lib (with \"env\" {env}))) {second}\n"
        );
    }
    if fills {
        // Where it is filled, with whose function.
        let host = ("(instance $h)", "f");
        let main = ("(instance $m)", random.of(&["extra", "post"]));
        let to_shim = parts.shim && !odd(random, 10);
        let (from, name) = match random.below(3) {
            _ if to_shim => random.of(&[host, main]),
            0 => host,
            _ => main,
        };
        // No tool chain puts the host's functions there.
        let to_host = !to_shim && name == "f";
        let _ = to_host && odd(random, 1);
        let (table, slot) = if to_shim {
            ("(instance $s)", 0)
        } else {
            ("(instance $m)", 3)
        };
        let export = if to_shim { "t" } else { "table" };
        let elements = format!("(elem (table $t) (i32.const {slot}) func $filled)");
        let imports = format!(
            "(import \"t\" \"{export}\" (table $t 1 funcref)) (import \"f\" \"{name}\" (func $filled (param i32)))"
        );
        let given = format!("(with \"t\" {table}) (with \"f\" {from})");
        text += &if parts.linker {
            format!(
                "(core module $link {imports} (import \"m\" \"memory\" (memory 1)) (import \"l\" \"setup\" (func $setup))
                   {elements} (data (i32.const 43100) \"linked\") (func $start (call $setup)) (start $start))
                 (core instance (instantiate $link {given} (with \"m\" (instance $m)) (with \"l\" (instance $l))))\n"
            )
        } else {
            format!(
                "(core module $fix {imports} {elements}) (core instance (instantiate $fix {given}))\n"
            )
        };
    }
    if parts.starter {
        text += "(core module $go (import \"m\" \"init\" (func $init)) (start $init))
                 (core instance (instantiate $go (with \"m\" (instance $m))))\n";
    }
    if odd(random, 25) {
        text += "(core module $more (memory 0 1)) (core instance (instantiate $more))\n";
    }
    parts.odd = is_odd.get();
    let post = if random.one_in(2) {
        "(post-return (core func $m \"post\"))"
    } else {
        ""
    };
    let whole = format!(
        "(import \"get\" (func $get (result string))) {before} {text}
         (func (export \"run\") (param \"x\" u32) (result u32) (canon lift (core func $m \"run\") {post}))"
    );
    if !parts.stub {
        return (format!("(component {whole})"), parts);
    }
    // As those of JavaScript: the real one beside one that traps.
    let outer = format!(
        "(component (import \"get\" (func $get (result string)))
           (component $inner {whole})
           (component $stub (core module $trap (memory (export \"memory\") 0) (func (export \"r\") unreachable))
             (core instance $i (instantiate $trap)) (func (export \"resolve\") (canon lift (core func $i \"r\"))))
           (instance (instantiate $stub)) (instance $i (instantiate $inner (with \"get\" (func $get))))
           (export \"run\" (func $i \"run\")))"
    );
    (outer, parts)
}

type Run = TypedFunc<(u32,), (u32,)>;

fn instantiate(linker: &Linker<()>, component: &Component) -> Option<(Store<()>, Instance, Run)> {
    let mut store = Store::new(linker.engine(), ());
    let made = linker.instantiate(&mut store, component).ok()?;
    let run = made.get_typed_func(&mut store, "run").unwrap();
    Some((store, made, run))
}

#[test]
fn graphs() {
    let (graphs, seed) = (
        setting("MB_RESET_GRAPHS", GRAPHS),
        setting("MB_RESET_SEED", 1),
    );
    let threads = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let counts = std::thread::scope(|scope| {
        let run = |thread| {
            let mut config = Config::new();
            config
                .cranelift_opt_level(OptLevel::None)
                .memory_reservation(4 << 20)
                .memory_guard_size(64 << 10);
            let engine = Engine::new(&config).unwrap();
            let mut linker = Linker::new(&engine);
            let get =
                |_: wasmtime::StoreContextMut<'_, ()>, (): ()| Ok(("of the host".to_owned(),));
            linker.root().func_wrap("get", get).unwrap();
            let mut counts = BTreeMap::new();
            for graph in (thread..graphs).step_by(threads as usize) {
                check(&linker, seed + graph, &mut counts);
            }
            counts
        };
        let running: Vec<_> = (0..threads)
            .map(|thread| scope.spawn(move || run(thread)))
            .collect();
        let mut all: BTreeMap<String, u64> = BTreeMap::new();
        for counts in running {
            for (name, count) in counts.join().unwrap() {
                *all.entry(name).or_default() += count;
            }
        }
        all
    });
    println!(
        "seeds {seed} to {}, no difference: {counts:#?}",
        seed + graphs - 1
    );
    assert!(counts["accepted"] > graphs / 4, "too few prove anything");
}

fn check(linker: &Linker<()>, seed: u64, counts: &mut BTreeMap<String, u64>) {
    let mut random = Random::new(seed);
    let (text, parts) = graph(&mut random);
    let bytes =
        wat::parse_str(&text).unwrap_or_else(|error| panic!("seed {seed}: {error}\n{text}"));
    let mut count = |name: String| *counts.entry(name).or_default() += 1;
    let original = Component::new(linker.engine(), &bytes)
        .unwrap_or_else(|e| panic!("seed {seed}: {e:?}\n{text}"));
    let (rewritten, info) = match rewrite(&bytes) {
        Ok(accepted) => accepted,
        Err(reason) => {
            assert!(parts.odd, "seed {seed}: {reason}\n{text}");
            return count(format!("fresh, as {reason}"));
        }
    };
    let rewritten =
        Component::new(linker.engine(), rewritten).unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
    if instantiate(linker, &original).is_none() {
        return count("does not start".into());
    }
    count("accepted".into());
    parts
        .names()
        .iter()
        .for_each(|name| count(format!("accepted with {name}")));

    let mut kept: Option<(Store<()>, Instance, Run, usize)> = None;
    for call in 0..CALLS {
        let argument = random.next() as u32 | 1;
        let (mut store, _, run) = instantiate(linker, &original).expect("it did before");
        let wanted = run.call(&mut store, (argument,)).ok();
        let (mut store, made, run, calls) = kept.take().unwrap_or_else(|| {
            let (mut store, made, run) =
                instantiate(linker, &rewritten).expect("the other one starts too");
            let checkpoint = made
                .get_typed_func::<(), (u32,)>(&mut store, CHECKPOINT)
                .unwrap();
            assert_ne!(checkpoint.call(&mut store, ()).unwrap(), (u32::MAX,));
            (store, made, run, 0)
        });
        let given = run.call(&mut store, (argument,)).ok();
        let grows = text.contains("(memory.grow");
        // Behind the end of one that grows there is memory that it has not
        // asked for.
        assert!(
            wanted == given || wanted.is_none() && grows,
            "seed {seed}, call {call} after {calls}: {wanted:?}, not {given:?}\n{text}"
        );
        // The host gives it up where memory grew.
        if given.is_none() || grows {
            continue;
        }
        if !info.resets_itself {
            let reset = made.get_typed_func::<(), ()>(&mut store, RESET).unwrap();
            reset.call(&mut store, ()).unwrap();
        }
        let verify = made
            .get_typed_func::<(), (u32,)>(&mut store, VERIFY)
            .unwrap();
        let differences = verify.call(&mut store, ()).unwrap();
        assert_eq!(differences, (0,), "seed {seed}, call {call}\n{text}");
        count("resets".into());
        kept = Some((store, made, run, calls + 1));
    }
}
