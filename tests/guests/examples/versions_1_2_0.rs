//! `versions` in version 1.2.0, for tests of routing.

guests::versions!("1.2.0");
