//! Leaves its mark in memory and looks for that of the other.
guests::marker!("marker-b", b"MARK-OF-B");
