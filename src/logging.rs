//! The log: to the configured file, or stderr, which runtimes keep. Never stdout: it carries the result.

use std::fs::OpenOptions;
use std::io::{LineWriter, Write, stderr};

use log::LevelFilter;
use simplelog::{ConfigBuilder, WriteLogger};

use crate::request::Config;

/// Starts logging as the configuration says. A log file that cannot be opened is said on stderr and costs no pod.
pub fn start(config: &Config) {
    let format = ConfigBuilder::new()
        .set_time_format_rfc3339()
        .set_thread_level(LevelFilter::Off)
        // The loader's own debug lines are 500 for each ADD.
        .add_filter_allow_str(env!("CARGO_PKG_NAME"))
        .build();
    let opened =
        config.log_file.as_ref().map(|path| OpenOptions::new().append(true).create(true).open(path)).transpose();
    let (output, failed): (Box<dyn Write + Send>, _) = match opened {
        Ok(Some(file)) => (Box::new(file), None),
        Ok(None) => (Box::new(stderr()), None),
        Err(error) => (Box::new(stderr()), Some(error)),
    };
    // The logger writes a line piece by piece; the lines of calls that run at the same time must stay whole.
    // The only error is a second start, and there is none.
    let _ = WriteLogger::init(config.log_level, format, LineWriter::new(output));
    if let (Some(error), Some(path)) = (failed, &config.log_file) {
        log::warn!("open logFile {}: {error}; logging to stderr", path.display());
    }
}
