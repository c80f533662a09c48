//! Resets instances of components that [`mb_reset`] has rewritten.

use wasmtime::{
    Store,
    component::{Component, ComponentExportIndex, Instance, TypedFunc},
};

use mb_reset::{CARD, CHECKPOINT, RESET, VERIFY};
pub(super) use mb_reset::{FreshReason, ResetInfo};

use super::verify::Countdown;

/// Why instances are not reset where the operator says so.
pub(super) const NOT_WANTED: &str = "the settings say so";

/// How the instances of one component are reset.
pub(super) struct Reset {
    pub(super) info: ResetInfo,
    /// False for a component whose instances are shared: then the functions
    /// are there and are not called.
    wanted: bool,
    checkpoint: ComponentExportIndex,
    reset: ComponentExportIndex,
    verify: ComponentExportIndex,
    /// Of so many resets one is verified; zero for none.
    verify_resets: u32,
}

impl Reset {
    pub(super) fn of(
        component: &Component,
        info: ResetInfo,
        wanted: bool,
        verify_resets: u32,
    ) -> Result<Self, FreshReason> {
        let find = |name| {
            component
                .get_export_index(None, name)
                .ok_or_else(|| FreshReason::because("it was compiled so"))
        };
        Ok(Self {
            info,
            wanted,
            checkpoint: find(CHECKPOINT)?,
            reset: find(RESET)?,
            verify: find(VERIFY)?,
            verify_resets,
        })
    }

    /// Whether instances are reset.
    pub(super) fn wanted(&self) -> bool {
        self.wanted
    }

    /// Keeps what a new instance holds: how to reset it. None where there is
    /// no memory to keep it.
    pub(super) fn checkpoint<T>(
        &self,
        mut store: &mut Store<T>,
        instance: &Instance,
    ) -> wasmtime::Result<Option<Resetter>> {
        let checkpoint = instance.get_typed_func::<(), (u32,)>(&mut store, self.checkpoint)?;
        let (cards,) = checkpoint.call(&mut store, ())?;
        if cards == u32::MAX {
            return Ok(None);
        }
        let reset = (!self.info.resets_itself)
            .then(|| instance.get_typed_func(&mut store, self.reset))
            .transpose()?;
        // Of the cards, one byte for each, what covers the guest's memory.
        let kept = cards as usize * CARD + self.info.first_memory / CARD;
        let verify = instance.get_typed_func(&mut store, self.verify)?;
        let countdown = Countdown::new(self.verify_resets);
        Ok(Some(Resetter {
            reset,
            verify,
            kept,
            countdown,
        }))
    }
}

/// Resets one instance.
pub(super) struct Resetter {
    /// None if it resets itself when a call ends.
    reset: Option<TypedFunc<(), ()>>,
    verify: TypedFunc<(), (u32,)>,
    /// Memory that is kept for that, in bytes.
    pub(super) kept: usize,
    /// Until the next reset that is verified.
    pub(super) countdown: Countdown,
}

impl Resetter {
    /// Resets the instance after a call: whether it is as it was.
    pub(super) fn reset<T>(&self, store: &mut Store<T>) -> bool {
        self.reset
            .as_ref()
            .is_none_or(|reset| reset.call(store, ()).is_ok())
    }

    /// Whether the instance differs from what it was.
    pub(super) fn differs<T>(&self, store: &mut Store<T>) -> wasmtime::Result<bool> {
        let (differences,) = self.verify.call(store, ())?;
        Ok(differences > 0)
    }
}
