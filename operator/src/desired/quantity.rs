//! In: bytes and milli-CPUs. Out: quantities in the one form the API server keeps as it is. Sending another form would
//! make every comparison with the stored object differ.

const KI: u64 = 1 << 10;

/// Bytes rounded up to MiB, with the largest binary suffix that divides them.
pub fn memory(bytes: u64) -> String {
    let mut amount = bytes.div_ceil(KI * KI).max(1);
    let mut suffixes = ["Mi", "Gi", "Ti"].into_iter();
    let mut suffix = suffixes.next().expect("the list has three");
    while amount.is_multiple_of(KI) {
        let Some(next) = suffixes.next() else { break };
        amount /= KI;
        suffix = next;
    }
    format!("{amount}{suffix}")
}

/// Milli-CPUs; whole CPUs without a suffix.
pub fn cpu(millis: u64) -> String {
    if millis.is_multiple_of(1000) { (millis / 1000).to_string() } else { format!("{millis}m") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_in_the_form_the_api_server_keeps() {
        assert_eq!(memory(1), "1Mi");
        assert_eq!(memory(300 << 20), "300Mi");
        assert_eq!(memory((300 << 20) + 1), "301Mi");
        assert_eq!(memory(1 << 30), "1Gi");
        assert_eq!(memory(1536 << 20), "1536Mi");
        assert_eq!(memory(2 << 40), "2Ti");
        assert_eq!(cpu(1000), "1");
        assert_eq!(cpu(1500), "1500m");
    }
}
