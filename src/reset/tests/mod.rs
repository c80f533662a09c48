//! The rewritten module does what the original does, and is reset to what it
//! was.

mod differential;
mod generator;
mod graphs;
mod routes;
mod smith;

use std::sync::OnceLock;

use proptest::prelude::*;
use wasmtime::{Engine, Instance, Module, Store, Val};

use super::{
    CHECKPOINT, RESET, ResetInfo,
    functions::cards_pages,
    module::{self, Rewriting},
    module_shape::{ModuleShape, Space},
    rewrite,
};

/// Of every store instruction, what it stores.
const STORES: [(&str, &str); 14] = [
    ("i32.store", "i32"),
    ("i32.store8", "i32"),
    ("i32.store16", "i32"),
    ("i64.store", "i64"),
    ("i64.store8", "i64"),
    ("i64.store16", "i64"),
    ("i64.store32", "i64"),
    ("f32.store", "f32"),
    ("f64.store", "f64"),
    ("v128.store", "v128"),
    ("v128.store8_lane", "v128"),
    ("v128.store16_lane", "v128"),
    ("v128.store32_lane", "v128"),
    ("v128.store64_lane", "v128"),
];

const PAGES: u32 = 2;
const WASM_PAGE: u32 = 65_536;

/// A module with a function for each way to change something.
fn guest() -> String {
    let mut text = format!(
        "(module (memory (export \"memory\") {PAGES} 12)
           (global $a (export \"a\") (mut i32) (i32.const 7)) (global $b (export \"b\") (mut i64) (i64.const -7))
           (global $c (export \"c\") (mut f32) (f32.const 1.5)) (global $d (export \"d\") (mut f64) (f64.const 2.5))
           (global $e (mut v128) (v128.const i32x4 1 2 3 4))
           (data (i32.const 100) \"hello\") (data (i32.const 4090) \"beyond the end of a page\")
           (data (i32.const 131058) \"the end of it\\00\")
           (data $passive \"bytes that are asked for\")
           (func $start (i32.store (i32.const 70000) (i32.const -1)) (global.set $a (i32.const 8))
             (memory.fill (i32.const 12280) (i32.const 5) (i32.const 5000)))
           (start $start)
           (func (export \"cabi_realloc\") (param i32 i32 i32 i32) (result i32) (local.get 0))
           (func (export \"fill\") (param i32 i32 i32) (memory.fill (local.get 0) (local.get 1) (local.get 2)))
           (func (export \"copy\") (param i32 i32 i32) (memory.copy (local.get 0) (local.get 1) (local.get 2)))
           (func (export \"init\") (param i32 i32 i32) (memory.init $passive (local.get 0) (i32.const 3) (i32.const 9)))
           (func (export \"grow\") (param i32 i32 i32) (result i32) (memory.grow (local.get 0)))
           (func (export \"size\") (result i32) (memory.size))
           (func (export \"e\") (result i32) (i32x4.extract_lane 2 (global.get $e)))
           (func (export \"globals\") (param i32 i32 i32)
             (global.set $a (local.get 0)) (global.set $b (i64.extend_i32_u (local.get 1)))
             (global.set $c (f32.convert_i32_u (local.get 0))) (global.set $d (f64.convert_i32_u (local.get 1)))
             (global.set $e (i32x4.splat (local.get 2))))
           (func (export \"pair\") (param i32 i32 i32)
             (i32.store offset=8 (local.get 0) (local.get 1)) (i32.store offset=248 (local.get 0) (local.get 1)))
           (func (export \"fields\") (param i32 i32 i32)
             (i32.store offset=24 (local.get 0) (local.get 1))
             (i64.store offset=8 (local.get 0) (i64.load (local.get 0)))
             (i32.store offset=248 (local.get 0) (local.get 1))
             (i32.store offset=261 (local.get 0) (local.get 1))
             (if (i32.and (local.get 2) (i32.const 1)) (then (i32.store offset=600 (local.get 0) (local.get 1))))
             (i32.store offset=610 (local.get 0) (local.get 1))
             (block (br_if 0 (i32.and (local.get 2) (i32.const 2))) (i32.store offset=5000 (local.get 0) (local.get 1)))
             (i32.store offset=5008 (local.get 0) (local.get 1))
             (i32.store offset=5012 (local.get 0) (local.tee 0 (i32.add (local.get 0) (i32.const 9000))))
             (i32.store offset=5016 (local.get 0) (local.get 1)))
           (func (export \"loop\") (param i32 i32 i32)
             (i32.store (local.get 0) (local.get 1))
             (loop
               (i32.store offset=4 (local.get 0) (local.get 1))
               (i32.store offset=12 (local.get 0) (local.get 1))
               (local.set 0 (i32.add (local.get 0) (i32.const 5000)))
               (br_if 0 (local.tee 2 (i32.and (i32.sub (local.get 2) (i32.const 1)) (i32.const 7)))))\n\
             (f64.store offset=3 (local.get 0) (f64.const 1.5)))\n"
    );
    for (name, kind) in STORES {
        let value = match kind {
            "i32" => "(local.get 1)".to_owned(),
            "v128" => "(i32x4.splat (local.get 1))".to_owned(),
            "i64" => {
                "(i64.mul (i64.extend_i32_u (local.get 1)) (i64.const 0x100000001))".to_owned()
            }
            float => format!("({float}.convert_i32_u (local.get 1))"),
        };
        let lane = if name.ends_with("_lane") { " 1" } else { "" };
        for (suffix, offset) in [("", ""), ("+", " offset=4093")] {
            text += &format!(
                "(func (export \"{name}{suffix}\") (param i32 i32 i32) ({name}{offset}{lane} (local.get 0) {value}))\n"
            );
        }
    }
    text + ")"
}

/// What is made of a module that stands alone.
fn rewritten(module: &[u8]) -> Vec<u8> {
    let shape = ModuleShape::of(module, 0..module.len()).unwrap();
    let realloc = shape.exported(Space::Function, "cabi_realloc");
    let allocators = realloc.as_slice();
    let host_functions: &[u32] = if realloc.is_some() { &[] } else { &[0] };
    let how = Rewriting {
        allocators,
        host_functions,
        post_returns: &[],
        largest_result: 100,
        alone: true,
    };
    module::rewrite(module, &how)
        .unwrap_or_else(|reason| panic!("{reason}"))
        .0
}

/// The module, and what is made of it.
fn modules() -> &'static (Engine, Module, Module) {
    static MODULES: OnceLock<(Engine, Module, Module)> = OnceLock::new();
    MODULES.get_or_init(|| {
        let bytes = wat::parse_str(guest()).unwrap();
        let rewritten = rewritten(&bytes);
        let engine = Engine::default();
        let compile = |bytes: &[u8]| Module::new(&engine, bytes).unwrap();
        (engine.clone(), compile(&bytes), compile(&rewritten))
    })
}

struct Running {
    store: Store<()>,
    instance: Instance,
}

impl Running {
    fn new(engine: &Engine, module: &Module) -> Self {
        let mut store = Store::new(engine, ());
        let instance = Instance::new(&mut store, module, &[]).unwrap();
        Self { store, instance }
    }

    /// None if it traps.
    fn call(&mut self, name: &str, arguments: &[u32]) -> Option<Vec<i32>> {
        let function = self.instance.get_func(&mut self.store, name).unwrap();
        let arguments: Vec<_> = arguments
            .iter()
            .map(|argument| Val::I32(argument.cast_signed()))
            .collect();
        let mut results = vec![Val::I32(0); function.ty(&self.store).results().len()];
        function
            .call(&mut self.store, &arguments, &mut results)
            .ok()?;
        Some(results.iter().map(Val::unwrap_i32).collect())
    }

    fn memory(&mut self) -> Vec<u8> {
        self.instance
            .get_memory(&mut self.store, "memory")
            .unwrap()
            .data(&self.store)
            .to_vec()
    }

    /// All that a guest can see of itself, as far as it may look.
    fn state(&mut self) -> (Vec<u8>, Vec<String>, Vec<i32>) {
        let globals = ["a", "b", "c", "d"].map(|name| {
            let global = self.instance.get_global(&mut self.store, name).unwrap();
            format!("{:?}", global.get(&mut self.store))
        });
        let numbers = ["size", "e"].map(|name| self.call(name, &[]).unwrap()[0]);
        let mut memory = self.memory();
        memory.truncate(numbers[0].cast_unsigned() as usize * WASM_PAGE as usize);
        (memory, globals.to_vec(), numbers.to_vec())
    }
}

/// What is called, with three numbers.
type Step = (String, [u32; 3]);

fn step() -> impl Strategy<Value = Step> {
    let end = PAGES * WASM_PAGE;
    // Anywhere, around the ends of pages, and around the end of it all.
    let near = |at: u32| (0..40_u32).prop_map(move |offset| (at + 20).saturating_sub(offset));
    let address = prop_oneof![
        4 => 0..end,
        2 => (1..32_u32).prop_flat_map(move |page| near(page * 4096)),
        1 => near(end),
        1 => any::<u32>(),
    ];
    let length = prop_oneof![4 => 0..64_u32, 2 => 0..20_000_u32, 1 => any::<u32>()];
    let stores = STORES
        .iter()
        .flat_map(|(name, _)| [(*name).to_owned(), format!("{name}+")])
        .collect::<Vec<_>>();
    prop_oneof![
        8 => (proptest::sample::select(stores), address.clone(), any::<u32>(), Just(0)),
        3 => (proptest::sample::select(vec!["fields".to_owned(), "loop".to_owned()]), address.clone(), any::<u32>(), any::<u32>()),
        1 => (Just("fill".to_owned()), address.clone(), any::<u32>(), length.clone()),
        1 => (Just("copy".to_owned()), address.clone(), address.clone(), length),
        1 => (Just("init".to_owned()), address, Just(0), Just(0)),
        1 => (Just("globals".to_owned()), any::<u32>(), any::<u32>(), any::<u32>()),
        1 => (Just("grow".to_owned()), prop_oneof![4 => 0..3_u32, 1 => any::<u32>()], Just(0), Just(0)),
    ]
    .prop_map(|(name, a, b, c)| (name, [a, b, c]))
}

/// Takes the same steps in both, until one traps: whether it still runs.
fn take(steps: &[Step], original: &mut Running, rewritten: &mut Running) -> bool {
    for (name, numbers) in steps {
        let size = rewritten.call("size", &[]).unwrap()[0].cast_unsigned() * WASM_PAGE;
        let expected = original.call(name, numbers);
        let given = rewritten.call(name, numbers);
        if expected.is_none() {
            // Behind its end there is memory that it has not asked for.
            let offset = if name.ends_with('+') { 4093 } else { 0 };
            let behind =
                u64::from(numbers[0]) + offset < u64::from(size) + u64::from(4 * WASM_PAGE);
            let anywhere = ["copy", "fields", "loop"].contains(&&**name);
            assert!(
                given.is_none() || behind || anywhere,
                "{name} {numbers:?} traps no longer"
            );
            return false;
        }
        assert_eq!(expected, given, "{name} {numbers:?}");
    }
    assert_eq!(original.state(), rewritten.state());
    true
}

proptest! {
    #[test]
    fn it_does_the_same_and_is_reset(rounds in prop::collection::vec(prop::collection::vec(step(), 1..12), 1..4)) {
        let (engine, original, rewritten) = modules();
        let mut rewritten = Running::new(engine, rewritten);
        rewritten.call("mb-checkpoint", &[]).unwrap();
        let new = (rewritten.state(), rewritten.memory());
        for steps in rounds {
            // The other one is a fresh instance each time.
            let mut original = Running::new(engine, original);
            prop_assert_eq!(&original.state(), &new.0);
            if !take(&steps, &mut original, &mut rewritten) || rewritten.memory().len() != new.1.len() {
                break;
            }
            rewritten.call("mb-reset", &[]).unwrap();
            prop_assert_eq!(&(rewritten.state(), rewritten.memory()), &new, "after {:?}", steps);
        }
    }
}

proptest! {
    /// Whatever a component is, it is refused or made into one that is valid.
    #[test]
    fn a_broken_component_does_no_harm(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        static WHOLE: OnceLock<Vec<u8>> = OnceLock::new();
        let whole = WHOLE.get_or_init(|| {
            let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../services/dist/granted/checksum.wasm");
            componentize(&std::fs::read(file).unwrap())
        });
        let mut bytes = whole.clone();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok((rewritten, _)) = rewrite(&bytes) {
            let valid = wasmparser::Validator::new().validate_all(&rewritten);
            prop_assert!(valid.is_ok(), "{:?}", valid.err());
        }
    }
}

#[test]
fn stores_across_the_end_of_a_page_are_reset() {
    let (engine, _, rewritten) = modules();
    let mut running = Running::new(engine, rewritten);
    running.call("mb-checkpoint", &[]).unwrap();
    let new = running.memory();
    let mut check = |name: &str, address: u32, flags: u32| {
        running.call(name, &[address, 0x7fff_fff1, flags]).unwrap();
        assert_ne!(running.memory(), new, "{name} {address} {flags}");
        running.call("mb-reset", &[]).unwrap();
        assert_eq!(running.memory(), new, "{name} {address} {flags}");
    };
    for (name, _) in STORES {
        (8192 - 17..=8192).for_each(|address| check(name, address, 0));
    }
    // Marked once for many: the last of them may be far behind the mark.
    for address in 8192 - 300..=8192 {
        (0..4).for_each(|flags| check("fields", address, flags));
        check("loop", address, 3);
        check("pair", address, 0);
    }
}

/// Every instruction that is accepted and whose name says that it may change
/// something is known here: a new one would be looked at.
#[test]
fn all_that_changes_anything_is_known() {
    const ACCEPTED: [&str; 8] = [
        "mvp",
        "sign_extension",
        "saturating_float_to_int",
        "bulk_memory",
        "reference_types",
        "simd",
        "tail_call",
        "multi_value",
    ];
    const ELSEWHERE: [&str; 13] = [
        "GlobalSet",
        "LocalSet",
        "MemoryGrow",
        "MemoryInit",
        "DataDrop",
        "MemoryCopy",
        "MemoryFill",
        "TableInit",
        "ElemDrop",
        "TableCopy",
        "TableFill",
        "TableSet",
        "TableGrow",
    ];
    macro_rules! names {
        ($(@$proposal:ident $name:ident $({ $($field:ident: $kind:ty),* })? => $visit:ident ($($arity:tt)*))*) => {
            [$((stringify!($proposal), stringify!($name))),*]
        };
    }
    let all = wasmparser::for_each_operator!(names);
    let changes = |name: &str| {
        ["Store", "Set", "Grow", "Init", "Drop", "Copy", "Fill"]
            .iter()
            .any(|w| name.contains(w))
    };
    let found = all.iter().filter(|(proposal, name)| {
        ACCEPTED.contains(proposal)
            && changes(name)
            && *name != "Drop"
            && !name.contains("Copysign")
    });
    let mut found: Vec<_> = found.map(|(_, name)| name.to_lowercase()).collect();
    let stores = STORES.iter().map(|(name, _)| name.replace(['.', '_'], ""));
    let mut known: Vec<_> = ELSEWHERE
        .iter()
        .map(|name| name.to_lowercase())
        .chain(stores)
        .collect();
    found.sort();
    known.sort();
    assert_eq!(found, known);
}

#[test]
fn what_the_host_writes_is_reset_too() {
    let (engine, _, rewritten) = modules();
    let mut running = Running::new(engine, rewritten);
    running.call("mb-checkpoint", &[]).unwrap();
    let new = running.memory();
    for (address, length) in [(300, 5), (4000, 200), (20_000, 30_000), (131_071, 1)] {
        assert_eq!(
            running.call("cabi_realloc", &[address, 0, 1, length]),
            Some(vec![address.cast_signed()])
        );
        let memory = running
            .instance
            .get_memory(&mut running.store, "memory")
            .unwrap();
        memory.data_mut(&mut running.store)[address as usize..][..length as usize].fill(0xee);
    }
    assert_ne!(running.memory(), new);
    running.call("mb-reset", &[]).unwrap();
    assert_eq!(running.memory(), new);
}

#[test]
fn a_host_function_gets_where_to_put_its_result() {
    let text = "(module (import \"host\" \"get\" (func $get (param i32 i32)))
        (memory (export \"memory\") 1)
        (table funcref (elem $get))
        (func (export \"directly\") (call $get (i32.const 1) (i32.const 4090)))
        (func (export \"by-table\") (call_indirect (param i32 i32) (i32.const 1) (i32.const 30000) (i32.const 0))))";
    let rewritten = rewritten(&wat::parse_str(text).unwrap());
    let engine = Engine::default();
    let mut store = Store::new(&engine, ());
    let mut linker = wasmtime::Linker::new(&engine);
    let get = |mut caller: wasmtime::Caller<'_, ()>, _: i32, to: i32| {
        let memory = caller.get_export("memory").unwrap().into_memory().unwrap();
        memory.data_mut(&mut caller)[to as usize..][..100].fill(0xee);
    };
    linker.func_wrap("host", "get", get).unwrap();
    let instance = linker
        .instantiate(&mut store, &Module::new(&engine, rewritten).unwrap())
        .unwrap();
    let mut running = Running { store, instance };
    running.call("mb-checkpoint", &[]).unwrap();
    let new = running.memory();
    for name in ["directly", "by-table"] {
        running.call(name, &[]).unwrap();
        assert_ne!(running.memory(), new);
        running.call("mb-reset", &[]).unwrap();
        assert_eq!(running.memory(), new, "{name}");
    }
}

#[test]
fn what_several_modules_share_is_reset() {
    let text = "(component
      (core module $env
        (memory (export \"memory\") 2) (global (export \"sp\") (mut i32) (i32.const 5000))
        (global (export \"base\") i32 (i32.const 8000)) (table (export \"table\") 2 funcref)
        (data (i32.const 4093) \"of the one\"))
      (core module $lib
        (import \"env\" \"memory\" (memory 1)) (import \"env\" \"sp\" (global $sp (mut i32)))
        (import \"env\" \"base\" (global $base i32)) (import \"env\" \"table\" (table 2 funcref))
        (global $own (mut i32) (i32.const 3))
        (data (offset (i32.add (global.get $base) (i32.const 150))) \"of the other\")
        (elem (i32.const 1) $write)
        (func $write (param i32 i32) (i32.store (local.get 0) (local.get 1)))
        (func (export \"poke\") (param i32 i32)
          (call_indirect (param i32 i32) (local.get 0) (local.get 1) (i32.const 1))
          (global.set $sp (local.get 1)) (global.set $own (local.get 0)))
        (func (export \"peek\") (param i32) (result i32) (i32.load (local.get 0)))
        (func (export \"globals\") (result i32) (i32.add (global.get $sp) (i32.mul (global.get $own) (i32.const 7)))))
      (core instance $e (instantiate $env))
      (core instance $l (instantiate $lib (with \"env\" (instance $e))))
      (func (export \"poke\") (param \"at\" u32) (param \"value\" u32) (canon lift (core func $l \"poke\")))
      (func (export \"peek\") (param \"at\" u32) (result u32) (canon lift (core func $l \"peek\")))
      (func (export \"globals\") (result u32) (canon lift (core func $l \"globals\"))))";
    let (bytes, info) =
        rewrite(&wat::parse_str(text).unwrap()).unwrap_or_else(|reason| panic!("{reason}"));
    assert_eq!(
        (info.first_memory, info.resets_itself),
        (2 * WASM_PAGE as usize, false)
    );
    let engine = Engine::default();
    let component = wasmtime::component::Component::new(&engine, bytes).unwrap();
    let mut store = Store::new(&engine, ());
    let made = wasmtime::component::Linker::new(&engine)
        .instantiate(&mut store, &component)
        .unwrap();
    let poke = made
        .get_typed_func::<(u32, u32), ()>(&mut store, "poke")
        .unwrap();
    let peek = made
        .get_typed_func::<(u32,), (u32,)>(&mut store, "peek")
        .unwrap();
    let globals = made
        .get_typed_func::<(), (u32,)>(&mut store, "globals")
        .unwrap();
    let checkpoint = made
        .get_typed_func::<(), (u32,)>(&mut store, "mb-checkpoint")
        .unwrap();
    let restore = made
        .get_typed_func::<(), ()>(&mut store, "mb-reset")
        .unwrap();
    let all = |store: &mut Store<()>| -> Vec<u32> {
        let words = (0..2 * WASM_PAGE / 4)
            .map(|word| peek.call(&mut *store, (4 * word,)).unwrap().0)
            .collect::<Vec<_>>();
        words
            .into_iter()
            .chain([globals.call(store, ()).unwrap().0])
            .collect()
    };
    // Two pages of what one of them begins with, one of the other.
    assert_eq!(checkpoint.call(&mut store, ()).unwrap(), (3,));
    let new = all(&mut store);
    for round in 0..3_u32 {
        for address in [
            round,
            4094,
            8150,
            8191,
            60_000 + round * 4096,
            2 * WASM_PAGE - 4,
        ] {
            poke.call(&mut store, (address, 0x0101_0101 * (round + 1)))
                .unwrap();
        }
        assert_ne!(all(&mut store), new);
        restore.call(&mut store, ()).unwrap();
        assert_eq!(all(&mut store), new);
    }
}

/// A component that counts its calls, in memory and in a global; at the number
/// 9 its memory grows by so many pages. `after` are options of its function.
fn counting(after: &str, grow: u32) -> String {
    format!(
        "(component
          (core module $m
            (memory (export \"memory\") 1 12) (global $count (mut i32) (i32.const 0))
            (data (i32.const 1000) \"\\08\\04\\00\\00\\01\\00\\00\\00\") (data (i32.const 1032) \"0\")
            (func (export \"count\") (param i32) (result i32)
              (global.set $count (i32.add (global.get $count) (i32.const 1)))
              (i32.store (i32.const 40000) (i32.add (i32.load (i32.const 40000)) (local.get 0)))
              (if (i32.eq (local.get 0) (i32.const 9)) (then (drop (memory.grow (i32.const {grow})))))
              (i32.store8 (i32.const 1032)
                (i32.add (i32.const 48) (i32.add (global.get $count) (i32.load (i32.const 40000)))))
              (i32.const 1000))
            (func (export \"after\") (param i32) (i32.store (i32.const 50000) (local.get 0))))
          (core instance $i (instantiate $m))
          (func (export \"count\") (param \"by\" u32) (result string)
            (canon lift (core func $i \"count\") (memory (core memory $i \"memory\")) {after})))"
    )
}

/// What `count` gives for each number, by an instance that was reset as
/// the host does it.
fn counted(text: &str, numbers: &[u32]) -> (ResetInfo, Vec<String>) {
    let (bytes, info) =
        rewrite(&wat::parse_str(text).unwrap()).unwrap_or_else(|reason| panic!("{reason}"));
    let engine = Engine::default();
    let component = wasmtime::component::Component::new(&engine, bytes).unwrap();
    let mut store = Store::new(&engine, ());
    let made = wasmtime::component::Linker::new(&engine)
        .instantiate(&mut store, &component)
        .unwrap();
    let count = made
        .get_typed_func::<(u32,), (String,)>(&mut store, "count")
        .unwrap();
    let count = |store: &mut Store<()>, by| count.call(&mut *store, (by,)).unwrap().0;
    // Until there is a checkpoint, what a call did is there for the next one.
    assert_eq!(
        (count(&mut store, 1), count(&mut store, 1)),
        ("2".into(), "4".into())
    );
    let checkpoint = made
        .get_typed_func::<(), (u32,)>(&mut store, CHECKPOINT)
        .unwrap();
    assert_ne!(checkpoint.call(&mut store, ()).unwrap(), (u32::MAX,));
    let reset = made.get_typed_func::<(), ()>(&mut store, RESET).unwrap();
    let given = numbers.iter().map(|&by| {
        let given = count(&mut store, by);
        if !info.resets_itself {
            reset.call(&mut store, ()).unwrap();
        }
        given
    });
    (info, given.collect())
}

#[test]
fn an_instance_resets_itself_as_a_call_ends() {
    let after = "(post-return (core func $i \"after\"))";
    let (info, given) = counted(&counting(after, 0), &[1, 1, 3, 1]);
    assert_eq!(
        (info.resets_itself, given),
        (true, ["6", "6", "8", "6"].map(str::to_owned).to_vec())
    );
    let (info, given) = counted(&counting("", 0), &[1, 1, 3, 1]);
    assert_eq!(
        (info.resets_itself, given),
        (false, ["6", "6", "8", "6"].map(str::to_owned).to_vec())
    );
    // One whose memory has grown is not reset, and its call is not affected:
    // the host sees that it grew.
    let (_, given) = counted(&counting(after, 6), &[1, 9, 1]);
    assert_eq!(given, ["6", ">", "@"]);
}

/// A component, of whatever a tool chain left.
fn componentize(bytes: &[u8]) -> Vec<u8> {
    if bytes[4..8] == [1, 0, 0, 0] {
        let encoder = wit_component::ComponentEncoder::default().module(bytes);
        encoder.unwrap().encode().unwrap()
    } else {
        bytes.to_vec()
    }
}

/// Each tool chain of `services/` has its row here.
#[test]
fn what_tool_chains_make_is_reset() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let rust = [
        "calc",
        "echo",
        "granted/calc",
        "granted/counter",
        "granted/order",
    ];
    let committed = rust
        .map(|name| (format!("services/dist/{name}.wasm"), true, true))
        .into_iter()
        .chain([("services/dist/granted/checksum.wasm".to_owned(), true, true)])
        // Too large to be committed: services/build --heavy makes them.
        .chain(["slug", "stats"].map(|name| (format!("services/heavy/{name}.wasm"), false, false)));
    for (file, committed, resets_itself) in committed {
        let Ok(bytes) = std::fs::read(root.join(&file)) else {
            assert!(!committed, "{file}");
            continue;
        };
        let (_, info) =
            rewrite(&componentize(&bytes)).unwrap_or_else(|reason| panic!("{file}: {reason}"));
        let pages = (info.first_memory / WASM_PAGE as usize) as u64;
        let cards = usize::try_from(cards_pages(pages)).unwrap() * WASM_PAGE as usize;
        assert_eq!(info.added_memory, info.first_memory + cards, "{file}");
        assert_eq!(info.resets_itself, resets_itself, "{file}");
    }
}

#[test]
fn what_can_not_be_reset_is_refused() {
    let module =
        |inside: &str| format!("(core module $m {inside}) (core instance $i (instantiate $m))");
    let memory = "(memory (export \"memory\") 1)";
    for (component, reason) in [
        (String::new(), "none of its modules has a memory"),
        (module("(func (result i32) (i32.const 1))"), "none of its modules has a memory"),
        (
            format!(
                "{} (func $f (canon lift (core func $i \"f\"))) (export \"mb-reset\" (func $f))",
                module(&format!("{memory} (func (export \"f\"))"))
            ),
            "it has an export mb-reset of its own",
        ),
        (
            module("(table 1 funcref) (func (export \"f\") (call_indirect (i32.const 0)))"),
            "none of its modules has a memory",
        ),
        (module(&format!("{memory} (memory 1)")), "multiple memories"),
        (module(&format!("{memory} (table 1 funcref) (func (table.set (i32.const 0) (ref.null func)))")), "its tables"),
        (
            module(&format!("{memory} (table 1 funcref) (func (drop (table.grow (ref.null func) (i32.const 1))))")),
            "tables",
        ),
        (module(&format!("{memory} (data $d \"x\") (func (data.drop $d))")), "drops segments"),
        (module(&format!("{memory} (table 1 funcref) (elem $e func) (func (elem.drop $e))")), "drops segments"),
        (module(&format!("{memory} (global (mut funcref) (ref.null func))")), "holds a reference"),
        (module("(memory i64 1)"), "memory64"),
        (module("(memory 1 1 shared)"), "threads"),
        (format!("{} (core instance (instantiate $m))", module(memory)), "instantiated several times"),
        (
            format!("{} (core module $z (memory 0 1)) (core instance (instantiate $z))", module(memory)),
            "several of its modules have a memory",
        ),
        (
            // The host's function would be called by a table that rewritten code calls by.
            format!(
                "(import \"get\" (func $get (result string)))
                 {} (core func $got (canon lower (func $get) (memory (core memory $i \"memory\")) (realloc (core func $i \"r\"))))
                 (core module $n (import \"m\" \"t\" (table 1 funcref)) (import \"h\" \"f\" (func $f (param i32))) (elem (i32.const 0) func $f))
                 (core instance (instantiate $n (with \"m\" (instance $i)) (with \"h\" (instance (export \"f\" (func $got))))))",
                module(&format!("{memory} (table (export \"t\") 1 funcref)
                   (func (export \"r\") (param i32 i32 i32 i32) (result i32) unreachable)"))
            ),
            "holds functions of the host",
        ),
        (
            // So would it where the table is a shim's.
            format!(
                "(core module $s (table (export \"t\") 1 funcref)) (core instance $s (instantiate $s))
                 (core module $m (import \"s\" \"t\" (table 1 funcref)) {memory})
                 (core instance (instantiate $m (with \"s\" (instance $s))))"
            ),
            "a table of another module",
        ),
        (
            // Its handles would keep something.
            format!(
                "(component $keeper (type $t (resource (rep i32))) (core func $new (canon resource.new $t)))
                 (instance (instantiate $keeper)) (component $c {}) (instance (instantiate $c))",
                module(memory)
            ),
            "several components within it",
        ),
        (
            format!("(component $c {0}) (component $d (alias outer 1 $c (component $e)) (instance (instantiate $e)))
                     (instance (instantiate $c)) (instance (instantiate $d))", module(memory)),
            "hands on code",
        ),
        (module("(memory 20000)"), "too large"),
        (
            format!("(component $c {0}) (instance (instantiate $c)) (instance (instantiate $c))", module(memory)),
            "instantiated several times",
        ),
        (format!("(component {0}) (component {0})", module(memory)), "several components within it"),
        (format!("(component {0}) {0}", module(memory)), "has state of its own"),
        (
            format!("{} (type $t (resource (rep i32))) (core func $new (canon resource.new $t))", module(memory)),
            "defines resources",
        ),
    ] {
        let text = format!("(component {component})");
        let bytes = wat::parse_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let given = rewrite(&bytes)
            .err()
            .unwrap_or_else(|| panic!("accepted: {text}"))
            .to_string();
        assert!(given.contains(reason), "{given}, not {reason}: {text}");
    }
}
