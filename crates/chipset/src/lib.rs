//! UART, RTC, PIT, PIC, IOAPIC, power control, debug exit
