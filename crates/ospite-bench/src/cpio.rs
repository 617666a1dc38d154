//! A minimal initramfs archive, to be appended to another one (Linux' initramfs buffer format: several
//! "newc" archives one after another).

/// An archive with one executable file at `/name`.
pub fn with_file(name: &str, content: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    entry(&mut archive, name, 0o100_755, content);
    entry(&mut archive, "TRAILER!!!", 0, &[]);
    archive
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let fields = [0, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(content);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    #[test]
    fn headers_are_110_bytes_and_everything_is_aligned() {
        let archive = super::with_file("bench.sh", b"true\n");
        assert_eq!(&archive[..6], b"070701");
        assert_eq!(&archive[110..119], b"bench.sh\0");
        assert_eq!(&archive[120..125], b"true\n");
        assert_eq!(archive.len() % 4, 0);
    }
}
