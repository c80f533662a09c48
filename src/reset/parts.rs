//! Takes a component apart, finds the modules that hold its state, and sees
//! that nothing gets past what will be put around them.

use std::ops::Range;

use wasmparser::{
    CanonicalFunction, CanonicalOption, ComponentAlias, ElementItems, ElementKind, ExternalKind,
    Instance, Parser, Payload, TypeRef,
    component_types::{ComponentDefinedType, ComponentValType},
    types::TypesRef,
};

use super::{Unfit, nature::Nature, no_export_of_ours};

/// Largest result of a host function that is followed, in bytes: more than
/// any that is offered has.
const MAX_RESULT: usize = 64 * 1024;
/// How deep its type may nest.
const MAX_DEPTH: usize = 64;

/// What is to be known of a component.
pub(super) struct Parts<'a> {
    /// Its sections: identifier, and where they lie.
    pub(super) sections: Vec<(u8, Range<usize>)>,
    /// The core instances that hold state, the one that has the memory first.
    pub(super) holders: Vec<Holder<'a>>,
    /// No host function writes more than this to where it is told to put its
    /// result, in bytes.
    pub(super) largest_result: u32,
    /// Exports of the one with the memory: whatever the host calls ends with
    /// a call of one of them. None where that is not so.
    pub(super) post_returns: Vec<&'a str>,
}

/// A core instance that holds state, the only one of its module.
pub(super) struct Holder<'a> {
    /// Index of the instance.
    pub(super) instance: u32,
    /// Index of its module.
    pub(super) module: u32,
    /// Where that lies.
    pub(super) range: Range<usize>,
    /// Its exports by which the host allocates.
    pub(super) allocators: Vec<&'a str>,
    /// By number, those of its imported functions that end at the host.
    pub(super) host_functions: Vec<u32>,
}

/// A core instance.
enum Made<'a> {
    /// Of a module: its index, and the instances that it is given, by name.
    Module(u32, Vec<(&'a str, u32)>),
    /// Of items that others export.
    Items(Vec<(&'a str, ExternalKind, u32)>),
}

/// Where a core item comes from: an instance and the name of an export, or
/// the host.
type Origin<'a> = Option<(u32, &'a str)>;

/// What is gathered while reading.
#[derive(Default)]
struct Reading<'a> {
    sections: Vec<(u8, Range<usize>)>,
    modules: Vec<Range<usize>>,
    instances: Vec<Made<'a>>,
    functions: Vec<Origin<'a>>,
    memories: Vec<Origin<'a>>,
    tables: Vec<Origin<'a>>,
    globals: Vec<Origin<'a>>,
    /// Functions that the host allocates by, and memories that it writes to.
    allocate: Vec<u32>,
    written: Vec<u32>,
    lowered: Vec<u32>,
    /// Of each function that the host may call, what is called after it.
    lifted: Vec<Option<u32>>,
}

/// Reads a component that is known to be valid.
pub(super) fn take_apart<'a>(component: &'a [u8], types: TypesRef<'_>) -> Result<Parts<'a>, Unfit> {
    let read = read(component)?;
    let mut holds = Vec::new();
    let mut owner = None;
    for (index, range) in (0..).zip(&read.modules) {
        let nature = Nature::of(&component[range.clone()])?;
        if nature == Nature::HasMemory && owner.replace(index).is_some() {
            return Err(Unfit::because("several of its modules have a memory"));
        }
        holds.push(nature != Nature::PassesOn);
    }
    let owner = owner.ok_or_else(|| Unfit::because("none of its modules has a memory"))?;
    let mut holders = Vec::new();
    for (instance, made) in (0..).zip(&read.instances) {
        let Made::Module(module, given) = made else {
            continue;
        };
        let range = read.modules[*module as usize].clone();
        let host_functions = read.looks(
            &component[range.clone()],
            given,
            &holds,
            holds[*module as usize],
        )?;
        if !holds[*module as usize] {
            continue;
        }
        if holders
            .iter()
            .any(|holder: &Holder<'_>| holder.module == *module)
        {
            return Err(Unfit::because(
                "a module that holds state is instantiated several times",
            ));
        }
        holders.push(Holder {
            instance,
            module: *module,
            range,
            allocators: Vec::new(),
            host_functions,
        });
    }
    let first = holders.iter().position(|holder| holder.module == owner);
    holders.swap(
        0,
        first.ok_or_else(|| Unfit::because("the module with its memory is not instantiated"))?,
    );

    // What the host writes to goes through a function that marks it.
    let elsewhere = || Unfit::because("the host would write to it by way of another module");
    for function in &read.allocate {
        let (instance, name) = read.functions[*function as usize].ok_or_else(elsewhere)?;
        let holder = holders
            .iter_mut()
            .find(|holder| holder.instance == instance)
            .ok_or_else(elsewhere)?;
        holder.allocators.push(name);
    }
    for memory in &read.written {
        let (instance, _) = read.memories[*memory as usize].ok_or_else(elsewhere)?;
        holders
            .iter()
            .find(|holder| holder.instance == instance)
            .ok_or_else(elsewhere)?;
    }
    let mut largest_result = 0;
    for function in &read.lowered {
        let kind = &types[types.component_function_at(*function)];
        let size = kind
            .result
            .map_or(Ok(0), |result| largest(result, types, 0))?;
        largest_result = largest_result.max(size);
    }
    let largest_result = u32::try_from(largest_result).expect("bounded by `largest`");
    let post_return = |function: &Option<u32>| {
        let (instance, name) = read.functions[(*function)? as usize]?;
        (instance == holders[0].instance).then_some(name)
    };
    let post_returns = read
        .lifted
        .iter()
        .map(post_return)
        .collect::<Option<Vec<_>>>()
        .unwrap_or_default();
    Ok(Parts {
        sections: read.sections,
        holders,
        largest_result,
        post_returns,
    })
}

fn read(component: &[u8]) -> Result<Reading<'_>, Unfit> {
    let mut read = Reading::default();
    // What is open: true for a core module.
    let mut open = Vec::new();
    for payload in Parser::new(0).parse_all(component) {
        let payload = payload?;
        let depth = open.len();
        match &payload {
            Payload::Version { encoding, .. } => {
                open.push(matches!(encoding, wasmparser::Encoding::Module))
            }
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

impl<'a> Reading<'a> {
    fn payload(&mut self, payload: Payload<'a>) -> Result<(), Unfit> {
        match payload {
            Payload::ModuleSection {
                unchecked_range, ..
            } => self.modules.push(unchecked_range),
            Payload::InstanceSection(section) => {
                for instance in section {
                    self.instances.push(match instance? {
                        Instance::Instantiate { module_index, args } => Made::Module(
                            module_index,
                            args.iter().map(|arg| (arg.name, arg.index)).collect(),
                        ),
                        Instance::FromExports(items) => Made::Items(
                            items
                                .iter()
                                .map(|item| (item.name, item.kind, item.index))
                                .collect(),
                        ),
                    });
                }
            }
            Payload::ComponentAliasSection(section) => {
                for alias in section {
                    match alias? {
                        ComponentAlias::CoreInstanceExport {
                            kind,
                            instance_index,
                            name,
                        } => {
                            if let Some(origins) = self.origins(kind) {
                                origins.push(Some((instance_index, name)));
                            }
                        }
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
                    no_export_of_ours(export?.name.name)?;
                }
            }
            Payload::ComponentStartSection { .. } => {
                return Err(Unfit::because("it has a start function"));
            }
            _ => {}
        }
        Ok(())
    }

    fn origins(&mut self, kind: ExternalKind) -> Option<&mut Vec<Origin<'a>>> {
        match kind {
            ExternalKind::Func | ExternalKind::FuncExact => Some(&mut self.functions),
            ExternalKind::Memory => Some(&mut self.memories),
            ExternalKind::Table => Some(&mut self.tables),
            ExternalKind::Global => Some(&mut self.globals),
            ExternalKind::Tag => None,
        }
    }

    fn canonical(&mut self, function: CanonicalFunction) -> Result<(), Unfit> {
        let options = match function {
            CanonicalFunction::Lift { options, .. } => {
                self.lifted
                    .push(options.iter().find_map(|option| match option {
                        CanonicalOption::PostReturn(function) => Some(*function),
                        _ => None,
                    }));
                options
            }
            CanonicalFunction::Lower {
                func_index,
                options,
            } => {
                self.functions.push(None);
                self.lowered.push(func_index);
                options
            }
            CanonicalFunction::ResourceDrop { .. } => {
                self.functions.push(None);
                return Ok(());
            }
            _ => {
                return Err(Unfit::because(
                    "it uses more of the component model than functions",
                ));
            }
        };
        for option in options {
            match option {
                CanonicalOption::Memory(memory) => self.written.push(memory),
                CanonicalOption::Realloc(function) => self.allocate.push(function),
                CanonicalOption::UTF8
                | CanonicalOption::UTF16
                | CanonicalOption::CompactUTF16
                | CanonicalOption::PostReturn(_) => {}
                _ => {
                    return Err(Unfit::because(
                        "it uses more of the canonical ABI than its first version",
                    ));
                }
            }
        }
        Ok(())
    }

    /// Looks at what a module imports. A call by a table is not seen, so no
    /// function of the host may get into a table of those that hold state.
    /// Gives the functions, by number, that are not of one that holds state.
    fn looks(
        &self,
        module: &[u8],
        given: &[(&'a str, u32)],
        holds: &[bool],
        itself: bool,
    ) -> Result<Vec<u32>, Unfit> {
        let shared = || Unfit::because("a table is shared between it and its imports");
        // Of each imported function and table: whether it is held by one that
        // holds state.
        let (mut functions, mut tables) = (Vec::new(), Vec::new());
        for payload in Parser::new(0).parse_all(module) {
            match payload? {
                Payload::ImportSection(section) => {
                    for import in section.into_imports() {
                        let import = import?;
                        let holds_state = |instance: u32| match &self.instances[instance as usize] {
                            Made::Module(module, _) => holds[*module as usize],
                            Made::Items(_) => false,
                        };
                        let held = self
                            .origin(given, import.module, import.name, import.ty)
                            .is_some_and(holds_state);
                        match import.ty {
                            TypeRef::Func(_) | TypeRef::FuncExact(_) => functions.push(held),
                            TypeRef::Table(_) if itself && !held => return Err(shared()),
                            TypeRef::Table(_) => tables.push(held),
                            TypeRef::Memory(_) | TypeRef::Global(_) => {}
                            TypeRef::Tag(_) => return Err(Unfit::because("it imports a tag")),
                        }
                    }
                }
                Payload::ElementSection(section) if !itself => {
                    for element in section {
                        let element = element?;
                        let ElementKind::Active { table_index, .. } = element.kind else {
                            continue;
                        };
                        if tables.get(table_index.unwrap_or(0) as usize) != Some(&true) {
                            continue;
                        }
                        let ElementItems::Functions(items) = element.items else {
                            return Err(shared());
                        };
                        for function in items {
                            if functions.get(function? as usize) != Some(&true) {
                                return Err(shared());
                            }
                        }
                    }
                }
                _ => {}
            }
        }
        Ok((0..)
            .zip(functions)
            .filter(|(_, held)| !held)
            .map(|(function, _)| function)
            .collect())
    }

    /// The instance of a module that exports what is imported; none if that
    /// is the host.
    fn origin(
        &self,
        given: &[(&'a str, u32)],
        module: &str,
        name: &str,
        kind: TypeRef,
    ) -> Option<u32> {
        let (_, instance) = given.iter().find(|(given, _)| *given == module)?;
        let items = match &self.instances[*instance as usize] {
            Made::Module(..) => return Some(*instance),
            Made::Items(items) => items,
        };
        let (_, _, index) = items.iter().find(|(item, _, _)| *item == name)?;
        let origins = match kind {
            TypeRef::Func(_) | TypeRef::FuncExact(_) => &self.functions,
            TypeRef::Memory(_) => &self.memories,
            TypeRef::Table(_) => &self.tables,
            TypeRef::Global(_) => &self.globals,
            TypeRef::Tag(_) => return None,
        };
        origins.get(*index as usize)?.map(|(instance, _)| instance)
    }
}

/// No value of a type takes more bytes in memory than this.
fn largest(kind: ComponentValType, types: TypesRef<'_>, depth: usize) -> Result<usize, Unfit> {
    // Of any alignment, and of any discriminant.
    const WORD: usize = 8;
    if depth > MAX_DEPTH {
        return Err(Unfit::because(
            "a host function gives it something that nests too deep",
        ));
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
        ComponentDefinedType::Variant(variant) => {
            sum(&mut variant.cases.values().filter_map(|case| case.ty))?
        }
        ComponentDefinedType::Tuple(tuple) => sum(&mut tuple.types.iter().copied())?,
        ComponentDefinedType::Flags(flags) => WORD + flags.len(),
        ComponentDefinedType::Option { ty, .. } => sum(&mut [*ty].into_iter())?,
        ComponentDefinedType::Result { ok, err, .. } => {
            sum(&mut [*ok, *err].into_iter().flatten())?
        }
        _ => {
            return Err(Unfit::because(
                "a host function gives it something of an unknown size",
            ));
        }
    };
    if size > MAX_RESULT {
        return Err(Unfit::because(format!(
            "a host function gives it more than {MAX_RESULT} bytes"
        )));
    }
    Ok(size)
}
