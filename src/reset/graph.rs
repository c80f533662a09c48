//! The graph of a component's core instances: which module defines each item
//! that another one imports, or that the host uses.

use std::{collections::HashMap, ops::Range};

use wasmparser::{
    CanonicalFunction, CanonicalOption, ComponentAlias, ComponentExternalKind,
    ComponentOuterAliasKind, ComponentTypeRef, Encoding, ExternalKind, Instance, Parser, Payload,
    types::TypesRef,
};

use super::{
    FreshReason,
    module_shape::{ModuleShape, Space},
    no_export_of_ours,
};

/// A component without modules in components within it.
#[derive(Default)]
pub(super) struct Graph<'a> {
    /// Its sections: identifier, and where they lie.
    pub(super) sections: Vec<(u8, Range<usize>)>,
    pub(super) modules: Vec<ModuleShape<'a>>,
    pub(super) instances: Vec<CoreInstance<'a>>,
    sources: [Vec<Source<'a>>; 4],
    pub(super) lifts: Vec<Lift>,
    /// By component function, what the host gives.
    pub(super) lowers: Vec<u32>,
    /// Core functions by which the host allocates.
    pub(super) reallocs: Vec<u32>,
}

/// A core instance.
pub(super) enum CoreInstance<'a> {
    /// Of a module, with the instances that it is given, by name.
    Module(u32, HashMap<&'a str, u32>),
    /// Of items that others export.
    Items(HashMap<&'a str, (ExternalKind, u32)>),
}

/// A core function that the host calls.
pub(super) struct Lift {
    pub(super) function: u32,
    /// What it calls afterwards.
    pub(super) post_return: Option<u32>,
}

/// How a component names a core item.
enum Source<'a> {
    Export(u32, &'a str),
    Host,
}

/// Where a core item comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Item {
    /// The host: a lowered function, or one that drops a handle.
    Host,
    /// An instance of a module of this component defines it; the index is the
    /// module's.
    Defined {
        /// The core instance.
        instance: u32,
        /// In the module's index space.
        index: u32,
    },
}

impl<'a> Graph<'a> {
    /// Reads a component that is known to be valid.
    pub(super) fn of(component: &'a [u8]) -> Result<Self, FreshReason> {
        let mut graph = Self::default();
        // What is open: true for a core module.
        let mut open = Vec::new();
        for payload in Parser::new(0).parse_all(component) {
            let payload = payload?;
            let depth = open.len();
            match &payload {
                Payload::Version { encoding, .. } => open.push(*encoding == Encoding::Module),
                Payload::End(_) => drop(open.pop()),
                _ if open.last() == Some(&true) => {}
                payload if depth > 1 => holds_nothing(payload)?,
                _ => {}
            }
            if depth == 1 {
                graph.sections.extend(payload.as_section());
                graph.payload(component, payload)?;
            }
        }
        Ok(graph)
    }

    fn payload(&mut self, component: &'a [u8], payload: Payload<'a>) -> Result<(), FreshReason> {
        match payload {
            Payload::ModuleSection {
                unchecked_range, ..
            } => self.modules.push(ModuleShape::of(
                &component[unchecked_range.clone()],
                unchecked_range,
            )?),
            Payload::InstanceSection(section) => {
                for instance in section {
                    self.instances.push(match instance? {
                        Instance::Instantiate { module_index, args } => CoreInstance::Module(
                            module_index,
                            args.iter().map(|arg| (arg.name, arg.index)).collect(),
                        ),
                        Instance::FromExports(items) => CoreInstance::Items(
                            items
                                .iter()
                                .map(|item| (item.name, (item.kind, item.index)))
                                .collect(),
                        ),
                    });
                }
            }
            Payload::ComponentAliasSection(section) => {
                for alias in section {
                    self.alias(alias?)?;
                }
            }
            Payload::ComponentCanonicalSection(section) => {
                for function in section {
                    self.canonical(function?)?;
                }
            }
            Payload::ComponentImportSection(section) => {
                for import in section {
                    if let ComponentTypeRef::Module(_) | ComponentTypeRef::Component(_) = import?.ty
                    {
                        return Err(FreshReason::because("it imports code"));
                    }
                }
            }
            Payload::ComponentExportSection(section) => {
                for export in section {
                    let export = export?;
                    no_export_of_ours(export.name.name)?;
                    exports_no_code(export.kind)?;
                }
            }
            Payload::ComponentStartSection { .. } => {
                return Err(FreshReason::because("the component has a start function"));
            }
            _ => {}
        }
        Ok(())
    }

    fn alias(&mut self, alias: ComponentAlias<'a>) -> Result<(), FreshReason> {
        match alias {
            ComponentAlias::CoreInstanceExport {
                kind,
                instance_index,
                name,
            } => {
                let space = Space::of(kind)?;
                self.sources[space as usize].push(Source::Export(instance_index, name));
                Ok(())
            }
            alias => is_no_code(&alias),
        }
    }

    fn canonical(&mut self, function: CanonicalFunction) -> Result<(), FreshReason> {
        let functions = &mut self.sources[Space::Function as usize];
        let options = match function {
            CanonicalFunction::Lift {
                core_func_index,
                options,
                ..
            } => {
                let post_return = options.iter().find_map(|option| match option {
                    CanonicalOption::PostReturn(function) => Some(*function),
                    _ => None,
                });
                self.lifts.push(Lift {
                    function: core_func_index,
                    post_return,
                });
                options
            }
            CanonicalFunction::Lower {
                func_index,
                options,
            } => {
                functions.push(Source::Host);
                self.lowers.push(func_index);
                options
            }
            CanonicalFunction::ResourceDrop { .. } => {
                functions.push(Source::Host);
                return Ok(());
            }
            _ => {
                return Err(FreshReason::because(
                    "it defines resources, or uses what is newer than functions and handles",
                ));
            }
        };
        for option in options {
            match option {
                CanonicalOption::Realloc(function) => self.reallocs.push(function),
                CanonicalOption::UTF8
                | CanonicalOption::UTF16
                | CanonicalOption::CompactUTF16
                | CanonicalOption::Memory(_)
                | CanonicalOption::PostReturn(_) => {}
                _ => {
                    return Err(FreshReason::because(
                        "it uses more of the canonical ABI than its first version",
                    ));
                }
            }
        }
        Ok(())
    }

    /// Holds every index space against the validator's: whatever would shift
    /// one, so that the index of something here named something else there,
    /// is refused.
    pub(super) fn agrees_with(&self, types: TypesRef<'_>) -> Result<(), FreshReason> {
        let spaces = [
            (self.modules.len(), types.module_count()),
            (self.instances.len(), types.core_instance_count()),
            (self.count(Space::Function), types.function_count()),
            (self.count(Space::Table), types.table_count()),
            (self.count(Space::Memory), types.memory_count()),
            (self.count(Space::Global), types.global_count()),
        ];
        if spaces.iter().any(|(own, known)| *own != *known as usize) {
            return Err(FreshReason::lost());
        }
        Ok(())
    }

    fn count(&self, space: Space) -> usize {
        self.sources[space as usize].len()
    }

    /// Where an item of the component's own index space comes from.
    pub(super) fn resolve(&self, space: Space, index: u32) -> Result<Item, FreshReason> {
        match self.sources[space as usize].get(index as usize) {
            Some(Source::Host) => Ok(Item::Host),
            Some(Source::Export(instance, name)) => self.resolve_export(space, *instance, name),
            None => Err(FreshReason::lost()),
        }
    }

    /// Where an export of a core instance comes from, however often it was
    /// passed on.
    fn resolve_export(
        &self,
        space: Space,
        mut instance: u32,
        name: &str,
    ) -> Result<Item, FreshReason> {
        let mut name = name;
        loop {
            match self.instances.get(instance as usize) {
                Some(CoreInstance::Items(items)) => {
                    let (kind, index) = items.get(name).ok_or_else(FreshReason::lost)?;
                    if Space::of(*kind)? != space {
                        return Err(FreshReason::lost());
                    }
                    match self.sources[space as usize].get(*index as usize) {
                        Some(Source::Host) => return Ok(Item::Host),
                        Some(Source::Export(next, next_name)) => {
                            (instance, name) = (*next, next_name);
                        }
                        None => return Err(FreshReason::lost()),
                    }
                }
                Some(CoreInstance::Module(module, given)) => {
                    let shape = &self.modules[*module as usize];
                    let index = shape.exported(space, name).ok_or_else(FreshReason::lost)?;
                    let Some(import) = shape.imports(space).get(index as usize) else {
                        return Ok(Item::Defined { instance, index });
                    };
                    instance = *given.get(import.module).ok_or_else(FreshReason::lost)?;
                    name = import.name;
                }
                None => return Err(FreshReason::lost()),
            }
        }
    }

    /// Where each import of a module's instance comes from.
    pub(super) fn resolve_imports(
        &self,
        space: Space,
        shape: &ModuleShape<'_>,
        given: &HashMap<&str, u32>,
    ) -> Result<Vec<Item>, FreshReason> {
        let imports = shape.imports(space).iter();
        imports
            .map(|import| {
                let instance = given.get(import.module).ok_or_else(FreshReason::lost)?;
                self.resolve_export(space, *instance, import.name)
            })
            .collect()
    }
}

/// Refuses what a component within another one must not have: anything that
/// can hold state, or hand on code that can.
pub(super) fn holds_nothing(payload: &Payload<'_>) -> Result<(), FreshReason> {
    match payload {
        Payload::ModuleSection { .. }
        | Payload::InstanceSection(_)
        | Payload::ComponentCanonicalSection(_)
        | Payload::ComponentStartSection { .. } => Err(FreshReason::because(
            "a component within it has state of its own",
        )),
        Payload::ComponentAliasSection(section) => section
            .clone()
            .into_iter()
            .try_for_each(|alias| is_no_code(&alias?)),
        Payload::ComponentExportSection(section) => section
            .clone()
            .into_iter()
            .try_for_each(|export| exports_no_code(export?.kind)),
        _ => Ok(()),
    }
}

/// Refuses the export of a module or component: it gives that another index,
/// under which it could be instantiated once more.
fn exports_no_code(kind: ComponentExternalKind) -> Result<(), FreshReason> {
    match kind {
        ComponentExternalKind::Module | ComponentExternalKind::Component => {
            Err(FreshReason::because("it hands on code"))
        }
        _ => Ok(()),
    }
}

/// Refuses names for modules and components that are defined elsewhere: they
/// could be instantiated once more.
pub(super) fn is_no_code(alias: &ComponentAlias<'_>) -> Result<(), FreshReason> {
    use wasmparser::ComponentExternalKind::{Component, Module};
    match alias {
        ComponentAlias::InstanceExport {
            kind: Module | Component,
            ..
        }
        | ComponentAlias::Outer {
            kind: ComponentOuterAliasKind::CoreModule | ComponentOuterAliasKind::Component,
            ..
        } => Err(FreshReason::because("it hands on code")),
        _ => Ok(()),
    }
}
