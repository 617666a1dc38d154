//! The header that all tables but RSDP and FACS begin with (ACPI 6.5, 5.2.6).

/// Who made the board that the tables describe.
pub(super) const OEM_ID: [u8; 6] = *b"OSPITE";
/// Which board.
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"OSPITEPC";
pub(super) const OEM_REVISION: u32 = 1;
const HEADER_SIZE: usize = 36;
const CHECKSUM: usize = 9;

/// A whole table: header, body, checksum.
pub(super) fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = Vec::with_capacity(HEADER_SIZE + body.len());
    table.extend(signature);
    table.extend(((HEADER_SIZE + body.len()) as u32).to_le_bytes());
    table.extend([revision, 0]);
    table.extend(OEM_ID);
    table.extend(OEM_TABLE_ID);
    table.extend(OEM_REVISION.to_le_bytes());
    table.extend(b"OSPI");
    table.extend(1u32.to_le_bytes());
    table.extend(body);
    table[CHECKSUM] = table.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
    table
}
