//! What is run: shell lines for a static busybox, the same natively and in every guest.

/// One item of work.
pub struct Workload {
    /// Its name in the table.
    pub name: &'static str,
    /// The shell line. `$n` is the amount of work, `$b` the busybox binary: its own
    /// applets are meant, not the host's programs.
    pub line: &'static str,
    /// The amount at full scale: natively some tenths of a second.
    pub amount: u64,
    /// Counts towards the geometric mean of the compute items.
    pub compute: bool,
}

/// The items, in the order of the table.
pub const WORKLOADS: &[Workload] = &[
    Workload {
        name: "sha256",
        line: "$b head -c $n /dev/zero | $b sha256sum",
        amount: 64 << 20,
        compute: true,
    },
    Workload {
        name: "gzip -9",
        line: "$b head -c $n /dev/zero | $b gzip -9 | $b wc -c",
        amount: 32 << 20,
        compute: true,
    },
    Workload {
        name: "bzip2",
        line: "$b head -c $n $b | $b bzip2 -c | $b wc -c",
        amount: 1900 << 10,
        compute: true,
    },
    Workload {
        name: "awk float",
        line: "$b awk -v n=$n 'BEGIN{for(i=0;i<n;i++)s+=i*1.5/3;print s}'",
        amount: 6_000_000,
        compute: true,
    },
    Workload {
        name: "shell loop",
        line: "i=0; while [ $i -lt $n ]; do i=$((i+1)); done; echo $i",
        amount: 500_000,
        compute: true,
    },
    Workload {
        name: "fork+exec",
        line: "i=0; while [ $i -lt $n ]; do $b true; i=$((i+1)); done; echo $i",
        amount: 500,
        compute: false,
    },
    Workload {
        name: "syscalls",
        line: "$b dd if=/dev/zero of=/dev/null bs=1 count=$n",
        amount: 300_000,
        compute: false,
    },
];

/// Printed before an item starts and when it has ended; what is between them is its time.
pub const START: &str = "BENCH-START";
/// See [`START`].
pub const END: &str = "BENCH-END";
/// Printed when all is done.
pub const DONE: &str = "BENCH-DONE";

/// The script that runs all items at `1/divisor` of their full amount. `$0` is the busybox binary, so the
/// same script runs everywhere; the host's clock times the marks as they arrive.
pub fn script(divisor: u64) -> String {
    let mut text = String::from("b=$0\n");
    for w in WORKLOADS {
        let amount = (w.amount / divisor).max(1);
        text += &format!(
            "echo {START} {}\nn={amount}\n( {} ) >/dev/null 2>&1\necho {END} {}\n",
            w.name, w.line, w.name
        );
    }
    text += &format!("echo {DONE}\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_marked_and_scaled() {
        let text = script(64);
        for w in WORKLOADS {
            assert!(
                text.contains(&format!("{START} {}\n", w.name))
                    && text.contains(&format!("{END} {}\n", w.name))
            );
        }
        assert!(text.contains("n=1048576\n") && text.ends_with("BENCH-DONE\n"));
    }
}
