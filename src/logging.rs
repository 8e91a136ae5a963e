//! The log: to the configured file, or to stderr, which runtimes keep. Never to stdout, which carries the result.

use std::fs::OpenOptions;
use std::io::{LineWriter, Write, stderr};

use log::LevelFilter;
use simplelog::{ConfigBuilder, WriteLogger};

use crate::request::Config;

/// Starts logging as configured. If the log file cannot be opened, the reason goes to stderr and the call goes on.
pub fn start(config: &Config) {
    let format = ConfigBuilder::new()
        .set_time_format_rfc3339()
        .set_thread_level(LevelFilter::Off)
        // The debug lines of the eBPF loader alone are 500 for each ADD.
        .add_filter_allow_str(env!("CARGO_PKG_NAME"))
        .build();
    let opened =
        config.log_file.as_ref().map(|path| OpenOptions::new().append(true).create(true).open(path)).transpose();
    let (output, failed): (Box<dyn Write + Send>, _) = match opened {
        Ok(Some(file)) => (Box::new(file), None),
        Ok(None) => (Box::new(stderr()), None),
        Err(error) => (Box::new(stderr()), Some(error)),
    };
    // The logger writes a line piece by piece; lines of concurrent calls must stay whole.
    // The only possible error is a second start, which does not happen.
    let _ = WriteLogger::init(config.log_level, format, LineWriter::new(output));
    if let (Some(error), Some(path)) = (failed, &config.log_file) {
        log::warn!("open logFile {}: {error}; logging to stderr", path.display());
    }
}
