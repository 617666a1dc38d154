//! Why a machine cannot be built, reset or restored.

use std::path::PathBuf;

use engine::x86::CpuModel;

/// What failed; the cause is the error's source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The wish for memory cannot be met by the board.
    #[error(
        "{bytes} bytes of memory cannot be had: --memory takes {least_mib} MiB to {most_gib} GiB in whole pages"
    )]
    MemorySize {
        /// What was asked for, in bytes.
        bytes: u64,
        /// The least, in MiB.
        least_mib: u64,
        /// The most, in GiB.
        most_gib: u64,
    },
    /// The wish for vCPUs cannot be met by the board.
    #[error("{cpus} vCPUs cannot be had: --cpus takes 1 to {most}")]
    Cpus {
        /// What was asked for.
        cpus: u32,
        /// The most.
        most: u32,
    },
    /// The host would not give the memory.
    #[error(transparent)]
    Memory(#[from] mem::Error),
    /// A kernel or initrd that cannot be booted.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// The ACPI tables could not be made.
    #[error(transparent)]
    Acpi(#[from] boot::acpi::Error),
    /// The engine refused.
    #[error(transparent)]
    Engine(#[from] engine::Error),
    /// The PCI devices do not fit.
    #[error(transparent)]
    Pci(#[from] pci::Error),
    /// A disk image cannot be opened.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// A serial number that the guest could not read.
    #[error("{serial:?} cannot be the serial number of disk {}: 1 to 20 printable ASCII characters can", path.display())]
    Serial {
        /// The disk's image.
        path: PathBuf,
        /// The number.
        serial: String,
    },
    /// The host would not give what a device needs.
    #[error("cannot make the device in PCI slot {slot}; is a limit on open files (ulimit -n) in the way?")]
    Device {
        /// The slot.
        slot: u8,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
    /// Data of a disk could not be made durable.
    #[error("the data written to disk {} may not be safe: the host could not flush it", path.display())]
    Flush {
        /// The disk's image.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
    /// Two devices in one place: a mistake in the board's layout.
    #[error("the board's layout contradicts itself")]
    Layout(#[from] device::Overlap),
    /// The host would not start a thread.
    #[error("cannot start a thread for {what}; is a limit on processes (ulimit -u) in the way?")]
    Thread {
        /// What for.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
    /// The engine runs another guest architecture than this board's.
    #[error("the engine's vCPUs are not x86-64 ones; choose another with --engine")]
    WrongCpu,
    /// A device refused its saved state.
    #[error(transparent)]
    BadState(#[from] device::BadState),
    /// The saved state is of another machine.
    #[error("the saved state has {saved} {what}, this machine has {here}; start it as it was saved")]
    OtherMachine {
        /// What differs.
        what: &'static str,
        /// In the saved state.
        saved: u64,
        /// Here.
        here: u64,
    },
    /// The saved vCPUs say that they are others than this machine's.
    #[error(
        "the saved state's vCPUs are of model {saved}, this machine's of {here}; start it with --cpu {saved}"
    )]
    OtherCpu {
        /// In the saved state.
        saved: CpuModel,
        /// Here.
        here: CpuModel,
    },
}
