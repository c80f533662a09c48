//! Leaves its mark in memory and looks for that of the other.
guests::marker!("marker-a", b"MARK-OF-A");
