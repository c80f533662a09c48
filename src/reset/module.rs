//! Rewrites the module that holds a component's state.

use wasm_encoder::{
    CodeSection, ConstExpr, DataSection, ElementSection, ExportKind, ExportSection, Function,
    FunctionSection, GlobalSection, GlobalType, ImportSection, Instruction, MemorySection, Module,
    RawSection, SectionId, TableSection, TypeSection, ValType,
    reencode::{Error, Reencode},
};
use wasmparser::{ExternalKind, FunctionBody, MemArg, Operator, Parser, Payload};

use super::{
    CARDS_INSTANCE, CARDS_MEMORY, CHECKPOINT, FreshReason, MAX_PAGES, RESET, ResetInfo, SLACK,
    VERIFY,
    elision::Elision,
    functions::{Added, cards_pages},
    shape::Shape,
};

/// The guest's own memory, and the one that keeps its checkpoint; both are those
/// of the module that has the guest's memory.
pub(super) const OWN: u32 = 0;
pub(super) const SAVED: u32 = 2;

/// Most pages that a memory of cards has: those of a memory of 4 GiB.
const MOST_CARDS: u64 = cards_pages(64 * 1024);

/// Size of a page of WebAssembly in bytes.
const WASM_PAGE: u64 = 64 * 1024;

/// How a module is to be rewritten.
pub(super) struct Rewriting<'a> {
    /// Functions of it by which the host allocates.
    pub(super) allocators: &'a [u32],
    /// By number, those of its imported functions that may end at the host.
    pub(super) host_functions: &'a [u32],
    /// Functions of it with which every call of the host ends; none where there
    /// is something else that it may end with.
    pub(super) post_returns: &'a [u32],
    /// No host function writes more than this to where it has to put its
    /// result, in bytes.
    pub(super) largest_result: u32,
    /// It holds all state there is. Of several, no one may have memory that
    /// another one does not know of.
    pub(super) alone: bool,
}

/// Rewrites a module that is known to be valid; says what is to be known of
/// its memory, if it has one.
pub(super) fn rewrite(
    module: &[u8],
    how: &Rewriting<'_>,
) -> Result<(Vec<u8>, Option<ResetInfo>), FreshReason> {
    let shape = Shape::of(module)?;
    let Some(memory) = shape.memory else {
        let added = shape.added(how, None)?;
        return Ok((
            Barrier {
                shape: &shape,
                added: &added,
            }
            .module(module, 0)?,
            None,
        ));
    };
    // What several modules grow would have to be known to each of them.
    let slack = if shape.grows && how.alone { SLACK } else { 0 };
    let slack = slack.min(memory.maximum.unwrap_or(u64::MAX) - memory.initial);
    let first_size = memory.initial + slack;
    if first_size > MAX_PAGES {
        return Err(FreshReason::because("its memory is too large"));
    }
    let added = shape.added(how, (slack > 0).then_some(memory.initial))?;
    let bytes = Barrier {
        shape: &shape,
        added: &added,
    }
    .module(module, first_size)?;
    let bytes_of = |pages: u64| usize::try_from(pages * WASM_PAGE).expect("bounded by MAX_PAGES");
    let info = ResetInfo {
        added_memory: bytes_of(cards_pages(first_size) + first_size),
        first_memory: bytes_of(first_size),
        resets_itself: added.resets_itself(),
    };
    Ok((bytes, Some(info)))
}

/// Rewrites as it reads: what refers to a function that has something put in
/// front of it refers to that.
struct Barrier<'a> {
    shape: &'a Shape,
    added: &'a Added<'a>,
}

impl Reencode for Barrier<'_> {
    type Error = FreshReason;

    fn function_index(&mut self, function: u32) -> Result<u32, Error<FreshReason>> {
        Ok(self.added.in_front_of_import(function))
    }
}

impl From<Error<FreshReason>> for FreshReason {
    fn from(error: Error<FreshReason>) -> Self {
        match error {
            Error::UserError(reason) => reason,
            error => Self::because(error.to_string()),
        }
    }
}

impl Barrier<'_> {
    fn module(&mut self, module: &[u8], first_size: u64) -> Result<Vec<u8>, FreshReason> {
        let (mut types, mut imports) = (TypeSection::new(), ImportSection::new());
        let (mut functions, mut tables) = (FunctionSection::new(), TableSection::new());
        let (mut globals, mut exports) = (GlobalSection::new(), ExportSection::new());
        let (mut elements, mut code, mut data) = (
            ElementSection::new(),
            CodeSection::new(),
            DataSection::new(),
        );
        let (mut start, mut data_count, mut names) = (None, None, None);
        for payload in Parser::new(0).parse_all(module) {
            match payload? {
                Payload::TypeSection(section) => self.parse_type_section(&mut types, section)?,
                Payload::ImportSection(section) => {
                    self.parse_import_section(&mut imports, section)?
                }
                Payload::FunctionSection(section) => {
                    self.parse_function_section(&mut functions, section)?
                }
                Payload::TableSection(section) => self.parse_table_section(&mut tables, section)?,
                Payload::GlobalSection(section) => {
                    self.parse_global_section(&mut globals, section)?
                }
                Payload::ExportSection(section) => self.exports(&mut exports, section)?,
                Payload::StartSection { func, .. } => start = Some(self.function_index(func)?),
                Payload::ElementSection(section) => {
                    self.parse_element_section(&mut elements, section)?
                }
                Payload::DataCountSection { count, .. } => data_count = Some(count),
                Payload::CodeSectionEntry(body) => self.function(&mut code, &body)?,
                Payload::DataSection(section) => self.parse_data_section(&mut data, section)?,
                Payload::CustomSection(section) if section.name() == "name" => {
                    names = Some(section.range())
                }
                _ => {}
            }
        }
        let added = self.added;
        if self.shape.memory.is_none() {
            let cards = wasm_encoder::EntityType::Memory(memory(1, Some(MOST_CARDS)));
            imports.import(CARDS_INSTANCE, CARDS_MEMORY, cards);
        }
        added.kinds(&mut types);
        added.signatures(&mut functions);
        added.globals(&mut globals);
        added.bodies(&mut code);
        exports.export(CHECKPOINT, ExportKind::Func, added.checkpoint());
        exports.export(RESET, ExportKind::Func, added.reset());
        exports.export(VERIFY, ExportKind::Func, added.verify());
        let mut memories = MemorySection::new();
        if let Some(own) = self.shape.memory {
            let first = memory(first_size, own.maximum);
            memories
                .memory(first)
                .memory(memory(cards_pages(first_size), Some(MOST_CARDS)))
                .memory(first);
            exports.export(CARDS_MEMORY, ExportKind::Memory, added.cards);
        }

        let mut rewritten = Module::new();
        rewritten
            .section(&types)
            .section(&imports)
            .section(&functions)
            .section(&tables);
        rewritten
            .section(&memories)
            .section(&globals)
            .section(&exports);
        if let Some(function_index) = start {
            rewritten.section(&wasm_encoder::StartSection { function_index });
        }
        rewritten.section(&elements);
        if let Some(count) = data_count {
            rewritten.section(&wasm_encoder::DataCountSection { count });
        }
        rewritten.section(&code).section(&data);
        if let Some(range) = names {
            // Of functions, whose indices are as they were.
            rewritten.section(&RawSection {
                id: SectionId::Custom as u8,
                data: &module[range],
            });
        }
        Ok(rewritten.finish())
    }

    /// What the host calls to allocate also marks what it allocates, and what
    /// it calls last also resets.
    fn exports(
        &mut self,
        exports: &mut ExportSection,
        section: wasmparser::ExportSectionReader<'_>,
    ) -> Result<(), FreshReason> {
        for export in section {
            let export = export?;
            match export.kind {
                ExternalKind::Func => {
                    let function = self.added.in_front_of_export(export.index);
                    exports.export(export.name, ExportKind::Func, function);
                }
                _ => self.parse_export(exports, export)?,
            }
        }
        Ok(())
    }

    fn function(
        &mut self,
        code: &mut CodeSection,
        body: &FunctionBody<'_>,
    ) -> Result<(), FreshReason> {
        let locals = body
            .get_locals_reader()?
            .into_iter()
            .collect::<Result<Vec<_>, _>>()?;
        let index = self.shape.imported_functions + code.len();
        let params = self.shape.kind(index).params.len();
        let count = locals
            .iter()
            .fold(params, |sum, (count, _)| sum + *count as usize);
        let mut own = locals
            .into_iter()
            .map(|(count, kind)| Ok((count, self.val_type(kind)?)));
        let mut locals = own
            .by_ref()
            .collect::<Result<Vec<_>, Error<FreshReason>>>()?;
        drop(own);
        let scratch = Scratch::behind(u32::try_from(count).expect("bounded by the validator"));
        locals.extend(Scratch::LOCALS.map(|kind| (1, kind)));
        let mut rewritten = Function::new(locals);
        let mut elision = Elision::default();
        for operator in body.get_operators_reader()? {
            let operator = operator?;
            self.operator(&mut rewritten, operator.clone(), &scratch, &mut elision)?;
            elision.after(&operator);
        }
        code.function(&rewritten);
        Ok(())
    }

    fn operator(
        &mut self,
        body: &mut Function,
        operator: Operator<'_>,
        scratch: &Scratch,
        elision: &mut Elision,
    ) -> Result<(), FreshReason> {
        let mark = |body: &mut Function| {
            body.instruction(&Instruction::Call(self.added.write_barrier()));
        };
        if let Some((memarg, kind)) = store(&operator) {
            let offset = u32::try_from(memarg.offset)
                .map_err(|_| FreshReason::because("an offset of more than 32 bits"))?;
            match elision.base() {
                // No store is longer than 16 bytes.
                Some(base) if elision.is_marked(base, offset.into(), 16) => {}
                Some(base) => {
                    body.instructions().local_get(base);
                    self.added.mark_card(body, offset);
                    elision.mark(base, offset.into());
                }
                None => {
                    let value = scratch.value(kind);
                    body.instructions()
                        .local_set(value)
                        .local_tee(scratch.address)
                        .local_get(scratch.address);
                    self.added.mark_card(body, offset);
                    body.instructions().local_get(value);
                }
            }
            body.instruction(&self.instruction(operator)?);
            return Ok(());
        }
        match operator {
            // All three take where to write and how much, first and last.
            Operator::MemoryFill { .. }
            | Operator::MemoryCopy { .. }
            | Operator::MemoryInit { .. } => {
                let value = scratch.value(ValType::I32);
                body.instructions()
                    .local_set(scratch.length)
                    .local_set(value)
                    .local_tee(scratch.address)
                    .local_get(scratch.address)
                    .local_get(scratch.length);
                mark(body);
                body.instructions()
                    .local_get(value)
                    .local_get(scratch.length);
                body.instruction(&self.instruction(operator)?);
            }
            operator => {
                let instead = match (&operator, self.added.pages()) {
                    (Operator::MemoryGrow { .. }, _) => Some(Instruction::Call(self.added.grow())),
                    (Operator::MemorySize { .. }, Some(pages)) => {
                        Some(Instruction::GlobalGet(pages))
                    }
                    _ => None,
                };
                match instead {
                    Some(instead) => body.instruction(&instead),
                    None => body.instruction(&self.instruction(operator)?),
                };
            }
        }
        Ok(())
    }
}

/// Locals that a rewritten function gets.
struct Scratch {
    address: u32,
    length: u32,
    first_value: u32,
}

impl Scratch {
    const VALUES: [ValType; 5] = [
        ValType::I32,
        ValType::I64,
        ValType::F32,
        ValType::F64,
        ValType::V128,
    ];
    const LOCALS: [ValType; 7] = {
        let [a, b, c, d, e] = Self::VALUES;
        [ValType::I32, ValType::I32, a, b, c, d, e]
    };

    fn behind(locals: u32) -> Self {
        Self {
            address: locals,
            length: locals + 1,
            first_value: locals + 2,
        }
    }

    fn value(&self, kind: ValType) -> u32 {
        let index = Self::VALUES
            .iter()
            .position(|value| *value == kind)
            .expect("a store writes no reference");
        self.first_value + index as u32
    }
}

/// Where an instruction stores, and a value of which type, if it does. With
/// `memory.fill`, `.copy` and `.init` these are all that write to a memory in
/// what is accepted here.
fn store(operator: &Operator<'_>) -> Option<(MemArg, ValType)> {
    Some(match operator {
        Operator::I32Store { memarg }
        | Operator::I32Store8 { memarg }
        | Operator::I32Store16 { memarg } => (*memarg, ValType::I32),
        Operator::I64Store { memarg }
        | Operator::I64Store8 { memarg }
        | Operator::I64Store16 { memarg }
        | Operator::I64Store32 { memarg } => (*memarg, ValType::I64),
        Operator::F32Store { memarg } => (*memarg, ValType::F32),
        Operator::F64Store { memarg } => (*memarg, ValType::F64),
        Operator::V128Store { memarg }
        | Operator::V128Store8Lane { memarg, .. }
        | Operator::V128Store16Lane { memarg, .. }
        | Operator::V128Store32Lane { memarg, .. }
        | Operator::V128Store64Lane { memarg, .. } => (*memarg, ValType::V128),
        _ => return None,
    })
}

/// A memory of so many pages of 64 KiB.
fn memory(minimum: u64, maximum: Option<u64>) -> wasm_encoder::MemoryType {
    wasm_encoder::MemoryType {
        minimum,
        maximum,
        memory64: false,
        shared: false,
        page_size_log2: None,
    }
}

/// Zero of a type.
pub(super) fn zero(kind: ValType) -> ConstExpr {
    match kind {
        ValType::I64 => ConstExpr::i64_const(0),
        ValType::F32 => ConstExpr::f32_const(0.0.into()),
        ValType::F64 => ConstExpr::f64_const(0.0.into()),
        ValType::V128 => ConstExpr::v128_const(0),
        ValType::I32 | ValType::Ref(_) => ConstExpr::i32_const(0),
    }
}

/// A global that can change.
pub(super) fn mutable(val_type: ValType) -> GlobalType {
    GlobalType {
        val_type,
        mutable: true,
        shared: false,
    }
}
