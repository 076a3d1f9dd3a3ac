//! Logs on standard error: text for a person at a terminal, one JSON object per line for everything else. The level
//! comes from `PLIMSOLL_LOG` (`info` where it is not set).

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::cli::LogFormat;

const LEVEL_VARIABLE: &str = "PLIMSOLL_LOG";

/// Called once, at the start.
pub fn start(format: LogFormat) {
    let filter = EnvFilter::try_from_env(LEVEL_VARIABLE).unwrap_or_else(|_| EnvFilter::new("info"));
    let terminal = std::io::stderr().is_terminal();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(terminal)
        .with_target(false);
    let text = match format {
        LogFormat::Auto => terminal,
        LogFormat::Text => true,
        LogFormat::Json => false,
    };
    if text {
        builder.init();
    } else {
        builder.json().flatten_event(true).init();
    }
}
