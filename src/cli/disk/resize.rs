//! `launcher disk resize`.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use formats::{Disk, Format, Image, OpenError, Ring};

use super::format::{named, raw_name, thin};
use super::image::{self, at_block};
use super::save::{self, save};
use super::which::{index_of, is_index};
use crate::cli::output::{complain, print};
use crate::cli::target::{Target, ask};
use crate::config::{Block, Origin, Vm, size};
use crate::control::messages::{self, DiskStatus, Order, Progress, Resized, Size};
use crate::resize::{self, Consent, Subject, Wanted};
use crate::{Error, Result, exit, progress};

/// Change the size of a disk, of a running VM or a stopped one
///
/// A running guest sees the new size at once. All or nothing: after an error, image and disk have
/// the size that they had. Without `--shrink`, a smaller size is wrong usage: exit code 2.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  launcher disk resize web 0 8GiB\n  launcher disk resize vm.toml ROOT +1GiB --save\n  launcher disk resize vm.toml 0 2GiB"
)]
pub(super) struct Resize {
    /// TOML file of the VM, the folder of its vm.toml, or its name
    vm: PathBuf,
    /// The disk: its index over `[[block]]` from 0, or its id
    #[arg(value_name = "INDEX|ID")]
    disk: String,
    /// The new size: bytes, 8GiB, or +1GiB on top of what it has [default: that of the host block
    /// device that the disk is]
    size: Option<String>,
    /// Allow a smaller size: what lies beyond it is lost
    #[arg(long)]
    shrink: bool,
    /// Shrink although a running guest may use what is cut off
    #[arg(long, requires = "shrink")]
    force: bool,
    /// Write the new size into the VM's file too; its comments stay
    #[arg(long)]
    save: bool,
}

impl Resize {
    pub(super) fn run(self) -> Result<u8> {
        // What is no size is none for a running VM either.
        let wanted = self.size.as_deref().map(Wanted::parse).transpose()?;
        let target = Target::of(Some(self.vm.clone()))?;
        match target.is_running() {
            true => self.live(&target),
            false => self.still(&target, wanted),
        }
    }

    /// Resizes a disk of a VM that runs.
    fn live(self, target: &Target) -> Result<u8> {
        if self.save {
            self.can_be_saved(target)?;
        }
        let order = Order::Resize(messages::Resize {
            disk: self.disk.clone(),
            size: self.size.map(Size::Text),
            shrink: self.shrink,
            force: self.force,
        });
        let (bar, start) = (progress::hook(), Instant::now());
        let path = PathBuf::from(format!("disk {}", self.disk));
        let mut show = |Progress { done, of }| {
            bar(&formats::Progress {
                path: &path,
                done,
                total: of,
                elapsed: start.elapsed(),
            });
        };
        let resized: Resized = ask(&mut target.connect_for_order()?, order, &mut show)?;
        drop(bar);
        print(&said(&self.disk, &resized))?;
        match self.save {
            true => save_live(target, &resized)?,
            // A file that cannot be read now is no concern of this command.
            false => {
                let note = target
                    .config()
                    .ok()
                    .and_then(|vm| note(&vm, resized.disk, &self.disk, resized.to));
                note.iter().for_each(complain);
            }
        }
        Ok(exit::DONE)
    }

    /// Makes sure, before anything is changed, that the VM's file still has the disk. What the VM
    /// does not know either is for it to refuse.
    fn can_be_saved(&self, target: &Target) -> Result<()> {
        let status = target.status()?;
        let by_index = self.disk.parse().ok().filter(|_| is_index(&self.disk));
        let by_id = |disk: &DiskStatus| disk.id.as_deref() == Some(&*self.disk);
        let index = by_index
            .filter(|index| *index < status.disks.len())
            .or_else(|| status.disks.iter().position(by_id));
        let Some((index, disk)) = index.and_then(|index| Some((index, status.disks.get(index)?)))
        else {
            return Ok(());
        };
        let vm = target.config()?;
        if !is_same(&vm, index, &disk.path) {
            let file = target.file().display();
            let message = format!("disk {index} in {file} is another one by now");
            return Err(Error::failed(message)
                .help("nothing was changed; leave out `--save` to resize all the same"));
        }
        save::check(&vm, index)
    }

    /// Resizes a disk of a VM that does not run.
    fn still(self, target: &Target, wanted: Option<Wanted>) -> Result<u8> {
        let vm = target.config()?;
        let index = index_of(&vm, &self.disk)?;
        let block = &vm.block[index];
        if block.is_served() {
            return Err(resize::served(&self.disk, &block.path).into());
        }
        if self.save {
            save::check(&vm, index)?;
        }
        let consent = Consent {
            shrink: self.shrink,
            force: self.force,
        };
        let resized = stopped(&vm, index, &self.disk, wanted, consent)?;
        print(&said(&self.disk, &resized))?;
        if self.save {
            save(&vm, index, resized.to)?;
        } else if let Some(note) = note(&vm, index, &self.disk, resized.to) {
            complain(&note);
        }
        Ok(exit::DONE)
    }
}

/// Saves the size of a running VM's disk, unless its file has other disks by now.
fn save_live(target: &Target, resized: &Resized) -> Result<()> {
    let file = target.file().display();
    let index = resized.disk;
    let known = target
        .disks()
        .and_then(|mut disks| (index < disks.len()).then(|| disks.swap_remove(index).path));
    let vm = target.config()?;
    if !known.is_some_and(|known| is_same(&vm, index, &known)) {
        let message =
            format!("the disk has its new size, but disk {index} in {file} is another one by now");
        let to = size::show(resized.to);
        return Err(Error::failed(message).help(format!("write `size = \"{to}\"` there yourself")));
    }
    save(&vm, index, resized.to)
}

/// Whether the VM's file has this image as the disk `index`.
fn is_same(vm: &Vm, index: usize, image: &str) -> bool {
    let written = vm.block.get(index).map(|block| &block.path);
    written.is_some_and(|written| same_file(Path::new(image), written))
}

fn same_file(one: &Path, other: &Path) -> bool {
    let identity = |path: &Path| {
        let meta = std::fs::metadata(path)?;
        Ok::<_, io::Error>((meta.dev(), meta.ino()))
    };
    match (identity(one), identity(other)) {
        (Ok(one), Ok(other)) => one == other,
        _ => one == other,
    }
}

/// Changes the size of a disk that no VM uses, under its image's lock.
fn stopped(
    vm: &Vm,
    index: usize,
    disk: &str,
    wanted: Option<Wanted>,
    consent: Consent,
) -> Result<Resized> {
    let block = &vm.block[index];
    let format = named(&block.format)?;
    let refused = |error| at_block(vm, index, error);
    let mut subject = Subject {
        disk,
        path: &block.path,
        ro: block.ro,
        ephemeral: block.ephemeral,
        fixed: None,
        block_size: block.block_size,
        size: 0,
        device: None,
        running: false,
    };
    // What is never written is not even opened.
    if block.ro || block.ephemeral {
        resize::decide(&subject, wanted, consent)?;
    }
    let ring = image::ring()?;
    ring.on_progress(progress::hook());
    let written = Image {
        // Allocated is what is there once it is known that the size will change.
        sparse: true,
        ..image::image(block)
    };
    let first = ring.block_on(open(&ring, thin(format)?, &written), || {});
    let first = first.map_err(refused)?;
    fill(&mut subject, block, &*first);
    let from = subject.size;
    let to = match resize::decide(&subject, wanted, consent) {
        Ok(to) if to == from => to,
        Ok(to) if block.sparse || to < from => {
            change(&ring, first, to)
                .map_err(|error| Error::from(resize::failed(&subject, to, &error)))?;
            return Ok(Resized {
                disk: index,
                from,
                to,
            });
        }
        Ok(to) => to,
        Err(failure) => return Err(Error::from(failure)),
    };
    close(&ring, first).map_err(|error| Error::from(resize::failed(&subject, to, &error)))?;
    if to > from {
        let opened = ring.block_on(open(&ring, format, &image::image(block)), || {});
        let second = opened.map_err(refused)?;
        // Between the two the lock was open.
        fill(&mut subject, block, &*second);
        resize::decide(&subject, Some(Wanted::To(to)), Consent::default())?;
        change(&ring, second, to)
            .map_err(|error| Error::from(resize::failed(&subject, to, &error)))?;
    }
    Ok(Resized {
        disk: index,
        from,
        to,
    })
}

async fn open(ring: &Ring, format: &Format, image: &Image) -> Result<Box<dyn Disk>, OpenError> {
    (format.open)(ring, image).await
}

/// What is known of a disk once it is open.
fn fill<'a>(subject: &mut Subject<'a>, block: &'a Block, disk: &dyn Disk) {
    subject.size = disk.size();
    subject.fixed = (!disk.limits().resize).then_some(&*block.format);
    let device = raw_name(&block.format) && is_device(block);
    subject.device = device.then_some(subject.size);
}

fn is_device(block: &Block) -> bool {
    std::fs::metadata(&block.path).is_ok_and(|meta| meta.file_type().is_block_device())
}

/// Gives a disk its new size, durably.
fn change(ring: &Ring, disk: Box<dyn Disk>, to: u64) -> io::Result<()> {
    let resized = ring.block_on(disk.resize(to), || {});
    // A change that failed is not made by closing.
    let closed = close(ring, disk);
    resized.and(closed)
}

fn close(ring: &Ring, disk: Box<dyn Disk>) -> io::Result<()> {
    ring.block_on(disk.close(), || {})
}

/// What has happened.
fn said(disk: &str, resized: &Resized) -> String {
    let (from, to) = (resized.from, resized.to);
    let disk = format!("disk {disk}");
    match from.cmp(&to) {
        std::cmp::Ordering::Equal => format!("{disk} has {} already\n", size::show(to)),
        std::cmp::Ordering::Less => {
            let (from, to) = (size::show(from), size::show(to));
            format!("{disk} has grown from {from} to {to}\n")
        }
        std::cmp::Ordering::Greater => {
            let lost = size::show(from - to);
            let (from, to) = (size::show(from), size::show(to));
            format!("{disk} has shrunk from {from} to {to}: its last {lost} are lost\n")
        }
    }
}

/// What the next start will do because the VM's file says another size.
fn note(vm: &Vm, index: usize, disk: &str, to: u64) -> Option<String> {
    let declared = vm.block.get(index)?.size.filter(|size| *size != to)?;
    let then = match declared < to {
        true => "refuses the larger image",
        false => "makes it so large again",
    };
    let help = match vm.places.own_entry("block", index, "size") {
        Ok(_) => "`--save` writes the new size there".to_owned(),
        Err(_) => save::by_hand(vm, index, to),
    };
    let said = match vm.places.origin(&format!("block.{index}.size")) {
        Some(Origin::Line(file, _)) => format!("in {file}"),
        _ => format!("of {}", vm.file.display()),
    };
    Some(format!(
        "note: the `size` of disk {disk} {said} is {}: the next `launcher up` {then}\nhelp: {help}",
        size::show(declared)
    ))
}
