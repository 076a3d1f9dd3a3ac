//! Files of a checkpoint, whoever put them there. Enters: a path. Leaves: an opened regular file, or its content up to a
//! bound. A pipe or a device is refused: opening the one can wait for ever, reading the other need not end.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Longest configuration or template that is read: tens of times as long as the longest known.
pub const TEXT_BYTES_MAX: u64 = 16 << 20;

/// Opens without waiting. What is no regular file is [`ErrorKind::InvalidInput`]; links are followed.
pub fn open(path: &Path) -> io::Result<File> {
    // Without this flag a pipe that nobody writes to would be waited for. Regular files ignore it.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

/// The whole file. A longer one is [`ErrorKind::FileTooLarge`].
pub fn read(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let file = open(path)?;
    let mut content = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut content)?;
    if content.len() as u64 > bytes_max {
        let why = format!("longer than {} MiB", bytes_max >> 20);
        return Err(io::Error::new(ErrorKind::FileTooLarge, why));
    }
    Ok(content)
}
