//! `versions` in version 1.0.0, for tests of routing.

guests::versions!("1.0.0");
