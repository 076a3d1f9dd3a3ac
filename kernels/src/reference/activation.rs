//! Element-wise ops between the matrix products: gate·up with SiLU, and the residual sum.

/// SiLU (also called swish): `x · 1/(1 + e^-x)`; Elfwing, Uchibe and Doya 2017.
#[must_use]
pub fn silu(x: f32) -> f32 {
    let x = f64::from(x);
    (x / (1.0 + (-x).exp())) as f32
}

/// The middle of a gated MLP: `out[i] = silu(gate[i]) · up[i]`. All `[elements]`.
pub fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert_eq!(gate.len(), up.len(), "gate and up have one length");
    assert_eq!(gate.len(), out.len(), "the output is as long as the gate");
    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        *out = silu(gate) * up;
    }
}

/// The residual stream takes a block's output: `residual[i] += block[i]`. Both `[elements]`.
pub fn add(residual: &mut [f32], block: &[f32]) {
    assert_eq!(residual.len(), block.len(), "a block returns what it was given, in length");
    for (residual, &block) in residual.iter_mut().zip(block) {
        *residual += block;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silu_matches_values_worked_by_hand() {
        assert_eq!(silu(0.0), 0.0);
        assert!((silu(1.0) - 0.731_058_6).abs() < 1e-6);
        assert!((silu(-1.0) + 0.268_941_42).abs() < 1e-6);
    }

    #[test]
    fn silu_stays_finite_at_the_ends_of_the_range() {
        assert_eq!(silu(-1e30), 0.0);
        assert_eq!(silu(1e30), 1e30);
    }

    #[test]
    fn the_gate_closes_and_opens_the_up_projection() {
        let mut out = [f32::NAN; 3];
        silu_mul(&[0.0, 40.0, 1.0], &[5.0, -2.0, 2.0], &mut out);
        assert_eq!(out[..2], [0.0, -80.0]);
        assert!((out[2] - 1.462_117_2).abs() < 1e-6);
    }

    #[test]
    fn the_residual_keeps_what_it_had() {
        let mut residual = [1.0, -2.0];
        add(&mut residual, &[0.5, 2.0]);
        assert_eq!(residual, [1.5, 0.0]);
    }
}
