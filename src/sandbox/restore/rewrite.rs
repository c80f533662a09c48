//! Rewrites a component.

use wasm_encoder::{
    Alias, CanonicalFunctionSection, CanonicalOption, Component, ComponentAliasSection, ComponentExportKind,
    ComponentExportSection, ComponentTypeSection, ComponentValType, ExportKind, PrimitiveValType, RawSection,
};
use wasmparser::{Validator, WasmFeatures};

use super::{CHECKPOINT, RESTORE, Restores, Unfit, module, parts};

/// What may be in a component that is rewritten.
const FEATURES: WasmFeatures = WasmFeatures::WASM2
    .union(WasmFeatures::TAIL_CALL)
    .union(WasmFeatures::EXTENDED_CONST)
    .union(WasmFeatures::COMPONENT_MODEL);

/// Rewrites a component so that its instances can be put back.
///
/// # Errors
/// They can't.
pub(in super::super) fn rewrite(component: &[u8]) -> Result<(Vec<u8>, Restores), Unfit> {
    let types = Validator::new_with_features(FEATURES).validate_all(component)?;
    let types = types.as_ref();
    let parts = parts::take_apart(component, types)?;
    let main = module::rewrite(&component[parts.module.clone()], parts.largest_result)?;
    let mut rewritten = Component::new();
    for (id, range) in &parts.sections {
        let data = if *range == parts.module { &*main.bytes } else { &component[range.clone()] };
        rewritten.section(&RawSection { id: *id, data });
    }

    // Behind all that is there, so that no index changes.
    let mut kinds = ComponentTypeSection::new();
    let u32_result = Some(ComponentValType::Primitive(PrimitiveValType::U32));
    let no_params = std::iter::empty::<(&str, ComponentValType)>;
    kinds.function().params(no_params()).result(u32_result);
    kinds.function().params(no_params()).result(None);
    let mut aliases = ComponentAliasSection::new();
    let mut lifted = CanonicalFunctionSection::new();
    let mut exports = ComponentExportSection::new();
    for (index, name) in (0..).zip([CHECKPOINT, RESTORE]) {
        aliases.alias(Alias::CoreInstanceExport { instance: parts.instance, kind: ExportKind::Func, name });
        let no_options = std::iter::empty::<CanonicalOption>();
        lifted.lift(types.function_count() + index, types.component_type_count() + index, no_options);
        // An export is one more function of its own.
        let function = types.component_function_count() + index;
        exports.export(name, ComponentExportKind::Func, function, None);
    }
    rewritten.section(&kinds).section(&aliases).section(&lifted).section(&exports);
    let bytes = rewritten.finish();
    // A mistake made here shall not keep a service from being served.
    let features = FEATURES.union(WasmFeatures::MULTI_MEMORY);
    if let Err(error) = Validator::new_with_features(features).validate_all(&bytes) {
        debug_assert!(false, "what was rewritten is not valid: {error}");
        return Err(Unfit::because(format!("a defect of the server: what was rewritten is not valid: {error}")));
    }
    Ok((bytes, main.restores))
}
