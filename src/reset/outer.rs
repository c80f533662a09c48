//! A component around the one that holds the state, as those of JavaScript are
//! built.

use std::ops::Range;

use wasmparser::{
    CanonicalFunction, ComponentExternalKind, ComponentInstance, ComponentTypeRef, Encoding,
    Parser, Payload,
};

use super::{
    FreshReason,
    graph::{holds_nothing, is_no_code},
    module_shape::{ModuleShape, Role},
    no_export_of_ours,
};

/// A component that holds others, of which one holds all state.
pub(super) struct Outer {
    /// Its sections: identifier, and where they lie.
    pub(super) sections: Vec<(u8, Range<usize>)>,
    /// Where the inner component lies.
    pub(super) inner: Range<usize>,
    /// The instance that is made of it.
    pub(super) instance: u32,
}

/// What is directly in the outer component.
#[derive(Default)]
struct Found {
    sections: Vec<(u8, Range<usize>)>,
    components: Vec<Range<usize>>,
    /// Of each component instance, of which component it is made.
    instances: Vec<Option<u32>>,
    /// It has modules, or uses them.
    has_code: bool,
}

impl Outer {
    /// None for a component that has modules itself, or none at all.
    pub(super) fn of(component: &[u8]) -> Result<Option<Self>, FreshReason> {
        let mut found = Found::default();
        let mut depth = 0;
        for payload in Parser::new(0).parse_all(component) {
            let payload = payload?;
            match &payload {
                Payload::Version { .. } => depth += 1,
                Payload::End(_) => depth -= 1,
                _ if depth == 1 => {
                    found.sections.extend(payload.as_section());
                    found.payload(payload)?;
                }
                _ => {}
            }
            if found.has_code {
                return Ok(None);
            }
        }
        let mut inner = None;
        for (index, range) in (0..).zip(&found.components) {
            if has_state(&component[range.clone()])?
                && inner.replace((index, range.clone())).is_some()
            {
                return Err(FreshReason::because(
                    "several components within it hold state",
                ));
            }
        }
        let Some((index, inner)) = inner else {
            return Ok(None);
        };
        let mut instances = (0..)
            .zip(&found.instances)
            .filter(|(_, of)| **of == Some(index))
            .map(|(instance, _)| instance);
        match (instances.next(), instances.next()) {
            (Some(instance), None) => Ok(Some(Self {
                sections: found.sections,
                inner,
                instance,
            })),
            _ => Err(FreshReason::because(
                "the component within it that holds state is instantiated several times",
            )),
        }
    }
}

impl Found {
    fn payload(&mut self, payload: Payload<'_>) -> Result<(), FreshReason> {
        match payload {
            Payload::ModuleSection { .. }
            | Payload::InstanceSection(_)
            | Payload::ComponentCanonicalSection(_)
            | Payload::ComponentStartSection { .. } => self.has_code = true,
            Payload::ComponentSection {
                unchecked_range, ..
            } => self.components.push(unchecked_range),
            Payload::ComponentImportSection(section) => {
                for import in section {
                    match import?.ty {
                        ComponentTypeRef::Instance(_) => self.instances.push(None),
                        ComponentTypeRef::Component(_) | ComponentTypeRef::Module(_) => {
                            return Err(FreshReason::because("it imports code"));
                        }
                        _ => {}
                    }
                }
            }
            Payload::ComponentInstanceSection(section) => {
                for instance in section {
                    self.instances.push(match instance? {
                        ComponentInstance::Instantiate {
                            component_index,
                            args,
                        } => {
                            let is_code = |kind| {
                                matches!(
                                    kind,
                                    ComponentExternalKind::Component
                                        | ComponentExternalKind::Module
                                )
                            };
                            if args.iter().any(|arg| is_code(arg.kind)) {
                                return Err(FreshReason::because("it hands on code"));
                            }
                            Some(component_index)
                        }
                        ComponentInstance::FromExports(_) => None,
                    });
                }
            }
            Payload::ComponentAliasSection(section) => {
                for alias in section {
                    let alias = alias?;
                    is_no_code(&alias)?;
                    if let wasmparser::ComponentAlias::InstanceExport {
                        kind: ComponentExternalKind::Instance,
                        ..
                    } = alias
                    {
                        self.instances.push(None);
                    }
                }
            }
            Payload::ComponentExportSection(section) => {
                for export in section {
                    let export = export?;
                    no_export_of_ours(export.name.name)?;
                    match export.kind {
                        ComponentExternalKind::Instance => self.instances.push(None),
                        ComponentExternalKind::Component | ComponentExternalKind::Module => {
                            return Err(FreshReason::because("it hands on code"));
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// Whether a component has modules that hold state. One that has not must
/// hold no state of any other kind, at any depth.
fn has_state(component: &[u8]) -> Result<bool, FreshReason> {
    let mut open = Vec::new();
    let mut stateless = Ok(());
    for payload in Parser::new(0).parse_all(component) {
        let payload = payload?;
        match &payload {
            Payload::Version { encoding, .. } => open.push(*encoding == Encoding::Module),
            Payload::End(_) => drop(open.pop()),
            _ if open.last() == Some(&true) => {}
            Payload::ModuleSection {
                unchecked_range, ..
            } if open.len() == 1 => {
                let module = &component[unchecked_range.clone()];
                let role = ModuleShape::of(module, unchecked_range.clone())?.role;
                if !matches!(role, Role::Stub | Role::Starter) {
                    return Ok(true);
                }
            }
            Payload::InstanceSection(_) if open.len() == 1 => {}
            Payload::ComponentCanonicalSection(section) if open.len() == 1 => {
                for function in section.clone() {
                    if !matches!(function?, CanonicalFunction::Lift { .. }) {
                        return Ok(true);
                    }
                }
            }
            payload => stateless = stateless.and_then(|()| holds_nothing(payload)),
        }
    }
    stateless.map(|()| false)
}
