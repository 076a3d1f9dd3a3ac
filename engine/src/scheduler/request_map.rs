//! A map by [`RequestId`]. Step loop and scheduler look requests up several times per row of a step; the numbers are our
//! own and grow one by one, so that no hash has to withstand anybody.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::RequestId;

pub type RequestMap<V> = HashMap<RequestId, V, BuildHasherDefault<NumberHasher>>;

#[derive(Default)]
pub struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn write(&mut self, _: &[u8]) {
        unreachable!("a request's number is hashed as a number");
    }

    /// Fibonacci hashing (Knuth, TAOCP 6.4): neighbours land far apart, in the upper bits too.
    fn write_u64(&mut self, number: u64) {
        self.0 = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
