//! What runs beside a story has to end with it, also where the story panics.

use std::sync::atomic::{AtomicBool, Ordering};

/// Says that it is over when it goes out of scope.
pub struct Over<'a>(pub &'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
