//! Parses, wraps and serialises JSON.

include!("../../work.rs");

mb_service::service! {
    /// Answers {"ok","echo"}.
    "wrap" => wrap,
}
