//! Large zeroed memory straight from the system: page aligned, untouched until used, and an error instead of an abort
//! when it is refused.

use std::marker::PhantomData;

use memmap2::MmapMut;

use super::simd::Cell;
use crate::model::LoadError;

#[derive(Debug)]
pub struct Buffer<C> {
    map: MmapMut,
    len: usize,
    cells: PhantomData<C>,
}

impl<C: Cell> Buffer<C> {
    /// `len` zeros.
    pub fn zeroed(len: usize, purpose: &'static str) -> Result<Buffer<C>, LoadError> {
        let bytes = len.saturating_mul(size_of::<C>());
        let refused = |source| LoadError::OutOfDeviceMemory {
            purpose,
            bytes: bytes as u64,
            left: None,
            source,
        };
        // An empty mapping is refused, and one byte is less than anything real.
        let map = MmapMut::map_anon(bytes.max(1)).map_err(refused)?;
        Ok(Buffer { map, len, cells: PhantomData })
    }

    /// Fewer, larger pages: for what is read whole in every step.
    pub fn prefer_huge_pages(&self) {
        #[cfg(target_os = "linux")]
        if self.map.len() >= 4 << 20 {
            // Only advice: without it the same memory is a little slower.
            drop(self.map.advise(memmap2::Advice::HugePage));
        }
    }

    pub fn as_slice(&self) -> &[C] {
        // SAFETY: the map holds `len` cells, is page aligned, zeroed at first and written only as cells; every bit
        // pattern is a float.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), self.len) }
    }

    pub fn as_mut_slice(&mut self) -> &mut [C] {
        // SAFETY: as above, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().cast(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_system_refuses_is_an_error_with_the_size() {
        let error = Buffer::<f32>::zeroed(usize::MAX / 8, "a test").expect_err("no machine has it");
        assert!(error.to_string().contains("for a test"), "{error}");
    }

    #[test]
    fn a_buffer_is_zero_and_keeps_what_is_written() {
        let mut buffer = Buffer::<half::f16>::zeroed(3, "a test").unwrap();
        assert!(buffer.as_slice().iter().all(|x| x.to_f32() == 0.0));
        buffer.as_mut_slice()[2] = half::f16::ONE;
        assert_eq!(buffer.as_slice()[2], half::f16::ONE);
    }
}
