//! Rewrites a component.

use std::collections::{HashMap, HashSet};

use wasm_encoder::{
    Alias, CanonicalFunctionSection, CanonicalOption, CodeSection, Component,
    ComponentAliasSection, ComponentExportKind, ComponentExportSection, ComponentSectionId,
    ComponentTypeSection, ComponentValType, EntityType, ExportKind, ExportSection, Function,
    FunctionSection, ImportSection, InstanceSection, Module, ModuleArg, ModuleSection,
    PrimitiveValType, RawSection, TypeSection, ValType,
    reencode::{Reencode as _, RoundtripReencoder},
};
use wasmparser::{
    BinaryReader, Instance, InstanceSectionReader, Validator, WasmFeatures, types::TypesRef,
};

use super::{
    ADDED, CARDS_INSTANCE, FreshReason, ResetInfo,
    graph::Graph,
    module::{self, Rewriting},
    outer::Outer,
    shapes::{self, Holder, Parts},
};

/// What may be in a component that is rewritten.
const FEATURES: WasmFeatures = WasmFeatures::WASM2
    .union(WasmFeatures::TAIL_CALL)
    .union(WasmFeatures::EXTENDED_CONST)
    .union(WasmFeatures::COMPONENT_MODEL);

/// Rewrites a component so that its instances can be reset. Takes time in
/// proportion to its size.
///
/// # Errors
/// They can't: says why. A valid component whose rewriting exceeds a limit of
/// WebAssembly's is among them.
pub fn rewrite(component: &[u8]) -> Result<(Vec<u8>, ResetInfo), FreshReason> {
    let types = Validator::new_with_features(FEATURES).validate_all(component)?;
    let (rewritten, info) = match Outer::of(component)? {
        None => rewrite_one(component, types.as_ref(), true),
        Some(outer) => rewrite_inner(component, types.as_ref(), outer),
    }?;
    let features = FEATURES.union(WasmFeatures::MULTI_MEMORY);
    match Validator::new_with_features(features).validate_all(&rewritten) {
        Ok(_) => Ok((rewritten, info)),
        Err(error) => Err(FreshReason::because(format!(
            "it can't be rewritten: {error}"
        ))),
    }
}

/// A component that holds the one with the state, as those of JavaScript.
fn rewrite_inner(
    component: &[u8],
    types: TypesRef<'_>,
    outer: Outer,
) -> Result<(Vec<u8>, ResetInfo), FreshReason> {
    let Outer {
        sections,
        inner,
        instance,
    } = outer;
    let inner_types =
        Validator::new_with_features(FEATURES).validate_all(&component[inner.clone()])?;
    // What is around it may call it several times for one call of the host.
    let (bytes, info) = rewrite_one(&component[inner.clone()], inner_types.as_ref(), false)?;
    let mut rewritten = Component::new();
    for (id, range) in sections {
        let data = if range == inner {
            &*bytes
        } else {
            &component[range]
        };
        rewritten.section(&RawSection { id, data });
    }
    let (mut aliases, mut exports) = (ComponentAliasSection::new(), ComponentExportSection::new());
    for (index, (name, _)) in (0..).zip(ADDED) {
        aliases.alias(Alias::InstanceExport {
            instance,
            kind: ComponentExportKind::Func,
            name,
        });
        exports.export(
            name,
            ComponentExportKind::Func,
            types.component_function_count() + index,
            None,
        );
    }
    rewritten.section(&aliases).section(&exports);
    Ok((rewritten.finish(), info))
}

/// A component that has its modules itself, and that only the host calls or
/// others too.
fn rewrite_one(
    component: &[u8],
    types: TypesRef<'_>,
    by_host: bool,
) -> Result<(Vec<u8>, ResetInfo), FreshReason> {
    let Parts {
        sections,
        holders,
        largest_result,
        mut post_returns,
    } = shapes::recognise(Graph::of(component)?, types)?;
    let alone = holders.len() == 1;
    if !alone || !by_host {
        post_returns.clear();
    }
    let mut modules = HashMap::new();
    let mut info = None;
    for Holder {
        range,
        allocators,
        host_functions,
        ..
    } in &holders
    {
        let how = Rewriting {
            allocators,
            host_functions,
            post_returns: &post_returns,
            largest_result,
            alone,
        };
        let (bytes, memory) = module::rewrite(&component[range.clone()], &how)?;
        info = info.or(memory);
        modules.insert(range.start, bytes);
    }
    let info = info.ok_or_else(|| FreshReason::because("it has no memory"))?;

    let mut rewritten = Component::new();
    for (id, range) in sections {
        if let Some(data) = modules.get(&range.start) {
            rewritten.section(&RawSection { id, data });
        } else if id == ComponentSectionId::CoreInstance as u8 {
            rewritten.section(&instances(
                &component[range.clone()],
                range.start,
                &holders,
            )?);
        } else {
            rewritten.section(&RawSection {
                id,
                data: &component[range],
            });
        }
    }
    // Behind all that is there, so that no index changes.
    let mut instance = holders[0].instance;
    if !alone {
        instance = types.core_instance_count();
        rewritten.section(&ModuleSection(&all_of_them(holders.len())));
        let mut all = InstanceSection::new();
        let given: Vec<_> = (0..holders.len()).map(|index| index.to_string()).collect();
        let given = given.iter().zip(&holders);
        all.instantiate(
            types.module_count(),
            given.map(|(name, holder)| (&**name, ModuleArg::Instance(holder.instance))),
        );
        rewritten.section(&all);
    }
    export(&mut rewritten, types, instance);
    Ok((rewritten.finish(), info))
}

/// Exports the functions of a core instance that were added.
fn export(component: &mut Component, types: TypesRef<'_>, instance: u32) {
    let mut kinds = ComponentTypeSection::new();
    let no_params = std::iter::empty::<(&str, ComponentValType)>;
    for (_, returns) in ADDED {
        let number = ComponentValType::Primitive(PrimitiveValType::U32);
        kinds
            .function()
            .params(no_params())
            .result(returns.then_some(number));
    }
    let mut aliases = ComponentAliasSection::new();
    let mut lifted = CanonicalFunctionSection::new();
    let mut exports = ComponentExportSection::new();
    for (index, (name, _)) in (0..).zip(ADDED) {
        aliases.alias(Alias::CoreInstanceExport {
            instance,
            kind: ExportKind::Func,
            name,
        });
        let no_options = std::iter::empty::<CanonicalOption>();
        lifted.lift(
            types.function_count() + index,
            types.component_type_count() + index,
            no_options,
        );
        let function = types.component_function_count() + index;
        exports.export(name, ComponentExportKind::Func, function, None);
    }
    component
        .section(&kinds)
        .section(&aliases)
        .section(&lifted)
        .section(&exports);
}

/// The core instances of a section; those that share the guest's memory get
/// that of the marks too.
fn instances(
    section: &[u8],
    offset: usize,
    holders: &[Holder],
) -> Result<InstanceSection, FreshReason> {
    let libraries: HashSet<_> = holders[1..].iter().map(|holder| holder.module).collect();
    let mut instances = InstanceSection::new();
    for instance in InstanceSectionReader::new(BinaryReader::new(section, offset))? {
        match instance? {
            Instance::Instantiate { module_index, args } => {
                let given = args
                    .iter()
                    .map(|arg| (arg.name, ModuleArg::Instance(arg.index)));
                let cards = libraries
                    .contains(&module_index)
                    .then_some((CARDS_INSTANCE, ModuleArg::Instance(holders[0].instance)));
                instances.instantiate(module_index, given.chain(cards).collect::<Vec<_>>());
            }
            Instance::FromExports(items) => {
                let kind = |kind| {
                    RoundtripReencoder
                        .export_kind(kind)
                        .map_err(|error| FreshReason::because(error.to_string()))
                };
                let items = items
                    .iter()
                    .map(|item| Ok((item.name, kind(item.kind)?, item.index)));
                instances.export_items(items.collect::<Result<Vec<_>, FreshReason>>()?);
            }
        }
    }
    Ok(instances)
}

/// A module whose functions call those of so many others, that of the one
/// with the memory last: then all pages are marked.
fn all_of_them(count: usize) -> Module {
    let (mut types, mut imports) = (TypeSection::new(), ImportSection::new());
    let (mut functions, mut code, mut exports) = (
        FunctionSection::new(),
        CodeSection::new(),
        ExportSection::new(),
    );
    let count = u32::try_from(count).expect("bounded by the validator");
    let added = u32::try_from(ADDED.len()).expect("a few");
    for (kind, (name, returns)) in (0..).zip(ADDED) {
        types.ty().function([], returns.then_some(ValType::I32));
        for module in 0..count {
            imports.import(&module.to_string(), name, EntityType::Function(kind));
        }
        functions.function(kind);
        exports.export(name, ExportKind::Func, added * count + kind);
        let mut function = Function::new([]);
        let mut body = function.instructions();
        let calls = (0..count).rev();
        for (done, module) in calls.enumerate() {
            body.call(kind * count + module);
            if done > 0 && returns {
                body.i32_add();
            }
        }
        body.end();
        code.function(&function);
    }
    let mut module = Module::new();
    module
        .section(&types)
        .section(&imports)
        .section(&functions)
        .section(&exports)
        .section(&code);
    module
}
