//! Which stores need no mark of their own, because one before them marked for
//! them too: most stores of compiled code go to a few places near each other,
//! the frame of a function or the fields of a value.

use std::collections::HashMap;

use wasmparser::Operator;

/// A mark for an address holds for as many bytes from there on: as many bytes
/// behind a dirty card are copied back with it, less one.
pub(super) const ELISION_RANGE: u64 = 256;

/// Most values and addresses that are followed at once; beyond it what was
/// known is forgotten, so that a long function takes no more than its length.
const MOST: usize = 64;

/// What is known at one place of a function, within what runs from its first
/// instruction to its last.
#[derive(Default)]
pub(super) struct Elision {
    /// The values that are on top of the stack: the local that each is the
    /// value of, if that is known. There may be any number below.
    stack: Vec<Option<u32>>,
    /// For an address in a local, that has not changed since: the offset from
    /// which on it is marked.
    marked: HashMap<u32, u64>,
}

impl Elision {
    /// The local that holds the address of a store that is about to come.
    pub(super) fn base(&self) -> Option<u32> {
        self.stack
            .len()
            .checked_sub(2)
            .and_then(|index| self.stack[index])
    }

    /// Whether bytes at an offset of it are marked already.
    pub(super) fn is_marked(&self, base: u32, offset: u64, size: u64) -> bool {
        self.marked
            .get(&base)
            .is_some_and(|first| *first <= offset && offset + size <= first + ELISION_RANGE)
    }

    /// They are marked from this offset on.
    pub(super) fn mark(&mut self, base: u32, offset: u64) {
        if self.marked.len() >= MOST {
            self.marked.clear();
        }
        self.marked.insert(base, offset);
    }

    /// What an instruction changes about all this. What is not known here
    /// makes everything unknown that it may concern.
    pub(super) fn after(&mut self, operator: &Operator<'_>) {
        if self.stack.len() >= MOST {
            self.stack.clear();
        }
        match operator {
            Operator::LocalGet { local_index } => self.stack.push(Some(*local_index)),
            Operator::I32Const { .. }
            | Operator::I64Const { .. }
            | Operator::F32Const { .. }
            | Operator::F64Const { .. }
            | Operator::GlobalGet { .. } => self.stack.push(None),
            Operator::LocalSet { local_index } => {
                self.take(1);
                self.changes(*local_index);
            }
            Operator::LocalTee { local_index } => {
                self.take(1);
                self.changes(*local_index);
                self.stack.push(None);
            }
            Operator::I32Load { .. }
            | Operator::I64Load { .. }
            | Operator::F32Load { .. }
            | Operator::F64Load { .. }
            | Operator::I32Load8S { .. }
            | Operator::I32Load8U { .. }
            | Operator::I32Load16S { .. }
            | Operator::I32Load16U { .. }
            | Operator::I64Load32U { .. }
            | Operator::I32WrapI64
            | Operator::I64ExtendI32U
            | Operator::I32Eqz => {
                self.take(1);
                self.stack.push(None);
            }
            Operator::I32Add
            | Operator::I32Sub
            | Operator::I32Mul
            | Operator::I32And
            | Operator::I32Or
            | Operator::I32Xor
            | Operator::I32Shl
            | Operator::I32ShrU
            | Operator::I64Add
            | Operator::I64Sub
            | Operator::I64And
            | Operator::I64Or
            | Operator::I64Shl
            | Operator::I64ShrU => {
                self.take(2);
                self.stack.push(None);
            }
            Operator::I32Store { .. }
            | Operator::I64Store { .. }
            | Operator::F32Store { .. }
            | Operator::F64Store { .. }
            | Operator::I32Store8 { .. }
            | Operator::I32Store16 { .. }
            | Operator::I64Store8 { .. }
            | Operator::I64Store16 { .. }
            | Operator::I64Store32 { .. } => self.take(2),
            // What was marked stays so, whatever is called; what is on the
            // stack, nobody follows.
            Operator::Call { .. }
            | Operator::CallIndirect { .. }
            | Operator::Drop
            | Operator::Select => {
                self.stack.clear();
            }
            // Here begins or ends what may run more often, or not at all.
            _ => {
                self.stack.clear();
                self.marked.clear();
            }
        }
    }

    fn take(&mut self, count: usize) {
        self.stack.truncate(self.stack.len().saturating_sub(count));
    }

    /// A local gets another value: what was known was of the old one.
    fn changes(&mut self, local: u32) {
        self.marked.remove(&local);
        for value in self.stack.iter_mut().filter(|value| **value == Some(local)) {
            *value = None;
        }
    }
}
