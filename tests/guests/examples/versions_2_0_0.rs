//! `versions` in version 2.0.0, for tests of routing.

guests::versions!("2.0.0");
