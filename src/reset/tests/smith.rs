//! Random modules that another generator makes, reset against fresh: what the
//! own one was not made to think of.
//!
//! ```text
//! MB_RESET_SMITH=20000 MB_RESET_SEED=1 cargo test --release --lib smith -- --nocapture
//! ```

use std::collections::BTreeMap;

use arbitrary::Unstructured;
use wasm_encoder::{
    AbstractHeapType, CodeSection, ExportSection, Function, Instruction, MemArg,
    reencode::{Error, Reencode},
};
use wasm_smith::{InstructionKind, InstructionKinds, MemoryOffsetChoices};
use wasmparser::{ExternalKind, FunctionBody, Operator, Validator, types::Types};
use wasmtime::{Engine, FuncType, Instance, Linker, Module, Store, Trap, V128, Val, ValType};

use super::{
    differential::{RESULT, host, on_all_threads, setting},
    generator::{PAGES, Random},
};
use crate::{
    CHECKPOINT, RESET, VERIFY,
    module::{self, Rewriting},
    module_shape::{ModuleShape, Space},
};

/// Modules of a plain `cargo test`; a seed counts up from there.
const MODULES: u64 = 300;
const CALLS: usize = 16;
/// Turns of loops and calls of functions, of all of one call.
const FUEL: u32 = 1000;

/// A module, or none where the numbers do not make one.
fn generate(random: &mut Random) -> Option<Vec<u8>> {
    let numbers: Vec<u8> = (0..512 + random.below(3000))
        .map(|_| random.next() as u8)
        .collect();
    let mut kinds = vec![
        InstructionKind::Memory,
        InstructionKind::Variable,
        InstructionKind::Control,
    ];
    for kind in [
        InstructionKind::Numeric,
        InstructionKind::Vector,
        InstructionKind::Parametric,
        InstructionKind::Reference,
    ] {
        if random.one_in(2) {
            kinds.push(kind);
        }
    }
    let imports = if random.one_in(2) {
        "(module (import \"host\" \"get\" (func (param i32 i32))))"
    } else {
        "(module)"
    };
    let config = wasm_smith::Config {
        allowed_instructions: InstructionKinds::new(&kinds),
        available_imports: Some(wat::parse_str(imports).unwrap()),
        custom_page_sizes_enabled: false,
        disallow_traps: !random.one_in(4),
        exceptions_enabled: false,
        export_everything: true,
        gc_enabled: false,
        max_data_segments: 5,
        max_element_segments: 3,
        max_elements: 8,
        max_funcs: 6,
        max_globals: 8,
        max_instructions: 30 + random.below(150) as usize,
        max_memories: 1,
        max_memory32_bytes: 3 * 65_536,
        max_table_elements: 40,
        max_types: 6,
        memory64_enabled: false,
        memory_max_size_required: true,
        memory_offset_choices: MemoryOffsetChoices(95, 4, 1),
        min_data_segments: random.below(3) as usize,
        min_funcs: 2,
        min_globals: 2,
        // Seldom none.
        min_memories: u32::from(!random.one_in(30)),
        min_types: 2,
        // With them, many have a global that is refused.
        reference_types_enabled: random.one_in(3),
        relaxed_simd_enabled: false,
        threads_enabled: false,
        ..wasm_smith::Config::default()
    };
    let mut module = wasm_smith::Module::new(config, &mut Unstructured::new(&numbers)).ok()?;
    module.ensure_termination(FUEL).unwrap();
    let bytes = module.to_bytes();
    let mut tamed = wasm_encoder::Module::new();
    let shape = ModuleShape::of(&bytes, 0..bytes.len()).unwrap();
    let mut tamer = Tamer {
        types: Validator::new().validate_all(&bytes).unwrap(),
        imported: shape.imports(Space::Function).len() as u32,
        // Most would be refused for it.
        changes_tables: random.one_in(20),
        random,
    };
    tamer
        .parse_core_module(&mut tamed, wasmparser::Parser::new(0), &bytes)
        .unwrap();
    Some(tamed.finish())
}

/// Makes of a module one that writes: of any 32 bits, next to none are an
/// address. Numbers become what may be one, and what writes and reads is put in
/// between. Exports get names that are known, and what engine and rewriter
/// refuse is left out.
struct Tamer<'a> {
    types: Types,
    /// Functions before those that it has itself.
    imported: u32,
    random: &'a mut Random,
    /// Whether instructions that change tables or drop segments stay.
    changes_tables: bool,
}

impl Reencode for Tamer<'_> {
    type Error = std::convert::Infallible;

    fn parse_export_section(
        &mut self,
        exports: &mut ExportSection,
        section: wasmparser::ExportSectionReader<'_>,
    ) -> Result<(), Error<Self::Error>> {
        for export in section {
            let export = export?;
            let name = match export.kind {
                ExternalKind::Func => format!("f{}", export.index),
                ExternalKind::Global => format!("g{}", export.index),
                ExternalKind::Memory => "memory".to_owned(),
                _ => format!("t{}", export.index),
            };
            exports.export(&name, self.export_kind(export.kind)?, export.index);
        }
        Ok(())
    }

    fn memory_type(
        &mut self,
        memory: wasmparser::MemoryType,
    ) -> Result<wasm_encoder::MemoryType, Error<Self::Error>> {
        let minimum = memory.initial.max(PAGES.into());
        Ok(wasm_encoder::MemoryType {
            minimum,
            maximum: Some(minimum + u64::from(self.random.below(10))),
            memory64: false,
            shared: false,
            page_size_log2: None,
        })
    }

    fn abstract_heap_type(
        &mut self,
        _: wasmparser::AbstractHeapType,
    ) -> Result<AbstractHeapType, Error<Self::Error>> {
        // References of the host are left out of the engine.
        Ok(AbstractHeapType::Func)
    }

    fn mem_arg(
        &mut self,
        mut memarg: wasmparser::MemArg,
    ) -> Result<wasm_encoder::MemArg, Error<Self::Error>> {
        if !self.random.one_in(4) {
            memarg.offset %= 600;
        }
        wasm_encoder::reencode::utils::mem_arg(self, memarg)
    }

    fn parse_function_body(
        &mut self,
        code: &mut CodeSection,
        body: FunctionBody<'_>,
    ) -> Result<(), Error<Self::Error>> {
        let mut function = self.new_function_with_parsed_locals(&body)?;
        let kind = self
            .types
            .as_ref()
            .core_function_at(self.imported + code.len());
        let mut locals = self.types[kind].unwrap_func().params().to_vec();
        for local in body.get_locals_reader()? {
            let (count, kind) = local?;
            locals.extend((0..count).map(|_| kind));
        }
        for operator in body.get_operators_reader()? {
            let operator = operator?;
            let (takes, gives) = match &operator {
                _ if self.changes_tables => (0, None),
                Operator::TableSet { .. } => (2, None),
                Operator::TableGrow { .. } => (2, Some(Instruction::I32Const(-1))),
                Operator::TableFill { .. }
                | Operator::TableCopy { .. }
                | Operator::TableInit { .. } => (3, None),
                Operator::DataDrop { .. } | Operator::ElemDrop { .. } => {
                    (0, Some(Instruction::Nop))
                }
                _ => (0, None),
            };
            for _ in 0..takes {
                function.instruction(&Instruction::Drop);
            }
            let instead = match operator {
                _ if takes > 0 || gives.is_some() => gives,
                Operator::I32Const { value }
                    if value as u32 >= PAGES * 65_536 && !self.random.one_in(4) =>
                {
                    let near = self.random.address().cast_signed();
                    Some(Instruction::I32Const(if self.random.one_in(2) {
                        near
                    } else {
                        value & 0xfff
                    }))
                }
                operator => Some(self.instruction(operator)?),
            };
            if self.random.one_in(5) {
                self.write(&mut function, &locals);
            }
            if let Some(instruction) = instead {
                function.instruction(&instruction);
            }
        }
        code.function(&function);
        Ok(())
    }
}

impl Tamer<'_> {
    /// Instructions that leave the stack as it is, so that they may stand
    /// anywhere.
    fn write(&mut self, function: &mut Function, locals: &[wasmparser::ValType]) {
        use wasmparser::ValType as Kind;
        let numbers = (0..)
            .zip(locals)
            .filter(|(_, kind)| !kind.is_reference_type());
        let numbers: Vec<(u32, Kind)> = numbers.map(|(local, kind)| (local, *kind)).collect();
        let words = numbers.iter().filter(|(_, kind)| *kind == Kind::I32);
        let words: Vec<u32> = words.map(|(local, _)| *local).collect();
        if words.is_empty() || self.types.as_ref().memory_count() == 0 {
            return;
        }
        let address = self.random.of(&words);
        let near = self.random.address().cast_signed();
        let length = self.random.below(2000).cast_signed();
        let at = MemArg {
            offset: self.random.below(600).into(),
            align: 0,
            memory_index: 0,
        };
        let mut body = function.instructions();
        match self.random.below(60) {
            0 => {
                let pages = self.random.below(6).cast_signed();
                body.i32_const(pages).memory_grow(0).local_set(address);
            }
            1..12 => {
                let word = self.random.of(&words);
                body.local_get(word).i32_const(0x1f7ff).i32_and();
                body.local_set(address);
            }
            12..18 => {
                body.local_get(address).i32_const(near).i32_const(length);
                body.memory_fill(0);
            }
            18..24 => {
                body.i32_const(near).local_get(address).i32_const(length);
                body.memory_copy(0, 0);
            }
            24..30 => {
                body.i32_const(near).i32_load8_u(at).local_set(address);
            }
            _ => {
                let (value, kind) = self.random.of(&numbers);
                body.local_get(address).local_get(value);
                match kind {
                    Kind::I32 => body.i32_store(at),
                    Kind::I64 => body.i64_store(at),
                    Kind::F32 => body.f32_store(at),
                    Kind::F64 => body.f64_store(at),
                    _ => body.v128_store(at),
                };
            }
        }
    }
}

/// How a call ends. Values are compared by their bits.
#[derive(Debug, PartialEq)]
enum End {
    Values(Vec<String>),
    Trapped,
    /// A rewritten function takes more of the stack than the original.
    Overflown,
}

struct Running {
    store: Store<()>,
    instance: Instance,
}

impl Running {
    fn new(linker: &Linker<()>, module: &Module) -> Result<Self, End> {
        let mut store = Store::new(linker.engine(), ());
        match linker.instantiate(&mut store, module) {
            Ok(instance) => Ok(Self { store, instance }),
            Err(error) => Err(End::of(&error)),
        }
    }

    fn call(&mut self, name: &str, arguments: &[Val]) -> End {
        let function = self.instance.get_func(&mut self.store, name).unwrap();
        let mut results = vec![Val::I32(0); function.ty(&self.store).results().len()];
        match function.call(&mut self.store, arguments, &mut results) {
            Ok(()) => End::Values(results.iter().map(bits).collect()),
            Err(error) => End::of(&error),
        }
    }

    fn memory(&mut self) -> &[u8] {
        let memory = self.instance.get_memory(&mut self.store, "memory").unwrap();
        memory.data(&self.store)
    }

    fn globals(&mut self, names: &[String]) -> Vec<String> {
        let globals = names.iter().map(|name| {
            let global = self.instance.get_global(&mut self.store, name).unwrap();
            bits(&global.get(&mut self.store))
        });
        globals.collect()
    }
}

impl End {
    fn of(error: &wasmtime::Error) -> Self {
        if error.downcast_ref() == Some(&Trap::StackOverflow) {
            Self::Overflown
        } else {
            Self::Trapped
        }
    }
}

/// A value's bits; of a reference, whether it is one.
fn bits(value: &Val) -> String {
    match value {
        Val::FuncRef(function) => format!("a function: {}", function.is_some()),
        number => format!("{number:?}"),
    }
}

/// A value of a type: an address where it may be one.
fn value(random: &mut Random, kind: &ValType) -> Val {
    let word = u64::from(random.address());
    let any = if random.one_in(2) {
        word
    } else {
        random.next() << 16 ^ random.next()
    };
    match kind {
        ValType::I32 if random.one_in(4) => Val::I32(random.below(300).cast_signed()),
        ValType::I32 => Val::I32((word as u32).cast_signed()),
        ValType::I64 => Val::I64(any.cast_signed()),
        ValType::F32 => Val::F32(any as u32),
        ValType::F64 => Val::F64(any),
        ValType::V128 => Val::V128(V128::from(u128::from(any) << 32 | u128::from(word))),
        ValType::Ref(reference) => Val::null_ref(reference.heap_type()),
    }
}

/// What became of modules and calls, by name.
type Counts = BTreeMap<String, u64>;

#[test]
fn differential_of_another_generator() {
    let (modules, seed) = (
        setting("MB_RESET_SMITH", MODULES),
        setting("MB_RESET_SEED", 1),
    );
    let counts = on_all_threads(modules, |engine, module, counts: &mut Counts| {
        check(engine, seed + module, counts);
    });
    let mut all = Counts::new();
    for (name, count) in counts.into_iter().flatten() {
        *all.entry(name).or_default() += count;
    }
    println!(
        "seeds {seed} to {}, no difference: {all:#?}",
        seed + modules - 1
    );
    assert!(
        all["resets"] > 2 * modules && all["resets of what was written"] > modules / 2,
        "too few calls end well to prove anything: {all:#?}"
    );
}

fn check(engine: &Engine, seed: u64, counts: &mut Counts) {
    let mut random = Random::new(seed);
    let mut count = |name: &str| *counts.entry(name.to_owned()).or_default() += 1;
    let Some(bytes) = generate(&mut random) else {
        return count("numbers that make no module");
    };
    count("modules");
    let compile = |bytes: &[u8]| {
        Module::new(engine, bytes).unwrap_or_else(|error| panic!("seed {seed}: {error:?}"))
    };
    let original = compile(&bytes);
    if original.get_export("memory").is_none() {
        return count("without a memory");
    }
    let shape = ModuleShape::of(&bytes, 0..bytes.len()).unwrap();
    let imports = shape.imports(Space::Function).len() as u32;
    let how = Rewriting {
        allocators: &[],
        host_functions: &(0..imports).collect::<Vec<_>>(),
        post_returns: &[],
        largest_result: RESULT as u32,
        alone: true,
    };
    let (rewritten, info) = match module::rewrite(&bytes, &how) {
        Ok(accepted) => accepted,
        Err(reason) => return count(&format!("refused, as {reason}")),
    };
    let rewritten = compile(&rewritten);
    let functions: Vec<(String, FuncType)> = original
        .exports()
        .filter_map(|export| Some((export.name().to_owned(), export.ty().func()?.clone())))
        // The host's own is not to be called by the host.
        .filter(|(name, _)| name[1..].parse::<u32>().unwrap() >= imports)
        .collect();
    let globals: Vec<String> = original
        .exports()
        .filter(|export| export.ty().global().is_some())
        .map(|export| export.name().to_owned())
        .collect();
    let linker = host(engine);
    let (memory, values) = match Running::new(&linker, &original) {
        Ok(mut first) => (first.memory().to_vec(), first.globals(&globals)),
        Err(_) => return count("does not start"),
    };
    count("accepted");
    // Behind its end there may be memory that it has not asked for.
    let slack = info.unwrap().first_memory > pages_of(&original) * 65_536;

    // One that is reset, and its memory at its checkpoint.
    let mut kept: Option<(Running, Vec<u8>)> = None;
    for call in 0..CALLS {
        let at = |what: &str| format!("seed {seed}, call {call}: {what}");
        let (mut made, checkpoint) = match kept.take() {
            Some(kept) => kept,
            None => {
                let mut made = match Running::new(&linker, &rewritten) {
                    Ok(made) => made,
                    Err(End::Overflown) => return count("overflown"),
                    Err(_) => panic!("{}", at("the other one starts too")),
                };
                let cards = made.call(CHECKPOINT, &[]);
                assert!(matches!(&cards, End::Values(cards) if cards[0] != "I32(-1)"));
                let checkpoint = made.memory().to_vec();
                assert!(
                    same(&memory, &checkpoint),
                    "{}",
                    at("its start did something else")
                );
                (made, checkpoint)
            }
        };
        assert!(
            made.globals(&globals) == values,
            "{}",
            at("it is not fresh")
        );
        let Ok(mut fresh) = Running::new(&linker, &original) else {
            panic!("{}", at("it did start before"))
        };
        let (name, kind) = &functions[random.below(functions.len() as u32) as usize];
        let arguments: Vec<Val> = kind
            .params()
            .map(|kind| value(&mut random, &kind))
            .collect();
        let wanted = fresh.call(name, &arguments);
        let given = made.call(name, &arguments);
        let ended = match (&wanted, &given) {
            (End::Overflown, _) | (_, End::Overflown) => {
                count("overflown");
                false
            }
            (End::Trapped, _) => {
                count("trapped");
                assert!(wanted == given || slack, "{}", at("it traps no longer"));
                false
            }
            _ => {
                assert!(
                    wanted == given,
                    "{}: {wanted:?}, {given:?}",
                    at("the result is another")
                );
                let done = fresh.globals(&globals) == made.globals(&globals)
                    && same(fresh.memory(), made.memory());
                assert!(done, "{}", at("it did something else"));
                true
            }
        };
        if made.memory().len() != checkpoint.len() {
            // The host gives it up.
            count("grown");
            continue;
        }
        let wrote = made.memory() != checkpoint;
        let ended_well = made.call(RESET, &[]) == End::Values(Vec::new());
        let verified = made.call(VERIFY, &[]) == End::Values(vec!["I32(0)".to_owned()]);
        assert!(
            ended_well && verified && made.memory() == checkpoint,
            "{}",
            at("it was not reset")
        );
        assert!(
            made.globals(&globals) == values,
            "{}",
            at("its globals were not reset")
        );
        // One whose call failed is discarded too, though it was reset.
        if ended {
            count("resets");
            if wrote {
                count("resets of what was written");
            }
            kept = Some((made, checkpoint));
        }
    }
}

/// Whether memory is the same as far as the original has any; behind that,
/// nothing was left.
fn same(original: &[u8], rewritten: &[u8]) -> bool {
    let (there, behind) = rewritten.split_at(original.len());
    there == original && behind.iter().all(|byte| *byte == 0)
}

/// Pages that its memory begins with.
fn pages_of(module: &Module) -> usize {
    let memory = module.get_export("memory").unwrap();
    usize::try_from(memory.unwrap_memory().minimum()).unwrap()
}
