//! Fails to load: `describe` answers no JSON.

guests::describes!("I am a service".into());
