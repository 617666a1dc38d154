//! Virtio devices over PCI
