//! The small devices that software expects of a PC: UART, RTC, PIT, HPET, PIC, IOAPIC, power control,
//! debug exit; and what test suites drive a machine with.
//!
//! Every device is one file: what it models and where the specification is, its registers, its state
//! struct, its tests. Devices know nothing of each other; interrupts leave through
//! [`device::IrqLine`] or [`device::MsiSink`], what ends or restarts the machine through
//! [`PowerSink`], and only [`IrqRouter`] knows both interrupt controllers.

mod acpi_pm;
mod debug_exit;
mod hpet;
mod i8042;
mod ioapic;
mod output;
mod part;
mod pic;
mod pit;
mod port92;
mod post;
mod power;
mod reset_control;
mod router;
mod rtc;
mod serial_input;
mod sync;
mod test_device;
mod uart;
#[cfg(test)]
mod wire;

pub use acpi_pm::{AcpiPm, AcpiPmState};
pub use debug_exit::DebugExit;
pub use hpet::{ComparatorState, Hpet, HpetLines, HpetState};
pub use i8042::{I8042, I8042State};
pub use ioapic::{IoApic, IoApicState};
pub use part::Parts;
pub use pic::{DualPic, DualPicState, PicChipState};
pub use pit::{ChannelState, Pit, PitState, Port61};
pub use port92::{Port92, Port92State};
pub use post::{Post, PostState};
pub use power::{PowerEvent, PowerSink};
pub use reset_control::{ResetControl, ResetControlState};
pub use router::IrqRouter;
pub use rtc::{MemorySizes, Rtc, RtcState};
pub use serial_input::SerialInput;
pub use test_device::{TestDevice, TestDeviceState};
pub use uart::{Uart, UartState};
