//! Routes by which a value could pass from one call to the next, a row each:
//! where the rewriter closes the route, where it refuses the component, and
//! where the engine does. A row that is reset or refused by the rewriter also
//! shows that the route is there: an instance that is used again as it is gives
//! what a fresh one does not.
//!
//! ```text
//! cargo test --release --lib routes -- --nocapture
//! ```

use std::collections::BTreeMap;

use wasmparser::{Validator, WasmFeatures};
use wasmtime::{
    AsContextMut, Config, Engine, OptLevel, ResourceLimiter, Store, StoreContextMut,
    component::{
        Component, Instance, Linker, Resource, ResourceAny, ResourceType, Type, Val,
        types::{ComponentFunc, ComponentItem},
    },
};

use super::STORES;
use crate::{CHECKPOINT, RESET, VERIFY, rewrite};

/// What each exported function is called with, one after the other: what is
/// short follows what is long.
const NUMBERS: [u32; 6] = [5, 3, 300, 5, 1, 5];

/// What comes of a component.
#[derive(Debug, Clone, Copy)]
enum Outcome {
    /// It is reset, and without that a value passes.
    Reset,
    /// It is reset, and no value could pass: it says that nothing breaks.
    Dead,
    /// It is reset, and uses memory that it has not asked for, where the
    /// original traps.
    Slack,
    /// It is refused for this reason, and a value passes where it is not reset.
    Fresh(&'static str),
    /// It is refused for this reason, for its shape alone.
    Shape(&'static str),
    /// The engine refuses it, for a reason with these words.
    Refused(&'static str),
}
use Outcome::{Dead, Fresh, Refused, Reset, Shape, Slack};

impl Outcome {
    fn name(self) -> &'static str {
        match self {
            Reset => "reset",
            Dead => "reset, nothing passes",
            Slack => "reset, uses slack",
            Fresh(_) => "fresh",
            Shape(_) => "fresh, for its shape",
            Refused(_) => "refused by the engine",
        }
    }
}

struct Row {
    name: String,
    text: String,
    outcome: Outcome,
}

fn row(name: impl Into<String>, text: impl Into<String>, outcome: Outcome) -> Row {
    Row {
        name: name.into(),
        text: text.into(),
        outcome,
    }
}

/// What the host counts of an instance.
#[derive(Default)]
struct Host {
    memory: usize,
    tables: usize,
    /// Handles that the guest has.
    handles: i64,
}

impl ResourceLimiter for Host {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let allowed = maximum.is_none_or(|maximum| desired <= maximum);
        self.memory += if allowed { desired - current } else { 0 };
        Ok(allowed)
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        _: Option<usize>,
    ) -> wasmtime::Result<bool> {
        self.tables += desired - current;
        Ok(true)
    }
}

struct Thing;

/// A value of a type, of a length that goes by the number.
fn value(kind: &Type, n: u32, store: &mut impl AsContextMut<Data = Host>) -> Val {
    let few = n.min(3);
    match kind {
        Type::Bool => Val::Bool(n % 2 == 1),
        Type::U8 => Val::U8(n as u8 | 1),
        Type::U16 => Val::U16(n as u16),
        Type::U32 => Val::U32(n),
        Type::U64 => Val::U64(u64::from(n) << 32 | u64::from(n)),
        Type::Float64 => Val::Float64(f64::from(n)),
        Type::Char => Val::Char(char::from_u32(0x100 + n).unwrap()),
        // Of which an encoding may take one byte, two or three.
        Type::String => {
            let letter = ["a", "é", "€"][n as usize % 3];
            Val::String(letter.repeat(5 * n as usize))
        }
        Type::List(list) => Val::List((0..n).map(|_| value(&list.ty(), few, store)).collect()),
        Type::Tuple(tuple) => Val::Tuple(tuple.types().map(|ty| value(&ty, n, store)).collect()),
        Type::Record(record) => Val::Record(
            record
                .fields()
                .map(|field| (field.name.to_owned(), value(&field.ty, n, store)))
                .collect(),
        ),
        Type::Option(option) => {
            Val::Option((n != 1).then(|| Box::new(value(&option.ty(), n, store))))
        }
        Type::Result(result) => {
            let (side, good) = match n {
                1 => (result.err(), false),
                _ => (result.ok(), true),
            };
            let side = side.map(|ty| Box::new(value(&ty, n, store)));
            Val::Result(if good { Ok(side) } else { Err(side) })
        }
        Type::Own(_) | Type::Borrow(_) => {
            if let Type::Own(_) = kind {
                store.as_context_mut().data_mut().handles += 1;
            }
            let thing = Resource::<Thing>::new_own(n);
            Val::Resource(ResourceAny::try_from_resource(thing, store).unwrap())
        }
        _ => panic!("no row has such a value"),
    }
}

/// Host functions that give what goes by the number that they are asked with.
fn linker(engine: &Engine, component: &Component) -> Linker<Host> {
    let mut items = Vec::new();
    for (name, import) in component.component_type().imports(engine) {
        match import.ty {
            ComponentItem::ComponentInstance(instance) => items.extend(
                instance
                    .exports(engine)
                    .map(|(inner, item)| (Some(name.to_owned()), inner.to_owned(), item.ty)),
            ),
            item => items.push((None, name.to_owned(), item)),
        }
    }
    let mut linker = Linker::new(engine);
    for (instance, name, item) in items {
        let mut inside = linker.root();
        if let Some(instance) = &instance {
            inside = linker.instance(instance).unwrap();
        }
        match item {
            ComponentItem::ComponentFunc(_) => inside.func_new(&name, answer),
            ComponentItem::Resource(_) => {
                let dropped = |mut store: StoreContextMut<'_, Host>, _| {
                    store.data_mut().handles -= 1;
                    Ok(())
                };
                inside.resource(&name, ResourceType::host::<Thing>(), dropped)
            }
            _ => Ok(()),
        }
        .unwrap();
    }
    linker
}

/// What a host function gives.
fn answer(
    mut store: StoreContextMut<'_, Host>,
    kind: ComponentFunc,
    given: &[Val],
    results: &mut [Val],
) -> wasmtime::Result<()> {
    let n = match given.first() {
        Some(Val::U32(n)) => *n % 1000,
        Some(Val::U64(n)) => *n as u32,
        _ => 7,
    };
    for (result, kind) in results.iter_mut().zip(kind.results()) {
        *result = value(&kind, n, &mut store);
    }
    Ok(())
}

/// An exported function, and the instance in which it is, if that is exported.
type Place = (Option<String>, String);

fn exported(engine: &Engine, component: &Component) -> Vec<Place> {
    let mut all = Vec::new();
    for (name, export) in component.component_type().exports(engine) {
        match export.ty {
            ComponentItem::ComponentFunc(_) => all.push((None, name.to_owned())),
            ComponentItem::ComponentInstance(instance) => all.extend(
                instance
                    .exports(engine)
                    .filter(|(_, inner)| matches!(inner.ty, ComponentItem::ComponentFunc(_)))
                    .map(|(inner, _)| (Some(name.to_owned()), inner.to_owned())),
            ),
            _ => {}
        }
    }
    all
}

struct Running {
    store: Store<Host>,
    instance: Instance,
    /// What it had when it was made.
    size: (usize, usize),
}

impl Running {
    fn new(linker: &Linker<Host>, component: &Component) -> Result<Self, wasmtime::Error> {
        let mut store = Store::new(linker.engine(), Host::default());
        store.limiter(|host| host);
        let instance = linker.instantiate(&mut store, component)?;
        let size = (store.data().memory, store.data().tables);
        Ok(Self {
            store,
            instance,
            size,
        })
    }

    /// None if it traps.
    fn call(&mut self, (instance, name): &Place, n: u32) -> Option<String> {
        let Self {
            store,
            instance: made,
            ..
        } = self;
        let inside = instance
            .as_ref()
            .map(|name| made.get_export_index(&mut *store, None, name).unwrap());
        let index = made.get_export_index(&mut *store, inside.as_ref(), name);
        let function = made.get_func(&mut *store, index.unwrap()).unwrap();
        let kind = function.ty(&*store);
        let given: Vec<_> = kind.params().map(|(_, ty)| value(&ty, n, store)).collect();
        let mut results = vec![Val::Bool(false); kind.results().len()];
        function.call(&mut *store, &given, &mut results).ok()?;
        Some(format!("{results:?}"))
    }

    /// As the server does it; false where there is no memory for it.
    fn checkpoint(&mut self) -> bool {
        let given = self.call(&(None, CHECKPOINT.to_owned()), 0).unwrap();
        self.size = (self.store.data().memory, self.store.data().tables);
        given != format!("[U32({})]", u32::MAX)
    }

    /// Whether the host goes on with it.
    fn is_as_large(&self) -> bool {
        let host = self.store.data();
        (host.memory, host.tables) == self.size && host.handles == 0
    }
}

/// What each call gives in an instance of its own.
fn fresh(linker: &Linker<Host>, component: &Component, steps: &[(Place, u32)]) -> Vec<Wanted> {
    steps
        .iter()
        .map(|(place, n)| Running::new(linker, component).unwrap().call(place, *n))
        .collect()
}
type Wanted = Option<String>;

/// What each call gives in one instance, until one traps.
fn reused(linker: &Linker<Host>, component: &Component, steps: &[(Place, u32)]) -> Vec<Wanted> {
    let mut running = Running::new(linker, component).unwrap();
    let mut given = Vec::new();
    for (place, n) in steps {
        given.push(running.call(place, *n));
        if given.last() == Some(&None) {
            break;
        }
    }
    given
}

/// What each call gives in an instance that was reset, and how many resets
/// there were.
fn with_resets(
    linker: &Linker<Host>,
    component: &Component,
    steps: &[(Place, u32)],
    itself: bool,
) -> (Vec<Wanted>, u32) {
    let (mut kept, mut given, mut resets) = (None, Vec::new(), 0);
    for (place, n) in steps {
        let (mut running, again) = kept.take().unwrap_or_else(|| {
            let mut running = Running::new(linker, component).unwrap();
            let again = running.checkpoint();
            (running, again)
        });
        given.push(running.call(place, *n));
        if given.last() == Some(&None) || !again || !running.is_as_large() {
            continue;
        }
        if !itself {
            running.call(&(None, RESET.to_owned()), 0).unwrap();
        }
        let differs = running.call(&(None, VERIFY.to_owned()), 0);
        assert_eq!(differs.as_deref(), Some("[U32(0)]"));
        resets += 1;
        kept = Some((running, again));
    }
    (given, resets)
}

/// Holds a row against what it says: why it is not so.
fn check(engine: &Engine, row: &Row) -> Result<u32, String> {
    let bytes = wat::parse_str(&row.text).map_err(|error| error.to_string())?;
    let original = Component::new(engine, &bytes);
    let reset = rewrite(&bytes);
    if let Refused(words) = row.outcome {
        Validator::new_with_features(WasmFeatures::all())
            .validate_all(&bytes)
            .map_err(|error| format!("a dud: {error}"))?;
        let error = match original {
            Ok(_) => return Err(format!("the engine takes it, rewritten: {:?}", reset.err())),
            Err(error) => format!("{error:#}"),
        };
        if reset.is_ok_and(|(rewritten, _)| Component::new(engine, rewritten).is_ok()) {
            return Err("the engine takes what was made of it".into());
        }
        return match error.contains(words) {
            true => Ok(0),
            false => Err(format!("refused, as {error}")),
        };
    }
    let original = original.map_err(|error| format!("the engine refuses it: {error:#}"))?;
    match (row.outcome, &reset) {
        (Fresh(words) | Shape(words), Err(reason)) => {
            if !reason.to_string().contains(words) {
                return Err(format!("refused, as {reason}"));
            }
            if let Shape(_) = row.outcome {
                return Ok(0);
            }
        }
        (Fresh(_) | Shape(_), Ok(_)) => return Err("accepted".into()),
        (_, Err(reason)) => return Err(format!("not accepted: {reason}")),
        _ => {}
    }
    let linker = linker(engine, &original);
    let places = exported(engine, &original);
    let steps: Vec<_> = NUMBERS
        .into_iter()
        .flat_map(|n| places.iter().cloned().map(move |place| (place, n)))
        .collect();
    Running::new(&linker, &original).map_err(|error| format!("it does not start: {error:#}"))?;
    let wanted = fresh(&linker, &original, &steps);
    let passes = |without: &[Wanted], wanted: &[Wanted]| without != &wanted[..without.len()];
    let is_live = passes(&reused(&linker, &original, &steps), &wanted);
    let Ok((rewritten, info)) = reset else {
        return is_live
            .then_some(0)
            .ok_or_else(|| "nothing passes".to_owned());
    };
    let rewritten = Component::new(engine, rewritten).map_err(|error| format!("{error:#}"))?;
    let (given, resets) = with_resets(&linker, &rewritten, &steps, info.resets_itself);
    let ours = fresh(&linker, &rewritten, &steps);
    if given != ours {
        return Err(format!("LEAK: {given:?}, not {ours:?}"));
    }
    let is_live = match row.outcome {
        Slack => {
            let traps = wanted
                .iter()
                .zip(&given)
                .all(|(w, g)| w.is_none() || w == g);
            if !traps || wanted == given {
                return Err(format!("{given:?}, not {wanted:?}"));
            }
            let mut unreset = Vec::new();
            let mut running = Running::new(&linker, &rewritten).unwrap();
            for (place, n) in &steps {
                unreset.push(running.call(place, *n));
            }
            passes(&unreset, &ours)
        }
        _ if wanted != given => return Err(format!("{given:?}, not {wanted:?}")),
        _ => is_live,
    };
    if is_live == matches!(row.outcome, Dead) {
        return Err(format!("a value passes: {is_live}: {wanted:?}"));
    }
    Ok(resets)
}

#[test]
fn routes() {
    let mut config = Config::new();
    // As that of the server, as far as it says what is let in.
    config
        .concurrency_support(false)
        .wasm_memory64(false)
        .wasm_relaxed_simd(false)
        .wasm_component_model(true)
        .cranelift_opt_level(OptLevel::None)
        .memory_reservation(4 << 20)
        .memory_guard_size(64 << 10);
    let engine = Engine::new(&config).unwrap();
    let rows = [
        stores(),
        bulk_and_data(),
        growth(),
        globals(),
        tables_and_calls(),
        shared(),
        shims(),
        host_writes(),
        lifted(),
        handles(),
        nested(),
        names_and_indices(),
        canonical_newer(),
        proposals(),
    ];
    let rows: Vec<_> = rows.into_iter().flatten().collect();
    let names: std::collections::HashSet<_> = rows.iter().map(|row| &row.name).collect();
    assert_eq!(names.len(), rows.len(), "two rows have one name");
    let (mut counts, mut resets, mut wrong) = (BTreeMap::<_, u32>::new(), 0, Vec::new());
    for row in &rows {
        *counts.entry(row.outcome.name()).or_default() += 1;
        match check(&engine, row) {
            Ok(count) => resets += count,
            Err(error) => wrong.push(format!("{}: {:?}: {error}", row.name, row.outcome)),
        }
    }
    println!("{} rows, {resets} resets: {counts:#?}", rows.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(rows.len() >= 150);
}

/// The function of which nearly every row has one.
const RUN: &str =
    "(func (export \"run\") (param \"x\" u32) (result u32) (canon lift (core func $m \"run\")))";

/// The module with the memory, and its instance `$m`.
fn owner(memory: &str, inside: &str, run: &str) -> String {
    format!(
        "(core module $main (memory (export \"memory\") {memory}) {inside}
           (func $run (export \"run\") (param $x i32) (result i32) (local $old i32) (local $b i32) {run}))
         (core instance $m (instantiate $main))\n"
    )
}

/// A component of one module, with a memory of two pages.
fn alone(inside: &str, run: &str) -> String {
    sized("2", inside, run)
}

fn sized(memory: &str, inside: &str, run: &str) -> String {
    format!("(component {} {RUN})", owner(memory, inside, run))
}

/// What it reads is what it gives, and it writes in between.
fn old(read: &str, write: &str) -> String {
    format!("(local.set $old {read}) {write} (local.get $old)")
}

/// Leaves its number at an address, and gives what was there.
fn swap(at: u32) -> String {
    old(
        &format!("(i32.load (i32.const {at}))"),
        &format!("(i32.store (i32.const {at}) (local.get $x))"),
    )
}

/// A function that gives a sum of what lies from one address to another.
const SUM: &str = "(func $sum (param i32 i32) (result i32) (local i32)
    (loop (local.set 2 (i32.add (i32.mul (local.get 2) (i32.const 31)) (i32.load8_u (local.get 0))))
      (br_if 0 (i32.lt_u (local.tee 0 (i32.add (local.get 0) (i32.const 1))) (local.get 1))))
    (local.get 2))";

/// How the host allocates: from 20000 on.
const REALLOC: &str = "(global $heap (mut i32) (i32.const 20000))
    (func $realloc (export \"realloc\") (param i32 i32 i32 i32) (result i32) (local $p i32)
      (local.set $p (i32.and (i32.add (global.get $heap) (i32.const 7)) (i32.const -8)))
      (global.set $heap (i32.add (local.get $p) (local.get 3)))
      (memory.copy (local.get $p) (local.get 0) (local.get 1)) (local.get $p))";

/// A value of a type that goes by the number.
fn of_number(kind: &str) -> &'static str {
    match kind {
        "i32" => "(i32.mul (local.get $x) (i32.const 0x01010101))",
        "i64" => "(i64.mul (i64.extend_i32_u (local.get $x)) (i64.const 0x0101010101010101))",
        "f32" => "(f32.reinterpret_i32 (i32.mul (local.get $x) (i32.const 0x01010101)))",
        "f64" => {
            "(f64.reinterpret_i64 (i64.mul (i64.extend_i32_u (local.get $x)) (i64.const 0x0101010101010101)))"
        }
        _ => "(i8x16.splat (local.get $x))",
    }
}

/// Every width across the end of a card, and as far as a mark before it holds.
fn stores() -> Vec<Row> {
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
fn bulk_and_data() -> Vec<Row> {
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

fn growth() -> Vec<Row> {
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

fn globals() -> Vec<Row> {
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

/// The module with the memory, and a library that has `run`.
fn with_library(main: &str, library: &str, run: &str) -> String {
    format!(
        "(component {} (core module $lib (import \"env\" \"memory\" (memory 2)) {library}
           (func $lib-run (export \"run\") (param $x i32) (result i32) (local $old i32) (local $b i32) {run}))
         (core instance $l (instantiate $lib (with \"env\" (instance $m)) (with \"env2\" (instance $m))))
         (func (export \"run\") (param \"x\" u32) (result u32) (canon lift (core func $l \"run\"))))",
        owner("2", main, "unreachable")
    )
}

fn tables_and_calls() -> Vec<Row> {
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
fn shared() -> Vec<Row> {
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

fn shims() -> Vec<Row> {
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
fn host_writes() -> Vec<Row> {
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
fn lifted() -> Vec<Row> {
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

/// A module that gives the sum of its memory.
const SUM_MODULE: &str = "(core module $main (memory (export \"memory\") 2)
    (func (export \"run\") (param i32 i32) (result i32) (i32.load (i32.const 300)))) (core instance $m (instantiate $main))";

/// Handles of the host's and of the component's own resources.
fn handles() -> Vec<Row> {
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
fn nested() -> Vec<Row> {
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
fn names_and_indices() -> Vec<Row> {
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

/// What of the canonical ABI came after its first version.
fn canonical_newer() -> Vec<Row> {
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
fn proposals() -> Vec<Row> {
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
