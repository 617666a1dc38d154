//! What is run: shell lines for a static busybox, the same natively and in every guest.

/// One item of work.
pub struct Workload {
    /// Its name in the table.
    pub name: &'static str,
    /// The shell line. `$n` is the amount of work, `$b` the busybox binary: its own
    /// applets are meant, not the host's programs.
    pub line: &'static str,
    /// The amount at full scale: natively more than half a second.
    pub amount: u64,
    /// Counts towards the geometric mean of the compute items.
    pub compute: bool,
}

/// Two jobs that have nothing to do with each other, at once: what a second vCPU is for.
pub const PAIR: Workload = Workload {
    name: "2 jobs at once",
    line: "j() { $b cat $b $b $b $b | $b head -c $n | $b bzip2 -c; }; j & j & wait",
    amount: 7600 << 10,
    compute: false,
};

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
        amount: 64 << 20,
        compute: true,
    },
    Workload {
        name: "bzip2",
        line: "$b cat $b $b $b $b | $b head -c $n | $b bzip2 -c | $b wc -c",
        amount: 7600 << 10,
        compute: true,
    },
    Workload {
        name: "awk float",
        line: "$b awk -v n=$n 'BEGIN{for(i=0;i<n;i++)s+=i*1.5/3;print s}'",
        amount: 1_500_000,
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
        amount: 600_000,
        compute: false,
    },
    PAIR,
];

/// Printed before an item starts and when it has ended; what is between them is its time.
pub const START: &str = "BENCH-START";
/// See [`START`].
pub const END: &str = "BENCH-END";
/// Printed when all is done.
pub const DONE: &str = "BENCH-DONE";

/// The script that runs `items` at `1/divisor` of their full amount. `$0` is the busybox binary, so the
/// same script runs everywhere; the host's clock times the marks as they arrive.
pub fn script(items: &[Workload], divisor: u64) -> String {
    let mut text = String::from("b=$0\n");
    for w in items {
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
        let text = script(WORKLOADS, 64);
        for w in WORKLOADS {
            assert!(
                text.contains(&format!("{START} {}\n", w.name))
                    && text.contains(&format!("{END} {}\n", w.name))
            );
        }
        assert!(text.contains("n=1048576\n") && text.ends_with("BENCH-DONE\n"));
    }
}
