//! Routes by which a value could pass from one call to the next, a row each:
//! where the rewriter closes the route, where it refuses the component, and
//! where the engine does. A row that is reset or refused by the rewriter also
//! shows that the route is there: an instance that is used again as it is gives
//! what a fresh one does not.
//!
//! ```text
//! cargo test --release --lib routes -- --nocapture
//! ```

mod components;
mod host;
mod memory;
mod proposals;
mod tables;

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
    let exports = exported(engine, &original);
    let steps: Vec<_> = NUMBERS
        .into_iter()
        .flat_map(|n| exports.iter().cloned().map(move |place| (place, n)))
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
    // As that of the server, as far as it says what is accepted.
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
        memory::stores(),
        memory::bulk_and_data(),
        memory::growth(),
        memory::globals(),
        tables::tables_and_calls(),
        tables::shared(),
        host::shims(),
        host::host_writes(),
        host::lifted(),
        components::handles(),
        components::nested(),
        components::names_and_indices(),
        proposals::canonical_newer(),
        proposals::proposals(),
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

/// A module that gives the sum of its memory.
const SUM_MODULE: &str = "(core module $main (memory (export \"memory\") 2)
    (func (export \"run\") (param i32 i32) (result i32) (i32.load (i32.const 300)))) (core instance $m (instantiate $main))";
