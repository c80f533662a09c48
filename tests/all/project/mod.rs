//! The project's own rules: imports, words, and what its documents claim.

mod architecture;
mod documents;
mod words;
