//! What the TLB was told to forget, for those who remember the same.

/// How many single pages are remembered.
pub const LATEST: usize = 64;

/// A log of a TLB's flushes.
pub struct Flushes {
    /// Counts how often everything was forgotten.
    pub all: u64,
    /// Counts how often all writes had to be seen again.
    pub writes: u64,
    /// Counts the pages that were forgotten one by one.
    pub pages: u64,
    /// Numbers of the latest of them.
    latest: [u64; LATEST],
}

impl Default for Flushes {
    fn default() -> Self {
        Flushes { all: 0, writes: 0, pages: 0, latest: [0; LATEST] }
    }
}

impl Flushes {
    /// The page at `linear` was forgotten.
    pub fn page(&mut self, linear: u64) {
        self.latest[self.pages as usize % LATEST] = linear >> 12;
        self.pages += 1;
    }

    /// Numbers of the pages forgotten since the count was `seen`, which is at most [`LATEST`] back.
    pub fn since(&self, seen: u64) -> impl Iterator<Item = u64> + '_ {
        (seen..self.pages).map(|count| self.latest[count as usize % LATEST])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_pages_are_told_in_their_order() {
        let mut flushes = Flushes::default();
        for page in 0..100 {
            flushes.page(page << 12 | 0xabc);
        }
        let seen = flushes.pages;
        flushes.page(0x7000);
        flushes.page(0x3000);
        assert_eq!(flushes.since(seen).collect::<Vec<_>>(), [7, 3]);
        assert_eq!(flushes.since(flushes.pages).count(), 0);
    }
}
