//! Disk images behind one trait: raw, qcow2 and others
