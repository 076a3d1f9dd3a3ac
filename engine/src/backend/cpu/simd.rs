//! Sixteen floats at a time, in the widest vectors this machine has. A kernel is written once over [`Vector`] and run by
//! [`run`], which compiles it for AVX-512, for AVX2 and for any machine, and picks at run time. The only file that names
//! a processor.

use std::sync::OnceLock;

use half::f16;

/// Floats in a [`Vector`].
pub const LANES: usize = 16;

/// Sixteen `f32`.
pub trait Vector: Copy {
    /// Rows of a tile (two vectors wide) whose sums fit the registers.
    const TILE_ROWS: usize;

    /// # Safety
    /// The machine has the vector's instructions; so for all of these.
    unsafe fn zero() -> Self;
    /// # Safety
    /// As above.
    unsafe fn splat(x: f32) -> Self;
    /// # Safety
    /// As above, and `at` points to [`LANES`] readable floats; any alignment.
    unsafe fn load(at: *const f32) -> Self;
    /// # Safety
    /// As above, for half floats.
    unsafe fn load_half(at: *const f16) -> Self;
    /// `self + a · b`.
    /// # Safety
    /// As above.
    unsafe fn multiply_add(self, a: Self, b: Self) -> Self;
    /// # Safety
    /// As above, and `at` points to [`LANES`] writable floats; any alignment.
    unsafe fn store(self, at: *mut f32);
}

/// What a matrix or a page holds: `f32` or `f16`. Arithmetic is in `f32` always.
pub trait Cell: Copy + Send + Sync + 'static {
    fn from_f32(x: f32) -> Self;
    fn to_f32(self) -> f32;
    /// # Safety
    /// As [`Vector::load`].
    unsafe fn load<V: Vector>(at: *const Self) -> V;
}

impl Cell for f32 {
    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    unsafe fn load<V: Vector>(at: *const f32) -> V {
        // SAFETY: the caller's promise is the callee's.
        unsafe { V::load(at) }
    }
}

impl Cell for f16 {
    #[inline(always)]
    fn from_f32(x: f32) -> f16 {
        f16::from_f32(x)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    unsafe fn load<V: Vector>(at: *const f16) -> V {
        // SAFETY: the caller's promise is the callee's.
        unsafe { V::load_half(at) }
    }
}

/// A computation over vectors. `run` must be `#[inline(always)]`, or it is compiled without them.
pub trait Kernel {
    /// # Safety
    /// The machine has `V`'s instructions, and the kernel's own promises hold.
    unsafe fn run<V: Vector>(self);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Instructions {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

fn instructions() -> Instructions {
    static FOUND: OnceLock<Instructions> = OnceLock::new();
    *FOUND.get_or_init(detect)
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Instructions {
    let avx2 = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq");
    match (avx2, avx512) {
        (true, true) => Instructions::Avx512,
        (true, false) => Instructions::Avx2,
        _ => Instructions::Portable,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Instructions {
    Instructions::Portable
}

/// Runs a kernel with the widest vectors of this machine.
///
/// # Safety
/// The kernel's own promises hold.
pub unsafe fn run<K: Kernel>(kernel: K) {
    // SAFETY: each arm's instructions were detected; the kernel's promises are the caller's.
    unsafe {
        match instructions() {
            Instructions::Portable => kernel.run::<[f32; LANES]>(),
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => x86::run_avx2(kernel),
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => x86::run_avx512(kernel),
        }
    }
}

/// Any machine: the compiler makes of it what it can.
impl Vector for [f32; LANES] {
    const TILE_ROWS: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> Self {
        [0.0; LANES]
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self {
        // SAFETY: the caller's promise; arrays of floats may lie anywhere that floats may.
        unsafe { at.cast::<Self>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_half(at: *const f16) -> Self {
        // SAFETY: as above.
        let halves = unsafe { at.cast::<[f16; LANES]>().read_unaligned() };
        halves.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn multiply_add(mut self, a: Self, b: Self) -> Self {
        for lane in 0..LANES {
            self[lane] += a[lane] * b[lane];
        }
        self
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { at.cast::<Self>().write_unaligned(self) }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::f16;

    use super::{Kernel, Vector};

    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn run_avx2<K: Kernel>(kernel: K) {
        // SAFETY: this function's features are the vector's; the kernel's promises are the caller's.
        unsafe { kernel.run::<[__m256; 2]>() }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq")]
    pub unsafe fn run_avx512<K: Kernel>(kernel: K) {
        // SAFETY: as above.
        unsafe { kernel.run::<__m512>() }
    }

    impl Vector for __m512 {
        // 16 sums, two weights and a broadcast out of 32 registers.
        const TILE_ROWS: usize = 8;

        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the caller has AVX-512; so below.
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            // SAFETY: as above.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(at: *const f32) -> Self {
            // SAFETY: as above, and the caller's pointer holds.
            unsafe { _mm512_loadu_ps(at) }
        }
        #[inline(always)]
        unsafe fn load_half(at: *const f16) -> Self {
            // SAFETY: as above.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
        }
        #[inline(always)]
        unsafe fn multiply_add(self, a: Self, b: Self) -> Self {
            // SAFETY: as above.
            unsafe { _mm512_fmadd_ps(a, b, self) }
        }
        #[inline(always)]
        unsafe fn store(self, at: *mut f32) {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(at, self) }
        }
    }

    impl Vector for [__m256; 2] {
        // 12 sums, four weights, of which some are read in place, out of 16 registers.
        const TILE_ROWS: usize = 3;

        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the caller has AVX2, FMA and F16C; so below.
            unsafe { [_mm256_setzero_ps(); 2] }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            // SAFETY: as above.
            unsafe { [_mm256_set1_ps(x); 2] }
        }
        #[inline(always)]
        unsafe fn load(at: *const f32) -> Self {
            // SAFETY: as above, and the caller's pointer holds.
            unsafe { [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))] }
        }
        #[inline(always)]
        unsafe fn load_half(at: *const f16) -> Self {
            // SAFETY: as above.
            unsafe {
                let low = _mm_loadu_si128(at.cast());
                let high = _mm_loadu_si128(at.add(8).cast());
                [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
            }
        }
        #[inline(always)]
        unsafe fn multiply_add(self, a: Self, b: Self) -> Self {
            // SAFETY: as above.
            unsafe { [_mm256_fmadd_ps(a[0], b[0], self[0]), _mm256_fmadd_ps(a[1], b[1], self[1])] }
        }
        #[inline(always)]
        unsafe fn store(self, at: *mut f32) {
            // SAFETY: as above.
            unsafe {
                _mm256_storeu_ps(at, self[0]);
                _mm256_storeu_ps(at.add(8), self[1]);
            }
        }
    }
}

/// `out += x · w`, all in memory: the one kernel under every product of the model.
#[derive(Clone, Copy)]
pub struct Product<C> {
    /// `[rows, inner]`.
    pub x: *const f32,
    pub x_stride: usize,
    pub rows: usize,
    /// `[inner, width]`.
    pub w: *const C,
    pub w_stride: usize,
    pub inner: usize,
    pub width: usize,
    /// `[rows, width]`.
    pub out: *mut f32,
    pub out_stride: usize,
}

impl<C: Cell> Product<C> {
    /// # Safety
    /// The machine has `V`'s instructions; all three matrices lie within their allocations and `out` is not aliased.
    #[inline(always)]
    pub unsafe fn run<V: Vector>(self) {
        // SAFETY: every offset below stays within rows, inner and width.
        unsafe {
            let mut column = 0;
            while column + 2 * LANES <= self.width {
                self.strip::<V, 2>(column);
                column += 2 * LANES;
            }
            if column + LANES <= self.width {
                self.strip::<V, 1>(column);
                column += LANES;
            }
            if column < self.width {
                self.tail(column);
            }
        }
    }

    /// `N` vectors of columns, all rows.
    #[inline(always)]
    unsafe fn strip<V: Vector, const N: usize>(&self, column: usize) {
        // SAFETY: the caller's promise; rows are taken in runs that end at `rows`.
        unsafe {
            let mut row = 0;
            if V::TILE_ROWS == 8 {
                while row + 8 <= self.rows {
                    self.tile::<V, 8, N>(row, column);
                    row += 8;
                }
                if row + 4 <= self.rows {
                    self.tile::<V, 4, N>(row, column);
                    row += 4;
                }
            } else if V::TILE_ROWS == 3 {
                while row + 3 <= self.rows {
                    self.tile::<V, 3, N>(row, column);
                    row += 3;
                }
            }
            while row + 2 <= self.rows {
                self.tile::<V, 2, N>(row, column);
                row += 2;
            }
            if row < self.rows {
                self.tile::<V, 1, N>(row, column);
            }
        }
    }

    /// `ROWS` × `N` vectors of sums, kept in registers over the whole inner length.
    #[inline(always)]
    unsafe fn tile<V: Vector, const ROWS: usize, const N: usize>(&self, row: usize, column: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let x = self.x.add(row * self.x_stride);
            let w = self.w.add(column);
            let out = self.out.add(row * self.out_stride + column);
            let mut sums = [[V::zero(); N]; ROWS];
            // Pointers that walk: no index is multiplied, and none checked, in the innermost loop.
            let (mut x_at, mut w_at) = (x, w);
            for _ in 0..self.inner {
                let mut weights = [V::zero(); N];
                let mut from = w_at;
                for weight in &mut weights {
                    *weight = C::load::<V>(from);
                    from = from.add(LANES);
                }
                let mut from = x_at;
                for sums in &mut sums {
                    let x = V::splat(*from);
                    for (sum, &weight) in sums.iter_mut().zip(&weights) {
                        *sum = sum.multiply_add(x, weight);
                    }
                    from = from.wrapping_add(self.x_stride);
                }
                x_at = x_at.add(1);
                w_at = w_at.wrapping_add(self.w_stride);
            }
            let one = V::splat(1.0);
            for (r, sums) in sums.iter().enumerate() {
                for (n, &sum) in sums.iter().enumerate() {
                    let at = out.add(r * self.out_stride + n * LANES);
                    sum.multiply_add(V::load(at), one).store(at);
                }
            }
        }
    }

    /// Fewer columns than a vector.
    #[inline(always)]
    unsafe fn tail(&self, first: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            for row in 0..self.rows {
                for column in first..self.width {
                    let mut sum = 0.0;
                    for k in 0..self.inner {
                        let weight = (*self.w.add(k * self.w_stride + column)).to_f32();
                        sum += *self.x.add(row * self.x_stride + k) * weight;
                    }
                    *self.out.add(row * self.out_stride + column) += sum;
                }
            }
        }
    }
}

/// `e^x` within two units in the last place for `x` in −87..88; below, zero. Straight-line code, so that loops over it
/// become vector code. Range reduction by Cody and Waite, then a polynomial of degree six.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5 · 2^23 rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    let p = 1.987_569_2e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { p * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_the_library_over_its_range_and_vanishes_below_it() {
        for i in -8_690..8_700 {
            let x = i as f32 * 0.01 + 0.0037;
            let want = f64::from(x).exp();
            assert!((f64::from(exp(x)) - want).abs() <= 3e-7 * want, "{x}: {} {want}", exp(x));
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e4), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    /// Every vector type that this machine can run, against sums in `f64`.
    #[test]
    fn a_product_is_right_for_every_vector_type_and_odd_shapes() {
        for (rows, inner, width) in [(1, 5, 32), (3, 64, 48), (7, 33, 71), (13, 16, 16), (2, 1, 3)]
        {
            let value = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0;
            let x: Vec<f32> = (0..rows * inner).map(value).collect();
            let w: Vec<f32> = (0..inner * width).map(|i| value(i + 7)).collect();
            let halves: Vec<f16> = w.iter().map(|&w| f16::from_f32(w)).collect();
            let exact = |row: usize, column: usize| -> f64 {
                let one =
                    |k: usize| f64::from(x[row * inner + k]) * f64::from(w[k * width + column]);
                0.5 + (0..inner).map(one).sum::<f64>()
            };
            let judge = |out: Vec<f32>, tolerance: f64| {
                for (i, out) in out.iter().enumerate() {
                    let want = exact(i / width, i % width);
                    assert!((f64::from(*out) - want).abs() < tolerance, "{rows} {inner} {width}");
                }
            };
            judge(multiplied(&x, rows, &w, inner, width, instructions()), 1e-5);
            judge(multiplied(&x, rows, &halves, inner, width, instructions()), 2e-2);
            judge(multiplied(&x, rows, &w, inner, width, Instructions::Portable), 1e-5);
            judge(multiplied(&x, rows, &halves, inner, width, Instructions::Portable), 2e-2);
            #[cfg(target_arch = "x86_64")]
            if instructions() != Instructions::Portable {
                judge(multiplied(&x, rows, &w, inner, width, Instructions::Avx2), 1e-5);
                judge(multiplied(&x, rows, &halves, inner, width, Instructions::Avx2), 2e-2);
            }
        }
    }

    fn multiplied<C: Cell>(
        x: &[f32],
        rows: usize,
        w: &[C],
        inner: usize,
        width: usize,
        with: Instructions,
    ) -> Vec<f32> {
        struct Plain<C>(Product<C>);
        impl<C: Cell> Kernel for Plain<C> {
            #[inline(always)]
            unsafe fn run<V: Vector>(self) {
                // SAFETY: the shapes below are those of the vectors.
                unsafe { self.0.run::<V>() }
            }
        }
        let mut out = vec![0.5; rows * width];
        let kernel = Plain(Product {
            x: x.as_ptr(),
            x_stride: inner,
            rows,
            w: w.as_ptr(),
            w_stride: width,
            inner,
            width,
            out: out.as_mut_ptr(),
            out_stride: width,
        });
        // SAFETY: the caller asks only for what was detected.
        unsafe {
            match with {
                Instructions::Portable => kernel.run::<[f32; LANES]>(),
                #[cfg(target_arch = "x86_64")]
                Instructions::Avx2 => x86::run_avx2(kernel),
                #[cfg(target_arch = "x86_64")]
                Instructions::Avx512 => x86::run_avx512(kernel),
            }
        }
        out
    }
}
