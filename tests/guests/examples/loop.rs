//! Fails to load: `describe` never returns.

guests::describes!(loop {
    std::hint::spin_loop();
});
