//! Lists of a thousand objects come in, are trimmed to what caches keep, and leave holes. Here the C library is told to keep
//! few, and to give back what is free once the operator is at rest. Never here: what is kept.

use std::sync::Arc;
use std::time::Duration;

use crate::reconcile::Context;

/// How often is looked whether the operator is at rest, which it is when it looked at nothing in between.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Looks without work after which nothing more is told that would be like what was told before.
const LOOKS_UNTIL_FORGOTTEN: u32 = 36;

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

/// Gives free memory back whenever work has come to an end, for ever, and once more when what was remembered for it is free.
pub async fn give_back(context: Arc<Context>) {
    let (mut before, mut looks) = (0, 0_u32);
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let now = context.metrics.reconciles();
        looks = if now == before { looks.saturating_add(1) } else { 0 };
        before = now;
        match looks {
            1 => trim(),
            LOOKS_UNTIL_FORGOTTEN => {
                context.teller.forget();
                trim();
            }
            _ => {}
        }
    }
}

fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the allocator takes its own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
