//! Kubernetes quantities (`2`, `500m`, `1.5Gi`, `1e3`) to integers. Pure; exact in thousandths, rounded up.

/// Thousandths of the unit: milli-CPUs of a CPU quantity. None where the text is no positive quantity, or too large.
pub fn millis(text: &str) -> Option<u64> {
    let suffix_at = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, suffix) = text.split_at(suffix_at);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let digits: u128 = format!("{whole}{fraction}").parse().ok()?;
    let places = u32::try_from(fraction.len()).ok()?;
    let (multiplier, divisor) = scale(suffix)?;
    let numerator = digits.checked_mul(multiplier)?.checked_mul(1000)?;
    let denominator = 10u128.checked_pow(places)?.checked_mul(divisor)?;
    u64::try_from(numerator.div_ceil(denominator)).ok().filter(|millis| *millis > 0)
}

/// Whole units, rounded up: bytes of a memory quantity.
pub fn units(text: &str) -> Option<u64> {
    millis(text).map(|millis| millis.div_ceil(1000))
}

/// What a suffix multiplies and divides by.
fn scale(suffix: &str) -> Option<(u128, u128)> {
    Some(match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1000),
        "k" => (1000, 1),
        "M" => (1_000_000, 1),
        "G" => (1_000_000_000, 1),
        "T" => (1_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        _ => return exponent(suffix),
    })
}

fn exponent(suffix: &str) -> Option<(u128, u128)> {
    let power: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
    let factor = 10u128.checked_pow(power.unsigned_abs())?;
    Some(if power < 0 { (1, factor) } else { (factor, 1) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_read_as_kubernetes_reads_them() {
        for (text, expected) in [
            ("2", Some(2000)),
            ("500m", Some(500)),
            ("0.1", Some(100)),
            ("1.5", Some(1500)),
            (".5", Some(500)),
            ("1k", Some(1_000_000)),
            ("1e3", Some(1_000_000)),
            ("100n", Some(1)),
            ("0", None),
            ("-1", None),
            ("", None),
            (".", None),
            ("4 Gi", None),
            ("4gb", None),
            ("99999999999999999999Pi", None),
        ] {
            assert_eq!(millis(text), expected, "{text}");
        }
        assert_eq!(units("1.5Gi"), Some(3 << 29));
        assert_eq!(units("16384256Ki"), Some(16_384_256 << 10));
        assert_eq!(units("128974848000m"), Some(128_974_848));
    }
}
