//! Components: written, loaded, replaced, deployed, and which one answers.

mod authors;
mod contract;
mod deploy;
mod languages;
mod projects;
mod reload;
mod routing;
