//! Takes a component apart and finds the one module that holds its state.

use std::ops::Range;

use wasmparser::{
    CanonicalFunction, CanonicalOption, ComponentAlias, ComponentExport, ExternalKind, Instance, Operator, Parser,
    Payload,
    component_types::{ComponentDefinedType, ComponentValType},
    types::TypesRef,
};

use super::{CHECKPOINT, RESTORE, Unfit};

/// Largest result of a host function that is followed, in bytes: more than
/// any that is offered has.
const MAX_RESULT: usize = 64 * 1024;
/// How deep its type may nest.
const MAX_DEPTH: usize = 64;

/// What is to be known of a component.
pub(super) struct Parts {
    /// Its sections: identifier, and where they lie.
    pub(super) sections: Vec<(u8, Range<usize>)>,
    /// Where the module lies that holds all state.
    pub(super) module: Range<usize>,
    /// The core instance that is made of it.
    pub(super) instance: u32,
    /// No host function writes more than this to where it is told to put its
    /// result, in bytes.
    pub(super) largest_result: u32,
}

/// What is gathered while reading.
#[derive(Default)]
struct Reading {
    sections: Vec<(u8, Range<usize>)>,
    modules: Vec<Range<usize>>,
    /// Of each core instance: the module that it was made of.
    instances: Vec<Option<u32>>,
    /// Of each core function, and of each core memory: the instance that
    /// exports it, unless it is the host's.
    functions: Vec<Option<u32>>,
    memories: Vec<Option<u32>>,
    /// Functions that the host may allocate by, and memories that it may
    /// write to.
    allocate: Vec<u32>,
    written: Vec<u32>,
    lowered: Vec<u32>,
}

/// Reads a component that is known to be valid.
pub(super) fn take_apart(component: &[u8], types: TypesRef<'_>) -> Result<Parts, Unfit> {
    let read = read(component)?;
    let mut state = None;
    for (index, range) in (0..).zip(&read.modules) {
        if holds_state(&component[range.clone()])? {
            if state.is_some() {
                return Err(Unfit::because("several of its modules hold state"));
            }
            state = Some((index, range.clone()));
        }
    }
    let (index, module) = state.ok_or_else(|| Unfit::because("none of its modules has a memory"))?;
    let mut made = (0..).zip(&read.instances).filter(|(_, of)| **of == Some(index)).map(|(instance, _)| instance);
    let (Some(instance), None) = (made.next(), made.next()) else {
        return Err(Unfit::because("the module with its memory is not instantiated once"));
    };
    // What the host writes to goes through a function that marks it.
    let own = |origins: &[Option<u32>], used: &[u32]| {
        used.iter().all(|index| origins.get(*index as usize).copied().flatten() == Some(instance))
    };
    if !own(&read.functions, &read.allocate) || !own(&read.memories, &read.written) {
        return Err(Unfit::because("the host would write to it by way of another module"));
    }
    let mut largest_result = 0;
    for function in &read.lowered {
        let kind = &types[types.component_function_at(*function)];
        let size = kind.result.map_or(Ok(0), |result| largest(result, types, 0))?;
        largest_result = largest_result.max(size);
    }
    let largest_result = u32::try_from(largest_result).expect("bounded by `largest`");
    Ok(Parts { sections: read.sections, module, instance, largest_result })
}

fn read(component: &[u8]) -> Result<Reading, Unfit> {
    let mut read = Reading::default();
    // What is open: true for a core module.
    let mut open = Vec::new();
    for payload in Parser::new(0).parse_all(component) {
        let payload = payload?;
        let depth = open.len();
        match &payload {
            Payload::Version { encoding, .. } => open.push(matches!(encoding, wasmparser::Encoding::Module)),
            Payload::End(_) => drop(open.pop()),
            _ if open.last() == Some(&true) => {}
            Payload::ModuleSection { .. }
            | Payload::InstanceSection(_)
            | Payload::ComponentCanonicalSection(_)
            | Payload::ComponentStartSection { .. }
                if depth > 1 =>
            {
                return Err(Unfit::because("its modules are in a component within it"));
            }
            _ => {}
        }
        if depth != 1 {
            continue;
        }
        if let Some(section) = payload.as_section() {
            read.sections.push(section);
        }
        read.payload(payload)?;
    }
    Ok(read)
}

impl Reading {
    fn payload(&mut self, payload: Payload<'_>) -> Result<(), Unfit> {
        match payload {
            Payload::ModuleSection { unchecked_range, .. } => self.modules.push(unchecked_range),
            Payload::InstanceSection(section) => {
                for instance in section {
                    self.instances.push(match instance? {
                        Instance::Instantiate { module_index, .. } => Some(module_index),
                        Instance::FromExports(_) => None,
                    });
                }
            }
            Payload::ComponentAliasSection(section) => {
                for alias in section {
                    match alias? {
                        ComponentAlias::CoreInstanceExport { kind, instance_index, .. } => match kind {
                            ExternalKind::Func | ExternalKind::FuncExact => self.functions.push(Some(instance_index)),
                            ExternalKind::Memory => self.memories.push(Some(instance_index)),
                            ExternalKind::Table | ExternalKind::Global | ExternalKind::Tag => {}
                        },
                        ComponentAlias::Outer { .. } | ComponentAlias::InstanceExport { .. } => {}
                    }
                }
            }
            Payload::ComponentCanonicalSection(section) => {
                for function in section {
                    self.canonical(function?)?;
                }
            }
            Payload::ComponentExportSection(section) => {
                for export in section {
                    let ComponentExport { name, .. } = export?;
                    if [CHECKPOINT, RESTORE].contains(&name.name) {
                        return Err(Unfit::because(format!("it has an export {} of its own", name.name)));
                    }
                }
            }
            Payload::ComponentStartSection { .. } => return Err(Unfit::because("it has a start function")),
            _ => {}
        }
        Ok(())
    }

    fn canonical(&mut self, function: CanonicalFunction) -> Result<(), Unfit> {
        let options = match function {
            CanonicalFunction::Lift { options, .. } => options,
            CanonicalFunction::Lower { func_index, options } => {
                self.functions.push(None);
                self.lowered.push(func_index);
                options
            }
            CanonicalFunction::ResourceDrop { .. } => {
                self.functions.push(None);
                return Ok(());
            }
            _ => return Err(Unfit::because("it uses more of the component model than functions")),
        };
        for option in options {
            match option {
                CanonicalOption::Memory(memory) => self.written.push(memory),
                CanonicalOption::Realloc(function) => self.allocate.push(function),
                CanonicalOption::UTF8
                | CanonicalOption::UTF16
                | CanonicalOption::CompactUTF16
                | CanonicalOption::PostReturn(_) => {}
                _ => return Err(Unfit::because("it uses more of the canonical ABI than its first version")),
            }
        }
        Ok(())
    }
}

/// Whether anything in an instance of a module can change after it was made.
/// What passes its arguments on to somebody else, as the modules that are put
/// between a service and its imports, can't.
fn holds_state(module: &[u8]) -> Result<bool, Unfit> {
    // By index: parameters of each type, and of each function of its own.
    let (mut kinds, mut functions, mut bodies) = (Vec::new(), Vec::new(), 0);
    for payload in Parser::new(0).parse_all(module) {
        match payload? {
            Payload::TypeSection(section) => {
                for kind in section.into_iter_err_on_gc_types() {
                    kinds.push(kind?.params().len());
                }
            }
            Payload::FunctionSection(section) => {
                for kind in section {
                    functions.push(kinds.get(kind? as usize).copied().unwrap_or_default());
                }
            }
            Payload::MemorySection(_) | Payload::GlobalSection(_) | Payload::DataSection(_) => return Ok(true),
            Payload::CodeSectionEntry(body) => {
                if !passes_on(&body, functions.get(bodies).copied().unwrap_or_default())? {
                    return Ok(true);
                }
                bodies += 1;
            }
            _ => {}
        }
    }
    Ok(false)
}

/// Whether a function does nothing but call another one with its arguments.
fn passes_on(body: &wasmparser::FunctionBody<'_>, params: usize) -> Result<bool, Unfit> {
    let mut operators = body.get_operators_reader()?;
    for param in 0..params {
        if !matches!(operators.read()?, Operator::LocalGet { local_index } if local_index as usize == param) {
            return Ok(false);
        }
    }
    let called = match operators.read()? {
        Operator::I32Const { .. } => matches!(operators.read()?, Operator::CallIndirect { .. }),
        operator => matches!(operator, Operator::Call { .. }),
    };
    Ok(called && matches!(operators.read()?, Operator::End))
}

/// No value of a type takes more bytes in memory than this.
fn largest(kind: ComponentValType, types: TypesRef<'_>, depth: usize) -> Result<usize, Unfit> {
    // Of any alignment, and of any discriminant.
    const WORD: usize = 8;
    if depth > MAX_DEPTH {
        return Err(Unfit::because("a host function gives it something that nests too deep"));
    }
    let id = match kind {
        ComponentValType::Primitive(_) => return Ok(2 * WORD),
        ComponentValType::Type(id) => id,
    };
    let sum = |kinds: &mut dyn Iterator<Item = ComponentValType>| -> Result<usize, Unfit> {
        let mut sum = WORD;
        for kind in kinds {
            sum += WORD + largest(kind, types, depth + 1)?;
        }
        Ok(sum)
    };
    let size = match &types[id] {
        ComponentDefinedType::Primitive(_)
        | ComponentDefinedType::List { .. }
        | ComponentDefinedType::Enum(_)
        | ComponentDefinedType::Own(_)
        | ComponentDefinedType::Borrow(_) => 2 * WORD,
        ComponentDefinedType::Record(record) => sum(&mut record.fields.values().copied())?,
        ComponentDefinedType::Variant(variant) => sum(&mut variant.cases.values().filter_map(|case| case.ty))?,
        ComponentDefinedType::Tuple(tuple) => sum(&mut tuple.types.iter().copied())?,
        ComponentDefinedType::Flags(flags) => WORD + flags.len(),
        ComponentDefinedType::Option { ty, .. } => sum(&mut [*ty].into_iter())?,
        ComponentDefinedType::Result { ok, err, .. } => sum(&mut [*ok, *err].into_iter().flatten())?,
        _ => return Err(Unfit::because("a host function gives it something of an unknown size")),
    };
    if size > MAX_RESULT {
        return Err(Unfit::because(format!("a host function gives it more than {MAX_RESULT} bytes")));
    }
    Ok(size)
}
