//! In: what an engine says at `/metrics`, now and at the look before. Out: the figures of `status.measured`, and whether one
//! moved so far that it is worth a write. Pure.

use plimsoll_contract::metrics::{
    INTER_TOKEN_LATENCY, KIND_DEVICE, KIND_PROCESS, PEAK_MEMORY_BYTES, TIME_TO_FIRST_TOKEN,
};
use plimsoll_crds::MeasuredStatus;

/// A value is written again when it moved by more than this part of itself.
const MOVED_SHARE: i64 = 10;

/// What one engine has counted since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Totals {
    /// Of its card, or of the host's memory where it has none.
    pub peak_bytes: Option<i64>,
    pub first_tokens: Sum,
    pub next_tokens: Sum,
}

/// Seconds of `count` events.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sum {
    pub seconds: f64,
    pub count: f64,
}

/// Reads the text format.
pub fn totals(exposition: &str) -> Totals {
    let sum = |family: &str| Sum {
        seconds: value(exposition, &format!("{family}_sum"), "").unwrap_or(0.0),
        count: value(exposition, &format!("{family}_count"), "").unwrap_or(0.0),
    };
    let peak = |kind: &str| value(exposition, PEAK_MEMORY_BYTES, &format!("kind=\"{kind}\""));
    Totals {
        peak_bytes: peak(KIND_DEVICE).or_else(|| peak(KIND_PROCESS)).map(|bytes| bytes as i64),
        first_tokens: sum(TIME_TO_FIRST_TOKEN.ours),
        next_tokens: sum(INTER_TOKEN_LATENCY.ours),
    }
}

/// The first series of `name` whose labels hold `label`.
fn value(exposition: &str, name: &str, label: &str) -> Option<f64> {
    let series = exposition.lines().find(|line| {
        let labels = line.strip_prefix(name);
        labels.is_some_and(|rest| rest.starts_with(['{', ' ']) && rest.contains(label))
    })?;
    series.rsplit(' ').next()?.parse().ok().filter(|value: &f64| value.is_finite())
}

/// What this look at one engine shows. Means are those of the time since the look before; at the first look at an engine
/// those of its whole life, but where `held` has a value already, which then only the next look may change.
pub fn measure(
    now: &Totals,
    before: Option<&Totals>,
    held: Option<&MeasuredStatus>,
) -> MeasuredStatus {
    let mean = |now: Sum, before: Option<Sum>, held: Option<i64>| {
        let before = match before {
            Some(before) if before.count <= now.count => before,
            // The engine has started anew since then.
            Some(_) => Sum::default(),
            None if held.is_none() => Sum::default(),
            None => return None,
        };
        let count = now.count - before.count;
        let mean = (now.seconds - before.seconds) / count * 1e6;
        (count > 0.0 && mean.is_finite()).then_some(mean.round() as i64)
    };
    let held = held.copied().unwrap_or_default();
    let first_tokens = before.map(|before| before.first_tokens);
    let next_tokens = before.map(|before| before.next_tokens);
    MeasuredStatus {
        peak_memory_bytes: now.peak_bytes,
        ttft_microseconds: mean(now.first_tokens, first_tokens, held.ttft_microseconds),
        tpot_microseconds: mean(now.next_tokens, next_tokens, held.tpot_microseconds),
    }
}

/// What is to be written in place of `held`; None where nothing moved enough. A peak never falls.
pub fn news(held: Option<&MeasuredStatus>, seen: &MeasuredStatus) -> Option<MeasuredStatus> {
    let held = held.copied().unwrap_or_default();
    let MeasuredStatus { peak_memory_bytes, ttft_microseconds, tpot_microseconds } = *seen;
    let peak_memory_bytes = peak_memory_bytes.max(held.peak_memory_bytes);
    let moved = moved(held.peak_memory_bytes, peak_memory_bytes)
        || moved(held.ttft_microseconds, ttft_microseconds)
        || moved(held.tpot_microseconds, tpot_microseconds);
    moved.then(|| MeasuredStatus {
        peak_memory_bytes,
        ttft_microseconds: ttft_microseconds.or(held.ttft_microseconds),
        tpot_microseconds: tpot_microseconds.or(held.tpot_microseconds),
    })
}

fn moved(held: Option<i64>, seen: Option<i64>) -> bool {
    match (held, seen) {
        (_, None) => false,
        (None, Some(_)) => true,
        (Some(held), Some(seen)) => (seen - held).abs() > held / MOVED_SHARE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPOSITION: &str = r#"# HELP plimsoll_peak_memory_bytes The most bytes held so far
# TYPE plimsoll_peak_memory_bytes gauge
plimsoll_peak_memory_bytes{engine="0",kind="device",model_name="m"} 2e9
plimsoll_peak_memory_bytes{engine="0",kind="process",model_name="m"} 300000000
plimsoll_time_to_first_token_seconds_bucket{engine="0",model_name="m",le="0.1"} 3
plimsoll_time_to_first_token_seconds_sum{engine="0",model_name="m"} 1.5
plimsoll_time_to_first_token_seconds_count{engine="0",model_name="m"} 10
plimsoll_inter_token_latency_seconds_sum{engine="0",model_name="m"} 0
plimsoll_inter_token_latency_seconds_count{engine="0",model_name="m"} 0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="m"} 99
"#;

    fn sum(seconds: f64, count: f64) -> Sum {
        Sum { seconds, count }
    }

    #[test]
    fn the_cards_peak_and_the_means_are_read_from_the_exposition() {
        let read = totals(EXPOSITION);
        assert_eq!(read.peak_bytes, Some(2_000_000_000));
        assert_eq!((read.first_tokens, read.next_tokens), (sum(1.5, 10.0), sum(0.0, 0.0)));
        let on_cpu: Vec<&str> =
            EXPOSITION.lines().filter(|line| !line.contains("kind=\"device\"")).collect();
        assert_eq!(totals(&on_cpu.join("\n")).peak_bytes, Some(300_000_000));
        assert_eq!(totals("no exposition"), Totals::default());
    }

    #[test]
    fn means_are_of_the_time_since_the_look_before() {
        let at = |seconds, count| Totals { first_tokens: sum(seconds, count), ..Totals::default() };
        let ttft = |now: Totals, before: Option<Totals>, held: Option<i64>| {
            let held = held.map(|held| MeasuredStatus {
                ttft_microseconds: Some(held),
                ..MeasuredStatus::default()
            });
            measure(&now, before.as_ref(), held.as_ref()).ttft_microseconds
        };
        assert_eq!(ttft(at(1.5, 10.0), None, None), Some(150_000), "its whole life");
        assert_eq!(ttft(at(1.5, 10.0), None, Some(7)), None, "after a restart of the operator");
        assert_eq!(ttft(at(2.5, 14.0), Some(at(1.5, 10.0)), Some(7)), Some(250_000));
        assert_eq!(ttft(at(1.5, 10.0), Some(at(1.5, 10.0)), Some(7)), None, "nobody asked");
        assert_eq!(ttft(at(0.2, 2.0), Some(at(1.5, 10.0)), Some(7)), Some(100_000), "started anew");
    }

    #[test]
    fn only_what_moved_by_more_than_a_tenth_is_written_and_a_peak_never_falls() {
        let status = |peak: i64, ttft: Option<i64>| MeasuredStatus {
            peak_memory_bytes: Some(peak),
            ttft_microseconds: ttft,
            tpot_microseconds: None,
        };
        let first = status(1000, None);
        assert_eq!(news(None, &first), Some(first));
        assert_eq!(news(None, &MeasuredStatus::default()), None);
        assert_eq!(news(Some(&first), &status(1100, None)), None, "a tenth is not more than it");
        assert_eq!(news(Some(&first), &status(1101, None)), Some(status(1101, None)));
        assert_eq!(news(Some(&first), &status(10, None)), None);
        assert_eq!(news(Some(&first), &status(10, Some(5))), Some(status(1000, Some(5))));
        let both = status(1000, Some(500));
        assert_eq!(news(Some(&both), &status(1000, None)), None, "no news is no news");
        assert_eq!(news(Some(&both), &status(1200, None)), Some(status(1200, Some(500))));
    }
}
