//! PCI configuration space, BARs, MSI-X, ECAM
