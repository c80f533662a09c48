//! Who is authenticated, and what nobody gets by.

mod access;
mod tls;
mod untrusted;
