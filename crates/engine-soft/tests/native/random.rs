//! Random numbers that a seed reproduces, and values that are worth trying.

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// True once in `n`.
    pub fn chance(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// An integer with a bias to edges.
    pub fn number(&mut self) -> u64 {
        match self.below(8) {
            0 => self.below(64),
            1 => (self.below(64) as i64 - 32) as u64,
            2 => {
                self.pick(&[0, 1, u64::MAX, 1 << 63, i64::MAX as u64, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff])
            }
            3 => self.pick(&[0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x1_0000, 0xffff_8000]),
            4 => 1 << self.below(64),
            5 => self.next() >> 32,
            6 => self.next() >> self.below(64),
            _ => self.next(),
        }
    }

    fn single(&mut self) -> u32 {
        let special =
            [0, 1, 0x80_0000, 0x7f7f_ffff, 0x7f80_0000, 0x7fc0_0000, 0x7fa0_0000, 0x3f80_0000, 0x40_0000];
        let sign = (self.below(2) as u32) << 31;
        match self.below(6) {
            0 => self.pick(&special) | sign,
            1 => (self.below(2000) as f32 - 1000.0).to_bits(),
            2 => (self.below(200_000) as f32 / 7.0).to_bits() | sign,
            3 => ((self.below(40) as u32 + 107) << 23 | self.next() as u32 & 0x7f_ffff) | sign,
            4 => self.next() as u32 & 0xff_ffff | sign,
            _ => self.next() as u32,
        }
    }

    fn double(&mut self) -> u64 {
        let special = [
            0,
            1,
            0x0010_0000_0000_0000,
            0x7fef_ffff_ffff_ffff,
            0x7ff0_0000_0000_0000,
            0x7ff8_0000_0000_0000,
            0x7ff4_0000_0000_0000,
            0x3ff0_0000_0000_0000,
            0x0008_0000_0000_0000,
        ];
        let sign = self.below(2) << 63;
        match self.below(6) {
            0 => self.pick(&special) | sign,
            1 => (self.below(2000) as f64 - 1000.0).to_bits(),
            2 => (self.below(200_000) as f64 / 7.0).to_bits() | sign,
            3 => (self.below(80) + 983) << 52 | self.next() >> 12 | sign,
            4 => self.next() >> 11 | sign,
            _ => self.next(),
        }
    }

    /// 128 bits as elements of one kind.
    pub fn vector(&mut self) -> [u64; 2] {
        let kind = self.below(7);
        let mut word = || match kind {
            0 => u64::from(self.single()) | u64::from(self.single()) << 32,
            1 => self.double(),
            2 => u64::from_le_bytes(std::array::from_fn(|_| {
                self.pick(&[0, 1, 0x7f, 0x80, 0xff, b'a', b'z', 0])
            })),
            3 => self.number() & 0xffff_ffff | self.number() << 32,
            4 => self.number(),
            5 => self.pick(&[0, u64::MAX]),
            _ => self.next(),
        };
        [word(), word()]
    }

    /// An x87 register: sign and exponent above 64 bits of mantissa.
    pub fn extended(&mut self) -> (u64, u16) {
        let sign = (self.below(2) as u16) << 15;
        let normal = 1 << 63;
        match self.below(8) {
            0 => (0, sign),
            1 => (normal, 0x7fff | sign),
            2 => (normal | self.next() >> 1, 0x7fff | sign),
            3 => (self.next() >> 1, sign),
            4 => {
                let integer = self.below(1000) + 1;
                let shift = integer.leading_zeros();
                (integer << shift, (16383 + 63 - shift as u16) | sign)
            }
            5 => (self.next(), self.next() as u16),
            _ => (normal | self.next(), (16383 - 40 + self.below(80) as u16) | sign),
        }
    }
}
