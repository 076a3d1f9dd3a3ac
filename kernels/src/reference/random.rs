//! Chance as a pure function: Philox 4x32-10, a counter-based generator (Salmon, Moraes, Dror and
//! Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011).
//!
//! A token's random number depends on the request's seed and the token's position, and on nothing
//! else: not on the batch it was computed in, nor on how often a step ran again after preemption.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// One block of Philox 4x32-10: 128 random bits for a counter under a key.
#[must_use]
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let a = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// 64 uniform random bits for the token at `position` of a request with `seed`.
#[must_use]
pub fn bits(seed: u64, position: u64) -> u64 {
    let counter = [position as u32, (position >> 32) as u32, 0, 0];
    let block = philox(counter, [seed as u32, (seed >> 32) as u32]);
    u64::from(block[1]) << 32 | u64::from(block[0])
}

/// The same bits as a number in `[0, 1)`, exact in 53 bits.
#[must_use]
pub fn uniform(seed: u64, position: u64) -> f64 {
    (bits(seed, position) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    // The known answers that the authors publish with Random123.
    #[test]
    fn philox_gives_its_authors_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn seed_and_position_alone_decide_and_both_count_in_all_their_bits() {
        assert_eq!(bits(7, 9), bits(7, 9));
        let distinct =
            [bits(7, 9), bits(9, 7), bits(7, 10), bits(7 | 1 << 40, 9), bits(7, 9 | 1 << 40)];
        for (i, a) in distinct.iter().enumerate() {
            assert!(distinct[i + 1..].iter().all(|b| a != b));
        }
    }

    #[test]
    fn uniform_numbers_fill_the_unit_interval_evenly() {
        let mut tenths = [0u32; 10];
        for position in 0..100_000 {
            let u = uniform(42, position);
            assert!((0.0..1.0).contains(&u));
            tenths[(u * 10.0) as usize] += 1;
        }
        // Ten thousand expected each; five standard deviations are 474.
        assert!(tenths.iter().all(|&n| n.abs_diff(10_000) < 474), "{tenths:?}");
    }
}
