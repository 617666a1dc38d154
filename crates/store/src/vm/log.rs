//! What a guest printed: `console.log`, and older pieces of it, `console.log.1` being the youngest.
//! Pieces have a limit, and there are only so many: a guest cannot fill the host's disk.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Bytes in a piece.
pub const PIECE: u64 = 1 << 20;
/// How many old pieces are kept.
pub const OLD_PIECES: u32 = 4;

fn piece(folder: &Path, age: u32) -> PathBuf {
    folder.join(if age == 0 { "console.log".into() } else { format!("console.log.{age}") })
}

/// Writes the log.
#[derive(Debug)]
pub struct Writer {
    folder: PathBuf,
    file: File,
    length: u64,
    limit: u64,
}

impl Writer {
    /// Goes on with the log in `folder`.
    ///
    /// # Errors
    /// What the host says.
    pub fn open(folder: &Path) -> io::Result<Writer> {
        Writer::with_limit(folder, PIECE)
    }

    fn with_limit(folder: &Path, limit: u64) -> io::Result<Writer> {
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(piece(folder, 0))?;
        let length = file.metadata()?.len();
        Ok(Writer { folder: folder.into(), file, length, limit })
    }

    /// Everybody gets older by one; the oldest goes.
    fn rotate(&mut self) -> io::Result<()> {
        for age in (0..OLD_PIECES).rev() {
            match fs::rename(piece(&self.folder, age), piece(&self.folder, age + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        *self = Writer::with_limit(&self.folder, self.limit)?;
        Ok(())
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.length >= self.limit {
            self.rotate()?;
        }
        let room = usize::try_from(self.limit - self.length).unwrap_or(usize::MAX).max(1);
        let written = self.file.write(&bytes[..bytes.len().min(room)])?;
        self.length += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads the log, also while it is written.
#[derive(Debug)]
pub struct Reader {
    folder: PathBuf,
    file: Option<File>,
}

impl Reader {
    /// A reader of the log in `folder`, and the last `lines` lines of it, or all that is there.
    ///
    /// # Errors
    /// What the host says. A log that has not been begun is empty.
    pub fn open(folder: &Path, lines: Option<usize>) -> io::Result<(Reader, Vec<u8>)> {
        let mut reader = Reader { folder: folder.into(), file: None };
        let mut text = Vec::new();
        if let Some(oldest) = (0..=OLD_PIECES).rev().find(|&age| piece(folder, age).exists()) {
            reader.file = Some(File::open(piece(folder, oldest))?);
            text = reader.read_new()?;
        }
        let from = lines.map_or(0, |lines| last_lines(&text, lines));
        Ok((reader, text.split_off(from)))
    }

    /// What has come since the last look.
    ///
    /// # Errors
    /// What the host says.
    pub fn read_new(&mut self) -> io::Result<Vec<u8>> {
        let mut text = Vec::new();
        for mut next in self.younger()? {
            // Nobody writes to the old piece any more, so that this is all of it.
            if let Some(file) = &mut self.file {
                file.read_to_end(&mut text)?;
            }
            next.read_to_end(&mut text)?;
            self.file = Some(next);
        }
        if let Some(file) = &mut self.file {
            file.read_to_end(&mut text)?;
        }
        Ok(text)
    }

    /// The pieces that are younger than the one that is open, the oldest first.
    fn younger(&self) -> io::Result<VecDeque<File>> {
        let open = self.file.as_ref().map(File::metadata).transpose()?.map(|meta| meta.ino());
        let mut younger = VecDeque::new();
        for age in 0..=OLD_PIECES {
            match File::open(piece(&self.folder, age)) {
                Ok(file) if Some(file.metadata()?.ino()) == open => break,
                Ok(file) => younger.push_front(file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(younger)
    }
}

/// Where the last `lines` lines of `text` begin.
fn last_lines(text: &[u8], lines: usize) -> usize {
    if lines == 0 {
        return text.len();
    }
    let ends = text.iter().enumerate().rev().filter(|&(at, &byte)| byte == b'\n' && at + 1 < text.len());
    ends.map(|(at, _)| at + 1).nth(lines - 1).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(number: usize) -> String {
        format!("line {number:04}\n") // 10 bytes
    }

    #[test]
    fn the_log_has_a_limit_and_keeps_the_youngest() {
        let folder = tempfile::tempdir().unwrap();
        for number in 0..100 {
            // A writer for each line: what a restart of the VM finds is gone on with.
            Writer::with_limit(folder.path(), 100).unwrap().write_all(line(number).as_bytes()).unwrap();
        }
        let (_, text) = Reader::open(folder.path(), None).unwrap();
        let kept: String = (50..100).map(line).collect();
        assert_eq!(String::from_utf8(text).unwrap(), kept);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1 + OLD_PIECES as usize);
    }

    #[test]
    fn a_reader_who_follows_misses_nothing_when_the_log_rotates() {
        let folder = tempfile::tempdir().unwrap();
        let (mut reader, mut text) = Reader::open(folder.path(), None).unwrap();
        assert!(text.is_empty(), "there is no log yet");
        let mut writer = Writer::with_limit(folder.path(), 100).unwrap();
        for number in 0..1000 {
            writer.write_all(line(number).as_bytes()).unwrap();
            if number % 37 == 0 {
                text.extend(reader.read_new().unwrap());
            }
        }
        text.extend(reader.read_new().unwrap());
        assert_eq!(String::from_utf8(text).unwrap(), (0..1000).map(line).collect::<String>());
    }

    #[test]
    fn the_tail_is_whole_lines() {
        let tail = |text: &str, lines| text[last_lines(text.as_bytes(), lines)..].to_owned();
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc\n");
        assert_eq!(tail("a\nb\nc", 2), "b\nc", "a line need not have ended");
        assert_eq!(tail("a\nb\n", 9), "a\nb\n");
        assert_eq!(tail("a\n", 0), "");
    }
}
