//! What the components in `examples` share.

/// Makes a component whose `describe` is the given expression, right or wrong.
/// It answers what it is sent.
#[macro_export]
macro_rules! describes {
    ($describe:expr) => {
        struct Service;

        impl mb_service::Guest for Service {
            fn describe() -> String {
                $describe
            }

            fn handle(
                _action: String,
                payload: mb_service::Payload,
            ) -> Result<mb_service::Payload, mb_service::Failure> {
                Ok(payload)
            }
        }

        mb_service::bindings::export!(Service with_types_in mb_service::bindings);
    };
}

/// Makes the service `versions` in the given version: `which` answers it.
#[macro_export]
macro_rules! versions {
    ($version:literal) => {
        fn which((): ()) -> serde_json::Value {
            serde_json::json!({ "version": $version })
        }

        mb_service::service! {
            name: "versions",
            version: $version,
            description: "Tells which of its versions was called",
            /// Answers {"version"}.
            "which" => which,
        }
    };
}

/// Makes a service whose action `look` searches its whole memory for the mark
/// of anyone else, then leaves its own all over 128 KiB.
#[macro_export]
macro_rules! marker {
    ($name:literal, $mark:literal) => {
        fn look((): ()) -> serde_json::Value {
            let others = $crate::others($mark);
            $crate::mark($mark);
            serde_json::json!({ "others": others })
        }

        mb_service::service! {
            name: $name,
            version: "1.0.0",
            description: "Looks for what others left in memory",
            /// Answers {"others"}, the marks of others in memory.
            "look" => look,
        }
    };
}

/// How often a mark that is not the given one stands in this memory.
#[must_use]
pub fn others(own: &[u8; 9]) -> usize {
    // Not written here as one text, or it would find itself.
    let start = [b'M', b'A', b'R', b'K', b'-', b'O', b'F'];
    #[cfg(target_arch = "wasm32")]
    let size = core::arch::wasm32::memory_size::<0>() * 65536;
    #[cfg(not(target_arch = "wasm32"))]
    let size = 0;
    // SAFETY: all of the linear memory may be read; that is the point.
    let memory =
        unsafe { std::slice::from_raw_parts(1024 as *const u8, size.saturating_sub(1024)) };
    memory
        .windows(9)
        .filter(|window| window[..7] == start && window[7] == b'-' && *window != own)
        .count()
}

/// Writes a mark all over 128 KiB.
pub fn mark(own: &[u8; 9]) {
    let mut room = vec![0_u8; 128 * 1024];
    room.chunks_exact_mut(9)
        .for_each(|chunk| chunk.copy_from_slice(own));
    std::hint::black_box(&room);
}
