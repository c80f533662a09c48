//! Parses, wraps and serialises JSON, with the allocator of the standard library.

include!("../../work.rs");

mb_service::service! {
    /// Answers {"ok","echo"}.
    "wrap" => wrap,
}
