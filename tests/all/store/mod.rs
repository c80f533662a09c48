//! Durable values, in each engine, and the state folder.

mod engines;
mod state;
