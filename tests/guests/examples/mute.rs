//! Fails to load: `describe` traps.

guests::describes!(std::process::abort());
