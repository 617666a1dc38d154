//! The software engine: MMU, TLB, decode cache, interpreter, interrupts
