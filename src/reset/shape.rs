//! What is to be known of a module before it is rewritten.

use std::collections::HashMap;

use wasm_encoder::{Instruction, ValType};
use wasmparser::{Data, DataKind, FunctionBody, MemoryType, Operator, Parser, Payload, TypeRef};

use super::{FreshReason, MAX_GLOBALS, functions::Added, module::Rewriting, no_export_of_ours};

/// The signature of a function.
#[derive(Clone, PartialEq)]
pub(super) struct Kind {
    pub(super) index: u32,
    pub(super) params: Vec<wasmparser::ValType>,
    pub(super) results: Vec<wasmparser::ValType>,
}

impl Kind {
    /// By such a function the host allocates.
    fn allocates(&self) -> bool {
        use wasmparser::ValType::I32;
        self.params == [I32; 4] && self.results == [I32]
    }

    /// Such a function may get, by its last parameter, where to put its
    /// result.
    fn returns_by_pointer(&self) -> bool {
        self.params.last() == Some(&wasmparser::ValType::I32) && self.results.is_empty()
    }
}

/// What is to be known of the module before the first byte is written.
#[derive(Default)]
pub(super) struct Shape {
    kinds: Vec<Kind>,
    /// Type of each function, imported ones first.
    functions: Vec<u32>,
    pub(super) imported_functions: u32,
    pub(super) imported_memories: u32,
    /// Its own.
    pub(super) memory: Option<MemoryType>,
    pub(super) grows: bool,
    globals: u32,
    /// Index and type of each global of its own that can change.
    pub(super) mutable: Vec<(u32, ValType)>,
    /// What it puts into the memory from the start: where, and how much.
    pub(super) data: Vec<(Vec<Instruction<'static>>, u32)>,
}

impl Shape {
    pub(super) fn of(module: &[u8]) -> Result<Self, FreshReason> {
        let mut shape = Self::default();
        for payload in Parser::new(0).parse_all(module) {
            shape.payload(payload?)?;
        }
        Ok(shape)
    }

    fn payload(&mut self, payload: Payload<'_>) -> Result<(), FreshReason> {
        match payload {
            Payload::TypeSection(section) => {
                for (index, kind) in (0..).zip(section.into_iter_err_on_gc_types()) {
                    let kind = kind?;
                    let (params, results) = (kind.params().to_vec(), kind.results().to_vec());
                    self.kinds.push(Kind {
                        index,
                        params,
                        results,
                    });
                }
            }
            Payload::ImportSection(section) => {
                for import in section.into_imports() {
                    match import?.ty {
                        TypeRef::Func(kind) => {
                            self.functions.push(kind);
                            self.imported_functions += 1;
                        }
                        TypeRef::Memory(_) => self.imported_memories += 1,
                        TypeRef::Global(_) => self.globals += 1,
                        TypeRef::Table(_) => {}
                        _ => {
                            return Err(FreshReason::because(
                                "it imports what is neither function, memory nor table",
                            ));
                        }
                    }
                }
            }
            Payload::FunctionSection(section) => {
                for kind in section {
                    self.functions.push(kind?);
                }
            }
            Payload::MemorySection(section) => {
                for memory in section {
                    self.memory = Some(memory?);
                }
            }
            Payload::GlobalSection(section) => {
                for global in section {
                    let kind = global?.ty;
                    if kind.mutable {
                        self.mutable
                            .push((self.globals, number(kind.content_type)?));
                    }
                    self.globals += 1;
                }
                if self.mutable.len() > MAX_GLOBALS {
                    return Err(FreshReason::because(format!(
                        "it has more than {MAX_GLOBALS} globals that change"
                    )));
                }
            }
            Payload::ExportSection(section) => {
                for export in section {
                    no_export_of_ours(export?.name)?;
                }
            }
            Payload::DataSection(section) => {
                for data in section {
                    self.data.extend(placed(&data?)?);
                }
            }
            Payload::CodeSectionEntry(body) => self.body(&body)?,
            _ => {}
        }
        Ok(())
    }

    fn body(&mut self, body: &FunctionBody<'_>) -> Result<(), FreshReason> {
        for operator in body.get_operators_reader()? {
            match operator? {
                Operator::TableSet { .. }
                | Operator::TableGrow { .. }
                | Operator::TableFill { .. }
                | Operator::TableCopy { .. }
                | Operator::TableInit { .. } => {
                    return Err(FreshReason::because("it changes its tables"));
                }
                Operator::DataDrop { .. } | Operator::ElemDrop { .. } => {
                    return Err(FreshReason::because("it drops segments"));
                }
                Operator::MemoryGrow { .. } => self.grows = true,
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) fn kind(&self, function: u32) -> &Kind {
        &self.kinds[self.functions[function as usize] as usize]
    }

    /// What is put between the guest and the host, and behind all functions;
    /// with slack, what `memory.size` says at first.
    pub(super) fn added(
        &self,
        how: &Rewriting<'_>,
        slack: Option<u64>,
    ) -> Result<Added<'_>, FreshReason> {
        let calls = how
            .host_functions
            .iter()
            .filter(|function| self.kind(**function).returns_by_pointer());
        let mut allocators = how.allocators.to_vec();
        if !allocators
            .iter()
            .all(|function| self.kind(*function).allocates())
        {
            return Err(FreshReason::because(
                "the host allocates by an odd function of it",
            ));
        }
        allocators.sort_unstable();
        allocators.dedup();
        let mut post_returns = how.post_returns.to_vec();
        post_returns.sort_unstable();
        post_returns.dedup();
        let with_kind = |function| (function, self.kind(function));
        let mut added = Added {
            shape: self,
            before: HashMap::new(),
            after: HashMap::new(),
            cards: if self.memory.is_some() {
                1
            } else {
                self.imported_memories
            },
            first_function: u32::try_from(self.functions.len()).expect("bounded by the validator"),
            first_kind: u32::try_from(self.kinds.len()).expect("bounded by the validator"),
            first_global: self.globals,
            first_pages: slack.map(|pages| i32::try_from(pages).expect("bounded by the validator")),
            largest_result: how.largest_result,
            calls: calls.copied().map(with_kind).collect(),
            allocators: allocators.into_iter().map(with_kind).collect(),
            post_returns: post_returns.into_iter().map(with_kind).collect(),
        };
        added.number();
        Ok(added)
    }
}

/// Where a segment is put, unless it is put nowhere before it is asked for.
fn placed(data: &Data<'_>) -> Result<Option<(Vec<Instruction<'static>>, u32)>, FreshReason> {
    let DataKind::Active { offset_expr, .. } = &data.kind else {
        return Ok(None);
    };
    let mut address = Vec::new();
    for operator in offset_expr.get_operators_reader() {
        address.push(match operator? {
            Operator::I32Const { value } => Instruction::I32Const(value),
            // One that can't change, or it would not be valid.
            Operator::GlobalGet { global_index } => Instruction::GlobalGet(global_index),
            Operator::I32Add => Instruction::I32Add,
            Operator::End => break,
            _ => return Err(FreshReason::because("where its data lies is computed")),
        });
    }
    let length = u32::try_from(data.data.len())
        .map_err(|_| FreshReason::because("its data is too large"))?;
    Ok(Some((address, length)))
}

/// A number's type, as the writer has it.
fn number(kind: wasmparser::ValType) -> Result<ValType, FreshReason> {
    Ok(match kind {
        wasmparser::ValType::I32 => ValType::I32,
        wasmparser::ValType::I64 => ValType::I64,
        wasmparser::ValType::F32 => ValType::F32,
        wasmparser::ValType::F64 => ValType::F64,
        wasmparser::ValType::V128 => ValType::V128,
        wasmparser::ValType::Ref(_) => {
            return Err(FreshReason::because(
                "it has a global that holds a reference",
            ));
        }
    })
}
