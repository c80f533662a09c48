//! The functions and globals that a rewritten module gets.

use std::collections::HashMap;

use wasm_encoder::{
    BlockType, CodeSection, Function, FunctionSection, GlobalSection, InstructionSink, MemArg,
    TypeSection, ValType,
};

use super::{
    CARD, CARD_BITS, MAX_PAGES,
    elision::ELISION_RANGE,
    module::{OWN, SAVED, mutable, zero},
    shape::{Kind, Shape},
};

/// A mark holds for as much as may lie in the card after the one that it
/// marks, so as much is copied back of that.
const OVERHANG: i32 = ELISION_RANGE as i32 - 1;

/// Cards in a page of WebAssembly, as a power of two.
const CARDS_PER_PAGE: i32 = 16 - CARD_BITS as i32;

/// Pages of WebAssembly for which one page of cards is enough, as a power of
/// two: a card takes a byte.
const PAGES_PER_CARDS_PAGE: u32 = CARD_BITS;

/// Pages of the memory of cards for a memory of so many pages. More than
/// 64 KiB behind its end have cards too, so that what may be marked beyond what
/// is written is there.
pub(super) const fn cards_pages(pages: u64) -> u64 {
    (pages >> PAGES_PER_CARDS_PAGE) + 1
}

/// What is added, and where its indices begin: behind all that was there.
pub(super) struct Added<'a> {
    pub(super) shape: &'a Shape,
    /// The memory of the cards.
    pub(super) cards: u32,
    pub(super) first_function: u32,
    pub(super) first_kind: u32,
    pub(super) first_global: u32,
    /// What `memory.size` says at first, where that is less than there is.
    pub(super) first_pages: Option<i32>,
    pub(super) largest_result: u32,
    /// Imported functions that may write to the memory.
    pub(super) calls: Vec<(u32, &'a Kind)>,
    /// Functions by which the host allocates what it writes to.
    pub(super) allocators: Vec<(u32, &'a Kind)>,
    /// Functions with which a call of the host ends.
    pub(super) post_returns: Vec<(u32, &'a Kind)>,
    /// For an imported function, what the guest calls in its place.
    pub(super) before: HashMap<u32, u32>,
    /// For an exported function, what the host calls in its place.
    pub(super) after: HashMap<u32, u32>,
}

/// The functions in this order; then those in front of others.
const WRITE_BARRIER: u32 = 0;
const CHECKPOINT: u32 = 1;
const RESET: u32 = 2;
const GROW: u32 = 3;
const VERIFY: u32 = 4;
const FUNCTIONS: u32 = 5;

impl Added<'_> {
    /// Numbers the functions that are put in front of others.
    pub(super) fn number(&mut self) {
        let mut next = self.first_function + FUNCTIONS;
        let mut number = |functions: &[(u32, &Kind)], numbers: &mut HashMap<u32, u32>| {
            for (function, _) in functions {
                numbers.insert(*function, next);
                next += 1;
            }
        };
        number(&self.calls, &mut self.before);
        number(&self.allocators, &mut self.after);
        number(&self.post_returns, &mut self.after);
    }

    /// `(address, length)`: marks what is about to be written.
    pub(super) fn write_barrier(&self) -> u32 {
        self.first_function + WRITE_BARRIER
    }

    /// `() -> pages`, -1 where there is no memory to keep them.
    pub(super) fn checkpoint(&self) -> u32 {
        self.first_function + CHECKPOINT
    }

    /// `()`.
    pub(super) fn reset(&self) -> u32 {
        self.first_function + RESET
    }

    /// `() -> u32`, zero if nothing differs from the checkpoint.
    pub(super) fn verify(&self) -> u32 {
        self.first_function + VERIFY
    }

    /// `(pages) -> pages`, as `memory.grow`.
    pub(super) fn grow(&self) -> u32 {
        self.first_function + GROW
    }

    /// The global that holds what `memory.size` says, where that is less than
    /// there is.
    pub(super) fn pages(&self) -> Option<u32> {
        self.first_pages.map(|_| self.first_global)
    }

    /// Whether each call ends with the instance being reset, once there is
    /// a checkpoint.
    pub(super) fn resets_itself(&self) -> bool {
        !self.post_returns.is_empty()
    }

    /// The global that says whether there is one.
    fn has_checkpoint(&self) -> u32 {
        self.kept(self.changing().count())
    }

    /// The global that keeps the first value of one that can change.
    fn kept(&self, index: usize) -> u32 {
        let first = self.first_global + u32::from(self.first_pages.is_some());
        first + u32::try_from(index).expect("bounded by the validator")
    }

    /// What guests call in the place of this function.
    pub(super) fn in_front_of_import(&self, function: u32) -> u32 {
        *self.before.get(&function).unwrap_or(&function)
    }

    /// What the host calls in the place of this function.
    pub(super) fn in_front_of_export(&self, function: u32) -> u32 {
        let after = self.after.get(&function);
        after.map_or_else(|| self.in_front_of_import(function), |after| *after)
    }

    /// Exported functions that something is put in front of.
    fn exports(&self) -> impl Iterator<Item = &(u32, &Kind)> {
        self.allocators.iter().chain(&self.post_returns)
    }

    /// The types of the first functions, in their order.
    pub(super) fn kinds(&self, types: &mut TypeSection) {
        const I32: ValType = ValType::I32;
        types.ty().function([I32, I32], []);
        types.ty().function([], [I32]);
        types.ty().function([], []);
        types.ty().function([I32], [I32]);
        types.ty().function([], [I32]);
    }

    pub(super) fn signatures(&self, functions: &mut FunctionSection) {
        for function in 0..FUNCTIONS {
            functions.function(self.first_kind + function);
        }
        for (_, kind) in self.calls.iter().chain(self.exports()) {
            functions.function(kind.index);
        }
    }

    pub(super) fn globals(&self, globals: &mut GlobalSection) {
        if let Some(pages) = self.first_pages {
            globals.global(
                mutable(ValType::I32),
                &wasm_encoder::ConstExpr::i32_const(pages),
            );
        }
        for kind in self.changing().map(|(_, kind)| kind) {
            globals.global(mutable(kind), &zero(kind));
        }
        if self.resets_itself() {
            globals.global(mutable(ValType::I32), &zero(ValType::I32));
        }
    }

    /// The globals that are copied back: the guest's own, and the size.
    fn changing(&self) -> impl Iterator<Item = (u32, ValType)> {
        self.shape
            .mutable
            .iter()
            .copied()
            .chain(self.pages().map(|pages| (pages, ValType::I32)))
    }

    pub(super) fn bodies(&self, code: &mut CodeSection) {
        code.function(&self.mark_cards());
        code.function(&self.write_checkpoint());
        code.function(&self.write_reset());
        code.function(&self.grow_with_cards());
        code.function(&self.write_verify());
        for (function, kind) in &self.calls {
            code.function(&self.before_call(*function, kind));
        }
        for (function, _) in &self.allocators {
            code.function(&self.after_allocation(*function));
        }
        for (function, kind) in &self.post_returns {
            code.function(&self.after_call(*function, kind));
        }
    }

    /// Marks the card of an address on the stack; what a store there may touch
    /// of the next card is copied back with it.
    pub(super) fn mark_card(&self, body: &mut Function, offset: u32) {
        let mut body = body.instructions();
        if offset > 0 {
            // What wraps around is out of bounds: the store traps.
            body.i32_const(offset.cast_signed()).i32_add();
        }
        body.i32_const(CARD_BITS as i32)
            .i32_shr_u()
            .i32_const(1)
            .i32_store8(at(self.cards, 0));
    }

    fn mark_cards(&self) -> Function {
        const ADDRESS: u32 = 0;
        const LENGTH: u32 = 1;
        const LAST: u32 = 2;
        let mut function = Function::new([(1, ValType::I32)]);
        let mut body = function.instructions();
        body.local_get(LENGTH)
            .i32_eqz()
            .if_(BlockType::Empty)
            .return_()
            .end();
        body.local_get(ADDRESS)
            .local_get(LENGTH)
            .i32_add()
            .i32_const(1)
            .i32_sub()
            .local_tee(LAST);
        // Up to the end of 4 GiB at most.
        body.local_get(ADDRESS)
            .i32_lt_u()
            .if_(BlockType::Empty)
            .i32_const(-1)
            .local_set(LAST)
            .end();
        // The first page, the last one, and what lies between.
        for address in [ADDRESS, LAST] {
            body.local_get(address)
                .i32_const(CARD_BITS as i32)
                .i32_shr_u()
                .local_tee(address);
            body.i32_const(1).i32_store8(at(self.cards, 0));
        }
        body.local_get(LAST)
            .local_get(ADDRESS)
            .i32_sub()
            .i32_const(1)
            .i32_gt_u()
            .if_(BlockType::Empty);
        body.local_get(ADDRESS).i32_const(1).i32_add().i32_const(1);
        body.local_get(LAST)
            .local_get(ADDRESS)
            .i32_sub()
            .i32_const(1)
            .i32_sub()
            .memory_fill(self.cards);
        body.end().end();
        function
    }

    fn write_checkpoint(&self) -> Function {
        const COUNT: u32 = PAGES_LOCALS;
        let mut function = Function::new([(PAGES_LOCALS + 1, ValType::I32)]);
        // What there is from the start, beside what was written since.
        for (address, length) in &self.shape.data {
            for instruction in address {
                function.instruction(instruction);
            }
            function
                .instructions()
                .i32_const(length.cast_signed())
                .call(self.write_barrier());
        }
        let mut body = function.instructions();
        if self.shape.memory.is_some() {
            // It may have grown since, too far even.
            body.memory_size(OWN).i32_const(MAX_PAGES as i32).i32_gt_u();
            return_if(&mut body, -1);
            body.memory_size(OWN)
                .memory_size(SAVED)
                .i32_gt_u()
                .if_(BlockType::Empty);
            body.memory_size(OWN)
                .memory_size(SAVED)
                .i32_sub()
                .memory_grow(SAVED);
            body.i32_const(-1).i32_eq();
            return_if(&mut body, -1);
            body.end();
            self.copy_dirty(&mut body, SAVED, OWN, Some(COUNT));
        }
        for (index, (global, _)) in self.changing().enumerate() {
            body.global_get(global).global_set(self.kept(index));
        }
        if self.resets_itself() {
            body.i32_const(1).global_set(self.has_checkpoint());
        }
        body.local_get(COUNT).end();
        function
    }

    fn write_reset(&self) -> Function {
        let mut function = Function::new([(PAGES_LOCALS, ValType::I32)]);
        let mut body = function.instructions();
        if self.shape.memory.is_some() {
            self.copy_dirty(&mut body, OWN, SAVED, None);
        }
        for (index, (global, _)) in self.changing().enumerate() {
            body.global_get(self.kept(index)).global_set(global);
        }
        body.end();
        function
    }

    /// Compares all memory, whether it was marked or not, and the bits of all
    /// globals that can change.
    fn write_verify(&self) -> Function {
        const AT: u32 = 0;
        const END: u32 = 1;
        const VECTOR: u64 = 16;
        const AT_ONCE: u64 = 4;
        let mut function = Function::new([(2, ValType::I32)]);
        let mut body = function.instructions();
        if self.shape.memory.is_some() {
            body.memory_size(OWN).memory_size(SAVED).i32_ne();
            return_if(&mut body, 1);
            body.memory_size(OWN)
                .i32_const(16)
                .i32_shl()
                .local_set(END)
                .loop_(BlockType::Empty);
            for vector in 0..AT_ONCE {
                for memory in [OWN, SAVED] {
                    body.local_get(AT).v128_load(at(memory, vector * VECTOR));
                }
                body.v128_xor();
                if vector > 0 {
                    body.v128_or();
                }
            }
            body.v128_any_true();
            return_if(&mut body, 1);
            body.local_get(AT)
                .i32_const((VECTOR * AT_ONCE) as i32)
                .i32_add()
                .local_tee(AT)
                .local_get(END)
                .i32_lt_u()
                .br_if(0)
                .end();
        }
        for (index, (global, kind)) in self.changing().enumerate() {
            let bits = |body: &mut InstructionSink<'_>, global| {
                body.global_get(global);
                match kind {
                    ValType::F32 => body.i32_reinterpret_f32(),
                    ValType::F64 => body.i64_reinterpret_f64(),
                    _ => body,
                };
            };
            bits(&mut body, global);
            bits(&mut body, self.kept(index));
            match kind {
                ValType::I64 | ValType::F64 => body.i64_ne(),
                ValType::V128 => body.v128_xor().v128_any_true(),
                _ => body.i32_ne(),
            };
            return_if(&mut body, 1);
        }
        body.i32_const(0).end();
        function
    }

    /// `memory.grow`, which sees to cards for what is added. Gives first what
    /// the memory has beyond what the guest has asked for.
    fn grow_with_cards(&self) -> Function {
        const MORE: u32 = 0;
        const BEFORE: u32 = 1;
        const AFTER: u32 = 2;
        const CARDS: u32 = 3;
        let mut function = Function::new([(3, ValType::I32)]);
        let mut body = function.instructions();
        if !self.shape.grows {
            body.unreachable().end();
            return function;
        }
        match self.pages() {
            Some(pages) => body.global_get(pages),
            None => body.memory_size(OWN),
        };
        body.local_tee(BEFORE)
            .local_get(MORE)
            .i32_add()
            .local_tee(AFTER)
            .local_get(BEFORE)
            .i32_lt_u();
        return_if(&mut body, -1);
        body.local_get(AFTER)
            .memory_size(OWN)
            .i32_gt_u()
            .if_(BlockType::Empty);
        body.local_get(AFTER)
            .i32_const(PAGES_PER_CARDS_PAGE as i32)
            .i32_shr_u()
            .i32_const(1)
            .i32_add()
            .local_tee(CARDS)
            .memory_size(self.cards)
            .i32_gt_u()
            .if_(BlockType::Empty);
        body.local_get(CARDS)
            .memory_size(self.cards)
            .i32_sub()
            .memory_grow(self.cards)
            .i32_const(-1)
            .i32_eq();
        return_if(&mut body, -1);
        body.end();
        body.local_get(AFTER)
            .memory_size(OWN)
            .i32_sub()
            .memory_grow(OWN)
            .i32_const(-1)
            .i32_eq();
        return_if(&mut body, -1);
        body.end();
        if let Some(pages) = self.pages() {
            body.local_get(AFTER).global_set(pages);
        }
        body.local_get(BEFORE).end();
        function
    }

    /// Marks where a host function may put its result, and calls it.
    fn before_call(&self, called: u32, kind: &Kind) -> Function {
        let mut function = Function::new([]);
        let mut body = function.instructions();
        let params = kind.params.len() as u32;
        // It may be a number and no address, as a guest's own function gets by
        // way of a shim. Whatever the host can write to has cards behind it for
        // the largest result (`cards_pages`); the rest it refuses.
        let cards = (self.largest_result as i32 + CARD as i32 - 2) >> CARD_BITS;
        body.local_get(params - 1)
            .i32_const(CARD_BITS as i32)
            .i32_shr_u()
            .memory_size(self.cards)
            .i32_const(16)
            .i32_shl()
            .i32_const(cards)
            .i32_sub()
            .i32_lt_u()
            .if_(BlockType::Empty);
        body.local_get(params - 1)
            .i32_const(self.largest_result.cast_signed())
            .call(self.write_barrier())
            .end();
        for param in 0..params {
            body.local_get(param);
        }
        body.call(called).end();
        function
    }

    /// Allocates, and marks what was allocated.
    fn after_allocation(&self, allocator: u32) -> Function {
        const LENGTH: u32 = 3;
        const GIVEN: u32 = 4;
        let mut function = Function::new([(1, ValType::I32)]);
        let mut body = function.instructions();
        for param in 0..=LENGTH {
            body.local_get(param);
        }
        body.call(self.in_front_of_import(allocator))
            .local_set(GIVEN);
        // The guest may call it too, and get no address. What the host writes
        // to lies within the memory, and that has cards.
        for local in [GIVEN, LENGTH] {
            body.local_get(local).i64_extend_i32_u();
        }
        body.i64_add()
            .memory_size(self.cards)
            .i64_extend_i32_u()
            .i64_const(16 + i64::from(CARD_BITS))
            .i64_shl()
            .i64_le_u()
            .if_(BlockType::Empty)
            .local_get(GIVEN)
            .local_get(LENGTH)
            .call(self.write_barrier())
            .end()
            .local_get(GIVEN)
            .end();
        function
    }

    /// Ends a call, and puts the instance back where that can be done.
    fn after_call(&self, called: u32, kind: &Kind) -> Function {
        let mut function = Function::new([]);
        let mut body = function.instructions();
        for param in 0..kind.params.len() as u32 {
            body.local_get(param);
        }
        body.call(self.in_front_of_import(called))
            .global_get(self.has_checkpoint());
        body.memory_size(OWN).memory_size(SAVED).i32_eq().i32_and();
        body.if_(BlockType::Empty).call(self.reset()).end().end();
        function
    }

    /// Copies every dirty card from one memory to the other, cards that follow
    /// each other at once, and takes the marks away.
    fn copy_dirty(&self, body: &mut InstructionSink<'_>, to: u32, from: u32, count: Option<u32>) {
        const AT: u32 = 0;
        const FIRST: u32 = 1;
        const END: u32 = 2;
        let bits = CARD_BITS as i32;
        body.memory_size(OWN)
            .i32_const(CARDS_PER_PAGE)
            .i32_shl()
            .local_set(END);
        body.block(BlockType::Empty).loop_(BlockType::Empty);
        body.local_get(AT).local_get(END).i32_ge_u().br_if(1);
        // Eight pages without a mark at once: the number of pages is a multiple.
        body.block(BlockType::Empty);
        body.local_get(AT).i32_const(7).i32_and().br_if(0);
        body.local_get(AT)
            .i64_load(at(self.cards, 0))
            .i64_const(0)
            .i64_ne()
            .br_if(0);
        body.local_get(AT)
            .i32_const(8)
            .i32_add()
            .local_set(AT)
            .br(1)
            .end();
        body.local_get(AT)
            .i32_load8_u(at(self.cards, 0))
            .i32_eqz()
            .if_(BlockType::Empty);
        body.local_get(AT)
            .i32_const(1)
            .i32_add()
            .local_set(AT)
            .br(1)
            .end();
        body.local_get(AT).local_set(FIRST);
        body.loop_(BlockType::Empty);
        body.local_get(AT)
            .i32_const(0)
            .i32_store8(at(self.cards, 0));
        body.local_get(AT)
            .i32_const(1)
            .i32_add()
            .local_tee(AT)
            .local_get(END)
            .i32_lt_u()
            .if_(BlockType::Empty);
        body.local_get(AT)
            .i32_load8_u(at(self.cards, 0))
            .br_if(1)
            .end()
            .end();
        body.local_get(FIRST).i32_const(bits).i32_shl();
        body.local_get(FIRST).i32_const(bits).i32_shl();
        body.local_get(AT)
            .local_get(FIRST)
            .i32_sub()
            .i32_const(bits)
            .i32_shl();
        body.i32_const(OVERHANG)
            .i32_const(0)
            .local_get(AT)
            .local_get(END)
            .i32_lt_u()
            .select()
            .i32_add();
        body.memory_copy(to, from);
        if let Some(count) = count {
            body.local_get(count)
                .local_get(AT)
                .local_get(FIRST)
                .i32_sub()
                .i32_add()
                .local_set(count);
        }
        body.br(0).end().end();
    }
}

/// Locals that [`Added::copy_dirty`] uses, the first ones of a function.
const PAGES_LOCALS: u32 = 3;

/// Returns a value if what is on the stack is not zero.
fn return_if(body: &mut InstructionSink<'_>, value: i32) {
    body.if_(BlockType::Empty).i32_const(value).return_().end();
}

/// An address without alignment.
fn at(memory_index: u32, offset: u64) -> MemArg {
    MemArg {
        offset,
        align: 0,
        memory_index,
    }
}

const _: () = assert!(CARD.is_multiple_of(8) && CARDS_PER_PAGE >= 3);
