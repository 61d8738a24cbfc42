//! Images that QEMU made and used, and images of ours, each used by the other in turn.

mod changed;
mod created;
mod desk;
