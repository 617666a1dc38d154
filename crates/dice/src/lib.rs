//! Random numbers for tests that try what nobody thought of. A seed reproduces them, and so a failure.

use std::env;
use std::ops::Range;

/// Rolls the same for the same seed.
#[derive(Clone, Debug)]
pub struct Dice(fastrand::Rng);

impl Dice {
    /// Dice of a seed.
    pub fn new(seed: u64) -> Dice {
        Dice(fastrand::Rng::with_seed(seed))
    }

    /// Any number.
    pub fn roll(&mut self) -> u64 {
        self.0.u64(..)
    }

    /// A number less than `count`, which is not 0.
    pub fn below(&mut self, count: u64) -> u64 {
        self.0.u64(..count)
    }

    /// A place in something of that length, which is not 0.
    pub fn place(&mut self, length: usize) -> usize {
        self.0.usize(..length)
    }

    /// True once in so many times.
    pub fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    /// One of these, of which there is one at least.
    pub fn of<T: Copy>(&mut self, these: &[T]) -> T {
        these[self.place(these.len())]
    }

    /// So many of any bytes.
    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.0.u8(..)).collect()
    }
}

/// The seeds that a test tries: `count`, or what the environment says. `OSPITE_SEEDS=N` tries N of them;
/// `OSPITE_SEED=S`, which a failure names, begins there.
pub fn seeds(count: u64) -> Range<u64> {
    let number = |variable| env::var(variable).ok().and_then(|text| text.parse::<u64>().ok());
    let first = number("OSPITE_SEED").unwrap_or(1);
    first..first + number("OSPITE_SEEDS").unwrap_or(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_rolls_the_same_again_and_another_one_differently() {
        let rolls = |seed| {
            (0..8)
                .map(|_| Dice::new(seed).roll())
                .chain(Dice::new(seed).bytes(9).into_iter().map(u64::from))
                .collect::<Vec<_>>()
        };
        assert_eq!(rolls(7), rolls(7));
        assert_ne!(rolls(7), rolls(8));
    }

    #[test]
    fn every_face_comes_up() {
        let mut dice = Dice::new(1);
        let mut seen = [false; 6];
        for _ in 0..200 {
            seen[dice.below(6) as usize] = true;
            assert!([2, 3].contains(&dice.of(&[2, 3])));
        }
        assert_eq!(seen, [true; 6]);
        assert!((0..200).any(|_| dice.one_in(10)) && !(0..200).all(|_| dice.one_in(10)));
    }
}
