//! podshaper: placeholder while the modules are written.
mod error;

fn main() {}
