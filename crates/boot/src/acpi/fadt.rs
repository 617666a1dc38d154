//! FADT (ACPI 6.5, 5.2.9): fixed hardware, always in ACPI mode.

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::table::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use super::{AcpiParams, bytes};

// IA-PC boot architecture flags (table 5.11). The flag for an 8042 is off: there is no keyboard, and
// a guest that believes it does not spend time on a probe.
const LEGACY_DEVICES: u16 = 1 << 0;
const VGA_NOT_PRESENT: u16 = 1 << 2;
const NO_ASPM: u16 = 1 << 4;

/// Worst-case latencies above these mean that C2 and C3 do not exist.
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;
/// CMOS index of the century.
const CENTURY: u8 = 0x32;

pub(super) fn fadt(params: &AcpiParams, facs: u32, dsdt: u32) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .preferred_pm_profile(PmProfile::Unspecified)
        // The power button is fixed hardware because its flag is clear; the sleep button does not
        // exist because its flag is set.
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.firmware_ctrl = facs.into();
    // Both DSDT fields: guests older than ACPI 2.0 look at the first.
    fadt.dsdt = dsdt.into();
    fadt.x_dsdt = u64::from(dsdt).into();
    fadt.sci_int = u16::from(params.sci_irq).into();
    fadt.pm1a_evt_blk = u32::from(params.pm1a_event).into();
    fadt.pm1a_cnt_blk = u32::from(params.pm1a_control).into();
    fadt.pm_tmr_blk = u32::from(params.pm_timer).into();
    (fadt.pm1_evt_len, fadt.pm1_cnt_len, fadt.pm_tmr_len) = (4, 2, 4);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.century = CENTURY;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | VGA_NOT_PRESENT | NO_ASPM).into();
    fadt.reset_reg = port(params.reset.0, 8, AccessSize::ByteAccess);
    fadt.reset_value = params.reset.1;
    fadt.x_pm1a_evt_blk = port(params.pm1a_event, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = port(params.pm1a_control, 16, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = port(params.pm_timer, 32, AccessSize::DwordAccess);
    bytes(&fadt.finalize())
}

fn port(address: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, address.into())
}
