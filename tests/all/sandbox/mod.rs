//! What guests can do, what they are granted, and what others notice of it.

mod capabilities;
mod fairness;
mod hostile;
mod outcomes;
mod reset;
