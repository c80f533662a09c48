//! What there is in a module, and which part it plays in a component.

use std::{collections::HashMap, ops::Range};

use wasmparser::{
    ElementItems, ElementKind, ExternalKind, FuncType, FunctionBody, Operator, Parser, Payload,
    TypeRef,
};

use super::FreshReason;

/// The index spaces of a module that matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Space {
    Function,
    Table,
    Memory,
    Global,
}

impl Space {
    pub(super) fn of(kind: ExternalKind) -> Result<Self, FreshReason> {
        Ok(match kind {
            ExternalKind::Func | ExternalKind::FuncExact => Self::Function,
            ExternalKind::Table => Self::Table,
            ExternalKind::Memory => Self::Memory,
            ExternalKind::Global => Self::Global,
            ExternalKind::Tag => return Err(FreshReason::because("it has exceptions")),
        })
    }
}

/// The part that a module plays. Every module of a component that is reset
/// plays one of these; `shapes` says how they may be connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Has the memory. Its code is rewritten.
    Owner,
    /// Has code or globals, and no memory of its own: a library that shares
    /// the owner's, or an adapter. Its code is rewritten.
    Holder,
    /// Has a table, and functions that each call what is at one place of it
    /// with just their own arguments (`wit-component:shim`).
    Shim,
    /// Fills tables with functions that it imports, and has no code
    /// (`wit-component:fixups`).
    Fixups,
    /// Fills tables and memory as it is instantiated, and may start by calling
    /// functions without arguments and results (`__init` of libraries that
    /// wit-component links). What it fills is what it imports, so it is
    /// rewritten, and what it puts into tables marks what the host writes.
    Linker,
    /// Calls functions without arguments and results as it starts, and does
    /// nothing else.
    Starter,
    /// Stands for what is not there: each function traps or does nothing, and
    /// a memory has no pages.
    Stub,
}

/// An import of a module.
pub(super) struct Import<'a> {
    pub(super) module: &'a str,
    pub(super) name: &'a str,
}

/// A segment that fills a table as the module is instantiated.
pub(super) struct ActiveElements {
    pub(super) table: u32,
    /// The functions; none where they are computed.
    pub(super) functions: Option<Vec<u32>>,
}

/// A module.
pub(super) struct ModuleShape<'a> {
    pub(super) range: Range<usize>,
    pub(super) role: Role,
    imports: [Vec<Import<'a>>; 4],
    exports: HashMap<&'a str, (Space, u32)>,
    pub(super) elements: Vec<ActiveElements>,
}

/// What of a module is counted on the way to its role.
#[derive(Default)]
struct Found {
    types: Vec<FuncType>,
    /// Type of each function, imported ones first.
    functions: Vec<u32>,
    memories: u32,
    memory_pages: u64,
    tables: u32,
    globals: u32,
    data: u32,
    other_elements: u32,
    start: Option<u32>,
    bodies: usize,
    forwards: bool,
    only_calls: bool,
    does_nothing: bool,
}

impl<'a> ModuleShape<'a> {
    /// Reads a module that is known to be valid.
    pub(super) fn of(module: &'a [u8], range: Range<usize>) -> Result<Self, FreshReason> {
        let mut shape = Self {
            range,
            role: Role::Holder,
            imports: Default::default(),
            exports: HashMap::new(),
            elements: Vec::new(),
        };
        let mut found = Found {
            forwards: true,
            only_calls: true,
            does_nothing: true,
            ..Found::default()
        };
        for payload in Parser::new(0).parse_all(module) {
            shape.payload(payload?, &mut found)?;
        }
        shape.role = shape.role(&found);
        Ok(shape)
    }

    fn payload(&mut self, payload: Payload<'a>, found: &mut Found) -> Result<(), FreshReason> {
        match payload {
            Payload::TypeSection(section) => {
                for kind in section.into_iter_err_on_gc_types() {
                    found.types.push(kind?);
                }
            }
            Payload::ImportSection(section) => {
                for import in section.into_imports() {
                    let import = import?;
                    let space = match import.ty {
                        TypeRef::Func(kind) | TypeRef::FuncExact(kind) => {
                            found.functions.push(kind);
                            Space::Function
                        }
                        TypeRef::Table(_) => Space::Table,
                        TypeRef::Memory(_) => Space::Memory,
                        TypeRef::Global(_) => Space::Global,
                        TypeRef::Tag(_) => return Err(FreshReason::because("it has exceptions")),
                    };
                    self.imports[space as usize].push(Import {
                        module: import.module,
                        name: import.name,
                    });
                }
            }
            Payload::FunctionSection(section) => {
                for kind in section {
                    found.functions.push(kind?);
                }
            }
            Payload::TableSection(section) => found.tables = section.count(),
            Payload::MemorySection(section) => {
                found.memories = section.count();
                for memory in section {
                    found.memory_pages += memory?.initial;
                }
            }
            Payload::GlobalSection(section) => found.globals = section.count(),
            Payload::DataSection(section) => found.data = section.count(),
            Payload::StartSection { func, .. } => found.start = Some(func),
            Payload::ExportSection(section) => {
                for export in section {
                    let export = export?;
                    let item = (Space::of(export.kind)?, export.index);
                    self.exports.insert(export.name, item);
                }
            }
            Payload::ElementSection(section) => {
                for element in section {
                    let element = element?;
                    let ElementKind::Active { table_index, .. } = element.kind else {
                        found.other_elements += 1;
                        continue;
                    };
                    let functions = match element.items {
                        ElementItems::Functions(items) => {
                            Some(items.into_iter().collect::<Result<_, _>>()?)
                        }
                        ElementItems::Expressions(..) => None,
                    };
                    self.elements.push(ActiveElements {
                        table: table_index.unwrap_or(0),
                        functions,
                    });
                }
            }
            Payload::CodeSectionEntry(body) => {
                let imported = self.imports(Space::Function).len();
                let kind = found.functions[imported + found.bodies];
                found.bodies += 1;
                // Most are neither, as the first instruction tells.
                if found.forwards {
                    found.forwards = forwards(&body, kind, &found.types)?;
                }
                if found.only_calls {
                    found.only_calls = only_calls(&body, imported)?;
                }
                if found.does_nothing {
                    found.does_nothing = does_nothing(&body)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn role(&self, found: &Found) -> Role {
        let Found {
            types,
            functions,
            memories,
            memory_pages,
            tables,
            globals,
            data,
            other_elements,
            start,
            bodies,
            forwards,
            only_calls,
            does_nothing,
        } = found;
        let imported = |space| self.imports(space).len();
        if *memories > 0 {
            let nothing = [*tables, *globals, *data, *other_elements] == [0; 4]
                && *memory_pages == 0
                && *does_nothing
                && start.is_none()
                && self.elements.is_empty()
                && self.imports.iter().all(Vec::is_empty);
            return if nothing { Role::Stub } else { Role::Owner };
        }
        let holds_state =
            *globals > 0 || *data > 0 || imported(Space::Memory) > 0 || imported(Space::Global) > 0;
        if holds_state || *other_elements > 0 {
            let links = *globals == 0 && *tables == 0 && *only_calls && self.exports.is_empty();
            return if links { Role::Linker } else { Role::Holder };
        }
        let takes_nothing = |kind: &u32| {
            let kind = &types[*kind as usize];
            kind.params().is_empty() && kind.results().is_empty()
        };
        let imports_nothing = imported(Space::Function) + imported(Space::Table) == 0;
        if imports_nothing && self.elements.is_empty() && start.is_none() && *forwards {
            Role::Shim
        } else if *bodies == 0 && *tables == 0 && start.is_none() && self.exports.is_empty() {
            Role::Fixups
        } else if start.is_some()
            && *tables == 0
            && imported(Space::Table) == 0
            && self.exports.is_empty()
            && *only_calls
            && functions.iter().all(takes_nothing)
        {
            Role::Starter
        } else {
            Role::Holder
        }
    }

    pub(super) fn imports(&self, space: Space) -> &[Import<'a>] {
        &self.imports[space as usize]
    }

    /// The index of an export of that space.
    pub(super) fn exported(&self, space: Space, name: &str) -> Option<u32> {
        let (kind, index) = self.exports.get(name)?;
        (*kind == space).then_some(*index)
    }
}

/// Whether a function does nothing but call what is at a fixed place of a
/// table, of its own type and with its own arguments.
fn forwards(body: &FunctionBody<'_>, kind: u32, types: &[FuncType]) -> Result<bool, FreshReason> {
    let mut operators = body.get_operators_reader()?;
    for param in 0..types[kind as usize].params().len() {
        match operators.read()? {
            Operator::LocalGet { local_index } if local_index as usize == param => {}
            _ => return Ok(false),
        }
    }
    if !matches!(operators.read()?, Operator::I32Const { .. }) {
        return Ok(false);
    }
    let same = match operators.read()? {
        Operator::CallIndirect { type_index, .. } => {
            types[type_index as usize] == types[kind as usize]
        }
        _ => false,
    };
    Ok(same && matches!(operators.read()?, Operator::End))
}

/// Whether a function traps at once, or ends at once.
fn does_nothing(body: &FunctionBody<'_>) -> Result<bool, FreshReason> {
    let first = body.get_operators_reader()?.read()?;
    Ok(matches!(first, Operator::Unreachable | Operator::End))
}

/// Whether a function does nothing but call imported ones.
fn only_calls(body: &FunctionBody<'_>, imported: usize) -> Result<bool, FreshReason> {
    for operator in body.get_operators_reader()? {
        match operator? {
            Operator::Call { function_index } if (function_index as usize) < imported => {}
            Operator::End => {}
            _ => return Ok(false),
        }
    }
    Ok(true)
}
