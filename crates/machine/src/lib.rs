//! A machine specification becomes a wired machine
