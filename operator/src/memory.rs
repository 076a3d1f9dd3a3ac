//! Lists of a thousand objects come in, are trimmed to what caches keep, and leave holes. Here the C library is told to keep
//! few, and to give back what is free once the operator is at rest. Never here: what is kept.

use std::sync::Arc;
use std::time::Duration;

use crate::reconcile::Context;

/// How often is looked whether the operator is at rest, which it is when it looked at nothing in between.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Before the first thread: one heap for all, because threads that mostly wait gain nothing from one each; large buffers
/// apart from it, whatever was freed before.
pub fn keep_small() {
    #[cfg(target_env = "gnu")]
    // SAFETY: plain settings of the allocator; no other thread runs.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 10);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 256 << 10);
    }
}

/// Gives free memory back whenever work has come to an end, for ever; what was remembered for the work is free then.
pub async fn give_back(context: Arc<Context>) {
    let mut before = 0;
    let mut is_given_back = true;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let now = context.metrics.reconciles();
        if now != before {
            is_given_back = false;
        } else if !std::mem::replace(&mut is_given_back, true) {
            context.teller.forget();
            trim();
        }
        before = now;
    }
}

fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the allocator takes its own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
