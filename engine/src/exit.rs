//! How the process ends. Enters: an exit report. Leaves: a line on standard error, the termination message, and an exit
//! code that names the reason too.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use plimsoll_contract::exit::{ExitReason, ExitReport, TERMINATION_MESSAGE_BYTES_MAX};

/// Where Kubernetes reads the termination message unless told otherwise.
const TERMINATION_MESSAGE_FILE: &str = "/dev/termination-log";

/// The file for the termination message: the one that was named, or the usual one where it exists.
pub fn termination_message_file(named: Option<&Path>) -> Option<PathBuf> {
    let usual = Path::new(TERMINATION_MESSAGE_FILE);
    named.or_else(|| usual.exists().then_some(usual)).map(Path::to_owned)
}

/// Runs a verb; an error or a panic becomes the termination message and the exit code.
pub fn finish(
    message_file: Option<&Path>,
    verb: impl FnOnce() -> Result<(), ExitReport> + std::panic::UnwindSafe,
) -> ExitCode {
    let report = match std::panic::catch_unwind(verb) {
        Ok(Ok(())) => return ExitCode::SUCCESS,
        Ok(Err(report)) => report,
        // The panic itself has been printed with its place.
        Err(panic) => internal(format!("the engine panicked: {}", panic_message(&*panic))),
    };
    eprintln!("plimsoll-engine: {:?}: {}", report.reason, report.message);
    if let Some(file) = message_file
        && let Err(error) = std::fs::write(file, termination_message(&report))
    {
        eprintln!("plimsoll-engine: failed to write {}: {error}", file.display());
    }
    ExitCode::from(report.reason.code())
}

/// A defect of ours, or a world that no other reason describes.
pub fn internal(message: impl Into<String>) -> ExitReport {
    ExitReport::new(ExitReason::Internal, message)
}

/// The report as JSON, its message shortened where Kubernetes would cut the JSON itself.
pub fn termination_message(report: &ExitReport) -> String {
    let mut report = report.clone();
    loop {
        let json = serde_json::to_string(&report).expect("our own types serialize");
        let excess = json.len().saturating_sub(TERMINATION_MESSAGE_BYTES_MAX);
        if excess == 0 {
            return json;
        }
        // An escaped character takes up to six bytes, so a few rounds may be needed; the message only gets shorter.
        let keep = report.message.len().saturating_sub(excess.div_ceil(6).max(4));
        let boundary = (0..=keep).rev().find(|&at| report.message.is_char_boundary(at));
        report.message.truncate(boundary.unwrap_or(0));
        report.message.push('…');
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_is_cut_so_that_the_json_stays_whole() {
        for text in ["x", "ü", "\u{1}", "\""] {
            let report = internal(text.repeat(9000));
            let json = termination_message(&report);
            assert!(json.len() <= TERMINATION_MESSAGE_BYTES_MAX);
            assert!(json.len() > TERMINATION_MESSAGE_BYTES_MAX / 2);
            let back: ExitReport = serde_json::from_str(&json).unwrap();
            assert_eq!(back.reason, ExitReason::Internal);
            assert!(back.message.ends_with('…'));
        }
    }

    #[test]
    fn a_panic_ends_as_internal_with_its_message_in_the_file() {
        let file = std::env::temp_dir().join(format!("plimsoll-exit-{}", std::process::id()));
        let code = finish(Some(&file), || panic!("pages leaked"));
        assert_eq!(code, ExitCode::from(ExitReason::Internal.code()));
        let report: ExitReport =
            serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
        assert_eq!(report.message, "the engine panicked: pages leaked");
        std::fs::remove_file(&file).unwrap();
    }
}
