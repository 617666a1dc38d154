//! The same with several, all at the same time.

use std::panic::resume_unwind;
use std::thread;

/// What `act` makes of each, in their order. Most of it is waiting, so that each has a thread.
pub fn at_once<T: Send, R: Send>(all: impl IntoIterator<Item = T>, act: impl Fn(T) -> R + Sync) -> Vec<R> {
    thread::scope(|scope| {
        let act = &act;
        let threads: Vec<_> = all.into_iter().map(|one| scope.spawn(move || act(one))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn nobody_waits_for_the_one_before() {
        let meeting = Barrier::new(3);
        let met = at_once([1, 2, 3], |number| {
            meeting.wait();
            number * 2
        });
        assert_eq!(met, [2, 4, 6]);
    }
}
