//! The admin endpoint, and settings that are applied while the server runs.

mod endpoint;
mod gateway;
mod live_settings;
