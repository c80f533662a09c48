//! A component around the one that holds the state, as those of JavaScript are
//! built.

use std::ops::Range;

use wasmparser::{
    ComponentAlias, ComponentExport, ComponentExternalKind, ComponentInstance,
    ComponentOuterAliasKind, ComponentTypeRef, Parser, Payload,
};

use super::{Unfit, nature::Nature, no_export_of_ours};

/// A component that holds others, of which one holds all state.
pub(super) struct Outer {
    /// Its sections: identifier, and where they lie.
    pub(super) sections: Vec<(u8, Range<usize>)>,
    /// Where the inner component lies.
    pub(super) inner: Range<usize>,
    /// The instance that is made of it.
    pub(super) instance: u32,
}

impl Outer {
    /// None for a component that has modules itself, or none at all.
    pub(super) fn of(component: &[u8]) -> Result<Option<Self>, Unfit> {
        let mut sections = Vec::new();
        let (mut components, mut instances) = (Vec::new(), Vec::new());
        let mut depth = 0;
        for payload in Parser::new(0).parse_all(component) {
            let payload = payload?;
            match &payload {
                Payload::Version { .. } => depth += 1,
                Payload::End(_) => depth -= 1,
                _ => {}
            }
            if depth != 1 || matches!(payload, Payload::Version { .. } | Payload::End(_)) {
                continue;
            }
            sections.extend(payload.as_section());
            match payload {
                Payload::ModuleSection { .. }
                | Payload::InstanceSection(_)
                | Payload::ComponentCanonicalSection(_) => {
                    return Ok(None);
                }
                Payload::ComponentSection {
                    unchecked_range, ..
                } => components.push(unchecked_range),
                Payload::ComponentImportSection(section) => {
                    for import in section {
                        match import?.ty {
                            ComponentTypeRef::Instance(_) => instances.push(None),
                            ComponentTypeRef::Component(_) => return Ok(None),
                            _ => {}
                        }
                    }
                }
                Payload::ComponentInstanceSection(section) => {
                    for instance in section {
                        instances.push(match instance? {
                            ComponentInstance::Instantiate {
                                component_index, ..
                            } => Some(component_index),
                            ComponentInstance::FromExports(_) => None,
                        });
                    }
                }
                Payload::ComponentAliasSection(section) => {
                    for alias in section {
                        match alias? {
                            ComponentAlias::InstanceExport {
                                kind: ComponentExternalKind::Instance,
                                ..
                            } => {
                                instances.push(None);
                            }
                            ComponentAlias::InstanceExport {
                                kind: ComponentExternalKind::Component,
                                ..
                            }
                            | ComponentAlias::Outer {
                                kind: ComponentOuterAliasKind::Component,
                                ..
                            } => {
                                return Ok(None);
                            }
                            _ => {}
                        }
                    }
                }
                Payload::ComponentExportSection(section) => {
                    for export in section {
                        let ComponentExport { name, kind, .. } = export?;
                        no_export_of_ours(name.name)?;
                        match kind {
                            ComponentExternalKind::Instance => instances.push(None),
                            ComponentExternalKind::Component => return Ok(None),
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        let mut inner = None;
        for (index, range) in (0..).zip(components) {
            if holds_anything(&component[range.clone()])? && inner.replace((index, range)).is_some()
            {
                return Err(Unfit::because("several components within it hold state"));
            }
        }
        let Some((index, inner)) = inner else {
            return Ok(None);
        };
        let mut made = (0..)
            .zip(&instances)
            .filter(|(_, of)| **of == Some(index))
            .map(|(instance, _)| instance);
        match (made.next(), made.next()) {
            (Some(instance), None) => Ok(Some(Self {
                sections,
                inner,
                instance,
            })),
            _ => Err(Unfit::because(
                "the component within it that holds state is instantiated several times",
            )),
        }
    }
}

/// Whether any module of a component does, at any depth.
fn holds_anything(component: &[u8]) -> Result<bool, Unfit> {
    for payload in Parser::new(0).parse_all(component) {
        if let Payload::ModuleSection {
            unchecked_range, ..
        } = payload?
            && Nature::of(&component[unchecked_range])? != Nature::PassesOn
        {
            return Ok(true);
        }
    }
    Ok(false)
}
