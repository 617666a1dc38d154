//! When two frequencies of a time-stamp counter are the same.

/// How far they may be apart, in parts per million: an engine that cannot ask its host measures. It is twice what
/// a guest corrects by itself (NTP's 500 ppm).
const TOLERANCE_PPM: u64 = 1000;

/// Whether these frequencies, in kHz, are the same but for how they came to be known. 0 is unknown, and as good as
/// any.
pub fn same_frequency(khz: u32, other: u32) -> bool {
    let (apart, most) = (u64::from(khz.abs_diff(other)), u64::from(khz.max(other)));
    khz == 0 || other == 0 || apart * 1_000_000 <= most * TOLERANCE_PPM
}

/// What to say where the counter cannot be as fast as the guest knows it, both in kHz.
pub fn other_frequency(guest: u32, host: u32) -> String {
    format!(
        "the guest's time-stamp counter ran at {guest} kHz, here it runs at {host} kHz, which cannot be changed: a \
         guest with KVM's clock keeps the right time, any other goes wrong until it is restarted"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_measured_is_the_same_and_another_cpu_is_not() {
        for (khz, other) in [(2_596_102, 2_595_000), (0, 1), (u32::MAX, 0), (u32::MAX, u32::MAX - 1)] {
            assert!(same_frequency(khz, other) && same_frequency(other, khz), "{khz} {other}");
        }
        for (khz, other) in [(2_596_102, 2_593_000), (1, u32::MAX), (2_000_000, 2_100_000)] {
            assert!(!same_frequency(khz, other) && !same_frequency(other, khz), "{khz} {other}");
        }
    }
}
