//! Seconds since 1970 and the Gregorian calendar, both ways.

/// A moment as the clock chip shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DateTime {
    pub(super) year: i64,
    /// 1 to 12.
    pub(super) month: i64,
    /// 1 to 31.
    pub(super) day: i64,
    pub(super) hour: i64,
    pub(super) minute: i64,
    pub(super) second: i64,
    /// Sunday is 1.
    pub(super) weekday: i64,
}

const DAY: i64 = 86_400;

/// Days from 1970-01-01 (H. Hinnant, "chrono-Compatible Low-Level Date Algorithms").
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

impl DateTime {
    /// The calendar at `seconds` since 1970.
    pub(super) fn at(seconds: i64) -> DateTime {
        let (days, rest) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        DateTime {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month,
            day: day_of_year - (153 * shifted_month + 2) / 5 + 1,
            hour: rest / 3600,
            minute: rest / 60 % 60,
            second: rest % 60,
            weekday: (days + 4).rem_euclid(7) + 1,
        }
    }

    /// Seconds since 1970. Fields beyond their range carry into the next, as the 31st of April is the
    /// first of May; the weekday does not count.
    pub(super) fn seconds(&self) -> i64 {
        let month = self.month.clamp(1, 12);
        let days = days_from_civil(self.year, month, self.day);
        days * DAY + self.hour * 3600 + self.minute * 60 + self.second
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments() {
        let at = |seconds| {
            let t = DateTime::at(seconds);
            (t.year, t.month, t.day, t.hour, t.minute, t.second, t.weekday)
        };
        assert_eq!(at(0), (1970, 1, 1, 0, 0, 0, 5));
        assert_eq!(at(951_827_696), (2000, 2, 29, 12, 34, 56, 3));
        assert_eq!(at(-1), (1969, 12, 31, 23, 59, 59, 4));
        assert_eq!(at(4_107_542_399), (2100, 2, 28, 23, 59, 59, 1));
        assert_eq!(at(4_107_542_400), (2100, 3, 1, 0, 0, 0, 2));
    }

    #[test]
    fn every_day_of_four_centuries_comes_back() {
        for day in -20_000..140_000 {
            let seconds = day * DAY + 12_345;
            assert_eq!(DateTime::at(seconds).seconds(), seconds);
        }
    }
}
