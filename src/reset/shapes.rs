//! The shapes of components that are reset, as an allow-list: which modules may
//! be there ([`Role`]), and how they may be connected. Whatever is not
//! described here is instantiated per call.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
};

use wasmparser::{
    component_types::{ComponentDefinedType, ComponentValType},
    types::TypesRef,
};

use super::{
    FreshReason,
    graph::{CoreInstance, Graph, Item},
    module_shape::{ActiveElements, ModuleShape, Role, Space},
};

/// Largest result of a host function that is followed, in bytes: more than
/// any that is offered has.
const MAX_RESULT: usize = 64 * 1024;
/// How deep its type may nest.
const MAX_DEPTH: usize = 64;

/// What is to be known of a component before it is rewritten.
pub(super) struct Parts {
    /// Its sections: identifier, and where they lie.
    pub(super) sections: Vec<(u8, Range<usize>)>,
    /// The core instances whose modules are rewritten, the owner first.
    pub(super) holders: Vec<Holder>,
    /// No host function writes more than this to where it has to put its
    /// result, in bytes.
    pub(super) largest_result: u32,
    /// Functions of the owner: whatever the host calls ends with a call of one
    /// of them, and nobody else calls them. Empty where that is not so.
    pub(super) post_returns: Vec<u32>,
}

/// A core instance whose module is rewritten, the only one of that module.
pub(super) struct Holder {
    /// Index of the instance.
    pub(super) instance: u32,
    /// Index of its module.
    pub(super) module: u32,
    /// Where that lies.
    pub(super) range: Range<usize>,
    /// Functions of it by which the host allocates.
    pub(super) allocators: Vec<u32>,
    /// By number, those of its imported functions that may end at the host.
    pub(super) host_functions: Vec<u32>,
}

/// The roles of the core instances, by index; none for sets of items.
struct Roles(Vec<Option<Role>>);

impl Roles {
    /// The role of the instance that defines an item; none for the host.
    fn of(&self, item: Item) -> Option<Role> {
        match item {
            Item::Host => None,
            Item::Defined { instance, .. } => self.0[instance as usize],
        }
    }

    fn is_rewritten(&self, item: Item) -> bool {
        matches!(self.of(item), Some(Role::Owner | Role::Holder))
    }
}

/// Holds a valid component against the allow-list.
pub(super) fn recognise(graph: Graph<'_>, types: TypesRef<'_>) -> Result<Parts, FreshReason> {
    graph.agrees_with(types)?;
    let roles = roles(&graph)?;
    let mut holders = Vec::new();
    // Functions that are called otherwise than as a call's end.
    let mut called = HashSet::new();
    for (index, instance) in (0..).zip(&graph.instances) {
        let CoreInstance::Module(module, given) = instance else {
            continue;
        };
        let shape = &graph.modules[*module as usize];
        let functions = graph.resolve_imports(Space::Function, shape, given)?;
        let tables = graph.resolve_imports(Space::Table, shape, given)?;
        called.extend(functions.iter().copied());
        match shape.role {
            Role::Owner | Role::Holder | Role::Linker => {
                let memories = graph.resolve_imports(Space::Memory, shape, given)?;
                if !memories
                    .iter()
                    .all(|memory| roles.of(*memory) == Some(Role::Owner))
                {
                    return Err(FreshReason::lost());
                }
                // A call by a table is not seen, so it must hold what was
                // rewritten and nothing else.
                if shape.role == Role::Linker {
                    for elements in &shape.elements {
                        check_elements(elements, &tables, &functions, &roles)?;
                    }
                } else if !tables.iter().all(|table| roles.is_rewritten(*table)) {
                    return Err(FreshReason::because(
                        "it calls by a table of another module",
                    ));
                }
                let ends_at_host = |item: &Item| !roles.is_rewritten(*item);
                let imports = (0..).zip(&functions);
                holders.push(Holder {
                    instance: index,
                    module: *module,
                    range: shape.range.clone(),
                    allocators: Vec::new(),
                    host_functions: imports
                        .filter(|(_, item)| ends_at_host(item))
                        .map(|(function, _)| function)
                        .collect(),
                });
            }
            Role::Fixups => {
                for elements in &shape.elements {
                    check_elements(elements, &tables, &functions, &roles)?;
                }
            }
            Role::Starter if !functions.iter().all(|item| roles.is_rewritten(*item)) => {
                return Err(FreshReason::because("it starts by calling the host"));
            }
            Role::Shim | Role::Starter | Role::Stub => {}
        }
    }
    holders.sort_by_key(|holder| roles.0[holder.instance as usize] != Some(Role::Owner));
    // Which gives them the memory of cards.
    if holders
        .iter()
        .any(|holder| holder.instance < holders[0].instance)
    {
        return Err(FreshReason::because(
            "code of it is instantiated before its memory",
        ));
    }

    let position: HashMap<_, _> = holders
        .iter()
        .enumerate()
        .map(|(position, holder)| (holder.instance, position))
        .collect();
    let rewritten = |item: Item| match item {
        Item::Defined { instance, index } => Some((*position.get(&instance)?, index)),
        Item::Host => None,
    };
    // What the host allocates is marked by a function in front of the guest's.
    for function in &graph.reallocs {
        let item = graph.resolve(Space::Function, *function)?;
        called.insert(item);
        let (holder, index) = rewritten(item).ok_or_else(|| {
            FreshReason::because("the host does not allocate by a function of it")
        })?;
        holders[holder].allocators.push(index);
    }
    for lift in &graph.lifts {
        let item = graph.resolve(Space::Function, lift.function)?;
        called.insert(item);
        rewritten(item)
            .ok_or_else(|| FreshReason::because("the host calls a function that is the host's"))?;
    }
    let mut post_returns = Some(Vec::new());
    for lift in &graph.lifts {
        let after = match lift.post_return {
            Some(function) => {
                let item = graph.resolve(Space::Function, function)?;
                rewritten(item)
                    .filter(|(holder, _)| *holder == 0 && !called.contains(&item))
                    .map(|(_, index)| index)
            }
            None => None,
        };
        post_returns = post_returns.zip(after).map(|(mut functions, after)| {
            functions.push(after);
            functions
        });
    }
    let mut largest_result = 0;
    for function in &graph.lowers {
        let kind = &types[types.component_function_at(*function)];
        let size = kind
            .result
            .map_or(Ok(0), |result| largest(result, types, 0))?;
        largest_result = largest_result.max(size);
    }
    Ok(Parts {
        sections: graph.sections,
        holders,
        largest_result: u32::try_from(largest_result).map_err(|_| FreshReason::lost())?,
        post_returns: post_returns.unwrap_or_default(),
    })
}

/// Each module is instantiated once, and one of them is the owner.
fn roles(graph: &Graph<'_>) -> Result<Roles, FreshReason> {
    let mut instantiated = vec![false; graph.modules.len()];
    let mut owners = 0;
    let mut roles = Vec::new();
    for instance in &graph.instances {
        let CoreInstance::Module(module, _) = instance else {
            roles.push(None);
            continue;
        };
        let shape: &ModuleShape<'_> = graph
            .modules
            .get(*module as usize)
            .ok_or_else(FreshReason::lost)?;
        if std::mem::replace(&mut instantiated[*module as usize], true) {
            return Err(FreshReason::because(
                "a module of it is instantiated several times",
            ));
        }
        // A memory without pages is one that another module may grow.
        owners += usize::from(matches!(shape.role, Role::Owner | Role::Stub));
        if shape.role == Role::Stub && owners == 1 {
            return Err(FreshReason::because(
                "it begins with a memory without pages",
            ));
        }
        roles.push(Some(shape.role));
    }
    match owners {
        0 => Err(FreshReason::because("none of its modules has a memory")),
        1 => Ok(Roles(roles)),
        _ => Err(FreshReason::because("several of its modules have a memory")),
    }
}

/// A shim's table may hold anything but what another one forwards to; a table
/// that rewritten code calls by, rewritten functions alone.
fn check_elements(
    elements: &ActiveElements,
    tables: &[Item],
    functions: &[Item],
    roles: &Roles,
) -> Result<(), FreshReason> {
    let table = *tables
        .get(elements.table as usize)
        .ok_or_else(FreshReason::lost)?;
    let filled = elements
        .functions
        .as_ref()
        .ok_or_else(|| FreshReason::because("a table of it is filled with what is computed"))?;
    for function in filled {
        let item = *functions
            .get(*function as usize)
            .ok_or_else(FreshReason::lost)?;
        let fits = match roles.of(table) {
            Some(Role::Shim) => item == Item::Host || roles.is_rewritten(item),
            _ => roles.is_rewritten(table) && roles.is_rewritten(item),
        };
        if !fits {
            return Err(FreshReason::because(
                "a table of it holds functions of the host",
            ));
        }
    }
    Ok(())
}

/// No value of a type takes more bytes in memory than this.
fn largest(
    kind: ComponentValType,
    types: TypesRef<'_>,
    depth: usize,
) -> Result<usize, FreshReason> {
    // Of any alignment, and of any discriminant.
    const WORD: usize = 8;
    if depth > MAX_DEPTH {
        return Err(FreshReason::because(
            "a host function gives it something that nests too deep",
        ));
    }
    let id = match kind {
        ComponentValType::Primitive(_) => return Ok(2 * WORD),
        ComponentValType::Type(id) => id,
    };
    let sum = |kinds: &mut dyn Iterator<Item = ComponentValType>| -> Result<usize, FreshReason> {
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
            return Err(FreshReason::because(
                "a host function gives it something of an unknown size",
            ));
        }
    };
    if size > MAX_RESULT {
        return Err(FreshReason::because(format!(
            "a host function gives it more than {MAX_RESULT} bytes"
        )));
    }
    Ok(size)
}
