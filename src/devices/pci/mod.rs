//! The PCI bus, mechanism #1, and what PCI devices share.
