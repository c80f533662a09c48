//! Which modules of a component can remember anything at all.

use wasmparser::{DataKind, Operator, Parser, Payload, TypeRef};

use super::Unfit;

/// What can change in an instance of a module after it was made.
#[derive(PartialEq)]
pub(super) enum Nature {
    /// Nothing. It passes its arguments on to somebody else, as the modules
    /// that are put between a service and its imports do.
    PassesOn,
    /// Something.
    HoldsState,
    /// Something, and it has a memory of its own.
    HasMemory,
}

impl Nature {
    pub(super) fn of(module: &[u8]) -> Result<Self, Unfit> {
        // By index: the numbers of parameters and results of each type, and of
        // each function, imported ones first.
        let (mut kinds, mut functions, mut bodies) = (Vec::new(), Vec::new(), None);
        let (mut nature, mut holds_state) = (Self::PassesOn, Self::HoldsState);
        for payload in Parser::new(0).parse_all(module) {
            match payload? {
                Payload::TypeSection(section) => {
                    for kind in section.into_iter_err_on_gc_types() {
                        let kind = kind?;
                        kinds.push((kind.params().len(), kind.results().len()));
                    }
                }
                Payload::ImportSection(section) => {
                    for import in section.into_imports() {
                        if let TypeRef::Func(kind) = import?.ty {
                            functions.push(kinds[kind as usize]);
                        }
                    }
                }
                Payload::FunctionSection(section) => {
                    bodies = Some(functions.len());
                    for kind in section {
                        functions.push(kinds[kind? as usize]);
                    }
                }
                Payload::MemorySection(section) => {
                    for memory in section {
                        // Nothing fits into one of no pages, unless it grows.
                        if memory?.initial > 0 {
                            return Ok(Self::HasMemory);
                        }
                        holds_state = Self::HasMemory;
                    }
                }
                Payload::GlobalSection(section) if section.count() > 0 => nature = Self::HoldsState,
                Payload::DataSection(section) => {
                    for data in section {
                        if matches!(data?.kind, DataKind::Active { .. }) {
                            nature = Self::HoldsState;
                        }
                    }
                }
                Payload::CodeSectionEntry(body) => {
                    let function = bodies
                        .as_mut()
                        .expect("a body has a type, or it would not be valid");
                    if !passes_on(&body, *function, &functions)? {
                        return Ok(holds_state);
                    }
                    *function += 1;
                }
                _ => {}
            }
        }
        Ok(nature)
    }
}

/// Whether a function does nothing but call another one with its arguments,
/// or several that take and give nothing, or nothing at all: no host function
/// gets an address from it that its own caller did not give.
fn passes_on(
    body: &wasmparser::FunctionBody<'_>,
    function: usize,
    functions: &[(usize, usize)],
) -> Result<bool, Unfit> {
    let mut operators = body.get_operators_reader()?;
    let mut next = operators.read()?;
    if matches!(next, Operator::Unreachable | Operator::End) {
        return Ok(true);
    }
    let (params, _) = functions[function];
    for param in 0..params {
        if !matches!(next, Operator::LocalGet { local_index } if local_index as usize == param) {
            return Ok(false);
        }
        next = operators.read()?;
    }
    if matches!(next, Operator::I32Const { .. }) {
        let called = matches!(operators.read()?, Operator::CallIndirect { .. });
        return Ok(called && matches!(operators.read()?, Operator::End));
    }
    let mut calls = Vec::new();
    while let Operator::Call { function_index } = next {
        calls.push(functions[function_index as usize]);
        next = operators.read()?;
    }
    Ok(matches!(next, Operator::End)
        && (calls.len() == 1 || calls.iter().all(|kind| *kind == (0, 0))))
}
