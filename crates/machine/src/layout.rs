//! Where everything is on the `pc` board. The ACPI tables tell the guest the same ([`boot::acpi`]).

use std::ops::Range;

/// RAM ends here and goes on at 4 GiB; in between are PCI and the interrupt controllers.
pub const HOLE: Range<u64> = 0xc000_0000..1 << 32;
/// BARs that must be below 4 GiB.
pub const PCI_MMIO_32: Range<u64> = 0xc000_0000..0xe000_0000;
/// PCI Express configuration space of bus 0, the only one. The 255 MiB behind it are kept for more: a guest
/// is told of no bus that it would search in vain, with two exits for each slot.
pub const ECAM: Range<u64> = 0xe000_0000..0xe010_0000;
/// I/O APIC registers.
pub const IOAPIC: Range<u64> = 0xfec0_0000..0xfec0_1000;
/// High precision event timers.
pub const HPET: Range<u64> = 0xfed0_0000..0xfed0_0400;
/// Local APIC registers. They belong to the engine.
pub const LAPIC: u64 = 0xfee0_0000;
/// BARs above RAM.
pub const PCI_MMIO_64: Range<u64> = 0x40_0000_0000..0x80_0000_0000;
/// BARs in port space.
pub const PCI_PORTS: Range<u64> = 0xc000..0x1_0000;

/// Programmable interval timer.
pub const PIT: Range<u64> = 0x40..0x44;
/// System control port B: the timer's channel 2.
pub const PORT61: Range<u64> = 0x61..0x62;
/// The address register of PCI configuration space.
pub const PCI_ADDRESS: u16 = 0xcf8;
/// Real-time clock and CMOS memory.
pub const RTC: Range<u64> = 0x70..0x72;
/// POST codes.
pub const POST: Range<u64> = 0x80..0x81;
/// System control port A.
pub const PORT92: Range<u64> = 0x92..0x93;
/// Debug exit.
pub const DEBUG_EXIT: Range<u64> = 0xf4..0xf8;
/// First serial port.
pub const COM1: Range<u64> = 0x3f8..0x400;
/// The test device's latch; this and what follows is where test suites look for it.
pub const TEST_LATCH: u64 = 0xe0;
/// First port of the test device's lines.
pub const TEST_LINES: u64 = 0x2000;
/// The test device's memory (64 KiB).
pub const TEST_MEMORY: u64 = 0xff00_0000;
/// First port of the ACPI power management block.
pub const ACPI_PM: u64 = 0x600;
/// Reset control register.
pub const RESET_CONTROL: Range<u64> = 0xcf9..0xcfa;

/// Interrupt lines (global system interrupts; the timer's is pin 2 of the I/O APIC).
pub mod irq {
    /// Programmable interval timer.
    pub const PIT: u32 = 0;
    /// First serial port.
    pub const COM1: u32 = 4;
    /// Real-time clock.
    pub const RTC: u32 = 8;
    /// ACPI system control interrupt.
    pub const SCI: u32 = 9;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_acpi_tables_describe_this_board() {
        let acpi = boot::acpi::AcpiParams::pc(4);
        assert_eq!(acpi.ecam, ECAM);
        assert_eq!(acpi.mmio32, PCI_MMIO_32);
        assert_eq!(acpi.mmio64, PCI_MMIO_64);
        assert_eq!(u64::from(acpi.lapic_addr), LAPIC);
        assert_eq!(u64::from(acpi.ioapic_addr), IOAPIC.start);
        assert_eq!(u64::from(acpi.pm1a_event), ACPI_PM);
        assert_eq!(u64::from(acpi.pm1a_control), ACPI_PM + 4);
        assert_eq!(u64::from(acpi.pm_timer), ACPI_PM + 8);
        assert_eq!(u64::from(acpi.reset.0), RESET_CONTROL.start);
        assert_eq!(u32::from(acpi.sci_irq), irq::SCI);
        assert_eq!(acpi.com1, Some((COM1.start as u16, irq::COM1 as u8)));
        for slot in 0..32 {
            let gsi = pci::IntxRouter::gsi(slot, pci::Pin::A);
            assert_eq!(acpi.intx.gsi(slot.into(), 0), gsi);
        }
    }
}
